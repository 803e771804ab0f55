"""Attributes -> texts -> a grounded bank."""

import contextlib
import io
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_pictures
from scipy.io import savemat
from scipy.stats import entropy

import main_describe
from datasets.path_list import printable
from datasets.teacher import hash_bank, read_encoded, save_bank
from description.bank import bank_statistics, ground, near_duplicates
from description.readers import read_attributes
from description.texts import Templates, Text, canonical_row, cap, fill, invisible_reason, read_templates, with_articles
from main_describe import TEMPLATES
from models_teacher import build_bank, encode_texts, load_clip
from util.errors import InputError


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def rows_of(*rows: dict[str, str]) -> Counter:
    return Counter(tuple(sorted(canonical_row(row).items())) for row in rows)


@pytest.mark.parametrize("raw, canonical", [
    ({"colour": "GRAY", "body": "Saloon"}, {"colour": "grey", "body": "sedan"}),
    ({"make": "FIAT", "model": "fiat 500", "year": "2012.0"},
     {"make": "Fiat", "model": "500", "year": "2012", "decade": "2010s"}),
    ({"make": "vw", "model": "VW Golf Hatchback", "body": "hatchback"},
     {"make": "Volkswagen", "model": "Golf", "body": "hatchback"}),
    ({"body": "other", "colour": "7", "year": "12", "make": "12", "scene": "3", "doors": "4/5"}, {}),
    ({"view": "315", "doors": "2"}, {"view": "the front corner", "doors": "two-door"}),
    ({"view": "0", "colour": "Seafoam"}, {"view": "the front", "colour": "seafoam"}),
    ({"class_name": "Bentley Continental Supersports Conv. Convertible 2012"},
     {"make": "Bentley", "model": "Continental Supersports", "body": "convertible", "year": "2012", "decade": "2010s"}),
    ({"class_name": "Aston Martin V8 Vantage"}, {"make": "Aston Martin", "model": "V8 Vantage"}),
    ({"class_name": "truck"}, {"body": "truck"}),
    ({"class_name": "Land Rover Discovery Sport"}, {"make": "Land Rover", "model": "Discovery Sport"}),
])  # fmt: skip
def test_canonical_values(raw, canonical):
    assert canonical_row(raw, unknown := Counter()) == canonical
    assert canonical or {slot for slot, _ in unknown} == raw.keys() - {"body"}  # codes that nobody has explained


def test_articles_follow_the_sound_and_measures_are_invisible():
    words = {"Audi": "an", "SUV": "an", "BMW": "a", "MAN truck": "a", "MG": "an", "X5": "an", "M3": "an", "Z4": "a"}
    words |= {"Hyundai": "a", "European van": "a", "orange bus": "an", "GMC": "a", "2012 Audi": "a", "Fiat": "a"}
    for word, article in words.items():
        assert with_articles(f"a photo of a {word}.") == f"a photo of {article} {word}."
    seen = ["a 2012 Mazda 3", "a Mercedes-Benz C 200", "an Audi 100 sedan", "a Volvo 240"]
    for text in [*seen, "a car of 150 hp", "a 4,850 mm long van", "a car for $20,000", "a 2.0 litre sedan"]:
        assert (invisible_reason(Text(text, text, "", "", {}, 1)) is None) == (text in seen), text


def test_only_combinations_of_the_rows():
    audi = {"make": "Audi", "model": "TTS Coupe", "body": "coupe", "colour": "red"}
    ram = {"make": "Ram", "model": "Pickup 3500", "body": "pickup", "length": "4850"}
    rows = rows_of(audi, audi, ram, {"make": "Kia", "body": "convertible"})
    phrases = ["a {make} {model} {body}", "a {colour} {make}", "a {body} of {length} mm", "a {scene} {year} {make}"]
    phrases = [{"phrase": p} for p in phrases] + [{"phrase": "a {body} with {part}", "words": ["part"]}]
    odd = [{"body": "convertible", "part": "a sun roof"}]
    parts = {"part": ["a sun roof", "an open door"]}
    templates = Templates([*phrases, {"phrase": "a {body}", "unless": ["model"]}], ["a photo of {phrase}."], parts, odd)
    texts = fill(templates, rows)
    assert {t.text[11:-1]: t.count for t in texts} == {
        "an Audi TTS coupe": 2, "a red Audi": 2, "a pickup truck of 4850 mm": 1, "a convertible": 1,
        "a coupe with a sun roof": 0, "a coupe with an open door": 0, "a pickup truck with a sun roof": 0,
        "a pickup truck with an open door": 0, "a convertible with an open door": 0,
    }  # fmt: skip  # no "Ram Pickup 3500 pickup truck"
    assert [t.text for t in texts if invisible_reason(t)] == ["a photo of a pickup truck of 4850 mm."]
    assert all("with" not in t.text for t in fill(templates, rows, use_words=False))


