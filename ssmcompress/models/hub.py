"""Models from the Hugging Face Hub, fetched into its cache, and files that are uploaded to it.

Only the files that are needed are fetched, and nothing in them is run: they are read as local files are.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, SsmCompressError
from ..hub_names import HubName
from ..progress import track
from .hub_errors import explained, first_line, is_network
from .hub_files import TIMEOUT, Listing, choose_files, describe_files, is_complete, list_cached, list_files

COMMIT = re.compile(r"[0-9a-f]{40}")
MEGABYTE = 1_000_000
LARGEST_JSON = 64 * MEGABYTE  # bytes; config.json has some KB, report.json at most a few MB


@dataclass(frozen=True)
class Fetched:
    """A model of the Hub that is in the cache.

    Attributes:
        path: a file, or a folder with model.safetensors and config.json.
        name: the model with its commit, by which the same files are found again.
    """

    path: Path
    name: HubName


@dataclass(frozen=True)
class Target:
    """A repository that exists, before an upload.

    Attributes:
        private: whether only its owner sees it. files: paths of what is in it.
        contents: the JSON objects in those files that were asked for and are there; {} of a file without one.
    """

    private: bool
    files: tuple[str, ...]
    contents: Mapping[str, Mapping[str, Any]]


def fetch(name: HubName) -> Fetched:
    """Fetch a model: the named file, the folder of model.safetensors and config.json, or the only file of weights.

    A commit that is in the cache is read without the network. Where the Hub cannot be reached, the cached version of a
    branch is used, with a note.

    Raises:
        InputError: there is no such repository, revision or file, access is not allowed, or it is not clear which file
            is meant. SsmCompressError: the Hub cannot be reached, or its answer cannot be read.
    """
    with explained(name):
        listing = list_cached(name) if COMMIT.fullmatch(name.revision or "") else None
        if listing is None or not is_complete(name, listing):
            listing = list_files(name)
        files = choose_files(name, listing)
        paths = _download(name, files, listing)
    commit = _commit_of(paths[0], files[0])
    if len(files) == 1:
        return Fetched(paths[0], HubName(name.repository, commit, files[0]))
    return Fetched(paths[0].parent, HubName(name.repository, commit))


def fetch_files(name: HubName, wanted: Sequence[str]) -> Path:
    """Fetch those of the `wanted` files that the repository has, and return the folder of the cache that they are in.

    Raises:
        InputError, SsmCompressError: as `fetch`; or the repository does not have the first of them.
    """
    with explained(name):
        listing = list_files(name)
        files = [file for file in wanted if file in listing.files]
        if wanted[0] not in files:
            raise InputError(f"{name} has no {wanted[0]}: it has {describe_files(listing.files)}")
        return _download(name, files, listing)[0].parent


def read_license(name: HubName) -> str | None:
    """Return the licence that the card of a repository states, None if it states none.

    Raises:
        InputError, SsmCompressError: as `fetch`.
    """
    from huggingface_hub import HfApi

    with explained(name):
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=TIMEOUT)
        value = getattr(info.card_data, "license", None)
    return value if isinstance(value, str) else None


def inspect_target(name: HubName, wanted: Sequence[str]) -> Target | None:
    """Return what is in the repository that an upload would write to, None if it does not exist.

    Of a branch that does not exist, this is the main one, which it would begin as.

    Args:
        wanted: the JSON files whose content is read.

    Raises:
        InputError: there is no token, or it does not allow it. SsmCompressError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise SsmCompressError(f"{name}: HF_HUB_OFFLINE is set, but an upload needs the network")
    if get_token() is None:
        raise InputError(f"{name}: no token; log in with `hf auth login`, or set HF_TOKEN to a token with write access")
    with explained(name, writes=True):
        ask = partial(HfApi().model_info, name.repository, files_metadata=True, timeout=TIMEOUT)
        try:
            info = ask(revision=name.revision)
        except RepositoryNotFoundError:
            return None
        except RevisionNotFoundError:
            info = ask()
        sizes = {str(file.rfilename): file.size if isinstance(file.size, int) else None for file in info.siblings}
        at = HubName(name.repository, info.sha)
        read = [file for file in wanted if file in sizes and (sizes[file] or 0) <= LARGEST_JSON]
        paths = _download(at, read, Listing(sizes))
    return Target(
        info.private is True, tuple(sizes), {file: _read_json(path) for file, path in zip(read, paths, strict=True)}
    )


