"""Named stages with a record each: a stage that was done with the same settings is not done again."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from util.dist import broadcast, is_main_process, print_main, wait_for_main
from util.errors import InputError
from util.files import file_sha256, read_json, write_json


class Stages:
    """Runs stages in order. Each leaves `stages/NAME.json` with its settings, counts, seconds and the hashes of its
    files. Its fingerprint covers the settings of all stages before it, and doing a stage removes the records of those
    after it: a change, or a record or file that was removed or damaged, redoes that stage and those after it."""

    def __init__(self, folder: Path):
        self.root, self.folder, self.fingerprint, self.records = folder, folder / "stages", "", {}

    def run(self, name: str, settings: dict, work: Callable[[str], dict], files: str = "", shared: bool = False):
        """Do the stage or recall it, and return its counts.

        Args:
            settings: everything its result depends on beside the stages before.
            work: takes the fingerprint, returns the counts to record.
            files: patterns of what it leaves for those after it, with {job} for the fingerprint.
            shared: all ranks work; otherwise rank 0 does, and the others wait.
        """
        text, file = json.dumps([self.fingerprint, name, settings], sort_keys=True), self.folder / f"{name}.json"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        record = broadcast(self._recall(file) if is_main_process() else None)
        if record is not None:
            print_main(f"{name}: done before")
        else:
            if is_main_process():
                for later in set(self.folder.glob("*.json")) - {self.folder / f"{done}.json" for done in self.records}:
                    later.unlink()  # they must not vouch for files that are now rewritten
            started = time.perf_counter()
            counts = work(self.fingerprint) if shared or is_main_process() else {}
            if is_main_process():
                record = {"fingerprint": self.fingerprint, "settings": settings, "counts": counts}
                record["seconds"] = round(time.perf_counter() - started, 2)
                found = [f for pattern in files.format(job=self.fingerprint).split() for f in self.root.glob(pattern)]
                record["files"] = {str(f.relative_to(self.root)): file_sha256(f) for f in sorted(found)}
                write_json(file, record)
                said = ", ".join(f"{key} {value}" for key, value in counts.items())
                print_main(f"{name}: {said} ({record['seconds']:.1f} s)")
            wait_for_main()
            record = broadcast(record)
        self.records[name] = record
        return record["counts"]

    def _recall(self, file: Path) -> dict | None:
        """Read the record of a stage that was done with these settings, and whose files are as it left them."""
        try:
            record = read_json(file, "") if file.is_file() else {}
            if record.get("fingerprint") != self.fingerprint:
                return None
            damaged = [name for name, digest in record["files"].items() if file_sha256(self.root / name) != digest]
            dict(record["counts"])
        except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            record, damaged = None, [str(error)]
        if damaged:
            print_main(f"{file.stem}: done again, for its files have changed or are gone ({damaged[0]})")
        return None if damaged else record
