"""The weights of a model as a state dict for the code with which its checkpoint was published."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..errors import InputError
from ..progress import note
from .base import TokenModel
from .classifier import NoClassifier
from .inputs import check_model
from .saved_corrections import CORRECTIONS
from .sizes import LayeredConfig

# Prefixes of parameter names that published models do not have.
OWN = (*CORRECTIONS, "pruners.", "level_maps.")


def dense_state_dict(model: TokenModel, *, strict: bool = True) -> dict[str, Tensor]:
    """Return the weights under their published names, which the authors' code or timm can load.

    Trimmed sizes, for example `d_state`, must be passed to that code; a note lists them.

    Args:
        model: from `load` or the functions that change models.
        strict: reject a model whose outputs differ from those of its weights in the published code, because it drops
            tokens or has corrections. If False, the weights are returned with a note: the published code then computes
            every token, with weights that were fitted to fewer.

    Returns:
        Copies of the tensors, on the CPU.

    Raises:
        InputError: no published code supports the model's layer sizes or, if `strict`, computes what the model does.
    """
    check_model(model)
    if shapes := list(_list_odd_shapes(model)):
        raise InputError(f"published code cannot have such a model: {'; '.join(shapes)}")
    extras = list(_list_extras(model))
    if extras and strict:
        raise InputError(
            f"published code does not compute what the model does: {'; '.join(extras)}; strict=False returns its "
            "weights without that"
        )
    if extras:
        note(f"the weights are not all of the model, which also has what published code lacks: {'; '.join(extras)}")
    if sizes := _list_sizes(model):
        note(f"published code needs the model's sizes: {', '.join(sizes)}")
    weights = model.state_dict()
    published = [k for k in weights if not (k.startswith(OWN) or k.rpartition(".")[2] == "gap_delta")]
    state = {key: weights[key].detach().to("cpu", copy=True) for key in published}
    return model.publish(state)


def _list_odd_shapes(model: TokenModel) -> Iterator[str]:
    """Yield the sizes that code with a single size for all layers cannot express."""
    if isinstance(model.classifier, NoClassifier):
        yield "it has no classifier"
    if not isinstance(model.config, LayeredConfig):
        return
    complete = model.config.PATHS
    if lacking := [str(number) for number, size in enumerate(model.config.layers, 1) if size.directions != complete]:
        yield f"layers {', '.join(lacking)} have lost scan directions"
    for name, what in (("d_state", "states"), ("d_inner", "channels")):
        sizes = [getattr(size, name) for size in model.config.layers]
        if len(set(sizes)) > 1:
            yield f"layers differ in {what} ({', '.join(map(str, sizes))})"


def _list_extras(model: TokenModel) -> Iterator[str]:
    """Yield the parts of the model's computation that published weights do not have."""
    if len(model.pruners):
        yield f"tokens are dropped after layers {', '.join(model.pruners)}, while it runs"
    parts = (model.corrections, model.class_corrections, model.readout_correction, getattr(model, "level_maps", None))
    if count := sum(p.numel() for part in parts if isinstance(part, nn.Module) for p in part.parameters()):
        yield f"corrections of {count} parameters are added, of a reconstruction"


def _list_sizes(model: TokenModel) -> list[str]:
    """Return the sizes that differ from the dense model, such as "d_state=8"."""
    ours, dense = model.config.to_dict(), model.dense_config.to_dict()
    return [f"{name}={value} (was {dense.get(name)})" for name, value in ours.items() if value != dense.get(name)]
