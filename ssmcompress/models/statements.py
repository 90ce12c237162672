"""Statements about a model that its weights do not show: in a training run's arguments, a configuration, a file name,
or the attributes of a live module.

Two models can have weights with the same names and shapes and compute different things: a Vim with its class token
in front, one without the division by two, a VideoMamba. Whatever says which one it is must therefore be read.
"""

from __future__ import annotations

import argparse
import ast
import operator
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..progress import note
from .families import FAMILY_NAMES

# Entries of a checkpoint that describe its model, and dictionaries in them that do.
DESCRIPTIONS = ("model", "model_args", "model_config", "model_kwargs", "args", "config", "cfg", "hyper_parameters",
                "hparams", "opt", "options", "meta", "params", "kwargs", "init_args", "net", "network", "backbone",
                "encoder", "student", "pretrained_cfg")  # fmt: skip
# Dictionaries in a description that are about something else.
ABOUT_OTHERS = re.compile(r"teacher|distill|optim|sched|data|aug|loss|train|eval|val|test|head|neck")
# Of these not even the size of the images or their mean is read, which stand in the descriptions of the data.
TEACHERS = re.compile(r"teacher|distill")
# Parts of mm's models that count before all else in a configuration. Its other heads are for training only.
PARTS = ("backbone", "decode_head", "test_cfg")
# Where mm's configurations have mean and std, of values up to 255; the last one is a step of a pipeline.
NORMALISATIONS = ("data_preprocessor", "img_norm_cfg", "Normalize")
# Names under which a description has the name of its model, the most telling ones first.
MODEL_NAMES = ("model", "arch", "architecture", "architectures", "model_name", "model_type", "backbone", "encoder",
               "name", "type")  # fmt: skip
# Options that mean something else where a dictionary is not known to describe the model.
GENERAL = {*MODEL_NAMES, "stride", "patch_stride", "input_size", "img_size", "image_size", "mean", "std", "rms_norm"}
# Spellings in the published code, and those of the Hugging Face hub.
SPELLINGS = {"if_devide_out": "if_divide_out", "image_mean": "mean", "image_std": "std"}
DEPTH = 4
LONGEST_TEXT = 1 << 20  # characters of a configuration
DEEPEST_TEXT = 100  # dictionaries, lists and operations in one another, in a Python text
LARGEST_NUMBER = 1 << 63  # in the results of arithmetic
LONGEST_LIST = 4096  # numbers in a list that a text multiplies, and
LARGEST_LISTS = 1 << 16  # entries of all of these lists, and of the dictionaries that are copied into others
OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip
ASSUMED = "what the weights do not show is assumed"
UNREAD = object()  # in place of what a Python text has to compute
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
        normalisation: (mean, std), each a tuple with one value a channel, on a 0..1 scale, by a configuration of mm's.
        classes, palette: names of the classes and their colours (red, green, blue), as mm's tools write them, or None.
    """

    options: dict[str, Statement] = field(default_factory=dict)
    family: Statement | None = None
    wrapped: bool = False
    writer: str | None = None
    normalisation: Statement | None = None
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None

    def add_option(self, name: str, value: Any, where: str) -> None:
        """Add an option; the first statement about it remains."""
        self.options.setdefault(SPELLINGS.get(name, name), Statement(_plain(value), where))

    def add_name(self, name: str, where: str) -> None:
        """Add what the name of a model says: its architecture, and options in the form of hustvl's names."""
        if self.family is None and (family := family_of_name(name)) is not None:
            self.family = Statement(family, where)
        for option, value in options_of_name(name).items():
            self.add_option(option, value, where)

    def add_normalisation(self, values: Mapping[Any, Any], where: str) -> None:
        """Add the mean and std of a configuration of mm's, if it has both; the first ones remain.

        Those that cannot be used are noted: they are no numbers, not of values up to 255, or of images in BGR order.
        """
        if self.normalisation is not None or values.get("mean") is None or values.get("std") is None:
            return
        mean, std = (values[k] if isinstance(values[k], (list, tuple)) else [values[k]] for k in ("mean", "std"))
        if not all(_is_number(v) and abs(v) <= LARGEST_NUMBER for v in (*mean, *std)):
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
        """Set the architecture that the caller gives, in place of what the name of the file says."""
        if self.family is None or self.family.where == FILE_NAME:
            self.family = Statement(family, where)
        self.options = {name: option for name, option in self.options.items() if option.where != FILE_NAME}

    def add_config(self, config: Mapping[str, Any], where: str) -> None:
        """Add what a configuration of ours says and weights do not show: the output levels of a segmentation model."""
        for name in ("level", "out_layers"):
            if name in config:
                value = config[name]
                self.options[name] = Statement(tuple(value) if isinstance(value, list) else value, where)

    def number(self, *names: str) -> Statement | None:
        """Return the first of these options that is a positive whole number, or None."""
        found = [self.options[name] for name in names if name in self.options]
        return next(
            (o for o in found if isinstance(o.value, int) and not isinstance(o.value, bool) and o.value > 0), None
        )


