"""A model as an ONNX file, and the proof that the file computes what the model computes."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batches
from .checkpoint import describe
from .data import find_images
from .errors import InputError, VerificationError
from .files import check_target, write_file
from .models.base import Decision, TokenModel
from .ops import use_backend
from .ops.onnx import DOMAIN
from .ops.onnx_functions import function_text

OPSET = 20
from .progress import track

if TYPE_CHECKING:
    import onnx

ATOL = 1e-4
VERIFY_IMAGES = 33  # four batches of 8 and one of 1
KEPT_PREFIX = "kept_after_"


@dataclass(frozen=True)
class Verification:
    """How an ONNX file compares with the model it was made from.

    Attributes:
        images: how many were run through both. data: where they came from.
        max_difference: the largest difference of a logit, over the images whose kept tokens are the same.
        top1_agreement: percent of all images given the same class.
        ties: images that kept other tokens because two scores were equal but for rounding, named.
        mismatches: images that kept other tokens for no such reason, named.
        atol: what max_difference was allowed to be.
    """

    images: int
    data: str
    max_difference: float
    top1_agreement: float
    ties: list[str]
    mismatches: list[str]
    atol: float

    @property
    def passed(self) -> bool:
        """Whether the file may be trusted: a NaN fails, too."""
        same = self.max_difference <= self.atol and self.top1_agreement == 100
        return same and not self.mismatches and len(self.ties) < self.images


def export_onnx(
    model: TokenModel,
    file: str | Path,
    *,
    data: str | Path | None = None,
    atol: float = ATOL,
    force: bool = False,
) -> Verification:
    """Write `model`, pruned or dense, as an ONNX file with a dynamic batch, after checking it in onnxruntime.

    The scans become ONNX `Scan`, kept counts are static, input `images` is prepared as `model.preprocessing`
    says, output `logits`. Preprocessing and pruning are recorded in the file's metadata.

    Args:
        data: images to verify on, as `open_images` takes them; None: those the model names, else photographs.
        atol: allowed difference of a logit.

    Raises:
        VerificationError: the graph computes something else; no file is written.
        InputError: the file exists, or cannot be written.
    """
    check_target(Path(file), force)
    graph = build_onnx(model)
    result = verify_onnx(model, graph, data=data, atol=atol)
    write_file(Path(file), graph.SerializeToString(), force)
    return result


def build_onnx(model: TokenModel) -> onnx.ModelProto:
    """The graph of `model`, checked by onnx but not run."""
    import onnx

    model = copy.deepcopy(model).cpu().eval()
    config = model.config
    example = torch.zeros(2, config.in_chans, *config.image_size)
    kept = [f"{KEPT_PREFIX}{layer}" for layer in model.pruners]
    with use_backend("onnx"), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _WithKept(model),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", *kept],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    graph = program.model_proto
    _strip(graph)
    names = {node.op_type for node in graph.graph.node if node.domain == DOMAIN}
    graph.functions.extend(onnx.parser.parse_function(function_text(name, OPSET)) for name in sorted(names))
    onnx.helper.set_model_props(graph, {"ssmcompress": json.dumps(_public(describe(model)))})
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _public(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the paths of the machine it was made on: an ONNX file is made to be given away.

    So without the record of the reconstruction, too, which names the data.
    """
    pruning = config["pruning"]
    if pruning is not None:
        pruning = {k: v for k, v in pruning.items() if k not in ("source", "command", "reconstruction")}
        pruning["source"] = {"sha256": config["pruning"]["source"]["sha256"]}
    return {**config, "data": None, "pruning": pruning}


