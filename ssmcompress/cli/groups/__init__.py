"""Option groups: dataclasses whose fields are options, shared by the commands.

A command names the groups it takes as parameters; what the options of a group mean together is a method of the group.
The heading of an option in `--help` is its `rich_help_panel`. Heavy imports, as torch, which takes two seconds, stay
inside the methods, so that `--help` answers at once.
"""

from .hardware import Hardware, NoLatency, Processor
from .images import Batching, Data, Images, Measure, TrainingImages
from .model import Checkpoint, Dense, Load, MaybeModel, Model, Reading
from .onnx import Atol, OnnxFile, Provider
from .output import Force, ForceFolder, Output, Printing, ReportPrinting
from .pruning import Budget, Pruning, Stages
from .training import FinetuneToo, Training

__all__ = [
    "Atol",
    "Batching",
    "Budget",
    "Checkpoint",
    "Data",
    "Dense",
    "FinetuneToo",
    "Force",
    "ForceFolder",
    "Hardware",
    "Images",
    "Load",
    "MaybeModel",
    "Measure",
    "Model",
    "NoLatency",
    "OnnxFile",
    "Output",
    "Printing",
    "Processor",
    "Provider",
    "Pruning",
    "Reading",
    "ReportPrinting",
    "Stages",
    "Training",
    "TrainingImages",
]