def test_default_templates_read_well_and_caps_keep_the_frequent_and_the_rare_kinds():
    rows = ({"class_name": "Audi TTS Coupe 2012", "colour": "red"}, {"class_name": "Ford F-150 Regular Cab 2012"})
    texts = [t.text for t in fill(read_templates(TEMPLATES), rows_of(*rows))]
    assert "a photo of a red Audi coupe." in texts and "a photo of a 2012 Ford F-150 Regular Cab." in texts
    for text in texts:
        words = text.rstrip(".").lower().split()
        assert text.endswith(".") and "{" not in text and all(a != b for a, b in zip(words, words[1:])), text
    texts = [Text(f"t{i}", "", "make", "", {"make": "Audi"}, i) for i in range(6)] + [Text("", "", "body", "", {}, 0)]
    assert [set(cap(texts, *most)) for most in ((0, 2), (3, 0), (0, 0))] == [{0, 1, 2, 3}, {0, 1, 2, 3}, set()]


def read_all(path, **more):
    return list(read_attributes(path, **more))


def write_cells(file, **cells: list[str]):
    """A .mat file of cell arrays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {name: np.array(texts, dtype=object)[:, None] for name, texts in cells.items()}, do_compression=True)


def test_compcars(tmp_path):
    header = "model_id maximum_speed displacement door_number seat_number type\n"
    write(tmp_path / "misc/attributes.txt", header + "1 235 1.8 4 5 3\n3 0 0.0 5 5 2\n")
    names = {"make_names": ["Audi", "BMW"], "model_names": ["Audi A4L", "", "BMW X5"]}
    write_cells(tmp_path / "misc/make_model_name.mat", **names)
    write_cells(tmp_path / "misc/car_type.mat", types=["MPV", "SUV", "sedan"])
    first = canonical_row(read_all(tmp_path)[0])
    assert [first[k] for k in ("model", "body", "doors")] == ["Audi A4L", "sedan", "four-door"]
    for name, code in (("x", "4"), ("y", "-1")):
        write(tmp_path / f"label/2/3/2014/{name}.txt", f"{code}\n1\n1 1 9 9\n")
    seen, unseen = (canonical_row(row) for row in read_all(tmp_path))
    assert seen["view"] == "the front corner" and "view" not in unseen
    known = {"make": "BMW", "model": "X5", "body": "SUV", "year": "2014", "doors": "five-door", "seats": "5"}
    assert known.items() <= unseen.items()


def test_veri_stanford_and_tables(tmp_path):
    items = "<Item imageName='a.jpg' colorID='5' typeID='4'/><Item imageName='b.jpg' colorID='10' typeID='9'/>"
    veri = write(tmp_path / "train_label.xml", f"<TrainingImages><Items>{items}</Items></TrainingImages>")
    assert read_all(veri) == [{"colour": "red", "body": "hatchback"}, {"colour": "black", "body": "station wagon"}]
    veri.unlink()
    names = ["AM General Hummer SUV 2000", "Audi TTS Coupe 2012"]
    write_cells(tmp_path / "devkit/cars_meta.mat", class_names=names)
    listed = write(tmp_path / "names.txt", "\n".join(names) + "\n\n")
    assert read_all(tmp_path) == read_all(listed) == [{"class_name": name} for name in names]
    assert canonical_row({"class_name": names[0]})["make"] == "AM General"
    table = write(tmp_path / "a.csv", "path,split,Brand,Lack,kW\nx,train,audi,rot,90\ny,val,kia,weiss,80\n")
    assert read_all(table, columns={"colour": "Lack"}, split="train") == [{"make": "audi", "colour": "rot"}]
    lines = write(tmp_path / "a.jsonl", '{"make": "Audi", "year": 2012}\n{"colour": "red", "make": null}\n')
    assert read_all(lines) == [{"make": "Audi", "year": "2012"}, {"colour": "red"}]
    both = write(tmp_path / "b.tsv", "make\tclass_name\nAudi\tAudi TTS Coupe 2012\n")
    assert read_all(both) == [{"make": "Audi"}]


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "color,colour\nx,y\n", "'color' and 'colour' both hold the colour"),
    ("a.csv", "path,split\nx,y\n", "no usable column"), ("a.jsonl", '{"wheels": 4}\n', "no usable column"),
    ("a.csv", b"make\nCitro\xebn\n", "is not UTF-8"), ("a.pdf", "x", "end in .csv"),
])  # fmt: skip
def test_broken_tables(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read_all(write(tmp_path / name, content))


def units(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_grounding(V, U, g, kinds, tau, rule):
    """The rule once more, image by image."""
    S, kinds, (near, corrected, gap, limit) = V @ U.T, np.array(kinds), np.zeros((4, len(U)))
    shifted = S - tau * np.log(np.exp(S / tau).sum(axis=0))
    for kind in set(kinds):
        members = np.flatnonzero(kinds == kind)
        k = min(rule.topk, math.ceil(len(members) / 10))
        limit[members] = max(rule.hub_share, 5 * k / len(members)) * len(V)
        for i in range(len(V)):
            best = members[np.argsort(-S[i, members])[:k]]
            near[best] += 1
            gap[best] += S[i, best] - V[i] @ g
            corrected[members[np.argsort(-shifted[i, members])[:k]]] += 1
    generic = ["" if gap[j] >= rule.margin * near[j] else "generic" for j in range(len(U))]
    reasons = ["hub" if corrected[j] > limit[j] else reason for j, reason in enumerate(generic)]
    return near.tolist(), corrected.tolist(), ["ungrounded" if n < rule.n_min else r for n, r in zip(near, reasons)]


@pytest.mark.parametrize("block", [5, 1024])
def test_grounding_equals_plain_loops(monkeypatch, block):
    """Random directions and a text near to all images; nineteen of one kind and a hub: few images have a nearer one."""
    monkeypatch.setattr("description.bank.BLOCK", block)
    images, texts, seen = units(37, 6), units(45, 6, seed=1), set()
    texts[3] = F.normalize(images.mean(dim=0), dim=0)
    crowd = torch.cat([torch.full((100, 1), 0.5), 0.75**0.5 * units(100, 31, seed=3)], dim=1)
    hub = torch.cat([F.pad(units(19, 31, seed=4), (1, 0)), torch.eye(32)[:1]])
    first = images, texts, units(6, seed=2), [0] * 30 + [1] * 12 + [2] * 3, 0.1
    for V, U, g, kinds, tau in (first, (crowd, hub, -hub[19], [0] * 20, 0.01)):
        rule, cosine = SimpleNamespace(topk=3, n_min=3, hub_share=0.1, margin=0.3), U @ V.T
        expected = plain_grounding(*(x.numpy().astype(float) for x in (V, U, g)), kinds, tau, rule)
        found = ground(V, U, g, torch.tensor(kinds), tau, rule)
        assert (found.usage.tolist(), found.corrected.tolist(), found.reasons) == expected
        assert torch.allclose(cosine.gather(1, found.best_images), cosine.topk(4, dim=1).values)
        seen |= set(expected[2])
    assert seen == {"", "ungrounded", "generic", "hub"} and expected[2][19] == "hub"


@pytest.mark.parametrize("block", [3, 512])
def test_near_duplicates_equal_brute_force(block):
    base = units(40, 5, seed=5)
    texts = F.normalize(torch.cat([base, base + 0.05 * units(40, 5, seed=6), base[:7]]), dim=1)
    lengths, kept = [20 + (7 * i) % 11 for i in range(len(texts))], []
    for i in sorted(range(len(texts)), key=lambda i: (lengths[i], i)):
        if not any(texts[i] @ texts[j] > 0.98 for j in kept):
            kept.append(i)
    found = near_duplicates(texts, lengths, 0.98, block)
    assert set(found) == set(range(len(texts))) - set(kept) and len(found) >= 40
    for i, j in found.items():
        assert j in kept and texts[i] @ texts[j] > 0.98 and (lengths[j], j) < (lengths[i], i)


def test_bank_statistics(monkeypatch):
    monkeypatch.setattr("description.bank.BLOCK", 7)
    V, U, kept = units(50, 8, seed=7), units(20, 8, seed=8), torch.arange(20) % 3 > 0
    S, scale = (V @ U.T).double().numpy(), math.log(int(kept.sum()))
    found, near = bank_statistics(V, U, kept, 0.1), S[:, kept.numpy()]
    assert found["coverage"] == np.mean([bool(kept[j]) for j in S.argmax(axis=1)])
    assert found["teacher_entropy"] == pytest.approx(entropy(np.exp(near / 0.1), axis=1).mean() / scale, abs=1e-5)
    assert found["usage_entropy"] == pytest.approx(entropy(np.bincount(near.argmax(axis=1))) / scale, abs=1e-6)


def run_describe(flags: str, output) -> dict:
    return main_describe.main(main_describe.get_args_parser().parse_args([*flags.split(), "--output", str(output)]))


@pytest.fixture(scope="module")
def made(teacher_files, tmp_path_factory):
    """Flags of the teacher, of texts, of grounded ones; the output of a finished run, its numbers, what it said."""
    folder = tmp_path_factory.mktemp("describe")
    pictures = write_pictures(folder / "pictures", 30)
    (pictures / "broken.png").write_bytes(b"no picture")
    rows = "make,model,body,color,price\nAudi,TT Coupe,coupe,Red,9\nKia,Rio,hatchback,gray,5\n"
    teacher = " --clip_model {} --clip_pretrained {} --device cpu".format(*teacher_files)
    flags = f"--attributes {write(folder / 'a.csv', rows)}{teacher} --dedup_cos 0.9999"
    grounded = f"{flags} --images {pictures} --num_workers 0 --n_min 1 --margin -2"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        numbers = run_describe(grounded, folder / "out")
    found = {"out": folder / "out", "numbers": numbers, "said": printed.getvalue()}
    return SimpleNamespace(teacher=teacher, flags=flags, grounded=grounded, **found)


def lines_of(file):
    return list(map(json.loads, file.read_text().splitlines()))


def test_files_of_a_run(made, teacher_files):
    numbers, kept, removed = made.numbers, *(lines_of(made.out / f"{name}.jsonl") for name in ("texts", "removed"))
    assert numbers["images"] == 30 and numbers["unreadable"] == 1 and "broken.png" in made.said
    assert len(kept) == numbers["kept"] > 20 and len(kept) + len(removed) == numbers["candidates"]
    by_reason = Counter(row["reason"] for row in removed)
    assert by_reason == {k.removeprefix("removed_"): v for k, v in numbers.items() if k.startswith("removed_")}
    assert not any("price" in row["text"] for row in kept) and numbers["invisible_columns"] == ["price"]
    teacher = load_clip(*map(str, teacher_files))
    bank, texts, source = build_bank(str(made.out), *teacher)
    assert texts == [row["text"] for row in kept] and f"{len(kept)} encoded texts" in source
    again, _, _ = build_bank(str(made.out / "texts.jsonl"), *teacher)
    assert torch.allclose(bank, again, atol=1e-5)
    page = (made.out / "report.html").read_text()
    assert "data:image/jpeg;base64," in page and "http:" not in page
    assert all(row["text"] in page for row in kept) and page.count("<tr>") > len(kept) + len(removed)


def test_second_run_computes_nothing_again(made, monkeypatch, capsys):
    before = (made.out / "bank.npy").read_bytes()
    monkeypatch.setattr("description.bank.extract_to_file", None)
    monkeypatch.setattr("description.bank.encode_texts", lambda *a: encode_texts(*a) if len(a[2]) == 1 else None)
    second = run_describe(made.grounded, made.out)
    assert second | {"seconds": 0} == made.numbers | {"seconds": 0} and "broken.png" in capsys.readouterr().out
    assert (made.out / "bank.npy").read_bytes() == before


def test_another_teacher_encodes_again(made, teacher_files, tmp_path):
    weights = {k: v + 0.01 for k, v in torch.load(teacher_files[1], weights_only=True).items()}
    torch.save(weights, tmp_path / "other.pt")
    folder = shutil.copytree(made.out, tmp_path / "out")
    run_describe(made.grounded.replace(str(teacher_files[1]), str(tmp_path / "other.pt")), folder)
    assert len(list((folder / "embeddings").glob("texts-*.safetensors"))) == 2
    assert len(list((folder / "embeddings").glob("images-*.npz"))) == 2
    assert (folder / "bank.npy").read_bytes() != (made.out / "bank.npy").read_bytes()


def test_flags_on_texts(made, tmp_path):
    with pytest.raises(InputError, match="0 texts are left and a bank needs 2"):
        run_describe(made.grounded.replace("--margin -2", "--margin 2") + " --rows_only", tmp_path / "none")
    assert "coverage" not in run_describe(made.flags + " --rows_only --ensemble --max_per_make 3", tmp_path / "e")
    kept = lines_of(tmp_path / "e" / "texts.jsonl")
    assert all(len(row["wordings"]) == 5 and row["text"] == row["wordings"][0] for row in kept)
    assert Counter(row["attrs"].get("make") for row in kept)["Audi"] == 3
    assert json.loads((tmp_path / "e" / "bank.json").read_text())["ensemble"] is True
    long = write(tmp_path / "long.txt", "a {make} " + "very " * 20 + "{body}")
    with pytest.raises(InputError, match=r"'an Audi very very.* has 2\d tokens where the teacher reads 16 \(2 of 3"):
        run_describe(f"{made.flags} --templates {long}", tmp_path / "o")
    flags = f"{made.flags} --templates {write(tmp_path / 't.txt', 'a {body} for {price}')} --keep_invisible"
    assert run_describe(flags, tmp_path / "o")["kept"] == 2


@pytest.mark.parametrize("name, content, message", [
    ("bank.json", b"{", "copy is no text bank, or incomplete"),
    ("texts.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "have changed since"),
    ("bank.npy", lambda data: data[:-4], "copy is no text bank, or incomplete"),
    ("bank.npy", lambda data: data[:-1] + bytes([data[-1] ^ 64]), "not those that its header describes"),
])  # fmt: skip
def test_folder_banks_are_checked(made, teacher_files, tmp_path, name, content, message):
    identity, copy = load_clip(*map(str, teacher_files))[2], tmp_path / "copy"
    with pytest.raises(InputError, match="made by teacher MiniClip-test with weights"):
        read_encoded(made.out, identity.__class__("other", "0" * 64, identity.embed_dim, 0.07))
    for file in ("bank.json", "bank.npy", "texts.jsonl"):
        write(copy / file, (made.out / file).read_bytes())
    (copy / name).write_bytes(content((copy / name).read_bytes()) if callable(content) else content)
    with pytest.raises(InputError, match=message):
        read_encoded(copy, identity)
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"incomplete .*{name}"):
        read_encoded(copy, identity)


def test_damaged_embeddings_are_made_again(made, tmp_path, capsys):
    """A flipped byte, a cut file: said, encoded again, and the same bank comes out."""
    folder = Path(shutil.copytree(made.out, tmp_path / "out"))
    files = [next((folder / "embeddings").glob(name)) for name in ("texts-*.safetensors", "images-*.npz")]
    for damage in ("flip", "cut"):
        for file in files:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 64
            file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
        run_describe(made.grounded, folder)
        said = capsys.readouterr().out
        assert "damaged and encoded again" in said and ".npz is damaged" in said, damage
        assert (folder / "bank.npy").read_bytes() == (made.out / "bank.npy").read_bytes()


def test_a_bank_of_nan_is_refused(made, teacher_files, tmp_path, monkeypatch):
    identity, nan = load_clip(*map(str, teacher_files))[2], float("nan")
    for bad in (nan, 3.0):
        bank = F.normalize(torch.randn(3, identity.embed_dim), dim=1)
        bank[1] *= bad
        with pytest.raises(InputError, match="1 of 3 rows are no unit vectors, first 1"):
            save_bank(tmp_path / "bank.safetensors", bank, ["a", "b", "c"], identity)
    folder = Path(shutil.copytree(made.out, tmp_path / "copy"))
    bank, about = np.load(folder / "bank.npy") * nan, json.loads((folder / "bank.json").read_text())
    np.save(folder / "bank.npy", bank)
    write(folder / "bank.json", json.dumps(about | {"bank_sha256": hash_bank(torch.from_numpy(bank))}))
    with pytest.raises(InputError, match="no unit vectors"):
        read_encoded(folder, identity)
    (images,) = (folder / "embeddings").glob("images-*.npz")
    stored = dict(np.load(images))
    np.savez(images, **stored | {"rows": stored["rows"] * nan})
    with pytest.raises(InputError, match="what the teacher makes of --images .* no unit vectors"):
        run_describe(made.grounded, folder)
    monkeypatch.setattr("description.bank.encode_texts", lambda *a: encode_texts(*a) * nan)
    with pytest.raises(InputError, match="no unit vectors"):
        run_describe(made.grounded, tmp_path / "nan")


@pytest.mark.parametrize("name, content, message", [
    ("t.txt", "a photo of a {corolla}.\n", r"unknown placeholder \{corolla\}"),
    ("t.txt", "a photo of a car.\n", "needs slots in braces"),
    ("t.txt", "a {make car\n", "needs slots in braces"),
    ("t.txt", "a {price} car", "--attributes: no row has a usable value|the attributes give 0 texts"),
    ("t.json", '{"templates":\n[}', "line 2 column 2"),
    ("t.json", '{"templates": [{"phrase": "a {part}", "words": ["part"]}]}', "asks for words of 'part'"),
    *(("t.json", text, r"t\.json is .*description/templates.json") for text in (
        "[" * 100_000, '{"templates": ' + "9" * 5000, "[]", '{"texts": []}', '{"templates": "a {make}"}',
        '{"templates": [1]}', '{"templates": []}', '{"templates": [{"phrase": ["a {make}"]}]}',
        '{"templates": ["a {make}"], "words": {"part": "sun roof"}}', '{"templates": ["a {make}"], "wordings": "x"}',
        '{"templates": ["a {make}"], "contradictions": ["x"]}', r'{"templates": ["a {make} \ud800"]}',
        '{"templates": [{"phrase": "a {make}", "unless": 3}]}',
    )),
])  # fmt: skip
def test_odd_templates_get_a_sentence(tmp_path, name, content, message):
    table, templates = write(tmp_path / "a.csv", "make\nAudi\n"), write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        run_describe(f"--attributes {table} --templates {templates}", tmp_path / "o")


def test_odd_attributes_get_a_sentence_or_are_read(made, tmp_path):
    """Each line is a table by itself."""
    for line in ("[" * 9000, '{"make": ' + "9" * 5000 + "}", '{"make": {"a": [1]}}', '{"": "x", "make": NaN}', "7"):
        with contextlib.suppress(InputError):
            read_all(write(tmp_path / "t.jsonl", line))
    table = write(tmp_path / "t.jsonl", '{"make": "a{b", "body": "suv"}\n{"make": "x\\n{body}", "body": "bus"}')
    numbers = run_describe(f"--attributes {table} --rows_only{made.teacher}", tmp_path / "o")
    assert printable(os.fsdecode(b"v\xe9.jpg")) == "v\\xe9.jpg" and printable("\u00e9.jpg") == "\u00e9.jpg"
    assert numbers["kept"] >= 2 and all(row["text"].encode() for row in lines_of(tmp_path / "o" / "texts.jsonl"))


@pytest.mark.parametrize("more, message", [
    ("--attributes no.csv", "no.csv does not exist"), ("--column tyre=x", "write SLOT=NAME"),
    ("--n_min 0", "--n_min 0: must be at least 1"), ("--dedup_cos 2", "--dedup_cos 2.0: must be above 0"),
    (f"--attributes {ROOT / 'datasets'}", "none of train_label.xml, .* is in this folder"), ("--images no", "no"),
    ("--images . --n_min 99", "fewer than --n_min 99"), ("--templates no.json", "no.json"), ("--device x", "device"),
    ("--split no", "no row|no usable|split"),
])  # fmt: skip
def test_everything_is_looked_at_before_the_teacher_is_loaded(made, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("main_describe.load_teacher", lambda _: pytest.fail("the teacher was loaded"))
    with pytest.raises(InputError, match=message):
        run_describe(f"{made.grounded} {more}", tmp_path / "o")
