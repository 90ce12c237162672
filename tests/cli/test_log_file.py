"""`--log-file` and `--verbose`: the log of a command in a file and on stderr."""

import logging
import os
import re
import warnings
from pathlib import Path

import pytest
import typer
from command_line import call, process, refused

from ssmcompress.cli.app import app

COMMANDS = typer.main.get_command(app).commands
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d) (DEBUG|INFO|WARNING|ERROR) ([\w.]+): (.*)")

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def read_log(file="run.log"):
    """(level, logger, text) of each record; the lines of a traceback are indented."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    assert all(LINE.fullmatch(line) or line.startswith("    ") for line in lines)
    return [match.groups()[1:] for line in lines if (match := LINE.fullmatch(line))]


def texts(file="run.log"):
    return [text for _, _, text in read_log(file)]


def test_every_command_with_messages_can_log_them():
    with_messages = {name for name, c in COMMANDS.items() if any("--quiet" in p.opts for p in c.params)}
    assert len(with_messages) >= 11
    for name in with_messages:
        options = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {"--log-file", "--verbose"} <= options, name


def test_the_log_begins_with_versions_and_the_command_line(checkpoint):
    call("evaluate", checkpoint, "--log-file", "run.log")
    versions, command = texts()[:2]
    assert re.match(r"ssmcompress \S+, Python \d\S+, torch \d\S+, numpy \d", versions)
    assert command == f"command: ssmcompress evaluate {checkpoint} --log-file run.log, in {os.getcwd()}"
    assert re.fullmatch(r"ended after \d+\.\d s", texts()[-1])


def test_the_log_has_messages_notes_and_steps_also_when_quiet(checkpoint, class_folders):
    command = "prune", checkpoint, "--data", class_folders, "--no-latency", "-o"
    loud, quiet = call(*command, "a"), call(*command, "b", "--log-file", "b.log", "--quiet")
    assert quiet.stderr == ""
    assert quiet.stdout == loud.stdout
    assert "wrote a" in loud.stderr
    for line in loud.stderr.splitlines():
        assert line.replace("wrote a", "wrote b") in texts("b.log")
    for step in ("calibrating", "reconstructing", "measuring"):
        assert next(text for text in texts("b.log") if text.startswith(f"{step}: ")).endswith(" to do")
        assert any(re.fullmatch(rf"{step}: done after \d+\.\d\d s", text) for text in texts("b.log"))
    assert any(re.fullmatch(r"device cpu, \d+ threads", text) for text in texts("b.log"))


def test_without_the_options_nothing_changes(checkpoint):
    before = call("evaluate", checkpoint)
    logged = call("evaluate", checkpoint, "--log-file", "run.log")
    assert (before.stdout, before.stderr) == (logged.stdout, logged.stderr)
    assert sorted(os.listdir()) == ["run.log"]


def test_verbose_shows_on_stderr_what_the_library_does(checkpoint):
    shown = call("evaluate", checkpoint, "--verbose", "--log-file", "run.log").stderr.splitlines()
    done = [text for level, _, text in read_log() if level == "DEBUG"]
    assert any(text.startswith("measuring: done after ") for text in done)
    assert [line for line in shown if line in done] == done
    assert "measuring:" not in call("evaluate", checkpoint).stderr
    assert "measuring:" not in call("evaluate", checkpoint, "--verbose", "--quiet").stderr


def test_verbose_of_a_report_shows_more_of_it_also_when_quiet(pruned_folder, checkpoint):
    long, short = call("report", "pruned", "--verbose"), call("report", "pruned")
    assert len(long.stdout) > len(short.stdout)
    assert call("report", "pruned", "--verbose", "--quiet").stdout == long.stdout
    assert "measuring: done" in call("prune", checkpoint, "--no-latency", "-o", "out", "--verbose").stderr


def test_a_failure_is_in_the_log_with_its_traceback_and_with_notes_that_were_not_printed(checkpoint, monkeypatch):
    monkeypatch.setattr("ssmcompress.evaluation.measure._check_outputs", lambda *_: 1 / 0)
    result = call("evaluate", checkpoint, "--log-file", "run.log", code=1)
    assert result.stderr == "error: internal error, ZeroDivisionError: division by zero; please report it\n"
    assert any(text.startswith("note: preprocessing is not in the file") for text in texts())
    level, _, text = read_log()[-2]
    assert (level, text) == ("ERROR", f"exit code 1: {result.stderr.strip().removeprefix('error: ')}")
    assert "    ZeroDivisionError: division by zero" in Path("run.log").read_text()
    assert any(re.fullmatch(r"measuring: left after .*", text) for text in texts())


def test_a_log_is_continued_and_nothing_else_is_touched(checkpoint):
    for _ in range(2):
        call("inspect", checkpoint, "--log-file", "run.log")
    assert sum(text.startswith("command: ") for text in texts()) == 2
    for name, content in (("notes.txt", b"mine\n"), ("model.pt", checkpoint.read_bytes())):
        Path(name).write_bytes(content)
        said = refused("inspect", checkpoint, "--log-file", name)
        what = "is not a log of ssmcompress and is left unchanged: choose another file"
        assert said == f"error: --log-file {name} {what}\n"
        assert Path(name).read_bytes() == content
    Path("empty.log").touch()
    call("inspect", checkpoint, "--log-file", "empty.log")
    assert texts("empty.log")


@pytest.mark.parametrize(
    ("file", "reason"), [("nowhere/run.log", "No such file or directory"), (".", "Is a directory"), ("", "is empty")]
)
def test_a_log_that_cannot_be_written(checkpoint, file, reason):
    assert reason in refused("inspect", checkpoint, "--log-file", file)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_disk_ends_the_log_and_not_the_command(checkpoint):
    result = call("inspect", checkpoint, "--log-file", "/dev/full")
    assert result.stderr == "--log-file /dev/full: No space left on device; logging stops here\n"
    assert result.stdout == call("inspect", checkpoint).stdout


def test_warnings_of_python_and_of_other_packages_are_in_the_log(checkpoint, monkeypatch):
    separate = logging.getLogger("huggingface_hub.test")  # torch's loggers do not propagate either
    monkeypatch.setattr(separate, "propagate", False)
    monkeypatch.setattr(separate, "handlers", [logging.NullHandler()])

    def odd(*_):
        warnings.warn("an odd value", stacklevel=1)
        separate.warning("rate %s", "limited")
        separate.info("not shown")
        logging.getLogger("torch").debug("internals")

    monkeypatch.setattr("ssmcompress.evaluation.measure._check_outputs", odd)
    with pytest.warns(UserWarning, match="an odd value"):  # it is shown as usual
        call("evaluate", checkpoint, "--log-file", "run.log")
    found = read_log()
    assert ("WARNING", "huggingface_hub.test", "rate limited") in found
    assert any(level == "WARNING" and "UserWarning: an odd value" in text for level, _, text in found)
    assert not [text for text in texts() if "internals" in text or "not shown" in text]


def test_a_library_warning_is_printed_once_and_logged(checkpoint, monkeypatch):
    def warn(*_):
        logging.getLogger("ssmcompress").warning("slow ops, use `force=True`")

    monkeypatch.setattr("ssmcompress.evaluation.measure._check_outputs", warn)
    for more in ([], ["--verbose"]):
        shown = call("evaluate", checkpoint, "--log-file", "run.log", *more).stderr
        assert shown.count("slow ops, use --force\n") == 1
    assert "slow ops" not in call("evaluate", checkpoint, "--log-file", "run.log", "--quiet").stderr
    assert texts().count("slow ops, use --force") == 3


def test_control_characters_and_further_lines_cannot_make_records(checkpoint, monkeypatch):
    def warn(*_):
        logging.getLogger("ssmcompress").warning("a\x1b[31m\n2026-01-01 00:00:00.000+00:00 ERROR ssmcompress: forged")

    monkeypatch.setattr("ssmcompress.evaluation.measure._check_outputs", warn)
    call("evaluate", checkpoint, "--log-file", "run.log")
    assert not [text for text in texts() if text == "forged"]
    assert "\x1b" not in Path("run.log").read_text()


def test_logging_is_as_before_after_a_command(checkpoint):
    logger = logging.getLogger("ssmcompress")

    def state():
        return logger.level, [*logger.handlers], logging.getLogRecordFactory(), warnings.showwarning

    before = state()
    call("inspect", checkpoint, "--log-file", "run.log", "--verbose")
    call("inspect", "nowhere", "--log-file", "run.log", code=2)
    assert state() == before
    size = os.path.getsize("run.log")
    logger.error("after it")
    assert os.path.getsize("run.log") == size


def test_of_several_processes_the_main_one_logs_and_the_others_their_errors(checkpoint, monkeypatch):
    monkeypatch.setattr("ssmcompress.cli.terminal.OTHERS_WAIT", 0)
    monkeypatch.setenv("RANK", "1")
    call("inspect", checkpoint, "--log-file", "run.log", "--verbose")
    assert not texts()
    call("inspect", "nowhere", "--log-file", "run.log", code=2)
    assert [(level, text) for level, _, text in read_log()] == [
        ("ERROR", "exit code 2: process 1: nowhere: no such file or folder")
    ]
    monkeypatch.setenv("RANK", "0")
    call("inspect", checkpoint, "--log-file", "run.log")
    assert sum(text.startswith("command: ") for text in texts()) == 1


def test_a_process_logs_as_the_runner_does(checkpoint):
    process("inspect", checkpoint, "--log-file", "run.log", "--quiet")
    assert texts()[1].startswith("command: ssmcompress inspect")
