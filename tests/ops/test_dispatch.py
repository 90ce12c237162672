"""Custom backends."""

import types

import pytest
import torch

from ssmcompress.ops import BACKENDS, reference, register_backend, rms_norm, use_backend
from ssmcompress.ops.dispatch import FUNCTIONS


@pytest.fixture
def mine(monkeypatch):
    """A module of a backend that marks what its norm gives, and a registry that is as it was afterwards."""
    monkeypatch.setattr("ssmcompress.ops.dispatch.BACKENDS", dict(BACKENDS))
    module = types.ModuleType("mine")
    for name in FUNCTIONS:
        setattr(module, name, getattr(reference, name))
    module.rms_norm = lambda x, weight, eps: reference.rms_norm(x, weight, eps) + 1
    return module


def test_a_registered_backend_is_used_where_it_is_named(mine):
    x, weight = torch.randn(2, 3, 4), torch.rand(4)
    register_backend("mine", mine)
    expected = reference.rms_norm(x, weight, 1e-5) + 1
    assert torch.equal(rms_norm(x, weight, 1e-5, backend="mine"), expected)
    with use_backend("mine"):
        assert torch.equal(rms_norm(x, weight, 1e-5), expected)
    assert not torch.equal(rms_norm(x, weight, 1e-5), expected)


def test_a_backend_without_all_functions_is_refused(mine):
    del mine.selective_scan
    with pytest.raises(ValueError, match="backend 'mine': the module mine has no selective_scan"):
        register_backend("mine", mine)
    register_backend("by-name", "ssmcompress.ops.orders")
    with pytest.raises(ValueError, match="has no causal_conv1d"):
        rms_norm(torch.randn(1, 2, 3), torch.rand(3), 1e-5, backend="by-name")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'none'"), use_backend("none"):
        pass
