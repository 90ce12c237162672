"""Saliency, sensitivities, the search for a budget, merging and the comparison of methods."""

import csv
import itertools
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BUNDLED, GOLDEN, images_of, make_plain_mamba, make_vim, select_bundled_images, write_checkpoint
from typer.testing import CliRunner

import ssmcompress
from ssmcompress.cli.app import app
from ssmcompress.compression.margin import features_and_gradients
from ssmcompress.compression.saliency import fit_probes
from ssmcompress.compression.search.propose import fill_budget, propose
from ssmcompress.compression.search.proxy_loss import sum_losses
from ssmcompress.compression.search.sensitivity import Sensitivity, candidate_layers, measure_sensitivity
from ssmcompress.data.batches import LabelledBatch
from ssmcompress.errors import BudgetError, InputError
from ssmcompress.evaluation.flops import flops, flops_by_part, remaining_share, smallest_share
from ssmcompress.jobs.images import choose_images
from ssmcompress.jobs.methods import METHODS, Level, stages_for_level
from ssmcompress.jobs.requests import DataOptions
from ssmcompress.jobs.search import SearchRequest, SearchResult, search_plan
from ssmcompress.pruning.alignment import Alignment
from ssmcompress.pruning.importance import UNLINKED_DISTANCE, link_pairs, normalize_rms, predict_saliency
from ssmcompress.pruning.merging import merge_into_kept
from ssmcompress.pruning.plan import Plan, Stage, kept_count, share_removed, token_counts
from ssmcompress.pruning.tokens import Tokens

ALL_MODELS = [make_vim, make_plain_mamba]

# The methods that are for classifiers.
CLASSIFIERS = [m for m in METHODS if not m.of_levels and m.importance not in ("attention", "keys")]


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, depth=3)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# ------------------------------------------------------------------------------------------------------- saliency


def test_a_probe_predicts_the_gradient_as_least_squares_does(model):
    """The regression with an intercept for each position, against torch's own solver on all rows at once."""
    images = images_of(model, 40)
    probe = fit_probes(model, images, [2])[1]
    features, gradients = features_and_gradients(model, images)
    x, y = normalize_rms(features[2]).double(), gradients[2].norm(dim=-1).double()
    ones = F.one_hot(torch.arange(model.length)).double().expand(len(images), -1, -1)
    rows = torch.cat([x, ones], 2).flatten(0, 1)
    expected = torch.linalg.lstsq(rows, y.flatten()[:, None]).solution[:, 0]
    positions = torch.arange(model.length).expand(len(images), -1)
    found = predict_saliency(features[2], positions, probe)
    error = (found.double() - (rows @ expected).view_as(found)).abs().max()
    assert error < 0.05 * y.std()


def test_probes_are_fitted_for_the_layers_asked_for_and_in_any_batches(model):
    images = images_of(model, 6)
    probes = fit_probes(model, images, [1, 3])
    assert [len(probe) > 0 for probe in probes] == [True, False, True, False]
    again = fit_probes(model, [images[:1], images[1:4], images[4:]], [1, 3])
    assert all(torch.equal(a, b) for a, b in zip(probes, again, strict=True))


def test_saliency_is_saved_with_the_model_and_counted(model, tmp_path):
    images = images_of(model, 6)
    plan = ssmcompress.calibrate(model, images, stages=(2,), ratio=0.5, importance="saliency")
    pruned = ssmcompress.prune(model, plan)
    assert flops_by_part(pruned)["scoring"] * 1e9 == model.length * model.d_model
    ssmcompress.save(pruned, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(ssmcompress.load(tmp_path / "saved")(images), pruned(images))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).calibration.probes[1].tolist() == (
        plan.calibration.probes[1].tolist()
    )


def test_saliency_needs_images(vim):
    plan = ssmcompress.make_plan(vim, stages=(2,), importance="saliency")
    with pytest.raises(InputError, match="fitted on images"):
        ssmcompress.prune(vim, plan)
    other = ssmcompress.calibrate(make_vim(image=(24, 24)), torch.randn(3, 3, 24, 24), plan)
    with pytest.raises(InputError, match="another model or image size"):
        ssmcompress.prune(vim, other)


