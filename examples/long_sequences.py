"""Measure how time and memory grow with sequence length, for the CPU scan alone and for a whole Vim-tiny.

    python examples/long_sequences.py
    python examples/long_sequences.py 64 128 96x128/8 --repeats 3 --output long_sequences.png

Each argument is an image: its side, or height x width, in pixels, and the patch stride if it is not 16 (patches have 16
pixels). Batch size 1, float32, random weights; the scan is that of one layer of Vim-tiny. "us/further" is the time per
additional token, compared with the row above.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch

from ssmcompress.evaluation.latency import REPEATS, peak_memory, settings, summarize_times, time_calls
from ssmcompress.jobs.charts import COLOURS, encode_figure, new_figure
from ssmcompress.models.vim import VimConfig, VisionMamba
from ssmcompress.ops import selective_scan

IMAGES = ("224", "224/8", "512", "512x784", "1024", "1792")  # 197 to 12,545 tokens: VideoMamba's longest video
PATCH, CHANNELS, STATES, CPU = 16, 384, 16, torch.device("cpu")
TINY = {"d_model": 192, "depth": 24, "d_inner": CHANNELS, "d_state": STATES, "dt_rank": 12, "d_conv": 4}
TINY |= {"in_chans": 3, "num_classes": 1000}


def make_vim(image: str):
    """Return a function that runs a Vim-tiny on an image, and its number of tokens."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?(?:/([1-9]\d*))?", image)
    height, width, stride = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
    if min(size := (height, width or height)) < PATCH:
        raise SystemExit(f"{image}: expected an image of at least {PATCH} pixels a side, like 224, 448x784 or 224/8")
    config = VimConfig(**TINY, patch_size=(PATCH, PATCH), stride=stride or PATCH, image_size=size)
    model, pixels = VisionMamba(config).eval(), torch.randn(1, 3, *size)
    return lambda: model(pixels), model.length


def make_scan(length: int):
    """Return a function that runs the scan of one Vim-tiny layer."""
    u, delta, z, B, C = (torch.randn(1, length, size) for size in (*[CHANNELS] * 3, *[STATES] * 2))
    A, D, bias = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1), *torch.randn(2, CHANNELS)
    return lambda: selective_scan(u, delta, A, B, C, D, z, bias, delta_softplus=True)


def measure(images, repeats: int) -> dict:
    """Time both in the same rounds; return the points by increasing length and the slope of each, as a JSON value."""
    vims = sorted((make_vim(image) for image in images), key=lambda made: made[1])
    if len({length for _, length in vims}) < len(vims) or len(vims) < 2:
        raise SystemExit(f"{' '.join(images)}: expected two or more images with different numbers of tokens")
    calls = {("scan", length): make_scan(length) for _, length in vims}
    calls |= {("Vim-tiny", length): call for call, length in vims}
    found = {"settings": settings(CPU, torch.float32, repeats), "points": {}, "slopes": {}}
    times = time_calls(calls, CPU, repeats)
    for (what, length), call in calls.items():
        point = {"tokens": length, **summarize_times(times[what, length]), "mb": peak_memory(call, CPU) / 1e6}
        found["points"].setdefault(what, []).append(point)
    for what, points in found["points"].items():
        found["slopes"][what] = np.polyfit(*np.log([(p["tokens"], p["ms"]) for p in points]).T, 1)[0]
    return found


def draw(found: dict) -> bytes:
    """Draw a PNG of time and memory over tokens, with dashed lines of slope 1 through the longest points."""
    left, right = (figure := new_figure(9, 4)).subplots(1, 2)
    for axes, key, label in ((left, "ms", "ms"), (right, "mb", "peak memory, MB")):
        for (what, points), colour in zip(found["points"].items(), COLOURS, strict=False):
            tokens, values = (np.array([point[name] for point in points]) for name in ("tokens", key))
            axes.plot(tokens, values, "o-", color=colour, label=what)
            axes.plot(tokens, values[-1] * tokens / tokens[-1], "--", color="grey", linewidth=1, zorder=1)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label}, batch 1")
        axes.grid(alpha=0.25)
        axes.legend(title="dashed: slope 1")
    return encode_figure(figure, "png", 110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help=f"images, as above (default: {' '.join(IMAGES)})")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="rounds (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="file for the chart (default: none is drawn)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    found = measure(args.images or IMAGES, args.repeats)
    if args.output:
        args.output.write_bytes(draw(found))
    if args.json:
        return print(json.dumps(found))
    for what, points in found["points"].items():
        print(f"{what}: slope {found['slopes'][what]:.2f}\n   tokens        ms  us/token us/further       MB KB/token")
        for p, last in zip(points, [{"tokens": 0, "ms": 0}, *points], strict=False):
            us, kb = (1e3 * p[key] / p["tokens"] for key in ("ms", "mb"))
            more = 1e3 * (p["ms"] - last["ms"]) / (p["tokens"] - last["tokens"])
            print(f"{p['tokens']:9,}{p['ms']:10.2f}{us:10.2f}{more:11.2f}{p['mb']:9.2f}{kb:9.2f}")


if __name__ == "__main__":
    main()
