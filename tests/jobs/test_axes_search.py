"""A budget over several axes: the measurements, their combination, the runs, and the resulting folder."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from command_line import call, call_json, refused
from conftest import images_of, make_plain_mamba, make_vim, write_checkpoint, write_image

import ssmcompress
from ssmcompress.compression.search.axes import Option, list_axes, list_options, measure_axes
from ssmcompress.compression.search.combine import combine, move_stages
from ssmcompress.compression.search.propose import Candidate
from ssmcompress.compression.search.sensitivity import Sensitivity
from ssmcompress.compression.trim.trims import Trims
from ssmcompress.data.batches import LabelledBatch
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops, flops_as_run, flops_of, remaining_share
from ssmcompress.jobs.axes_search import drop_of
from ssmcompress.pruning.plan import Stage
from ssmcompress.tasks import CLASSIFICATION

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

QUICK = ("--search-images", 16, "--no-latency")


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path, depth=3)


@pytest.fixture
def folders(tmp_path):
    """Ten classes of four images each, enough for all axes."""
    for number in range(40):
        write_image(tmp_path / "many" / f"class{number % 10}" / f"{number}.png", seed=number)
    return tmp_path / "many"


def share(report):
    return report["pruned"]["flops"]["full"] / report["dense"]["flops"]["full"]


# ------------------------------------------------------------------------------------------------------ options


def test_every_axis_has_options_that_save_flops(model):
    options = list_options(model, list_axes(model))
    assert {axis for axis, _ in options} == {"states", "channels", "layers"}
    full = flops_of(model, model.config)
    for _, trims in options:
        assert 0 < flops_of(model, trims.apply_to(model.config)) < full


def test_a_model_without_room_has_no_such_axis():
    model = make_vim(depth=1, d_model=4, d_state=1)
    assert list_axes(model) == ()


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_sizes_of_trims_are_those_of_the_trimmed_model(make):
    model = make(depth=4)
    last = model.config.PATHS[-1]
    trims = Trims(states=2, channels=24, layers=(2,), directions=((1, (0,)), (4, (last,))))
    images = images_of(model, 4)
    trimmed = ssmcompress.drop_layers(ssmcompress.drop_directions(model, dict(trims.directions)), trims.layers)
    trimmed = ssmcompress.trim_channels(ssmcompress.trim_states(trimmed, 2, images), 24, images)
    assert trims.apply_to(model.config) == trimmed.config
    assert flops(trimmed)["full"] / flops(model)["full"] == pytest.approx(flops_of(model, trimmed.config))
    assert trimmed.origin.layers == (1, 3, 4)


def test_trims_survive_json():
    trims = Trims((1, 2, 3), 24, (2,), ((1, (0,)), (4, (1,))))
    assert Trims.from_dict(json.loads(json.dumps(trims.to_dict()))) == trims
    assert Trims.from_dict({}) == Trims()
    assert not Trims()
    for value in ({"states": "two"}, {"channels": [1, -2]}, {"layers": 5}, {"directions": [1]}, {"states": True}):
        with pytest.raises(InputError, match="not what is trimmed"):
            Trims.from_dict(value)


def test_what_an_axis_costs_alone_is_measured_against_the_dense_model(vim):
    images = images_of(vim, 12)
    chains = {"states": lambda: None}
    found = measure_axes(vim, LabelledBatch(images, None), ["layers"], chains.get, refit=False)
    dense = vim(images).log_softmax(1)
    for option in found:
        dropped = dict(option.trims.directions)
        other = ssmcompress.drop_layers(ssmcompress.drop_directions(vim, dropped), option.trims.layers)
        expected = torch.nn.functional.kl_div(
            other(images).log_softmax(1), dense, reduction="batchmean", log_target=True
        )
        assert option.loss == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert sum(bool(option.trims.layers) for option in found) == 4
    assert sum(bool(option.trims.directions) for option in found) == 8


# ----------------------------------------------------------------------------------------------------- combining


def made_options(model, losses):
    options = []
    for (axis, trims), loss in zip(list_options(model, ("states", "channels", "layers")), losses, strict=False):
        options.append(Option(axis, trims, flops_of(model, trims.apply_to(model.config)), loss))
    return options


def test_the_axis_that_loses_least_is_used_first():
    model = make_vim(depth=8, d_state=8, d_model=32)
    options = [replace(o, loss=0.0 if o.axis == "states" else 5.0) for o in made_options(model, [0.0] * 99)]
    budget = 0.9 * remaining_share(model, ())
    first = next(c for c in combine(model, options, []) if c.flops <= budget)
    assert first.axes == ("states",)
    assert first.expected == 0


def test_losses_add_up_and_flops_are_those_of_the_sizes():
    model = make_vim(depth=8, d_state=8, d_model=32)
    options = made_options(model, [0.01 * (k + 1) for k in range(99)])
    tokens = Candidate((Stage(3, 0.5),), 0.5)
    by_key = {(c.trims, bool(c.stages)): c for c in combine(model, options, [tokens])}
    states, channels = options[1], next(o for o in options if o.axis == "channels")
    both = by_key[Trims(states=states.trims.states, channels=channels.trims.channels), True]
    assert both.expected == pytest.approx(states.loss + channels.loss + 0.5)
    config = both.trims.apply_to(model.config)
    assert flops_of(model, config, [17] * 3 + [9] * 6) == pytest.approx(both.flops)


def test_more_saved_never_counts_as_less_lost():
    """A measured loss can decrease by chance when more is trimmed."""
    model = make_vim(depth=2, d_state=8, d_model=16)
    counts = [trims for axis, trims in list_options(model, ("states",)) if axis == "states"]
    losses = [0.3, 0.1] + [0.4] * (len(counts) - 2)
    options = [
        Option("states", t, flops_of(model, t.apply_to(model.config)), v) for t, v in zip(counts, losses, strict=True)
    ]
    found = {c.trims.states: c.expected for c in combine(model, options, [])}
    assert found[counts[1].states] == 0.3


def test_stages_move_with_dropped_layers():
    stages = (Stage(2, 0.3), Stage(5, 0.3))
    assert [s.after for s in move_stages(stages, (1, 4), 6)] == [1, 3]
    assert move_stages(stages, (3, 4, 5), 5) is None  # both after the second
    assert move_stages(stages, (1, 2), 6) is None  # before the first
    assert move_stages((Stage(5, 0.3),), (6,), 5) is None  # after the last


def test_points_lost_are_of_accuracy_with_labels_and_of_agreement_without():
    dense = torch.eye(4)[[0, 1, 2, 3]]
    other = torch.eye(4)[[0, 1, 3, 2]]
    labels = torch.tensor([0, 1, 3, 0])
    assert drop_of(CLASSIFICATION, other, dense, None) == 50
    assert drop_of(CLASSIFICATION, other, dense, labels) == -25


# ---------------------------------------------------------------------------------------------------- the command


def test_a_budget_is_met_by_all_axes_and_the_folder_reloads(checkpoint, folders):
    report = call_json("prune", checkpoint, "--flops", "60%", "--data", folders, *QUICK, "-o", "m")
    assert share(report) <= 0.6
    search = report["search"]
    assert {entry["axis"] for entry in search["axes"]} == {"states", "channels", "layers", "tokens"}
    assert search["tried"][0]["loss"] == min(entry["loss"] for entry in search["tried"])
    model = ssmcompress.load("m")
    assert flops(model)["full"] == report["pruned"]["flops"]["full"]
    assert model.plan.stages == tuple(Stage(**stage) for stage in search["tried"][0]["stages"])
    # Another budget, from the same measurement; the same one, by the plan of the folder.
    again = call_json("prune", checkpoint, "--flops", "50%", "--data", folders, *QUICK, "--sensitivity", "m", "-o", "n")
    measured = [[e for e in found["axes"] if e["axis"] != "tokens"] for found in (search, again["search"])]
    assert measured[0] == measured[1]
    assert share(again) <= 0.5
    for source in ("m", "m/report.json"):
        planned = call_json(
            "prune", checkpoint, "--plan", source, "--data", folders, "--no-latency", "--force", "-o", "p"
        )
        assert planned["trims"] == report["trims"]
        assert ssmcompress.load("p").config == model.config


@pytest.mark.parametrize("axis", ["states", "channels", "layers", "tokens"])
def test_one_axis_leaves_the_others_as_they_are(checkpoint, folders, axis):
    budget = {"states": 0.7, "channels": 0.6, "layers": 0.75, "tokens": 0.6}[axis]
    report = call_json("prune", checkpoint, "--flops", budget, "--axes", axis, "--data", folders, *QUICK, "-o", "m")
    assert share(report) <= budget
    model, dense = ssmcompress.load("m"), ssmcompress.load(checkpoint)
    changed = {
        "states": model.config.d_state != dense.config.d_state,
        "channels": model.config.d_inner != dense.config.d_inner,
        "layers": model.config.depth != dense.config.depth or model.config.directions is not None,
        "tokens": bool(model.plan.stages),
    }
    assert [name for name, value in changed.items() if value] == [axis]


def test_uniform_sizes_are_an_ordinary_checkpoint(checkpoint, folders):
    call("prune", checkpoint, "--flops", "55%", "--axes", "states,channels", "--data", folders, *QUICK, "-o", "m")
    model = ssmcompress.load("m")
    torch.save({"model": model.state_dict()}, "plain.pt")
    plain = ssmcompress.load("plain.pt")
    assert plain.plan is None
    assert plain.origin is None
    images = images_of(model, 3)
    assert torch.equal(plain(images), model(images))


def test_a_model_that_is_cheap_enough_as_it_is_run_stays_as_it_is(checkpoint, folders):
    highest = remaining_share(ssmcompress.load(checkpoint), ())
    for axes in ((), ("--axes", "tokens")):
        report = call_json(
            "prune", checkpoint, "--flops", highest, *axes, "--data", folders, *QUICK, "-o", "m", "--force"
        )
        assert report["stages"] == []
        assert report["trims"] == {}
        assert report["agreement"]["top1"] == 100


def test_few_images_or_stand_ins_trim_tokens_alone(checkpoint, class_folders):
    """States and channels are refitted, for which sample images are no substitute for the user's images."""
    for data in (("--data", class_folders), ()):
        report = call_json("prune", checkpoint, "--flops", "60%", *data, *QUICK, "-o", "m", "--force")
        assert report["trims"] == {}
        assert report["stages"]


