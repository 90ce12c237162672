"""A self-contained web page to explore attention maps and kept tokens of one or more variants of a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError, escape_control

# In JSON, these characters occur only in strings, where they can be escaped: no text can end the <script> element.
ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render_page(value: Mapping[str, Any]) -> str:
    """Return an HTML page that shows `value` and loads nothing: style, script, data and pictures are embedded.

    Args:
        value: only JSON values; texts are untrusted and are always displayed as text. Numbers are embedded with all
            their digits: round the maps beforehand if the size of the page matters.

            - `title`, `architecture`, `method`, `reader` (the token that a map belongs to), `rule` (how the images
              were chosen): texts. `layers`: the layers used for the maps. `data`: `name`, `images`, `labelled`.
            - `grid`: (rows, columns) of patches; everything called a grid below has this size.
            - `stages`: each `after` (a layer), `kept`, `of`, `importance`; empty for a dense model.
            - `variants`: each `name` and `figures` of the whole set: `accuracy` in percent, `correlation`,
              `correlation_low`, `correlation_high`, each a number or None. Optional texts: `spread`, what the last two
              are, and `judged`, what accuracy is the share of.
            - `kept_share`, optional: by variant, a grid of how often each patch is kept at the end, 0 to 1.
            - `scale`, optional: [low, high] of the colours of all maps; without it, that of each image is used.
            - `images`: each `name`, `group`, `label` or None, `picture` (a data: URL), `scale`, and by name `variants`:
              `predicted`, `probability`, `right` (without labels: as the dense model) and `correlation` (None where
              unknown), `map` (a grid; None where the patch was dropped before), and `stages` (empty for a dense one),
              each with grids `kept` (0 or 1), `scores` and `ranks` (1 is the highest; None where the patch was no
              candidate).

    Raises:
        InputError: a number is not finite.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("ssmcompress.jobs"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    # Only texts shown without scripts are escaped here; the script does the same for all others.
    return environment.get_template("explore.html").render(
        title=escape_control(value["title"]), value=Markup(_embed(value))
    )


def _embed(value: Mapping[str, Any]) -> str:
    """Return JSON in ASCII that is safe inside a <script> element and parses back to `value`."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        for path, number in _list_not_finite(value):
            raise InputError(
                f"cannot draw {path}: found {number}, expected a finite number; check the weights of the model"
            ) from None
        raise
    return text.translate(ESCAPES)


def _list_not_finite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the paths and values of numbers that JSON cannot represent."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from _list_not_finite(inside, f"{path}.{escape_control(str(key))[:40]}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inside in enumerate(value):
            yield from _list_not_finite(inside, f"{path}[{i}]")