def test_a_damaged_probe_is_refused(vim, images, tmp_path):
    from safetensors.torch import load_file, save_file

    plan = ssmcompress.calibrate(vim, images, stages=(2,), importance="saliency")
    ssmcompress.save(ssmcompress.prune(vim, plan), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    for broken in (state["pruners.2.probe"][:-1], state["pruners.2.probe"] * torch.nan, None):
        changed = {k: v for k, v in state.items() if k != "pruners.2.probe"}
        changed |= {} if broken is None else {"pruners.2.probe": broken.contiguous()}
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(InputError):
            ssmcompress.load(tmp_path / "m")


# ------------------------------------------------------------------------------------------------------- merging


def some_tokens(protected=None, count=7):
    features = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(3))
    return Tokens(features, length=count, protected=protected)


@pytest.mark.parametrize("protected", [None, 3])
def test_ordered_merging_keeps_the_sum_of_what_each_token_stands_for(protected):
    """Two stages of R-MeeTo: sizes count original tokens, and the size-weighted mean of all stays what it was."""
    tokens = some_tokens(protected)
    total = tokens.features.sum(1)
    for kept in (5, 4):
        scores = link_pairs(tokens)[0]
        if protected is not None:
            scores = scores.masked_fill(tokens.explicit_positions() == protected, torch.inf)
        index = scores.topk(kept).indices.sort().values
        tokens = merge_into_kept(tokens, index, scores, "ordered")
        assert (tokens.sizes.sum(1) == 7).all()
        torch.testing.assert_close((tokens.features * tokens.sizes[..., None]).sum(1), total)
    if protected is not None:
        assert torch.equal(tokens.features[0, tokens.protected_index()[0]], some_tokens(3).features[0, 3])


def test_ordered_merging_links_even_tokens_to_the_most_similar_odd_one():
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.2], [0.95, 0.0]]])
    distances, partner = link_pairs(Tokens(features, length=5))
    assert partner.tolist() == [[1, 1, 3, 3, 1]]
    assert distances[0, 1] == distances[0, 3] == UNLINKED_DISTANCE
    assert distances[0, 4] < distances[0, 2]


def test_grouped_merging_averages_sources_into_the_lowest_that_stay():
    features = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0], [5.0, 5.0]]])
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.9]])  # two sources, two targets, one that is left alone
    merged = merge_into_kept(Tokens(features, length=5), torch.tensor([[2, 3, 4]]), scores, "grouped")
    expected = torch.tensor([[[1.5, 0.05], [0.05, 2.0], [5.0, 5.0]]])
    torch.testing.assert_close(merged.features, expected)
    assert merged.positions.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("make", ALL_MODELS)
