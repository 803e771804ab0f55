"""The page of a re-identification test against slow lists; what a page is given is escaped."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_pictures

import reports.reid as report
from datasets.path_list import PathList
from datasets.reid import ReidImages
from metrics.reid import FeatureSet, Protocol, evaluate
from reports.page import Page, Pictures, cards, confusion_table, new_axes, table, worst_table
from reports.reid import ReidFeatures, ReidTest, write_reid_report

NAMES = [f"car <{i}>" for i in range(7)]
WITH, WITHOUT = Protocol("table", True), Protocol("table", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("reid"), 20, size=(24, 18))


def make_case(folder, seed=0, queries=15, gallery=60, cameras=True, axes=False):
    """(query, its features, gallery, its features): vehicle and camera both show in the features."""
    rng = np.random.default_rng(seed)
    centres, views = rng.standard_normal((7, 12)), rng.standard_normal((3, 12))
    parts = []
    for count in (queries, gallery):
        pids, camids = rng.integers(0, 7, count), rng.integers(0, 3, count)
        x = centres[pids] + views[camids] + 1.2 * rng.standard_normal((count, 12))
        if axes:  # four directions: exact ties
            x = np.sign(x[:, :2]) * (np.abs(x[:, :2]) == np.abs(x[:, :2]).max(axis=1, keepdims=True))
        names = [f"{i:04d}.png" for i in rng.integers(0, 20, count)]
        unknown = np.full(count, -1)
        images = ReidImages(PathList(folder, names), pids, camids if cameras else unknown, unknown)
        parts += [images, torch.from_numpy(x.astype(np.float32))]
    return tuple(parts)


def slow_lists(protocol, query, x, gallery, y):
    """[(AP or None, [(row, rank or 0, mark, cosine)])] of whole lists, from the protocol's text."""
    unit = [v / v.norm(dim=1, keepdim=True) for v in (x.double(), y.double())]
    lists = []
    for q, row in enumerate((unit[0] @ unit[1].t()).round(decimals=12).tolist()):
        rank, found, cards = 0, [], []
        for g in sorted(range(len(row)), key=lambda j: (-row[j], j)):
            same = gallery.pids[g] == query.pids[q]
            if same and protocol.remove_same_camera and gallery.camids[g] == query.camids[q]:
                cards.append((g, 0, "junk", row[g]))
                continue
            rank += 1
            found += [rank] * bool(same)
            cards.append((g, rank, "right" if same else "wrong", row[g]))
        ap = sum(i / r for i, r in enumerate(found, 1)) / len(found) if found else None
        lists.append((ap, cards))
    return lists


def first_cards(cards, topk):
    """What the page shows of a whole list."""
    shown, counted, junk = [], 0, 0
    for card in cards:
        counted, junk = counted + (card[1] > 0), junk + (card[1] == 0)
        if counted <= topk and (card[1] or junk <= topk and counted < topk):
            shown.append(card)
    return shown + [card for card in cards if card[2] == "right"][:1] * ("right" not in [card[2] for card in shown])


def feature_sets(query, x, gallery, y):
    return [FeatureSet(values, images.pids, images.camids) for images, values in ((query, x), (gallery, y))]


def write(tmp_path, protocol, case):
    metrics = evaluate(protocol, *feature_sets(*case))
    file = tmp_path / "page.html"
    query, gallery = (ReidFeatures(*case[i : i + 2], []) for i in (0, 2))
    write_reid_report(file, {"weights": "<w>&.pth"}, ReidTest(protocol, metrics, query, gallery, {}), NAMES)
    return file.read_text(encoding="utf-8")


def read_sections(page):
    """{section: [(title, AP in %, [(mark, rank, cosine, file)])]}"""
    sections = {}
    for name, text in re.findall(r'<h2 id="(worst|random)-queries">(.*?)(?=<h2|<script)', page, re.S):
        sections[name] = []
        for article in re.findall(r"<article>(.*?)</article>", text, re.S):
            title, ap = re.search(r"<h3>(.*?)<span>AP ([\d.]+) %", article).groups()
            cards = []
            for mark, card in re.findall(r'<li class="(right|wrong|junk)[ a-z]*">(.*?)</li>', article, re.S):
                rank = re.search(r"<br>rank (\d+)<br>", card)
                assert rank or "<br>not counted<br>" in card
                cosine, file = re.search(r"cos (-?[\d.]+)", card)[1], re.search(r'title="(.*?)"', card)[1]
                cards.append((mark, int(rank[1]) if rank else 0, float(cosine), file))
            sections[name].append((title, float(ap), cards))
    return sections