def family_of_name(name: str) -> str | None:
    """Return the architecture that the name of a model or of a file contains; None if it has none or several."""
    name, found = name.lower(), []
    for key, _, pattern in FAMILY_NAMES:
        name, count = re.subn(pattern, " ", name)  # a part of another name, as in local_vim, does not count again
        found += [key] if count else []
    return found[0] if len(found) == 1 else None


def options_of_name(name: str) -> dict[str, Any]:
    """Return the options in a model name of hustvl's form, `vim_tiny_patch16_224_bimambav2_..._with_midclstok_div2`.

    In a name of the full form, what is left out is said, too: without `div2` the sum of both scans is not divided, and
    without a class token there is none.
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
        said.classes, said.palette = read_classes(content)
        _read_description(content, "", said)
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


def _read_description(
    values: Mapping[Any, Any], where: str, said: Statements, depth: int = 0, known: bool = True
) -> None:
    """Add the statements in a checkpoint, in its arguments or its configuration, and in what these hold.

    Args:
        where: the place for messages, "" for the whole checkpoint. depth: of that place.
        known: whether it describes the model; where it may describe something else, only telling options are read.
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
            # The entries of a checkpoint that are not known hold weights, or the state of an optimiser.
            is_part = known and name in PARTS and "backbone" in values
            if where and (is_part or not ABOUT_OTHERS.search(name.lower())):
                _read_description(_to_mapping(entry, name, place) or {}, place, said, depth + 1, known=False)
        else:
            _read_value(name, entry, place, said)


