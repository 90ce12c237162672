"""Option groups: dataclasses whose fields are options, shared by the commands.

A command takes groups as parameters. A method of the group resolves its options together. The heading of an option in
`--help` is its `rich_help_panel`. Slow imports such as torch (two seconds) stay inside the methods, so that `--help`
responds immediately.
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
