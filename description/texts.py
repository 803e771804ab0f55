"""Raw attribute values -> canonical words (`canonical.json`) -> texts by templates, without duplicates."""

import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from util.errors import InputError
from util.files import fits, read_json

TABLE = json.loads(Path(__file__).with_name("canonical.json").read_text(encoding="utf-8"))
SLOTS = ("make", "model", "year", "body", "colour", "view", "doors", "scene", "part")
INVISIBLE = tuple(TABLE["invisible"])
CLOSED = ("body", "colour", "view", "doors", "year")  # a number here is a code that nobody has explained
WORDED = ("make", "scene", "part")  # the same, but any word will do
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
    found = (slot for slot, names in TABLE["columns"].items() if key in names)
    return next(found, key if key in INVISIBLE else None)


def canonical_row(raw: dict[str, str], unknown: Counter | None = None) -> dict[str, str]:
    """Turn one row of raw values by slot into canonical ones; slots without a usable value are left out, `class_name`
    ("Make Model Body Year") stands in for missing ones. unknown: counts (slot, value) that no synonym covers; they are
    kept in lower case unless they are numbers."""
    unknown = Counter() if unknown is None else unknown
    values = {slot: " ".join(str(value).split()) for slot, value in raw.items() if value is not None}
    if "class_name" in values:
        parsed = split_class_name(values.pop("class_name"))
        values = parsed | {slot: value for slot, value in values.items() if value.lower() not in TABLE["missing"]}
    row = {slot: word for slot, value in values.items() if (word := _canonical(slot, value, unknown))}
    if "model" in row:
        row["model"] = _short_model(row)
    if "year" in row:
        row["decade"] = row["year"][:3] + "0s"
    return {slot: word for slot, word in row.items() if word}


def _canonical(slot: str, value: str, unknown: Counter) -> str | None:
    key = value.lower()
    if key in WORDS.get(slot, ()):
        return WORDS[slot][key]
    if key in TABLE["missing"]:
        return None
    if slot == "year" and (year := re.fullmatch(r"((?:19|20)\d\d)(?:\.0)?", value)):
        return year[1]
    is_code = slot == "year" or not any(c.isalpha() for c in value)
    if slot in CLOSED or (slot in WORDED and is_code):
        unknown[slot, value] += 1
        return None if is_code else key
    is_plain = slot in ("make", "model") and value == key and not any(c.isdigit() for c in value)
    return value.title() if is_plain else value


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
    return not word.lower().startswith(tuple(TABLE["consonant_vowels"])) and word[:1].lower() in "aeiou8"


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


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def read_templates(file: Path) -> Templates:
    """Read a .json as `description/templates.json`, or a .txt with one whole text with {slots} a line."""
    if file.suffix.lower() == ".txt":
        content = {"templates": [line.strip() for line in read_text(file).splitlines() if line.strip()]}
    else:
        content = read_json(file, "write it like description/templates.json")
    given, bad = content.get("templates"), f"--templates {file} is not made like description/templates.json"
    phrases = [{"phrase": t} if isinstance(t, str) else t for t in given] if isinstance(given, list) else []
    wordings, words = content.get("wordings") or ["{phrase}"], content.get("words", {})
    templates = Templates(phrases, wordings, words, content.get("contradictions", []))
    shapes = [(wordings, [str]), (words, {str: [str]}), (templates.contradictions, [{str: str}])]
    if not phrases or not all(fits(value, shape) for value, shape in shapes):
        raise InputError(bad)
    templates.words = {column_key(slot): values for slot, values in words.items()}
    for template in phrases:
        parts = template if isinstance(template, dict) else {}
        phrase = parts.get("phrase")
        if not fits(phrase, str) or not all(fits(parts.get(key, []), [str]) for key in ("words", "unless")):
            raise InputError(f"{bad}: {str(template)[:80]}")
        if re.search("[{}]", re.sub(r"{\w+}", "", phrase)) or not slots_of(phrase):
            raise InputError(f"--templates {file}: '{phrase}' needs slots in braces, as in 'a {{colour}} {{body}}'")
        if missing := set(parts.get("words", ())) - set(templates.words):
            raise InputError(f"--templates {file}: '{phrase}' asks for words of '{missing.pop()}', and there are none")
    return templates


def fill(templates: Templates, rows: Counter, *, use_words: bool = True) -> list[Text]:
    """Fill every template with every combination that occurs in the rows (keys: sorted tuples of (slot, value)); texts
    are unique after lower case and white space.

    A slot that a template lists under `words` and no row has is filled with the file's own words: that is a factor
    bank. Nothing else is multiplied out.
    """
    present, texts = {slot for row in rows for slot, _ in row}, {}
    for template in templates.phrases:
        phrase = template["phrase"]
        slots = list(dict.fromkeys(slots_of(phrase)))
        free = [s for s in slots if use_words and s in template.get("words", ()) and s not in present]
        needed, unless, combinations = set(slots) - set(free), set(template.get("unless", ())), Counter()
        for row, count in rows.items():
            values = dict(row)
            if needed <= values.keys() and not unless & values.keys():
                combinations[tuple((slot, values[slot]) for slot in slots if slot in needed)] += count
        own_words = list(itertools.product(*(templates.words[slot] for slot in free)))
        for (values, count), words in itertools.product(combinations.items(), own_words):
            attrs = dict(values) | dict(zip(free, words))
            is_odd = any(rule.items() <= attrs.items() for rule in templates.contradictions)
            if is_odd or ("model" in attrs and "body" in attrs and names_body(attrs["model"], attrs["body"])):
                continue  # "a Ram Pickup pickup truck"
            said = re.sub(r"{(\w+)}", lambda match, attrs=attrs: attrs[match[1]], phrase)
            text, attrs = word(said, templates.wordings[0]), {slot: attrs[slot] for slot in slots}
            known = texts.setdefault(text.lower(), Text(text, said, "+".join(sorted(slots)), phrase, attrs, 0))
            known.count = max(known.count, 0 if free else count)
    return list(texts.values())


def invisible_reason(text: Text) -> str | None:
    """Why CLIP cannot see what a text says, or None."""
    hidden, measure = [slot for slot in text.attrs if slot in INVISIBLE], re.search(TABLE["measure"], text.text)
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
