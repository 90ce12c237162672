"""Methods of a model that read and write it, under the names of huggingface_hub's `PyTorchModelHubMixin`.

They call public functions of the package, in whose modules models are known: this one, which models are made of, knows
none of them.
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
        """Write a folder that `from_pretrained` and `ssmcompress.load` read, as `ssmcompress.save` does.

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
        """Load a model, of this class or for `TokenModel` of any, as `ssmcompress.load` does.

        Args:
            pretrained_model_name_or_path: a folder or file, or a name of the Hugging Face Hub. A path that exists comes
                first, and a `Path` is always local.
            revision: a branch, tag or commit of the Hub; None: the default branch. options: those of `load`.

        Raises:
            InputError: as `load`; a `revision` of a local path; or a model of another class.
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
        """Upload a compressed model to the Hugging Face Hub, as the command `push` does, and return its address.

        It has a card without a report; the command uploads the report of a folder, too.

        Args:
            repo_id: owner/name; it is created if it does not exist. private: create a private one; a public one that
                exists is refused.
            commit_message: None: one that names the model. branch: None: the main one.
            license: identifier of the licence on the Hub, as "mit"; None: that of the dense model, if it is on the Hub.
            force: write into a repository with files that ssmcompress did not write.

        Raises:
            InputError: a dense model, no licence, no token, no permission, a public repository where `private` is
                asked for, or one with files of others. SsmCompressError: the Hub cannot be reached.
        """
        request = _public("PushRequest")(
            repository=repo_id, private=private, revision=branch, message=commit_message, license=license, force=force
        )
        with TemporaryDirectory() as folder:
            return _public("push_folder")(self.save_pretrained(Path(folder) / "model"), request)["url"]


def _public(name: str) -> Any:
    """Return a public function of the package, which is always imported before its modules."""
    return getattr(sys.modules[__name__.partition(".")[0]], name)
