"""Trimming of scan states: a smaller `d_state` with closed-form selection and refit.

The states of each scan are dropped by block optimal brain surgeon (`chain`) on the activations of the dense model, and
its rows of C and its D are refitted. This needs only the error weights (`margin`) and the scan itself, so the scans are
independent of each other. Refitting C is essential; D alone compensates for little. On the bundled model (128 images
for fitting; dense 90.80 % top-1 on 2,000 others, KL from it):

    states                      4                  2                  1
    by energy, refitted once    90.55 %, 0.0004    90.55 %, 0.0035
    this chain                  90.50 %, 0.00015   90.50 %, 0.0019    90.00 %, 0.020

Greedily chosen numbers of states per layer gave no gain on the test images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.any_batches import AnyBatches
from ...errors import InputError
from ...models.base import TokenModel
from ...models.blocks import TrimmableBlock
from ...models.learnt import add_learnt
from ...models.modes import runs_in_eval_mode
from ...models.records import StepRecord
from ...progress import track
from .activations import LayerInputs, check_trimmable
from .chain import Kept, drop_blocks
from .gram import ScanSums, state_energies
from .requests import Count, copy_to_cut, count_per_layer

# Maximum bytes of the float64 matrices of a scan: the sums, their Cholesky factor and its inverse. 16 states of 768
# channels take 4.1 GB, 11 of 1,536 channels 8.2. Beyond that, low-energy states are dropped first, without the
# matrices.
MOST_BYTES = 1 << 33
MATRICES = 3


@dataclass(frozen=True)
class StateChain:
    """The states of one scan in dropping order.

    Attributes:
        steps: for each number of kept states, their index, the refitted [D, C_1, C_2, ...], and the loss.
        d_state, d_inner: sizes of the scan.
    """

    steps: dict[int, Kept]
    d_state: int
    d_inner: int

    def weights(self, count: int) -> tuple[Tensor, Tensor]:
        """Return C (count, d_inner) and D (d_inner,) for this number of states."""
        D, C = self.steps[count].theta.split([self.d_inner, count * self.d_inner])
        return C.view(count, self.d_inner), D


@dataclass(frozen=True)
class StateChains:
    """The chains of a model's scans, with which `cut_states` can create a model with any number of states.

    Attributes:
        layers: for each layer, a chain for each of its sets of scan parameters.
        batches: the images that were read, or their digests; `images`: their number.
    """

    layers: tuple[tuple[StateChain, ...], ...]
    batches: AnyBatches | np.ndarray
    images: int

    @property
    def most(self) -> int:
        """The largest number of states, below all, that every scan can keep."""
        return min(max(chain.steps) for sets in self.layers for chain in sets)

    def loss(self, layer: int, n: int) -> float:
        """Return the error of a layer (1-based) with n states, relative to the power of its scans' outputs.

        The outputs are measured after the projection, and tokens are weighted by the effect of an error on the
        decision.
        """
        steps = [chain.steps[n] for chain in self.layers[layer - 1] if n < chain.d_state]
        power = sum(step.power for step in steps)
        return sum(step.loss * step.power for step in steps) / power if power > 0 else 0.0


@runs_in_eval_mode
@torch.no_grad()
def trim_states(
    model: TokenModel, n: Count, images: Any = None, *, chains: StateChains | None = None, name: str | None = None
) -> TokenModel:
    """Return a copy of a model with fewer states in its scans; the argument is not changed.

    Args:
        model: a model that drops no tokens.
        n: the states to keep in every layer, or a number for each layer.
        images: as for `ssmcompress.calibrate`, without labels. All are used; 128 are enough. They are iterated once.
        chains: the result of `state_chains` for this model, instead of images.
        name: name of the images in reports; None: their own.

    Returns:
        The model, with a record of kind "states" in its `steps`. If nothing is dropped, the copy is unchanged and has
        no record.

    Raises:
        InputError: `n` is out of range, there are fewer than two images, values are not finite, or the model drops
            tokens.
    """
    check_trimmable(model)
    counts = _counts(model, n)
    if counts == _sizes(model):
        return cut_states(model, None, counts)
    chains = chains or state_chains(model, images)
    trimmed = cut_states(model, chains, counts)
    losses = [chains.loss(layer, count) for layer, count in enumerate(counts, 1)]
    values = {"name": name or chains.batches.name, "images": chains.images, "n": counts, "losses": losses}
    trimmed.add_record(StepRecord("states", values))
    add_learnt(trimmed, [chains.batches])
    return trimmed


@torch.no_grad()
def state_chains(model: TokenModel, images: Any) -> StateChains:
    """Compute the chain of each scan, for `cut_states` with any number of states.

    Args:
        model, images: as for `trim_states`.

    Raises:
        InputError: as `trim_states`.
    """
    inputs = LayerInputs(model, images)
    total = sum(len(block.read_weights()) for block in model.blocks)
    layers: list[list[StateChain]] = [[] for _ in model.blocks]
    for layer, chain in track(_chains(inputs), "trimming states", total):
        layers[layer - 1].append(chain)
    return StateChains(tuple(map(tuple, layers)), inputs.batches, inputs.images)


@torch.no_grad()
def cut_states(model: TokenModel, chains: StateChains | None, n: Count) -> TokenModel:
    """Return a copy of a model with n states in its scans, as `trim_states` does but without a record.

    Args:
        model: the model of the chains. chains: the result of `state_chains`; None if nothing is dropped.
        n: as for `trim_states`.
    """
    check_trimmable(model)
    counts, sizes = _counts(model, n), _sizes(model)
    trimmed = copy_to_cut(model, counts != sizes)
    for layer, (block, count, size) in enumerate(zip(trimmed.blocks, counts, sizes, strict=True)):
        if count < size:
            sets = chains.layers[layer]
            if (most := min(max(chain.steps) for chain in sets)) < count:
                raise InputError(
                    f"`n` {count} of layer {layer + 1}: at most {most} of its {size} states can be refitted in free "
                    f"memory; keep fewer, or all"
                )
            block.cut_states([s.steps[count].index for s in sets], [s.weights(count) for s in sets])
    if counts != sizes:
        trimmed.read_sizes()
    return trimmed


def _sizes(model: TokenModel) -> list[int]:
    return [block.d_state for block in model.blocks]


def _counts(model: TokenModel, n: Count) -> list[int]:
    return count_per_layer(n, _sizes(model), "n", "states")


def _chains(inputs: LayerInputs) -> Iterator[tuple[int, StateChain]]:
    """Yield (layer, chain) of each scan, in order."""
    for layer in range(1, len(inputs.model.blocks) + 1):
        block = inputs.block
        for scan in range(len(block.read_weights())):
            yield layer, _chain(inputs, block, scan)
        inputs.advance()


def _chain(inputs: LayerInputs, block: TrimmableBlock, scan: int) -> StateChain:
    """Return the chain of one scan of the current layer."""
    C, D = block.read_weights()[scan]
    projection = block.get_submodule(block.channel_maps[1]).weight
    states: Sequence[int] = range(len(C))
    if len(C) > (most := _most_states(C)):
        energies = sum(state_energies(r, C, projection, w) for r, w in _readings(inputs, block, scan))
        states = energies.argsort(descending=True, stable=True)[:most].sort().values.tolist()
    sums = ScanSums(states, C, D, projection)
    for reading, weights in _readings(inputs, block, scan):
        sums.add(reading, weights)
    candidates, steps = torch.tensor(states), {}
    for step in drop_blocks(sums.finish(), sums.theta(), len(D), len(states)):
        index = candidates[step.index.cpu()]
        steps[len(index)] = Kept(index, step.theta.float().cpu(), step.loss, step.power)
    return StateChain(steps, len(C), len(D))


def _readings(inputs: LayerInputs, block: TrimmableBlock, scan: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield the reading of one scan and the weights of its tokens, by chunk."""
    for chunk, tokens in enumerate(inputs.chunks()):
        yield block.read_scans(tokens)[scan], inputs.weights(chunk, inputs.layer)


def _most_states(C: Tensor) -> int:
    """Return the number of states that fit `MOST_BYTES` and half of the free memory."""
    most = min(MOST_BYTES, _free_bytes(C.device) // 2)
    unknowns = int((most / (8 * MATRICES)) ** 0.5)
    return max(1, unknowns // C.shape[1] - 1)


def _free_bytes(device: torch.device) -> int:
    """Return the free bytes of the memory that holds the matrices for a device; twice `MOST_BYTES` if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # Windows
            return 2 * MOST_BYTES