def test_a_loss_is_kept_on_images_that_nothing_was_fitted_on(checkpoint, folders):
    quick = ("--axes", "channels,layers", "--data", folders, *QUICK)
    report = call_json("prune", checkpoint, "--max-drop", "30", *quick, "-o", "m")
    assert report["search"]["drop"]["points"] <= 30
    assert report["search"]["asked"]["max_drop"] == 30
    assert share(report) < remaining_share(ssmcompress.load(checkpoint), ())
    for number, file in enumerate(sorted(folders.rglob("*.png"))):
        file.rename(folders / f"{number}.png")  # without labels, the classes of the dense model count
    options = ("--axes", "layers", "--data", folders, *QUICK)
    done = call("prune", checkpoint, "--max-drop", "0.001", *options, code=3)
    assert "0.001 points is out of reach" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--axes", "states,heads", "--flops", "60%"), "expected some of states, channels, layers, tokens"),
        (("--axes", "states"), "only for a search"),
        (("--flops", "60%", "--max-drop", "1"), "expected one of them"),
        (("--max-drop", "0"), "above 0 and below 100"),
        (("--max-drop", "1", "--no-search"), "needs a search"),
        (("--flops", "60%", "--axes", "states", "--search-images", "4"), "expected at least 16"),
        (
            ("--flops", "60%", "--axes", "states", "--stages", "2"),
            "--stages: only for tokens; add tokens to --axes",
        ),
        (("--flops", "60%", "--axes", "states", "--importance", "l2"), "--importance: only for tokens"),
        (("--max-drop", "9", "--axes", "layers", "--stages", "1", "--importance", "l1"), "--stages and --importance"),
    ],
)
def test_what_does_not_go_together_is_refused(checkpoint, folders, arguments, message):
    assert message in refused("prune", checkpoint, "--data", folders, "--samples", 12, *arguments, "--no-latency")


