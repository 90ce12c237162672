"""Downloads of models from the Hugging Face Hub into its cache, and uploads to it.

Only the needed files are downloaded, and no code in them is run: they are read like local files.
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
    """A model from the Hub in the local cache.

    Attributes:
        path: a file, or a folder with model.safetensors and config.json.
        name: the model with its commit, so that the same files can be found again.
    """

    path: Path
    name: HubName


@dataclass(frozen=True)
class Target:
    """An existing repository, before an upload.

    Attributes:
        private: whether it is private. files: paths of its files.
        contents: the JSON objects in the requested files that exist; {} for a file without one.
    """

    private: bool
    files: tuple[str, ...]
    contents: Mapping[str, Mapping[str, Any]]


def fetch(name: HubName) -> Fetched:
    """Download a model: the named file, the folder of model.safetensors and config.json, or the only weights file.

    A cached commit is read without network access. If the Hub cannot be reached, the cached version of a branch is
    used, with a note.

    Raises:
        InputError: there is no such repository, revision or file, access is denied, or the file is ambiguous.
            SsmCompressError: the Hub cannot be reached, or its response cannot be read.
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
    """Download the `wanted` files that exist in the repository, and return their folder in the cache.

    Raises:
        InputError, SsmCompressError: as `fetch`; or the first of them does not exist.
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
    """Return the content of the repository that an upload would write to; None if it does not exist.

    For a branch that does not exist yet, this is the content of the main branch, from which it would be created.

    Args:
        wanted: the JSON files whose content is read.

    Raises:
        InputError: there is no token, or it lacks the permission. SsmCompressError: the Hub cannot be reached.
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
    """Return the JSON object in a file; {} if there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def upload(
    name: HubName, files: Mapping[str, Path], message: str, *, deleted: Sequence[str] = (), private: bool, bars: bool
) -> tuple[str, str]:
    """Upload files as one commit to a repository; the repository and the branch are created if they do not exist.

    Call `inspect_target` first to check that it may be written.

    Args:
        files: path in the repository -> file. deleted: paths in the repository that the same commit removes.
        private: whether a new repository is private. bars: whether huggingface_hub may show progress bars.

    Returns:
        The commit and the address of the repository.

    Raises:
        InputError: the token lacks the permission. SsmCompressError: the Hub cannot be reached.
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
    """Let huggingface_hub show its progress bars and warnings only if `shown`."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for example that environment variables control the progress bars
        if shown or are_progress_bars_disabled():
            yield
            return
        disable_progress_bars()
        try:
            yield
        finally:
            enable_progress_bars()


def title_of(folder: Path) -> str:
    """Return the title of a folder: its name, or the repository name for a folder in the cache of the Hub."""
    folder = folder.absolute()
    match = re.fullmatch(r"models--.+--(.+)", folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return match[1] if match else folder.name


def _download(name: HubName, files: list[str], listing: Listing) -> list[Path]:
    """Return the cache paths of files of a repository, all from one commit, and download missing ones."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # The first download resolves a branch and caches its commit for offline use; the others use the same commit.
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
    """Return the commit of a cached file: the name of the snapshot folder."""
    return path.parents[file.count("/")].name


class DownloadProgress:
    """The part of tqdm's interface that huggingface_hub uses; it reports to this package's progress, in megabytes."""

    def __init__(self, file: str, *_: Any, total: float | None = None, initial: float = 0, **__: Any):
        self.n, self.total = initial, total
        steps = int((total or 0) // MEGABYTE)
        self._shown = int(initial // MEGABYTE)
        self._steps = iter(track(range(self._shown, steps), f"download {file}, MB", steps, self._shown))

    def update(self, amount: float | None = 1) -> None:
        """Count received bytes."""
        self.n += amount or 0
        while self._shown < self.n // MEGABYTE:
            next(self._steps, None)
            self._shown += 1

    def close(self) -> None:
        """Remove the bar."""
        if hasattr(self._steps, "close"):
            self._steps.close()

    def refresh(self, *_: Any, **__: Any) -> None:
        """Do nothing: the front end redraws on its own."""

    set_description = set_description_str = set_postfix = set_postfix_str = reset = clear = refresh

    def __enter__(self) -> DownloadProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
