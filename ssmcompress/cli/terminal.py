"""What the command line prints and how it ends: results on stdout, progress and messages on stderr, exit codes."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import typer

from .. import processes
from ..errors import SsmCompressError, VerificationError
from ..progress import FrontEnd, shown_by

INTERRUPTED = 130
OTHERS_WAIT = 3.0  # seconds

_arguments: ContextVar[tuple[str, ...]] = ContextVar("ssmcompress_arguments", default=())


class Commands(typer.core.TyperGroup):
    """Errors as one plain line and an exit code, for usage errors as for our own."""

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra):
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        _arguments.set(tuple(arguments))
        try:
            with _only_the_first_prints():
                return self._main(arguments, prog_name, standalone_mode, **extra)
        finally:
            processes.shutdown()

    def _main(self, arguments, prog_name, standalone_mode, **extra):
        try:
            code = super().main(arguments, prog_name or "ssmcompress", standalone_mode=False, **extra)
            if code == INTERRUPTED:  # how newer typers hand on Ctrl-C
                _complain("interrupted", code)
        except typer.BadParameter.__base__ as error:  # click's UsageError, wherever typer keeps it
            code = _complain(f"{error.format_message()} (see ssmcompress --help)", 2)
        except SsmCompressError as error:
            code = _complain(str(error), error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            code = _complain("interrupted", INTERRUPTED)
        except BrokenPipeError:  # `ssmcompress report | head`
            sys.stderr.close()
            code = 1
        except OSError as error:  # a name too long, a folder that may not be read, ...
            code = _complain(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
        except Exception as error:
            if isinstance(error, MemoryError) or _looks_like_memory(error):
                code = _complain("out of memory; try a smaller --batch-size", 1)
            else:
                code = _complain(f"internal error, {type(error).__name__}: {error}; please report it", 1)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _only_the_first_prints() -> Iterator[None]:
    """Of the processes of a launcher; what the others have to say in case of need goes to stderr all the same."""
    if not processes.launched_index():
        yield
        return
    logging.getLogger("ssmcompress").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _complain(message: str, code: int) -> int:
    if number := processes.launched_index():
        # The launcher ends all processes as soon as one has failed. So what every one of them found is told once, by
        # the first, and what this one alone found is told here.
        time.sleep(OTHERS_WAIT)
        message = f"process {number}: {message}"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _looks_like_memory(error: Exception) -> bool:
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def command_line() -> str:
    """What the user typed, as it could be typed again."""
    return shlex.join(["ssmcompress", *_arguments.get()])


def say(message: str, quiet: bool) -> None:
    """A message for a person, on stderr."""
    if not quiet and not processes.launched_index():
        print(message, file=sys.stderr)


def print_json(value: Any) -> None:
    """The one JSON object that --json promises."""
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def progress_bars(quiet: bool) -> Iterator[None]:
    """Bars with the time left, on stderr, where that is a terminal; if `quiet`, no messages of the library either."""
    if quiet or processes.launched_index():
        logger = logging.getLogger("ssmcompress")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
        return
    if not sys.stderr.isatty():
        with shown_by(_Lines()):
            yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    told = TextColumn("{task.fields[told]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), told)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress, shown_by(_Bars(progress)):
        yield


class _Lines(FrontEnd):
    """Nothing animated: lines on stderr."""

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class _Bars(FrontEnd):
    """rich's bars, one for each thing that runs, with what is told of the innermost beside it."""

    def __init__(self, progress: Any):
        self.progress = progress
        self.running: list[Any] = []

    def track(self, items: Iterable, what: str, total: int, done: int = 0) -> Iterable:
        task = self.progress.add_task(what, total=total, completed=done, told="")
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
            self.progress.update(self.running[-1], told=text)

    def line(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)


