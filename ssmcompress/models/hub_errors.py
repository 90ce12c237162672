"""One-line error messages for failures of the Hugging Face Hub: the cause and the remedy."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError, SsmCompressError, raise_if_out_of_memory
from ..hub_names import HubName


@contextmanager
def explained(name: HubName, writes: bool = False) -> Iterator[None]:
    """Turn any failure in the body of the with statement into a one-line error, and silence the Hub's own logs."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs every retry and how to log in; the error is enough
    try:
        yield
    except SsmCompressError:
        raise
    except Exception as error:  # network, Hub and damaged responses raise many kinds of errors
        raise_if_out_of_memory(error)
        raise explain(name, error, writes) from error
    finally:
        logger.setLevel(before)


def explain(name: HubName, error: BaseException, writes: bool = False) -> SsmCompressError:
    """Return the error of a request about a repository as one line: the cause and the remedy.

    Wrong names given by the user are InputErrors; failures of the network or the Hub are not. Unless the request
    `writes`, the user may have meant a local file by the name.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # from a thread that uploads a file
        error = error.__cause__
    if str(error).startswith("Invalid metadata"):
        return InputError(f"{name}: the Hub rejects the model card: {' '.join(str(error).split())[:300]}")
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
        return InputError(f"{name}: not a valid Hub name ({first_line(error)})")
    if is_offline(error):
        return not_cached(name)
    if status == 401:
        return InputError(f"{name}: the Hub rejects the token; log in again with `hf auth login`, or check HF_TOKEN")
    if status == 403:
        return InputError(f"{name}: the Hub denies access ({first_line(error)}); check the token's permissions")
    if status is not None:
        return SsmCompressError(f"{name}: the Hub returned status {status} ({first_line(error)}); try again later")
    if is_network(error):
        return SsmCompressError(
            f"{name}: {locally}{constants.ENDPOINT} cannot be reached ({first_line(_root(error))}); check the network"
        )
    if isinstance(error, OSError) and error.errno is None:  # a file is shorter than announced
        return SsmCompressError(f"{name}: the download ended early ({first_line(error)}); run the command again")
    if isinstance(error, OSError):
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return SsmCompressError(f"{name}: the cache {constants.HF_HUB_CACHE} cannot be written: {what}")
    kind = "" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__} "
    return SsmCompressError(f"{name}: the response of {constants.ENDPOINT} cannot be read ({kind}{first_line(error)})")


def not_cached(name: HubName) -> SsmCompressError:
    """Return the error for a file that is needed offline but is not in the cache."""
    from huggingface_hub import constants

    reason = "the Hub cannot be reached"
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set; fetch it once without that"
    return SsmCompressError(f"{name}: no such file or folder, and it is not in the cache of the Hub: {reason}")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of the response that caused an error, if there was one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_offline(error: BaseException) -> bool:
    """Return whether a request was not made because HF_HUB_OFFLINE is set."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(part, OfflineModeIsEnabled) for part in _chain(error))


def is_network(error: BaseException) -> bool:
    """Return whether a request got no response, or the Hub is down."""
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


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error, truncated to 200 characters; its type if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
