"""Recipes: all settings of fine-tuning, apart from the model and the images."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError, suggest
from ...files import read_text

if TYPE_CHECKING:
    from ...tasks import Task

PRECISIONS = ("auto", "float32", "bfloat16")
# Fields that apply to one task only, by its name; their defaults turn the option off or are the usual values.
TASK_VALUES = {
    "classification": ("smoothing", "mixup", "cutmix", "randaugment", "erasing", "crop"),
    "segmentation": ("min_scale", "max_scale", "jitter"),
}


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of fine-tuning; the defaults are a short recipe with the dense model as teacher.

    Attributes:
        epochs: passes over the training images. batch_size: images per step, over all processes; even.
        accumulate: number of micro-batches in which each process computes its share of a step.
        lr: peak learning rate for `lr_images` images per step, scaled linearly for other batch sizes. It rises from
            `warmup_lr` over `warmup` (share of all steps), then decays to `min_lr` along a cosine; `warmup_lr` and
            `min_lr` are not scaled.
        weight_decay: AdamW's, for matrices only. beta2: AdamW's. clip_grad: largest norm of the gradient, 0: no limit.
        norms: whether to train the norm layers as well; False freezes all of them.
        teacher: weight of the teacher, KL(teacher || model) on logits, 0 to 1; the labels have the remaining weight.
            Without labels the teacher has all the weight, without a teacher the labels.
        temperature: in the KL, the logits of both models are divided by it, and the KL is multiplied by its square.
        features: weight of an additional term, 1 - cosine similarity of the kept tokens' last features and the
            teacher's; 0 without a teacher. On the bundled model 0, 1 and 10 gave 89.58, 89.71 and 89.15 % top-1, one
            run each.
        smoothing: label smoothing. mixup, cutmix: their alphas, 0: off. randaugment: timm's config string, "": off.
        erasing: probability of random erasing. crop: smallest share of an image's area in a random crop.
        flip: probability of a horizontal flip.
        min_scale, max_scale: for segmentation, the range of random scales of an image before it is cropped to the
            model's image size.
        jitter: for segmentation, the largest relative change of brightness, contrast and saturation; the hue changes
            by up to a fifth of it, in turns.
        ema: decay of the moving average of the weights, 0: none; the average is used if it scores better.
        ramp: share of the steps over which the pruning ratios rise from 0 to their targets.
        dtype: autocast dtype: float32, bfloat16, or auto: bfloat16 on GPUs that support it.
    """

    epochs: int = 3
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 2e-3
    lr_images: int = 32
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip_grad: float = 1.0
    norms: bool = False
    teacher: float = 0.5
    temperature: float = 1.0
    features: float = 1.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: str = ""
    erasing: float = 0.0
    crop: float = 1.0
    flip: float = 0.5
    min_scale: float = 0.5
    max_scale: float = 2.0
    jitter: float = 0.4
    ema: float = 0.999
    ramp: float = 0.0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        def expect(name: str, valid: bool, what: str) -> None:
            if not valid:
                raise InputError(f"recipe: {name} {getattr(self, name)!r}: expected {what}")

        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float":
                number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                expect(field.name, number and value >= 0, "a number, 0 or above")
            elif field.type == "int":
                expect(field.name, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "1 or more")
            else:
                expect(
                    field.name, type(value).__name__ == field.type, {"bool": "true or false"}.get(field.type, "text")
                )
        expect("batch_size", self.batch_size % 2 == 0, "an even number: images are mixed in pairs")
        for name in ("warmup", "teacher", "smoothing", "erasing", "flip", "ramp"):
            expect(name, getattr(self, name) <= 1, "0 to 1")
        for name in ("smoothing", "ema", "beta2"):
            expect(name, getattr(self, name) < 1, "0 to below 1")
        expect("crop", 0 < self.crop <= 1, "above 0 to 1")
        expect("min_scale", self.min_scale > 0, "above 0")
        expect("max_scale", self.min_scale <= self.max_scale <= 16, f"min_scale, {self.min_scale:g}, to 16")
        expect("jitter", self.jitter <= 1, "0 to 1")
        expect("temperature", self.temperature > 0, "above 0")
        expect("dtype", self.dtype in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        if self.randaugment:
            operations = re.search(r"-n(\d+)", self.randaugment)
            expect("randaugment", not operations or len(operations[1]) < 3, "fewer than 100 operations (-n)")
            from timm.data.auto_augment import rand_augment_transform

            try:
                rand_augment_transform(self.randaugment, {})
            except Exception as error:  # its parser raises asserts and other errors
                expect("randaugment", False, f"a timm string such as rand-m9-mstd0.5-inc1 ({error})")

    def check_task(self, task: Task) -> None:
        """Raise an InputError that names non-default values that apply only to tasks other than the model's."""
        default = Recipe()
        for other, names in TASK_VALUES.items():
            wrong = [name for name in names if getattr(self, name) != getattr(default, name)]
            if other == task.name or not wrong:
                continue
            found = ", ".join(f"{name} {getattr(self, name)!r}" for name in wrong)
            expected = ", ".join(f"{name} {getattr(default, name)!r}" for name in wrong)
            raise InputError(
                f"recipe: {found}: only for {other}, and the model is for {task.title}: expected {expected}"
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def scaled_lr(self, images: int) -> float:
        """Return the peak learning rate for steps of `images` images."""
        return self.lr * images / self.lr_images

    def with_changes(self, assignments: Sequence[str]) -> Recipe:
        """Return a recipe with assignments like "mixup=0.8" applied; InputError for unknown names or invalid values."""
        types = {field.name: field.type for field in fields(self)}
        changes: dict[str, Any] = {}
        for text in assignments:
            name, equals, value = text.partition("=")
            if not equals and name in types:
                raise InputError(f"{text}: expected {name}=VALUE")
            if not equals or name not in types:
                hint = suggest(name, types) or "; docs/finetune.md lists the names"
                raise InputError(f"{text}: expected NAME=VALUE with the name of a value of the recipe{hint}")
            try:
                changes[name] = value if types[name] == "str" else json.loads(value)
            except ValueError as error:
                raise InputError(f"{text}: expected a value of type {types[name]}") from error
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        """Read a recipe from JSON. Missing fields come from `recipe`, a name in `RECIPES`, or from the defaults."""
        if not isinstance(value, Mapping):
            raise InputError(f"not a recipe: expected a JSON object, found a {type(value).__name__}")
        changes = dict(value)
        base = changes.pop("recipe", "default")
        if not isinstance(base, str) or base not in RECIPES:
            raise InputError(
                f"unknown recipe {base!r}: expected one of {', '.join(RECIPES)}{suggest(str(base), RECIPES)}"
            )
        unknown = sorted(map(str, set(changes) - {field.name for field in fields(cls)}))
        if unknown:
            names = asdict(RECIPES[base])
            hint = suggest(unknown[0], names) or "; docs/finetune.md lists the names"
            raise InputError(f"a recipe has no {', '.join(unknown[:3])}{hint}")
        return replace(RECIPES[base], **changes)

    @classmethod
    def from_name(cls, name: str) -> Recipe:
        """Return the recipe of this name in `RECIPES`, or the one in the JSON file of this name."""
        if name in RECIPES:
            return RECIPES[name]
        try:
            return cls.from_dict(json.loads(read_text(Path(name))))
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        except OSError as error:
            names = ", ".join(RECIPES)
            raise InputError(
                f"recipe {name}: expected one of {names}, or a JSON file{suggest(name, RECIPES)}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}: not JSON ({error})") from error


RECIPES = {
    "default": Recipe(),
    # ToP-ViM's (arXiv 2409.18962): DeiT's augmentations, no teacher; five of DeiT's epochs warm up.
    "top-vim": Recipe(
        epochs=30, batch_size=512, lr=5e-6, lr_images=512, warmup_lr=1e-5, min_lr=1e-5, warmup=5 / 30,
        weight_decay=1e-8, beta2=0.999, clip_grad=0.0, norms=True, teacher=0.0, features=0.0, smoothing=0.1,
        mixup=0.8, cutmix=1.0, erasing=0.25, crop=0.08, randaugment="rand-m9-mstd0.5-inc1", ema=0.0, dtype="float32",
    ),
}  # fmt: skip
