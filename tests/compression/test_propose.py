"""Plans for a budget: the FLOPs in the search equal the counted FLOPs."""

import random

import pytest
import torch
from conftest import make_plain_mamba, make_vim, make_vit, make_vmamba
from segmenters import make_vim_upernet

from ssmcompress.compression.search.propose import _Grid, propose
from ssmcompress.compression.search.sensitivity import Sensitivity
from ssmcompress.evaluation.flops import remaining_share, smallest_share
from ssmcompress.models.fingerprint import fingerprint
from ssmcompress.models.vim import VisionMamba
from ssmcompress.pruning.alignment import Alignment


class Quadratic(VisionMamba):
    """A Vim whose layers are counted as if they had attention, with a part that takes the tokens after a stage."""

    @classmethod
    def count_flops(cls, config, counts, convention, as_run=True):
        parts = super().count_flops(config, counts, convention, as_run)
        attention = sum(2 * n * n * config.d_model for n in counts[:-1])
        return {**parts, "attention": attention, "mlp": sum(8 * n * config.d_model**2 for n in counts[1:])}


def quadratic():
    model = make_vim(depth=5, image=(32, 32))
    model.__class__ = Quadratic
    return model


MODELS = {
    "vim": lambda: make_vim(depth=5, image=(32, 32)),
    "plain_mamba": lambda: make_plain_mamba(depth=5),
    "segmentation": make_vim_upernet,
    "quadratic": quadratic,
    "vmamba": lambda: make_vmamba(depths=(2, 1, 3)),
    "vit": lambda: make_vit(depth=5, image=(32, 32)),
    "vit, mean": lambda: make_vit(depth=5, image=(32, 32), pool="avg", registers=2),
}


def sensitivity_of(model):
    """Losses that grow as tokens are dropped, less in later layers."""
    length, layers = model.length, tuple(range(1, len(model.blocks)))
    kept = tuple(range(length - 2, max(1, model.protected_count), -2))
    shares = 1 - torch.tensor(kept, dtype=torch.float64) / length
    loss = torch.stack([shares.square() / layer for layer in layers])[:, None]
    about = {"weights": fingerprint(model), "depth": len(model.blocks), "length": length}
    return Sensitivity(
        about, {"name": "x", "images": 1}, "kl", False, Alignment(), "bias", layers, ("clip",), kept, loss
    )


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def test_a_plan_costs_what_is_counted(model):
    """For random plans: the sum of what the search has for each run of layers equals the count to rounding."""
    grid = _Grid(model, sensitivity_of(model), budget=0.7)
    grid.unit = 1e-6  # fine enough to compare
    fixed = grid._measure_costs()[1]
    draw = random.Random(0)
    for _ in range(30):
        places = sorted(draw.sample(range(len(grid.layers)), draw.randint(1, 3)))
        rows = sorted(draw.sample(range(len(grid.counts)), len(places)))
        reckoned, before, row = fixed, 0, None
        for place, after in zip(places, rows, strict=True):
            reckoned += grid.unit * grid.cost(before, grid.layers[place], row)
            before, row = grid.layers[place], after
        reckoned += grid.unit * grid.cost(before, None, row)
        stages = grid.stages(list(zip(places, rows, strict=True)))
        assert reckoned == pytest.approx(remaining_share(model, stages), abs=1e-5)


@pytest.mark.parametrize("place", [0.8, 0.5])
def test_proposed_plans_fill_the_budget(model, place):
    lowest = smallest_share(model, [1])
    budget = lowest + place * (1 - lowest)
    shares = [remaining_share(model, found.stages) for found in propose(model, sensitivity_of(model), budget)]
    assert shares
    assert max(shares) <= budget
    assert min(shares) > budget - 0.1 * (1 - lowest)
