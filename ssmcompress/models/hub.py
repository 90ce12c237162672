"""Models from the Hugging Face Hub: which files of a repository are the model, and fetching them into its cache.

Only the files that are needed are fetched, and nothing in them is run: they are read as local files are.
"""

from __future__ import annotations

import errno
import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError, SsmCompressError, suggest
from ..hub_names import WEIGHTS, HubName
from ..progress import note, track
from .saved import CONFIG_FILE, WEIGHTS_FILE

LISTED = 10  # files in a message
TIMEOUT = 10.0  # seconds to wait for the listing of a repository
# What trainers leave next to the weights.
STATES = re.compile(r"(?:training_args|optimizer|scheduler|scaler|rng_state(?:_\d+)?)\.(?:bin|pt|pth)")
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
class Listing:
    """The files of a repository: path in it -> size in bytes or None; `cached`: only those in the cache are known."""

    files: Mapping[str, int | None]
    cached: bool = False


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
    with _explained(name):
        listing = _list_cached(name) if COMMIT.fullmatch(name.revision or "") else None
        if listing is None or not _is_complete(name, listing):
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
    with _explained(name):
        listing = list_files(name)
        files = [file for file in wanted if file in listing.files]
        if wanted[0] not in files:
            raise InputError(f"{name} has no {wanted[0]}: it has {_describe(listing.files)}")
        return _download(name, files, listing)[0].parent


def read_license(name: HubName) -> str | None:
    """Return the licence that the card of a repository states, None if it states none.

    Raises:
        InputError, SsmCompressError: as `fetch`.
    """
    from huggingface_hub import HfApi

    with _explained(name):
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
        raise InputError(f"{name}: no token; log in with `hf auth login`, or set HF_TOKEN to one that may write")
    with _explained(name, writes=True):
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
    with _explained(name, writes=True), _own_bars(bars):
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


def list_files(name: HubName) -> Listing:
    """Return the files of a repository; where the Hub cannot be reached, those in the cache."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name.repository, revision=name.revision, files_metadata=True, timeout=TIMEOUT)
        files = {str(file.rfilename): file.size if isinstance(file.size, int) else None for file in info.siblings}
        return Listing(files)
    except Exception as error:  # of several libraries, one for each version of huggingface_hub
        cached = _list_cached(name) if _is_network(error) else None
        if cached is None:
            raise
        if not _is_offline(error):
            note(f"the Hub cannot be reached: {name} is the version in the cache")
        return cached


def choose_files(name: HubName, listing: Listing) -> list[str]:
    """Return which files of a repository are its model: one file of weights, or model.safetensors and config.json.

    Raises:
        InputError: none is, or several may be.
    """
    files = listing.files
    if name.file is not None:
        if name.file in files:
            return [name.file]
        if listing.cached:
            raise _not_cached(name)
        weights = [file for file in files if file.lower().endswith(WEIGHTS)]
        raise InputError(
            f"{HubName(name.repository, name.revision)} has no file {name.file}{suggest(name.file, files)}: it has "
            f"{_describe({file: files[file] for file in weights} or files)}"
        )
    if WEIGHTS_FILE in files and CONFIG_FILE in files:
        return [CONFIG_FILE, WEIGHTS_FILE]
    weights = [file for file in files if file.lower().endswith(WEIGHTS)]
    candidates = [file for file in weights if not STATES.fullmatch(PurePosixPath(file).name)] or weights
    if len(candidates) == 1:
        return candidates
    if candidates:
        raise InputError(
            f"{name} has {len(candidates)} files of weights, {_describe({file: files[file] for file in candidates})}: "
            f"write {name}:FILE"
        )
    if listing.cached:
        raise _not_cached(name)
    raise InputError(f"{name} has no file of weights ({', '.join(WEIGHTS)}): it has {_describe(files)}")


def _is_complete(name: HubName, listing: Listing) -> bool:
    """Return whether the files in the cache are those that the whole repository would be read from.

    Several files of weights that are not in the cache could make the only one that is there ambiguous.
    """
    if name.file is not None:
        return name.file in listing.files
    return {WEIGHTS_FILE, CONFIG_FILE} <= listing.files.keys()


def _list_cached(name: HubName) -> Listing | None:
    """Return the files of a repository that are in the cache, None if there are none."""
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
            if _is_network(error) and not isinstance(error, LocalEntryNotFoundError):
                raise SsmCompressError(
                    f"{name}: the download of {file} broke off ({_first_line(error)}); run the command again"
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


# ------------------------------------------------------------------------------------------------------------- errors


@contextmanager
def _explained(name: HubName, writes: bool = False) -> Iterator[None]:
    """Let all that goes wrong in the body of the with statement be an error in one line, without the Hub's own logs."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs every retry and how to log in; the error is enough
    try:
        yield
    except SsmCompressError:
        raise
    except Exception as error:  # the network, the Hub and damaged answers raise many kinds of errors
        raise explain(name, error, writes) from error
    finally:
        logger.setLevel(before)


