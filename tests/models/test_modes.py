"""A model that its caller is training gives the results of evaluation mode, and is left as it was."""

import copy

import pytest
import torch
from conftest import images_of, make_plain_mamba

import ssmcompress
from ssmcompress.models.modes import eval_mode

RATIO = {"ratio": 0.3}
CALLS = {
    "evaluate": lambda dense, pruned, x: ssmcompress.evaluate(pruned, x, dense=dense).agreement,
    "calibrate": lambda dense, pruned, x: ssmcompress.calibrate(dense, x, **RATIO).to_dict(),
    "trim_states": lambda dense, pruned, x: ssmcompress.trim_states(dense, 2, x),
    "trim_channels": lambda dense, pruned, x: ssmcompress.trim_channels(dense, 16, x),
    "reconstruct": lambda dense, pruned, x: ssmcompress.reconstruct(pruned, dense, x),
    "search": lambda dense, pruned, x: ssmcompress.search(dense, x, flops=0.97).stages,
    "attention_maps": lambda dense, pruned, x: ssmcompress.attention_maps(dense, x),
}


def values_of(result, images):
    """What a function returned, as something to compare."""
    return result(images) if isinstance(result, torch.nn.Module) else result


@pytest.mark.parametrize("name", CALLS)
def test_a_model_in_training_mode_is_run_in_evaluation_mode(name):
    dense = make_plain_mamba(depth=3, image=(32, 32))
    images = images_of(dense, 12)
    with torch.no_grad():  # running statistics that are not those of these images
        dense.train()(2 * images + 1)
        dense.eval()
    pruned = ssmcompress.prune(dense, **RATIO)
    expected = values_of(CALLS[name](dense, pruned, images), images)
    before = [copy.deepcopy(model.state_dict()) for model in (dense, pruned)]
    found = values_of(CALLS[name](dense.train(), pruned.train(), images), images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0) if torch.is_tensor(found) else None
    assert torch.is_tensor(found) or str(found) == str(expected)
    for model, state in zip((dense, pruned), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(module.training for module in model.modules())


def test_the_mode_of_each_module_is_restored_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).train()
    model[1].eval()
    try:
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


@pytest.mark.parametrize("name", ["evaluate", "trim_states", "reconstruct", "search"])
def test_inference_mode_of_the_caller_does_not_matter(name):
    dense = make_plain_mamba(depth=3, image=(32, 32))
    images = images_of(dense, 12)
    pruned = ssmcompress.prune(dense, **RATIO)
    expected = values_of(CALLS[name](dense, pruned, images), images)
    with torch.inference_mode():
        found = values_of(CALLS[name](dense, pruned, images.clone()), images)
    if torch.is_tensor(found):
        torch.testing.assert_close(found, expected)
    else:
        assert str(found) == str(expected)
