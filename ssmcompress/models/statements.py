"""Statements about a model that its weights do not show: in a training run's arguments, a configuration, a file name,
or the attributes of a live module.

Two models can have weights with the same names and shapes and compute different things: a Vim with its class token
in front, one without the division by two, a VideoMamba. Whatever says which one it is must therefore be read.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .families import FAMILY_NAMES

# Entries of a checkpoint that describe its model.
DESCRIPTIONS = ("args", "config", "cfg", "hyper_parameters", "hparams", "model_args", "model_config", "model_kwargs",
                "opt", "options", "meta")  # fmt: skip
# Names under which a description has the name of its model.
MODEL_NAMES = ("model", "arch", "architecture", "architectures", "model_name", "model_type", "backbone", "encoder",
               "name", "type")  # fmt: skip
# The division by two has two spellings in the published code.
SPELLINGS = {"if_devide_out": "if_divide_out"}
DEPTH = 4
FILE_NAME = "the name of the file"


class Statement(NamedTuple):
    """A value, and where it was found: "args.model 'vim_tiny'"."""

    value: Any
    where: str


@dataclass
class Statements:
    """What is said about a model.

    Attributes:
        options: option of the published code -> statement.
        family: the architecture that is named, an entry of `FAMILY_NAMES`, or None.
        wrapped: whether the weights are an entry of a checkpoint or of a wrapper, not a bare state dict.
        writer: the tool that wrote the file, for messages; None if nothing names it.
    """

    options: dict[str, Statement] = field(default_factory=dict)
    family: Statement | None = None
    wrapped: bool = False
    writer: str | None = None

    def add_option(self, name: str, value: Any, where: str) -> None:
        """Add an option; the first statement about it remains."""
        self.options.setdefault(SPELLINGS.get(name, name), Statement(_plain(value), where))

    def add_name(self, name: str, where: str) -> None:
        """Add what the name of a model says: its architecture, and options in the form of hustvl's names."""
        if self.family is None and (family := family_of_name(name)) is not None:
            self.family = Statement(family, where)
        for option, value in options_of_name(name).items():
            self.add_option(option, value, where)

    def set_family(self, family: str, where: str) -> None:
        """Set the architecture that the caller gives; only the name of a file counts for less."""
        if self.family is None or self.family.where == FILE_NAME:
            self.family = Statement(family, where)

    def number(self, *names: str) -> int | None:
        """Return the first of these options that is a positive whole number, or None."""
        values = [self.options[name].value for name in names if name in self.options]
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def family_of_name(name: str) -> str | None:
    """Return the architecture that the name of a model or of a file contains, or None."""
    return next((key for key, _, pattern in FAMILY_NAMES if re.search(pattern, name.lower())), None)


def options_of_name(name: str) -> dict[str, Any]:
    """Return the options in a model name of hustvl's form, `vim_tiny_patch16_224_bimambav2_..._with_midclstok_div2`.

    In these names what is left out is said, too: without `div2` the sum of both scans is not divided, and without a
    class token at the end there is none.
    """
    name = name.lower()
    options: dict[str, Any] = {}
    if stride := re.search(r"stride(\d{1,3})(?!\d)", name):
        options["stride"] = int(stride.group(1))
    if scans := re.search(r"bimamba_?(v\d+|none)", name):
        options["bimamba_type"] = scans.group(1)
    if pool := re.search(r"final_pool_([a-z]+)", name):
        options["final_pool_type"] = pool.group(1)
    if re.search(r"(?<!no_)rope", name):
        options["if_rope"] = True
    token = r"(?:cls|class)_?(?:tok|token)?(?![a-z])"
    mentioned = re.search(rf"(?:^|_)(?:[a-z]+_?)??{token}", name)
    if not mentioned and "abs_pos_embed" not in name:
        return options
    if re.search(rf"mid(?:dle)?_?{token}", name):
        options |= {"if_cls_token": True, "use_middle_cls_token": True}
    elif re.search(rf"(?:double|two|2)_?{token}", name):
        options["use_double_cls_token"] = True
    elif re.search(rf"(?:no|without|wo)_?{token}", name) or not mentioned:
        options["if_cls_token"] = False
    else:
        options |= {"if_cls_token": True, "use_middle_cls_token": False}
    options["if_divide_out"] = re.search(r"div_?2|d[ei]vide", name) is not None
    return options


