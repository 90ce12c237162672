"""The training scripts of the examples: an interrupted and resumed run gives the same model as a single run."""

import gzip
import importlib
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, Value

import ssmcompress

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch):
    """A function that runs a script with arguments, in this process."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script).main()

    return call


def write_segments(file, count):
    """A table as make_clutter.py writes it for segmentation."""
    generator = np.random.default_rng(0)
    rows = {"image": [], "annotation": []}
    for _ in range(count):
        rows["image"].append(generator.integers(0, 255, (112, 112, 3), np.uint8))
        rows["annotation"].append(generator.integers(0, 3, (112, 112), np.uint8))
    Dataset.from_dict(rows, Features({"image": Image(), "annotation": Image()})).to_parquet(str(file))


def write_objects(file, count, side):
    """A table as make_clutter.py writes it for classification."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (side, side, 3), np.uint8) for _ in range(count)]
    labels = [number % 10 for number in range(count)]
    table = Dataset.from_dict({"image": images, "label": labels}, Features({"image": Image(), "label": Value("int64")}))
    table.to_parquet(str(file))


def write_idx(folder, count):
    """The four files of Fashion-MNIST, with `count` images each."""
    generator = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pixels = generator.integers(0, 255, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, magic, values in (("images-idx3-ubyte", 2051, pixels), ("labels-idx1-ubyte", 2049, labels)):
            header = np.array([magic, *values.shape], ">i4").tobytes()
            (folder / f"{split}-{name}.gz").write_bytes(gzip.compress(header + values.tobytes()))


def same_weights(one, other, key):
    one, other = (torch.load(file, weights_only=True)[key] for file in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_segmenter_trained_in_pieces(run, tmp_path, capsys):
    write_segments(tmp_path / "s.parquet", 8)
    data = (tmp_path / "s.parquet", tmp_path / "s.parquet")
    options = ("--d-model", 8, "--depth", 4, "--channels", 4, "--batch-size", 2, "--epochs", 2)
    run("train_segmenter", tmp_path / "one.pth", *data, *options)
    for _ in range(2):
        run("train_segmenter", tmp_path / "two.pth", *data, *options, "--steps", 4)
    assert same_weights(tmp_path / "one.pth", tmp_path / "two.pth", "state_dict")
    assert '"miou"' in capsys.readouterr().out
    model = ssmcompress.load(tmp_path / "one.pth")
    assert (model.architecture, model.config.level) == ("vim_upernet", "residual")
    run("train_segmenter", tmp_path / "three.pth", *data, *options, "--start", tmp_path / "one.pth", "--steps", 1)
    assert not same_weights(tmp_path / "one.pth", tmp_path / "three.pth", "state_dict")
    write_objects(tmp_path / "o.parquet", 10, 112)
    objects = (tmp_path / "o.parquet", tmp_path / "o.parquet", "--d-model", 8, "--depth", 8, "--batch-size", 10)
    run("train_clutter", tmp_path / "vim.pth", *objects, "--epochs", 1)
    options_of_head = ("--channels", 4, "--batch-size", 2, "--epochs", 1, "--lr", 0, "--steps", 1)
    run("train_segmenter", tmp_path / "four.pth", *data, *options_of_head, "--backbone", tmp_path / "vim.pth")
    vim = torch.load(tmp_path / "vim.pth", weights_only=True)["model"]
    segmenter = torch.load(tmp_path / "four.pth", weights_only=True)["state_dict"]
    name = "layers.7.mixer.in_proj.weight"
    torch.testing.assert_close(segmenter[f"backbone.{name}"], vim[name], atol=1e-4, rtol=0)
    torch.testing.assert_close(segmenter["backbone.pos_embed"][:, 98], vim["pos_embed"][:, 99], atol=1e-4, rtol=0)
    with pytest.raises(SystemExit, match="was made with"):
        run("train_segmenter", tmp_path / "one.pth", *data, *options, "--seed", 3)


@pytest.mark.parametrize(
    ("architecture", "key", "width", "name"),
    [("vim", "model", 8, "vim"), ("plain_mamba", "state_dict", 8, "plain_mamba"), ("deit", "model", 16, "vit")],
)
def test_a_classifier_trained_in_pieces(run, tmp_path, architecture, key, width, name):
    write_idx(tmp_path, 60)
    options = ("--idx", tmp_path, "--architecture", architecture, "--d-model", width, "--depth", 2, "--batch-size", 30)
    run("train_fashion_mnist", tmp_path / "one.pth", *options, "--epochs", 2)
    for _ in range(2):
        run("train_fashion_mnist", tmp_path / "two.pth", *options, "--epochs", 2, "--steps", 2)
    assert same_weights(tmp_path / "one.pth", tmp_path / "two.pth", key)
    assert ssmcompress.load(tmp_path / "one.pth").architecture == name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_muon_changes_the_large_matrices_alone(run, tmp_path):
    """In pieces as well, and in a checkpoint that can be read as any other."""
    write_objects(tmp_path / "o.parquet", 40, 32)
    options = (tmp_path / "o.parquet", tmp_path / "o.parquet", "--d-model", 24, "--depth", 2, "--batch-size", 10)
    for name in ("adamw", "muon"):
        run("train_clutter", tmp_path / f"{name}.pth", *options, "--optimizer", name, "--epochs", 1, "--steps", 1)
    one, other = (ssmcompress.load(tmp_path / f"{name}.pth").state_dict() for name in ("adamw", "muon"))
    differ = {name.rpartition(".mixer.")[2] for name, value in one.items() if not torch.equal(value, other[name])}
    assert differ == {"in_proj.weight", "out_proj.weight"}
    continued = (*options, "--optimizer", "muon", "--epochs", 2)
    run("train_clutter", tmp_path / "one.pth", *continued)
    for _ in range(2):
        run("train_clutter", tmp_path / "two.pth", *continued, "--steps", 4)
    assert same_weights(tmp_path / "one.pth", tmp_path / "two.pth", "model")
    with pytest.raises(SystemExit, match="was made with"):
        run("train_clutter", tmp_path / "one.pth", *options, "--optimizer", "adamw", "--epochs", 3)


def test_a_run_that_goes_on_with_other_options_says_so(run, tmp_path, capsys):
    write_idx(tmp_path, 60)
    options = ("--idx", tmp_path, "--d-model", 8, "--depth", 2, "--batch-size", 30, "--steps", 1)
    run("train_fashion_mnist", tmp_path / "one.pth", *options, "--epochs", 2)
    run("train_fashion_mnist", tmp_path / "one.pth", *options, "--epochs", 2)
    assert "changed options" not in capsys.readouterr().out
    run("train_fashion_mnist", tmp_path / "one.pth", *options, "--epochs", 3, "--lr", 0.5)
    assert "resumed with changed options: epochs=3 (was 2), lr=0.5 (was" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "key", "width"), [("vim", "model", 8), ("plain_mamba", "state_dict", 8), ("deit", "model", 16)]
)
def test_a_classifier_of_clutter_begun_on_small_images(run, tmp_path, architecture, key, width):
    options = ("--architecture", architecture, "--d-model", width, "--depth", 2, "--batch-size", 10)
    small, large = tmp_path / "small.parquet", tmp_path / "large.parquet"
    write_objects(small, 20, 32)
    write_objects(large, 20, 48)
    patches = () if architecture == "plain_mamba" else ("--patch-loss", 0.5)
    run("train_clutter", tmp_path / "small.pth", small, small, *options, *patches, "--epochs", 1)
    continued = (large, large, *options, "--epochs", 2, "--start", tmp_path / "small.pth")
    run("train_clutter", tmp_path / "one.pth", *continued)
    for _ in range(2):
        run("train_clutter", tmp_path / "two.pth", *continued, "--steps", 2)
    assert same_weights(tmp_path / "one.pth", tmp_path / "two.pth", key)
    assert ssmcompress.load(tmp_path / "one.pth").config.image_size == (48, 48)
    run("train_clutter", tmp_path / "three.pth", *continued, "--lr", 0, "--steps", 1)  # still the weights of the start
    start = ssmcompress.load(tmp_path / "small.pth", image_size=48).state_dict()
    if patches:
        run("train_clutter", tmp_path / "plain.pth", small, small, *options, "--epochs", 1)
        assert not same_weights(tmp_path / "small.pth", tmp_path / "plain.pth", key)
    run("train_clutter", tmp_path / "taught.pth", *continued, "--teacher", tmp_path / "two.pth", tmp_path / "one.pth")
    assert not same_weights(tmp_path / "one.pth", tmp_path / "taught.pth", key)
    predictions = torch.load(tmp_path / "two-on-large.pt", weights_only=True)
    torch.testing.assert_close(predictions.sum(1), torch.ones(20))
    kept = torch.load(tmp_path / "three.pth", weights_only=True)[key]
    names = [name for name in start if "running" not in name and "tracked" not in name]
    assert all(torch.allclose(kept[name], start[name], atol=1e-3) for name in names)


