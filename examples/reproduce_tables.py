"""Reproduce the tables of the paper, on models that anyone can train or on ImageNet and published checkpoints.

    apt-get install dataset-fashion-mnist        # Debian; --idx for another copy of the four original files
    pip install '.[all]' scikit-image
    python examples/reproduce_tables.py
    python examples/reproduce_tables.py --imagenet imagenet --models checkpoints -o imagenet.md

The first form generates cluttered images (make_clutter.py) and trains a Vim, a PlainMamba, a DeiT and a segmentation
model on them, which takes a day on two cores; the tables take another half day. The second form takes the folders
`train` and `val` of a dataset and all checkpoints in a folder; for segmentation models it needs --scenes, a folder
with `images` and `annotations`.

The parts, for each model:
    make      images and models of the first form
    rows      all methods without training, with three choices (--seeds) of calibration images
    tuned     all models of the first seed after a short fine-tuning
    best      the best of them after fine-tuning on all training images
    speed     images per second of all models
    reasons   why alignment helps or not
    inputs    what the dropped tokens of a Vim would have contributed to its convolutions and scans
    figure    attention maps
    page      the page and all of its data as JSON next to it; also written after each other part

Everything but the page is kept in the cache. A page keeps the results of models whose checkpoints are not in the cache,
so models measured on several machines can share it. To resume a stopped run, repeat the command; parts that depend on a
changed model, image set or option are measured again. Text between the two marker comments of a page is kept when the
page is rewritten. --only and --parts divide the work: after `--parts make`, several processes may share a cache if they
work on different models.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from fashion_mnist import FOLDER
from reproduce.figure import draw_figure
from reproduce.inputs import measure_inputs
from reproduce.page import describe_run_here, read_notes, write_page
from reproduce.reasons import explain
from reproduce.rows import measure_rows
from reproduce.settings import Settings, read, write
from reproduce.speed import time_rows
from reproduce.subjects import Subject, find_subjects
from reproduce.tuning import tune_best, tune_rows
from training_loop import peak_memory

from ssmcompress.cli.terminal import only_main_prints, progress_bars
from ssmcompress.errors import SsmCompressError
from ssmcompress.progress import line

CACHE = Path(__file__).parent / "cache"
PAGE, CACHE_OF_MODELS, PAGE_OF_MODELS = Path("docs/results.md"), CACHE / "models", Path("results.md")
# Steps for each model, in order.
PARTS: dict[str, Callable[[Subject, Settings], None]] = {
    "rows": measure_rows, "tuned": tune_rows, "best": tune_best, "speed": time_rows, "reasons": explain,
    "inputs": measure_inputs, "figure": draw_figure,
}  # fmt: skip
MAKE, WRITE = "make", "page"
EVERYTHING = ",".join([MAKE, *PARTS, WRITE])


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = f"default: {PAGE}; with --models: {PAGE_OF_MODELS}"
    parser.add_argument("-o", "--output", type=Path, help=output)
    parser.add_argument("--cache", type=Path, help=f"default: {CACHE}; with --models: {CACHE_OF_MODELS}")
    parser.add_argument("--idx", type=Path, default=FOLDER, help="Fashion-MNIST; default: %(default)s")
    parser.add_argument("--imagenet", type=Path, help="a folder with train and val, each with one folder per class")
    parser.add_argument("--models", type=Path, help="a folder with checkpoints, with --imagenet or --scenes")
    parser.add_argument("--scenes", type=Path, help="a folder with images and annotations, each with both splits")
    parser.add_argument("--only", help="names of models, separated by commas; default: all")
    parser.add_argument("--parts", default=EVERYTHING, help="default: %(default)s")
    parser.add_argument("--seeds", type=list_numbers, default="0,1,2", help="default: %(default)s")
    parser.add_argument("--share", type=int, default=60, help="percent of the FLOPs left; default: %(default)s")
    parser.add_argument(
        "--further",
        type=list_numbers,
        default="75,50",
        help="further shares in percent, for table 3; default: %(default)s",
    )
    numbers = {
        "samples": "images to calibrate, search and refit on", "tune-images": "training images of `tuned`",
        "tune-epochs": "epochs of `tuned` and `best`", "reason-images": "test images of `reasons`",
        "batch-size": "batch size",
    }  # fmt: skip
    for name, text in numbers.items():
        default = getattr(Settings, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{text}; default: %(default)s")
    parser.add_argument("--best-images", type=positive, help="training images of `best`; default: all")
    parser.add_argument("--device", default=Settings.device, help="such as cuda; default: %(default)s")
    parser.add_argument("--threads", type=positive, help="CPU threads; another number changes the last digits")
    parser.add_argument(
        "--workers", type=int, default=Settings.workers, help="processes that read images; default: %(default)s"
    )
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(EVERYTHING.split(",")):
        parser.error(f"--parts {', '.join(sorted(unknown))}: expected some of {EVERYTHING.replace(',', ', ')}")
    if not args.seeds or not all(0 < percent < 100 for percent in (args.share, *args.further)):
        parser.error("expected --seeds, and for --share and --further percent above 0 and below 100")
    if (args.models is None) != (args.imagenet is None and args.scenes is None):
        parser.error("--models goes with --imagenet or --scenes")
    args.output = args.output or (PAGE if args.models is None else PAGE_OF_MODELS)
    args.cache = args.cache or (CACHE if args.models is None else CACHE_OF_MODELS)
    return args


def list_numbers(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers."""
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 0,1,2") from error


