"""The selective scan of Mamba-1 ("S6", arXiv 2312.00752), with the decay of pruned positions folded in."""

from __future__ import annotations

from torch import Tensor

from .dispatch import full_precision, select

Gap = Tensor | tuple[Tensor, Tensor] | None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    gap: Gap = None,
    reverse: bool = False,
    add: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Selective scan over a sequence, aligned to the positions that pruning removed.

    Per channel e and state n, with `delta = softplus(delta + delta_bias)` where asked for:

        h_t = exp((delta_t + gap_t) A) h_{t-1} + delta_t B_t u_t,   h_0 = 0
        y_t = (sum_n C_t h_t + D u_t) * silu(z_t) + add_t

    `gap_t` is the sum of delta over the positions pruned just before token t: time passes there and nothing
    comes in, so it belongs to the decay and never to the input (ToP-ViM, arXiv 2409.18962, section 4).

    Args:
        u, delta, z: (batch, length, d_inner); `z` None: no gate.
        A: (d_inner, d_state), negative. B, C: (batch, length, d_state). D, delta_bias: (d_inner,).
        delta_softplus: apply softplus, the identity above 20, after adding the bias.
        gap: (batch, length, d_inner) in the units of delta after softplus, or a pair
            (steps (batch, length), delta (d_inner,)) whose product it is, or None.
        reverse: run from the last token to the first. All tensors, `gap` included, stay in token order.
        add: (batch, length, d_inner) that the result is added to, of another path say, in the same pass over memory.
        backend: "cpu", "reference", or None for the best one available.

    Returns:
        y (batch, length, d_inner) in the dtype of `u`. The state is float32 or wider whatever the input.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, gap, add)
    with full_precision(u.device):
        scan = select(backend, u, delta, z, add).selective_scan
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add)


def _check_shapes(u, delta, A, B, C, D, z, delta_bias, gap, add) -> None:
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(
            f"selective_scan: expected u (batch, length, d_inner) and A (d_inner, d_state), "
            f"found {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, length, d_inner = u.shape
    expected = {
        "delta": (delta, (batch, length, d_inner)),
        "B": (B, (batch, length, A.shape[1])),
        "C": (C, (batch, length, A.shape[1])),
        "D": (D, (d_inner,)),
        "z": (z, (batch, length, d_inner)),
        "delta_bias": (delta_bias, (d_inner,)),
        "add": (add, (batch, length, d_inner)),
    }
    if isinstance(gap, tuple):
        expected["gap steps"] = (gap[0], (batch, length))
        expected["gap delta"] = (gap[1], (d_inner,))
    else:
        expected["gap"] = (gap, (batch, length, d_inner))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: expected {name} {shape}, found {tuple(tensor.shape)}")