def read_statements(content: Any, file: Path | None = None) -> Statements:
    """Read what the content of a checkpoint, and the name of its file, say about its model.

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
        for name in ("arch", "model_name", "architecture"):
            _read_value(name, content.get(name), f"its entry {name}", said)
        for name in DESCRIPTIONS:
            _read_description(content.get(name), name, said)
        for name in ("model", "net", "network", "module"):
            if isinstance(content.get(name), nn.Module):
                _read_module(content[name], said)
    if file is not None:
        said.add_name(file.name, FILE_NAME)
    return said


def read_module(module: nn.Module) -> Statements:
    """Read what the attributes of a live module say about it."""
    said = Statements(wrapped=True)
    _read_module(module, said)
    return said


def read_config(config: Mapping[str, Any]) -> Statements:
    """Read what a configuration next to the weights, as in a folder of the Hugging Face hub, says about its model."""
    said = Statements(wrapped=True)
    _read_description(config, "config.json", said)
    return said


def _read_description(value: Any, where: str, said: Statements, depth: int = 0) -> None:
    """Add the statements in arguments or a configuration, and in the dictionaries in it."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, str) and where.rpartition(".")[2] in ("config", "cfg"):
        value = dict(_read_python(value))
    if not isinstance(value, Mapping) or depth > DEPTH:
        return
    for name, entry in value.items():
        if not isinstance(name, str):
            continue
        place = f"{where}.{name}"
        if isinstance(entry, (Mapping, argparse.Namespace)) or (name in ("config", "cfg") and isinstance(entry, str)):
            _read_description(entry, place, said, depth + 1)
        else:
            _read_value(name, entry, place, said)


def _read_value(name: str, value: Any, place: str, said: Statements) -> None:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if name in MODEL_NAMES and isinstance(value, str):
        said.add_name(value, f"{place} {value!r}")
    elif isinstance(value, (bool, int, float, str)):
        said.add_option(name, value, place)


def _read_python(text: str) -> Iterator[tuple[str, Any]]:
    """Yield the named constants in the text of an mm configuration, of which nothing is executed."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant):
            yield node.arg, node.value.value


def _read_module(module: nn.Module, said: Statements) -> None:
    """Add the options that the published code keeps as attributes of the model, of its first mixer and its norms."""
    kind = type(module)
    layers = getattr(module, "layers", None)
    block = layers[0] if isinstance(layers, nn.ModuleList) and len(layers) else None
    mixer = getattr(block, "mixer", None)
    if "videomamba" in kind.__module__.lower() or (hasattr(mixer, "bimamba") and not hasattr(mixer, "bimamba_type")):
        said.family = Statement("video_mamba", f"its class {kind.__module__}.{kind.__qualname__}")
    # Words of a class name are told apart by their capitals.
    said.add_name(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__qualname__), f"its class {kind.__qualname__}")
    for part, where in ((module, "its attribute"), (mixer, "its mixers' attribute")):
        for option, value in vars(part).items() if isinstance(part, nn.Module) else ():
            if not option.startswith("_") and isinstance(value, (bool, int, float, str)):
                said.add_option(option, value, f"{where} {option}")
    epsilon = getattr(getattr(block, "norm", None), "eps", None)
    if isinstance(epsilon, float):
        said.add_option("norm_epsilon", epsilon, "its norms' attribute eps")
    if "if_cls_token" in said.options and "use_middle_cls_token" not in said.options:
        said.add_option("use_middle_cls_token", False, "a model without the attribute use_middle_cls_token")
    if hasattr(mixer, "bimamba_type") and "if_divide_out" not in said.options:
        said.add_option("if_divide_out", False, "a mixer without the attribute if_divide_out")


def _find_writer(content: Mapping[Any, Any]) -> str | None:
    """Return the tool that wrote a checkpoint, with its version, as far as the entries tell."""
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


def _plain(value: Any) -> Any:
    """Return True for "true", None for "none", and so on: what a YAML file or a command line has as text."""
    if not isinstance(value, str):
        return value
    return {"true": True, "false": False, "none": None, "null": None}.get(value.strip().lower(), value)
