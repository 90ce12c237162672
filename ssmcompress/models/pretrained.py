"""Methods to load and save a model, named as in huggingface_hub's `PyTorchModelHubMixin`.

They call public functions of the package by name, because the modules of those functions import the models, which are
built on this module.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import InputError
from ..hub_names import at_revision

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class PretrainedModel(nn.Module):
    """The part of `TokenModel` that reads and writes folders."""

    def save_pretrained(self, save_directory: str | Path, *, force: bool = False) -> Path:
        """Write a folder that `from_pretrained` and `ssmcompress.load` can read, as `ssmcompress.save` does.

        Args:
            save_directory: the folder to write. force: replace it if it exists.

        Raises:
            InputError: the folder exists, or cannot be written.
        """
        return _public("save")(self, save_directory, force=force)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **options: Any
    ) -> Self:
        """Load a model of this class (of any class if called on `TokenModel`), as `ssmcompress.load` does.

        Args:
            pretrained_model_name_or_path: a folder or file, or a name on the Hugging Face Hub. An existing path takes
                precedence, and a `Path` is always local.
            revision: a branch, tag or commit of the Hub; None: the default branch. options: those of `load`.

        Raises:
            InputError: as `load`; also for a `revision` of a local path, or a model of another class.
        """
        name = pretrained_model_name_or_path
        if revision is not None:
            name = str(at_revision(name, revision))
        model = _public("load")(name, **options)
        if not isinstance(model, cls):
            raise InputError(f"{name} is a {type(model).__name__}: expected a {cls.__name__}, or use ssmcompress.load")
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool = False,
        license: str | None = None,
        branch: str | None = None,
        force: bool = False,
    ) -> str:
        """Upload a compressed model to the Hugging Face Hub, as the command `push` does, and return its URL.

        The model card has no report; the command also uploads the report of a folder.

        Args:
            repo_id: owner/name; the repository is created if it does not exist. private: create a private repository;
                an existing public one is rejected.
            commit_message: None: a message that names the model. branch: None: the main branch.
            license: licence identifier of the Hub, such as "mit"; None: the licence of the dense model, if it is on the
                Hub.
            force: write into a repository with files that were not written by ssmcompress.

        Raises:
            InputError: the model is dense, there is no licence, token or permission, the repository is public although
                `private` is set, or it has foreign files. SsmCompressError: the Hub cannot be reached.
        """
        request = _public("PushRequest")(
            repository=repo_id, private=private, revision=branch, message=commit_message, license=license, force=force
        )
        with TemporaryDirectory() as folder:
            return _public("push_folder")(self.save_pretrained(Path(folder) / "model"), request)["url"]


def _public(name: str) -> Any:
    """Return a public function of the package, which is always imported before its submodules."""
    return getattr(sys.modules[__name__.partition(".")[0]], name)
