"""Kernel calls that bypass torch's dispatcher: only where no part of torch has to see the call."""

import pytest
import torch
from op_cases import scan_case
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ssmcompress.ops import operators, selective_scan

NAME = "ssmcompress::selective_scan"


@pytest.fixture
def case():
    return scan_case(length=9, d_inner=5, d_state=3, dtype=torch.float32)


@pytest.fixture
def calls(monkeypatch):
    """Whether each call of an operator bypassed the dispatcher."""
    decide, decisions = operators._wants_only_values, []
    monkeypatch.setattr(
        operators, "_wants_only_values", lambda *arguments: decisions.append(decide(*arguments)) or decisions[-1]
    )
    return decisions


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_plain_values_skip_it(case, calls):
    selective_scan(**case)
    with torch.inference_mode():
        selective_scan(**case)
    parameters = {**case, "D": torch.nn.Parameter(case["D"])}
    with torch.no_grad():
        selective_scan(**parameters)
    assert calls == [True] * 3


def test_a_mode_sees_the_operator(case):
    expected = selective_scan(**case)
    with Names() as mode:
        assert torch.equal(selective_scan(**case), expected)
    assert NAME in mode.seen


def test_a_profiler_sees_the_operator(case):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        selective_scan(**case)
    assert NAME in {event.name for event in found.events()}


def test_gradients_go_through_it(case, calls):
    y = selective_scan(**{**case, "u": case["u"].requires_grad_()})
    assert y.requires_grad
    assert calls == [False]


def test_subclasses_and_other_devices_go_through_it(case, calls):
    class Other(torch.Tensor):
        pass

    selective_scan(**{**case, "z": case["z"].as_subclass(Other)})
    assert calls == [False]
    assert selective_scan(**{k: v.to("meta") for k, v in case.items()}, backend="cpu").is_meta
    assert calls == [False] * 2


def test_transforms_go_through_it(case, calls):
    torch.func.functionalize(lambda u: selective_scan(**{**case, "u": u}))(case["u"])
    assert True not in calls
