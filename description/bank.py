"""The candidates of a run: encoded, compared with one another, judged by images, and written as a bank."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from datasets.items import WholeImages
from datasets.path_list import printable
from datasets.teacher import TeacherIdentity, check_unit, hash_texts, read_encoded, save_bank
from description.texts import Templates, Text, cap, wordings_of
from engine_extract import extract_to_file
from models_teacher import FrozenTeacher, check_tokens, encode_texts
from reports.automobile1m import write_description_report
from util.errors import InputError
from util.files import read_arrays, write_atomic, write_json
from util.precision import pick_precision

REPORT_TEXTS = 200  # kept and removed texts shown with images
BLOCK = 1024  # images at a time; memory is a few times BLOCK x texts x 4 bytes
HUB_FAIR = 5  # a hub is used at least this many times as often as an average text of its rank list


class Candidates:
    """The texts still in play, their embeddings and why the others went."""

    def __init__(self, texts: list[Text]):
        self.texts = texts
        self.embeddings: torch.Tensor | None = None  # [T, D] float32 unit rows
        self.notes: list[dict] = [{} for _ in texts]  # usage, advantage and best images, for the report
        self.removed: list[dict] = []

    def drop(self, reasons: dict[int, tuple[str, str]]) -> None:
        """{index: (reason, detail)} of texts that go."""
        for i, (reason, detail) in sorted(reasons.items()):
            about = {"text": self.texts[i].text, "kind": self.texts[i].kind, "reason": reason, "detail": detail}
            self.removed.append(about | self.notes[i])
        kept = [i for i in range(len(self.texts)) if i not in reasons]
        self.texts, self.notes = ([values[i] for i in kept] for values in (self.texts, self.notes))
        if self.embeddings is not None:
            self.embeddings = self.embeddings[kept]
        if len(kept) < 2:
            reason, detail = next(iter(reasons.values()), ("", ""))
            words = f"{len(kept)} texts are left and a bank needs 2: the last went as {reason} ({detail})"
            raise InputError(f"{words}; loosen that threshold or add attributes")


def encode(args, candidates: Candidates, templates: Templates, teacher: tuple, facts: dict) -> None:
    """Embed all candidates by `teacher`, what `load_clip` returns; near-duplicates and what is above the limits go."""
    clip, tokenizer, identity = teacher
    wordings = [wordings_of(text, templates, args.ensemble) for text in candidates.texts]
    flat = [wording for each in wordings for wording in each]
    context_length = getattr(tokenizer, "context_length", None) or clip.context_length
    longest = facts["longest_tokens"] = check_tokens(tokenizer, [*flat, args.generic], context_length)
    file = Path(args.output) / "embeddings" / f"texts-{hash_texts([identity.weights_sha256, *flat])[:12]}.safetensors"
    try:
        encoded = read_encoded(file, identity)[0]
    except InputError:  # not there, or damaged
        print("damaged and encoded again: " * file.exists() + f"{len(flat)} texts, the longest has {longest} tokens")
        encoded = encode_texts(clip, tokenizer, flat, args.batch_size).cpu()
        save_bank(file, encoded, flat, identity)  # kept for other thresholds
    # CLIP's prompt ensembling: the mean of each description's normalised wordings, renormalised
    rows = encoded.split([len(each) for each in wordings])
    candidates.embeddings = torch.stack([F.normalize(part.mean(dim=0), dim=0) for part in rows])
    near = near_duplicates(candidates.embeddings, [len(t.text) for t in candidates.texts], args.dedup_cos)
    candidates.drop({i: ("near-duplicate", f"of '{candidates.texts[j].text}'") for i, j in near.items()})
    candidates.drop({i: ("cap", why) for i, why in cap(candidates.texts, args.max_texts, args.max_per_make).items()})


@torch.no_grad()
def near_duplicates(texts: torch.Tensor, lengths: list[int], threshold: float, block: int = 512) -> dict[int, int]:
    """De-duplicate texts ([T, D] float32 unit rows) greedily, shorter ones first (lengths: characters of each), by the
    cosine above which the later text goes -> {index of a removed text: index of the kept text it is nearest to}."""
    order = sorted(range(len(texts)), key=lambda i: (lengths[i], i))
    texts, kept, removed = texts[order], torch.zeros(len(order), dtype=torch.bool), {}
    for start in range(0, len(order), block):
        cosine = texts[start : start + block] @ texts[: start + block].T
        for place, row in enumerate(cosine, start):
            value, nearest = row.where(kept[: len(row)], -2).max(dim=0)
            if value > threshold:
                removed[order[place]] = order[nearest]
            else:
                kept[place] = True
    return removed


def embed_images(args, paths, indices: np.ndarray, teacher: tuple) -> tuple[torch.Tensor, dict[int, str]]:
    """Embed whole images, as `--teacher_view full` shows them to the teacher, and keep them in --output -> ([n, D]
    float32 on the CPU, unreadable rows NaN; {index: what was wrong})."""
    clip, _, identity = teacher
    job = {"images": paths.sha256(), "root": str(Path(paths.root).resolve()), "teacher": identity.weights_sha256}
    job["chosen"] = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps(job).encode()).hexdigest()[:12]
    file = Path(args.output) / "embeddings" / f"images-{key}.npz"
    if (stored := read_arrays(file)) is None:
        print(f"{len(indices)} images to embed")
        device = clip.logit_scale.device
        dtype = pick_precision("auto" if device.type == "cuda" else "none", device)[0] or torch.float32
        frozen = FrozenTeacher(clip, identity, dtype).to(device)
        items, how = WholeImages(paths, indices, frozen.size), {"batch_size": args.batch_size}
        how["num_workers"] = args.num_workers
        _, problems = extract_to_file(frozen, items, device, file.with_suffix(""), job, **how)
        rows = file.with_suffix(".npy")
        stored = {"rows": np.load(rows), "bad": np.array(list(problems), dtype=np.int64)}
        stored["problems"] = np.array(list(problems.values()), dtype=np.str_)
        write_atomic(file, lambda opened: np.savez(opened, **stored))
        rows.unlink()
    return torch.from_numpy(stored["rows"]), dict(zip(stored["bad"].tolist(), stored["problems"].tolist()))


def ground_candidates(args, candidates: Candidates, paths, teacher: tuple, facts: dict) -> None:
    """Drop texts that too few images match, hubs, and texts that say no more than the generic prompt."""
    clip, tokenizer, identity = teacher
    generic = encode_texts(clip, tokenizer, [args.generic])[0].float().cpu()
    count = min(args.max_images or len(paths), len(paths))
    indices = np.linspace(0, len(paths), count, endpoint=False).astype(np.int64)
    rows, problems = embed_images(args, paths, indices, teacher)
    for index, problem in problems.items():
        print(f"unreadable, left out: {printable(paths.relative(index))}: {problem}")
    readable = ~np.isin(indices, list(problems))
    images, indices = rows[torch.from_numpy(readable)], indices[readable]
    check_unit(images, f"what the teacher makes of --images {args.images}")
    facts |= {"images": len(images), "unreadable": len(problems)}
    if len(images) < args.n_min:
        words = f"--images {args.images}: {len(images)} of {len(rows)} images could be read, fewer than --n_min"
        raise InputError(f"{words} {args.n_min}; if they have come back since, remove {args.output}/embeddings")
    names, texts = [text.kind for text in candidates.texts], candidates.embeddings
    kinds = {name: number for number, name in enumerate(dict.fromkeys(names))}
    found = ground(images, texts, generic, torch.tensor([kinds[name] for name in names]), identity.tau, args)
    gone, numbers = {}, (found.usage, found.corrected, found.gap, found.limit, found.best_images)
    for j, (usage, corrected, gap, limit, best) in enumerate(zip(*(values.tolist() for values in numbers))):
        candidates.notes[j] = {"usage": usage, "corrected": corrected, "images": indices[best].tolist()}
        candidates.notes[j] |= {"gap": round(gap, 4)} if usage else {}
        details = {
            "ungrounded": f"{usage} images take it, {args.n_min} are needed",
            "hub": f"{corrected} images take it after correction, more than {limit:.1%} of them",
            "generic": f"{gap:+.3f} against '{args.generic}', {args.margin:+g} is needed",
        }
        if reason := found.reasons[j]:
            gone[j] = reason, details[reason]
    candidates.drop(gone)
    facts |= bank_statistics(images, texts, torch.tensor([not reason for reason in found.reasons]), identity.tau)
    print(f"teacher entropy {facts['teacher_entropy']:.3f} of log T (0: hard labels, 1: says nothing)")


@torch.no_grad()
def ground(images: torch.Tensor, texts: torch.Tensor, generic: torch.Tensor, kinds: torch.Tensor, tau: float, rule):
    """Judge every text by the images, of which only unpaired embeddings are compared.

    Each image takes its `topk` nearest texts of every kind, by cosine, but at most a tenth of the kind's texts. A text
    is removed, in this order, if

    - fewer than `n_min` images take it (ungrounded);
    - more than `hub_share` of the images and more than five times the fair share would take it even after the
      correction of hubs (hub);
    - on the images that take it, its cosine exceeds the generic prompt's by less than `margin` on average (generic).

    Args:
        images: V [N, D] float32 unit rows; texts: U [T, D]; generic: [D], unit.
        kinds: [T] int64, number of the kind within which a text is ranked. tau: the teacher's temperature.
        rule: has topk, n_min, hub_share and margin, as the flags.
    Returns:
        usage: [T] int64, images that have the text among their nearest; corrected: the same after the correction of
        hubs; gap: [T] float32, mean cosine advantage over the generic prompt on the images of `usage` (NaN: none);
        limit: [T] float32, share of images above which the text is a hub; best_images: [T, m] int64, the four nearest
        first; reasons: "" (kept), "ungrounded", "hub" or "generic".
    """
    N, T, show = len(images), len(texts), min(4, len(images))
    # the correction of hubs (Smith et al., 2017): cosines minus tau log of the sum of exp(cosine / tau) over the images
    shift = torch.full((T,), -math.inf)
    for part in images.split(BLOCK):
        shift = torch.logaddexp(shift, (part @ texts.T / tau).logsumexp(dim=0))
    usage, corrected = torch.zeros(2, T, dtype=torch.int64)
    gap, limit, best = torch.zeros(T, dtype=torch.float64), torch.zeros(T), torch.full((T, show), -math.inf)
    best_images = torch.zeros(T, show, dtype=torch.int64)
    for start in range(0, N, BLOCK):
        cosine = images[start : start + BLOCK] @ texts.T  # [b, T]
        advantage = cosine - (images[start : start + BLOCK] @ generic)[:, None]
        for kind in kinds.unique():
            ids = torch.nonzero(kinds == kind).flatten()
            k = min(rule.topk, -(-len(ids) // 10))
            limit[ids] = max(rule.hub_share, HUB_FAIR * k / len(ids))
            chosen = ids[cosine[:, ids].topk(k, dim=1).indices]  # [b, k]
            usage += torch.bincount(chosen.flatten(), minlength=T)
            gap.index_add_(0, chosen.flatten(), advantage.gather(1, chosen).flatten().double())
            chosen = ids[(cosine[:, ids] - tau * shift[ids]).topk(k, dim=1).indices]
            corrected += torch.bincount(chosen.flatten(), minlength=T)
        numbers = torch.arange(start, start + len(cosine)).expand(T, -1)
        best, order = torch.cat([best, cosine.T], dim=1).topk(show, dim=1)
        best_images = torch.cat([best_images, numbers], dim=1).gather(1, order)
    gap = (gap / usage).float()
    wrong = [("ungrounded", usage < rule.n_min), ("hub", corrected > limit * N), ("generic", ~(gap >= rule.margin))]
    reasons = [next((name for name, of in wrong if of[j]), "") for j in range(T)]
    found = {"usage": usage, "corrected": corrected, "gap": gap, "limit": limit, "best_images": best_images}
    return SimpleNamespace(**found, reasons=reasons)


@torch.no_grad()
def bank_statistics(images: torch.Tensor, texts: torch.Tensor, kept: torch.Tensor, tau: float) -> dict[str, float]:
    """Tell how the kept texts serve the images, by plain cosine as in training; kept: [T] bool.

    coverage: share of images whose nearest text of all is kept; usage_entropy: entropy of the kept texts' shares as
    nearest text, over log of their number; teacher_entropy: mean entropy of softmax(V U^T / tau) over the kept texts,
    over the same: near 0 is a hard label, near 1 says nothing.
    """
    covered, entropy, count = 0, 0.0, int(kept.sum())
    nearest = torch.zeros(count, dtype=torch.float64)
    for part in images.split(BLOCK):
        cosine = part @ texts.T
        covered += int(kept[cosine.argmax(dim=1)].sum())
        logits = cosine[:, kept] / tau
        nearest += torch.bincount(logits.argmax(dim=1), minlength=count)
        entropy += torch.special.entr(logits.double().softmax(dim=1)).sum().item()
    usage, scale = torch.special.entr(nearest / nearest.sum()).sum().item(), math.log(max(count, 2))
    numbers = {"coverage": covered / len(images), "usage_entropy": usage / scale}
    return numbers | {"teacher_entropy": entropy / len(images) / scale}


def write_bank(args, candidates: Candidates, templates: Templates, identity: TeacherIdentity, facts: dict, paths):
    """Write texts.jsonl, removed.jsonl, bank.npy, report.html and bank.json to --output; bank.json is written last: it
    describes the others, and a folder without it is refused."""
    output, kept = Path(args.output), []
    for number, (text, note) in enumerate(zip(candidates.texts, candidates.notes)):
        row = {"id": number, "text": text.text, "kind": text.kind, "attrs": text.attrs, "template": text.template}
        row |= {"wordings": wordings_of(text, templates, True)} if args.ensemble else {}
        kept.append(row | {"rows": text.count} | note)
    (output / "bank.json").unlink(missing_ok=True)
    for rows, file in ((kept, "texts.jsonl"), (candidates.removed, "removed.jsonl")):
        lines = []
        for row in rows:
            if "images" in row:  # numbers mean nothing without the list
                row = row | {"images": [printable(paths.relative(index)) for index in row["images"]]}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_atomic(output / file, lambda opened, lines=lines: opened.write("".join(lines).encode()))
    bank, lists = candidates.embeddings.numpy().astype(np.float32), {"kept": kept, "removed": candidates.removed}
    write_atomic(output / "bank.npy", lambda opened: np.save(opened, bank))
    title = f"Texts for {identity.model}: {len(kept)} kept, {len(candidates.removed)} removed"
    write_description_report(output / "report.html", title, facts, lists, paths, REPORT_TEXTS)
    about = {"kind": "cgd-mae text bank folder", "teacher": asdict(identity), "pretrained": str(args.clip_pretrained)}
    about |= {"texts": len(kept), "dim": bank.shape[1], "dtype": "float32", "logit_scale": math.log(1 / identity.tau)}
    about |= {"ensemble": args.ensemble, "grounded": paths is not None, "open_clip": open_clip.__version__}
    about["texts_sha256"] = hash_texts([row["text"] for row in kept])
    for name, data in (("bank", bank.tobytes()), ("templates", Path(args.templates).read_bytes())):
        about[f"{name}_sha256"] = hashlib.sha256(data).hexdigest()
    write_json(output / "bank.json", about)
