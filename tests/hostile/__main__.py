"""Command line of the hostile inputs: `python -m tests.hostile --seed 1 --count 300`."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hostile import cases
from hostile.makers import SHARES, choose, load_makers
from hostile.sandbox import FAILED, REFUSED, RIGHT
from hostile.worker import run_cases


def main() -> int:
    """Run the cases and print the outcomes by kind; 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--kind", choices=SHARES, action="append", help="only this kind; repeatable")
    parser.add_argument("--only", metavar="KIND/INDEX", help="only this case")
    parser.add_argument("--keep", type=Path, help="an empty folder for the files of the cases, which are kept there")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    options = parser.parse_args()
    load_makers()
    names = choose(options.seed, options.count, options.kind or list(SHARES))
    if options.only:
        kind, _, index = options.only.partition("/")
        names = [(options.seed, kind, int(index))]
    root = options.keep or Path(tempfile.mkdtemp(prefix="hostile-"))
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    if options.keep:
        (root / "keep").touch()
    counts: Counter[tuple[str, str]] = Counter()
    failures, start = [], time.monotonic()
    try:
        for (seed, kind, index), result in zip(names, run_cases(names, root), strict=True):
            counts[kind, result["outcome"]] += 1
            title = f"{kind}/{index} {cases.name_of(seed, kind, index)} {result['detail']}".strip()
            if options.verbose or options.only:
                print(f"{result['outcome']:12} {result['seconds']:5.2f} s  {title}")
                print(f"    {shlex.join(result['arguments'])}"[:200].encode("ascii", "backslashreplace").decode())
                print(f"    {result['said']}"[:300].encode("ascii", "backslashreplace").decode())
            if result["outcome"] == FAILED:
                failures.append((title, result))
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    show(counts, failures, time.monotonic() - start)
    return int(bool(failures))


def show(counts: Counter, failures: list, seconds: float) -> None:
    """Print a table of counts, then the failures."""
    columns = (REFUSED, RIGHT, FAILED)
    print(f"{'':14}" + "".join(f"{name:>14}" for name in columns))
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    for kind in kinds:
        print(f"{kind:14}" + "".join(f"{counts[kind, name]:14}" for name in columns))
    totals = [sum(counts[kind, name] for kind in kinds) for name in columns]
    print(f"{'all':14}" + "".join(f"{total:14}" for total in totals) + f"   in {seconds:.0f} s")
    for title, result in failures:
        text = f"FAILED {title}\n    {shlex.join(result['arguments'])}\n    {result['reason']}"
        print(text.encode("ascii", "backslashreplace").decode())


if __name__ == "__main__":
    sys.exit(main())