@pytest.mark.parametrize(("importance", "merge"), [("similarity", "ordered"), ("delta", "grouped")])
def test_merging_models_run_reload_and_are_reconstructed(make, importance, merge, tmp_path):
    model = make()
    images = images_of(model, 6)
    stages = (Stage(1, 0.3, importance, merge), Stage(3, 0.4, importance, merge))
    pruned = ssmcompress.prune(model, Plan(stages, Alignment(False, False)))
    ssmcompress.save(pruned, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(ssmcompress.load(tmp_path / "m")(images), pruned(images))
        torch.testing.assert_close(pruned(images[:2]), pruned(images)[:2], atol=1e-4, rtol=1e-4)
    rebuilt = ssmcompress.reconstruct(pruned, model, images)
    assert rebuilt.find_record("reconstruction").images == 6


@pytest.mark.parametrize(
    "stage", [Stage(1, 0.6, "similarity", "ordered"), Stage(1, 0.3, "clip", "ordered"), Stage(1, 0.3, merge="x")]
)
def test_merges_that_mean_nothing_are_refused(vim, stage):
    with pytest.raises(InputError):
        ssmcompress.prune(vim, Plan((stage,)))


# ------------------------------------------------------------------------------------------------- sensitivities


def sensitivity_of(model, refit=False, layers=(1, 2, 3), metrics=("clip", "saliency", "random"), images=None):
    images = images_of(model, 6) if images is None else images
    plan = ssmcompress.calibrate(model, images, stages=layers, importance="saliency", ratio=0.2)
    plan = replace(plan, stages=())
    return plan, measure_sensitivity(
        model, LabelledBatch(images, None), plan=plan, layers=layers, metrics=metrics, refit=refit
    )


def test_a_sensitivity_is_what_the_pruned_model_loses(model):
    """Each cell against `prune` and `evaluate`, which share no code with the measurement."""
    images = images_of(model, 6)
    plan, found = sensitivity_of(model)
    protected = model.protected is not None
    for (i, layer), (j, metric), (k, kept) in itertools.product(
        enumerate(found.layers), enumerate(found.metrics), enumerate(found.kept)
    ):
        if k % 3:
            continue
        stage = Stage(layer, share_removed(model.length, kept, protected), metric)
        pruned = ssmcompress.prune(model, replace(plan, stages=(stage,)))
        assert pruned.token_counts()[-1] == kept
        kl = ssmcompress.evaluate(pruned, images, dense=model).kl
        assert float(found.loss[i, j, k]) == pytest.approx(kl, abs=2e-5, rel=1e-3)


def test_a_budget_that_the_dense_model_meets_has_no_plan():
    dense = ssmcompress.load(GOLDEN / "vim.pth")
    with pytest.raises(BudgetError, match="within flops=0.95 as it is run.*there is nothing to prune"):
        ssmcompress.search(dense, images_of(dense, 12), flops=0.95)


def test_a_refitted_classifier_is_judged_on_images_it_was_not_fitted_on():
    """Pure noise cannot be predicted, so evaluation on the same images would show a spurious gain."""
    generator = torch.Generator().manual_seed(0)
    features, dense = torch.randn(60, 40, generator=generator), torch.randn(60, 4, generator=generator)
    classifier = torch.nn.Linear(40, 4)
    with torch.no_grad():
        classifier.weight.zero_(), classifier.bias.zero_()
        assert sum_losses(classifier, features, dense, refit=True) > sum_losses(classifier, features, dense)
        features = torch.randn(400, 40, generator=generator)
        many = features, features @ torch.randn(40, 4, generator=generator)
        assert sum_losses(classifier, *many, refit=True) < 0.05 * sum_losses(classifier, *many)


def test_labels_can_judge():
    dense, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    classifier = torch.nn.Linear(5, 5)
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(5)), classifier.bias.zero_()
        assert sum_losses(classifier, dense, dense, labels) == pytest.approx(0, abs=1e-5)
        worse = sum_losses(classifier, dense - 3 * F.one_hot(labels, 5), dense, labels)
    assert worse > 1


def test_a_sensitivity_survives_its_file_and_damage_is_refused(vim, tmp_path):
    _, found = sensitivity_of(vim)
    file = tmp_path / "sensitivity.json"
    file.write_text(found.to_json())
    again = Sensitivity.read(tmp_path)
    assert again.kept == found.kept
    assert again.model == found.model
    torch.testing.assert_close(again.loss, found.loss, atol=1e-6, rtol=0)
    value = json.loads(found.to_json())
    for broken in (
        "[]",
        "{",
        json.dumps({**value, "loss": value["loss"][:1]}),
        json.dumps({**value, "kept": value["kept"][::-1]}),
        json.dumps({**value, "layers": [1, 2, 9]}),
        json.dumps({**value, "format_version": 99}),
        json.dumps({**value, "loss": None}),
        found.to_json().replace("0.", "1e999", 1),
    ):
        file.write_text(broken)
        with pytest.raises(InputError):
            Sensitivity.read(file)
    with pytest.raises(InputError, match="another model"):
        found.check_model(make_vim(depth=5))


def test_candidates_of_deep_models_are_few():
    assert candidate_layers(1) == ()
    assert candidate_layers(6) == (1, 2, 3, 4, 5)
    assert len(candidate_layers(24)) == 12
    assert len(candidate_layers(36)) <= 12


