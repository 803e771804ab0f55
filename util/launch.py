"""Start and end of a job on any number of processes: device, process group, lock of its folder."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from util.dist import end_distributed, init_distributed, is_main_process, pick_device
from util.stop import end_with_launcher, hear_no_deaths_at_exit, run_lock


def launch(device: str, folder: str | Path, job: Callable[[torch.device], dict], timeout_s: float = 600.0) -> dict:
    """Run `job(device)` with torchrun's group joined, if there is one, and `folder` locked on rank 0.

    Raises:
        InputError: no such device, a rank that did not come within `timeout_s`, or another run in the folder.
    """
    bound = pick_device(device)
    end_with_launcher()
    hear_no_deaths_at_exit()
    init_distributed(bound, timeout_s)
    try:
        with run_lock(Path(folder)) if is_main_process() else contextlib.nullcontext():
            return job(bound)
    finally:
        end_distributed()
