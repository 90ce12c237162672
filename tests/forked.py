"""Run commands in separate processes that share their imports of other libraries, which take 5 s of CPU time.

    python tests/forked.py together '["ssmcompress", "evaluate", ...]'
    python tests/forked.py in-turn '["python", "script.py"]' '["ssmcompress", "report"]'

`together` starts two processes of one command with the environment of torchrun; `in-turn` runs commands sequentially.
No part of ssmcompress is imported before the fork, so that each process imports it itself.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

LIBRARIES = ("torch", "torch.distributed", "numba", "scipy.optimize", "timm.data", "accelerate")
BETWEEN = "\f"  # printed between the outputs of sequential commands
SECONDS = 250  # a process that waits for a terminated one ends by itself


def run(program: str, *arguments: str) -> None:
    """Run `python FILE ...` or `ssmcompress ...` in this process."""
    if program == "python":
        file = arguments[0]
        sys.argv, sys.path[0] = list(arguments), str(Path(file).resolve().parent)
        runpy.run_path(file, run_name="__main__")
    else:
        sys.argv, sys.path[0] = [program, *arguments], os.getcwd()
        runpy.run_module("ssmcompress", run_name="__main__", alter_sys=True)


def fork(command: list[str], environment: dict[str, str]) -> int:
    """Start a process and return its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(SECONDS)
        os.environ.update(environment)
        run(*command)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def wait_for(children: set[int]) -> None:
    """Wait for all processes; if one fails, end the others and exit with its code."""
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(os.waitstatus_to_exitcode(status) % 256)


def find_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main(way: str, *commands: str) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    parsed = [json.loads(command) for command in commands]
    if way == "together":
        (command,) = parsed
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_port())}
        group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        wait_for({fork(command, {**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")})
    else:
        for number, command in enumerate(parsed):
            print(BETWEEN if number else "", end="", flush=True)
            wait_for({fork(command, {})})


if __name__ == "__main__":
    main(*sys.argv[1:])