# --------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("make", ALL_MODELS)
@pytest.mark.parametrize("within", [0.8, 0.5, 0.2])
def test_proposed_plans_spend_the_budget_and_not_more(make, within):
    model = make(depth=5, image=(32, 32) if make is make_vim else (128, 128))  # 64 patches
    plan, found = sensitivity_of(model, layers=(1, 2, 3, 4), images=images_of(model, 4))
    budget = within + (1 - within) * smallest_share(model, found.layers)
    proposed = propose(model, found, budget)
    assert proposed
    token = 1.5 / (model.length * len(model.blocks))
    for candidate in proposed:
        assert budget - 2 * token <= remaining_share(model, candidate.stages) <= budget
        assert len(candidate.stages) <= 3
        made = ssmcompress.prune(model, replace(plan, stages=candidate.stages))
        assert flops(made)["full"] / flops(model)["full"] == pytest.approx(remaining_share(model, candidate.stages))


def test_the_search_is_exact_for_its_model_of_the_cost():
    """Against every plan of up to three stages on the same counts."""
    model = make_vim(depth=4)
    _, found = sensitivity_of(model)
    budget, best = 0.7, float("inf")
    least = {
        # Fewer tokens never count as less lost.
        layer: dict(zip(found.kept, rows.cummax(1).values.min(0).values.tolist(), strict=True))
        for layer, rows in zip(found.layers, found.loss, strict=True)
    }
    for size in (1, 2, 3):
        for layers in itertools.combinations(found.layers, size):
            for kept in itertools.combinations(found.kept, size):
                made, before, loss = [], model.length, 0.0
                for layer, count in zip(layers, kept, strict=True):
                    made.append(Stage(layer, share_removed(before, count, True)))
                    loss += max(0.0, least[layer][count] - least[layer].get(before, 0.0))
                    before = count
                if remaining_share(model, made) <= budget:
                    best = min(best, loss)
    assert propose(model, found, budget)[0].expected <= best + 1e-9


def test_spending_adds_tokens_until_one_more_is_too_much(vim):
    spent = fill_budget(vim, (Stage(1, 0.7), Stage(3, 0.5)), 0.8)
    counts = token_counts(4, vim.length, spent, True)
    first, second = (counts[stage.after] for stage in spent)
    assert remaining_share(vim, spent) <= 0.8
    tried = [(a, b) for a, b in ((first + 1, second), (first, second + 1)) if vim.length > a > b]
    assert tried
    for a, b in tried:
        more = (Stage(1, share_removed(vim.length, a, True)), Stage(3, share_removed(a, b, True)))
        assert remaining_share(vim, more) > 0.8
    assert fill_budget(vim, (Stage(3, 0.1),), 0.3) is None


def test_share_removed_is_the_inverse_of_kept_count():
    for length, protected in itertools.product((3, 17, 197, 730), (False, True)):
        for kept in range(2, length + 1):
            assert kept_count(length, share_removed(length, kept, protected), protected) == kept


def search(model, folder, **request) -> SearchResult:
    data = DataOptions(str(folder))
    chosen = choose_images(model, data)
    gap = chosen.gap_source(None)
    return search_plan(model, SearchRequest(**request), chosen, data, gap=gap, reconstruct=False)


def test_a_search_finds_the_layer_that_does_not_need_its_tokens(class_folders):
    """Layers that add nothing need no tokens: pruning right before them is free, and is chosen."""
    model = make_vim(depth=5)
    for block in model.blocks[3:]:
        block.mixer.out_proj.weight.data.zero_()
    found = search(model, class_folders, flops=0.75)
    assert found.plan.stages[0].after == 3
    assert found.record["loss"] == pytest.approx(0, abs=1e-6)
    again = search(model, class_folders, flops=0.75)
    assert again.plan == found.plan
    assert again.sensitivity.to_json() == found.sensitivity.to_json()


