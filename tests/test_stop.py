"""Being told to stop while data workers die of the same signal."""

import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from util.precision import pick_threads
from util.stop import StopGuard

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


LOST = """
import os, signal, sys
from util.errors import run_or_explain

def main():
    for number in range(3000):
        print(f"line {number} \\udcff", flush=number % 2 == 0)
    open(sys.argv[1], "w").write("done")

run_or_explain(main)
"""


@pytest.mark.parametrize("target", ["pipe", "/dev/full"])
def test_output_that_is_lost_fails_nothing(tmp_path, target):
    """`| tee` is gone, or the log's disk is full: the work is done, with exit status 0."""
    words = [sys.executable, "-c", LOST, tmp_path / "done"]
    if target == "pipe":
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
    else:
        process = subprocess.Popen(words, cwd=ROOT, stdout=open(target, "w"), stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    assert process.wait(timeout=60) == 0 and "Traceback" not in error
    assert (tmp_path / "done").read_text() == "done"


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopGuard(lambda: "", True):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_threads_are_what_is_free(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for free, ranks, threads in ((2.0, 1, 2), (0.3, 1, 1), (-6.0, 1, 1), (8.0, 1, 7), (8.0, 2, 3), (1.5, 1, 1)):
        monkeypatch.setattr("util.precision.free_cores", lambda free=free: free)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert pick_threads.__wrapped__() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert pick_threads.__wrapped__() == torch.get_num_threads()
