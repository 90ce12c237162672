"""`push`: a compressed folder with its card on the Hugging Face Hub, without local paths."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from command_line import call, call_json, process, refused
from conftest import images_of
from fake_hub import TOKEN, serve_hub

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.jobs.local_paths import PathRemover
from ssmcompress.jobs.push import PushRequest, push_folder

TO = "someone/vim-small"


@pytest.fixture
def hub(tmp_path_factory, in_an_empty_folder, monkeypatch):
    with serve_hub(tmp_path_factory.mktemp("cache")) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def read_header(card):
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def uploaded(hub, branch="main"):
    repository = hub.repositories[TO]
    return repository.commits[repository.branches[branch]]


def test_a_pushed_model_is_the_same_model(hub, pruned_folder, checkpoint):
    before = {file.name: file.read_bytes() for file in pruned_folder.iterdir()}
    result = call_json("push", pruned_folder, TO, "--license", "mit", "--message", "first")
    assert result["url"] == f"{hub.url}/{TO}"
    assert result["commit"] == hub.repositories[TO].branches["main"]
    assert {file.name: file.read_bytes() for file in pruned_folder.iterdir()} == before
    assert set(uploaded(hub)) == {*(file["name"] for file in result["files"]), ".gitattributes"}
    assert {"model.safetensors", "config.json", "report.json", "README.md", "kept_tokens.png"} <= set(uploaded(hub))
    ours, theirs = ssmcompress.load(pruned_folder), ssmcompress.load(TO)
    images = images_of(ours)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=0)
    assert theirs.plan == ours.plan
    said = call("evaluate", TO).stderr
    assert "the dense model model.pt is gone; give --dense" in said  # not: /home/... is gone
    call(
        "push", pruned_folder, TO, "--license", "mit", "--revision", "v2", "--quiet"
    )  # into a repository that exists already
    assert "config.json" in uploaded(hub, "v2")


def test_nothing_that_is_listed_has_a_path_of_this_machine(hub, pruned_folder, checkpoint):
    spaced = Path(shutil.copytree(pruned_folder, "with space"))
    for name in ("config.json", "report.json", "README.md"):
        text = (spaced / name).read_text().replace(str(checkpoint), f"{Path.home()}/my models/a b.pt")
        (spaced / name).write_text(text)
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    graph.metadata_props.add(key="origin", value=f'{{"path": "{checkpoint}"}}')
    onnx.save(graph, spaced / "model.onnx")
    report = json.loads((spaced / "report.json").read_text())
    (spaced / "report.json").write_text(json.dumps({**report, "onnx": {"file": "model.onnx"}}))
    result = call_json("push", spaced, TO, "--license", "mit")
    names = {file["name"] for file in result["files"]}
    assert "model.onnx" in names
    private = [str(Path.home()), tempfile.gettempdir(), os.getcwd(), str(checkpoint.parent)]
    for name in names:
        content = uploaded(hub)[name]
        assert not [path for path in private if path.encode() in content], name
    config = json.loads(uploaded(hub)["config.json"])
    assert config["pruning"]["source"]["path"] == "a b.pt"
    assert config["data"] == "images"
    assert "--data images" in config["pruning"]["command"]
    assert "images of images" in uploaded(hub)["README.md"].decode()


def test_states_of_training_caches_and_hidden_files_stay_here(hub, pruned_folder):
    for name in ("last.safetensors", ".hidden", "x.tmp", "notes.txt", "sensitivity.json", "pruned.training.pt"):
        (pruned_folder / name).write_text("x")
    (pruned_folder / "attention").mkdir()
    (pruned_folder / "attention" / "0.png").write_text("my own photograph")
    listed = {file["name"] for file in call_json("push", pruned_folder, TO, "--license", "mit", "--dry-run")["files"]}
    assert listed == {"model.safetensors", "config.json", "report.json", "recipe.yaml", "README.md", "kept_tokens.png"}


def test_the_card_says_what_the_hub_asks_for(hub, pruned_folder):
    header, body = read_header(call_json("push", pruned_folder, TO, "--license", "mit", "--dry-run")["card"])
    assert (header["license"], header["library_name"]) == ("mit", "ssmcompress")
    assert header["pipeline_tag"] == "image-classification"
    assert "vim" in header["tags"]
    assert not {"base_model", "datasets"} & header.keys()  # the dense model and the images are local
    (result,) = header["model-index"][0]["results"]
    (metric,) = result["metrics"]
    report = json.loads((pruned_folder / "report.json").read_text())
    assert (metric["type"], metric["value"]) == ("accuracy", report["pruned"]["top1"])
    assert result["dataset"]["name"] == "images"
    assert body.startswith("\n# pruned\n")


def test_of_a_model_of_the_hub_the_card_names_the_base_and_its_licence(hub, pruned_folder):
    file = pruned_folder / "config.json"
    config = json.loads(file.read_text())
    config["pruning"]["source"]["path"] = f"owner/vim@{'0' * 40}:vim.pth"
    config["data"] = "owner/data:plain:test"
    file.write_text(json.dumps(config))
    commit = hub.add("owner/vim", {"vim.pth": b""}, license="apache-2.0")
    file.write_text(json.dumps(config).replace("0" * 40, commit))
    header, _ = read_header(call_json("push", pruned_folder, TO)["card"])
    assert header["license"] == "apache-2.0"
    assert (header["base_model"], header["base_model_relation"]) == ("owner/vim", "finetune")
    hub.repositories["owner/vim"].license = None
    assert "owner/vim states no licence; give --license" in refused("push", pruned_folder, TO)


def test_segmentation_has_its_own_task_and_metric(hub, pruned_folder):
    file = pruned_folder / "report.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "task": "segmentation", "pruned": {**report["pruned"], "miou": 41.25}}))
    header, _ = read_header(call_json("push", pruned_folder, TO, "--license", "mit", "--dry-run")["card"])
    assert header["pipeline_tag"] == "image-segmentation"
    (metric,) = header["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("mean_iou", 41.25)


def test_a_model_without_a_report_has_a_short_card(hub, vim):
    ssmcompress.save(ssmcompress.prune(vim, ratio=0.5, stages=[2]), "saved")
    result = call_json("push", "saved", TO, "--license", "mit")
    assert {file["name"] for file in result["files"]} == {"model.safetensors", "config.json", "README.md"}
    header, body = read_header(result["card"])
    assert header["pipeline_tag"] == "image-classification"
    assert "model-index" not in header
    assert body.startswith("\n# vim-small\n")
    assert ssmcompress.load(TO).plan.stages


def test_a_dry_run_needs_neither_network_nor_token(hub, pruned_folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shown = call("push", pruned_folder, TO, "--license", "mit", "--dry-run")
    assert "model.safetensors" in shown.stdout
    assert "license: mit" in shown.stdout
    assert "nothing was uploaded" in shown.stderr
    assert hub.requests == []


def test_what_goes_wrong_is_one_line_and_nothing_is_uploaded(hub, pruned_folder, checkpoint, monkeypatch):
    given = ("--license", "mit")
    assert "the licence of the weights is not known; give --license" in refused("push", pruned_folder, TO)
    assert "no such folder; expected a folder that" in refused("push", "nowhere", TO, *given)
    assert "a file; expected a folder that" in refused("push", checkpoint, TO, *given)
    os.mkdir("empty")
    assert "empty is not the folder of a compressed model" in refused("push", "empty", TO, *given)
    ssmcompress.save(ssmcompress.load(checkpoint), "dense")
    assert "dense holds a dense model" in refused("push", "dense", TO, *given)
    assert "a/b/c: expected owner/name" in refused("push", pruned_folder, "a/b/c", *given)
    assert "a branch is given by --revision" in refused("push", pruned_folder, f"{TO}@v1", *given)
    assert f"is a web address: write {TO}" in refused("push", pruned_folder, f"https://hf.co/{TO}", *given)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub rejects the token; log in again" in refused("push", pruned_folder, TO, *given)
    monkeypatch.delenv("HF_TOKEN")
    assert "no token; log in with `hf auth login`" in refused("push", pruned_folder, TO, *given)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.forbidden = True
    assert "the Hub denies access" in refused("push", pruned_folder, TO, *given)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in refused("push", pruned_folder, TO, *given, code=1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("push", pruned_folder, TO, *given, code=1)
    assert hub.repositories == {}


def test_paths_are_removed_from_texts_and_addresses_stay():
    remover = PathRemover([{"name": "/data/my images", "command": "ssmcompress prune --data=/secret '/x y/z.pt'"}])
    for text, expected in {
        "on 3 images of /data/my images, twice": "on 3 images of my images, twice",
        "--data=/secret": "--data=secret",
        "'/x y/z.pt'": "'z.pt'",
        "see https://huggingface.co/a/b and and/or 3/4": "see https://huggingface.co/a/b and and/or 3/4",
        "/usr/share/x.png: unreadable": "x.png: unreadable",
        r"C:\Users\me\model.pt and D:/x/y": "model.pt and y",
        r"\\server\share\model.pt": "model.pt",
        "images/class1/0.png": "images/class1/0.png",
        f"{Path.home()}": "~",
        "/data/other:train": "other:train",
    }.items():
        assert remover.clean_text(text) == expected
    assert remover.clean({"/a/b": ["/c/d", 3, None]}) == {"b": ["d", 3, None]}


@pytest.mark.parametrize(
    ("typed", "published"),
    [
        ("-o/tmp/x/clients/acme/out", "-oout"),
        ("-o clients/acme/out", "-o out"),
        ("--data=clients/acme/images:train", "--data=images:train"),
        ("--data clients/acme/images.parquet", "--data images.parquet"),
        ("~/acme/p ~jane/q ~jane", "p q '~'"),
        ("'/home/jane doe/secret/model.pt'", "model.pt"),
        ("--set 'key=/home/jane doe/x'", "--set key=x"),
        ("--set=a=b/c --set mixup=0.8", "--set=a=c --set mixup=0.8"),
        ("file:///home/jane/x/y", "y"),
        (r"'C:\Users\jane\m.pt'", "m.pt"),
        ("/home/jane:train /Users/jane/", "'~:train' '~'"),
        ("../../acme/x ./y", "x y"),
        (
            "owner/vim@v1:dir/vim.pth --data owner/data:plain:test",
            "owner/vim@v1:dir/vim.pth --data owner/data:plain:test",
        ),
        ("-0.5 --ratio 0.3 -q", "-0.5 --ratio 0.3 -q"),
        ("'an unclosed /home/jane/x", None),
    ],
)
def test_of_each_path_in_a_command_the_last_component_stays(typed, published):
    command = f"ssmcompress prune {typed}"
    remover = PathRemover([{"command": command}], {"owner/vim", "owner/data"})
    expected = "ssmcompress prune" if published is None else f"ssmcompress prune {published}"
    assert remover.clean({"command": command}) == {"command": expected}
    assert remover.clean_text(f"Made by\n\n    {command}\n") == f"Made by\n\n    {expected}\n"


def test_paths_that_are_known_are_found_in_other_texts():
    known = {
        "data": {"name": "clients/acme/images"},
        "path": "/home/jane doe/secret/model.pt",
        "command": "x -o/big/out",
    }
    remover = PathRemover([known])
    assert remover.clean(known) == {"data": {"name": "images"}, "path": "model.pt", "command": "x -oout"}
    for text, expected in {
        "on 3 images of clients/acme/images, twice": "on 3 images of images, twice",
        "clients/acme/images/cat/1.png": "1.png",
        "'/home/jane doe/secret/other.pt' and /home/jane doe/x": "'other.pt' and x",
        "-o/big/out": "-oout",
        "see ~/acme/p, ../acme/q and file:///home/jane/x%20y/z.": "see p, q and z.",
        "~1.5x faster, ~3/4 of it, and/or ... owner/name": "~1.5x faster, ~3/4 of it, and/or ... owner/name",
    }.items():
        assert remover.clean_text(text) == expected


def test_what_only_contains_a_known_path_stays():
    remover = PathRemover([{"data": "/data", "command": "ssmcompress prune runs/x --data /data -o /a/b"}])
    for text in (
        "https://huggingface.co/datasets/a/data-x",
        "owner/data-model and owner/data",
        "https://huggingface.co/runs/x",
        "my-runs/x and runs/x-large",
        "https://example.com/a/b",
    ):
        assert remover.clean_text(text) == text
    assert remover.clean_text("of /data.") == "of data."


def test_no_folder_of_the_user_is_published_by_a_relative_name(hub, pruned_folder):
    private = ("clients", "acme", "jane", "photo-of-me")
    for name in ("config.json", "report.json"):
        value = json.loads((pruned_folder / name).read_text())
        where = value["pruning"] if name == "config.json" else value
        where["command"] = "ssmcompress prune clients/acme/vim.pth --data clients/acme/images.parquet -o/tmp/x/acme/out"
        where["reconstruction"]["name"] = "clients/acme/images.parquet"
        if name == "report.json":
            value["data"] |= {"name": "clients/acme/images.parquet", "unreadable": ["cats/photo-of-me.png", "b/c.png"]}
            value["warnings"] = ["clients/acme/images.parquet: too few", "~/acme/p", "file:///home/jane/x/y"]
            card = (
                f"2 unreadable images were skipped (cats/photo-of-me.png, b/c.png)\n\nMade by\n\n    {where['command']}"
            )
            (pruned_folder / "README.md").write_text(card)
        (pruned_folder / name).write_text(json.dumps(value))
    result = call_json("push", pruned_folder, TO, "--license", "mit")
    for name, content in uploaded(hub).items():
        assert not [word for word in private if word.encode() in content], name
    (entry,) = read_header(result["card"])[0]["model-index"][0]["results"]
    assert entry["dataset"] == {"type": "images.parquet", "name": "images.parquet"}
    assert "2 unreadable images were skipped\n" in result["card"]
    assert "ssmcompress prune vim.pth --data images.parquet -oout" in result["card"]
    data = json.loads(uploaded(hub)["report.json"])["data"]
    assert (data["unreadable"], data["unreadable_images"]) == ([], 2)
    shown = call("report", TO)  # it is still a report
    assert "of images.parquet" in shown.stdout + shown.stderr


def test_the_recipe_is_published_without_the_folders_of_its_files(hub, pruned_folder):
    (pruned_folder / "recipe.yaml").write_text(
        "# Run it by `ssmcompress run recipe.yaml`.\nformat_version: 1\ncommand: prune\n"
        "model: ../clients/acme/model.pt\n# from ~/acme/notes\ndata: ../../clients/acme/images:train\n"
        "eval_data: owner/data:test\nplan: acme/plan.json\nratio: 0.5\nset: [mixup=0.8]\n"
    )
    call("push", pruned_folder, TO, "--license", "mit")
    assert uploaded(hub)["recipe.yaml"].decode() == (
        "# Run it by `ssmcompress run recipe.yaml`.\nformat_version: 1\ncommand: prune\n"
        "model: model.pt\n# from notes\ndata: images:train\n"
        "eval_data: owner/data:test\nplan: plan.json\nratio: 0.5\nset:\n- mixup=0.8\n"
    )
    (pruned_folder / "recipe.yaml").write_text(f"model: owner/vim@{'0' * 40}:dir/vim.pth\n")
    call("push", pruned_folder, TO, "--license", "mit")
    assert uploaded(hub)["recipe.yaml"].decode() == f"model: owner/vim@{'0' * 40}:dir/vim.pth\n"
    for content in ("- x", "a: [", "a: &a [*a]", "a: &a [1]\nb: *a", "\0"):
        (pruned_folder / "recipe.yaml").write_text(content)
        assert "recipe.yaml" in refused("push", pruned_folder, TO, "--license", "mit")


# ---------------------------------------------------------------------------------------------------- the repository


def test_nothing_private_is_pushed_into_a_public_repository(hub, pruned_folder):
    call("push", pruned_folder, TO, "--license", "mit", "--private")
    assert hub.repositories[TO].private
    call("push", pruned_folder, TO, "--license", "mit", "--private")  # it is private
    hub.repositories[TO].private = False
    before = dict(hub.repositories[TO].branches)
    for given in ((), ("--force",), ("--revision", "v2")):
        said = refused("push", pruned_folder, TO, "--license", "mit", "--private", *given)
        assert f"{TO} exists and is public: choose another name" in said
    assert hub.repositories[TO].branches == before
    call("push", pruned_folder, "someone/open", "--license", "mit")
    assert not hub.repositories["someone/open"].private


@pytest.mark.parametrize("config", [None, b'{"model_type": "mamba"}', b'{"pruning": {}}', b"[]", b"{"])
def test_files_of_others_are_replaced_only_if_asked(hub, pruned_folder, config):
    theirs = {".gitattributes": b"", "README.md": b"theirs", "model.onnx": b"theirs", "report.json": b"{}"}
    hub.add(TO, {**theirs, **({"config.json": config} if config is not None else {})})
    before = dict(hub.repositories[TO].branches)
    said = refused("push", pruned_folder, TO, "--license", "mit")
    assert f"{TO} exists and has files that ssmcompress did not write (" in said
    assert "upload anyway with --force" in said
    assert hub.repositories[TO].branches == before
    result = call_json("push", pruned_folder, TO, "--license", "mit", "--force")
    assert result["deleted"] == []
    assert uploaded(hub)["model.onnx"] == b"theirs"
    assert b"license: mit" in uploaded(hub)["README.md"]


def test_an_empty_repository_is_written_without_asking(hub, pruned_folder):
    hub.add(TO, {".gitattributes": b""})
    call("push", pruned_folder, TO, "--license", "mit")
    assert "config.json" in uploaded(hub)


def test_what_an_earlier_upload_left_is_deleted_in_the_same_commit(hub, pruned_folder):
    export(pruned_folder)
    call("push", pruned_folder, TO, "--license", "mit")
    hub.add(TO, {"finetuning.png": b"old", "notes.txt": b"of someone", "other.onnx": b"of someone"})
    assert {"graph.onnx", "graph.onnx.data", "finetuning.png"} <= set(uploaded(hub))
    report = json.loads((pruned_folder / "report.json").read_text())
    del report["onnx"]
    (pruned_folder / "report.json").write_text(json.dumps(report))
    (pruned_folder / "kept_tokens.png").unlink()
    commits = len(hub.repositories[TO].commits)
    result = call_json("push", pruned_folder, TO, "--license", "mit")
    assert result["deleted"] == ["finetuning.png", "graph.onnx", "graph.onnx.data", "kept_tokens.png"]
    assert set(uploaded(hub)) == {file["name"] for file in result["files"]} | {
        ".gitattributes",
        "notes.txt",
        "other.onnx",
    }
    assert len(hub.repositories[TO].commits) == commits + 1


# ---------------------------------------------------------------------------------------------------- the folder


def export(folder, name="graph.onnx"):
    """Add a graph and its data to a folder, and to its report."""
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), folder / name)
    (folder / f"{name}.data").write_bytes(b"weights")
    report = json.loads((folder / "report.json").read_text())
    figures = {"opset": 17, "dtype": "float32", "scan": "loop", "max_difference": 0.0, "images": 1}
    report["onnx"] = {"file": name, **figures, "top1_agreement": 100.0}
    (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("name", ["finetuning.png", "README.md", "recipe.yaml", "model.safetensors", "graph.onnx.data"])
def test_a_link_out_of_the_folder_is_refused(hub, pruned_folder, name):
    export(pruned_folder)
    secret = Path(shutil.copy(pruned_folder / name, "secret") if (pruned_folder / name).exists() else "secret")
    secret.touch()
    (pruned_folder / name).unlink(missing_ok=True)
    (pruned_folder / name).symlink_to(secret.absolute())
    said = refused("push", pruned_folder, TO, "--license", "mit")
    assert f"{name} is a link to a file outside the folder" in said
    (pruned_folder / name).unlink()
    os.mkfifo(pruned_folder / name)
    said = refused("push", pruned_folder, TO, "--license", "mit")
    assert f"{name} is not a regular file" in said or "is not the folder of a compressed model" in said
    assert hub.repositories == {}


def test_links_in_the_folder_and_of_the_cache_of_the_hub_are_followed(hub, pruned_folder):
    (pruned_folder / "kept_tokens.png").rename(pruned_folder / "x.png")
    (pruned_folder / "kept_tokens.png").symlink_to("x.png")
    call("push", pruned_folder, TO, "--license", "mit")
    ssmcompress.load(TO)
    (config,) = Path(os.environ.get("HF_HUB_CACHE") or hub_cache()).glob(
        "models--someone--vim-small/snapshots/*/config.json"
    )
    assert config.is_symlink()
    result = call_json("push", config.parent, "someone/again", "--license", "mit", "--dry-run")
    assert {"config.json", "model.safetensors"} <= {file["name"] for file in result["files"]}


def hub_cache():
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@pytest.mark.parametrize("name", ["notes.txt", "../secret.onnx", ".hidden.onnx", "a/b.onnx", "id_rsa"])
def test_only_an_onnx_file_of_the_folder_is_the_graph(hub, pruned_folder, name):
    report = json.loads((pruned_folder / "report.json").read_text())
    (pruned_folder / "report.json").write_text(json.dumps({**report, "onnx": {"file": name}}))
    (pruned_folder / "a").mkdir()
    (pruned_folder / name).write_text("secret")
    result = call_json("push", pruned_folder, TO, "--license", "mit", "--dry-run")
    assert not [file for file in result["files"] if file["name"] not in {
        "model.safetensors", "config.json", "report.json", "recipe.yaml", "README.md", "kept_tokens.png",
    }]  # fmt: skip


def test_a_malformed_file_is_refused_in_one_line_or_does_not_matter(hub, pruned_folder):
    """Every value of the JSON files, including nested ones, replaced by a value of each type."""

    def places(value, depth):
        for key, part in value.items() if isinstance(value, dict) and depth else ():
            yield (value, key)
            yield from places(part, depth - 1)

    request, refusals = PushRequest(TO, license="mit"), {}
    for name, depth in {"config.json": 3, "report.json": 2}.items():
        file = pruned_folder / name
        text = file.read_text()
        whole = json.loads(text)
        for value, key in list(places(whole, depth)):
            before = value[key]
            for other in ("x", None, [1], {"a": 1}, float("nan")):
                value[key] = other
                file.write_text(json.dumps(whole))
                try:
                    push_folder(pruned_folder, request, dry_run=True)
                except InputError as error:
                    refusals[str(error)] = key
            value[key] = before
        file.write_text(text)
    assert not [message for message in refusals if "\n" in message]
    assert {"architecture", "type", "pruning", "source", "path", "command", "data", "pruned"} <= {*refusals.values()}


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("pruning", "source"), "x", "config.json: pruning.source is 'x': expected an object"),
        (("architecture",), None, "config.json: architecture is None: expected an object"),
        (("pruning", "steps"), 5, "config.json: pruning.steps is 5: expected a list"),
        (("pruning",), [], "config.json: pruning is []: expected an object"),
    ],
)
def test_a_malformed_value_is_named(hub, pruned_folder, keys, value, message):
    config = json.loads((pruned_folder / "config.json").read_text())
    where = config
    for key in keys[:-1]:
        where = where[key]
    where[keys[-1]] = value
    (pruned_folder / "config.json").write_text(json.dumps(config))
    assert message in refused("push", pruned_folder, TO, "--license", "mit")


def test_values_in_values_without_end_are_refused(hub, pruned_folder):
    report = json.loads((pruned_folder / "report.json").read_text())
    deep = "[" * 950 + "]" * 950
    (pruned_folder / "report.json").write_text(json.dumps({**report, "deep": "DEEP"}).replace('"DEEP"', deep))
    said = refused("push", pruned_folder, TO, "--license", "mit")
    assert "nested too deeply" in said or "report.json cannot be read (maximum recursion" in said  # by Python's version


@pytest.mark.parametrize("revision", ["a b", "v1:x.pth", "../x", "a\nb"])
def test_a_branch_that_cannot_be_is_refused(hub, pruned_folder, revision):
    said = refused("push", pruned_folder, TO, "--license", "mit", "--revision", revision)
    assert "expected a branch, tag or commit" in said
    assert hub.requests == []


def test_a_process_of_its_own_pushes(hub, pruned_folder):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(Path("home").absolute()), "HF_TOKEN": TOKEN}
    environment["HF_HUB_DISABLE_XET"] = "1"
    done = process("push", pruned_folder, TO, "--license", "mit", env=environment)
    assert done.stderr == ""
    assert done.stdout.startswith(f"{hub.url}/{TO}, commit ")
    assert "model.safetensors" in uploaded(hub)