def _to_mapping(value: Any, name: str, where: str) -> Mapping[Any, Any] | None:
    """Return arguments or a configuration as a mapping: also the text of one, or a command line; None for the rest."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        given = [part.lstrip("-").replace("-", "_").partition("=") for part in value]
        following = [*value[1:], ""]
        options = zip(value, given, following, strict=True)
        return {key: text or after for part, (key, _, text), after in options if part.startswith("--")} or None
    if isinstance(value, str) and ("\n" in value or value.lstrip().startswith("{") or ": " in value or "=" in value):
        try:
            return _read_text(value, where)
        except ValueError as error:
            if name not in MODEL_NAMES:  # these may have any text
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


def _read_text(text: str, where: str) -> Mapping[Any, Any] | None:
    """Read a configuration in JSON, YAML or Python, as mm's are, of which nothing is executed; None for an empty one.

    Raises:
        ValueError: it is none of these, or too long.
    """
    import yaml

    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it has {len(text)} characters, expected at most {LONGEST_TEXT}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in its strings, for instance
            tree, reason = ast.parse(text), ""
    except SyntaxError as error:
        tree, reason = None, f"{error.msg} in line {error.lineno}"
    except (ValueError, RecursionError, MemoryError) as error:
        tree, reason = None, f"{type(error).__name__} {error}".splitlines()[0].strip()
    # Both a line `model: vim` and JSON are valid Python, too, but assign nothing; `model = {'type': 1}` is valid YAML.
    if tree is None or not any(map(_assigns, tree.body)):
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
            value = None
        if isinstance(value, Mapping):
            return value
    if tree is None:
        raise ValueError(f"neither JSON nor YAML, and as Python: {reason[:200]}")
    return _read_python(tree, where) or None


def _assigns(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.AnnAssign):
        return isinstance(statement.value, (ast.Call, ast.Dict))
    return isinstance(statement, ast.Assign)


class _Literals:
    """The values of expressions of a Python text, found without executing it; `UNREAD` for what has to be computed.

    Those are constants, lists, tuples and dictionaries, the arguments of calls as dictionaries (of `dict`, or of a
    class), names of values before, and arithmetic of numbers and of lists of numbers.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.entries_left = LARGEST_LISTS

    def read(self, node: ast.AST | None, depth: int = 0) -> Any:
        if depth > DEEPEST_TEXT:
            return UNREAD
        if isinstance(node, ast.Constant):
            return node.value if node.value is None or isinstance(node.value, (bool, int, float, str)) else UNREAD
        if isinstance(node, ast.Name):
            return self.names.get(node.id, UNREAD)
        if isinstance(node, (ast.List, ast.Tuple)):
            values = [self.read(part, depth + 1) for part in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        if isinstance(node, ast.Dict):
            return self._merge(zip(node.keys, node.values, strict=True), depth)
        if isinstance(node, ast.Call):
            is_dict = isinstance(node.func, ast.Name) and node.func.id == "dict"
            arguments = [(None, value) for value in node.args if is_dict or isinstance(value, (ast.Call, ast.Dict))]
            arguments += [(word.arg and ast.Constant(word.arg), word.value) for word in node.keywords]
            return self._merge(arguments, depth) if arguments or is_dict else UNREAD
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = self.read(node.operand, depth + 1)
            if not _is_number(value):
                return UNREAD
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return self._compute(type(node.op), self.read(node.left, depth + 1), self.read(node.right, depth + 1))
        return UNREAD

    def _merge(self, pairs: Iterable[tuple[ast.AST | None, ast.AST]], depth: int) -> dict[str, Any]:
        """Return the dictionary of these keys and values; a value without a key is a dictionary to copy."""
        found: dict[str, Any] = {}
        for key, node in pairs:
            value, name = self.read(node, depth + 1), self.read(key, depth + 1)
            if isinstance(name, str):
                found[name] = value
            elif key is None and isinstance(value, dict) and self._take(len(value)):
                found |= value
            elif key is None:
                found[f"**{getattr(node, 'id', '')}"] = UNREAD
        return found

    def _compute(self, kind: type[ast.operator], left: Any, right: Any) -> Any:
        if isinstance(right, (list, tuple)) and kind is ast.Mult:
            left, right = right, left
        try:
            if _is_number(left) and _is_number(right):
                result = OPERATIONS[kind](left, right)
                return result if abs(result) <= LARGEST_NUMBER else UNREAD
            if isinstance(left, (list, tuple)) and all(map(_is_number, left)):
                if kind is ast.Mult and isinstance(right, int):
                    count = len(left) * max(right, 0)
                elif kind is ast.Add and type(right) is type(left) and all(map(_is_number, right)):
                    count = len(left) + len(right)
                else:
                    return UNREAD
                return OPERATIONS[kind](left, right) if count <= LONGEST_LIST and self._take(count) else UNREAD
        except (ArithmeticError, ValueError):
            pass
        return UNREAD

    def _take(self, entries: int) -> bool:
        """Count entries of lists and dictionaries that the text makes; False if they are too many."""
        self.entries_left -= entries
        return self.entries_left >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_python(tree: ast.Module, where: str) -> dict[str, Any]:
    """Return the options in a Python text: of the parts of its model, then of all else but what is about others.

    Of an option in several places the first one counts. A type is a list, of all the types in the text. The size of the
    images and their mean and std are also read from the descriptions of the data.

    Args:
        tree: the parsed text. where: its place, for the note about options that are not literal.
    """
    literals, loose, outer = _Literals(), [], set(map(id, tree.body))
    for statement in ast.walk(tree):  # those of the module come first
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)):
            continue
        value = literals.read(statement.value)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        for target in targets:
            if isinstance(target, ast.Name) and id(statement) in outer:
                literals.names[target.id] = value
            elif isinstance(target, ast.Name):  # which of several branches is taken, for instance, is not known
                loose += [{target.id: value}] if isinstance(value, dict) else []
            else:
                loose.append(value)
    sources = [literals.names, *loose]
    models = [part["model"] for _, part in _walk(sources) if isinstance(part.get("model"), dict)][:1]
    found: dict[str, Any] = {}
    for part in PARTS:
        _collect(_walk(model.get(part) for model in models), found)
    # A name that is assigned is no option, but what it stands for may hold some.
    assigned = [value for name, value in literals.names.items() if not _is_about(name, ABOUT_OTHERS)]
    _collect(_walk([*models, *assigned, *loose]), found)

    everywhere = list(_walk([*models, *sources], TEACHERS))
    sizes = [part["crop_size"] for _, part in everywhere if "crop_size" in part]
    found |= {"crop_size": sizes[0]} if sizes and "crop_size" not in found else {}
    steps = [("Normalize" if part.get("type") == "Normalize" else name, part) for name, part in everywhere]
    steps = [(name, part) for name, part in steps if name in NORMALISATIONS and {"mean", "std"} <= part.keys()]
    if steps:
        name, part = min(steps, key=lambda step: NORMALISATIONS.index(step[0]))
        found[name] = part

    unread = [name for name, value in found.items() if value is UNREAD]
    unread += ["model"] if not models and literals.names.get("model") is UNREAD else []
    if unread:
        names = f"{', '.join(unread[:8])} {'is' if len(unread) == 1 else 'are'}"
        note(f"the configuration in {where} could not be read in full: {names} not literal; {ASSUMED}")
    return {name: value for name, value in found.items() if value is not UNREAD}


