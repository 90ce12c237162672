"""Messages, progress and errors on stderr, and the log of a command (--log-file, --verbose)."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import processes
from .._version import __version__
from ..errors import InputError, escape_control
from ..progress import FrontEnd, use_front_end

if TYPE_CHECKING:
    from ..models.base import TokenModel

OTHERS_WAIT = 3.0  # seconds
LONGEST_WORD, LONGEST_LINE = 400, 2000  # characters
STAND_IN = "sample photographs"  # the name of `ssmcompress.data.find.photographs`
# Packages whose versions a log file begins with, where they are installed.
LOGGED_VERSIONS = ("torch", "numpy", "numba", "triton", "timm", "onnxruntime", "huggingface_hub")

arguments: ContextVar[tuple[str, ...]] = ContextVar("ssmcompress_arguments", default=())
# Whether bars are drawn already.
_shown: ContextVar[bool] = ContextVar("ssmcompress_bars", default=False)
# What makes options of the arguments that a message of the library names: `force=True` becomes --force.
name_options: ContextVar[Callable[[str], str]] = ContextVar("ssmcompress_name_options", default=str)
# Called when the command has ended and its last message was printed.
_at_the_end: ContextVar[ExitStack | None] = ContextVar("ssmcompress_at_the_end", default=None)
_log_file: ContextVar[_LogFile | None] = ContextVar("ssmcompress_log_file", default=None)
# Whether `start_log` decides what the library's logger prints.
_logs: ContextVar[bool] = ContextVar("ssmcompress_logs", default=False)


@contextmanager
def only_main_prints() -> Iterator[None]:
    """Let only the main process of a launcher print; errors of the others go to stderr all the same.

    The log of a command that runs in the body of the with statement ends with it.
    """
    with ExitStack() as stack:
        _set(_at_the_end, stack, stack)
        if processes.launched_index():
            logger = logging.getLogger("ssmcompress")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _set(variable: ContextVar[Any], value: Any, until: ExitStack) -> None:
    """Set a context variable until a stack ends."""
    until.callback(variable.reset, variable.set(value))


def start_log(file: str | None, verbose: bool, quiet: bool) -> None:
    """Log the rest of the command: what the library does, and the warnings of other packages.

    A log file is appended to: a run that goes on after a stop, or the next run of a script, belongs in the same file,
    nothing is lost, and the option means the same in commands with --force and without.

    Args:
        file: where to; None: nowhere. It also has the messages for the user, errors with their tracebacks, the command
            line and versions. verbose: whether stderr shows what the library does. quiet: whether it shows only errors.

    Raises:
        InputError: the file cannot be written to, or it holds something else than a log of ssmcompress.
    """
    stack, main = _at_the_end.get(), not processes.launched_index()
    if stack is None or (file is None and not verbose):
        return
    if file is not None:
        _open_log(Path(file), logging.DEBUG if main else logging.ERROR, stack)
    if not main:  # the other processes show errors only, in any case
        return
    logger, shown = logging.getLogger("ssmcompress"), _Stderr()
    shown.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.DEBUG)
    stack.callback(logger.removeHandler, shown)
    logger.addHandler(shown)
    _set(_logs, True, stack)
    if file is not None:
        from importlib import metadata  # 30 ms, which --help does not wait for

        versions = [f"ssmcompress {__version__}", f"Python {sys.version.split()[0]}"]
        for package in LOGGED_VERSIONS:
            with suppress(metadata.PackageNotFoundError):
                versions.append(f"{package} {metadata.version(package)}")
        log(f"{', '.join(versions)}, {sys.platform}")
        log(f"command: {command_line()}, in {os.getcwd()}")
        began = time.perf_counter()
        stack.callback(lambda: log(f"ended after {time.perf_counter() - began:.1f} s"))


def _open_log(path: Path, level: int, stack: ExitStack) -> None:
    """Append to a log file until the stack ends."""
    try:
        if path.is_file():
            with open(path, "rb") as content:
                start = content.read(100)
            if start and not re.match(rb"\d{4}-\d\d-\d\d \S+ [A-Z]+ ssmcompress: ", start):
                raise InputError(f"--log-file {path} is no log of ssmcompress: it is left as it is, name another file")
        handler = _LogFile(path, level)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--log-file {path}: {reason}; expected a file in a folder that exists") from error
    _set(_log_file, handler, stack)
    stack.callback(handler.close)
    # Neither the loggers of torch, which do not propagate, nor those that a handler of their own prints would reach a
    # handler of the root. All records are made by the factory.
    make, show = logging.getLogRecordFactory(), warnings.showwarning

    def make_and_log(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        if record.name:  # `logging.makeLogRecord` makes them empty
            handler.write(record)
        return record

    def show_and_log(message, category, filename, lineno, file=None, line=None) -> None:
        log(f"{category.__name__}: {message} ({filename}, line {lineno})", logging.WARNING)
        show(message, category, filename, lineno, file, line)

    stack.callback(logging.setLogRecordFactory, make)
    logging.setLogRecordFactory(make_and_log)
    stack.callback(setattr, warnings, "showwarning", show)
    warnings.showwarning = show_and_log


def log(text: str, level: int = logging.INFO, error: BaseException | None = None) -> None:
    """Write a text to the log file of the command, if it has one, with the traceback of an error."""
    if (handler := _log_file.get()) is not None:
        info = (type(error), error, error.__traceback__) if error is not None else None
        handler.write(logging.LogRecord("ssmcompress", level, "", 0, text, (), info))


class _LogFile(logging.FileHandler):
    """Appends records to a file, each with the time; where that fails, says so once, and the command goes on."""

    def __init__(self, path: Path, level: int):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setLevel(level)
        self.broken = False

    def write(self, record: logging.LogRecord) -> None:
        """Append a record, unless its level is too low."""
        if record.levelno >= self.level and not self.broken:
            self.handle(record)

    def format(self, record: logging.LogRecord) -> str:
        """The time with the zone, the level and the logger, then the text, its further lines indented."""
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")
        text = escape_control(name_options.get()(super().format(record)))
        return f"{when} {record.levelname} {record.name}: {text}".replace("\n", "\n    ")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, as logging calls it
        """Say that the file cannot be written. What is wrong with a record is for the logger's own handler to say."""
        if isinstance(error := sys.exc_info()[1], OSError) and not self.broken:
            self.broken = True
            print(readable(f"--log-file {self.baseFilename}: {error.strerror}; it ends here"), file=sys.stderr)

    def close(self) -> None:
        """Close the file, even if its last lines cannot be written."""
        with suppress(OSError):
            super().close()


