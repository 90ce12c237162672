"""Why a device that was asked for cannot be used, as torch reports it."""

from __future__ import annotations

import difflib

# Device types of torch that people have, and names that they type for them.
TYPES = ("cpu", "cuda", "mps", "xpu")
OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "hip": "cuda", "metal": "mps"}


def explain_device(name: str, error: Exception) -> str:
    """Return why torch cannot use a device.

    Args:
        name: the device, as typed. error: what torch raised for it.
    """
    kind, _, index = name.partition(":")
    if kind not in TYPES or (index and not index.isdecimal()):
        guess = OTHER_NAMES.get(kind.lower()) or next(iter(difflib.get_close_matches(kind.lower(), TYPES, 1)), None)
        advice = f"; did you mean {guess}{':' + index if index else ''}?" if guess and guess != kind else ""
        return f"expected cpu, cuda, cuda:1, mps or xpu{advice}"
    return f"{_find_reason(kind, index, error)}; without --device, the CPU is used"


def _find_reason(kind: str, index: str, error: Exception) -> str:
    """Return why a device of a known type cannot be used."""
    import torch

    if kind in ("cuda", "xpu"):
        backend = getattr(torch, kind)
        built = torch.version.cuda or torch.version.hip if kind == "cuda" else getattr(torch.version, "xpu", None)
        if not built:
            return f"torch {torch.__version__} was built without {kind.upper()}"
        if not backend.is_available():
            return _first_sentence(_initialise(backend) or error)
        if index and int(index) >= backend.device_count():
            return f"this machine has {backend.device_count()} of these devices, counted from {kind}:0"
    if kind == "mps" and not torch.backends.mps.is_available():
        built = torch.backends.mps.is_built()
        return "macOS has no Metal device here" if built else f"torch {torch.__version__} was built without MPS"
    return _first_sentence(error)


def _initialise(backend) -> Exception | None:
    """Return the error of a backend that cannot start: torch's reason why it is not available."""
    try:
        backend.init()
    except Exception as error:
        return error
    return None


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of torch; the others are long advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0].rstrip(".")
