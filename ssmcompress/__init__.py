"""Post-training token pruning for vision state-space models.

    import ssmcompress

    model = ssmcompress.load("vim_tiny.pth")                       # images (B, C, H, W) -> logits
    plan = ssmcompress.calibrate(model, images, ratio=0.3)         # images: a tensor, or batches
    pruned = ssmcompress.prune(model, plan)                        # a new model; the first is untouched
    pruned = ssmcompress.reconstruct(pruned, model, images)        # later layers refitted, without training
    pruned = ssmcompress.finetune(pruned, batches, dense=model).model
    ssmcompress.evaluate(pruned, batches, dense=model)
    ssmcompress.save(pruned, "vim_tiny-r0.30")
    ssmcompress.export_onnx(pruned, "vim_tiny-r0.30.onnx")

Everything is imported when first used, so that `import ssmcompress` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import ops
    from .compression.calibrate import calibrate, make_plan
    from .compression.finetune.loop import finetune
    from .compression.finetune.recipe import Recipe
    from .compression.reconstruct import reconstruct
    from .evaluation.measure import evaluate
    from .export.onnx import OnnxOptions, export_onnx
    from .export.verify import verify_onnx
    from .jobs.finetune import finetune_folder
    from .jobs.prune import compress
    from .models.checkpoint import load, save
    from .models.rewrite import prune
    from .pruning.plan import Plan, Stage

_HOME = {
    "OnnxOptions": "export.onnx",
    "Plan": "pruning.plan",
    "Recipe": "compression.finetune.recipe",
    "Stage": "pruning.plan",
    "calibrate": "compression.calibrate",
    "compress": "jobs.prune",
    "evaluate": "evaluation.measure",
    "export_onnx": "export.onnx",
    "finetune": "compression.finetune.loop",
    "finetune_folder": "jobs.finetune",
    "load": "models.checkpoint",
    "make_plan": "compression.calibrate",
    "ops": "ops",
    "prune": "models.rewrite",
    "reconstruct": "compression.reconstruct",
    "save": "models.checkpoint",
    "verify_onnx": "export.verify",
}

__all__ = [
    "OnnxOptions",
    "Plan",
    "Recipe",
    "Stage",
    "__version__",
    "calibrate",
    "compress",
    "evaluate",
    "export_onnx",
    "finetune",
    "finetune_folder",
    "load",
    "make_plan",
    "ops",
    "prune",
    "reconstruct",
    "save",
    "verify_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ssmcompress' has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
