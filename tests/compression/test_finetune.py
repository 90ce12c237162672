"""Fine-tuning: the objective, its benefit, and equal results for interrupted and distributed runs."""

import json
import math
import os
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from command_line import forked
from conftest import images_of, make_plain_mamba, make_vim, make_vit, write_image
from distributed_work import main as work_alone
from timm.data import Mixup

import ssmcompress
from ssmcompress import progress
from ssmcompress.compression.finetune.examples import Examples, select_pairs
from ssmcompress.compression.finetune.loop import finetune
from ssmcompress.compression.finetune.losses import distillation_loss, feature_distance, objective
from ssmcompress.compression.finetune.recipe import RECIPES, Recipe
from ssmcompress.compression.finetune.seeds import seed_rng
from ssmcompress.compression.finetune.state import StateFile, read_state
from ssmcompress.data import open_images
from ssmcompress.data.batches import Batches
from ssmcompress.errors import InputError, SsmCompressError
from ssmcompress.evaluation.measure import evaluate
from ssmcompress.models.records import Finetuning
from ssmcompress.pruning.plan import Plan, Stage
from ssmcompress.tasks import CLASSIFICATION

TESTS = Path(__file__).parent
SMALL = Recipe(epochs=2, batch_size=10, lr=1e-3, lr_images=10, ema=0.0)


