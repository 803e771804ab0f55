"""Being told to stop while data workers die of the same signal."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT

# the child stands for a data worker, the handler for torch's, which raises in the line at hand
SCRIPT = """
import os, signal, sys, time
from util.stop import StopGuard

output, where, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = 0

def raise_for_dead_child(*_):
    raise RuntimeError("a data worker was killed")

def child(seconds):
    if os.fork() == 0:
        time.sleep(seconds)
        os._exit(1)

def save():
    time.sleep(1.0)  # a slow disk
    with open(output, "w") as opened:
        opened.write(str(done))

with StopGuard(save, True) as guard:
    signal.signal(signal.SIGCHLD, raise_for_dead_child)
    child(0.3)  # dies while the state is saved, or while it changes
    if where == "commit":
        with guard.committing():
            for _ in range(6):
                time.sleep(0.1)
                done += 1
    if number:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    raise ConnectionResetError("the worker is gone")
"""


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("where", ["save", "commit"])
def test_a_dying_worker_does_not_cost_the_state(tmp_path, where, number):
    output = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, output, where, str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert output.is_file(), done.stderr
    assert output.read_text() == ("6" if where == "commit" else "0")
    assert done.returncode == (128 + number if number else 1), done.stderr
