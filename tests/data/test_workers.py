"""Worker processes that read items."""

import subprocess
import sys
import textwrap
import time

import psutil
import pytest

READ = textwrap.dedent(
    """
    import time
    from ssmcompress.data.workers import make_loader

    class Items:
        def __getitem__(self, row):
            print("reading", flush=True)
            return {item}

    def begin(worker):
        print("beginning", flush=True)
        time.sleep({pause})

    for _ in make_loader(Items(), [[row] for row in range(8)], 2, begin):
        time.sleep(1000)
    """
)


def live(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
@pytest.mark.parametrize(
    ("item", "pause", "said"),
    [("row", 0, "reading"), ("row", 1000, "beginning"), ("bytes(10**6)", 0, "reading")],
    ids=["while it waits", "before it has begun", "with results that nobody takes"],
)
def test_workers_end_when_their_parent_is_killed(item, pause, said):
    process = subprocess.Popen([sys.executable, "-c", READ.format(item=item, pause=pause)], stdout=subprocess.PIPE)
    while said not in process.stdout.readline().decode():
        assert process.poll() is None
    time.sleep(0.3)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(live, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [worker for worker in workers if live(worker)]
    for worker in left:
        worker.kill()
    assert not left
