"""Being told to stop while data workers die of the same signal; output that is lost; threads."""

import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, command, run_command

from util.loop import StopGuard
from util.precision import pick_threads

# the child stands for a data worker, the handler for torch's, which raises in the line at hand
SCRIPT = """
import os, signal, sys, time
from util.loop import StopGuard

output, where, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
done = 0

def raise_for_dead_child(*_):
    raise RuntimeError("a data worker was killed")

def save():
    time.sleep(0.6)  # a slow disk
    with open(output, "w") as opened:
        opened.write(str(done))

with StopGuard(save, True) as guard:
    signal.signal(signal.SIGCHLD, raise_for_dead_child)
    if os.fork() == 0:  # dies while the state is saved, or while it changes
        time.sleep(0.3)
        os._exit(1)
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


@pytest.mark.parametrize("where, number", [
    ("save", 0), ("save", signal.SIGTERM), ("commit", signal.SIGINT), ("commit", signal.SIGHUP),
])  # fmt: skip
def test_a_dying_worker_does_not_cost_the_state(tmp_path, where, number):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_command(command(str(tmp_path / "script.py"), str(tmp_path / "state"), where, str(int(number))))
    assert (tmp_path / "state").read_text() == ("6" if where == "commit" else "0"), done.stderr
    assert done.returncode == (128 + number if number else 1), done.stderr


LOST = """
import os, signal, sys
from util.cli import run_tool

def main(args):
    for number in range(3000):
        print(f"line {number} \\udcff", flush=number % 2 == 0)
    open(sys.argv[1], "w").write("done")

run_tool(main, None, None)
"""


@pytest.mark.parametrize("target", ["pipe", "/dev/full"])
def test_output_that_is_lost_fails_nothing(tmp_path, target):
    """`| tee` is gone, or the log's disk is full: the work is done, with exit status 0."""
    output = subprocess.PIPE if target == "pipe" else open(target, "w")
    words = [sys.executable, "-c", LOST, tmp_path / "done"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True)
    if process.stdout:
        process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 0 and "Error" not in error and (tmp_path / "done").read_text() == "done", error


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
