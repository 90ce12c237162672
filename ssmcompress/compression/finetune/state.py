"""The state of a run in one file: whole or not at all, and a checkpoint that every command takes as a MODEL."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, SsmCompressError
from ...models.base import TokenModel
from ...models.checkpoint import describe
from ...models.safe_pickle import read_pickle

FORMAT = 1


def write_state(file: Path, model: TokenModel, entries: Mapping[str, Any]) -> None:
    """Replace `file` by the state of a run; whenever this is cut off, the old one or the new one is there.

    Args:
        model: whose configuration makes the file loadable.
        entries: "model" and "optimizer" state dicts, "run" a JSON value, and whatever else.
    """
    content = {"ssmcompress": json.dumps(describe(model)), "training_format": FORMAT, **entries}
    # Always the same name, so that what a killed run leaves behind is replaced by the next.
    temporary = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            torch.save(content, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch has errors of its own for a full disk
        temporary.unlink(missing_ok=True)
        raise SsmCompressError(f"cannot keep the state of the run in {file}: {error}") from error


def read_state(file: Path) -> dict[str, Any]:
    """The entries of a state file; InputError for any other file."""
    try:
        content = read_pickle(file)
        if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
            raise InputError("not the state of a fine-tuning run")
        if content.get("training_format") != FORMAT:
            raise InputError(f"state of format {content.get('training_format')!r}: this version reads {FORMAT}")
    except InputError as error:
        raise InputError(f"{file}: {error}; remove it to start afresh") from error
    return content


def remove_state(file: Path) -> None:
    """Take away a state that is no longer needed, and what a killed run left of writing it."""
    for path in (file, file.with_name(f".{file.name}.part")):
        path.unlink(missing_ok=True)