def positive(text: str) -> int:
    """Parse an integer greater than 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def choose_subjects(args: argparse.Namespace) -> tuple[list[Subject], list[str], list[str]]:
    """Return all models, from a folder or the small-scale setup, and the names of those to be measured in this run.

    The third value has the names of the files that the script creates.

    Missing files of the small-scale setup are created.
    """
    asked = args.only.split(",") if args.only else None
    if args.models is not None:
        subjects, created = find_subjects(args.models, args.imagenet, args.scenes), []
    else:
        from reproduce.clutter import list_makings, list_subjects, make_all  # needs scikit-image

        subjects, created = list_subjects(args.cache, args.idx), list(list_makings())
    names = [subject.name for subject in subjects]
    if unknown := set(asked or ()) - set(names):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    if args.models is None and MAKE in args.parts.split(","):
        make_all(args.cache, asked or names, args.idx)
    return subjects, asked or names, created


def run_part(name: str, subject: Subject, settings: Settings) -> None:
    """Run a part for a model and record its time and memory, even if it is interrupted."""
    begin = time.monotonic()
    try:
        PARTS[name](subject, settings)
    finally:
        file = settings.file_of("cost", subject.name)
        cost = read(file)
        earlier = cost.get(name, {"seconds": 0.0})
        seconds = round(earlier["seconds"] + time.monotonic() - begin, 1)
        cost[name] = {"seconds": seconds, "peak_mb": max(peak_memory() or 0.0, earlier.get("peak_mb") or 0.0) or None}
        cost[name]["machine"] = describe_run_here(settings)
        write(file, cost)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the time so far is recorded
    if args.threads:
        torch.set_num_threads(args.threads)
    command = shlex.join(["python", "examples/reproduce_tables.py", *sys.argv[1:]])
    args.cache.mkdir(parents=True, exist_ok=True)
    values = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    values |= {"share": args.share / 100, "further": tuple(percent / 100 for percent in args.further)}
    settings = Settings(**values, command=command)
    try:
        with only_main_prints(), progress_bars(quiet=False):
            run_all(args, settings)
    except SsmCompressError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        line("interrupted: run the same command again to resume")
        sys.exit(128 + signal.SIGINT)


def run_all(args: argparse.Namespace, settings: Settings) -> None:
    """Run the selected parts for the selected models, and write the page after each.

    Raises:
        SystemExit: a part failed for a model; later parts and the other models were run nevertheless.
    """
    read_notes(args.output)  # fail early if the page is damaged
    subjects, only, created = choose_subjects(args)
    parts, failed = args.parts.split(","), []
    for subject in subjects:
        for name in PARTS:
            if subject.name in only and name in parts:
                line(f"{subject.name}: {name}")
                try:
                    run_part(name, subject, settings)
                except SsmCompressError as error:
                    failed.append(f"{subject.name}, {name}: {error}")
                    line(f"failed: {error}")
                write_page(args.output, subjects, settings, created)
    write_page(args.output, subjects, settings, created)
    line(f"wrote {args.output}")
    if failed:
        raise SystemExit("\n".join(f"error: {text}" for text in failed))


if __name__ == "__main__":
    main()
