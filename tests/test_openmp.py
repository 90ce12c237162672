"""Settings of OpenMP threads: set before torch reads them, and never overriding the user's settings."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import ssmcompress
from ssmcompress.openmp import one_thread, read_quota
from ssmcompress.ops.cpu import contention
from ssmcompress.ops.cpu.contention import Watch, used_by_others


def environment_after(code: str, **own: str) -> list[str]:
    """GOMP_SPINCOUNT and OMP_NUM_THREADS as a new process has them after running some code."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    code += "; import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_NUM_THREADS'))"
    run = subprocess.run([sys.executable, "-c", code], env=kept | own, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_waits_are_short_unless_the_user_says_otherwise():
    assert environment_after("import ssmcompress")[0] == "3000"
    assert environment_after("import ssmcompress", GOMP_SPINCOUNT="7")[0] == "7"
    assert environment_after("import ssmcompress", OMP_WAIT_POLICY="ACTIVE")[0] == "None"
    assert environment_after("import torch, ssmcompress")[0] == "None"


def test_a_quota_of_cores_limits_the_threads():
    with_quota = "from ssmcompress import openmp; import sys; openmp.read_quota = lambda: 1; openmp.count_cores = {}"
    prepare = "; openmp.prepare()"
    assert environment_after(with_quota.format("lambda: 4") + prepare)[1] == "1"
    assert environment_after(with_quota.format("lambda: 4") + prepare, OMP_NUM_THREADS="3")[1] == "3"
    assert environment_after(with_quota.format("lambda: 1") + prepare)[1] == "None"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "200000 0\n"}, None),
        ({"cpu.max": "nothing\n"}, None),
        ({}, None),
    ],
)
def test_quotas_of_containers(files, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_quota(tmp_path) == cores


@pytest.fixture
def alone(monkeypatch):
    """No other thread of Python; the test runner may have some."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)


@pytest.mark.usefixtures("alone")
def test_one_thread_and_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
        with one_thread(small=False):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("alone")
def test_a_forward_for_one_small_image_runs_on_one_thread(vim):
    seen = []
    vim.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    shape = vim.config.in_chans, *vim.config.image_size
    many = 1 + (4 << 20) // vim.activation_bytes()
    try:
        with torch.no_grad():
            vim(torch.zeros(1, *shape))
            vim(torch.zeros(many, *shape))
        assert seen == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Machine:
    """A simulated machine on which other processes use `share` of a core more than is left to them."""

    def __init__(self, monkeypatch, threads: int):
        self.seconds, self.used, self.teams = 0.0, 100.0, []
        self.left = os.cpu_count() - threads
        monkeypatch.setattr(contention, "perf_counter", lambda: self.seconds)
        monkeypatch.setattr(contention, "count_cores", os.cpu_count)
        self.watch = Watch(lambda function, data, threads, flags: self.teams.append(threads), lambda: self.used)
        self.threads = threads

    def look(self, share: float, times: int = 1) -> bool:
        for _ in range(times):
            self.seconds += 0.5
            self.used += 0.5 * (self.left + share)
            self.watch.look(self.threads)
        return self.watch.shortens


@pytest.mark.parametrize("threads", [1, os.cpu_count()])
def test_waits_are_short_while_others_take_cores(threads, monkeypatch):
    machine = Machine(monkeypatch, threads)
    assert not machine.look(0.0, 3)
    assert machine.look(1.5)
    # More OpenMP threads than cores, including torch's: then it spins only briefly.
    assert machine.teams == [max(2, os.cpu_count() - threads + 2)]
    assert machine.look(0.0, 5)
    assert machine.look(0.2, 30), "not quiet enough"
    assert not machine.look(0.0, 10)
    assert machine.look(0.5)
    assert len(machine.teams) == 2


def test_it_looks_twice_a_second(monkeypatch):
    looks, seconds = [], [0.0]
    monkeypatch.setattr(contention, "perf_counter", lambda: seconds[0])
    watch = Watch(lambda *_: None, lambda: looks.append(0) or 0.0)
    for tick in range(1, 1001):
        seconds[0] = tick / 100
        watch.look(1)
    assert 1 + 18 <= len(looks) <= 1 + 20


def test_other_threads_of_python_keep_their_number_of_threads():
    """torch has one number for all threads that use it for the first time."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    go, done = threading.Event(), threading.Event()

    def work():
        go.wait()
        torch.ones(10).sum()
        seen.append(torch.get_num_threads())
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with one_thread():
            go.set()
            done.wait()
        assert seen == [2]
    finally:
        worker.join()
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="a file of Linux")
def test_own_time_is_not_that_of_others(tmp_path):
    spent, others, start = os.times()[:2], used_by_others(), time.perf_counter()
    while time.perf_counter() - start < 0.5:
        pass
    own = sum(os.times()[:2]) - sum(spent)
    assert used_by_others() - others < own * os.cpu_count() + 0.5
    core, other = min(os.sched_getaffinity(0)), 10_000
    lines = ["cpu  1 1 1 1 1 1 1 1 0 0", f"cpu{core} 100 200 300 1000 50 6 7 8 0 0", f"cpu{other} 9 9 9 9 9 9 9 9 0 0"]
    (tmp_path / "stat").write_text("\n".join([*lines, "intr 1 2 3", ""]))
    ticks = os.sysconf("SC_CLK_TCK")
    # Without idle time, and without the cores that this process may not use.
    assert used_by_others(tmp_path / "stat") + sum(os.times()[:2]) == pytest.approx(621 / ticks, abs=0.2)
    (tmp_path / "stat").write_text("something else\n")
    assert used_by_others(tmp_path / "stat") is None
    assert used_by_others(tmp_path / "missing") is None


def test_a_system_that_says_nothing_is_left_alone():
    watch = Watch(lambda *_: pytest.fail("a team was started"), lambda: None)
    watch._looked -= 10
    watch.look(2)
    assert not watch.shortens


def test_importing_the_package_imports_no_torch():
    code = "import sys, ssmcompress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert ssmcompress.__version__
