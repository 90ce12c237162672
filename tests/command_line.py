"""Running commands in tests: in this process, in a separate process, or in several that share imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

from forked import BETWEEN as BETWEEN
from typer.testing import CliRunner

from ssmcompress.cli.app import app


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.stderr
    return result


def call_json(*arguments, code=0):
    return json.loads(call(*arguments, "--json", code=code).stdout)


def process(*arguments, code=0, **options):
    """The finished process of a command that must end with `code` (None: with any)."""
    command = [sys.executable, "-m", "ssmcompress", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)
    assert code is None or done.returncode == code, done.stderr
    return done


def forked(way, *commands, code=0, **options):
    """The finished process of forked.py for commands, lists of words, that must end with `code`."""
    script = [sys.executable, str(Path(__file__).with_name("forked.py")), way]
    script += [json.dumps([str(word) for word in command]) for command in commands]
    done = subprocess.run(script, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280, **options)
    assert done.returncode == code, (commands, done.stderr)
    return done


def refused(*arguments, code=2):
    """stderr of a command that must fail with one line and leave the folder as it was."""
    before = sorted(p.name for p in os.scandir())
    result = call(*arguments, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in os.scandir()) == before
    return result.stderr


TUNE = ("--epochs", 2, "--set", "batch_size=6", "--no-latency")
