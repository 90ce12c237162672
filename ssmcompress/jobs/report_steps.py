"""The steps of a compression as sentences of a report: stages, reconstruction and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report_refits import describe_measured, list_learning_notes

Report = Mapping[str, Any]
# Texts for a model with a record of this kind.
DONE = {
    "directions": "trimmed in directions",
    "layers": "trimmed in layers",
    "states": "trimmed in states",
    "channels": "trimmed in channels",
    "level_maps": "mapped to the dense output levels",
    "reconstruction": "reconstructed",
    "finetuning": "fine-tuned",
}


def list_stage_notes(report: Report) -> list[str]:
    """Return sentences about which tokens are kept and what is aligned; empty for a model that drops none."""
    if not (stages := report["stages"]):
        return []
    alignment = report["alignment"]
    kept = "; ".join(f"{s['kept']} of {s['of']} tokens after layer {s['after']}" for s in stages)
    metrics = ", ".join(sorted({s["importance"] for s in stages}))
    aligned = [name for name in ("conv", "scan") if alignment.get(name)]
    return [
        f"kept: {kept} (importance {metrics})",
        f"alignment: {' and '.join(aligned) or 'none'}"
        + (f", gap deltas {alignment['gap']}" if alignment.get("scan") else "")
        + (", pruned tokens as last seen in the mean that is read out" if alignment.get("pool") else ""),
    ]


def list_input_notes(report: Report) -> list[str]:
    """Return sentences about the compressed model that a compression started from, and its previous steps."""
    if not (made_from := report.get("made_from")):
        return []
    kept, layers = (", ".join(str(stage[key]) for stage in made_from["stages"]) for key in ("kept", "after"))
    parts = [f"keeps {kept} tokens after layer{'s' * (', ' in layers)} {layers}"] if kept else []
    if done := [DONE[kind] for kind in made_from["steps"] if kind in DONE]:
        parts.append(f"was {', '.join(done)}")
    name = made_from["path"] or "a compressed model"
    return [f"made from {name}" + (f", which {' and '.join(parts)}" if parts else "")]


def list_repair_notes(report: Report) -> list[str]:
    """Return sentences about reconstruction and fine-tuning, if there were any."""
    lines = []
    if refit := report.get("reconstruction"):
        new = sum(bool(fit["ridges"]) for fit in refit["fits"])
        lines.append(
            f"reconstruction: {new} of {len(refit['fits'])} weights refitted on {refit['images']} images of "
            f"{refit['name']} in {refit['seconds']:.0f} s; KL from dense on the {refit['held_out']} held out "
            f"{refit['kl_before']:.4f} -> {refit['kl_after']:.4f} nats"
            + (describe_measured(refit) if refit["kept"] else ", no closer: the old weights were kept")
        )
        lines += list_learning_notes(refit)
    if tuned := report.get("finetuning"):
        lines.append(_describe_finetuning(tuned))
    return lines


def _describe_finetuning(tuned: Mapping[str, Any]) -> str:
    """Describe the fine-tuning: its images and settings, and which weights were selected."""
    teachers = [name for name in ("labels", "teacher") if tuned[name]]
    choice = f" of epoch {tuned['epoch']}" if tuned["held_out"] else " of the last epoch"
    choice = choice if tuned["epoch"] else " unchanged, because no epoch did better"
    choice += ", averaged" if tuned["averaged"] else ""
    choice += f", chosen on {tuned['held_out']} held-out images" if tuned["held_out"] else ""
    return (
        f"fine-tuned for {tuned['recipe']['epochs']} epochs on {tuned['images']} images of {tuned['name']} by "
        f"{' and '.join(teachers)}, {tuned['steps']} steps of {tuned['recipe']['batch_size']} images in "
        f"{tuned['seconds']:.0f} s; weights{choice}"
    )