def _read_json(file: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file, {} where there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def upload(
    name: HubName, files: Mapping[str, Path], message: str, *, deleted: Sequence[str] = (), private: bool, bars: bool
) -> tuple[str, str]:
    """Upload files as one commit to a repository, which is created if it does not exist, and its branch with it.

    `inspect_target` says before whether it may be written.

    Args:
        files: path in the repository -> file. deleted: paths in the repository that the same commit removes.
        private: whether a repository that is created is private. bars: whether huggingface_hub may draw its bars.

    Returns:
        The commit and the address of the repository.

    Raises:
        InputError: the token does not allow it. SsmCompressError: the Hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    api = HfApi()
    changes = [CommitOperationAdd(file, str(path)) for file, path in files.items()]
    changes += [CommitOperationDelete(file, is_folder=False) for file in deleted]
    with explained(name, writes=True), _own_bars(bars):
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        if name.revision is not None:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        done = api.create_commit(name.repository, changes, commit_message=message, revision=name.revision)
    return done.oid, f"{constants.ENDPOINT}/{name.repository}"


@contextmanager
def _own_bars(shown: bool) -> Iterator[None]:
    """Let huggingface_hub draw its bars, and give its warnings, only if `shown`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that the environment decides about the bars
        if shown or are_progress_bars_disabled():
            yield
            return
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()


def title_of(folder: Path) -> str:
    """Return what a folder is called: its name, or the name of the repository if it is one of the cache of the Hub."""
    folder = folder.absolute()
    match = re.fullmatch(r"models--.+--(.+)", folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return match[1] if match else folder.name


def _download(name: HubName, files: list[str], listing: Listing) -> list[Path]:
    """Return the paths in the cache of files of a repository, all of one commit, after fetching what is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # The first download resolves a branch and remembers its commit for work without network; others follow it.
    revision, paths = name.revision, []
    takes_bars = "tqdm_class" in inspect.signature(hf_hub_download).parameters  # since 1.0
    for file in files:
        bars = {"tqdm_class": partial(DownloadProgress, file)} if takes_bars else {}
        try:
            with _own_bars(shown=False):
                path = Path(
                    hf_hub_download(name.repository, file, revision=revision, local_files_only=listing.cached, **bars)
                )
        except Exception as error:  # as in `list_files`
            if is_network(error) and not isinstance(error, LocalEntryNotFoundError):
                raise SsmCompressError(
                    f"{name}: the download of {file} was interrupted ({first_line(error)}); run the command again"
                ) from error
            raise
        paths.append(path)
        revision = _commit_of(path, file)
    return paths


def _commit_of(path: Path, file: str) -> str:
    """Return the commit of a file in the cache, the name of the folder that mirrors the repository."""
    return path.parents[file.count("/")].name


class DownloadProgress:
    """The part of tqdm's interface that huggingface_hub uses, shown as the progress of this package, in megabytes."""

    def __init__(self, file: str, *_: Any, total: float | None = None, initial: float = 0, **__: Any):
        self.n, self.total = initial, total
        steps = int((total or 0) // MEGABYTE)
        self._shown = int(initial // MEGABYTE)
        self._steps = iter(track(range(self._shown, steps), f"download {file}, MB", steps, self._shown))

    def update(self, amount: float | None = 1) -> None:
        """Count bytes that have come."""
        self.n += amount or 0
        while self._shown < self.n // MEGABYTE:
            next(self._steps, None)
            self._shown += 1

    def close(self) -> None:
        """Remove the bar."""
        if hasattr(self._steps, "close"):
            self._steps.close()

    def refresh(self, *_: Any, **__: Any) -> None:
        """Do nothing: the front end draws by itself."""

    set_description = set_description_str = set_postfix = set_postfix_str = reset = clear = refresh

    def __enter__(self) -> DownloadProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
