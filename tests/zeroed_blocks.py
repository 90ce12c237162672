"""A layer of a Vim or a VideoMamba as it is defined over all positions, with zeros at pruned ones."""

import torch
import torch.nn.functional as F

from ssmcompress.ops import causal_conv1d, selective_scan


def run_zeroed(block, features, mask, gap_delta):
    """The update (batch, length, d_model) of a dense layer, whose inputs are only the features in `mask`.

    There the scans take steps of `gap_delta` (2, d_inner). Both scans are gated, added and projected.
    """
    mixer = block.mixer
    x, z = mixer.in_proj(block.norm(features)).chunk(2, -1)
    x, total = torch.where(mask[:, None], x, 0), 0
    for path, reverse in enumerate((False, True)):
        conv, x_proj, dt_proj, A_log, D = mixer.parameters_of(path)
        u = causal_conv1d(x, conv.weight, conv.bias, reverse=reverse)
        dt, B, C = x_proj(u).split(mixer.split, -1)
        delta = torch.where(mask[:, None], F.softplus(dt_proj(dt)), gap_delta[path])
        u = torch.where(mask[:, None], u, 0)
        total = total + selective_scan(u, delta, -A_log.exp(), B, C, D, z, reverse=reverse)
    return mixer.out_proj(total)