def test_prune_to_a_budget_writes_the_sensitivity_and_takes_it_again(checkpoint, class_folders, tmp_path):
    first = tmp_path / "first"
    result = run("prune", checkpoint, "--flops", "70%", "--data", class_folders, "-o", first, "--no-latency", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert "reachable: " in result.stderr
    assert report["search"]["refit"] is True
    assert report["search"]["tried"]
    share = report["pruned"]["flops"]["full"] / report["dense"]["flops"]["full"]
    assert 0.6 < share <= 0.7
    known = ["--sensitivity", first, "--data", class_folders, "--no-latency", "--json"]
    result = run("prune", checkpoint, "--flops", "80%", *known, "-o", tmp_path / "second")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["search"]["seconds"]["sensitivity"] < 0.1
    assert (tmp_path / "second" / "sensitivity.json").read_text() == (first / "sensitivity.json").read_text()
    for wrong in (["--no-reconstruct"], ["--no-align"], ["--by-labels"], ["--stages", "1,7"], ["--importance", "mean"]):
        result = run("prune", checkpoint, "--flops", "80%", *known, "-o", tmp_path / "third", *wrong)
        assert result.exit_code == 2, (wrong, result.stderr)
        assert not (tmp_path / "third").exists()


def test_a_dry_run_of_a_search_prints_a_plan_that_prune_takes(checkpoint, class_folders, tmp_path):
    data = ["--data", class_folders, "--no-latency"]
    result = run("prune", checkpoint, "--flops", "70%", *data, "--dry-run", "--json", "-o", tmp_path / "none")
    assert result.exit_code == 0, result.stderr
    assert not (tmp_path / "none").exists()
    (tmp_path / "plan.json").write_text(result.stdout)
    result = run("prune", checkpoint, "--plan", tmp_path / "plan.json", *data, "-o", tmp_path / "made", "--json")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("option", ["--flops", "--latency"])
@pytest.mark.parametrize("share", ["1%", "100%"])
def test_budgets_out_of_reach_name_the_range(checkpoint, class_folders, tmp_path, option, share):
    result = run(
        "prune", checkpoint, option, share, "--data", class_folders, "-o", tmp_path / "x", "--search-images", 2
    )
    assert result.exit_code == 3, result.stderr
    assert "out of reach" in result.stderr
    assert "100%" in result.stderr
    assert not (tmp_path / "x").exists()


def test_the_range_is_what_pruning_to_two_tokens_leaves(vim):
    pruned = ssmcompress.prune(vim, Plan((Stage(2, share_removed(vim.length, 2, True)),)))
    assert pruned.token_counts()[-1] == 2
    assert smallest_share(vim, (2, 3)) == pytest.approx(flops(pruned)["full"] / flops(vim)["full"])


def test_a_latency_is_searched_for_by_timing(monkeypatch, class_folders):
    """With a clock that counts FLOPs, the plan takes the requested time and hardly less."""

    def clock(models, image, repeats):
        return {name: flops(model)["full"] for name, model in models.items()}

    monkeypatch.setattr("ssmcompress.jobs.trial.latency", clock)
    model = make_vim(depth=5, image=(32, 32))
    found = search(model, class_folders, latency=0.7, images=4)
    assert 0.95 * 0.7 <= found.record["latency"] <= 0.7
    with pytest.raises(BudgetError, match="latency is out of reach"):
        search(model, class_folders, latency=0.01, images=4)


# --------------------------------------------------------------------------------------------------------- compare


def compare(*arguments):
    return run("compare", *arguments, "--no-latency")


def test_compare_measures_every_method_and_goes_on_where_it_was(checkpoint, class_folders, tmp_path):
    out = tmp_path / "compared"
    given = [checkpoint, "--data", class_folders, "-o", out, "--search", "--reconstruct", "--json"]
    result = compare(*given, "--ratios", "0.3")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    assert [row["method"] for row in value["rows"]] == ["dense", *(method.name for method in CLASSIFIERS)]
    level = value["rows"][1]["flops_share"]
    for row in value["rows"][1:]:
        if not row.get("failed"):
            assert row["flops_share"] <= level + 0.02, row["method"]  # corrections of a small model have a cost
    assert len(list(csv.DictReader((out / "compare.csv").open()))) == len(value["rows"])
    assert (out / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (out / "pareto.svg").read_bytes()
    value["rows"] = value["rows"][:4]
    value["rows"][1]["seconds"] = -1.0  # a mark: this row is not measured again
    (out / "compare.json").write_text(json.dumps(value))
    result = compare(*given, "--ratios", "0.3,0.5")
    assert result.exit_code == 0, result.stderr
    again = json.loads(result.stdout)["rows"]
    assert len(again) == 1 + 2 * len(CLASSIFIERS)
    assert again[1]["seconds"] == -1.0
    result = compare(*given, "--ratios", "0.3", "--seed", 5)
    assert result.exit_code == 2
    assert "another" in result.stderr


def test_a_comparison_with_damaged_rows_is_refused(checkpoint, class_folders, tmp_path):
    given = [checkpoint, "--data", class_folders, "-o", tmp_path / "c", "--ratios", "0.3", "--methods", "naive"]
    assert compare(*given).exit_code == 0
    whole = (tmp_path / "c" / "compare.json").read_text()
    for damage in (
        {"agreement": [1]}, {"flops": 5}, {"stages": 5}, {"method": [[]]}, {"ratio": "x"}, {"images": None},
    ):  # fmt: skip
        value = json.loads(whole)
        value["rows"][1] |= damage
        (tmp_path / "c" / "compare.json").write_text(json.dumps(value))
        result = compare(*given)
        assert result.exit_code == 2, damage
        assert "not a comparison of ssmcompress" in result.stderr, damage


def test_rows_that_must_coincide_do(checkpoint, class_folders, tmp_path):
    given = [checkpoint, "--data", class_folders, "--json"]
    at_zero = json.loads(compare(*given, "--ratios", "0", "-o", tmp_path / "zero").stdout)["rows"]
    assert len(at_zero) > 15
    for row in at_zero[1:]:
        assert (row["top1"], row["agreement"]) == (at_zero[0]["top1"], 100.0), row["method"]
        assert row["kl"] == pytest.approx(0, abs=1e-6)
    kl = {}
    for seed in (1, 2):
        names = ["--methods", "naive; random, aligned", "--ratios", "0.5", "--samples", 10]
        eval_data = ["--eval-data", class_folders]
        out = ["-o", tmp_path / f"seed{seed}", "--seed", seed, "--gap", "bias"]
        rows = json.loads(compare(*given, *names, *eval_data, *out).stdout)["rows"]
        kl[seed] = [row["kl"] for row in rows[1:]]
    assert kl[1][0] == kl[2][0]
    assert kl[1][1] != kl[2][1]


@pytest.mark.parametrize("method", [m for m in CLASSIFIERS if not m.searched and m.axis is None], ids=lambda m: m.name)
def test_every_method_stays_below_its_level(method):
    model = make_vim(depth=6, image=(40, 40))
    reference = remaining_share(model, [Stage(after, 0.15) for after in (1, 3, 4)])
    stages = stages_for_level(method, model, Level(0.15, reference), (1, 3, 4))
    assert 0.9 * reference <= remaining_share(model, stages) <= reference


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratios", "1.2"], "at least 0 and below 1"),
        (["--ratios", "0.3", "--flops", "60%"], "expected one of them"),
        (["--methods", "magic"], "unknown method"),
        (["--flops", "1%"], "out of reach"),
        (["--stages", "9"], "cannot prune after layer 9"),
    ],
)
def test_compare_says_what_is_wrong(checkpoint, class_folders, tmp_path, arguments, says):
    result = compare(checkpoint, "--data", class_folders, "-o", tmp_path / "c", *arguments)
    assert result.exit_code in (2, 3)
    assert says in result.stderr
    assert not (tmp_path / "c").exists()


def test_compare_does_not_write_into_a_folder_of_something_else(checkpoint, class_folders, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    result = compare(checkpoint, "--data", class_folders, "-o", tmp_path / "c", "--force")
    assert result.exit_code == 2
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine.txt"]


def test_the_search_beats_the_default_schedule_on_the_bundled_model(tmp_path):
    """Both reconstructed, at the same FLOPs, on 96 images that nothing was learnt from: 0.52 times its divergence."""
    images, kl = select_bundled_images(160, tmp_path / "images.parquet"), {}
    for name, extra in (
        ("search", ["--axes", "tokens", "--stages", "1,2,3", "--search-images", 32]),
        ("default", ["--no-search"]),
    ):
        given = ["--data", images, "--flops", "50%", "--samples", 64, "--no-latency", "--json"]
        result = run("prune", BUNDLED, *given, *extra, "-o", tmp_path / name)
        assert result.exit_code == 0, result.stderr
        kl[name] = json.loads(result.stdout)["agreement"]["kl"]
    assert kl["search"] < 0.8 * kl["default"]
