"""Work cut into parts that the ranks share: every part is a file, and a file that exists is done."""

import time
from pathlib import Path

from util.claim import claim
from util.dist import barrier, get_rank, get_world_size, is_main_process


class Parts:
    """The parts of `total` items, `size` items each, in a folder of their own that only this job may use.

    Args:
        job: what the parts depend on; a folder with parts of another job is refused.
        what: the folder's content in words, for that message.
        ending: of the files.
    """

    def __init__(self, folder: Path, job: dict, what: str, total: int, size: int, ending: str):
        self.folder, self.total, self.size, self.ending = folder, total, size, ending
        claim(folder / "job.json", job, what)
        self.starts = range(0, total, size)
        # shared out before looking what is there: ranks that look at different moments must not disagree
        self.todo = [s for s in self.starts[get_rank() :: get_world_size()] if not self.file(s).is_file()]
        barrier()  # rank 0 may remove the folder only after all have looked

    def file(self, start: int) -> Path:
        return self.folder / f"part_{start:010d}{self.ending}"

    def stop(self, start: int) -> int:
        return min(start + self.size, self.total)

    def items_to_do(self) -> int:
        """Items of this rank that are still to do."""
        return sum(self.stop(start) - start for start in self.todo)

    def complete(self) -> bool:
        """On rank 0 True, once every rank has done its parts; False at once elsewhere."""
        if not is_main_process():
            return False
        while not all(self.file(start).is_file() for start in self.starts):
            time.sleep(0.2)
        return True

    def remove(self) -> None:
        """All files, also what a killed write left; job.json last: no other job can adopt the rest."""
        for file in self.folder.iterdir():
            if file.name != "job.json":
                file.unlink()
        (self.folder / "job.json").unlink()
        self.folder.rmdir()
