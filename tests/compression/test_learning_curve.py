"""Estimating from half of the images whether a refit has enough: the rows, the estimate, records and reports."""

import json

import pytest
import torch
from conftest import make_vim

import ssmcompress
from ssmcompress.compression.reconstruct.class_corrections import ClassSums
from ssmcompress.compression.reconstruct.least_squares import refit_with
from ssmcompress.compression.reconstruct.linear import LinearSums
from ssmcompress.compression.reconstruct.split_rows import SplitRows
from ssmcompress.compression.remember import keep_results
from ssmcompress.models.records import Fit, Reconstruction

INPUTS, OUTPUTS, NOISE = 8, 4, 1.0


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def noisy_rows(seed, images, held=None, rows=1):
    """The sums over rows of one linear map with noise, which are of images with one row or more."""
    generator = torch.Generator().manual_seed(seed)
    true = draw(generator, OUTPUTS, INPUTS)
    x = draw(generator, images, rows, INPUTS)
    t = x @ true.T + NOISE * draw(generator, images, rows, OUTPUTS)
    split = SplitRows(INPUTS, OUTPUTS, torch.device("cpu"))
    split.add(x, t, torch.ones(images, rows), torch.arange(images) % 5 == 1 if held is None else held)
    return split, x, t


def test_half_of_the_images_are_worse_by_the_law_of_least_squares():
    """The error on other rows is noise * (1 + p / (n - p - 1)) with n rows and p inputs, so its excess is known."""
    images, runs = 100, 200
    found = []
    for seed in range(runs):
        held = torch.arange(images + 400) >= images  # many, so that the choice of the ridge has little influence
        split, *_ = noisy_rows(seed, images + 400, held)
        result = split.refit(torch.zeros(OUTPUTS, INPUTS), [INPUTS])
        found.append((result.after, result.half))
    after, half = torch.tensor(found).mean(0).tolist()
    noise = NOISE**2 / (INPUTS + NOISE**2)  # as a share of the targets' power, E |W x|^2 = INPUTS an output
    excess = {n: INPUTS / (n - INPUTS - 1) for n in (images // 2, images)}
    assert half > after
    assert half / after == pytest.approx((1 + excess[images // 2]) / (1 + excess[images]), rel=0.03)
    assert after == pytest.approx(noise * (1 + excess[images]), rel=0.1)


def test_the_half_is_every_other_image_to_fit_on():
    split, x, t = noisy_rows(0, 23, rows=3)
    fitted = [i for i in range(23) if i % 5 != 1]
    alone = SplitRows(INPUTS, OUTPUTS, torch.device("cpu"))
    alone.add(x[fitted[::2]], t[fitted[::2]], torch.ones(len(fitted[::2]), 3), torch.zeros(len(fitted[::2])).bool())
    alone.fitted.include(alone.half)
    old = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    result = split.refit(old, [INPUTS])
    expected = refit_with(alone.fitted, old, [INPUTS], result.ridges)
    assert result.half == pytest.approx(split.held_out.error(expected) / float(split.held_out.power), rel=1e-9)


def test_the_refit_is_that_of_all_images_in_any_chunks():
    whole, x, t = noisy_rows(0, 40)
    parts = SplitRows(INPUTS, OUTPUTS, torch.device("cpu"))
    held = torch.arange(40) % 5 == 1
    for k in torch.arange(40).split(7):
        parts.add(x[k], t[k], torch.ones(len(k), 1), held[k])
    one, other = (rows.refit(torch.zeros(OUTPUTS, INPUTS), [INPUTS]) for rows in (whole, parts))
    inputs, targets = (value[~held].flatten(0, 1) for value in (x, t))
    torch.testing.assert_close(whole.fitted.gram, inputs.T @ inputs)
    torch.testing.assert_close(whole.fitted.cross, inputs.T @ targets)
    torch.testing.assert_close(one.weight, other.weight)
    assert one.half == pytest.approx(other.half)


@pytest.mark.parametrize("case", ["nothing refitted", "one image to fit on", "rank too low"])
def test_nothing_is_said_where_there_is_nothing_to_compare(case):
    images = 2 if case == "one image to fit on" else 40
    split, x, _ = noisy_rows(0, images)
    if case == "nothing refitted":
        split = SplitRows(INPUTS, OUTPUTS, torch.device("cpu"))
        split.add(x, x[..., :OUTPUTS], torch.ones(images, 1), torch.arange(images) % 5 == 1)
        assert split.refit(torch.eye(OUTPUTS, INPUTS), [INPUTS]).half is None
    elif case == "one image to fit on":
        assert split.refit(torch.zeros(OUTPUTS, INPUTS), [INPUTS]).half is None
    else:
        sums = ClassSums(make_vim(), torch.device("cpu"))
        assert sums.refit()[0].half is None


@torch.no_grad()
def test_a_correction_of_low_rank_is_measured_at_its_rank():
    """With as many inputs as images for fitting, half of them determine a full-rank map far worse."""
    generator = torch.Generator().manual_seed(0)
    linear, correction = torch.nn.Linear(6, 16, bias=False), torch.nn.Linear(32, 16, bias=False)
    for module in (linear, correction):
        torch.nn.init.zeros_(module.weight)
    x, read = draw(generator, 400, 1, 6).float(), draw(generator, 400, 32).float()
    thin = draw(generator, 16, 1).float() @ draw(generator, 1, 32).float()
    t = x @ draw(generator, 16, 6).float().T + (read @ thin.T)[:, None] + draw(generator, 400, 1, 16).float()
    sums = LinearSums(linear, torch.device("cpu"), correction)
    sums.add(x, t, torch.ones(400, 1), torch.arange(400) % 5 == 1, read)
    result = sums.refit()
    full = sums.rows.held_out.error(sums.rows.half_weight) / float(sums.rows.held_out.power)
    assert sums.new_correction is not None
    assert result.after < result.half < full


def test_records_of_earlier_versions_have_none():
    fit = {"weight": "head", "ridges": [0.1], "before": 0.2, "after": 0.1}
    value = {"name": "x", "images": 9, "held_out": 2, "kl_before": 2.0, "kl_after": 1.0, "kept": True, "fits": [fit]}
    record = Reconstruction.from_dict(value)
    assert record.fits == (Fit("head", (0.1,), 0.2, 0.1, None),)
    assert json.loads(json.dumps(record.to_dict())) == value
    value["fits"][0]["half"] = 0.15
    record = Reconstruction.from_dict(value)
    assert record.fits[0].half == 0.15
    assert json.loads(json.dumps(record.to_dict())) == value


def test_a_run_that_goes_on_has_the_record_of_an_unbroken_one(tmp_path, monkeypatch):
    dense, images = make_vim(depth=3), draw(torch.Generator().manual_seed(0), 40, 3, 16, 16).float()
    pruned = ssmcompress.prune(dense, ssmcompress.calibrate(dense, images, ratio=0.4, stages=(1,)))
    whole = ssmcompress.reconstruct(pruned, dense, images).find_record("reconstruction")
    with keep_results(tmp_path / "results"):
        kept = ssmcompress.reconstruct(pruned, dense, images).find_record("reconstruction")
        refit, calls = SplitRows.refit, []
        monkeypatch.setattr(SplitRows, "refit", lambda *args: calls.append(1) or refit(*args))
        again = ssmcompress.reconstruct(pruned, dense, images).find_record("reconstruction")
    assert len(calls) == 1  # the classifier's alone: the layers were kept
    assert whole == kept == again
    assert any(fit.half is not None for fit in whole.fits[:-1])