class _WithKept(nn.Module):
    def __init__(self, model: TokenModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        logits, decisions = self.model.trace(images)
        return logits, *(decision.kept for decision in decisions)


def _strip(graph: onnx.ModelProto) -> None:
    """Leave `logits` as the only output, the kept positions as named values, and no traces of this machine."""
    del graph.graph.output[1:]
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.input, *graph.graph.output,
                 *graph.graph.value_info, *graph.graph.initializer):  # fmt: skip
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def _quiet():
    """The exporter prints to stdout, which belongs to this program's own output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def verify_onnx(
    model: TokenModel,
    graph: onnx.ModelProto | str | Path,
    *,
    data: str | Path | None = None,
    atol: float = ATOL,
) -> Verification:
    """Run an ONNX file in onnxruntime and the model in torch on the same real images, in batches of 8 and of 1.

    Raises:
        VerificationError: they differ by more than `atol`, in a class, or in the tokens kept.
        InputError: not an ONNX file, or one of another model.
    """
    run, outputs = _session(model, graph)
    images = find_images(model, data)
    chosen = np.unique(np.linspace(0, len(images) - 1, VERIFY_IMAGES).round().astype(int)).tolist()
    batches = Batches(images, model, chosen, batch_size=8)
    worst, same, count = 0.0, 0, 0
    ties, mismatches = [], []
    for batch in track(batches, "verifying", len(batches)):
        with torch.no_grad():
            expected, decisions = model.trace(batch.images.to(next(model.parameters()).device))
        expected = expected.float().cpu().numpy()
        found, *kept = run(batch.images.numpy())
        if found.shape != expected.shape:
            raise InputError(f"the ONNX file gives logits {found.shape}, the model {expected.shape}")
        for row, index in enumerate(batch.index):
            count += 1
            same += int(found[row].argmax() == expected[row].argmax())
            verdict = _compare_kept(decisions, kept, row) if outputs else "same"
            if verdict == "same":
                difference = float(np.abs(found[row] - expected[row]).max())
                worst = float(np.maximum(worst, difference))  # a NaN stays
            else:
                (ties if verdict == "tie" else mismatches).append(images.describe(index))
    result = Verification(count, images.name, worst, 100 * same / count, ties, mismatches, atol)
    if not result.passed:
        other = f", {len(mismatches)} keep other tokens ({', '.join(mismatches[:3])})" if mismatches else ""
        raise VerificationError(
            f"the ONNX graph does not compute what the model does: largest difference {worst:.3g} (allowed {atol:g}), "
            f"{result.top1_agreement:.1f}% of {count} images in the same class{other}",
            result,
        )
    return result


def _session(model: TokenModel, graph: Any) -> tuple[Any, list[str]]:
    """(images -> [logits, kept positions per stage...], names of the latter, none if the file is not ours)."""
    import onnx
    import onnxruntime

    if not isinstance(graph, onnx.ModelProto):
        try:
            graph = onnx.load(graph)
        except OSError as error:
            raise InputError(f"cannot read {graph}: {error.strerror or error}") from error
        except Exception as error:  # protobuf's own
            raise InputError(f"{graph}: not an ONNX file") from error
    graph = copy.deepcopy(graph)
    values = {name for node in graph.graph.node for name in node.output}
    kept = [f"{KEPT_PREFIX}{layer}" for layer in model.pruners]
    kept = kept if values.issuperset(kept) else []
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in kept)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
        outputs = [session.get_outputs()[0].name, *kept]
    except Exception as error:  # onnxruntime's errors share no base class
        raise InputError(f"onnxruntime cannot load the graph: {str(error).splitlines()[0][:200]}") from error

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            return session.run(outputs, {entry: images})
        except Exception as error:
            raise InputError(f"onnxruntime cannot run the graph: {str(error).splitlines()[0][:200]}") from error

    return run, kept


def _compare_kept(decisions: list[Decision], kept: list[np.ndarray], row: int) -> str:
    """ "same", "tie" or "mismatch" of one image; what follows the first stage that differs is its consequence."""
    for decision, found in zip(decisions, kept, strict=True):
        ours, theirs = set(decision.kept[row].tolist()), set(found[row].tolist())
        if ours != theirs:
            scores = dict(zip(decision.candidates[row].tolist(), decision.scores[row].tolist(), strict=True))
            if not theirs <= set(scores) or len(ours) != len(theirs):
                return "mismatch"
            apart = max(scores[p] for p in ours - theirs) - min(scores[p] for p in theirs - ours)
            scale = max(abs(score) for score in scores.values())
            return "tie" if apart <= 1e-4 * scale else "mismatch"
    return "same"