def test_out_of_reach_names_the_axes_and_the_range(checkpoint, folders):
    done = call("prune", checkpoint, "--flops", "20%", "--axes", "states", "--data", folders, *QUICK, code=3)
    assert "states leave from" in done.stderr


def test_an_axis_that_the_model_does_not_have_is_refused(tmp_path, folders):
    torch.save({"model": make_vim(d_state=1).state_dict()}, tmp_path / "lean.pt")
    line = refused("prune", tmp_path / "lean.pt", "--flops", "60%", "--axes", "states", "--data", folders, *QUICK)
    assert "no states to trim" in line


def test_a_sensitivity_of_axes_alone_is_read_back(checkpoint, folders):
    call("prune", checkpoint, "--flops", "70%", "--axes", "states", "--data", folders, *QUICK, "-o", "m")
    found = Sensitivity.read("m")
    assert found.layers == ()
    assert {option.axis for option in found.axes} == {"states"}
    assert Sensitivity.read("m").to_json() == found.to_json()
    again = ("--axes", "states,layers", "--sensitivity", "m", "--data", folders, *QUICK)
    report = call_json("prune", checkpoint, "--flops", "60%", *again, "-o", "n")
    assert {entry["axis"] for entry in report["search"]["axes"]} == {"states", "layers"}


