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


def _child(words: list[str], env: dict[str, str], files: tuple[str, str]) -> None:
    """Become `python WORDS` with this environment and these files as output."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    os.chdir(Path(__file__).resolve().parent.parent)
    try:
        sys.argv = words[words[0] == "-m" :]
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(words: list[str], processes: int, timeout: float) -> subprocess.CompletedProcess:
    """Run `python WORDS`, on several ranks where `processes` is above 1; the output of the ranks is joined. Where one
    fails the others get five seconds, as under the launcher."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        files, children, end = (f"{folder}/out", f"{folder}/err"), [], time.monotonic() + timeout
        for rank in map(str, range(processes)):
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)}
                env |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            children.append(context.Process(target=_child, args=(words, dict(env), files)))
            children[-1].start()
        while any(child.is_alive() for child in children):
            if any(child.exitcode for child in children):
                end = min(end, time.monotonic() + 5)
            for child in children if time.monotonic() > end else ():
                child.kill()
            time.sleep(0.02)
        texts = [Path(file).read_text() if Path(file).exists() else "" for file in files]
    code = next((child.exitcode for child in children if child.exitcode), 0)
    return subprocess.CompletedProcess(words, code, *texts)
