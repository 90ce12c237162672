"""Running a case in this process and judging it: exit code, streams, files, canary."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from . import cases
from .world import World

REFUSED, RIGHT, FAILED = "refused", "right result", "failed"
# Files larger than this are compared by size and time only.
HASHED = 8 << 20
# Files that torch and onnxruntime leave in the temporary folder.
_CACHES = ("tmp/torchinductor_root", "tmp/.ses")
# Lines on stderr that no user should see, from Python, native libraries and torch.
_NOISE = re.compile(
    r"Traceback \(most recent|^\s+File \".*\", line \d+|[A-Za-z]Warning: |\[E:onnxruntime|\[W:onnxruntime|libpng |"
    r"^TIFF|Corrupt JPEG|terminate called|Fatal Python error|^Exception ignored",
    re.MULTILINE,
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x9b]")


@dataclass(frozen=True)
class Result:
    """The outcome of a case, with the reason if it has failed."""

    outcome: str
    reason: str = ""
    said: str = ""
    arguments: tuple[str, ...] = ()
    detail: str = ""


def run_case(seed: int, kind: str, index: int, world: World, root: Path) -> Result:
    """Create a case in the empty folder `root`, run it and judge it."""
    box = cases.Box(root / "work", root / "canary", world)
    box.folder.mkdir(parents=True)
    (root / "tmp").mkdir()
    try:
        case = cases.make(seed, kind, index, box)
    except Exception as error:
        return Result(FAILED, f"the input could not be made: {type(error).__name__} {error}")
    print(
        shlex.join(map(str, case.arguments)).encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True
    )
    before = snapshot(root)
    with _surroundings(box.folder, root / "tmp"):
        run = call([os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in case.arguments])
        after = snapshot(root)
        try:
            reason = judge(case, run, before, after)
        except Exception as error:
            reason = f"the judgement failed: {type(error).__name__} {error}"
    outcome = FAILED if reason else RIGHT if run.code == 0 else REFUSED
    said = run.stderr.strip().splitlines()[-1:] or run.stdout.strip().splitlines()[:1] or [""]
    shown = tuple(str(a) for a in case.arguments)
    return Result(outcome, reason or "", said[0][:300], shown, case.detail)


def judge(case: cases.Case, run: cases.Run, before: dict, after: dict) -> str | None:
    """Return the error of a run, or None."""
    if "canary" in after:
        return "code of the input was run"
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    allowed = tuple(f"work/{name}" for name in case.creates) if run.code == 0 else ()
    changed = [n for n in changed if not any(n == a or n.startswith(f"{a}/") for a in (*allowed, *_CACHES))]
    if changed:
        return f"exit {run.code} with files changed or left: {', '.join(changed[:3])}"
    if noise := _NOISE.search(run.stderr + run.stdout):
        return f"exit {run.code} with noise: {_line_of(run.stderr + run.stdout, noise.start())}"
    if control := _CONTROL.search(run.stdout + run.stderr):
        return f"exit {run.code} prints the control character {control.group()!r}"
    if run.code == 0:
        if case.right is None:
            return "exit 0, expected a refusal"
        return case.right(run)
    lines = run.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if run.code not in case.codes:
        return f"exit {run.code}: {(errors or lines or [''])[-1]}"
    if case.must_read:
        return f"refused, expected it to be read: {(errors or lines or [''])[-1]}"
    if run.stdout and run.code != 4:
        return f"exit {run.code} with output on stdout: {run.stdout[:80]!r}"
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"exit {run.code} with {len(errors)} error lines of {len(lines)}: {run.stderr[-200:]!r}"
    if len(errors[0]) > 1000:
        return f"exit {run.code} with an error of {len(errors[0])} characters"
    return None


def _line_of(text: str, position: int) -> str:
    return text[text.rfind("\n", 0, position) + 1 :].splitlines()[0][:200]


def snapshot(root: Path) -> dict[str, tuple]:
    """Return everything under a folder: relative path -> kind, size and digest of a file, target of a link."""
    found: dict[str, tuple] = {}

    def visit(folder: bytes, prefix: bytes) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                found[os.fsdecode(name)] = _describe(entry)
                if entry.is_dir(follow_symlinks=False):
                    visit(entry.path, name + b"/")

    visit(os.fsencode(root), b"")
    return found


def _describe(entry: os.DirEntry) -> tuple:
    if entry.is_symlink():
        return "link", os.readlink(entry.path)
    if entry.is_dir(follow_symlinks=False):
        return ("folder",)
    status = entry.stat(follow_symlinks=False)
    if not entry.is_file(follow_symlinks=False):
        return "special", status.st_mode
    if status.st_size > HASHED:
        return "file", status.st_size, status.st_mtime_ns
    with open(entry.path, "rb") as file:
        return "file", status.st_size, hashlib.sha1(file.read()).hexdigest()


@contextmanager
def _surroundings(folder: Path, temporary: Path) -> Iterator[None]:
    """Set the working and temporary folders of a command; restores the state of the process."""
    import torch

    level = logging.getLogger("ssmcompress").level
    saved = os.getcwd(), tempfile.tempdir, dict(os.environ), torch.get_num_threads(), torch.get_default_dtype()
    os.chdir(folder)
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    for module in list(sys.modules.values()):  # so that warnings that were shown before are shown again
        if isinstance(module, ModuleType):
            vars(module).pop("__warningregistry__", None)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(saved[0])
        tempfile.tempdir = saved[1]
        os.environ.clear()
        os.environ.update(saved[2])
        torch.set_num_threads(saved[3])
        torch.set_default_dtype(saved[4])
        logging.getLogger("ssmcompress").setLevel(level)


def call(arguments: list[str]) -> cases.Run:
    """Run a command line in this process, and also capture the output of native code."""
    from ssmcompress.cli.app import app

    streams = sys.stdout, sys.stderr
    kept = os.dup(1), os.dup(2)
    files = [tempfile.TemporaryFile(dir="/tmp") for _ in kept]  # noqa: SIM115
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        app(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        print(f"Traceback (most recent call last) {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode("utf-8", "replace"))
        file.close()
    return cases.Run(code, *texts)


def clear(root: Path) -> None:
    """Remove the files of a case, regardless of their permissions."""
    shutil.rmtree(os.fsencode(root), ignore_errors=True)
