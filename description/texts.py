"""Templates filled with rows of attributes -> texts, de-duplicated, with where each comes from."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from description.canonical import DERIVED, INVISIBLE, MEASURE, SLOTS, column_key, names_body, with_articles
from description.tables import read_text
from util.errors import InputError

DEFAULT_TEMPLATES = Path(__file__).with_name("templates.json")


@dataclass
class Text:
    """One description. `text`: its first wording; `phrase`: what all wordings hold; `kind`: the slots it
    names ("colour+body"), its factor bank; `count`: rows that gave rise to it, 0 for words of the
    template file alone."""

    text: str
    phrase: str
    kind: str
    template: str
    attrs: dict[str, str]
    count: int


@dataclass
class Templates:
    """`phrases`: dicts with `phrase`, `words` (slots that the file's own words may fill where no row has
    them) and `unless` (slots whose presence in a row rules the phrase out)."""

    phrases: list[dict]
    wordings: list[str] = field(default_factory=lambda: ["{phrase}"])
    words: dict[str, list[str]] = field(default_factory=dict)
    contradictions: list[dict[str, str]] = field(default_factory=list)

    def slots(self) -> set[str]:
        return {slot for p in self.phrases for slot in (*slots_of(p["phrase"]), *p.get("unless", ()))}


def slots_of(phrase: str) -> list[str]:
    return re.findall(r"{(\w+)}", phrase)


def read_templates(file: Path) -> Templates:
    """A .json as `description/templates.json`, or a .txt with one whole text with {slots} a line.

    Raises:
        InputError: missing, damaged (with the line), of another shape, or without any {slot}.
    """
    text = read_text(file)
    if file.suffix.lower() == ".txt":
        templates = Templates([{"phrase": line.strip()} for line in text.splitlines() if line.strip()])
    elif file.suffix.lower() == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"--templates {file}, line {error.lineno} is not JSON: {error.msg}") from error
        templates = _from_json(file, content)
    else:
        raise InputError(f"--templates {file}: the ending must be .json or .txt")
    for phrase in (p["phrase"] for p in templates.phrases):
        stripped = re.sub(r"{\w+}", "", phrase)
        if "{" in stripped or "}" in stripped or not slots_of(phrase):
            raise InputError(f"--templates {file}: '{phrase}' needs slots in braces, as in 'a {{colour}} {{body}}'")
    if not templates.phrases:
        raise InputError(f"--templates {file} holds no template")
    return templates


def check_slots(templates: Templates, file: Path, extra: Iterable[str] = ()) -> None:
    """Refuse a placeholder that is no attribute, no column of the tables and no word list."""
    known = {*SLOTS, *DERIVED, *INVISIBLE, *templates.words, *extra}
    for slot in sorted(templates.slots() - known):
        raise InputError(
            f"--templates {file}: unknown placeholder {{{slot}}}; known are {', '.join((*SLOTS, *DERIVED))} "
            "and the columns of the table"
        )


def fill(templates: Templates, rows: Counter, *, use_words: bool = True) -> tuple[list[Text], list[str]]:
    """Every template with every combination that occurs in the rows.

    A slot that a template lists under `words` and no row has is filled with the file's own words: that is
    a factor bank. Nothing else is multiplied out.

    Args:
        rows: counts of rows, keys are sorted tuples of (slot, value).
    Returns:
        (texts, unique after lower case and white space; phrases that no row could fill).
    """
    present = {slot for row in rows for slot, _ in row}
    texts: dict[str, Text] = {}
    unused = []
    for template in templates.phrases:
        phrase = template["phrase"]
        slots = list(dict.fromkeys(slots_of(phrase)))
        free = [s for s in slots if use_words and s in template.get("words", ()) and s not in present]
        combinations = _combinations(rows, [s for s in slots if s not in free], template.get("unless", ()))
        filled = 0
        for values, count in combinations.items():
            for words in itertools.product(*(templates.words[s] for s in free)):
                attrs = dict(values) | dict(zip(free, words))
                if _is_odd(attrs, slots, templates.contradictions):
                    continue
                filled += 1
                _add(texts, templates, phrase, {s: attrs[s] for s in slots}, 0 if free else count)
        if not filled:
            unused.append(phrase)
    return list(texts.values()), unused


def invisible_reason(text: Text) -> str | None:
    """Why CLIP cannot see what a text says, or None."""
    hidden = [slot for slot in text.attrs if slot in INVISIBLE]
    if hidden:
        return f"{', '.join(hidden)} cannot be seen in a picture"
    measure = MEASURE.search(text.text)
    return f"'{measure[0].strip()}' cannot be seen in a picture" if measure else None


def wordings_of(text: Text, templates: Templates, ensemble: bool) -> list[str]:
    """The texts to encode for one description: its own, or all wordings of it."""
    chosen = templates.wordings if ensemble else templates.wordings[:1]
    return list(dict.fromkeys(word(text.phrase, wording) for wording in chosen))


def word(phrase: str, wording: str) -> str:
    return with_articles(" ".join(wording.replace("{phrase}", phrase).split()))


def cap(texts: list[Text], max_texts: int, max_per_make: int) -> dict[int, str]:
    """{index: why it goes}. Frequent combinations stay; kinds are cut evenly, the smallest last."""
    removed: dict[int, str] = {}
    by_frequency = sorted(range(len(texts)), key=lambda i: (-texts[i].count, i))
    per_make: Counter[str] = Counter()
    for i in by_frequency:
        make = texts[i].attrs.get("make")
        per_make[make] += make is not None
        if make is not None and max_per_make and per_make[make] > max_per_make:
            removed[i] = f"more than {max_per_make} texts of {make}"
    if max_texts:
        turn: Counter[str] = Counter()
        order = []
        for i in by_frequency:
            if i not in removed:
                order.append((turn[texts[i].kind], i))
                turn[texts[i].kind] += 1
        removed |= {i: f"more than {max_texts} texts" for _, i in sorted(order)[max_texts:]}
    return removed


def _combinations(rows: Counter, slots: list[str], unless: Iterable[str]) -> Counter:
    found: Counter[tuple] = Counter()
    for row, count in rows.items():
        values = dict(row)
        if all(slot in values for slot in slots) and not any(slot in values for slot in unless):
            found[tuple((slot, values[slot]) for slot in slots)] += count
    return found


def _is_odd(attrs: dict[str, str], slots: list[str], contradictions: list[dict[str, str]]) -> bool:
    """Nonsense by construction: "a Ram Pickup pickup truck", a convertible with a sun roof."""
    if "model" in slots and "body" in slots and names_body(attrs["model"], attrs["body"]):
        return True
    return any(all(attrs.get(k) == v for k, v in rule.items()) for rule in contradictions)


def _add(texts: dict[str, Text], templates: Templates, phrase: str, attrs: dict[str, str], count: int) -> None:
    filled = re.sub(r"{(\w+)}", lambda match: attrs[match[1]], phrase)
    text = word(filled, templates.wordings[0])
    key = text.lower()
    if key in texts:
        texts[key].count = max(texts[key].count, count)
        return
    texts[key] = Text(text, filled, "+".join(sorted(attrs)), phrase, attrs, count)


def _from_json(file: Path, content) -> Templates:
    shape = 'it needs \'templates\': a list of {"phrase": "a {colour} {body}"}, as description/templates.json'
    if not isinstance(content, dict) or not isinstance(content.get("templates"), list):
        raise InputError(f"--templates {file}: {shape}")
    unknown = set(content) - {"templates", "wordings", "words", "contradictions"}
    if unknown:
        raise InputError(f"--templates {file}: unknown key '{sorted(unknown)[0]}'; {shape}")
    phrases = [{"phrase": t} if isinstance(t, str) else t for t in content["templates"]]
    if not all(isinstance(p, dict) and isinstance(p.get("phrase"), str) for p in phrases):
        raise InputError(f"--templates {file}: {shape}")
    lists = content.get("words", {})
    values = list(lists.values()) if isinstance(lists, dict) else [None]
    if not all(isinstance(v, list) and all(isinstance(word, str) for word in v) for v in values):
        raise InputError(f"--templates {file}: 'words' must hold a list of texts for each slot")
    words = {column_key(slot): list(values) for slot, values in lists.items()}
    for p in phrases:
        lacking = [slot for slot in p.get("words", ()) if slot not in words]
        if lacking:
            raise InputError(
                f"--templates {file}: '{p['phrase']}' asks for words of '{lacking[0]}', and there are none"
            )
    wordings = content.get("wordings") or ["{phrase}"]
    for wording in wordings:
        if "{phrase}" not in wording:
            raise InputError(f"--templates {file}: the wording '{wording}' has no {{phrase}}")
    return Templates(phrases, wordings, words, content.get("contradictions", []))
