"""Raw attribute values -> canonical words; the words themselves are data (`canonical.json`)."""

import json
import re
from collections import Counter
from pathlib import Path

TABLE = json.loads(Path(__file__).with_name("canonical.json").read_text(encoding="utf-8"))
SLOTS = ("make", "model", "year", "body", "colour", "view", "doors", "scene", "part")
INVISIBLE = tuple(TABLE["invisible"])
CLOSED = ("body", "colour", "view", "doors", "year")  # a number here is a code that nobody has explained
WORDED = ("make", "scene", "part")  # the same, but any word will do
MEASURE = re.compile(TABLE["measure"])
WORDS = {  # slot -> {spelling in lower case: canonical word}
    slot: {spelling.lower(): word for word, others in TABLE[slot].items() for spelling in (word, *others)}
    for slot in ("make", "body", "colour", "view", "doors")
}
_BY_LENGTH = {slot: sorted(words, key=len, reverse=True) for slot, words in WORDS.items()}


def column_key(name: str) -> str:
    """A column's name without case, outer spaces and inner punctuation: `Body Type` -> `body_type`."""
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")


def slot_of(column: str) -> str | None:
    """The slot a column fills, `class_name`, an invisible attribute's own name, or None."""
    key = column_key(column)
    for slot, names in TABLE["columns"].items():
        if key in names:
            return slot
    return key if key in INVISIBLE else None


def canonical_row(raw: dict[str, str], unknown: Counter | None = None) -> dict[str, str]:
    """Turn one row of raw values by slot into canonical ones; slots without a usable value are left out.

    Args:
        raw: values by slot; `class_name` ("Make Model Body Year") stands in for missing slots.
        unknown: counts (slot, value) that no synonym covers; they are kept in lower case unless they are numbers.
    """
    unknown = Counter() if unknown is None else unknown
    values = {slot: " ".join(str(value).split()) for slot, value in raw.items() if value is not None}
    if "class_name" in values:
        parsed = split_class_name(values.pop("class_name"))
        values = parsed | {slot: value for slot, value in values.items() if not _is_missing(value)}
    row = {slot: word for slot, value in values.items() if (word := _canonical(slot, value, unknown))}
    if "model" in row:
        row["model"] = _short_model(row)
    if "year" in row:
        row["decade"] = row["year"][:3] + "0s"
    return {slot: word for slot, word in row.items() if word}


def split_class_name(name: str) -> dict[str, str]:
    """ "Audi TTS Coupe 2012" -> {make, model, body, year}; what is not found is left out."""
    if name.lower() in WORDS["body"]:
        return {"body": name}
    found = {}
    if year := re.search(r"\s+((?:19|20)\d\d)$", name):
        found["year"], name = year[1], name[: year.start()]
    found["make"] = _starts_with("make", name) or name.split(" ")[0]
    name = name[len(found["make"]) :].strip()
    body = _ends_with("body", name)
    if body and not name.lower().endswith((" sport", " sports")):  # "Discovery Sport" is a model
        found["body"] = body
    else:  # "F-150 Regular Cab": the ending says the body and is part of the model's name
        for word, endings in TABLE["body_hints"].items():
            if name.lower().endswith(tuple(endings)):
                found["body"] = word
    return found | ({"model": name} if name else {})


def names_body(model: str, body: str) -> bool:
    """Whether a model's name already says its body: "Range Rover SUV", "Ram Pickup 3500"."""
    spellings = [s for s, word in WORDS["body"].items() if word == body] + [body.split()[-1]]
    return any(re.search(rf"(?<!\w){re.escape(s.lower())}(?!\w)", model.lower()) for s in spellings)


def with_articles(text: str) -> str:
    """ "a Audi", "a SUV", "a 1980s van" -> with "an" by sound."""
    return re.sub(r"\b([Aa])n? (?=(\S+))", lambda m: m[1] + ("n " if _sounds_open(m[2]) else " "), text)


def _sounds_open(word: str) -> bool:
    word = word.strip(".,\"'(")
    if len(word) == 1 or re.match(r"[A-Z]\d", word):  # "X5", "A4" are spelled
        return word[0] in TABLE["spelled_initials"] + "8"
    if re.match(r"[A-Z]{2,}", word) and word.upper() not in TABLE["read_as_words"]:
        return word[0] in TABLE["spelled_initials"]
    if word.lower().startswith(tuple(TABLE["consonant_vowels"])):
        return False
    return word[:1].lower() in "aeiou8"


def _canonical(slot: str, value: str, unknown: Counter) -> str | None:
    key = value.lower()
    if key in WORDS.get(slot, ()):
        return WORDS[slot][key]
    if _is_missing(value):
        return None
    if slot == "year" and (year := re.fullmatch(r"((?:19|20)\d\d)(?:\.0)?", value)):
        return year[1]
    is_code = slot == "year" or not any(c.isalpha() for c in value)
    if slot in CLOSED or (slot in WORDED and is_code):
        unknown[slot, value] += 1
        return None if is_code else key
    if slot in ("make", "model") and value == key and not any(c.isdigit() for c in value):
        return value.title()
    return value


def _is_missing(value: str) -> bool:
    return value.lower() in TABLE["missing"]


def _short_model(row: dict[str, str]) -> str:
    """The model without its make in front and its body at the end: both have slots of their own."""
    model = row["model"]
    for make in (row.get("make", ""), _starts_with("make", model) or ""):
        same = make and WORDS["make"].get(make.lower(), make) == row.get("make")
        if same and model.lower().startswith(make.lower() + " "):
            model = model[len(make) :].strip()
    while ending := _ends_with("body", model):
        if WORDS["body"][ending.lower()] != row.get("body") or len(ending) == len(model):
            break
        model = model[: -len(ending)].strip()
    return model


def _starts_with(slot: str, text: str) -> str | None:
    return next((text[: len(s)] for s in _BY_LENGTH[slot] if f"{text} ".lower().startswith(s + " ")), None)


def _ends_with(slot: str, text: str) -> str | None:
    return next((text[-len(s) :] for s in _BY_LENGTH[slot] if f" {text}".lower().endswith(" " + s)), None)