def test_images_that_a_reused_sensitivity_is_run_on_are_noted(checkpoint, folders, tmp_path):
    for number in range(40):
        write_image(tmp_path / "others" / f"class{number % 10}" / f"{number}.png", seed=100 + number)
    quick = ("--axes", "layers", "--no-reconstruct", *QUICK)
    call("prune", checkpoint, "--flops", "75%", *quick, "--data", folders, "-o", "m")
    again = ("--sensitivity", "m", "--data", tmp_path / "others")
    report = call_json("prune", checkpoint, "--flops", "75%", *quick, *again, "-o", "n")
    first, second = (set(ssmcompress.load(name).learnt.digests.tolist()) for name in ("m", "n"))
    assert (len(first), len(second)) == (20, 40)  # half of each folder is measured on
    assert first < second
    assert report["search"]["data"] == {"name": str(tmp_path / "others"), "images": 10}
    assert Sensitivity.read("n").data["name"] == str(folders)
    assert len(Sensitivity.read("n").digests) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda axes: axes[0].update(trims={"states": "two"}), "not what is trimmed"),
        (lambda axes: axes[0].update(flops=2), "flops 2"),
        (lambda axes: axes[0].update(axis="channels"), "of the axis channels that trims"),
        (lambda axes: axes[0].update(trims={}), "of the axis states that trims"),
    ],
)
def test_a_damaged_option_of_a_sensitivity_names_the_file(checkpoint, folders, change, message):
    call("prune", checkpoint, "--flops", "70%", "--axes", "states", "--data", folders, *QUICK, "-o", "m")
    with open("m/sensitivity.json") as file:
        value = json.load(file)
    change(value["axes"])
    with open("other.json", "w") as file:
        json.dump(value, file)
    options = ("--axes", "states", "--sensitivity", "other.json", "--data", folders)
    found = refused("prune", checkpoint, "--flops", "60%", *options)
    assert found.startswith("error: other.json: ")
    assert message in found


def test_an_option_of_a_sensitivity_that_the_model_cannot_have_is_refused(checkpoint, folders):
    call("prune", checkpoint, "--flops", "75%", "--axes", "layers", "--data", folders, *QUICK, "-o", "m")
    with open("m/sensitivity.json") as file:
        value = json.load(file)
    value["axes"][0]["trims"] = {"layers": [9]}
    with open("other.json", "w") as file:
        json.dump(value, file)
    found = refused("prune", checkpoint, "--flops", "60%", "--sensitivity", "other.json", "--data", folders, *QUICK)
    assert "the sensitivity has an option that this model cannot have" in found


@pytest.mark.parametrize("budget", ["60%", "50%", "75%"])
def test_no_combination_is_run_twice(checkpoint, folders, budget):
    report = call_json("prune", checkpoint, "--flops", budget, "--data", folders, *QUICK, "-o", "m")
    tried = report["search"]["tried"]
    runs = [json.dumps([entry["trims"], entry["stages"]]) for entry in tried]
    assert len(set(runs)) == len(runs) >= 3


def test_a_loss_is_searched_for_without_repeating_a_combination(checkpoint, folders, monkeypatch):
    """Once the smallest combination has passed, every lower budget has that one again."""
    from ssmcompress.jobs import axes_trial

    made = []

    def reconstruct(model, *others, **options):
        made.append((str(model.config), model.plan.stages))
        return original(model, *others, **options)

    original = axes_trial.reconstruct
    monkeypatch.setattr(axes_trial, "reconstruct", reconstruct)
    options = ("--axes", "states,layers", "--data", folders, *QUICK)
    done = call("prune", checkpoint, "--max-drop", "99", *options, "-o", "m")
    assert len(made) == len(set(made)) > 1
    judged = [line for line in done.stderr.splitlines() if "of the FLOPs lose" in line]
    assert len(judged) == len(set(judged)) >= 1


