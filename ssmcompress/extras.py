"""Messages about installed packages: extras that are missing, and packages that cannot be imported."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import InputError

# Extra -> what needs it, and the modules that it brings. pyproject.toml names their distributions.
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
    """Return which packages of an extra are not installed, and how to install them; "" if all are."""
    what, modules = EXTRAS[extra]
    missing = [name for name in modules if not _is_installed(name)]
    if not missing:
        return ""
    verb = "is" if len(missing) == 1 else "are"
    names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
    return f"{what} {names}, which {verb} not installed: pip install 'ssmcompress[{extra}]'"


def require_extra(extra: str) -> None:
    """Check that the packages of an extra are installed; this does not import them.

    Args:
        extra: one of `EXTRAS`.

    Raises:
        InputError: some are not; the message says which, and how to install them.
    """
    if message := describe_missing(extra):
        raise InputError(message)


def explain_import(error: BaseException) -> str:
    """Return what is wrong with the installed packages if an error comes from importing one of them; else "".

    torchvision of another build than torch, such as one for CUDA next to the CPU build, fails with a RuntimeError about
    an operator.
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
    except ImportError:  # a finder that refuses it
        return False
    except ValueError:  # a module without a spec, which somebody put in its place
        return True
