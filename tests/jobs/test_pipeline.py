"""The pipeline: steps in order, snapshots, records, and the rule for reconstruction."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import images_of, make_vim, write_image

import ssmcompress
from ssmcompress.data import Batches, open_images
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import remaining_share
from ssmcompress.jobs.finetune import FinetuneOptions
from ssmcompress.jobs.images import choose_images
from ssmcompress.jobs.pipeline import Context, run_steps
from ssmcompress.jobs.prune import CompressOptions, PruneRequest, find_plan
from ssmcompress.jobs.report_text import list_columns
from ssmcompress.jobs.requests import DataOptions, PlanRequest
from ssmcompress.jobs.steps import Align, Prune, Reconstruct, pruning_steps
from ssmcompress.models.records import StepRecord
from ssmcompress.pruning.alignment import UNALIGNED


@dataclass(frozen=True)
class Scale:
    """Scales the classifier; by 1 there is nothing to do."""

    by: float
    name: str = "scaled"

    def __call__(self, model, context):
        if self.by == 1:
            return model
        import copy

        model = copy.deepcopy(model)
        with torch.no_grad():
            for value in model.classifier.parameters():
                value.mul_(self.by)
        model.add_record(StepRecord("scaling", {"by": self.by}))
        return model


@pytest.fixture
def context(vim, class_folders) -> Context:
    return Context(vim, Batches(open_images(class_folders, 10), vim.transform()))


@pytest.fixture
def plan(vim):
    return ssmcompress.make_plan(vim, ratio=0.4)


def test_steps_run_in_order_and_leave_snapshots(vim, context, plan):
    snapshots = run_steps([*pruning_steps(plan, Reconstruct()), Scale(2.0)], context)
    assert list(snapshots) == ["naive", "aligned", "reconstructed", "scaled"]
    assert snapshots["naive"].alignment == UNALIGNED
    assert snapshots["aligned"].alignment == plan.alignment
    assert [step.kind for step in snapshots["scaled"].steps] == ["reconstruction", "scaling"]
    assert snapshots["aligned"].steps == ()
    assert set(context.seconds) == set(snapshots)
    assert vim.plan is None


def test_the_snapshots_are_the_models_that_the_functions_give(vim, context, plan):
    snapshots = run_steps(pruning_steps(plan, Reconstruct()), context)
    calibrated = ssmcompress.calibrate(vim, context.calibration, plan)
    aligned = ssmcompress.prune(vim, calibrated)
    images = images_of(vim)
    with torch.no_grad():
        assert torch.equal(snapshots["aligned"](images), aligned(images))
        rebuilt = ssmcompress.reconstruct(aligned, vim, context.calibration)
        assert torch.equal(snapshots["reconstructed"](images), rebuilt(images))


def test_only_asked_for_snapshots_are_kept_and_the_last_in_any_case(context, plan):
    steps = [Prune(plan), Align(plan.alignment), Scale(2.0)]
    assert list(run_steps(steps, context, keep=("naive",))) == ["naive", "scaled"]
    assert list(run_steps(steps, context, keep=())) == ["scaled"]


def test_a_step_with_nothing_to_do_leaves_no_snapshot(context, plan):
    assert list(run_steps([Prune(plan), Scale(1.0)], context)) == ["naive"]


def test_records_of_any_step_are_saved_in_order(vim, context, plan, tmp_path):
    steps = [Prune(plan), Align(plan.alignment), Scale(2.0), Reconstruct()]
    *_, model = run_steps(steps, context).values()
    loaded = ssmcompress.load(ssmcompress.save(model, tmp_path / "m"))
    assert loaded.steps == model.steps
    assert [step.kind for step in loaded.steps] == ["scaling", "reconstruction"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())["pruning"]
    assert config["reconstruction"]["images"] == 20
    assert config["steps"] == [{"kind": "scaling", "values": {"by": 2.0}}, {"kind": "reconstruction"}]
    config["steps"] = [{"values": {}}]
    whole = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**whole, "pruning": config}))
    with pytest.raises(InputError, match="not a list of steps"):
        ssmcompress.load(tmp_path / "m")


@dataclass(frozen=True)
class Rounding:
    """A record with a class of its own."""

    kind: ClassVar[str] = "rounding"
    bits: int


def test_a_record_of_any_class_is_read_back_by_its_kind(vim, plan, tmp_path):
    pruned = ssmcompress.prune(vim, plan)
    pruned.add_record(Rounding(8))
    loaded = ssmcompress.load(ssmcompress.save(pruned, tmp_path / "m"))
    assert loaded.find_record("rounding") == StepRecord("rounding", {"bits": 8})


def test_a_record_replaces_one_of_its_kind(vim):
    for by in (1, 2):
        vim.add_record(StepRecord("scaling", {"by": by}))
    assert vim.steps == (StepRecord("scaling", {"by": 2}),)
    assert vim.find_record("scaling").values == {"by": 2}
    assert vim.find_record("finetuning") is None


def test_columns_of_a_report_are_its_snapshots(vim, plan, class_folders, tmp_path):
    options = CompressOptions(DataOptions(str(class_folders)), steps=(Scale(0.5),))
    report = ssmcompress.compress(vim, plan, tmp_path / "m", options)
    assert list_columns(report) == ["dense", "naive", "aligned", "reconstructed", "pruned"]
    assert report["pruned"]["top1"] == report["reconstructed"]["top1"]  # a scaled classifier chooses the same class
    assert report["agreement"]["kl"] > 0


def test_a_step_before_fine_tuning_keeps_its_column(vim, plan, class_folders, tmp_path):
    tuning = FinetuneOptions(ssmcompress.Recipe(epochs=1, batch_size=6))
    options = CompressOptions(DataOptions(str(class_folders)), steps=(Scale(0.5),), finetune=tuning)
    report = ssmcompress.compress(vim, plan, tmp_path / "m", options)
    assert list_columns(report) == ["dense", "naive", "aligned", "reconstructed", "scaled", "pruned"]
    assert report["finetuning"]["steps"] == 3


def test_reconstruction_reads_the_images_that_a_calibrated_plan_did_not(vim, context, plan):
    calibrated = ssmcompress.calibrate(vim, images_of(vim), plan)
    steps = [Prune(calibrated), Reconstruct(required=False)]
    assert list(run_steps(steps, context)) == ["naive", "reconstructed"]


def test_a_plan_that_aligns_nothing_has_one_step(vim, plan, context):
    unaligned = ssmcompress.make_plan(vim, ratio=0.4, alignment=False)
    assert [step.name for step in pruning_steps(unaligned, None)] == ["naive"]
    assert [step.name for step in pruning_steps(plan, None)] == ["naive", "aligned"]


# ------------------------------------------------------------------------------------------ whether to reconstruct


def budget(model, data, **options):
    """The ratio for just the FLOPs that 0.3 leaves: 0.3 if there is no room to leave, else more."""
    share = remaining_share(model, ssmcompress.make_plan(model, ratio=0.3).stages)
    request = PruneRequest(PlanRequest(flops=share, search=False), CompressOptions(DataOptions(data), **options))
    return find_plan(model, request).plan.stages[0].ratio


def test_a_budget_leaves_room_for_corrections_just_where_there_will_be_some(class_folders, tmp_path):
    """One rule for both: with a recorded data path that is gone there is no reconstruction, and no room for it."""
    model = make_vim()
    plain = budget(model, str(class_folders), reconstruct=False)
    assert budget(model, str(class_folders)) > plain
    assert budget(model, None) == plain
    assert budget(model, None, reconstruct=True) > plain
    model = ssmcompress.load(ssmcompress.save(model, tmp_path / "m"))
    model.source = type(model.source)(model.source.path, model.source.sha256, data=str(tmp_path / "gone"))
    assert budget(model, None) == plain
    model.source = type(model.source)(model.source.path, model.source.sha256, data=str(class_folders))
    assert budget(model, None) > plain


def test_one_image_is_not_reconstructed_on(vim, tmp_path):
    for i in range(2):
        write_image(tmp_path / f"{i}.png", i)
    images = choose_images(vim, DataOptions(str(tmp_path)))
    assert images.count == 1
    assert not images.wants_reconstruction(None)
    assert images.wants_reconstruction(True)