def test_a_model_of_one_layer_has_no_stages(tmp_path, folders):
    """It has no layer after which tokens could be dropped, so token options have no effect."""
    path = write_checkpoint(tmp_path, depth=1)
    found = refused("prune", path, "--flops", "80%", "--stages", "1", "--data", folders, *QUICK)
    assert "--stages: only for tokens, but the search is over states, channels" in found


def test_a_trimmed_model_is_refused_as_trimmed(vim, images, tmp_path):
    trimmed = ssmcompress.trim_states(vim, 2, images)
    many = images_of(vim, 40)
    for search in (ssmcompress.search, ssmcompress.fit_budget):
        with pytest.raises(InputError, match="trimmed already; expected the dense model"):
            search(trimmed, many, flops=0.5)
    ssmcompress.save(trimmed, "m")
    assert "the dense one, but the dense model was never a file" in refused("prune", "m", "-o", "n")
    pruned = ssmcompress.prune(trimmed, ratio=0.5)
    with pytest.raises(InputError, match="pruned already; expected the dense model"):
        ssmcompress.search(pruned, many, flops=0.5)


@pytest.fixture(scope="module")
def trimmed_folder(tmp_path_factory):
    """A model without layer 2, and with less of everything else."""
    vim, folder = make_vim(), tmp_path_factory.mktemp("trimmed") / "m"
    smaller = ssmcompress.drop_layers(ssmcompress.drop_directions(vim, {1: [0], 2: [1]}), [2])
    smaller = ssmcompress.trim_states(smaller, [2, 3, 4], images_of(vim), name="few")
    ssmcompress.save(ssmcompress.trim_channels(smaller, 24, images_of(vim)), folder)
    return folder


def values_of(config, kind):
    return next(step["values"] for step in config["pruning"]["steps"] if step["kind"] == kind)


def change_config(folder, change):
    """Copy a folder to the current one, with a changed configuration."""
    shutil.copytree(folder, "copy", dirs_exist_ok=True)
    with open("copy/config.json") as file:
        config = json.load(file)
    change(config)
    with open("copy/config.json", "w") as file:
        json.dump(config, file)
    return "copy"


def test_an_undamaged_configuration_of_a_trimmed_model_is_read(trimmed_folder):
    change_config(trimmed_folder, lambda config: None)
    model = ssmcompress.load("copy")
    assert (model.config.d_state, model.config.d_inner) == ((2, 3, 4), 24)
    assert call_json("inspect", "copy")["trims"]["fitted_on"]["states"] == {"name": "few", "images": 5}