def test_targets_of_a_teacher(run):
    from train_clutter import make_targets

    labels, logits = torch.tensor([1, 0, 2]), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, make_targets(labels, 0.1, classes=3)), smoothed)
    predictions = torch.tensor([[0.0, 1.0, 0.0]] * 3)
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(make_targets(labels, 0.0, [predictions], classes=3), expected)
    two = [predictions, torch.tensor([[0.0, 0.0, 1.0]] * 3)]
    expected = torch.tensor([[0.0, 0.75, 0.25], [0.5, 0.25, 0.25], [0.0, 0.25, 0.75]])
    torch.testing.assert_close(make_targets(labels, 0.0, two, classes=3), expected)


def test_masks_of_clutter(run, tmp_path, monkeypatch):
    """They are those of the images of the same seed and number, and other images are refused."""
    make_clutter, train_clutter = (importlib.import_module(name) for name in ("make_clutter", "train_clutter"))
    grey = [PIL.Image.new("RGB", (300, 200), (90, 90, 90))]
    monkeypatch.setattr(make_clutter, "load_photographs", lambda split: iter(grey))
    write_idx(tmp_path, 30)
    options = ("--images", 12, "--idx", tmp_path, "--seed", 5)
    run("make_clutter", "classification", "train", tmp_path / "images.parquet", *options)
    run("make_clutter", "masks", "train", tmp_path / "masks.npz", *options)
    images, labels = train_clutter.load(tmp_path / "images.parquet")
    masks = train_clutter.unpack(train_clutter.read_masks(tmp_path / "masks.npz", labels, 112))
    assert masks.shape == (12, 1, 112, 112)
    clutter = make_clutter.Clutter("train", tmp_path, 5)
    for number in range(12):
        picture, label, shown = clutter.draw_object(number)
        assert label == labels[number]
        np.testing.assert_array_equal(masks[number, 0], shown == 2)
        assert (images[number].permute(1, 2, 0) - torch.tensor(np.asarray(picture)).int()).abs().float().mean() < 10
    for wrong in ((labels[:11], 112), ((labels + 1) % 10, 112), (labels, 80)):
        with pytest.raises(SystemExit, match="does not belong to these images"):
            train_clutter.read_masks(tmp_path / "masks.npz", *wrong)
    options = ("--architecture", "deit", "--d-model", 16, "--depth", 2, "--batch-size", 6, "--epochs", 1)
    files = (tmp_path / "images.parquet", tmp_path / "images.parquet", *options, "--patch-loss", 1)
    run("train_clutter", tmp_path / "one.pth", *files, "--masks", tmp_path / "masks.npz")
    run("train_clutter", tmp_path / "two.pth", *files)
    assert not same_weights(tmp_path / "one.pth", tmp_path / "two.pth", "model")
    with pytest.raises(SystemExit):
        run("train_clutter", tmp_path / "three.pth", *files[:-2], "--masks", tmp_path / "masks.npz")
    with pytest.raises(SystemExit):
        run("make_clutter", "masks", "train", tmp_path / "other.npz", "--side", 84)


def test_masks_are_moved_with_their_images(run):
    from train_clutter import move

    images = torch.randint(0, 256, (16, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    moved, masks = move(images, images[:, :1].clone(), torch.Generator().manual_seed(1))
    assert not torch.equal(moved, images)
    torch.testing.assert_close(masks, moved[:, :1], rtol=0, atol=0)
    alone, none = move(images, None, torch.Generator().manual_seed(1))
    assert none is None
    torch.testing.assert_close(alone, moved, rtol=0, atol=0)


def test_targets_of_patches(run):
    """The class of the object, weighted by its share of a patch; the rest is uniform over the classes."""
    from train_clutter import make_patch_targets

    masks = torch.zeros(1, 1, 4, 6)
    masks[0, 0, :2, :2] = 1  # the first patch, and half of the last
    masks[0, 0, 2:, 4] = 1
    targets = make_patch_targets(torch.tensor([[0.9, 0.1]]), masks, patch=2)
    nothing = [0.5, 0.5]
    expected = [[0.9, 0.1], nothing, nothing, nothing, nothing, [0.7, 0.3]]
    torch.testing.assert_close(targets, torch.tensor([expected]))
