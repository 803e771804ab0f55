"""Programs of the project in processes that are forked from one that has imported torch: a command in a second.

`torch.distributed.run` is stood in for by one process a rank with the variables that it sets; tests of the launcher
itself start it for real.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PRELOAD = ["torch", "torchvision", "timm", "open_clip", "torch.utils.tensorboard", "matplotlib.pyplot"]


def _child(words: list[str], env: dict[str, str], out: str, err: str) -> None:
    """Become `python WORDS` with this environment and these files as output."""
    for number, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    os.chdir(Path(__file__).resolve().parent.parent)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(words: list[str], processes: int, timeout: float) -> subprocess.CompletedProcess:
    """Run `python WORDS`, on several ranks where `processes` is above 1; the output of the ranks is joined."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = []
        for rank in range(processes):
            env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                env |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            files = [f"{folder}/{name}" for name in ("out", "err")]
            children.append(context.Process(target=_child, args=(words, env, *files)))
            children[-1].start()
        _wait(children, timeout)
        texts = [Path(folder, name).read_text() if Path(folder, name).exists() else "" for name in ("out", "err")]
    code = next((child.exitcode for child in children if child.exitcode), 0)
    return subprocess.CompletedProcess(words, code, *texts)


def _wait(children: list, timeout: float) -> None:
    """Until all have ended; where one fails the others get five seconds, as under the launcher."""
    end = time.monotonic() + timeout
    while any(child.is_alive() for child in children):
        if any(child.exitcode for child in children):
            end = min(end, time.monotonic() + 5)
        if time.monotonic() > end:
            for child in children:
                child.kill()
        time.sleep(0.02)
