"""Devices and their memory: selection, why a device is unavailable, and advice when memory runs out."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..errors import SsmCompressError, is_out_of_memory
from ..progress import Steps, record_steps

AUTO = "auto"
DEFAULT = "CUDA is used if it works, else the CPU"
# Common device types of torch, and other names that users type for them.
TYPES = ("cpu", "cuda", "mps", "xpu")
OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "hip": "cuda", "metal": "mps"}

# torch's errors if there is no GPU or no CUDA support; then the use of the CPU needs no explanation.
NO_GPU = ("not compiled with CUDA", "Found no NVIDIA driver", "No CUDA GPUs", "No HIP GPUs", "no CUDA-capable device")
# Parameters that reduce the memory of a command, with their smallest useful value; and parameters that request a
# search, without which the search images need no memory.
LOWERABLE = {"batch_size": 1, "batch_sizes": 1, "samples": 1, "search_images": 1, "workers": 0}
SEARCHES = ("flops", "flops_backbone", "latency", "max_drop")
TRAINING = "fine-tuning"  # the step whose batch size is set by the recipe, not by --batch-size

# Command that resumes from what a failed run has saved; None: nothing was saved.
goes_on: ContextVar[str | None] = ContextVar("ssmcompress_goes_on", default=None)


def choose_device(name: str) -> tuple[str, str]:
    """Resolve the value of --device; also return a message if the device differs from what was typed.

    "auto" is CUDA if torch can compute on it, otherwise the CPU, and never fails: if there is a GPU that cannot be
    used, the message gives the reason. MPS and XPU are used only by name, since no kernels are compiled for them: their
    scans run in plain torch, as a loop over the tokens.

    The processes of a distributed launcher must make the same choice without communicating. They take CUDA if there is
    a GPU for each, without testing it: if one process's GPU fails, that is an error, not a run on mixed devices.
    """
    if name != AUTO:
        return name, ""
    import torch

    several, local = _number("WORLD_SIZE") > 1, _number("LOCAL_WORLD_SIZE") or _number("WORLD_SIZE")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about outdated drivers; the message below includes this
        try:
            if not torch.cuda.is_available():
                torch.cuda.init()  # raises the reason
                return "cpu", ""
            if several and (gpus := torch.cuda.device_count()) < local:
                return "cpu", f"using the CPU: {local} processes on this machine, but {gpus} CUDA devices"
            if several:
                return "cuda", "using CUDA, a GPU for each process (--device cpu: the CPU)"
            torch.zeros(1, device="cuda").item()
            gpu = torch.cuda.get_device_name()
        except Exception as error:
            if any(text in str(error) for text in NO_GPU):
                return "cpu", ""
            return "cpu", f"using the CPU: CUDA cannot be used, {_first_sentence(error)}"
    return "cuda", f"using CUDA, {gpu} (--device cpu: the CPU)"


def _number(variable: str) -> int:
    """Return the integer in a launcher's environment variable, or 0."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


@contextmanager
def explain_memory(command: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Context manager that replaces an out-of-memory error in its body by one that says what to do.

    Args:
        command: the name of the command. values: parameter -> value.

    Raises:
        SsmCompressError: out of memory; it names the step that was running, and the options of the command that reduce
            its memory.
    """
    goes_on.set(None)
    with record_steps() as steps:
        try:
            yield
        except Exception as error:
            if isinstance(error, SsmCompressError) or not is_out_of_memory(error):
                raise
            text = str(error).lower()
            gpu = any(kind in text for kind in ("cuda", "cublas", "hip out", "mps backend", "xpu out"))
            where = " of the GPU" if gpu else ""
            # A resumed training run must keep its batch split, so the two pieces of advice are mutually exclusive.
            resumes = goes_on.get() is not None and _current(steps) != TRAINING
            kept = f"; then `{goes_on.get()}` continues from the saved results" if resumes else ""
            raise SsmCompressError(
                f"out of memory{where} in {_describe_step(command, steps)}; {_advise(values, steps, gpu)}{kept}"
            ) from error


def _current(steps: Steps) -> str | None:
    """Return the innermost step that was interrupted by an error."""
    return steps.left or next(reversed(steps.running), None)


def _describe_step(command: str, steps: Steps) -> str:
    """Return the step during which memory ran out, as text."""
    if (step := _current(steps)) is not None:
        return f'the step "{step}" of {command}'
    return command + (f', after the step "{steps.finished}"' if steps.finished else "")


def _advise(values: Mapping[str, Any], steps: Steps, gpu: bool) -> str:
    """Return the options that reduce the memory of a command, with their values."""
    trains, no_model = _current(steps) == TRAINING, not values.get("models", True)  # as in `benchmark --ops`
    options, texts = [], []
    for name, least in LOWERABLE.items():
        value, unused = values.get(name), no_model or (trains and name != "workers")
        if name == "search_images":
            unused |= all(values.get(search) is None for search in SEARCHES)
        if not unused and max((int(part) for part in re.findall(r"\d+", str(value))), default=0) > least:
            options.append(f"--{name.replace('_', '-')} (now {value})")
    if "image_size" in values and not no_model:
        options.append(f"--image-size (now {values['image_size'] or 'as trained'})")
    if values.get("ops"):
        options.append(f"--shape (now {values.get('shape') or 'its default'})")
    if trains:
        given = [text.partition("=")[2] for text in values.get("recipe_changes") or () if "accumulate" in text]
        now = f" (now {given[-1].strip()})" if given else ""
        texts.append(f"split each training step with --set accumulate=NUMBER{now}")
    if options:
        texts.append(f"lower {' or '.join(filter(None, [', '.join(options[:-1]), options[-1]]))}")
    if gpu and "device" in values:
        texts.append("use --device cpu")
    return ", or ".join(texts) or "close other programs, or use a machine with more memory"


def explain_device(name: str, error: Exception) -> str:
    """Return the reason why torch cannot use a device.

    Args:
        name: the device, as typed. error: the exception that torch raised for it.
    """
    kind, _, index = name.partition(":")
    if kind not in TYPES or (index and not index.isdecimal()):
        similar = difflib.get_close_matches(kind.lower(), (*TYPES, AUTO), 1)
        guess = OTHER_NAMES.get(kind.lower()) or next(iter(similar), kind)
        expected = "expected cpu, cuda, cuda:1, mps or xpu"
        if guess == kind:
            return f"{expected}; without --device, {DEFAULT}"
        return f"{expected}; did you mean {guess}{':' + index if index else ''}? Without --device, {DEFAULT}"
    return f"{_find_reason(kind, index, error)}; without --device, {DEFAULT}"


def _find_reason(kind: str, index: str, error: Exception) -> str:
    """Return the reason why a device of a known type cannot be used."""
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
    """Return the error of a backend that cannot be initialised, which is torch's reason why it is unavailable."""
    try:
        backend.init()
    except Exception as error:
        return error
    return None


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of a torch error; the rest is lengthy advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0].rstrip(".")
