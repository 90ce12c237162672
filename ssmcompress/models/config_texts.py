"""Reading of model options from configurations in Python, without executing them."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..progress import note

# Names of dictionaries in a configuration that do not describe the model.
ABOUT_OTHERS = re.compile(r"teacher|distill|optim|sched|data|aug|loss|train|eval|val|test|head|neck")
# From these, not even the image size, mean and std are read, which are otherwise taken from descriptions of the data.
TEACHERS = re.compile(r"teacher|distill")
# Parts of OpenMMLab models, which take precedence over the rest of a configuration. Other heads are for training only.
PARTS = ("backbone", "decode_head", "test_cfg")
# Places of mean and std (on a 0..255 scale) in OpenMMLab configurations; the last one is a step of a pipeline.
NORMALISATIONS = ("data_preprocessor", "img_norm_cfg", "Normalize")
# Keys that hold the name of the model, the most specific ones first.
MODEL_NAMES = ("model", "arch", "architecture", "architectures", "model_name", "model_type", "backbone", "encoder",
               "name", "type")  # fmt: skip
# Options that may mean something else unless a dictionary is known to describe the model.
GENERAL = {*MODEL_NAMES, "stride", "patch_stride", "input_size", "img_size", "image_size", "mean", "std", "rms_norm"}
LONGEST_TEXT = 1 << 20  # characters of a configuration
DEEPEST_TEXT = 100  # nesting depth of dictionaries, lists and operations in a Python text
LARGEST_NUMBER = 1 << 63  # in the results of arithmetic
LONGEST_LIST = 4096  # numbers in a list that is multiplied, and
LARGEST_LISTS = 1 << 16  # total entries of these lists and of the dictionaries that are copied into others
OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip
ASSUMED = "what the weights do not show is assumed"
UNREAD = object()  # stands for values that cannot be read without executing the text


def read_text(text: str, where: str) -> Mapping[Any, Any] | None:
    """Read a configuration in JSON, YAML or Python (as in OpenMMLab) without executing it; None for an empty one.

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
    """Evaluates expressions of a Python text without executing it; `UNREAD` stands for values it cannot determine.

    It reads constants, lists, tuples and dictionaries, the arguments of calls as dictionaries (of `dict`, or of a
    class), previously assigned names, and arithmetic on numbers and lists of numbers.
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
            if not is_number(value):
                return UNREAD
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return self._compute(type(node.op), self.read(node.left, depth + 1), self.read(node.right, depth + 1))
        return UNREAD

    def _merge(self, pairs: Iterable[tuple[ast.AST | None, ast.AST]], depth: int) -> dict[str, Any]:
        """Return the dictionary of these keys and values; a value without a key is a dictionary to merge in."""
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
            if is_number(left) and is_number(right):
                result = OPERATIONS[kind](left, right)
                return result if abs(result) <= LARGEST_NUMBER else UNREAD
            if isinstance(left, (list, tuple)) and all(map(is_number, left)):
                if kind is ast.Mult and isinstance(right, int):
                    count = len(left) * max(right, 0)
                elif kind is ast.Add and type(right) is type(left) and all(map(is_number, right)):
                    count = len(left) + len(right)
                else:
                    return UNREAD
                return OPERATIONS[kind](left, right) if count <= LONGEST_LIST and self._take(count) else UNREAD
        except (ArithmeticError, ValueError):
            pass
        return UNREAD

    def _take(self, entries: int) -> bool:
        """Count entries of lists and dictionaries that the text creates; return False if there are too many."""
        self.entries_left -= entries
        return self.entries_left >= 0


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_python(tree: ast.Module, where: str) -> dict[str, Any]:
    """Return the options in a Python text: first those of the parts of its model, then those of other dictionaries.

    If an option occurs several times, the first one counts. A type is a list of all types in the text. The image size,
    mean and std are also read from descriptions of the data.

    Args:
        tree: the parsed text. where: its location, for the note about options that are not literal.
    """
    literals, loose, outer = _Literals(), [], set(map(id, tree.body))
    for statement in ast.walk(tree):  # statements at module level come first
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Expr, ast.Return)):
            continue
        value = literals.read(statement.value)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        for target in targets:
            if isinstance(target, ast.Name) and id(statement) in outer:
                literals.names[target.id] = value
            elif isinstance(target, ast.Name):  # for example, it is not known which branch is taken
                loose += [{target.id: value}] if isinstance(value, dict) else []
            else:
                loose.append(value)
    sources = [literals.names, *loose]
    models = [part["model"] for _, part in _walk(sources) if isinstance(part.get("model"), dict)][:1]
    found: dict[str, Any] = {}
    for part in PARTS:
        _collect(_walk(model.get(part) for model in models), found)
    # An assigned name is not an option, but its value may contain options.
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
    """Yield the name and content of each dictionary in these values once, outer ones first, except for `others`.

    The values themselves, and entries of unnamed lists, have the name "".
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
    """Add the options of dictionaries to those already found, without overwriting them."""
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
