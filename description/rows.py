"""All attribute sources of a run -> canonical rows and how often each combination occurs."""

from collections import Counter
from pathlib import Path

from description.canonical import CLOSED, INVISIBLE, SLOTS, canonical_row
from description.readers import read_attributes
from description.texts import Templates, check_slots
from util.errors import InputError


def read_rows(args, columns: dict[str, str], templates: Templates, facts: dict) -> Counter:
    """Canonical rows with their counts: {sorted tuple of (slot, value): rows}."""
    extra = tuple(templates.slots() - {*SLOTS, *INVISIBLE, "decade"})
    rows: Counter[tuple] = Counter()
    unknown: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    for path in args.attributes:
        for raw in read_attributes(path, args.format, columns, args.split, extra):
            seen |= set(raw)
            row = canonical_row(raw, unknown)
            rows[tuple(sorted((k, v) for k, v in row.items() if k in templates.slots() or k in SLOTS))] += 1
    rows.pop((), None)
    check_slots(templates, Path(args.templates), seen)
    if not rows:
        raise InputError(
            f"--attributes {' '.join(args.attributes)}: no row has a usable value"
            + (f" with --split {args.split}" if args.split else "")
            + "; check the columns, or name them with --column"
        )
    facts["rows"] = rows.total()
    facts["combinations"] = len(rows)
    facts["attributes"] = sorted({slot for row in rows for slot, _ in row})
    facts["invisible_columns"] = sorted(seen & set(INVISIBLE))
    for (slot, value), count in unknown.most_common(8):
        kind = "kept as it is" if slot in CLOSED and any(c.isalpha() for c in value) else "left out"
        print(f"unknown {slot} '{value}' in {count} rows: {kind}")
    facts["unknown_values"] = len(unknown)
    return rows