def explain(name: HubName, error: BaseException, writes: bool = False) -> SsmCompressError:
    """Return the error of a request about a repository as one line: what was found and what to do.

    What the user named wrongly is an InputError; failures of the network and of the Hub are not. A name that is read
    could also have been meant as that of a local file, unless the request `writes`.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of a thread that uploads a file
        error = error.__cause__
    if str(error).startswith("Invalid metadata"):
        return InputError(f"{name}: the Hub refuses the card: {' '.join(str(error).split())[:300]}")
    locally = "" if writes else "no such file or folder, and "
    repository, page = name.repository, f"{constants.ENDPOINT}/{name.repository}"
    status = _status(error)
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{name} is gated: accept its conditions at {page}, then log in with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{name}: {locally}no model {repository} on the Hub; if it is private, log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repository} has no branch, tag or commit {name.revision or constants.DEFAULT_REVISION}")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return InputError(f"{name}: no such file in the repository, see {page}")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{name}: no name of the Hub ({_first_line(error)})")
    if _is_offline(error):
        return _not_cached(name)
    if status == 401:
        return InputError(f"{name}: the Hub refuses the token; log in again with `hf auth login`, or check HF_TOKEN")
    if status == 403:
        return InputError(f"{name}: the Hub allows no access ({_first_line(error)}); check the token's permissions")
    if status is not None:
        return SsmCompressError(f"{name}: the Hub answers {status} ({_first_line(error)}); try again later")
    if _is_network(error):
        return SsmCompressError(
            f"{name}: {locally}{constants.ENDPOINT} cannot be reached ({_first_line(_root(error))}); check the network"
        )
    if isinstance(error, OSError) and error.errno is None:  # a file that is shorter than it was said to be
        return SsmCompressError(f"{name}: the download ended early ({_first_line(error)}); run the command again")
    if isinstance(error, OSError):
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return SsmCompressError(f"{name}: the cache {constants.HF_HUB_CACHE} cannot be written: {what}")
    kind = "" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__} "
    return SsmCompressError(f"{name}: the answer of {constants.ENDPOINT} cannot be read ({kind}{_first_line(error)})")


def _not_cached(name: HubName) -> SsmCompressError:
    """Return the error for what only the cache could have, and has not."""
    from huggingface_hub import constants

    reason = "the Hub cannot be reached"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set; fetch it once without that"
    return SsmCompressError(f"{name}: no such file or folder, and it is not in the cache of the Hub: {reason}")


def _status(error: BaseException) -> int | None:
    """Return the status of the answer that an error is about, if there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(part, OfflineModeIsEnabled) for part in _chain(error))


def _is_network(error: BaseException) -> bool:
    """Return whether a request got no answer, or the Hub is down."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return (_status(error) or 0) >= 500
    libraries = ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    of_network = (ConnectionError, TimeoutError, LocalEntryNotFoundError)
    return isinstance(error, of_network) or type(error).__module__.partition(".")[0] in libraries


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def _root(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _describe(files: Mapping[str, int | None]) -> str:
    """Return the names of files with their sizes, `LISTED` of them at most."""
    listed = [file if size is None else f"{file} ({_size(size)})" for file, size in list(files.items())[:LISTED]]
    more = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    return ", ".join(listed) + more if listed else "no files"


def _size(count: int) -> str:
    """Return a number of bytes with a unit: 980 B, 4.1 kB, 102.3 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