class _Stderr(logging.Handler):
    """Prints records of the library on stderr, which Python does by itself from WARNING on if there is no handler."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(readable(record.getMessage()), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def readable(message: str) -> str:
    """A message with the names of options, without control characters, and without the middle of very long parts."""
    text = escape_control(name_options.get()(message))
    return re.sub(
        rf"\S{{{LONGEST_WORD + 1},}}", lambda m: f"{m.group()[: LONGEST_WORD // 2]}...{m.group()[-20:]}", text
    )


def complain(message: str, code: int) -> int:
    """Print an error as one line, and return the exit code."""
    if number := processes.launched_index():
        # The launcher ends all processes as soon as one has failed. So an error of all of them is printed once, by the
        # main process, and an error of this process alone is printed here.
        time.sleep(OTHERS_WAIT)
        message = f"process {number}: {message}"
    log(f"exit code {code}: {message}", logging.ERROR, sys.exc_info()[1])
    print(f"error: {' '.join(readable(message).split())[:LONGEST_LINE]}", file=sys.stderr)
    return code


def command_line() -> str:
    """What the user typed, as it could be typed again."""
    return shlex.join(["ssmcompress", *arguments.get()])


def is_quiet() -> bool:
    """Whether the command that runs was given --quiet."""
    return "--quiet" in arguments.get()


def say(message: str, quiet: bool) -> None:
    """A message for a person, on stderr and in the log file."""
    log(message)
    if not quiet and not processes.launched_index():
        print(readable(message), file=sys.stderr)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[None]:
    """Bars with the time left, on stderr, where that is a terminal; if `quiet`, no messages of the library either."""
    if quiet or processes.launched_index():
        logger = logging.getLogger("ssmcompress")
        if _logs.get():  # and prints errors only
            yield
            return
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
        return
    if not sys.stderr.isatty():
        with use_front_end(_Lines()):
            yield
        return
    if _shown.get():  # inside another one, as where a job opens models itself: rich draws one display at a time
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    status = TextColumn("{task.fields[status]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), status)
    token = _shown.set(True)
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars, use_front_end(_Bars(bars)):
            yield
    finally:
        _shown.reset(token)


class _Lines(FrontEnd):
    """Nothing animated: lines on stderr."""

    def line(self, text: str) -> None:
        log(text)
        print(readable(text), file=sys.stderr, flush=True)


class _Bars(FrontEnd):
    """rich's bars, one for each loop that runs, with the status of the innermost one next to it."""

    def __init__(self, progress: Any):
        self.progress = progress
        self.running: list[Any] = []

    def track(self, items: Iterable, what: str, total: int, done: int = 0) -> Iterable:
        task = self.progress.add_task(what, total=total, completed=done, status="")
        self.running.append(task)
        try:
            for item in items:
                yield item
                self.progress.advance(task)
        finally:
            self.running.remove(task)
            self.progress.remove_task(task)

    def status(self, text: str) -> None:
        if self.running:
            self.progress.update(self.running[-1], status=text)

    def line(self, text: str) -> None:
        log(text)
        self.progress.console.print(readable(text), markup=False, highlight=False)


