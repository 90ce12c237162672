"""Help in sections, and errors as one line with an exit code: where our commands differ from Typer's."""

from __future__ import annotations

import re
import sys
from typing import Any

import typer

from .. import processes
from ..errors import SsmCompressError
from ..extras import explain_import
from ..progress import hold_notes
from .options import PANELS
from .readable import name_options
from .terminal import arguments, complain, is_quiet, only_main_prints, say

INTERRUPTED = 130
OTHER = "Other"


class Command(typer.core.TyperCommand):
    """A command whose options are grouped under headings, with an example at the end of its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options grouped by heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            heading = "Arguments" if parameter.param_type_name == "argument" else OTHER
            sections.setdefault(getattr(parameter, "rich_help_panel", None) or heading, []).append(record)
        order = ["Arguments", *PANELS]
        for heading in sorted(sections, key=lambda name: order.index(name) if name in order else len(order)):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example unchanged, line by line."""
        if self.epilog:
            with formatter.section("Example"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{' ' * formatter.current_indent}{line}\n")


class Commands(typer.core.TyperGroup):
    """The group of all commands: full summaries, and errors as one plain line and an exit code."""

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra):
        """Run a command; return its exit code, or exit the process with it."""
        texts = list(sys.argv[1:] if args is None else args) or ["--help"]
        arguments.set(tuple(texts))
        name_options.set(self.name_options)
        try:
            with only_main_prints():
                return self._main(texts, prog_name, standalone_mode, **extra)
        finally:
            processes.shutdown()

    def _main(self, texts, prog_name, standalone_mode, **extra):
        try:
            with hold_notes() as notes:
                code = super().main(texts, prog_name or "ssmcompress", standalone_mode=False, **extra)
            for text in notes if not code else ():
                say(text, is_quiet())
            if code == INTERRUPTED:  # how newer versions of typer pass on Ctrl-C
                complain("interrupted", code)
        except typer.BadParameter.__base__ as error:  # click's UsageError, whose module depends on the typer version
            path = error.ctx.command_path if error.ctx is not None else "ssmcompress"
            code = complain(f"{error.format_message().replace('Value error, ', '')} (see {path} --help)", 2)
        except SsmCompressError as error:
            code = complain(str(error), error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            code = complain("interrupted", INTERRUPTED)
        except BrokenPipeError:  # `ssmcompress report | head`
            sys.stderr.close()
            code = 1
        except OSError as error:  # a file name too long, an unreadable folder, ...
            code = complain(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
        except Exception as error:
            broken = explain_import(error)
            code = complain(broken or f"internal error, {type(error).__name__}: {error}; please report it", 1)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with its whole summary, which click would truncate."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(limit=1000)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def name_options(self, message: str) -> str:
        """Replace argument names in a library message by options: `force=True` becomes --force."""
        options: dict[str, tuple[str, str]] = {}
        for command in self.commands.values():
            for parameter in command.params:
                if parameter.param_type_name == "option":
                    longest = max(parameter.opts, key=len, default="")
                    opposite = next(iter(parameter.secondary_opts), "")
                    options.setdefault(parameter.name, (longest, opposite))

        def name(match: re.Match[str]) -> str:
            argument, value = match.groups()
            if argument not in options:
                return match.group()
            yes, no = options[argument]
            return (no or f"--no-{argument.replace('_', '-')}") if value == "False" else yes

        return re.sub(r"`([a-z_]+)(?:=(True|False))?`", name, message)