def show_table(header: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """A table on stdout: the first column names, the others hold figures."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for name, cells in rows:
        table.add_row(name, *cells)
    # No markup: names of users' folders are shown as they are.
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)


def show_report(report: dict[str, Any], as_json: bool) -> None:
    """A report on stdout, as `ssmcompress.jobs.report` words it."""
    from ..jobs import report as reports

    if as_json:
        print_json(report)
        return
    show_table(["", *reports.columns(report)], reports.rows(report))
    for note in reports.notes(report):
        print(f"  {note}")
    maps, fits = reports.fits(report)
    if fits:
        show_table(["missed by a refitted map, before -> after", *maps], fits)


def show_preview(value: dict[str, Any], as_json: bool) -> None:
    """What a dry run found, on stdout."""
    if as_json:
        print_json(value)
        return
    for stage in value["stages"]:
        print(f"  after layer {stage['after']}: {stage['kept']} of {stage['of']} tokens, {stage['importance']}")
    for convention in ("full", "paper"):
        dense, pruned = (value[name]["flops"][convention] for name in ("dense", "pruned"))
        print(f"  GFLOPs ({convention}): {dense:.4g} -> {pruned:.4g} ({pruned / dense - 1:+.1%})")


def show_benchmark(result: dict[str, Any], as_json: bool) -> None:
    """Timings of models and ops, on stdout."""
    if as_json:
        print_json(result)
        return
    if models := result.get("models"):
        with_reference = "reference_ms" in models[0]
        header = ["", "batch", "ms", "quartiles", "images/s", "faster", "products ms", "x products"]
        header += ["reference ms", "x reference"] if with_reference else []
        rows = []
        for m in models:
            cells = [str(m["batch"]), f"{m['ms']:.1f}", f"{m['ms_low']:.1f}-{m['ms_high']:.1f}"]
            cells += [f"{m['images_per_second']:.1f}", f"{m['times_faster']:.2f}x"]
            cells += [f"{m['products_ms']:.1f}", f"{m['times_products']:.2f}"]
            cells += [f"{m['reference_ms']:.0f}", f"{m['times_reference']:.1f}"] if with_reference else []
            rows.append((m["model"], [*cells, f"{m['peak_mb']:.1f}", f"{m['activations_mb']:.1f}"]))
        show_table([*header, "peak MB", "one layer's MB"], rows)
        print("  faster: than the first model. products: the model's matrix products alone, and how many of them the")
        print(
            "  forward takes. peak: most memory of tensors at once, beside what the ops of one layer, or of a stem that"
        )
        print("  takes more, hand to each other.")
        if with_reference:
            print("  reference: with the scan in plain torch, and how many times faster the forward is than that.")
    if ops := result.get("ops"):
        _show_ops(ops)
    s = result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
    print(
        f"  {s['device']}, {s['threads']} threads, {s['dtype']}, medians of {s['repeats']} interleaved runs; {versions}"
    )


def _show_ops(ops: list[dict[str, Any]]) -> None:
    """A table for each shape and dtype."""
    limits = next((o for o in ops if o["op"] == "limits"), None)
    for case in dict.fromkeys((tuple(o["shape"]), o["dtype"]) for o in ops if o is not limits):
        rows = []
        for o in ops:
            if o is limits or (tuple(o["shape"]), o["dtype"]) != case:
                continue
            cells = [o["by"], f"{o['ms']:.3f}", f"{o['ms_low']:.3f}-{o['ms_high']:.3f}"]
            cells.append(f"{o['ns_per_element']:.4f}" if o["ns_per_element"] is not None else "")
            cells.append(f"{o['times_faster']:.1f}x" if o["times_faster"] is not None else "")
            if limits:
                known = "gb_per_s" in o
                cells += [f"{o[k]:.0f}" if known else "" for k in ("gb_per_s", "gexp_per_s")]
                cells.append(f"{o['times_limit']:.2f}" if known else "")
            rows.append((o["op"], cells))
        header = [f"{'x'.join(map(str, case[0]))}, {case[1]}", "by", "ms", "quartiles", "ns/element", "x reference"]
        show_table([*header, *(["GB/s", "Gexp/s", "x limit"] if limits else [])], rows)
    if limits:
        print(f"  limit: the slower of {limits['gb_per_s']:.0f} GB/s and {limits['gexp_per_s']:.0f} Gexp/s, which this")
        print(
            "  device reached in a copy and in registers. Read, written and taken: each input, result and element once."
        )


def say_about_data(report: dict[str, Any], quiet: bool) -> None:
    """What a user should know of the images that were measured on."""
    if not report["data"]["labelled"]:
        say(f"accuracy was not measured: {report['data']['name']} has no labels; give --data", quiet)
    for block in ("data", "calibration"):
        if names := report[block]["unreadable"]:
            say(f"skipped {len(names)} unreadable images: {', '.join(names[:3])}", quiet)


@contextmanager
def shown_when_it_fails(file: Path, as_json: bool) -> Iterator[None]:
    """A script that asked for JSON gets the figures of a verification that failed, too."""
    try:
        yield
    except VerificationError as error:
        if as_json and error.result is not None:
            show_verification(error.result, file, as_json)
        raise


def verification_json(result: Any, file: Path) -> dict[str, Any]:
    """A `Verification` or `Exported` as a JSON value."""
    from dataclasses import asdict

    worst = result.max_difference if math.isfinite(result.max_difference) else None
    return {"file": str(file), **asdict(result), "max_difference": worst, "passed": result.passed}


def show_verification(result: Any, file: Path, as_json: bool) -> None:
    """How an ONNX file compares with its model, on stdout."""
    if as_json:
        print_json(verification_json(result, file))
        return
    print(
        f"{file}: largest difference {result.max_difference:.2g} (allowed {result.atol:g}), "
        f"{result.top1_agreement:.1f}% in the same class, {result.images} images of {result.data}"
    )
    if result.stages:
        same = ", ".join(
            f"{s['kept']} after layer {s['after']} ({s['same']} of {result.images})" for s in result.stages
        )
        print(f"  the same tokens kept, by stage (images): {same}")
    if result.rounding:
        print(
            f"  float16 weights: logits move by up to {result.rounding['max_difference']:.2g}, "
            f"{result.rounding['top1_agreement']:.1f}% keep their class"
        )
    if result.ties:
        print(
            f"  {len(result.ties)} images kept other tokens, their scores being equal but for rounding: "
            f"{', '.join(result.ties)}"
        )


def show_export(result: Any, file: Path, as_json: bool) -> None:
    """What was written, and how it compares with its model, on stdout."""
    show_verification(result, file, as_json)
    if as_json:
        return
    print(f"  {result.bytes / 1e6:.1f} MB, opset {result.opset}, {result.dtype} weights, scan as {result.scan}")
    for form, times in result.scan_ms.items():
        print(f"  {form}: {', '.join(f'{ms:.1f} ms at batch {batch}' for batch, ms in times.items())}")
    for form, why in result.refused.items():
        print(f"  not {form}: {why}")
    if result.latency:
        batches = list(dict.fromkeys(row["batch"] for row in result.latency))
        found = {(row["model"], row["by"], row["batch"]): row["ms"] for row in result.latency}
        lines = [
            (f"{model}, {by}", [f"{found[model, by, batch]:.1f} ms" for batch in batches])
            for model, by in dict.fromkeys((row["model"], row["by"]) for row in result.latency)
        ]
        show_table(["latency", *(f"batch {batch}" for batch in batches)], lines)
