"""Reproduce the tables of the paper: on models that anyone can train, or on ImageNet and published checkpoints.

    apt-get install dataset-fashion-mnist        # Debian; or any copy of the four original files
    pip install '.[all]' scikit-image
    python examples/reproduce_tables.py
    python examples/reproduce_tables.py --imagenet imagenet --models checkpoints -o imagenet.md

The first form makes images with clutter (make_clutter.py), trains a Vim, a PlainMamba, a DeiT and a segmentation model
on them, and takes about a day on two cores. The second form takes the folders `train` and `val` of a data set and all
checkpoints in a folder; segmentation models among them need `--scenes`, a folder with `images` and `annotations`.

For each model there are rows without training, with three choices of the images to calibrate on, and rows after a short
fine-tuning. The script also times all models, measures why alignment helps or not, and draws attention maps. It writes
a page, and everything else to the cache; what stands between the two comments of a page stays when it is written again.
It can be stopped at any time; the same command goes on where it stopped.
`--only` and `--parts` divide the work: two processes that share a cache must not have the same models.
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
from reproduce.figure import draw_figure
from reproduce.page import write_page
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
# What is done for each model, in order.
PARTS: dict[str, Callable[[Subject, Settings], None]] = {
    "rows": measure_rows, "tuned": tune_rows, "best": tune_best, "speed": time_rows, "reasons": explain,
    "figure": draw_figure,
}  # fmt: skip
MAKE = "make"


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results.md"), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    parser.add_argument("--imagenet", type=Path, help="a folder with train and val, each with a folder for each class")
    parser.add_argument("--models", type=Path, help="a folder with checkpoints, with --imagenet or --scenes")
    parser.add_argument("--scenes", type=Path, help="a folder with images and annotations, each with both splits")
    parser.add_argument("--only", help="names of models, with commas between them")
    parser.add_argument("--parts", default=",".join([MAKE, *PARTS]), help="default: %(default)s")
    parser.add_argument("--seeds", type=list_numbers, default="0,1,2", help="default: %(default)s")
    parser.add_argument("--share", type=int, default=60, help="percent of the FLOPs left; default: %(default)s")
    parser.add_argument("--further", type=list_numbers, default="75,50", help="table 3; default: %(default)s")
    parser.add_argument("--samples", type=int, default=Settings.samples, help="images to calibrate and refit on")
    parser.add_argument("--tune-images", type=int, default=Settings.tune_images)
    parser.add_argument("--tune-epochs", type=int, default=Settings.tune_epochs)
    parser.add_argument("--best-images", type=int, help="to fine-tune the best row on; default: all")
    parser.add_argument("--reason-images", type=int, default=Settings.reason_images)
    parser.add_argument("--device", default=Settings.device)
    parser.add_argument("--threads", type=int, help="of the CPU; results are the same to the bit with as many alone")
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--workers", type=int, default=Settings.workers)
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - {MAKE, *PARTS}:
        parser.error(f"--parts {', '.join(sorted(unknown))}: expected some of {', '.join([MAKE, *PARTS])}")
    if not args.seeds or not all(0 < percent < 100 for percent in (args.share, *args.further)):
        parser.error("expected --seeds, and for --share and --further percent above 0 and below 100")
    if (args.models is None) != (args.imagenet is None and args.scenes is None):
        parser.error("--models goes with --imagenet or --scenes")
    return args


def list_numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers of a text, with commas between them."""
    return tuple(int(number) for number in text.split(",") if number)


def choose_subjects(args: argparse.Namespace) -> tuple[list[Subject], list[str]]:
    """Return all models, those of a folder or those of the miniature, and the names of those that are measured now.

    What is missing of the miniature is made.
    """
    if args.models is not None:
        subjects = find_subjects(args.models, args.imagenet, args.scenes)
    else:
        from reproduce.clutter import list_subjects, make_all

        subjects = list_subjects(args.cache)
    names = [subject.name for subject in subjects]
    only = args.only.split(",") if args.only else names
    if unknown := set(only) - set(names):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    if args.models is None and MAKE in args.parts.split(","):
        make_all(args.cache, only)
    return subjects, only


def run_part(name: str, subject: Subject, settings: Settings) -> None:
    """Do a part of the work for a model, and note the time and the memory that it took, also when it is stopped."""
    begin = time.monotonic()
    try:
        PARTS[name](subject, settings)
    finally:
        file = settings.file_of("cost", subject.name)
        cost = read(file)
        earlier = cost.get(name, {"seconds": 0.0})
        seconds = round(earlier["seconds"] + time.monotonic() - begin, 1)
        cost[name] = {"seconds": seconds, "peak_mb": max(peak_memory() or 0.0, earlier.get("peak_mb") or 0.0) or None}
        write(file, cost)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the time so far is noted
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


def run_all(args: argparse.Namespace, settings: Settings) -> None:
    """Do the parts that are asked for, for the models that are asked for, and write the page of all that is there."""
    subjects, only = choose_subjects(args)
    parts = args.parts.split(",")
    for subject in subjects:
        for name in PARTS:
            if subject.name in only and name in parts:
                line(f"{subject.name}: {name}")
                run_part(name, subject, settings)
    write_page(args.output, subjects, settings)
    line(f"wrote {args.output}")


if __name__ == "__main__":
    main()