def _is_about(name: str, others: re.Pattern[str]) -> bool:
    return name != "decode_head" and others.search(name.lower()) is not None


def _walk(values: Iterable[Any], others: re.Pattern[str] = ABOUT_OTHERS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and content of each dictionary in these values, once, outer ones first, but not of `others`.

    The values themselves, and what is in lists without a name, have the name "".
    """
    queue, seen = deque(("", value) for value in values), set()
    while queue:
        name, value = queue.popleft()
        if id(value) in seen or not isinstance(value, (dict, list, tuple)):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            yield name, value
            queue.extend((key, entry) for key, entry in value.items() if not _is_about(key, others))
        else:
            queue.extend(("", entry) for entry in value)


def _collect(parts: Iterable[tuple[str, dict[str, Any]]], found: dict[str, Any]) -> None:
    """Add the options of dictionaries to those that are found already, of which the first ones remain."""
    for _, part in parts:
        for name, value in part.items():
            if name == "type":
                # Several parts of the text have a type; only names of architectures are looked for in them.
                types = found.setdefault(name, [])
                types += [value] if isinstance(value, str) else []
            elif name not in GENERAL or (value is UNREAD and name in PARTS):
                entries = value if isinstance(value, (list, tuple)) else [value]
                if any(entry is UNREAD for entry in entries):
                    found.setdefault(name, UNREAD)
                elif not any(isinstance(entry, (dict, list, tuple)) for entry in entries):
                    found.setdefault(name, value)


def _read_module(module: nn.Module, said: Statements) -> None:
    """Add the options that the published code keeps as attributes of the model, of its first mixer and its norms."""
    module = next((inner for inner in module.modules() if _first_mixer(inner) is not None), module)
    kind, mixer = type(module), _first_mixer(module)
    if "videomamba" in kind.__module__.lower() or (hasattr(mixer, "bimamba") and not hasattr(mixer, "bimamba_type")):
        said.family = said.family or Statement("video_mamba", f"its class {kind.__module__}.{kind.__qualname__}")
    # Words of a class name are told apart by their capitals.
    said.add_name(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__qualname__), f"its class {kind.__qualname__}")
    for part, where in ((module, "its attribute"), (mixer, "its mixers' attribute")):
        for option, value in vars(part).items() if isinstance(part, nn.Module) else ():
            if not option.startswith("_") and isinstance(value, (bool, int, float, str)):
                said.add_option(option, value, f"{where} {option}")
    projection = getattr(getattr(module, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d):
        said.add_option("stride", projection.stride[0], "the stride of its patch_embed.proj")
    if mixer is None:
        return
    epsilon = getattr(getattr(module.layers[0], "norm", None), "eps", None)
    if isinstance(epsilon, float):
        said.add_option("norm_epsilon", epsilon, "its norms' attribute eps")
    if "if_cls_token" in said.options and "use_middle_cls_token" not in said.options:
        said.add_option("use_middle_cls_token", False, "a model without the attribute use_middle_cls_token")
    if hasattr(mixer, "bimamba_type") and "if_divide_out" not in said.options:
        said.add_option("if_divide_out", False, "a mixer without the attribute if_divide_out")


def _first_mixer(module: nn.Module) -> nn.Module | None:
    """Return the mixer of the first layer of a Vim or a VideoMamba, None for any other module."""
    layers = module._modules.get("layers")  # not an attribute, which a compiled module takes from the one inside
    return getattr(layers[0], "mixer", None) if isinstance(layers, nn.ModuleList) and len(layers) else None


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


def read_classes(content: Mapping[Any, Any]) -> tuple[tuple[str, ...] | None, tuple[tuple[int, int, int], ...] | None]:
    """Return the names of classes and their colours in a configuration, or None for what it does not have.

    It is one of ours, or a checkpoint with a `meta` of mmcv's or mmengine's.
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
    """Return True for "true", None for "None", 1e-5 for "1e-5": what a YAML file or a command line has as text.

    The word "none" in small letters remains: it is a value of the published code's options.
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
