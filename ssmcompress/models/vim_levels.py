"""Output levels of a segmentation model on a Vim: which tensors they are, and what is said about that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import InputError
from ..progress import note
from .statements import Statements


class Level(NamedTuple):
    """What an output level is: the residual stream or what its layer added to it; the last one also normalised.

    `rope` stands for rotary positions in front of every layer, the first too: the stream is rotated.
    """

    stream: bool
    norm: bool = False
    rope: bool = False


# In the published code: the default, of the Tiny model; use_residual_as_feature with last_layer_process "add"; the same
# with "add & norm"; the former with if_rope and if_rope_residual.
LEVELS: Mapping[str, Level] = {
    "hidden": Level(stream=False),
    "residual": Level(stream=True),
    "residual_norm": Level(stream=True, norm=True),
    "rope": Level(stream=True, rope=True),
}
DEFAULT_LEVEL = "hidden"
# The options of the published code that say it, and what their values mean: use_residual_as_feature,
# last_layer_process, which has no effect without the former, if_rope.
LEVEL_OPTIONS = ("use_residual_as_feature", "last_layer_process", "if_rope", "if_rope_residual")
CONFIGURED = {
    (False, None, False): "hidden",
    (True, "add", False): "residual",
    (True, "add & norm", False): "residual_norm",
    (True, "add", True): "rope",
}


def find_level(said: Statements) -> str | None:
    """Return what is said about the output levels, a key of `LEVELS`; None if nothing is.

    Raises:
        InputError: it is none of these.
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
