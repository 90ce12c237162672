"""Statements about a model that cannot be inferred from its weights: training arguments, a configuration, a file name,
or attributes of a live module.

Models whose weights have the same names and shapes can compute different functions: a Vim with its class token in
front, one without the division by two, a VideoMamba. Every source that tells them apart must therefore be read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..progress import note
from .activation_names import name_activation
from .config_texts import (
    ABOUT_OTHERS,
    ASSUMED,
    GENERAL,
    LARGEST_NUMBER,
    MODEL_NAMES,
    NORMALISATIONS,
    PARTS,
    is_number,
    read_text,
)
from .families import FAMILY_NAMES

# Keys of checkpoint entries, and of dictionaries in them, that describe the model.
DESCRIPTIONS = ("model", "model_args", "model_config", "model_kwargs", "args", "config", "cfg", "hyper_parameters",
                "hparams", "opt", "options", "meta", "params", "kwargs", "init_args", "net", "network", "backbone",
                "encoder", "student", "pretrained_cfg")  # fmt: skip
# Spellings in the published code, those of the Hugging Face hub, and the arguments of VMamba's class.
SPELLINGS = {
    "if_devide_out": "if_divide_out",
    "image_mean": "mean",
    "image_std": "std",
    "eval_crop_ratio": "crop_pct",  # in DeiT's code and what derives from it
    "forward_type": "SSM_FORWARDTYPE",
    "ssm_act_layer": "SSM_ACT_LAYER",
    "mlp_act_layer": "MLP_ACT_LAYER",
    "posembed": "POSEMBED",
    "gmlp": "GMLP",
}
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
# Option in the section "DATA" of yacs configurations that also describes the model.
IMAGE_SIZE = "IMG_SIZE"
DEPTH = 4
FILE_NAME = "the name of the file"
GIVEN_NAME = "`architecture`"  # the argument of `load`


class Statement(NamedTuple):
    """A value and the place where it was found, such as "args.model 'vim_tiny'"."""

    value: Any
    where: str


@dataclass
class Statements:
    """All statements about a model.

    Attributes:
        options: option of the published code -> statement.
        family: the stated architecture, an entry of `FAMILY_NAMES`, or None.
        names: names of the model, as stated.
        wrapped: whether the weights are an entry of a checkpoint or of a wrapper, not a bare state dict.
        writer: the tool that wrote the file, for messages; None if unknown.
        normalisation: (mean, std) from an OpenMMLab configuration, each a tuple with one value per channel, on a 0..1
            scale.
        classes, palette: class names and colours (red, green, blue) as written by OpenMMLab tools, or None.
    """

    options: dict[str, Statement] = field(default_factory=dict)
    family: Statement | None = None
    names: list[Statement] = field(default_factory=list)
    wrapped: bool = False
    writer: str | None = None
    normalisation: Statement | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None

    def add_option(self, name: str, value: Any, where: str) -> None:
        """Add an option, unless there is already a statement about it."""
        self.options.setdefault(SPELLINGS.get(name, name), Statement(_plain(value), where))

    def add_name(self, name: str, where: str) -> None:
        """Add the statements in the name of a model: its architecture, and the options in names of hustvl's form."""
        self.names.append(Statement(name, where))
        if self.family is None and (family := family_of_name(name)) is not None:
            self.family = Statement(family, where)
        for option, value in options_of_name(name).items():
            self.add_option(option, value, where)

    def add_normalisation(self, values: Mapping[Any, Any], where: str) -> None:
        """Add the mean and std of an OpenMMLab configuration, if it has both; earlier ones take precedence.

        A note is shown if they cannot be used: they are not numbers, not on a 0..255 scale, or for BGR images.
        """
        if self.normalisation is not None or values.get("mean") is None or values.get("std") is None:
            return
        mean, std = (values[k] if isinstance(values[k], (list, tuple)) else [values[k]] for k in ("mean", "std"))
        if not all(is_number(v) and abs(v) <= LARGEST_NUMBER for v in (*mean, *std)):
            reason = "they are not lists of numbers"
        elif any(0 < v < 1 for v in std):
            reason = "expected those of values up to 255"
        elif values.get("to_rgb") is False or values.get("bgr_to_rgb") is False or values.get("rgb_to_bgr") is True:
            reason = "they are of images in BGR order, which are not supported"
        else:
            # 12 digits, so that 123.675 / 255 is 0.485.
            scaled = (tuple(float(f"{v / 255:.12g}") for v in part) for part in (mean, std))
            self.normalisation = Statement(tuple(scaled), where)
            return
        note(f"mean and std of {where} are not used: {reason}")

    def set_family(self, family: str, where: str) -> None:
        """Set the architecture given by the caller, overriding the file name."""
        if self.family is None or self.family.where == FILE_NAME:
            self.family = Statement(family, where)
        self.options = {name: option for name, option in self.options.items() if option.where != FILE_NAME}

    def add_config(self, config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
        """Add the fields `names`, which cannot be inferred from weights, of a configuration of this package."""
        for name in names:
            if name in config:
                value = config[name]
                self.options[name] = Statement(tuple(value) if isinstance(value, list) else value, where)

    def number(self, *names: str) -> Statement | None:
        """Return the first of these options that is a positive integer, or None."""
        found = [self.options[name] for name in names if name in self.options]
        return next(
            (o for o in found if isinstance(o.value, int) and not isinstance(o.value, bool) and o.value > 0), None
        )

    def size(self, *names: str) -> Statement | None:
        """Return the first of these options that is a size, as (height, width): one or two positive integers."""
        for name in names:
            if (side := self.number(name)) is not None:
                return Statement((side.value, side.value), side.where)
            option = self.options.get(name)
            sides = option.value if option is not None else None
            if isinstance(sides, tuple) and len(sides) == 2 and all(type(s) is int and s > 0 for s in sides):
                return option
        return None


def family_of_name(name: str) -> str | None:
    """Return the architecture in the name of a model or file; None if there is none or several."""
    name, found = name.lower(), []
    for key, _, pattern in FAMILY_NAMES:
        name, count = re.subn(pattern, " ", name)  # as in local_vim, whose "vim" must not count
        found += [key] if count else []
    return found[0] if len(found) == 1 else None


def options_of_name(name: str) -> dict[str, Any]:
    """Return the options in a model name of hustvl's form, `vim_tiny_patch16_224_bimambav2_..._with_midclstok_div2`.

    In a full name, absent parts are also statements: without `div2` the sum of both scans is not divided, and without a
    class token in the name the model has none.
    """
    name = name.lower()
    options: dict[str, Any] = {}
    if stride := re.search(r"stride(\d{1,3})(?!\d)", name):
        options["stride"] = int(stride.group(1))
    if scans := re.search(r"bimamba_?(v\d+|none)", name):
        options["bimamba_type"] = scans.group(1)
    if pool := re.search(r"final_pool_([a-z]+)", name):
        options["final_pool_type"] = pool.group(1)
    if re.search(r"(?<![a-z])(?<!no_)rope(?![a-z])", name):
        options["if_rope"] = True
    is_full = scans is not None and "abs_pos_embed" in name
    token = r"(?:cls|class)_?tok(?:en)?(?![a-z])"
    if re.search(rf"mid(?:dle)?_?{token}", name):
        options |= {"if_cls_token": True, "use_middle_cls_token": True}
    elif re.search(rf"(?:double|two|2)_?{token}", name):
        options["use_double_cls_token"] = True
    elif re.search(rf"(?:no|without|wo)_?{token}", name):
        options["if_cls_token"] = False
    elif re.search(token, name):
        options |= {"if_cls_token": True, "use_middle_cls_token": False}
    elif is_full:
        options["if_cls_token"] = False
    if is_full:
        options["if_divide_out"] = re.search(r"div_?2|d[ei]vide", name) is not None
    return options


def read_statements(content: Any, file: Path | None = None) -> Statements:
    """Read the statements about a model in the content of a checkpoint and in its file name.

    Args:
        content: an unpickled checkpoint, or the JSON value of a configuration.
        file: the file, if there is one.
    """
    said = Statements()
    if isinstance(content, nn.Module):
        _read_module(content, said)
    if isinstance(content, Mapping):
        said.wrapped = "n_averaged" in content or not all(isinstance(value, Tensor) for value in content.values())
        said.writer = _find_writer(content)
        said.classes, said.palette = read_classes(content)
        _read_description(content, "", said)
    if file is not None:
        said.add_name(file.name, FILE_NAME)
    return said


def read_module(module: nn.Module) -> Statements:
    """Read the statements in the attributes of a live module."""
    said = Statements(wrapped=True)
    _read_module(module, said)
    return said


def read_config(config: Mapping[str, Any]) -> Statements:
    """Read the statements in a configuration next to the weights, as in a folder of the Hugging Face Hub."""
    said = Statements(wrapped=True)
    _read_description(config, "config.json", said)
    return said


def _read_description(
    values: Mapping[Any, Any], where: str, said: Statements, depth: int = 0, known: bool = True
) -> None:
    """Add the statements in a checkpoint, its arguments or its configuration, including nested dictionaries.

    Args:
        where: the location for messages, "" for the whole checkpoint. depth: its nesting depth.
        known: whether it is known to describe the model; if not, only unambiguous options are read.
    """
    if depth > DEPTH:
        return
    names = [name for name in values if isinstance(name, str)]
    for name in sorted(names, key=lambda name: MODEL_NAMES.index(name) if name in MODEL_NAMES else len(MODEL_NAMES)):
        entry, place = values[name], f"{where}.{name}" if where else name
        if isinstance(entry, nn.Module):
            _read_module(entry, said)
        elif isinstance(entry, Tensor) or (not known and name in GENERAL):
            continue
        elif where and name in NORMALISATIONS and isinstance(entry, Mapping):
            said.add_normalisation(entry, place)
        elif name in DESCRIPTIONS and (described := _to_mapping(entry, name, place)) is not None:
            _read_description(described, place, said, depth + 1)
        elif isinstance(entry, (Mapping, argparse.Namespace)):
            # Unknown entries of a checkpoint hold weights or optimiser state.
            is_part = known and name in PARTS and "backbone" in values
            if known and name == "DATA" and isinstance(entry, Mapping) and IMAGE_SIZE in entry:
                _read_value(IMAGE_SIZE, entry[IMAGE_SIZE], f"{place}.{IMAGE_SIZE}", said)
            if where and (is_part or not ABOUT_OTHERS.search(name.lower())):
                _read_description(_to_mapping(entry, name, place) or {}, place, said, depth + 1, known=False)
        else:
            _read_value(name, entry, place, said)


def _to_mapping(value: Any, name: str, where: str) -> Mapping[Any, Any] | None:
    """Convert arguments or a configuration, also as text or a command line, to a mapping; None for other values."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        given = [part.lstrip("-").replace("-", "_").partition("=") for part in value]
        following = [*value[1:], ""]
        options = zip(value, given, following, strict=True)
        return {key: text or after for part, (key, _, text), after in options if part.startswith("--")} or None
    if isinstance(value, str) and ("\n" in value or value.lstrip().startswith("{") or ": " in value or "=" in value):
        try:
            return read_text(value, where)
        except ValueError as error:
            if name not in MODEL_NAMES:  # these may be any text
                note(f"the configuration in {where} could not be read: {error}; {ASSUMED}")
            return None
    return value if isinstance(value, Mapping) else None


def _read_value(name: str, value: Any, place: str, said: Statements) -> None:
    if name in MODEL_NAMES:
        for text in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(text, str):
                said.add_name(text, f"{place} {text[:200]!r}")
    elif isinstance(value, (bool, int, float, str)):
        said.add_option(name, value, place)
    elif isinstance(value, (list, tuple)) and all(isinstance(part, (int, float)) for part in value):
        said.add_option(name, tuple(value), place)


def _read_module(module: nn.Module, said: Statements) -> None:
    """Add the options that the published code stores as attributes of the model, its first mixer and its norms."""
    module = next((inner for inner in module.modules() if _first_mixer(inner) is not None), module)
    kind, mixer = type(module), _first_mixer(module)
    if "videomamba" in kind.__module__.lower() or (hasattr(mixer, "bimamba") and not hasattr(mixer, "bimamba_type")):
        said.family = said.family or Statement("video_mamba", f"its class {kind.__module__}.{kind.__qualname__}")
    # Split the class name into words at capital letters.
    said.add_name(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__qualname__), f"its class {kind.__qualname__}")
    for part, where in ((module, "its attribute"), (mixer, "its mixers' attribute")):
        for option, value in vars(part).items() if isinstance(part, nn.Module) else ():
            if not option.startswith("_") and isinstance(value, (bool, int, float, str)):
                said.add_option(option, value, f"{where} {option}")
    projection = getattr(getattr(module, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d):
        said.add_option("stride", projection.stride[0], "the stride of its patch_embed.proj")
    _read_vit(module, said)
    if mixer is None:
        return
    epsilon = getattr(getattr(module.layers[0], "norm", None), "eps", None)
    if isinstance(epsilon, float):
        said.add_option("norm_epsilon", epsilon, "its norms' attribute eps")
    if "if_cls_token" in said.options and "use_middle_cls_token" not in said.options:
        said.add_option("use_middle_cls_token", False, "a model without the attribute use_middle_cls_token")
    if hasattr(mixer, "bimamba_type") and "if_divide_out" not in said.options:
        said.add_option("if_divide_out", False, "a mixer without the attribute if_divide_out")


def _read_vit(module: nn.Module, said: Statements) -> None:
    """Add the options of a live ViT that its weights do not show, and the preprocessing of a model of timm."""
    prepared = getattr(module, "pretrained_cfg", None)
    for name in PREPROCESSING if isinstance(prepared, Mapping) else ():
        _read_value(name, prepared.get(name), f"its attribute pretrained_cfg.{name}", said)
    blocks = module._modules.get("blocks")
    block = blocks[0] if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks) else None
    heads = getattr(getattr(block, "attn", None), "num_heads", None)
    if not isinstance(heads, int):
        return
    said.add_option("num_heads", heads, "its attention's attribute num_heads")
    epsilon = getattr(getattr(block, "norm1", None), "eps", None)
    if isinstance(epsilon, float):
        said.add_option("epsilon", epsilon, "its norms' attribute eps")
    activation = getattr(getattr(block, "mlp", None), "act", None)
    if isinstance(activation, nn.Module):
        name = name_activation(activation) or type(activation).__name__
        said.add_option("activation", name, "its layers' attribute mlp.act")


def _first_mixer(module: nn.Module) -> nn.Module | None:
    """Return the mixer of the first layer of a Vim or a VideoMamba; None for any other module."""
    layers = module._modules.get("layers")  # not getattr, which a compiled module forwards to the original module
    return getattr(layers[0], "mixer", None) if isinstance(layers, nn.ModuleList) and len(layers) else None


def _find_writer(content: Mapping[Any, Any]) -> str | None:
    """Return the tool that wrote a checkpoint, with its version, if the entries identify it."""
    meta = content.get("meta")
    if isinstance(meta, Mapping):
        for tool in ("mmseg", "mmcls", "mmpretrain", "mmdet", "mmengine", "mmcv"):
            if isinstance(version := meta.get(f"{tool}_version"), str):
                return f"{tool} {version[:40]}"
    if isinstance(version := content.get("pytorch-lightning_version"), str):
        return f"PyTorch Lightning {version[:40]}"
    if "ds_version" in content or "ds_config" in content:
        return f"DeepSpeed {str(content.get('ds_version', ''))[:40]}".strip()
    if "n_averaged" in content:
        return "torch.optim.swa_utils"
    if "arch" in content and "state_dict" in content:
        return "timm's training script" if "metric" in content or "version" in content else "a training script"
    if "args" in content or "optimizer" in content:
        return "a training script"
    return None


def read_classes(content: Mapping[Any, Any]) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None]:
    """Return the class names and their colours in a configuration, each None if missing.

    It is a configuration of this package, or a checkpoint with the `meta` of mmcv or mmengine.
    """
    meta = content.get("meta")
    values: dict[str, Any] = {}
    for source in (content, meta, meta.get("dataset_meta") if isinstance(meta, Mapping) else None):
        if isinstance(source, Mapping):
            values |= {key.lower(): value for key, value in source.items() if isinstance(key, str)}
    classes, palette = values.get("classes"), values.get("palette")
    if not (isinstance(classes, (list, tuple)) and classes and all(isinstance(name, str) for name in classes)):
        return None, None
    valid = isinstance(palette, (list, tuple)) and len(palette) == len(classes) and all(map(_is_colour, palette))
    return tuple(classes), tuple(map(tuple, palette)) if valid else None


def _is_colour(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value)


def _plain(value: Any) -> Any:
    """Parse text from a YAML file or a command line: True for "true", None for "None", 1e-5 for "1e-5".

    The lower-case word "none" stays a string: it is a value of options in the published code.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in (words := {"true": True, "false": False, "null": None}):
        return words[text]
    if value.strip() == "None":
        return None
    try:
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    except ValueError:
        return value
