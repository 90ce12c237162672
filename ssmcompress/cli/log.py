"""The log of a command: the file of --log-file, and the --verbose output on stderr."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import processes
from .._version import __version__
from ..errors import InputError, SsmCompressWarning, escape_control
from .readable import name_options, readable

# Packages whose versions are logged at the start, if installed.
LOGGED_VERSIONS = ("torch", "numpy", "numba", "triton", "timm", "onnxruntime", "huggingface_hub")

# Called when the command has ended and its last message has been printed.
_at_the_end: ContextVar[ExitStack | None] = ContextVar("ssmcompress_at_the_end", default=None)
_log_file: ContextVar[_LogFile | None] = ContextVar("ssmcompress_log_file", default=None)
# Whether `start_log` controls what the library's logger prints.
_logs: ContextVar[bool] = ContextVar("ssmcompress_logs", default=False)


@contextmanager
def end_log() -> Iterator[ExitStack]:
    """End the command's log when the with block ends; yield the stack of callbacks that run then."""
    with ExitStack() as stack:
        _set(_at_the_end, stack, stack)
        yield stack


def start_log(file: str | None, verbose: bool, quiet: bool, command: str) -> None:
    """Log the rest of the command: what the library does, and the warnings of other packages.

    A log file is appended to, so that a resumed run or the next run of a script can use the same file without losing
    anything, and the option means the same in commands with and without --force.

    Args:
        file: log file; None: no file. It also contains the messages for the user, errors with their tracebacks, the
            command line and versions. verbose: whether stderr shows what the library does. quiet: whether it shows only
            errors. command: the command line.

    Raises:
        InputError: the file cannot be written to, or it is not a log of ssmcompress.
    """
    stack, main = _at_the_end.get(), not processes.launched_index()
    if stack is None or (file is None and not verbose):
        return
    if file is not None:
        _open_log(Path(file), logging.DEBUG if main else logging.ERROR, stack)
    if not main:  # the other processes only ever show errors
        return
    logger, shown = logging.getLogger("ssmcompress"), _Stderr()
    shown.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
    stack.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.DEBUG)
    stack.callback(logger.removeHandler, shown)
    logger.addHandler(shown)
    _set(_logs, True, stack)
    if file is not None:
        from importlib import metadata  # takes 30 ms, which --help should not pay

        versions = [f"ssmcompress {__version__}", f"Python {sys.version.split()[0]}"]
        for package in LOGGED_VERSIONS:
            with suppress(metadata.PackageNotFoundError):
                versions.append(f"{package} {metadata.version(package)}")
        log(f"{', '.join(versions)}, {sys.platform}")
        log(f"command: {command}, in {os.getcwd()}")
        began = time.perf_counter()
        stack.callback(lambda: log(f"ended after {time.perf_counter() - began:.1f} s"))


def is_logging() -> bool:
    """Return whether `start_log` controls what the library's logger prints."""
    return _logs.get()


def log(text: str, level: int = logging.INFO, error: BaseException | None = None) -> None:
    """Write a message to the log file of the command, if there is one, with the traceback of an error."""
    if (handler := _log_file.get()) is not None:
        info = (type(error), error, error.__traceback__) if error is not None else None
        handler.write(logging.LogRecord("ssmcompress", level, "", 0, text, (), info))


def _open_log(path: Path, level: int, stack: ExitStack) -> None:
    """Append to a log file until the stack is closed."""
    try:
        if path.is_file():
            with open(path, "rb") as content:
                start = content.read(100)
            if start and not re.match(rb"\d{4}-\d\d-\d\d \S+ [A-Z]+ ssmcompress: ", start):
                raise InputError(
                    f"--log-file {path} is not a log of ssmcompress and is left unchanged: choose another file"
                )
        handler = _LogFile(path, level)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--log-file {path}: {reason}; expected a file in a folder that exists") from error
    _set(_log_file, handler, stack)
    stack.callback(handler.close)
    # A handler of the root logger would miss torch's loggers, which do not propagate, and loggers with their own
    # handlers. The record factory sees all records.
    make, show = logging.getLogRecordFactory(), warnings.showwarning

    def make_and_log(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        if record.name:  # `logging.makeLogRecord` creates records without a name
            handler.write(record)
        return record

    def show_and_log(message, category, filename, lineno, file=None, line=None) -> None:
        if not issubclass(category, SsmCompressWarning):  # those are logged when they are printed
            log(f"{category.__name__}: {message} ({filename}, line {lineno})", logging.WARNING)
        show(message, category, filename, lineno, file, line)

    stack.callback(logging.setLogRecordFactory, make)
    logging.setLogRecordFactory(make_and_log)
    stack.callback(setattr, warnings, "showwarning", show)
    warnings.showwarning = show_and_log


def _set(variable: ContextVar[Any], value: Any, until: ExitStack) -> None:
    """Set a context variable until a stack is closed."""
    until.callback(variable.reset, variable.set(value))


class _LogFile(logging.FileHandler):
    """Appends timestamped records to a file; if writing fails, reports it once, and the command continues."""

    def __init__(self, path: Path, level: int):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setLevel(level)
        self.broken = False

    def write(self, record: logging.LogRecord) -> None:
        """Append a record, unless its level is too low."""
        if record.levelno >= self.level and not self.broken:
            self.handle(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the time with time zone, the level, the logger and the text, with further lines indented."""
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")
        text = escape_control(name_options.get()(super().format(record)))
        return f"{when} {record.levelname} {record.name}: {text}".replace("\n", "\n    ")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, name set by logging
        """Report that the file cannot be written. Invalid records are reported by the logger's own handler."""
        if isinstance(error := sys.exc_info()[1], OSError) and not self.broken:
            self.broken = True
            print(readable(f"--log-file {self.baseFilename}: {error.strerror}; logging stops here"), file=sys.stderr)

    def close(self) -> None:
        """Close the file, even if its last lines cannot be written."""
        with suppress(OSError):
            super().close()


class _Stderr(logging.Handler):
    """Prints records of the library on stderr; without any handler, Python would print those from WARNING on."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(readable(record.getMessage()), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)
