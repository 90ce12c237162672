"""The tables of the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from .found import TITLES, Found, list_methods
from .inputs import CASES
from .methods import CLASSIFIERS, HALVES, IMPORTANCES, SEGMENTERS, WITH_AND_WITHOUT
from .rows import DENSE, name_row
from .settings import Settings
from .speed import images_per_second
from .text import show, show_seeds, table, wrap
from .tuning import BEST

OUT = "out of reach"


def main_table(found: Found, names: Iterable[str], settings: Settings) -> str:
    """Return the rows of a model at the main share of the FLOPs."""
    dense, figure = found.dense, TITLES[found.figure]
    others = [] if found.figure == "top1" else [("pixel_accuracy", "pixels")]
    header = ["method", figure, *(title for _, title in others), "lost", "of dense", "GFLOPs full", "paper"]
    header += ["images/s, 1", "8", "fine-tuned"]
    rows, reasons = [], {}
    for method, key in [(DENSE, DENSE), *list_methods(found, names, settings.share)]:
        measured = [row for row in found.rows[key].values() if not row.get("failed")]
        if not measured:
            rows.append([method, OUT, *[""] * (len(header) - 2)])
            reasons[method] = next(iter(found.rows[key].values()))["failed"]
            continue
        expected = None if key == DENSE else len(settings.seeds)
        lost = dense[found.figure] - found.mean(key)
        cells = [show_seeds(found.values(key), expected)]
        cells += [show_seeds(found.values(key, name), expected) for name, _ in others]
        cells += [show(lost), show(100 * statistics.mean(row["flops_share"] for row in measured), "{:.1f} %")]
        cells += [show(found.mean_flops(key, name), "{:.4f}") for name in ("full", "paper")]
        cells += [show(images_per_second(found.speed, key, batch), "{:.0f}") for batch in (1, 8)]
        rows.append([method, *cells, show(found.tuned_value(key))])
    text = f"**{found.name}**, {dense['images']:,} test images:\n\n{table(header, rows)}"
    return "\n\n".join([text, *(wrap(f"{OUT.capitalize()}, {method}: {why}") for method, why in reasons.items())])


def show_first(found: Sequence[Found], settings: Settings) -> str:
    """Return table 1: classifiers by method."""
    parts = [main_table(f, CLASSIFIERS, settings) for f in found if f.figure == "top1"]
    return "\n\n".join([f"## Table 1: methods at {settings.share:.0%} of the FLOPs", *parts]) if parts else ""


def show_best(found: Sequence[Found], settings: Settings) -> str:
    """Return the accuracy loss of the best rows of table 1, without training and after fine-tuning on all images."""
    rows = []
    for f in found:
        for key, tuned in f.best.items():
            if not f.values(key):  # it is being remeasured
                continue
            dense, lost = f.dense["top1"], [f.dense["top1"] - value for value in f.values(key)]
            method = next(iter(f.rows[key].values()))["method"]
            share = f.mean_flops(key, "full") / f.mean_flops(DENSE, "full")
            rows.append([f.name, show(dense), method, show(100 * share, "{:.1f} %"),
                         show_seeds(lost, len(settings.seeds)),
                         f"{tuned['images']:,}", show(dense - tuned["figures"]["top1"])])  # fmt: skip
    header = ["model", "dense", "best row", "FLOPs", "lost without training", "training images", "lost fine-tuned"]
    recipe = " and ".join(f"{name} {value:g}" for name, value in BEST.items())
    note = wrap(f"""Points of top-1 lost by the best row at {settings.share:.0%} of the FLOPs, and by the same model
        after {settings.tune_epochs} epochs on more training images than in table 1, with {recipe} in the recipe. What
        the dense model gains is in table 1. The best row is the one with the highest top-1 on the test images, with the
        first seed; the recipe was also chosen on the test images of the small-scale setup.""")
    return f"## The best rows\n\n{note}\n\n{table(header, rows)}" if rows else ""


def show_second(found: Sequence[Found], settings: Settings) -> str:
    """Return table 2: segmentation models by method."""
    parts = [main_table(f, SEGMENTERS, settings) for f in found if f.figure == "miou"]
    title = f"## Table 2: segmentation at {settings.share:.0%} of the backbone's FLOPs"
    return "\n\n".join([title, *parts]) if parts else ""


def show_third(found: Sequence[Found], settings: Settings) -> str:
    """Return table 3: without and with alignment, by share of the FLOPs."""
    rows = []
    for f in found:
        for title, pair in WITH_AND_WITHOUT.items():
            for share in settings.shares:
                without, aligned = (name_row(name, share) for name in pair)
                if f.values(without) and f.values(aligned):
                    rows.append([
                        f.name, title, show(f.mean_flops(aligned, "full"), "{:.4f}"),
                        *(show_seeds(f.values(key), len(settings.seeds)) for key in (without, aligned)),
                        show(f.mean(aligned) - f.mean(without), "{:+.2f}"),
                        show(f.tuned_value(without)), show(f.tuned_value(aligned)),
                        *(show(images_per_second(f.speed, key, 8), "{:.0f}") for key in (without, aligned)),
                    ])  # fmt: skip
    header = ["model", "tokens by", "GFLOPs", "not aligned", "aligned", "difference", "fine-tuned: not", "aligned"]
    header += ["images/s, 8: not", "aligned"]
    return f"## Table 3: with and without alignment\n\n{table(header, rows)}" if rows else ""


def show_fourth(found: Sequence[Found], settings: Settings) -> str:
    """Return table 4: importance metrics, without and with alignment."""
    rows = []
    for f in found:
        for metric, pair in IMPORTANCES.items():
            keys = [name_row(name, settings.share) for name in pair]
            if f.values(keys[0]):
                cells = [show_seeds(f.values(key), len(settings.seeds)) for key in keys]
                rows.append([f.name, metric, *cells, *(show(f.tuned_value(key)) for key in keys)])
        for method, key in list_methods(f, HALVES, settings.share):
            cells = ["", show_seeds(f.values(key), len(settings.seeds)), "", show(f.tuned_value(key))]
            rows.append([f.name, method.removesuffix(" aligned"), *cells])
    header = ["model", "tokens by", "not aligned", "aligned", "fine-tuned: not", "aligned"]
    title = f"## Table 4: importance metrics at {settings.share:.0%} of the FLOPs"
    return f"{title}\n\n{table(header, rows)}" if rows else ""


def show_reasons(found: Sequence[Found], settings: Settings) -> str:
    """Return the measurements that explain tables 3 and 4."""
    parts = []
    for f in (f for f in found if f.reasons):
        header = ["tokens by", "none", "conv", "scan", "both", "mean gap"]
        drawn = any("dropped" in r for r in f.reasons.values())
        header += ["of the dropped: background", "clutter", "object"] if drawn else []
        rows = []
        for metric, r in f.reasons.items():
            cells = [show(r["figures"][name]["top1"]) for name in ("none", "conv", "scan", "both")]
            cells.append(show(r["gap"], "{:.1f}"))
            cells += [show(100 * r["dropped"][kind], "{:.0f} %") for kind in r.get("dropped", {})]
            rows.append([metric, *cells])
        if drawn:
            everything = next(r["all"] for r in f.reasons.values() if "all" in r)
            rows.append(["all tokens", *[""] * 5, *(f"{100 * share:.0f} %" for share in everything.values())])
        parts.append(f"**{f.name}**, top-1 by which half is aligned:\n\n{table(header, rows)}")
        parts.append(layer_errors(f))
    text = f"""Each metric was measured again on {settings.reason_images:,} test images, with the model of the first
        seed, and with only the convolution aligned, only the scan, or both. The mean gap is the number of dropped
        tokens between two kept ones. The error of a layer compares what it adds to the kept tokens with what the same
        layer of the dense model adds to them, given the features of the dense model: the squared difference as a share
        of the squares of the dense model, over all kept tokens and at the class token."""
    return "\n\n".join(["## Why", wrap(text), *parts]) if parts else ""


def layer_errors(found: Found) -> str:
    """Return the table of errors per layer: over all kept tokens, and at the class token if there is one."""
    rows = []
    for metric, r in found.reasons.items():
        layers = list(next(iter(r["errors"].values())))
        for name, errors in r["errors"].items():
            everywhere, own = zip(*errors.values(), strict=True)
            rows.append([metric, name, "all kept", *(show(value, "{:.3f}") for value in everywhere)])
            if own != everywhere:
                rows.append([metric, name, "class token", *(show(value, "{:.3f}") for value in own)])
    header = ["tokens by", "aligned", "error at", *map(str, layers)]
    return f"Errors of single layers of {found.name}:\n\n{table(header, rows)}"


def show_inputs(found: Sequence[Found], settings: Settings) -> str:
    """Return what the dropped tokens would have contributed to the convolutions and scans of a model."""
    rows = [
        [f.name, metric, *(show(r["top1"][name]) for name in CASES)] for f in found for metric, r in f.inputs.items()
    ]
    text = f"""Top-1 of the aligned models on the same {settings.reason_images:,} test images, when the convolutions,
        the scans, or both get the tokens of the dense model at the dropped positions. With both, the model is the dense
        one."""
    header = ["model", "tokens by", *CASES]
    return f"## What the dropped tokens would have brought\n\n{wrap(text)}\n\n{table(header, rows)}" if rows else ""


SECTIONS: tuple[Callable[[Sequence[Found], Settings], str], ...] = (
    show_first, show_best, show_second, show_third, show_fourth, show_reasons, show_inputs,
)  # fmt: skip
