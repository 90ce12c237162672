"""Run a command beside processes that keep cores busy, to see how it does on a shared machine.

    python examples/beside_busy.py 2 ssmcompress benchmark model.pth --batch-sizes 1,8

The first argument is the number of busy processes; the rest is the command, whose exit code is returned.
"""

import subprocess
import sys


def main() -> int:
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        print(__doc__.strip(), file=sys.stderr)
        return 2
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(int(sys.argv[1]))]
    try:
        return subprocess.run(sys.argv[2:], check=False).returncode
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
