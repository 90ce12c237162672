"""The files of a repository on the Hugging Face Hub, and the choice of its model files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError, suggest
from ..hub_names import WEIGHTS, HubName
from ..progress import note
from .hub_errors import is_network, is_offline, not_cached
from .saved import CONFIG_FILE, WEIGHTS_FILE

LISTED = 10  # maximum number of files in a message
TIMEOUT = 10.0  # seconds to wait for the listing of a repository
# Files that trainers save next to the weights.
STATES = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state(?:_\d+)?)\.(?:bin|pt|pth)")


@dataclass(frozen=True)
class Listing:
    """The files of a repository: path -> size in bytes or None; `cached`: only cached files are known."""

    files: Mapping[str, int | None]
    cached: bool = False


def list_files(name: HubName) -> Listing:
    """Return the files of a repository; if the Hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=TIMEOUT)
        files = {str(file.rfilename): file.size if isinstance(file.size, int) else None for file in info.siblings}
        return Listing(files)
    except Exception as error:  # from different libraries, depending on the version of huggingface_hub
        cached = list_cached(name) if is_network(error) else None
        if cached is None:
            raise
        if not is_offline(error):
            note(f"the Hub cannot be reached: {name} is the version in the cache")
        return cached


def choose_files(name: HubName, listing: Listing) -> list[str]:
    """Choose the model files of a repository: one weights file, or model.safetensors and config.json.

    Raises:
        InputError: there is no candidate, or several.
    """
    files = listing.files
    if name.file is not None:
        if name.file in files:
            return [name.file]
        if listing.cached:
            raise not_cached(name)
        weights = [file for file in files if file.lower().endswith(WEIGHTS)]
        raise InputError(
            f"{HubName(name.repository, name.revision)} has no file {name.file}{suggest(name.file, files)}: it has "
            f"{describe_files({file: files[file] for file in weights} or files)}"
        )
    if WEIGHTS_FILE in files and CONFIG_FILE in files:
        return [CONFIG_FILE, WEIGHTS_FILE]
    weights = [file for file in files if file.lower().endswith(WEIGHTS)]
    candidates = [file for file in weights if not STATES.fullmatch(PurePosixPath(file).name)] or weights
    if len(candidates) == 1:
        return candidates
    if candidates:
        described = describe_files({file: files[file] for file in candidates})
        raise InputError(f"{name} has {len(candidates)} files of weights, {described}: write {name}:FILE")
    if listing.cached:
        raise not_cached(name)
    raise InputError(f"{name} has no file of weights ({', '.join(WEIGHTS)}): it has {describe_files(files)}")


def is_complete(name: HubName, listing: Listing) -> bool:
    """Return whether the cache holds the files that would be chosen from the whole repository.

    Further weights files that are not cached could make the only cached one ambiguous.
    """
    if name.file is not None:
        return name.file in listing.files
    return {WEIGHTS_FILE, CONFIG_FILE} <= listing.files.keys()


def list_cached(name: HubName) -> Listing | None:
    """Return the cached files of a repository; None if there are none."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name.repository, repo_type="model"))
    revision = name.revision or constants.DEFAULT_REVISION
    try:
        reference = root / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        folder = root / "snapshots" / commit
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    except (OSError, ValueError):
        return None
    return Listing(files, cached=True) if files else None


def describe_files(files: Mapping[str, int | None]) -> str:
    """Return the names of at most `LISTED` files with their sizes."""
    listed = [file if size is None else f"{file} ({_size(size)})" for file, size in list(files.items())[:LISTED]]
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return ", ".join(listed) + more if listed else "no files"


def _size(count: int) -> str:
    """Format a number of bytes with a unit: 980 B, 4.1 kB, 102.3 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
