"""What a description run leaves: the bank, its texts, what was removed, and the report."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip

from datasets.path_list import printable
from datasets.text_bank import hash_texts
from description.texts import wordings_of
from reports.description import write_description_report
from util.files import write_atomic, write_json


def write_folder(args, candidates, templates, identity, facts: dict, paths) -> None:
    """texts.jsonl, removed.jsonl, bank.npy, bank.json, report.html in --output.

    bank.json is written last: it describes the others, and a folder without it is refused.
    """
    output = Path(args.output)
    kept = []
    for number, (text, note) in enumerate(zip(candidates.texts, candidates.notes)):
        row = {"id": number, "text": text.text, "kind": text.kind, "attrs": text.attrs, "template": text.template}
        if args.ensemble:
            row["wordings"] = wordings_of(text, templates, True)
        kept.append(row | {"rows": text.count} | note)
    bank = candidates.embeddings.numpy().astype(np.float32)
    title = f"Texts for {identity.model}: {len(kept)} kept, {len(candidates.removed)} removed"
    (output / "bank.json").unlink(missing_ok=True)
    write_lines(output / "texts.jsonl", [_named(row, paths) for row in kept])
    write_lines(output / "removed.jsonl", [_named(row, paths) for row in candidates.removed])
    write_atomic(output / "bank.npy", lambda opened: np.save(opened, bank))
    lists = {"kept": kept, "removed": candidates.removed}
    write_description_report(output / "report.html", title, facts, lists, paths, args.report_texts)
    write_json(
        output / "bank.json",
        {
            "kind": "cgd-mae text bank folder",
            "teacher": asdict(identity),
            "pretrained": str(args.clip_pretrained),
            "texts": len(kept),
            "dim": bank.shape[1],
            "dtype": "float32",
            "logit_scale": math.log(1 / identity.tau),
            "texts_sha256": hash_texts([row["text"] for row in kept]),
            "bank_sha256": hashlib.sha256(bank.tobytes()).hexdigest(),
            "templates_sha256": hashlib.sha256(Path(args.templates).read_bytes()).hexdigest(),
            "ensemble": args.ensemble,
            "grounded": paths is not None,
            "open_clip": open_clip.__version__,
        },
    )


def write_lines(file: Path, rows: list[dict]) -> None:
    """JSON objects, one a line, atomically."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(file, lambda opened: opened.write(text.encode()))


def _named(row: dict, paths) -> dict:
    """Images by name rather than by number: numbers mean nothing without the list."""
    if "images" not in row:
        return row
    return row | {"images": [printable(paths.relative(index)) for index in row["images"]]}
