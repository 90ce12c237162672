"""What a Vim loses with its dropped tokens: layers run with the dense model's tokens at the dropped positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ssmcompress
from ssmcompress.models import TokenModel
from ssmcompress.models.vim_block import VimBlock, VimMixer
from ssmcompress.ops import ScanPath, causal_conv1d, gather_tokens, scan_paths
from ssmcompress.progress import line, track
from ssmcompress.pruning.tokens import Tokens

from .reasons import choose, find_work, identify_reasons
from .settings import Settings, read, write
from .subjects import Subject


class Given(NamedTuple):
    """Which ops of a layer get the dense model's tokens at dropped positions; the other ops are aligned."""

    conv: bool
    scan: bool


CASES = {
    "neither": Given(conv=False, scan=False),
    "conv": Given(conv=True, scan=False),
    "scan": Given(conv=False, scan=True),
    "both": Given(conv=True, scan=True),
}


def measure_inputs(subject: Subject, settings: Settings) -> None:
    """Measure each case for each metric with an aligned row, on the `reasons` images; only for a Vim."""
    dense = subject.load(settings.device)
    if dense.reads_levels or not all(isinstance(block, VimBlock) for block in dense.blocks):
        return
    for metric, folder in find_work(subject.name, settings, "inputs"):
        line(f"{subject.name}: inputs of layers, tokens by {metric}")
        pruned = ssmcompress.load(folder, device=settings.device)
        images = choose(subject.test, dense, settings)
        right, count = dict.fromkeys(CASES, 0), 0
        for batch in track(images, "giving inputs", len(images)):
            pictures, labels = batch.images.to(settings.device), batch.labels.to(settings.device)
            for name, logits in run_cases(dense, pruned, pictures).items():
                right[name] += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
        figures = {name: 100 * value / count for name, value in right.items()}
        file = settings.file_of("inputs", subject.name)
        write(file, read(file) | {metric: {"of": identify_reasons(subject.name, settings, metric), "top1": figures}})


@torch.inference_mode()
def run_cases(dense: TokenModel, pruned: TokenModel, images: Tensor) -> dict[str, Tensor]:
    """Return the logits (batch, classes) of each case.

    All cases drop the same tokens as the aligned model. If both ops get the dense model's tokens, the logits equal
    those of the dense model.

    Args:
        pruned: `dense` with aligned stages.
    """
    inputs = {run.layer: run.before.features for run in dense.run_layers(dense.embed(images))}
    runs = [run for run in pruned.run_layers(pruned.embed(images)) if run.before.positions is not None]
    found = {}
    for name, given in CASES.items():
        whole = inputs[runs[0].layer]  # (batch, length, d_model), which includes the kept tokens
        for run in runs:
            block, positions = pruned.blocks[run.layer - 1], run.before.positions
            tokens = run.before.updated(gather_tokens(whole, positions))
            added = run_mixer(block.mixer, block.norm(tokens.features), tokens, block.norm(inputs[run.layer]), given)
            whole = put(whole, positions, tokens.features + block.residual_scale * added)
        after = runs[-1].after
        found[name] = pruned.readout(after.updated(gather_tokens(whole, after.positions)))
    return found


def run_mixer(mixer: VimMixer, features: Tensor, tokens: Tokens, inputs: Tensor, given: Given) -> Tensor:
    """Return the projected sum of both paths at the kept tokens, (batch, kept, d_model).

    Args:
        features: of the kept tokens, normalised (batch, kept, d_model). inputs: all tokens of the dense model
            (batch, length, d_model); only those at dropped positions are used.
    """
    positions = tokens.positions
    x, z = mixer.in_proj(features).chunk(2, dim=-1)
    whole, total = put(mixer.in_proj(inputs).chunk(2, dim=-1)[0], positions, x), torch.zeros(())
    for number, path in enumerate(mixer.directions):
        conv, x_proj, dt_proj, log_a, skip = mixer.parameters_of(path)
        reverse, gaps = tokens.paths[path].reverse, tokens.paths[path].gaps
        everywhere = causal_conv1d(whole, conv.weight, conv.bias, None, reverse=reverse)
        aligned = causal_conv1d(x, conv.weight, conv.bias, positions, reverse=reverse)
        own = gather_tokens(everywhere, positions) if given.conv else aligned
        u = put(everywhere, positions, own) if given.scan else own
        dt, B, C = torch.split_with_sizes(x_proj(u), mixer.split, dim=-1)
        gap = None if given.scan else (gaps, mixer.gap_delta[number])
        scan = ScanPath(u, dt_proj(dt), log_a, B, C, skip, None, gap, reverse, log_A=True)
        y, _ = scan_paths([scan], None, delta_softplus=True)
        total = total + (gather_tokens(y, positions) if given.scan else y)
    return mixer.out_proj(total * F.silu(z))


def put(whole: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Return `whole` (batch, length, width) with `values` (batch, kept, width) at `positions` (batch, kept)."""
    return whole.scatter(1, positions[..., None].expand_as(values), values)