RECORDS = [
    *((kind, key, None) for kind, keys in (
        ("states", ("name", "images", "n", "losses")), ("channels", ("name", "images", "e", "costs")),
        ("layers", ("layers",)), ("directions", ("directions",)),
    ) for key in keys),
    ("states", "name", 7), ("states", "images", "5"), ("states", "images", True), ("channels", "images", 0),
    ("states", "n", [2, 3, 3]), ("states", "n", [2, 3]), ("states", "n", 2), ("states", "n", [2, 3, True]),
    ("states", "losses", ["x"]), ("channels", "costs", 0.5), ("channels", "costs", [float("nan")]),
    ("channels", "e", [24, 24, 32]), ("channels", "e", "24"), ("layers", "layers", []), ("layers", "layers", [9]),
    ("layers", "layers", [3]), ("layers", "layers", [2, 2]), ("layers", "layers", "2"), ("layers", "layers", [[2]]),
    ("directions", "directions", []), ("directions", "directions", {"1": [1], "2": [1]}),
    ("directions", "directions", {"1": [0], "9": [1]}), ("directions", "directions", {"x": [0]}),
    ("directions", "directions", {"1": [0], "2": [0, 1]}), ("directions", "directions", {"1": 0}),
    ("directions", "directions", {"2": [1]}), ("directions", "directions", {"1": ["0"]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "value"), RECORDS)
def test_a_damaged_record_of_trimming_is_refused_where_it_is_read(trimmed_folder, kind, key, value):
    def change(config):
        values = values_of(config, kind)
        values.pop(key) if value is None else values.update({key: value})

    line = refused("inspect", change_config(trimmed_folder, change))
    assert line.startswith(f"error: copy: config.json: bad record of trimmed {kind}: --{key}") or line.startswith(
        f"error: copy: config.json: bad record of trimmed {kind}: `{key}`"
    )


def test_two_records_of_a_kind_are_refused(trimmed_folder):
    def change(config):
        config["pruning"]["steps"] *= 2

    assert "2 records of trimmed" in refused("inspect", change_config(trimmed_folder, change))


@pytest.mark.parametrize(
    "sizes",
    [
        None,
        {"d_state": None}, {"d_inner": None}, {"depth": None}, {"directions": None},
        {"d_inner": True}, {"d_state": 4.0}, {"d_inner": [32, 32, 32, True]}, {"depth": True},
        {"d_state": 2}, {"d_inner": 16}, {"d_state": [2, 4, 2, 4]}, {"d_inner": [32, 32, 32]},
        {"directions": [[1], [0, 1], [1], [0, 1]]}, {"directions": [[0, 1], [0, 1], [0, 1], [0, 1, 2]]},
        {"directions": [[0, 1], [], [0, 1], [0, 1]]},
        {"d_model": 32}, {"num_classes": 1000}, {"image_size": [64, 64]}, {"patch": 4},
    ],
)  # fmt: skip
def test_wrong_sizes_of_the_dense_model_are_refused(trimmed_folder, sizes):
    """They would silently change the FLOPs of the dense model."""

    def change(config):
        if sizes is None:
            del config["pruning"]["trimmed_from"]
            return
        for key, value in sizes.items():
            config["pruning"]["trimmed_from"]["sizes"].pop(key, None)
            if value is not None:
                config["pruning"]["trimmed_from"]["sizes"][key] = value

    found = refused("inspect", change_config(trimmed_folder, change))
    assert found.startswith("error: copy: config.json: ")
    assert "sizes of the dense model" in found or "trimmed_from" in found


def test_directions_of_a_plain_mamba_that_its_configuration_does_not_have_are_refused(plain_mamba, tmp_path):
    """Its weights do not show which scan paths a layer has."""
    ssmcompress.save(ssmcompress.drop_directions(plain_mamba, {1: [0, 3]}), tmp_path / "m")
    assert ssmcompress.load(tmp_path / "m").config.directions[0] == (1, 2)
    changed = change_config(tmp_path / "m", lambda config: config["architecture"].pop("directions"))
    assert "bad record of trimmed directions" in refused("inspect", changed)


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_models_trimmed_in_any_order_are_read_again(make, tmp_path):
    """Also if dropping a layer removes everything that an earlier step trimmed."""
    dense = make(depth=4)
    images = images_of(dense, 4)
    uneven = ssmcompress.trim_states(dense, [2, 4, 4, 4], images)
    bare = ssmcompress.drop_layers(ssmcompress.drop_directions(uneven, {1: [0], 3: [1]}), [1])
    last = ssmcompress.drop_layers(ssmcompress.trim_channels(bare, [32, 24, 16], images), [2])
    again = ssmcompress.trim_channels(ssmcompress.trim_states(last, 2, images), 8, images)
    pruned = ssmcompress.prune(again, ratio=0.5, stages=[1])
    for number, model in enumerate((uneven, bare, last, again, pruned)):
        ssmcompress.save(model, tmp_path / str(number))
        read = ssmcompress.load(tmp_path / str(number))
        assert read.origin == model.origin
        assert read.steps == model.steps
        assert flops(read) == flops(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["pruning"]["trimmed_from"].update(layers=[1, 1, 2, 3]), "bad sizes of the dense model"),
        (lambda c: c["pruning"]["trimmed_from"].update(sizes={"d_state": "8"}), "bad sizes of the dense model"),
        (lambda c: c["pruning"].update(trimmed_from=7), "bad sizes of the dense model"),
        (lambda c: c["architecture"].update(directions=[[0, 1]]), "bad directions"),
        (lambda c: c["architecture"].update(directions=[[0], [1], [0, 1], []]), "bad directions"),
        (lambda c: c["architecture"].update(directions=[[0], [1], [0, 1], [2]]), "bad directions"),
    ],
)
def test_a_damaged_configuration_of_a_trimmed_model_is_refused(vim, images, tmp_path, change, message):
    ssmcompress.save(ssmcompress.trim_states(vim, 2, images), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        ssmcompress.load(tmp_path / "m")


def test_the_alignment_is_chosen_on_images_unless_it_is_given(checkpoint, folders):
    options = (
        "prune",
        checkpoint,
        "--flops",
        "60%",
        "--axes",
        "tokens",
        "--data",
        folders,
        *QUICK,
        "--force",
        "-o",
        "m",
    )
    report = call_json(*options)
    losses = {(entry["conv"], entry["scan"]): entry["loss"] for entry in report["search"]["alignments"]}
    assert len(losses) == 4
    chosen = (report["alignment"]["conv"], report["alignment"]["scan"])
    assert losses[chosen] == min(losses.values())
    for option, expected in (("--align", True), ("--no-align", False)):
        report = call_json(*options, option)
        assert report["search"]["alignments"] == []
        assert (report["alignment"]["conv"], report["alignment"]["scan"]) == (expected, expected)


@pytest.mark.parametrize("axes", [None, ["states", "channels"]])
def test_a_budget_in_python(vim, axes):
    images = images_of(vim, 64)
    compressed = ssmcompress.fit_budget(vim, images, flops=0.5, axes=axes)
    assert flops(compressed)["full"] <= 0.5 * flops(vim)["full"]
    assert compressed.find_record("reconstruction") is not None
    assert vim.plan is None
    ssmcompress.save(compressed, "m")
    assert torch.equal(ssmcompress.load("m")(images[:3]), compressed(images[:3]))


def test_a_budget_in_python_needs_one_budget(vim):
    with pytest.raises(InputError, match="no budget"):
        ssmcompress.fit_budget(vim, images_of(vim, 32))
    with pytest.raises(InputError, match="expected one of them"):
        ssmcompress.fit_budget(vim, images_of(vim, 32), flops=0.5, max_drop=1.0)


def test_a_latency_is_that_of_the_model_that_is_returned(checkpoint, folders, monkeypatch):
    def by_flops(models, images, repeats):
        return {name: flops_as_run(model)["full"] for name, model in models.items()}

    monkeypatch.setattr("ssmcompress.jobs.axes_trial.latency", by_flops)
    options = ("--axes", "states,channels", "--data", folders, *QUICK)
    report = call_json("prune", checkpoint, "--latency", "70%", *options, "-o", "m")
    dense = flops_as_run(ssmcompress.load(checkpoint))["full"]
    assert report["search"]["latency"] == pytest.approx(report["pruned"]["flops"]["full"] / dense)
    assert 0.4 < report["search"]["latency"] <= 0.7
    done = call("prune", checkpoint, "--latency", "5%", *options, "-o", "n", code=3)
    assert "out of reach" in done.stderr


@pytest.mark.parametrize(
    ("trims", "message"),
    [
        ({"layers": [9]}, "layer 9 of a model of 3 layers"),
        ({"layers": [1, 2, 3]}, "expected one to remain"),
        ({"directions": {"1": [0, 1]}}, "which has"),
        ({"states": [2, 2]}, "expected one for each of 3 layers"),
        ({"channels": 0}, "at least 1"),
    ],
)
def test_trims_of_a_plan_that_do_not_fit_are_refused(checkpoint, folders, trims, message):
    with open("plan.json", "w") as file:
        json.dump({"stages": [], "trims": trims}, file)
    for options in ((), ("--dry-run",)):
        assert message in refused("prune", checkpoint, "--plan", "plan.json", "--data", folders, *options)


def test_a_plan_of_per_layer_sizes_and_a_dropped_layer_is_carried_out_again(checkpoint, folders):
    dense = ssmcompress.load(checkpoint)
    trimmed = ssmcompress.drop_layers(ssmcompress.trim_states(dense, [2, 3, 4], images_of(dense, 8)), [2])
    ssmcompress.save(trimmed, "first")
    call("prune", checkpoint, "--plan", "first", "--data", folders, "--no-latency", "-o", "m")
    assert ssmcompress.load("m").config.d_state == (2, 4) == trimmed.config.d_state


def test_images_that_a_loss_was_judged_by_are_noted(tmp_path):
    vim = make_vim(depth=2)
    for number in range(1300):
        write_image(tmp_path / "images" / f"{number}.png", seed=number)
    compressed = ssmcompress.fit_budget(vim, str(tmp_path / "images"), max_drop=60, axes=["layers"])
    assert len(compressed.learnt.digests) == 1300
    assert compressed.learnt.complete
