"""The candidates of a run: encoded, compared with one another, judged by images, and written as a bank."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from datasets.items import WholeImages
from datasets.path_list import printable
from datasets.text_bank import TeacherIdentity, check_unit, hash_texts, read_encoded, save_bank
from description.grounding import bank_statistics, ground, near_duplicates
from description.texts import Templates, Text, cap, wordings_of
from engine_extract import extract_to_file
from models_teacher import FrozenTeacher, check_tokens, encode_texts
from reports.description import write_description_report
from util.errors import InputError
from util.files import file_sha256, read_json, write_atomic, write_json
from util.precision import pick_precision

REPORT_TEXTS = 200  # kept and removed texts shown with images


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
            raise InputError(
                f"{len(kept)} texts are left and a bank needs 2: the last went as {reason} ({detail}); loosen that "
                "threshold or add attributes"
            )


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


def embed_images(args, paths, indices: np.ndarray, teacher: tuple) -> tuple[torch.Tensor, dict[str, str]]:
    """Embed whole images, as `--teacher_view full` shows them to the teacher, and keep them in --output.

    Returns:
        ([n, D] float32 on the CPU, unreadable rows NaN; {image: what was wrong}).
    """
    clip, _, identity = teacher
    job = {"images": paths.sha256(), "root": str(Path(paths.root).resolve()), "teacher": identity.weights_sha256}
    job["chosen"] = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    key = hashlib.sha256(json.dumps(job).encode()).hexdigest()[:12]
    file = Path(args.output) / "embeddings" / f"images-{key}.npy"
    about = file.with_suffix(".json")  # written last: it says that both are whole
    try:
        found = read_json(about, "") if about.is_file() else {}
        if found and found["sha256"] == file_sha256(file):
            return torch.from_numpy(np.load(file)), dict(found["unreadable"])
        print(f"damaged, the images are embedded again: {file}" if found else f"{len(indices)} images to embed")
    except (InputError, OSError, KeyError, TypeError, ValueError) as error:
        print(f"damaged, the images are embedded again: {error}")
    about.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    device = clip.logit_scale.device
    dtype = pick_precision("auto" if device.type == "cuda" else "none", device)[0] or torch.float32
    frozen = FrozenTeacher(clip, identity, dtype).to(device)
    _, problems = extract_to_file(
        frozen, WholeImages(paths, indices, frozen.size), device, file.with_suffix(""), job,
        batch_size=args.batch_size, num_workers=args.num_workers,
    )  # fmt: skip
    problems = {str(index): problem for index, problem in problems.items()}
    write_json(about, {"sha256": file_sha256(file), "unreadable": problems})
    return torch.from_numpy(np.load(file)), problems


def ground_candidates(args, candidates: Candidates, paths, teacher: tuple, facts: dict) -> None:
    """Keep the texts that the images know."""
    clip, tokenizer, identity = teacher
    generic = encode_texts(clip, tokenizer, [args.generic])[0].float().cpu()
    count = min(args.max_images or len(paths), len(paths))
    indices = np.linspace(0, len(paths), count, endpoint=False).astype(np.int64)
    rows, problems = embed_images(args, paths, indices, teacher)
    for index, problem in problems.items():
        print(f"unreadable, left out: {printable(paths.relative(int(index)))}: {problem}")
    readable = ~np.isin(indices, [int(index) for index in problems])
    images, indices = rows[torch.from_numpy(readable)], indices[readable]
    check_unit(images, f"what the teacher makes of --images {args.images}")
    facts |= {"images": len(images), "unreadable": len(problems)}
    if len(images) < args.n_min:
        raise InputError(
            f"--images {args.images}: {len(images)} of {len(rows)} images could be read, fewer than --n_min "
            f"{args.n_min}; if they have come back since, remove {args.output}/embeddings"
        )
    names = [text.kind for text in candidates.texts]
    kinds, texts = {name: number for number, name in enumerate(dict.fromkeys(names))}, candidates.embeddings
    found = ground(images, texts, generic, torch.tensor([kinds[name] for name in names]), identity.tau, args)
    gone, numbers = {}, (found.usage, found.corrected, found.gap, found.limit, found.best_images)
    for j, (usage, corrected, gap, limit, best) in enumerate(zip(*(values.tolist() for values in numbers))):
        candidates.notes[j] = {"usage": usage, "corrected": corrected, "images": indices[best].tolist()}
        if usage:
            candidates.notes[j]["gap"] = round(gap, 4)
        details = {
            "ungrounded": f"{usage} images take it, {args.n_min} are needed",
            "hub": f"{corrected} images take it after correction, more than {limit:.1%} of them",
            "generic": f"{gap:+.3f} against '{args.generic}', {args.margin:+g} is needed",
        }
        if reason := found.reasons[j]:
            gone[j] = reason, details[reason]
    candidates.drop(gone)
    kept = torch.tensor([not reason for reason in found.reasons])
    facts |= bank_statistics(images, texts, kept, identity.tau)
    print(f"teacher entropy {facts['teacher_entropy']:.3f} of log T (0: hard labels, 1: says nothing)")


def write_bank(args, candidates: Candidates, templates: Templates, identity: TeacherIdentity, facts: dict, paths):
    """Write texts.jsonl, removed.jsonl, bank.npy, report.html and bank.json to --output.

    bank.json is written last: it describes the others, and a folder without it is refused.
    """
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
