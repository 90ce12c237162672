"""Options of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ...errors import InputError
from ...extras import require_extra
from ..options import FINETUNING, option
from ..values import parse_share

if TYPE_CHECKING:
    from ...compression.finetune.recipe import Recipe
    from ...jobs.finetune import FinetuneOptions


@dataclass(frozen=True)
class Training:
    """How to fine-tune."""

    recipe: Annotated[
        str,
        option(
            FINETUNING,
            help="Fine-tuning recipe: default, top-vim (the paper's), or a JSON file with changes to one of them.",
        ),
    ] = "default"
    recipe_changes: Annotated[
        list[str] | None,
        option(
            FINETUNING,
            "--set",
            metavar="NAME=VALUE",
            help="Change a value of the recipe (lr=2e-3, mixup=0.8); repeatable.",
        ),
    ] = None
    ramp: Annotated[
        str | None,
        option(FINETUNING, help="Share of the fine-tuning over which pruning increases from none to its target, 50%."),
    ] = None
    tensorboard: Annotated[str | None, option(FINETUNING, help="Folder for TensorBoard logs of the fine-tuning.")] = (
        None
    )

    def options(self, epochs: int | None, teacher: bool = True) -> FinetuneOptions:
        """Return the options as the library takes them."""
        require_extra("finetune")
        if self.tensorboard is not None:
            require_extra("tensorboard")
        from ...jobs.finetune import FinetuneOptions

        return FinetuneOptions(self._recipe(epochs), teacher, self.tensorboard)

    def _recipe(self, epochs: int | None) -> Recipe:
        from ...compression.finetune.recipe import Recipe

        values = {"epochs": epochs, "ramp": parse_share(self.ramp, "--ramp")}
        given = [f"{key}={value}" for key, value in values.items() if value is not None]
        return Recipe.from_name(self.recipe).with_changes([*(self.recipe_changes or []), *given])


@dataclass(frozen=True)
class FinetuneToo(Training):
    """Fine-tuning as a step after another one."""

    finetune_epochs: Annotated[
        int | None,
        option(FINETUNING, min=1, help="Epochs to fine-tune on --data, with the dense model as teacher."),
    ] = None

    def options_if_asked(self) -> FinetuneOptions | None:
        """Return the options as the library takes them, or None without fine-tuning.

        Raises:
            InputError: a fine-tuning option is given, but fine-tuning is not requested.
        """
        given = {
            "--recipe": self.recipe != "default", "--set": self.recipe_changes, "--ramp": self.ramp is not None,
            "--tensorboard": self.tensorboard,
        }  # fmt: skip
        if self.finetune_epochs is not None:
            return self.options(self.finetune_epochs)
        if unused := [name for name, value in given.items() if value]:
            raise InputError(f"{', '.join(unused)}: options of fine-tuning, but --finetune-epochs is not given")
        return None
