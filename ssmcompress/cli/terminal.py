"""Messages, progress and errors of a command on stderr."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import processes
from ..errors import InputError, SsmCompressWarning
from ..progress import FrontEnd, use_front_end
from .devices import goes_on
from .log import end_log, is_logging, log
from .readable import readable

if TYPE_CHECKING:
    from ..models.base import TokenModel

OTHERS_WAIT = 3.0  # seconds
LONGEST_LINE = 2000  # characters
STAND_IN = "sample photographs"  # name of `ssmcompress.data.find.photographs`

arguments: ContextVar[tuple[str, ...]] = ContextVar("ssmcompress_arguments", default=())
# Whether progress bars are already displayed.
_shown: ContextVar[bool] = ContextVar("ssmcompress_bars", default=False)


@contextmanager
def only_main_prints() -> Iterator[None]:
    """Let only the main process of a launcher print; errors of the other processes still go to stderr.

    Warnings of the library become messages of the command. The log of the command ends with the with block.
    """
    with open(os.devnull, "w") as nowhere, _say_warnings(), end_log() as stack:
        if processes.launched_index():
            logger = logging.getLogger("ssmcompress")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            stack.enter_context(redirect_stdout(nowhere))
        yield


@contextmanager
def _say_warnings() -> Iterator[None]:
    """Print each warning of the library once, as one line; warnings of other packages are shown as usual."""
    said: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say_or_show(message: Warning, category: type[Warning], *place: Any, **named: Any) -> None:
            if not issubclass(category, SsmCompressWarning):
                show(message, category, *place, **named)
            elif (text := str(message)) not in said:
                said.add(text)
                say(text, is_quiet(), logging.WARNING)

        warnings.showwarning = say_or_show
        warnings.simplefilter("always", SsmCompressWarning)
        yield


def complain(message: str, code: int) -> int:
    """Print an error as one line and return the exit code."""
    if number := processes.launched_index():
        # The launcher ends all processes as soon as one fails. An error common to all is therefore printed once, by the
        # main process, while an error of this process alone is printed here.
        time.sleep(OTHERS_WAIT)
        message = f"process {number}: {message}"
    log(f"exit code {code}: {message}", logging.ERROR, sys.exc_info()[1])
    print(f"error: {' '.join(readable(message).split())[:LONGEST_LINE]}", file=sys.stderr)
    return code


def command_line() -> str:
    """Return the command line, quoted so that it can be typed again."""
    return shlex.join(["ssmcompress", *arguments.get()])


def is_quiet() -> bool:
    """Return whether the running command was given --quiet."""
    return "--quiet" in arguments.get()


def say(message: str, quiet: bool, level: int = logging.INFO) -> None:
    """Print a message on stderr and write it with its level to the log file."""
    log(message, level)
    if not quiet and not processes.launched_index():
        print(readable(message), file=sys.stderr)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[None]:
    """Show progress bars with the time left if stderr is a terminal; `quiet` also hides the library's messages."""
    if quiet or processes.launched_index():
        logger = logging.getLogger("ssmcompress")
        if is_logging():  # and prints errors only
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
    if _shown.get():  # nested, for instance in a job that opens models itself: rich allows one display at a time
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
    """Prints plain lines on stderr, without animation."""

    def line(self, text: str) -> None:
        log(text)
        print(readable(text), file=sys.stderr, flush=True)


class _Bars(FrontEnd):
    """Shows one of rich's bars for each running loop, with the status of the innermost one next to it."""

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
    """If the body is interrupted, print where the state of the run is and which command resumes it.

    An out-of-memory error in the body includes this command, too.

    Args:
        commands: the command that resumes from each possible location of a state.
    """
    try:
        yield
    except KeyboardInterrupt:
        for state, command in commands.items():
            if state.exists():
                say(f"the state is saved in {state}: resume with `{command}`", quiet)
        raise
    except Exception:
        goes_on.set(next((command for state, command in commands.items() if state.exists()), None))
        raise


def find_dense_or_say(model: TokenModel, dense: str | None, without: str, quiet: bool) -> TokenModel | None:
    """Return the dense model of a pruned one; if it no longer exists, say what happens `without` it.

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
    """Print what a user should know about the evaluation images.

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
            say(f"nothing to measure: no labels in {data['name']}, and no dense model to compare with; {advice}", quiet)
    say_unreadable(data["unreadable"], quiet)


def say_unreadable(names: Sequence[str], quiet: bool) -> None:
    """Print which images could not be read."""
    if names:
        say(f"skipped {len(names)} unreadable images: {', '.join(names[:3])}", quiet)


def say_warnings(result: Mapping[str, Any], quiet: bool) -> None:
    """Print the warnings of a result that is printed as JSON; tables include them."""
    for warning in result.get("warnings") or ():
        say(f"warning: {warning}", quiet)


def say_about_data(report: Mapping[str, Any], as_json: bool, quiet: bool) -> None:
    """Print what a user should know about a report and its images, and its warnings if it is printed as JSON."""
    if as_json:
        say_warnings(report, quiet)
    say_about_images(report, quiet)
    say_unreadable(report["calibration"]["unreadable"], quiet)
