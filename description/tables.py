"""Tables of attributes (.csv .tsv .jsonl) with whatever columns exist -> raw rows by slot."""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from description.canonical import column_key, slot_of
from util.errors import InputError

ENDINGS = (".csv", ".tsv", ".jsonl")


def read_text(file: Path, encoding: str = "utf-8-sig") -> str:
    """A whole text file; InputError if it is missing or in another encoding."""
    try:
        return file.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        raise InputError(f"{file} is not {name} text (byte {error.start}): save it as {name}") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def iterate_table(
    file: Path, columns: dict[str, str], split: str | None, extra: tuple[str, ...] = ()
) -> Iterator[dict[str, str]]:
    """Rows as {slot: value}, empty values left out.

    Args:
        columns: slot -> name of its column, where the built-in names do not find it.
        split: keep the rows whose column `split` has this value, if there is such a column.
        extra: keys of further columns to carry along under their own key.
    Raises:
        InputError: ending, encoding, a broken row (with its line), duplicated columns, no usable column.
    """
    if file.suffix.lower() not in ENDINGS:
        raise InputError(f"--attributes {file}: a table ends in {', '.join(ENDINGS)}")
    mapping: dict[str, str] | None = None
    missing = dict(columns)  # of a .jsonl, whose rows need not all have the same keys
    usable = False
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            is_json = file.suffix.lower() == ".jsonl"
            source = _json_rows(file, opened) if is_json else _csv_rows(file, opened)
            for header, row in source:
                if mapping is None or is_json:
                    mapping = map_columns(file, header, columns, extra, strict=not is_json)
                    missing = {slot: name for slot, name in missing.items() if name not in header}
                    usable = usable or bool(mapping)
                if split is not None and "split" in row and row["split"] != split:
                    continue
                yield {slot: row[name] for name, slot in mapping.items() if row.get(name) not in (None, "")}
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    if mapping is None:
        raise InputError(f"{file} has no row")
    for slot, name in missing.items():
        raise InputError(f"--column {slot}={name}: no row of {file} has this key")
    if not usable:
        raise InputError(f"{file} has no usable key in any row: name them with --column make=NAME body=NAME")


def map_columns(
    file: Path, header: list[str], columns: dict[str, str], extra: tuple[str, ...], strict: bool = True
) -> dict[str, str]:
    """{column: slot} of a header.

    Raises:
        InputError: two columns of one name or for one slot, a named column that is not there, none usable.
    """
    double = next((name for name in header if header.count(name) > 1), None)
    if double is not None:
        raise InputError(f"{file} has two columns '{double}': rename one of them")
    for slot, name in columns.items():
        if name not in header and strict:
            raise InputError(f"--column {slot}={name}: {file} has {', '.join(header)}")
    chosen = {name: slot for slot, name in columns.items() if name in header}
    for name in header:
        slot = slot_of(name)
        if name not in chosen and slot and slot not in columns:
            other = next((n for n, s in chosen.items() if s == slot), None)
            if other:
                raise InputError(
                    f"{file}: the columns '{other}' and '{name}' both hold the {slot}; choose with --column {slot}=NAME"
                )
            chosen[name] = slot
        elif name not in chosen and column_key(name) in extra:
            chosen[name] = column_key(name)
    if {"make", "model"} & set(chosen.values()):  # the class name only repeats them
        chosen = {name: slot for name, slot in chosen.items() if slot != "class_name"}
    if not chosen and strict:
        raise InputError(
            f"{file} has no usable column: its first line holds {', '.join(header) or 'nothing'}; name them "
            "with --column make=NAME body=NAME"
        )
    return chosen


def _csv_rows(file: Path, opened) -> Iterator[tuple[list[str], dict]]:
    reader = csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise InputError(
                    f"{file}, line {reader.line_num} has {len(values)} fields where the first line has {len(header)}"
                )
            yield header, dict(zip(header, (value.strip() for value in values)))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num} is damaged: {error}") from error


def _json_rows(file: Path, opened) -> Iterator[tuple[list[str], dict]]:
    for number, line in enumerate(opened, 1):
        if not line.strip():
            continue

        def unique(pairs, number=number):
            double = next((k for k, n in Counter(k for k, _ in pairs).items() if n > 1), None)
            if double is not None:
                raise InputError(f"{file}, line {number} has two keys '{double}': remove one of them")
            return dict(pairs)

        try:
            row = json.loads(line, object_pairs_hook=unique)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise InputError(f"{file}, line {number} is not a JSON object")
        nested = next((k for k, v in row.items() if isinstance(v, (list, dict)) and slot_of(k)), None)
        if nested is not None:
            raise InputError(
                f"{file}, line {number}: '{nested}' holds {json.dumps(row[nested])[:60]}, not one text: "
                "write a row for each value"
            )
        plain = {k: "" if v is None else str(v) for k, v in row.items() if not isinstance(v, (list, dict))}
        yield list(plain), plain
