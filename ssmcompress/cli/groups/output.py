"""Options of what is printed and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..log import start_log
from ..options import OUTPUT, option
from ..terminal import command_line


@dataclass(frozen=True)
class Printing:
    """What is printed."""

    as_json: Annotated[bool, option(OUTPUT, "--json", help="Print one JSON object instead of a table.")] = False
    quiet: Annotated[bool, option(OUTPUT, "--quiet", help="No progress and no messages.")] = False
    verbose: Annotated[bool, option(OUTPUT, "--verbose", help="Also print details on stderr.")] = False
    log_file: Annotated[
        str | None, option(OUTPUT, help="Append messages, steps and warnings to this file, also with --quiet.")
    ] = None

    def begin(self) -> None:
        """Start the log of the command as set by the options.

        Raises:
            InputError: the log file cannot be written to, or holds something else.
        """
        start_log(self.log_file, self.verbose, self.quiet, command_line())


@dataclass(frozen=True)
class ReportPrinting(Printing):
    """What is printed from a report."""

    verbose: Annotated[
        bool,
        option(
            OUTPUT,
            "--verbose",
            help="Also show the error of each refitted map, before and after, and print details on stderr.",
        ),
    ] = False


Force = Annotated[bool, option(OUTPUT, "--force", help="Replace the output if it exists.")]


ForceFolder = Annotated[
    bool, option(OUTPUT, "--force", help="Replace the output if it exists, with the ONNX file exported from it.")
]


@dataclass(frozen=True)
class Output:
    """The output folder."""

    output: Annotated[str | None, option(OUTPUT, "--output", "-o", help="Output folder.")] = None
    force: ForceFolder = False

    def path(self, default: Path) -> Path:
        """Return the folder given by the option, or the default."""
        return Path(self.output or default)
