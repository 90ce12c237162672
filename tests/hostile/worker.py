"""Cases in a worker process, which a parent kills when a case hangs and restarts when it has died."""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

SECONDS = 20
STARTUP_SECONDS = 180
MEMORY = 6 << 30
"""Address space that a case may take in addition to what the process has before the first."""


def run_cases(names: list[tuple[int, str, int]], root: Path, seconds: float = SECONDS) -> Iterator[dict]:
    """Run cases (seed, kind, index) in worker processes; yields a result for each, as `sandbox.Result` has it."""
    pending = list(names)
    while pending:
        with open(root / "worker.log", "ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "hostile.worker", str(root)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
                     "HF_HOME": str(root / "hub"), "COLUMNS": "80", "NO_COLOR": "1"},
            )  # fmt: skip
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(pending).encode())
            worker.stdin.close()
            yield from _answers(worker, pending, seconds, root / "worker.log")
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {(root / 'worker.log').read_text(errors='replace')[-2000:]}") from None
        finally:
            worker.kill()
            worker.wait()


def _answers(worker: subprocess.Popen, pending: list, seconds: float, log: Path) -> Iterator[dict]:
    """Yield a worker's results, and remove those cases from `pending`; the case in which it hangs or dies fails."""
    lines, buffer, limit = [], b"", STARTUP_SECONDS
    descriptor = worker.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        end = time.monotonic() + limit
        while pending:
            ready = selector.select(max(0, end - time.monotonic()))
            part = os.read(descriptor, 1 << 16) if ready else b""
            if not part:
                if limit == STARTUP_SECONDS:
                    raise RuntimeError("the worker did not start")
                reason = f"the process died, {_status(worker)}" if ready else f"no answer within {seconds:.0f} s"
                reason += f"; last line of its log: {_last_words(log)}"
                pending.pop(0)
                yield {"outcome": "failed", "reason": reason, "said": "", "arguments": [], "detail": "", "seconds": 0}
                return
            buffer += part
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                limit = seconds
                if line != b"ready":
                    pending.pop(0)
                    yield json.loads(line)
            end = time.monotonic() + limit


def _last_words(log: Path) -> str:
    return (log.read_text(errors="replace").splitlines() or ["nothing said"])[-1][:200]


def _status(worker: subprocess.Popen) -> str:
    try:
        code = worker.wait(5)
    except subprocess.TimeoutExpired:
        return "its output is closed"
    return f"signal {-code}" if code < 0 else f"exit {code}"


def work(root: Path) -> None:
    """Run the cases that stdin names, and answer each with a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    names = json.loads(sys.stdin.read())
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)

    from . import sandbox
    from .makers import load_makers
    from .world import build

    world = build(root / "world")
    load_makers()
    with open("/proc/self/statm") as memory:
        now = int(memory.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    print("ready", file=answers, flush=True)
    for seed, kind, index in names:
        folder = root / "cases" / f"{kind}-{index}"
        start = time.monotonic()
        result = sandbox.run_case(seed, kind, index, world, folder)
        if not (root / "keep").exists():
            sandbox.clear(folder)
        print(json.dumps({**asdict(result), "seconds": time.monotonic() - start}), file=answers, flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
