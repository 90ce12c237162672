"""Messages about installed packages: missing extras, and packages that cannot be imported."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import InputError

# Extra -> what needs it, and its modules. pyproject.toml names their distributions.
EXTRAS = {
    "onnx": ("ONNX files need", ("onnx", "onnxscript", "onnxruntime")),
    "finetune": ("fine-tuning and work in several processes need", ("accelerate",)),
    "video": ("video files need", ("av",)),
    "tensorboard": ("`tensorboard` needs", ("tensorboard",)),
}


def has_extra(extra: str) -> bool:
    """Return whether all packages of an extra are installed."""
    return not describe_missing(extra)


def describe_missing(extra: str) -> str:
    """Return a message about missing packages of an extra and how to install them; "" if none is missing."""
    what, modules = EXTRAS[extra]
    missing = [name for name in modules if not _is_installed(name)]
    if not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
    return f"{what} {names}, which {verb} not installed: pip install 'ssmcompress[{extra}]'"


def require_extra(extra: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: one of `EXTRAS`.

    Raises:
        InputError: some are missing; the message says which, and how to install them.
    """
    if message := describe_missing(extra):
        raise InputError(message)


def explain_import(error: BaseException) -> str:
    """Return a message about the installed packages if an error comes from importing one of them; otherwise "".

    If torchvision and torch are of different builds, such as one for CUDA and one for the CPU, torchvision fails with a
    RuntimeError about an operator.
    """
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):
        return (
            "the installed torchvision was built for another torch: install torch and torchvision together, from the "
            f"same source ({error})"
        )
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] != __package__:
        found = "is not installed" if isinstance(error, ModuleNotFoundError) else "cannot be imported"
        return f"the package {error.name or ''} {found}: install it again ({error})".replace("  ", " ")
    return ""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # an import hook that blocks it
        return False
    except ValueError:  # a module without a spec, such as a stub in `sys.modules`
        return True