@contextmanager
def say_how_to_resume(commands: Mapping[Path, str], quiet: bool) -> Iterator[None]:
    """Where the body is interrupted, say where the state of the run is and which command goes on from it.

    Args:
        commands: the command that goes on for each place where there may be a state.
    """
    try:
        yield
    except KeyboardInterrupt:
        for state, command in commands.items():
            if state.exists():
                say(f"the state is in {state}: `{command}` goes on", quiet)
        raise


def find_dense_or_say(model: TokenModel, dense: str | None, without: str, quiet: bool) -> TokenModel | None:
    """The dense model of a pruned one; where it is gone, say what happens `without` it.

    Raises:
        InputError: the file given as `dense` cannot be used.
    """
    from ..models.checkpoint import find_dense

    try:
        return find_dense(model, dense)
    except InputError as error:
        if dense is not None:
            raise
        say(f"{without}: {error}; give --dense", quiet)
        return None


def say_about_images(result: Mapping[str, Any], quiet: bool, agreement: bool = True) -> None:
    """Say what a user should know of the images that were measured on.

    Args:
        result: figures with the blocks `task` and `data`. agreement: whether agreement with the dense model was
            measured.
    """
    data = result["data"]
    if not data["labelled"]:
        from ..tasks import find_task

        stand_in = data["name"] == STAND_IN
        advice = "give --data" if stand_in else f"labels are {find_task(result.get('task')).labels}"
        if agreement:
            say(f"accuracy was not measured: no labels in {data['name']}; {advice}", quiet)
        else:
            say(f"nothing to measure: no labels in {data['name']}, and no dense model to agree with; {advice}", quiet)
    say_unreadable(data["unreadable"], quiet)


def say_unreadable(names: Sequence[str], quiet: bool) -> None:
    """Say which images could not be read."""
    if names:
        say(f"skipped {len(names)} unreadable images: {', '.join(names[:3])}", quiet)


def say_warnings(result: Mapping[str, Any], quiet: bool) -> None:
    """Say the warnings of a result that is printed as JSON; tables have them below."""
    for warning in result.get("warnings") or ():
        say(f"warning: {warning}", quiet)


def say_about_data(report: Mapping[str, Any], as_json: bool, quiet: bool) -> None:
    """Say what a user should know of a report and its images; its warnings, too, if it is printed as JSON."""
    if as_json:
        say_warnings(report, quiet)
    say_about_images(report, quiet)
    say_unreadable(report["calibration"]["unreadable"], quiet)
