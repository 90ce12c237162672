"""Publishing a compressed model on the Hugging Face Hub, with a card and without local paths."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..hub_names import HubName, check_revision, is_repository
from ..models.hub import Target, inspect_target, read_license, upload
from ..models.saved import CONFIG_FILE, WEIGHTS_FILE
from .push_content import CARD_FILE, FILES, Content, list_graphs, read_content
from .push_copy import cleaned_copy
from .report import REPORT_FILE


@dataclass(frozen=True)
class PushRequest:
    """What is published, and where.

    Attributes:
        repository: owner/name; it is created if it does not exist.
        private: create a private repository; an existing public one is rejected.
        revision: the branch to write; None: the main one. message: of the commit.
        license: identifier of the licence on the Hub, such as "mit"; None: that of the dense model, if it is on the
            Hub.
        bars: whether huggingface_hub may show its progress bars.
        force: write into a repository with files that ssmcompress did not write.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    message: str | None = None
    license: str | None = None
    bars: bool = False
    force: bool = False

    @property
    def name(self) -> HubName:
        """The repository as a Hub name; InputError if it or its branch is invalid."""
        if not is_repository(self.repository):
            more = "; a branch is given by `revision`" if re.search("[@:]", self.repository) else ""
            raise InputError(f"{self.repository}: expected owner/name, a repository of the Hub{more}")
        if self.revision is not None:
            check_revision(self.revision)
        return HubName(self.repository, self.revision)


def push_folder(folder: str | Path, request: PushRequest, dry_run: bool = False) -> dict[str, Any]:
    """Upload the folder of a compressed model to the Hub, as one commit.

    The upload consists of the weights, config.json, report.json, recipe.yaml, the card, the pictures of the report and
    an exported ONNX file. Paths in them are reduced to their last component, and names of images are removed. The
    folder is not changed. Files of these kinds from an earlier upload that are not part of this one are deleted.

    Args:
        dry_run: show what would be uploaded; needs neither the network nor a token.

    Returns:
        A JSON object: `repository`, `revision`, `private`, `files` (name and size in bytes of each), `card`, and after
        an upload its `commit` and `url` and the names of the files `deleted`, else null.

    Raises:
        InputError: not a folder of a compressed model, no licence, no token, no permission, a public repository with
            `private`, or one with files that ssmcompress did not write, without `force`.
        SsmCompressError: the Hub cannot be reached.
    """
    name, content = request.name, read_content(Path(folder))
    license_name = request.license or find_license(content, dry_run)
    with cleaned_copy(Path(folder), content, name, license_name) as copy:
        files = {file: copy / file for file in content.files}
        result = {
            "repository": name.repository,
            "revision": name.revision,
            "private": request.private,
            "files": [{"name": file, "bytes": path.stat().st_size} for file, path in files.items()],
            "card": (copy / CARD_FILE).read_text(encoding="utf-8"),
            "commit": None,
            "url": None,
            "deleted": None,
        }
        if not dry_run:
            target = inspect_target(name, (CONFIG_FILE, REPORT_FILE))
            deleted = list_stale(target, request, content.files)
            message = request.message or f"Upload {name.title}, compressed with ssmcompress"
            options = {"deleted": deleted, "private": request.private, "bars": request.bars}
            result["commit"], result["url"] = upload(name, files, message, **options)
            result["deleted"] = deleted
    return result


def list_stale(target: Target | None, request: PushRequest, files: Collection[str]) -> list[str]:
    """Return the files in a repository that belong to an earlier upload and are not among the `files` of this one.

    Raises:
        InputError: the repository is public although `private` is set, or has files that ssmcompress did not write.
    """
    if target is None:
        return []
    if request.private and not target.private:
        raise InputError(
            f"{request.repository} exists and is public: choose another name, or make it private on the Hub first"
        )
    config = target.contents.get(CONFIG_FILE, {})
    if not {"format_version", "pruning"} <= config.keys():
        foreign = sorted(set(target.files) - {".gitattributes"})
        if foreign and not request.force:
            listed = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise InputError(
                f"{request.repository} exists and has files that ssmcompress did not write ({listed}): choose "
                "another name, or upload anyway with `force=True`"
            )
        return []
    own = {WEIGHTS_FILE, *FILES, *list_graphs(target.contents.get(REPORT_FILE, {}))}
    return sorted(own & set(target.files) - set(files))


def find_license(content: Content, dry_run: bool) -> str | None:
    """Return the licence of the dense model; None in a dry run, which does not look it up.

    Raises:
        InputError: the dense model is not on the Hub, or states no licence.
    """
    advice = (
        "give `license`, such as mit or apache-2.0: the licence of the dense model's weights also covers these weights"
    )
    if content.source is None:
        raise InputError(f"the licence of the weights is not known; {advice}")
    if dry_run:
        return None
    if (found := read_license(content.source)) is None:
        raise InputError(f"{content.source.repository} states no licence; {advice}")
    return found
