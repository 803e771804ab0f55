"""Named stages with a record each: a stage that was done with the same settings is not done again."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from util.dist import broadcast, is_main_process, print_main, wait_for_main
from util.files import write_json


class Stages:
    """Runs stages in order. Each leaves `stages/NAME.json` with its settings, counts and seconds. Its fingerprint
    covers the settings of all stages before it, and doing a stage removes the records of those after it: a change, or a
    record that was removed, redoes that stage and those after it, no others."""

    def __init__(self, folder: Path):
        self.folder, self.fingerprint, self.records = folder / "stages", "", {}

    def run(self, name: str, settings: dict, work: Callable[[str], dict], shared: bool = False) -> dict:
        """Do the stage or recall it, and return its counts.

        Args:
            settings: everything its result depends on beside the stages before.
            work: takes the fingerprint, returns the counts to record.
            shared: all ranks work; otherwise rank 0 does, and the others wait.
        """
        text, file = json.dumps([self.fingerprint, name, settings], sort_keys=True), self.folder / f"{name}.json"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        record = broadcast(json.loads(file.read_text()) if file.is_file() else None)
        if record is not None and record["fingerprint"] == self.fingerprint:
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
                write_json(file, record)
                said = ", ".join(f"{key} {value}" for key, value in counts.items())
                print_main(f"{name}: {said} ({record['seconds']:.1f} s)")
            wait_for_main()
            record = broadcast(record)
        self.records[name] = record
        return record["counts"]
