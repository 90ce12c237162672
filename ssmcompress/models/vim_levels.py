"""Output levels of a segmentation model on a Vim: the kinds of tensors, and statements about the kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import InputError
from ..progress import note
from .statements import Statements


class Level(NamedTuple):
    """The kind of an output level: the residual stream or the layer's update of it; the last level is also normalised.

    `rope` applies a rotary position embedding to the residual stream before every layer, including the first.
    """

    stream: bool
    norm: bool = False
    rope: bool = False


# In the published code: the default, used by the Tiny model; use_residual_as_feature with last_layer_process "add"; the
# same with "add & norm"; the former with if_rope and if_rope_residual.
LEVELS: Mapping[str, Level] = {
    "hidden": Level(stream=False),
    "residual": Level(stream=True),
    "residual_norm": Level(stream=True, norm=True),
    "rope": Level(stream=True, rope=True),
}
DEFAULT_LEVEL = "hidden"
# The options of the published code that determine the kind, and the meaning of their values: use_residual_as_feature,
# last_layer_process (no effect without the former), if_rope.
LEVEL_OPTIONS = ("use_residual_as_feature", "last_layer_process", "if_rope", "if_rope_residual")
CONFIGURED = {
    (False, None, False): "hidden",
    (True, "add", False): "residual",
    (True, "add & norm", False): "residual_norm",
    (True, "add", True): "rope",
}


def find_level(said: Statements) -> str | None:
    """Return the stated kind of the output levels, a key of `LEVELS`; None without a statement.

    Raises:
        InputError: the stated kind is not supported.
    """
    given = said.options.get("level")
    if given is not None and given.value not in LEVELS:
        raise InputError(f"{given.where} {given.value!r}: expected one of {', '.join(map(repr, LEVELS))}")
    values = {name: said.options[name].value for name in LEVEL_OPTIONS if name in said.options}
    stream, process, rope, both = map(values.get, LEVEL_OPTIONS)
    if stream is None:
        configured, is_known = "rope" if rope else None, True
    else:
        configured = CONFIGURED.get((bool(stream), process if stream else None, bool(rope)))
        is_known = configured is not None
    if given is None:
        if not is_known or (rope and both is False):
            text = ", ".join(f"{name}={value!r}" for name, value in values.items())
            raise InputError(f"the file says {text}: output levels that are not supported (see `level`)")
        return configured
    if configured not in (None, given.value):
        note(f"{given.where} {given.value!r} takes precedence, although the options in the file say {configured!r}")
    return given.value