@pytest.mark.parametrize(
    "protocol, cameras, axes", [(WITH, 1, 0), (WITHOUT, 1, 0), (WITHOUT, 0, 0), (WITH, 1, 1), (WITHOUT, 0, 1)]
)
def test_the_page_shows_the_lists_of_the_metrics(tmp_path, folder, monkeypatch, protocol, cameras, axes):
    """Ties, which four directions have, stand in the order of the gallery."""
    query, x, gallery, y = case = make_case(folder, cameras=cameras, axes=axes)
    monkeypatch.setattr(report, "SHOWN", 5)
    monkeypatch.setattr(report, "TOPK", 6)
    page = write(tmp_path, protocol, case)
    slow = slow_lists(protocol, *case)
    sections = read_sections(page)
    assert list(sections) == ["worst", "random"] and all(len(x) == 5 for x in sections.values())
    ap = [ap for ap, _ in slow]
    assert [found[1] for found in sections["worst"]] == pytest.approx([100 * v for v in sorted(ap)[:5]], abs=0.06)
    by_title = {}  # of equal titles, one of the queries must fit
    for (value, whole), pid, camid in zip(slow, query.pids, query.camids):
        title = f"pid car &lt;{pid}&gt;" + (f", camid {camid}" if cameras else "")
        shown = [(m, r, pytest.approx(c, abs=6e-4), gallery.paths.relative(g)) for g, r, m, c in first_cards(whole, 6)]
        by_title.setdefault(title, []).append((pytest.approx(100 * value, abs=0.06), shown))
    for title, value, listed in (found for section in sections.values() for found in section):
        assert (value, listed) in by_title[title]
    assert ("not counted" in page) == (protocol is WITH)
    assert ("camid" in page.split('<h2 id="worst-queries')[1]) == cameras
    assert f"mAP<b>{100 * np.mean(ap):.2f} %" in page and protocol.line() in page


def test_junk_is_bounded_and_the_first_right_one_is_shown(tmp_path, folder, monkeypatch):
    """30 same-camera images ahead, then wrong ones, and the only match last."""
    paths = PathList(folder, [f"{i % 20:04d}.png" for i in range(50)])
    gallery = ReidImages(paths, np.repeat([1, 2, 1], [30, 19, 1]), np.repeat([0, 0, 1], [30, 19, 1]), np.zeros(50, int))
    query = ReidImages(PathList(folder, ["0000.png"]), np.array([1]), np.array([0]), np.array([0]))
    angle = torch.linspace(0, 1, 50)
    case = query, torch.tensor([[1.0, 0.0]]), gallery, torch.stack([angle.cos(), angle.sin()], dim=1)
    monkeypatch.setattr(report, "TOPK", 4)
    page = write(tmp_path, WITH, case)
    cards = read_sections(page)["worst"][0][2]
    assert [card[:2] for card in cards] == [("junk", 0)] * 4 + [("wrong", r) for r in range(1, 5)] + [("right", 20)]
    assert page.count('<li class="right later">') == 2 and "AP 5.0 %, 1 matches, at ranks 20 to 20" in page


def test_a_lost_file_is_named_not_fatal(tmp_path, folder):
    query, x, gallery, y = make_case(folder)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = ["gone<1>.png", "bad.png"] * 30
    query, gallery = (replace(of, paths=PathList(tmp_path, names[: len(of)])) for of in (query, gallery))
    page = write(tmp_path, WITH, (query, x, gallery, y))
    assert "gone&lt;1&gt;.png cannot be opened" in page and "bad.png cannot be opened" in page
    assert "2 of the pictures cannot be opened" in page and "<img src" not in page
    assert "FileNotFoundError" in page and "UnidentifiedImageError" in page


def test_the_page_needs_nothing_else(tmp_path, folder):
    page = write(tmp_path, WITH, make_case(folder))
    assert not re.search(r"https?://|//[\w.]+/|url\((?!#)|@import|<link|<iframe|fetch\(", page)
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    images = re.findall(r"<img .*?>", page)
    assert images and all(re.search(r'alt="[^"]+"', image) for image in images)
    assert len(re.findall(r'<svg viewBox=[^>]* role="img" aria-label="[^"]{20,}"', page)) == 1
    assert "&lt;w&gt;&amp;.pth" in page and "<w>" not in page and "<0>" not in page


def test_queries_without_a_match(tmp_path, folder):
    query, x, gallery, y = make_case(folder)
    some = replace(gallery, pids=np.where(gallery.pids == query.pids[0], 6 - query.pids[0], gallery.pids))
    assert " 0 of the queries without a match" not in write(tmp_path, WITH, (query, x, some, y))
    none, other = (replace(of, pids=np.full(len(of), pid)) for pid, of in enumerate((query, gallery)))
    page = write(tmp_path, WITH, (none, x, other, y))
    assert "15 of the queries without a match" in page and "<article>" not in page and ">nan %<" in page


def test_whatever_a_page_is_given_is_escaped(tmp_path):
    evil = "<b>$x$&\"'\udcff\ud800\n\x1b[31m\0"
    page = Page(evil, evil, {evil: evil}, {evil: evil, "lr": 1 / 3})
    page.section(evil, evil)
    axes = new_axes(evil, evil)
    for _ in range(2):
        axes.plot([0, 1], label=evil)
    page.figure(evil, axes, evil)
    page.add(table([evil], [[evil]]), confusion_table([evil, "b"], np.eye(2, dtype=int)))
    page.add(cards([Pictures().card(tmp_path / "gone", evil, evil, alt=evil)]), worst_table([evil], [[evil]] * 20))
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "\\xff" in text and "\\x1b[31m" in text and "\x1b" not in text and "\0" not in text
    assert "<b>$x$" not in text and '"\'"' not in text and "0.3333" in text
    assert text.count("&lt;b&gt;$x$&amp;") > 20 and "cannot be opened" in text