def record_of(model):
    return model.find_record("finetuning")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten classes of four images each; each class has roughly one colour."""
    root = tmp_path_factory.mktemp("pictures")
    for label in range(10):
        for i in range(4):
            pixels = np.random.default_rng(10 * label + i).integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[:, :, label % 3] += np.uint8(15 * label)
            folder = root / f"class{label}"
            folder.mkdir(exist_ok=True)
            from PIL import Image

            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def batches(model, folder, **options) -> Batches:
    images = open_images(folder, model.config.num_classes)
    return Batches(images, model.transform(), range(len(images)), **options)


def pruned_of(model, ratio=0.4):
    return ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=ratio))


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------------------------- recipes


def test_the_papers_recipe():
    recipe = RECIPES["top-vim"]
    assert (recipe.epochs, recipe.weight_decay, recipe.min_lr, recipe.warmup_lr) == (30, 1e-8, 1e-5, 1e-5)
    assert recipe.scaled_lr(1024) == pytest.approx(1e-5)
    assert (recipe.mixup, recipe.cutmix, recipe.erasing, recipe.smoothing) == (0.8, 1.0, 0.25, 0.1)
    assert "m9" in recipe.randaugment
    assert recipe.dtype == "float32"
    assert recipe.norms


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0}, {"epochs": 1.5}, {"batch_size": 7}, {"lr": -1.0}, {"lr": math.nan}, {"teacher": 1.5},
        {"crop": 0.0}, {"temperature": 0.0}, {"dtype": "float16"}, {"randaugment": "strong"}, {"norms": "yes"},
        {"ema": 1.0}, {"epochs": True}, {"lr": "fast"}, {"accumulate": 0},
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(change):
    with pytest.raises(InputError, match=next(iter(change))):
        Recipe(**change)


def test_recipes_come_from_names_files_and_changes(tmp_path):
    assert Recipe.from_name("default") == Recipe()
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"recipe": "top-vim", "epochs": 4}))
    assert Recipe.from_name(str(file)) == replace(RECIPES["top-vim"], epochs=4)
    assert Recipe().with_changes(["lr=2e-3", "norms=true", "randaugment=rand-m5", "epochs=7"]) == Recipe(
        lr=2e-3, norms=True, randaugment="rand-m5", epochs=7
    )
    assert Recipe.from_dict(asdict(SMALL)) == SMALL
    for text in ("lr", "speed=3", "lr=fast", "epochs=1.5"):
        with pytest.raises(InputError, match="lr|speed|epochs"):
            Recipe().with_changes([text])
    for content in ("[1]", "{", '{"recipe": "none"}', '{"speed": 3}', "3"):
        file.write_text(content)
        with pytest.raises(InputError, match="mine.json"):
            Recipe.from_name(str(file))
    with pytest.raises(InputError, match="default, top-vim"):
        Recipe.from_name("nothing")


# ----------------------------------------------------------------------------------------------------- objective


def test_the_teacher_is_followed_at_its_temperature():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, generator=generator).unbind()
    expected = F.kl_div(F.log_softmax(ours / 3, 1), F.softmax(theirs / 3, 1), reduction="none").sum(1) * 9
    torch.testing.assert_close(distillation_loss(CLASSIFICATION, ours, theirs, 3.0), expected)
    torch.testing.assert_close(distillation_loss(CLASSIFICATION, ours, ours, 3.0), torch.zeros(5))


def test_what_there_is_has_all_the_weight():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, generator=generator).unbind()
    targets = F.one_hot(torch.arange(5), 7).float()
    labels, teacher = (
        F.cross_entropy(ours, torch.arange(5), reduction="none"),
        distillation_loss(CLASSIFICATION, ours, theirs),
    )
    recipe = Recipe(teacher=0.25)
    torch.testing.assert_close(objective(CLASSIFICATION, recipe, ours, targets, theirs), 0.75 * labels + 0.25 * teacher)
    torch.testing.assert_close(objective(CLASSIFICATION, recipe, ours, targets), labels)
    torch.testing.assert_close(objective(CLASSIFICATION, recipe, ours, None, theirs), teacher)


def test_fused_tokens_have_no_teacher(pictures):
    dense = make_vit()
    plan = Plan((Stage(1, 0.3, "attention", "fused"), Stage(3, 0.3, "attention", "fused")))
    pruned = ssmcompress.prune(dense, plan)
    model = finetune(pruned, batches(dense, pictures), dense=dense, recipe=SMALL).model
    assert not same(weights(model), weights(pruned))


def test_features_of_fused_tokens_are_left_out():
    generator = torch.Generator().manual_seed(0)
    features, teacher = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 5, 6, generator=generator)
    positions = torch.tensor([[0, 2, 3, 5], [1, 2, 6, 7]])  # positions from 5 on are fused tokens
    known = [
        (1 - F.cosine_similarity(features[0, :3], teacher[0, [0, 2, 3]])).mean(),
        (1 - F.cosine_similarity(features[1, :2], teacher[1, [1, 2]])).mean(),
    ]
    torch.testing.assert_close(feature_distance(features, teacher, positions), torch.stack(known))


def test_features_are_compared_at_the_kept_positions(pictures):
    """Pruned after the second to last layer: at lr 0, the loss is only the cosine distance there."""
    dense = make_vim(depth=3)
    pruned = ssmcompress.prune(dense, ssmcompress.make_plan(dense, stages=(2,), ratio=0.5))
    recipe = replace(SMALL, epochs=1, lr=0.0, warmup=0.0, min_lr=0.0, batch_size=40, crop=1.0, flip=0.0, teacher=0.0)
    data = batches(dense, pictures)
    found = {}
    for features in (0.0, 1.0):
        tuned = finetune(pruned, data, dense=dense, recipe=replace(recipe, features=features))
        found[features] = record_of(tuned.model).history[0]["loss"]
    images = torch.cat([batch.images for batch in data])
    ours, theirs = pruned.encode(images)[0], dense.encode(images)[0].features
    at = theirs.gather(1, ours.positions[..., None].expand(-1, -1, 16))
    expected = 1 - F.cosine_similarity(ours.features, at, dim=2).mean()
    assert found[1.0] - found[0.0] == pytest.approx(float(expected.detach()), abs=1e-4)


# ------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_mixed_as_the_whole(parts):
    images = torch.randn(22, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(22) % 5
    pieces = [select_pairs(range(22), part, parts) for part in range(parts)]
    assert sorted(np.concatenate(pieces)) == list(range(22))
    for seed in range(6):  # mixup as well as cutmix

        def mixed(rows, seed=seed):
            with seed_rng(seed):
                return Mixup(0.8, 1.0, num_classes=5)(images[rows].clone(), labels[rows])

        whole = mixed(np.arange(22))
        for rows in pieces:
            for one, other in zip(mixed(rows), whole, strict=True):
                torch.testing.assert_close(one, other[rows])


def test_augmentation_depends_on_nothing_but_seed_epoch_and_image(vim, pictures):
    recipe = replace(RECIPES["top-vim"], batch_size=10)

    def run(seed=0, epoch=0, first=0, **options):
        torch.manual_seed(len(options))
        examples = Examples(vim, batches(vim, pictures, **options), recipe, seed)
        return [part for parts in examples.iterate_epoch(epoch, first) for part in parts]

    def equal(one, other):
        return len(one) == len(other) and all(
            torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
            for a, b in zip(one, other, strict=True)
        )

    steps = run()
    assert len(steps) == 4
    assert equal(steps, run(workers=2))
    assert equal(steps[2:], run(first=2))
    assert not equal(steps, run(seed=1))
    assert not equal(steps, run(epoch=1))


def test_the_generators_are_left_as_they_were(vim, pictures):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    list(Examples(vim, batches(vim, pictures), RECIPES["top-vim"], 0).iterate_epoch(0))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_and_named(vim, tmp_path, workers):
    for i in range(6):
        write_image(tmp_path / f"{i}.png", i)
    (tmp_path / "3.png").write_bytes(b"nothing")
    data = batches(vim, tmp_path, workers=workers)
    parts = [part for parts in Examples(vim, data, replace(SMALL, batch_size=6), 0).iterate_epoch(0) for part in parts]
    assert sum(len(part.images) for part in parts) == 5
    assert data.unreadable_names() == [str(tmp_path / "3.png")]
    assert all(part.targets is None for part in parts)


def test_workers_end_with_the_epoch(vim, pictures):
    before = set(psutil.Process().children(recursive=True))
    steps = Examples(vim, batches(vim, pictures, workers=2), SMALL, 0).iterate_epoch(0)
    next(steps)
    assert len(set(psutil.Process().children(recursive=True)) - before) == 2
    steps.close()
    assert set(psutil.Process().children(recursive=True)) <= before


def test_grey_images_take_randaugment(tmp_path):
    model = make_vim(channels=1)
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i, mode="L")
    (parts,) = Examples(model, batches(model, tmp_path), replace(RECIPES["top-vim"], batch_size=4), 0).iterate_epoch(0)
    assert parts[0].images.shape == (4, 1, 16, 16)


# ------------------------------------------------------------------------------------------------------ training


def test_the_model_comes_closer_to_its_teacher_without_labels(model, tmp_path):
    for i in range(24):
        write_image(tmp_path / f"{i}.png", i, size=model.config.image_size)
    data = batches(model, tmp_path)
    pruned = pruned_of(model)
    before, theirs, dense = weights(pruned), evaluate(pruned, data, dense=model), weights(model)
    recipe = replace(SMALL, epochs=6, batch_size=12, crop=1.0)
    tuned = finetune(pruned, data, dense=model, recipe=recipe, held_out=data).model
    assert evaluate(tuned, data, dense=model).kl < 0.8 * theirs.kl
    assert same(before, weights(pruned))
    assert same(dense, weights(model))
    assert all(p.requires_grad == q.requires_grad for p, q in zip(tuned.parameters(), pruned.parameters(), strict=True))
    record = record_of(tuned)
    assert (record.labels, record.teacher, record.images, record.steps) == (False, True, 24, 12)
    assert [entry["epoch"] for entry in record.history] == [1, 2, 3, 4, 5, 6]
    best = min(record.history, key=lambda entry: entry["held_out"]["kl"])
    assert record.epoch == best["epoch"]
    assert evaluate(tuned, data, dense=model).kl == pytest.approx(best["held_out"]["kl"], abs=1e-6)


def test_a_model_is_no_worse_for_it(vim, pictures):
    """With far too large steps, every epoch is worse than the initial model, whose weights are kept."""
    data = batches(vim, pictures)
    pruned = pruned_of(vim)
    recipe = replace(SMALL, lr=3.0, teacher=1.0, clip_grad=0.0, warmup=0.0)
    tuned = finetune(pruned, data, dense=vim, recipe=recipe, held_out=data)
    assert record_of(tuned.model).epoch == 0
    assert same(weights(tuned.model), weights(pruned))
    assert not same(weights(tuned.last), weights(pruned))


def test_labels_alone_teach(vim, pictures):
    data = batches(vim, pictures)
    recipe = replace(SMALL, epochs=16, batch_size=20, crop=1.0)
    tuned = finetune(pruned_of(vim), data, recipe=recipe).model
    assert evaluate(tuned, data).loss < 0.7 * evaluate(pruned_of(vim), data).loss
    assert not record_of(tuned).teacher


@pytest.mark.parametrize("norms", [False, True])
def test_norms_are_trained_only_if_the_recipe_says_so(model, tmp_path, norms):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", i, size=model.config.image_size)
    recipe = replace(SMALL, epochs=1, batch_size=4, lr=1e-2, warmup=0.0, norms=norms)
    pruned = pruned_of(model)
    tuned = finetune(pruned, batches(model, tmp_path), dense=model, recipe=recipe).last
    old, new = weights(pruned), weights(tuned)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    scales = {f"{name}.weight" for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    assert scales
    assert (scales & changed == scales) if norms else not scales & changed
    assert not any("running" in name or "gap_delta" in name for name in changed)
    assert any("in_proj" in name for name in changed)


def test_a_ramp_begins_with_nothing_pruned(vim, pictures):
    """At the first step the pruned model still equals the dense one, so the loss is zero."""
    first = {}
    for ramp in (0.0, 1.0):
        losses = []
        recipe = replace(SMALL, teacher=1.0, ramp=ramp, epochs=1)
        finetune(
            pruned_of(vim),
            batches(vim, pictures),
            dense=vim,
            recipe=recipe,
            log=lambda f, s, to=losses: to.append(f["loss"]),
        )
        first[ramp] = losses
    assert first[1.0][0] == pytest.approx(0, abs=1e-5)
    assert first[1.0][-1] > 1e-4
    assert first[0.0][0] > 1e-3


def test_of_weights_and_their_average_the_better_one_is_taken(vim, pictures):
    data = batches(vim, pictures)
    tuned = finetune(pruned_of(vim), data, dense=vim, recipe=replace(SMALL, ema=0.9), held_out=data)
    chosen = record_of(tuned.model).history[record_of(tuned.model).epoch - 1]
    found = evaluate(tuned.model, data, dense=vim)
    assert found.loss == pytest.approx(chosen["held_out"]["loss"], abs=1e-6)
    assert chosen["averaged"] == record_of(tuned.model).averaged


def test_bfloat16_where_it_is_asked_for(vim, pictures):
    recipe = replace(SMALL, dtype="bfloat16")
    tuned = finetune(pruned_of(vim), batches(vim, pictures), dense=vim, recipe=recipe).model
    assert all(value.dtype == torch.float32 for value in tuned.parameters())
    exact = finetune(pruned_of(vim), batches(vim, pictures), dense=vim, recipe=SMALL).model
    assert not same(weights(tuned), weights(exact))


def test_what_cannot_be_learnt_from(vim, tmp_path, pictures):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    data = batches(vim, tmp_path)
    with pytest.raises(InputError, match="no labels, and there is no dense model"):
        finetune(pruned_of(vim), data, recipe=SMALL)
    with pytest.raises(InputError, match="prunes nothing"):
        finetune(vim, data, dense=vim, recipe=SMALL)
    with pytest.raises(InputError, match="differ"):
        finetune(pruned_of(vim), data, dense=make_vim(depth=3), recipe=SMALL)
    with pytest.raises(InputError, match="3 images to train on"):
        finetune(pruned_of(vim), data, dense=vim, recipe=replace(SMALL, accumulate=2))


def test_features_are_compared_with_a_teachers_alone(vim, pictures):
    """Without a teacher, the weight of features has no effect."""
    data = batches(vim, pictures)
    with_them, without = (
        finetune(pruned_of(vim), data, recipe=replace(SMALL, features=features)).last for features in (1.0, 0.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(with_them.parameters(), without.parameters(), strict=True))


def test_fewer_images_than_a_batch_are_one_step(vim, tmp_path):
    for i in range(5):
        write_image(tmp_path / f"{i}.png", i)
    record = record_of(finetune(pruned_of(vim), batches(vim, tmp_path), dense=vim, recipe=SMALL).model)
    assert (record.steps, record.recipe["batch_size"]) == (2, 4)


def test_a_loss_that_is_not_finite_stops_the_run(vim, pictures, tmp_path):
    state = tmp_path / "state.pt"
    data = batches(vim, pictures)

    def break_it(figures, step):  # as the first epoch ends, whose state is good
        if step == 4:
            with torch.no_grad():
                data.transform = None
            vim.head.weight.data.fill_(torch.nan)

    with pytest.raises(SsmCompressError, match=r"not finite at step 5 of 8; the last good state is in .*lower lr"):
        finetune(pruned_of(vim), data, dense=vim, recipe=SMALL, state=state, log=break_it)
    assert read_state(state)["run"]["step"] == 4
    assert ssmcompress.load(state).plan is not None


def test_a_record_goes_to_json_and_back(vim, pictures):
    record = record_of(finetune(pruned_of(vim), batches(vim, pictures), dense=vim, recipe=SMALL).model)
    again = Finetuning.from_dict(json.loads(json.dumps(asdict(record))))
    assert asdict(again) == asdict(record)
    for damage in (
        {"history": 3},
        {"recipe": {"lr": []}},
        {"recipe": 3},
        {"images": "many"},
        {"name": None, "seconds": "x"},
    ):
        with pytest.raises(InputError):
            Finetuning.from_dict(asdict(record) | damage)


# -------------------------------------------------------------------------------------------- cut off and divided


FULL = replace(SMALL, mixup=0.8, cutmix=1.0, erasing=0.5, ema=0.9, ramp=0.6, accumulate=2, smoothing=0.1)


# In the middle of an epoch of four steps, before its last step, at its end, and in the next one.
@pytest.mark.parametrize(
    ("make", "cut"), [(make_vim, 1), (make_vim, 3), (make_vim, 4), (make_vim, 6), (make_plain_mamba, 6)]
)
def test_a_run_cut_off_goes_on_to_the_same_weights(make, cut, tmp_path):
    model = make(depth=2)
    for label in range(10):
        for i in range(4):
            write_image(tmp_path / "data" / f"class{label}" / f"{i}.png", 10 * label + i, model.config.image_size)
    state = tmp_path / "state.pt"
    pruned = pruned_of(model)
    data, held = batches(model, tmp_path / "data"), images_of(model, 8)

    def interrupt(figures, step):
        if step == cut and "loss" in figures:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"dense": model, "recipe": FULL, "held_out": [(held, torch.arange(8))]}
    whole = finetune(pruned, data, **options)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finetune(pruned, data, state=state, log=interrupt, **options)
    assert signal.getsignal(signal.SIGINT) is handler
    assert read_state(state)["run"]["step"] == cut
    half = ssmcompress.load(state)
    assert half.plan.stages == pruned.plan.stages
    resumed = finetune(pruned, data, state=StateFile(state, resume=True), **options)
    assert same(weights(whole.last), weights(resumed.last))
    assert same(weights(whole.model), weights(resumed.model))

    def lasting(found):
        timed = ("seconds", "images_per_second")
        return [{k: v for k, v in entry.items() if k not in timed} for entry in record_of(found.model).history]

    assert lasting(whole) == lasting(resumed)


def test_a_state_of_another_run_or_a_damaged_one_is_refused(vim, pictures, tmp_path):
    state, data = tmp_path / "state.pt", batches(vim, pictures)
    options = {"dense": vim, "state": StateFile(state, resume=True)}
    finetune(pruned_of(vim), data, recipe=SMALL, **options)
    for change in ({"recipe": replace(SMALL, lr=2e-3)}, {"recipe": SMALL, "seed": 1}):
        with pytest.raises(InputError, match="to another run, with .*(lr|seed)"):
            finetune(pruned_of(vim), data, **change, **options)
    with pytest.raises(InputError, match="to another run, with .*model"):
        finetune(pruned_of(make_vim(seed=5)), data, recipe=SMALL, **options)
    content = state.read_bytes()
    for part in (0, 1, 100, len(content) // 2, len(content) - 1):
        state.write_bytes(content[:part])
        with pytest.raises(InputError, match="state.pt"):
            finetune(pruned_of(vim), data, recipe=SMALL, **options)
        with pytest.raises(InputError):
            ssmcompress.load(state)
    state.unlink()
    finetune(pruned_of(vim), data, recipe=SMALL, **options)  # without a state it starts from scratch


def test_two_processes_do_what_one_does(tmp_path, capsys):
    """33 images, 7 at a time: nothing divides evenly."""
    for label in range(10):
        for i in range(3 + (label < 3)):
            write_image(tmp_path / "images" / f"class{label}" / f"{i}.png", 10 * label + i)
    torch.save({"model": make_vim(depth=2).state_dict()}, tmp_path / "dense.pt")
    done = forked("together", ["python", TESTS / "distributed_work.py", tmp_path])
    work_alone(tmp_path)
    one, two = json.loads(capsys.readouterr().out), json.loads(done.stdout)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert (one["images"], one["digests"]) == (two["images"], two["digests"]) == (33, 33)
    assert one["overlap"] == two["overlap"] == one["step learnt"] == two["step learnt"] == 33
    assert one["signature"] == two["signature"]
    assert one["evaluation"] == two["evaluation"]
    for name, values in one["calibration"].items():
        for ours, theirs in zip(values, two["calibration"][name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    for name in ("step", "mixed", "accumulated"):
        for parameter, values in one[name].items():
            np.testing.assert_allclose(values, two[name][parameter], rtol=0, atol=1e-5, err_msg=f"{name} {parameter}")
    assert one["step"] != one["mixed"]


def test_memory_does_not_grow(pictures):
    vim, sizes = make_vim(depth=2), []
    recipe = replace(SMALL, epochs=100, batch_size=10)
    finetune(
        pruned_of(vim), batches(vim, pictures), dense=vim, recipe=recipe,
        log=lambda figures, step: sizes.append(psutil.Process().memory_info().rss),
    )  # fmt: skip
    assert len(sizes) == 400
    assert sizes[-1] - sizes[150] < 4 << 20


def test_other_threads_can_train(vim, pictures):
    """Signals can be handled only in the main thread."""
    done = []
    thread = threading.Thread(
        target=lambda: done.append(finetune(pruned_of(vim), batches(vim, pictures), dense=vim, recipe=SMALL))
    )
    thread.start()
    thread.join()
    assert done


def test_progress_tells_the_figures(vim, pictures):
    told, lines = [], []

    class Front(progress.FrontEnd):
        def status(self, text):
            told.append(text)

        def line(self, text):
            lines.append(text)

    with progress.use_front_end(Front()), progress.hold_notes():
        finetune(pruned_of(vim), batches(vim, pictures), dense=vim, recipe=SMALL, held_out=batches(vim, pictures))
    assert len(told) == 8
    assert all(word in told[0] for word in ("loss", "top-1", "images/s"))
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "min left" in lines[0]
    assert "held out: top-1" in lines[0]
