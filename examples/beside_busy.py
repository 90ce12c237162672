"""Run a command alongside processes that keep cores busy, to see how it performs on a shared machine.

    python examples/beside_busy.py 2 ssmcompress benchmark model.pth --batch-sizes 1,8

The first argument is the number of busy processes; the rest is the command. Its exit code is returned.
"""

import shutil
import subprocess
import sys
from pathlib import Path


def main() -> int:
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        print(__doc__.strip(), file=sys.stderr)
        return 2
    command = sys.argv[2]
    command = shutil.which(command) or shutil.which(command, path=Path(sys.executable).parent)  # of this environment
    if command is None:
        print(f"{sys.argv[2]}: no such command", file=sys.stderr)
        return 2
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(int(sys.argv[1]))]
    try:
        return subprocess.run([command, *sys.argv[3:]], check=False).returncode
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
