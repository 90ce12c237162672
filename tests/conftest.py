"""Small models and images that the tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# One thread for each test process (pytest-xdist) and for the processes that it starts: a second thread only costs time
# for such small models.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import ssmcompress
from ssmcompress.models import TokenModel
from ssmcompress.models.plain_mamba import PlainMamba, PlainMambaConfig
from ssmcompress.models.video_mamba import VideoMamba
from ssmcompress.models.vim import VisionMamba
from ssmcompress.models.vit import VisionTransformer
from ssmcompress.models.vit_block import ViTConfig
from ssmcompress.models.vmamba import VMamba, VMambaConfig

GOLDEN = Path(__file__).parent / "golden"
BUNDLED = Path(ssmcompress.__file__).parent / "assets" / "vim-fashion-mnist"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, collect only files with GPU tests: a GPU machine may lack dependencies of the others."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "gpu" not in collection_path.read_text().lower() or None
    return None


# Tests that take 15 s or more run first, so that no worker ends up with one of them at the end.
LONGEST = (
    "test_kernels_in_the_interpreter",
    "test_commands_run_where_a_page_begins_with_the_three_lines",
    "test_hostile_inputs_are_refused_or_read_right",
    "test_kernels_fit_the_registers",
    "test_the_three_lines_in_an_empty_folder",
    "test_demo",
    "test_two_processes_do_what_one_does",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.name.partition("[")[0] not in LONGEST)


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    """Disable TF32, as the commands do on a GPU, where torch would round convolution inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_vim(depth=4, d_model=16, image=(16, 16), patch=4, channels=3, seed=0, **others) -> VisionMamba:
    """A Vim with random weights, spread widely enough that tokens differ in importance.

    Args:
        others: `classes`, `stride`, `d_state`; `kind`, the class of a relative, and fields of its configuration.
    """
    kind = others.pop("kind", VisionMamba)
    stride, d_state, classes = (others.pop(k, v) for k, v in (("stride", None), ("d_state", 4), ("classes", 10)))
    config = kind.config_class(
        d_model=d_model,
        depth=depth,
        d_inner=2 * d_model,
        d_state=d_state,
        dt_rank=-(-d_model // 16),
        d_conv=4,
        in_chans=channels,
        num_classes=classes,
        patch_size=(patch, patch),
        stride=stride or patch,
        image_size=image,
        **others,
    )
    generator = torch.Generator().manual_seed(seed)
    model = kind(config)
    for name, value in model.state_dict().items():
        if not name.endswith(("norm.weight", "norm_f.weight", "_log", "D", "D_b")):
            value.normal_(0, 0.3, generator=generator)
    return ssmcompress.load(model, image_size=image)


def make_video_mamba(**sizes) -> VideoMamba:
    """A VideoMamba with random weights, as `make_vim` makes a Vim; `frames` makes one for videos."""
    return make_vim(kind=VideoMamba, **sizes)


def make_plain_mamba(depth=4, d_model=16, image=(64, 64), channels=3, seed=0, **others) -> PlainMamba:
    """A PlainMamba with random weights, and a stem of 8 channels where the published ones have 64.

    Args:
        others: `classes`, `d_state`, `window`, `dw_layers`, `stem_depth`.
    """
    defaults = {"classes": 10, "d_state": 4, "window": 5, "dw_layers": (), "stem_depth": 1}
    assert others.keys() <= defaults.keys(), others
    classes, d_state, window, dw_layers, stem_depth = (defaults | others).values()
    config = PlainMambaConfig(
        d_model=d_model,
        depth=depth,
        d_inner=2 * d_model,
        d_state=d_state,
        dt_rank=-(-d_model // 16),
        window=window,
        dw_layers=dw_layers,
        dw_window=3 if dw_layers else 0,
        stem_width=8,
        stem_depth=stem_depth,
        stem_window=7,
        in_chans=channels,
        num_classes=classes,
        patch_size=16,
        stride=16,
        image_size=image,
    )
    generator = torch.Generator().manual_seed(seed)
    model = PlainMamba(config)
    for name, value in model.state_dict().items():
        if not name.endswith(("norm.weight", "ln1.weight", "_log", "D", "running_var", "batches_tracked")):
            value.normal_(0, 0.3, generator=generator)
    return ssmcompress.load(model, image_size=image)


def make_vit(depth=4, d_model=24, heads=3, image=(16, 16), patch=4, channels=3, seed=0, **others) -> VisionTransformer:
    """A ViT with random weights, spread as in `make_vim`.

    Args:
        others: `classes`, and fields of `ViTConfig`.
    """
    config = ViTConfig(
        d_model=d_model,
        depth=depth,
        num_heads=heads,
        mlp_dim=2 * d_model,
        in_chans=channels,
        num_classes=others.pop("classes", 10),
        patch_size=(patch, patch),
        stride=patch,
        image_size=image,
        **others,
    )
    generator = torch.Generator().manual_seed(seed)
    model = VisionTransformer(config)
    for name, value in model.state_dict().items():
        if "norm" not in name and not name.endswith("gamma"):
            value.normal_(0, 0.3, generator=generator)
        elif name.endswith("gamma"):
            value.uniform_(0.2, 1, generator=generator)
    return ssmcompress.load(model, image_size=image)


def make_vmamba(depths=(1, 2, 3, 1), width=8, image=(64, 48), channels=3, seed=0, **others) -> VMamba:
    """A VMamba with random weights, spread as in `make_vim`; `width` is the width of its first section.

    Args:
        others: `classes`, `ratio` (of the inner width to that of the tokens) and fields of `VMambaConfig`.
    """
    widths = tuple(width * 2**section for section in range(len(depths)))
    ratio = others.pop("ratio", 2)
    sizes = {
        "d_inner": tuple(ratio * width for width in widths),
        "dt_rank": tuple(-(-width // 16) for width in widths),
        "mlp_dim": tuple(2 * width for width in widths),
        "d_state": 1,
        "stem_width": width // 2,
        "window": 3,
        "num_classes": others.pop("classes", 10),
    }
    sizes |= others
    config = VMambaConfig(widths=widths, depths=depths, in_chans=channels, stride=4, image_size=image, **sizes)
    generator = torch.Generator().manual_seed(seed)
    model = VMamba(config)
    for name, value in model.state_dict().items():
        if "norm" in name or ".3." in name or name.endswith(("A_logs", "Ds", "patch_embed.2.weight")):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        else:
            value.normal_(0, 0.3, generator=generator)
    return ssmcompress.load(model, image_size=image)


@pytest.fixture
def vim() -> VisionMamba:
    return make_vim()


@pytest.fixture
def video_mamba() -> VideoMamba:
    """One for videos of four frames."""
    return make_video_mamba(frames=4, image=(8, 8))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plain_mamba() -> PlainMamba:
    return make_plain_mamba()


@pytest.fixture(params=["vim", "plain_mamba"])
def model(request) -> TokenModel:
    """One model of each architecture; `images_of` creates its inputs."""
    return request.getfixturevalue(request.param)


def images_of(model: TokenModel, count=5, seed=1) -> torch.Tensor:
    return torch.randn(count, *model.input_shape, generator=torch.Generator().manual_seed(seed))


def write_checkpoint(folder: Path, depth: int = 4) -> Path:
    import argparse

    path, state = folder / "model.pt", make_vim(depth).state_dict()
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(model="vim", lr=1e-3)}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A training checkpoint as hustvl's code writes it."""
    return write_checkpoint(tmp_path)


def select_bundled_images(count: int, file: Path) -> Path:
    """Write a table of the first of the 2,000 images that come with the package."""
    from datasets import Dataset

    table = Dataset.from_parquet(str(BUNDLED / "images.parquet"), cache_dir=str(file.parent / "cache"))
    table.select(range(count)).to_parquet(file)
    return file


def write_image(path: Path, seed: int, size=(16, 16), mode="RGB") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


def write_class_folders(folder: Path) -> Path:
    root = folder / "images"
    for label in range(10):
        for i in range(2):
            write_image(root / f"class{label}" / f"{i}.png", seed=10 * label + i)
    return root


@pytest.fixture
def class_folders(tmp_path) -> Path:
    """Ten classes of two images each."""
    return write_class_folders(tmp_path)


@pytest.fixture
def in_an_empty_folder(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


def check_damage_is_refused(model: TokenModel, folder: Path, change, message: str) -> None:
    """Check that a saved model is refused with `message` after `change` of its tensors, in place."""
    from safetensors.torch import load_file, save_file

    import ssmcompress
    from ssmcompress.errors import InputError

    file = ssmcompress.save(model, folder) / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file({name: value.clone() for name, value in state.items()}, file)
    with pytest.raises(InputError, match=message):
        ssmcompress.load(folder)


@pytest.fixture(scope="session")
def pruned_once(tmp_path_factory) -> Path:
    """A folder with a checkpoint, images, and the result of `prune` in `pruned`."""
    from command_line import call

    root = tmp_path_factory.mktemp("once")
    checkpoint, images = write_checkpoint(root), write_class_folders(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call("prune", checkpoint, "--ratio", "0.5", "--data", images, "--no-latency", "-o", "pruned")
    return root


@pytest.fixture
def pruned_folder(pruned_once, checkpoint, class_folders, tmp_path) -> Path:
    """A folder written by `prune`, in the working folder: a copy with the paths of this test, as 80 tests use it."""
    folder = Path(shutil.copytree(pruned_once / "pruned", "pruned"))
    old, new = (str(root).encode() for root in (pruned_once, tmp_path))
    for name in ("config.json", "report.json", "README.md"):
        file = folder / name
        file.write_bytes(file.read_bytes().replace(old, new))
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].replace(old, new)
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    return folder
