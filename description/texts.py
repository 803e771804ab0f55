"""Rows of attributes and templates -> texts, de-duplicated, with where each comes from."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from description.canonical import INVISIBLE, MEASURE, SLOTS, canonical_row, column_key, names_body, with_articles
from description.readers import read_attributes, read_text
from util.errors import InputError
from util.files import fits, read_json


@dataclass
class Text:
    """One description. `text`: its first wording; `phrase`: what all wordings hold; `kind`: the slots it names
    ("colour+body"), its factor bank; `count`: rows that gave rise to it, 0 for words of the template file alone."""

    text: str
    phrase: str
    kind: str
    template: str
    attrs: dict[str, str]
    count: int


@dataclass
class Templates:
    """`phrases`: dicts with `phrase`, `words` (slots that the file's own words may fill where no row has them) and
    `unless` (slots whose presence in a row rules the phrase out)."""

    phrases: list[dict]
    wordings: list[str]
    words: dict[str, list[str]]
    contradictions: list[dict[str, str]]

    def slots(self) -> set[str]:
        return {slot for p in self.phrases for slot in (*slots_of(p["phrase"]), *p.get("unless", ()))}


def slots_of(phrase: str) -> list[str]:
    return re.findall(r"{(\w+)}", phrase)


def read_templates(file: Path) -> Templates:
    """Read a .json as `description/templates.json`, or a .txt with one whole text with {slots} a line."""
    if file.suffix.lower() == ".txt":
        content = {"templates": [line.strip() for line in read_text(file).splitlines() if line.strip()]}
    else:
        content = read_json(file, "write it like description/templates.json")
    given = content.get("templates")
    phrases = [{"phrase": t} if isinstance(t, str) else t for t in given] if isinstance(given, list) else []
    wordings, words = content.get("wordings") or ["{phrase}"], content.get("words", {})
    templates = Templates(phrases, wordings, words, content.get("contradictions", []))
    shapes = [(wordings, [str]), (words, {str: [str]}), (templates.contradictions, [{str: str}])]
    if not phrases or not all(fits(value, shape) for value, shape in shapes):
        raise InputError(f"--templates {file} is not made like description/templates.json")
    templates.words = {column_key(slot): values for slot, values in words.items()}
    for template in phrases:
        parts = template if isinstance(template, dict) else {}
        phrase = parts.get("phrase")
        if not fits(phrase, str) or not all(fits(parts.get(key, []), [str]) for key in ("words", "unless")):
            raise InputError(f"--templates {file} is not made like description/templates.json: {str(template)[:80]}")
        stripped = re.sub(r"{\w+}", "", phrase)
        if "{" in stripped or "}" in stripped or not slots_of(phrase):
            raise InputError(f"--templates {file}: '{phrase}' needs slots in braces, as in 'a {{colour}} {{body}}'")
        if missing := set(parts.get("words", ())) - set(templates.words):
            raise InputError(f"--templates {file}: '{phrase}' asks for words of '{missing.pop()}', and there are none")
    return templates


def read_rows(args, columns: dict[str, str], templates: Templates, facts: dict) -> Counter:
    """Read --attributes into canonical rows with their counts: {sorted tuple of (slot, value): rows}."""
    wanted = templates.slots()
    extra = tuple(wanted - {*SLOTS, *INVISIBLE, "decade"})
    rows, unknown, seen = Counter(), Counter(), set()
    for path in args.attributes:
        for raw in read_attributes(path, args.format, columns=columns, split=args.split, extra=extra):
            seen |= set(raw)
            row = canonical_row(raw, unknown)
            rows[tuple(sorted((k, v) for k, v in row.items() if k in wanted or k in SLOTS))] += 1
    rows.pop((), None)
    if missing := sorted(set(extra) - seen - set(templates.words)):
        raise InputError(
            f"--templates {args.templates}: unknown placeholder {{{missing[0]}}}; known are {', '.join(SLOTS)}, decade "
            "and the columns of the table"
        )
    if not rows:
        raise InputError("--attributes: no row has a usable value; check --split and the columns, or use --column")
    facts |= {"rows": rows.total(), "combinations": len(rows), "unknown_values": len(unknown)}
    facts["attributes"] = sorted({slot for row in rows for slot, _ in row})
    facts["invisible_columns"] = sorted(seen & set(INVISIBLE))
    for (slot, value), count in unknown.most_common(8):
        print(f"unknown {slot} '{value}' in {count} rows")
    return rows


def fill(templates: Templates, rows: Counter, *, use_words: bool = True) -> list[Text]:
    """Fill every template with every combination that occurs in the rows.

    A slot that a template lists under `words` and no row has is filled with the file's own words: that is a factor
    bank. Nothing else is multiplied out.

    Args:
        rows: counts of rows, keys are sorted tuples of (slot, value).
    Returns:
        Texts that are unique after lower case and white space.
    """
    present, texts = {slot for row in rows for slot, _ in row}, {}
    for template in templates.phrases:
        phrase = template["phrase"]
        slots = list(dict.fromkeys(slots_of(phrase)))
        free = [s for s in slots if use_words and s in template.get("words", ()) and s not in present]
        needed, unless = set(slots) - set(free), set(template.get("unless", ()))
        combinations = Counter()
        for row, count in rows.items():
            values = dict(row)
            if needed <= values.keys() and not unless & values.keys():
                combinations[tuple((slot, values[slot]) for slot in slots if slot in needed)] += count
        for (values, count), words in itertools.product(
            combinations.items(), list(itertools.product(*(templates.words[s] for s in free)))
        ):
            attrs = dict(values) | dict(zip(free, words))
            is_odd = any(rule.items() <= attrs.items() for rule in templates.contradictions)
            if is_odd or ("model" in attrs and "body" in attrs and names_body(attrs["model"], attrs["body"])):
                continue  # "a Ram Pickup pickup truck"
            said = re.sub(r"{(\w+)}", lambda match, attrs=attrs: attrs[match[1]], phrase)
            text, kind = word(said, templates.wordings[0]), "+".join(sorted(slots))
            attrs = {slot: attrs[slot] for slot in slots}
            known = texts.setdefault(text.lower(), Text(text, said, kind, phrase, attrs, 0))
            known.count = max(known.count, 0 if free else count)
    return list(texts.values())


def invisible_reason(text: Text) -> str | None:
    """Why CLIP cannot see what a text says, or None."""
    hidden, measure = [slot for slot in text.attrs if slot in INVISIBLE], MEASURE.search(text.text)
    what = ", ".join(hidden) or (measure and f"'{measure[0].strip()}'")
    return f"{what} cannot be seen in a picture" if what else None


def wordings_of(text: Text, templates: Templates, ensemble: bool) -> list[str]:
    """The texts to encode for one description: its own, or all wordings of it."""
    return list(dict.fromkeys(word(text.phrase, wording) for wording in templates.wordings[: None if ensemble else 1]))


def word(phrase: str, wording: str) -> str:
    return with_articles(" ".join(wording.replace("{phrase}", phrase).split()))


def cap(texts: list[Text], max_texts: int, max_per_make: int) -> dict[int, str]:
    """{index: why it goes}. Frequent combinations stay; kinds are cut evenly, the smallest last."""
    removed, order, per_make, turn = {}, [], Counter(), Counter()
    for i in sorted(range(len(texts)), key=lambda i: (-texts[i].count, i)):
        make = texts[i].attrs.get("make")
        per_make[make] += 1
        if make is not None and max_per_make and per_make[make] > max_per_make:
            removed[i] = f"more than {max_per_make} texts of {make}"
        else:
            order.append((turn[texts[i].kind], i))
            turn[texts[i].kind] += 1
    over = sorted(order)[max_texts:] if max_texts else []
    return removed | {i: f"more than {max_texts} texts" for _, i in over}
