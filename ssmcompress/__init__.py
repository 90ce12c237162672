"""Post-training token pruning for vision state-space models.

    import ssmcompress

    model = ssmcompress.load("vim_tiny.pth")                       # images (B, C, H, W) -> logits
    plan = ssmcompress.calibrate(model, "images", ratio=0.3)       # a folder; or batches, a loader, a tensor
    pruned = ssmcompress.prune(model, plan)                        # a new model; the first is untouched
    pruned = ssmcompress.reconstruct(pruned, model, "images")      # later layers refitted, without training
    pruned = ssmcompress.finetune(pruned, "images", dense=model).model
    ssmcompress.evaluate(pruned, "images", dense=model)
    ssmcompress.save(pruned, "vim_tiny-r0.30")
    ssmcompress.export_onnx(pruned, "vim_tiny-r0.30.onnx")

Everything is imported on first use, so that `import ssmcompress` alone is fast. It configures how OpenMP threads wait,
unless torch is already imported or the environment configures it (`ssmcompress.openmp`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import openmp
from ._version import __version__

if TYPE_CHECKING:
    from . import ops
    from .compression.calibrate import calibrate
    from .compression.finetune.loop import finetune
    from .compression.finetune.recipe import Recipe
    from .compression.reconstruct import reconstruct
    from .compression.reconstruct.levels import map_levels
    from .compression.trim.channels import trim_channels
    from .compression.trim.layers import drop_directions, drop_layers
    from .compression.trim.states import trim_states
    from .data.batches import Batches
    from .data.find import open_images
    from .errors import BudgetError, InputError, SsmCompressError, SsmCompressWarning, VerificationError
    from .evaluation.attention_maps import attention_maps
    from .evaluation.flops import flops
    from .evaluation.measure import evaluate
    from .export.onnx import OnnxOptions, export_onnx
    from .export.verify import verify_onnx
    from .jobs.finetune import finetune_folder
    from .jobs.functions import compare, fit_budget, search
    from .jobs.prune import compress
    from .jobs.push import PushRequest, push_folder
    from .models.checkpoint import load
    from .models.dense_weights import dense_state_dict
    from .models.rewrite import make_plan, prune
    from .models.saved import read_plan, save
    from .pruning.plan import Plan, Stage

_HOME = {
    "Batches": "data.batches",
    "BudgetError": "errors",
    "InputError": "errors",
    "OnnxOptions": "export.onnx",
    "Plan": "pruning.plan",
    "Recipe": "compression.finetune.recipe",
    "SsmCompressError": "errors",
    "SsmCompressWarning": "errors",
    "Stage": "pruning.plan",
    "VerificationError": "errors",
    "attention_maps": "evaluation.attention_maps",
    "calibrate": "compression.calibrate",
    "compare": "jobs.functions",
    "compress": "jobs.prune",
    "dense_state_dict": "models.dense_weights",
    "drop_directions": "compression.trim.layers",
    "drop_layers": "compression.trim.layers",
    "evaluate": "evaluation.measure",
    "export_onnx": "export.onnx",
    "finetune": "compression.finetune.loop",
    "finetune_folder": "jobs.finetune",
    "fit_budget": "jobs.functions",
    "flops": "evaluation.flops",
    "load": "models.checkpoint",
    "make_plan": "models.rewrite",
    "open_images": "data.find",
    "ops": "ops",
    "prune": "models.rewrite",
    "push_folder": "jobs.push",
    "PushRequest": "jobs.push",
    "read_plan": "models.saved",
    "map_levels": "compression.reconstruct.levels",
    "reconstruct": "compression.reconstruct",
    "save": "models.saved",
    "search": "jobs.functions",
    "trim_channels": "compression.trim.channels",
    "trim_states": "compression.trim.states",
    "verify_onnx": "export.verify",
}

__all__ = [
    "Batches",
    "BudgetError",
    "InputError",
    "OnnxOptions",
    "Plan",
    "PushRequest",
    "Recipe",
    "SsmCompressError",
    "SsmCompressWarning",
    "Stage",
    "VerificationError",
    "__version__",
    "attention_maps",
    "calibrate",
    "compare",
    "compress",
    "dense_state_dict",
    "drop_directions",
    "drop_layers",
    "evaluate",
    "export_onnx",
    "finetune",
    "finetune_folder",
    "fit_budget",
    "flops",
    "load",
    "make_plan",
    "map_levels",
    "open_images",
    "ops",
    "prune",
    "push_folder",
    "read_plan",
    "reconstruct",
    "save",
    "search",
    "trim_channels",
    "trim_states",
    "verify_onnx",
]

openmp.prepare()

if not TYPE_CHECKING:  # otherwise type checkers would assume that any name exists

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'ssmcompress' has no attribute {name!r}")
        module = import_module(f".{_HOME[name]}", __name__)
        value = module if name == "ops" else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
