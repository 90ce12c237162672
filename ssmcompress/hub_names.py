"""Names of models on the Hugging Face Hub, as opposed to local paths and URLs; nothing is downloaded here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from .errors import InputError
from .suffixes import IMAGE_SUFFIXES, TABLE_SUFFIXES

WEIGHTS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")
TEXTS = (".json", ".html", ".md", ".yaml", ".csv")
# Names with these suffixes are local files: with its single slash, runs/model.pth would also be a valid Hub name.
LOCAL = (*WEIGHTS, *TEXTS, *IMAGE_SUFFIXES, *TABLE_SUFFIXES, ".onnx", ".tar", ".gz", ".zip", ".pkl", ".npz", ".yml")
FORMS = "owner/name, owner/name@revision or owner/name:folder/file.pth"

# Characters that the Hub allows; lengths are checked separately.
_PART = r"(?![.-])(?![\w.-]*(?:--|\.\.))[\w.-]+(?<![.-])"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}(?<!\.git)", re.ASCII)
_REVISION = re.compile(r"[^@:\\\s]+")
_NAME = re.compile(
    rf"(?P<repository>[^/@:\\]+/[^/@:\\]+)(?:@(?P<revision>{_REVISION.pattern}))?(?::(?P<file>[^:\\]+))?"
)
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_NO_OWNERS = {"datasets", "spaces", "kernels", "buckets", "models", "api", "docs", "blog", "papers", "collections"}


@dataclass(frozen=True)
class HubName:
    """A model on the Hugging Face Hub.

    Attributes:
        repository: owner/name. revision: a branch, tag or commit; None: the main branch.
        file: path of a file in the repository; None: the model of the repository.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    @property
    def title(self) -> str:
        """The name of a folder created from it: the file name without suffix, or the repository without owner."""
        return PurePosixPath(self.file).stem if self.file else self.repository.partition("/")[2]

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{at}" + (f":{self.file}" if self.file else "")


def parse_hub_name(name: str | Path) -> HubName | None:
    """Parse a Hub name; return None if the name is a local path, which exists or looks like one.

    Args:
        name: a text; a `Path` is local, and so is a name with control characters, which no repository has.

    Raises:
        InputError: a URL.
    """
    if isinstance(name, Path):
        return None
    check_no_address(name)
    if name.startswith((".", "/", "~")) or not name.isprintable() or _exists(name):
        return None
    match = _NAME.fullmatch(name)
    if match is None or not is_repository(match["repository"]):
        return None
    if match["revision"] is None and match["file"] is None and name.lower().endswith(LOCAL):
        return None
    if not all(_is_inside(text) for text in (match["revision"], match["file"]) if text is not None):
        return None
    return HubName(**match.groupdict())


def at_revision(name: str | Path, revision: str) -> HubName:
    """Return a model on the Hub at the given revision.

    Raises:
        InputError: the name is a local path, or already has a revision; or the revision is not a valid name.
    """
    hub = parse_hub_name(name)
    if hub is None:
        what = "a local path" if isinstance(name, Path) or _exists(name) else "not a Hub name"
        raise InputError(f"{name} is {what}: `revision` is for names of the Hub, {FORMS}")
    if hub.revision is not None:
        raise InputError(f"{name} has a revision, {hub.revision}, and `revision` is {revision!r}: give one of them")
    check_revision(revision)
    return replace(hub, revision=revision)


def check_revision(revision: str) -> None:
    """Raise an InputError if a text is not a valid name of a branch, tag or commit on the Hub."""
    if not (_REVISION.fullmatch(revision) and revision.isprintable() and _is_inside(revision)):
        raise InputError(f"`revision` {revision!r}: expected a branch, tag or commit, such as v1.0")


def _is_inside(path: str) -> bool:
    """Return whether a path in a repository has no component that leads outside."""
    return not {"", ".", ".."} & set(path.split("/"))


def is_repository(name: str) -> bool:
    """Return whether a text has the form owner/name of a repository."""
    return _REPOSITORY.fullmatch(name) is not None and max(map(len, name.split("/"))) <= 96


def check_no_address(text: str | None) -> None:
    """Raise an InputError if a text is a URL; for a model on the Hub, the message suggests its name."""
    if text is None or not _ADDRESS.match(text):
        return
    name = _parse_address(text)
    advice = "download the file, and name that" if name is None else f"write {name}"
    raise InputError(f"{text} is a web address: {advice}")


def _parse_address(address: str) -> HubName | None:
    """Return the model on the Hub that a URL refers to, None if there is none."""
    try:
        parts = urlsplit(address)
        own = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    except ValueError:  # such as an unclosed bracket
        return None
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    if parts.scheme == "hf":
        segments.insert(0, parts.netloc)  # hf://owner/name
    elif parts.scheme not in ("http", "https") or parts.netloc not in {*_HOSTS, own.netloc}:
        return None
    if segments[:1] == ["models"]:
        segments = segments[1:]
    if len(segments) < 2 or segments[0] in _NO_OWNERS:
        return None
    owner, name, *rest = segments
    name, _, revision = name.partition("@")
    if not is_repository(f"{owner}/{name}") or not "".join((revision, *rest)).isprintable():
        return None
    file = None
    if parts.scheme == "hf":
        file = "/".join(rest)
    elif len(rest) >= 2 and rest[0] in ("resolve", "blob", "raw", "tree"):
        revision = rest[1] if rest[1] != "main" else ""
        file = "/".join(rest[2:]) if rest[0] != "tree" else None
    return HubName(f"{owner}/{name}", revision or None, file or None)


def name_model(name: str | Path) -> str:
    """Return the name of a folder created from a model: its file name without suffix, or its folder name."""
    if (hub := parse_hub_name(name)) is not None:
        return hub.title
    path = Path(name)
    return path.resolve().name if path.is_dir() else path.stem  # a folder may be "."; a link to a file keeps its name


def _exists(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except (OSError, ValueError):  # too long, or contains a null character
        return False
