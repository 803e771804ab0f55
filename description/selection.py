"""The candidates of a run: encoded, compared with one another, and judged by images."""

from pathlib import Path

import numpy as np
import torch

from datasets.path_list import printable
from description.encode import embed_images, embed_texts, mean_of_wordings
from description.grounding import bank_statistics, ground, near_duplicates
from description.texts import Text, cap, wordings_of
from models_teacher import FrozenTeacher, check_tokens, encode_texts
from util.errors import InputError
from util.precision import pick_amp_dtype


class Candidates:
    """The texts still in play, their embeddings and why the others went."""

    def __init__(self, texts: list[Text]):
        self.texts = texts
        self.embeddings: torch.Tensor | None = None  # [T, D] float32 unit rows
        self.notes: list[dict] = [{} for _ in texts]
        self.removed: list[dict] = []

    def drop(self, reasons: dict[int, tuple[str, str]]) -> None:
        """{index: (reason, detail)} of texts that go."""
        for i, (reason, detail) in sorted(reasons.items()):
            text = self.texts[i]
            row = {"text": text.text, "kind": text.kind, "reason": reason, "detail": detail}
            self.removed.append(row | self.notes[i])
        kept = [i for i in range(len(self.texts)) if i not in reasons]
        self.texts = [self.texts[i] for i in kept]
        self.notes = [self.notes[i] for i in kept]
        if self.embeddings is not None:
            self.embeddings = self.embeddings[kept]
        if len(self.texts) < 2:
            last = next(iter(reasons.values()), ("", ""))
            raise InputError(
                f"{len(self.texts)} texts are left and a bank needs 2: the last went as {last[0]} "
                f"({last[1]}); loosen that threshold or add attributes"
            )


def encode(args, candidates: Candidates, templates, clip, tokenizer, output: Path, facts: dict) -> None:
    """Embeddings of all candidates; near-duplicates and what is above the limits go."""
    wordings = [wordings_of(text, templates, args.ensemble) for text in candidates.texts]
    flat = [wording for each in wordings for wording in each]
    context_length = getattr(tokenizer, "context_length", None) or clip.context_length
    facts["longest_tokens"] = check_tokens(tokenizer, [*flat, args.generic], context_length)
    print(f"{len(flat)} texts to encode, the longest has {facts['longest_tokens']} of {context_length} tokens")
    rows = embed_texts(clip, tokenizer, flat, output / "embeddings", args.batch_size)
    candidates.embeddings = mean_of_wordings(rows, [len(each) for each in wordings])
    near = near_duplicates(candidates.embeddings, [len(t.text) for t in candidates.texts], args.dedup_cos)
    kept = [text.text for text in candidates.texts]
    candidates.drop({i: ("near-duplicate", f"of '{kept[j]}'") for i, j in near.items()})
    over = cap(candidates.texts, args.max_texts, args.max_per_make)
    candidates.drop({i: ("cap", why) for i, why in over.items()})


def ground_candidates(args, candidates: Candidates, paths, clip, tokenizer, identity, device, facts) -> None:
    """Keep the texts that the images know; notes of usage, advantage and best images for the report."""
    count = min(args.max_images or len(paths), len(paths))
    indices = np.linspace(0, len(paths), count, endpoint=False).astype(np.int64)
    dtype = pick_amp_dtype(args.amp, device)[0] if device.type == "cuda" else None
    teacher = FrozenTeacher(clip, identity, dtype or torch.float32).to(device)
    rows, problems = embed_images(
        teacher, paths, indices, Path(args.output) / "embeddings",
        batch_size=args.batch_size, num_workers=args.num_workers,
    )  # fmt: skip
    for row, problem in problems.items():
        print(f"unreadable, left out: {printable(paths.relative(int(indices[row])))}: {problem}")
    if problems:
        print(f"this is remembered: remove {args.output}/embeddings to try these images again")
    readable = torch.isfinite(rows[:, 0])
    images, indices = rows[readable], indices[readable.numpy()]
    facts |= {"images": len(images), "unreadable": len(problems)}
    if len(images) < args.n_min:
        raise InputError(
            f"--images {args.images}: {len(images)} of {len(rows)} images could be read, fewer "
            f"than --n_min {args.n_min}; if they have come back since, remove {args.output}/embeddings"
        )
    generic = encode_texts(clip, tokenizer, [args.generic])[0].float().cpu()
    names = [text.kind if args.rank_in == "kind" else "" for text in candidates.texts]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    found = ground(
        images, candidates.embeddings, generic, torch.tensor([numbers[name] for name in names]),
        tau=identity.tau, topk=args.topk, n_min=args.n_min, hub_share=args.hub_share, margin=args.margin,
        correction=args.correction,
    )  # fmt: skip
    kept = torch.tensor([not reason for reason in found.reasons])
    usage, corrected, gap = found.usage.tolist(), found.corrected.tolist(), found.gap.tolist()
    for j, best in enumerate(found.best_images.tolist()):
        candidates.notes[j] = {"usage": usage[j], "corrected": corrected[j], "images": [int(indices[i]) for i in best]}
        if usage[j]:
            candidates.notes[j]["gap"] = round(gap[j], 4)
    why = {
        "ungrounded": lambda j: f"{usage[j]} images take it, {args.n_min} are needed",
        "hub": lambda j: f"{corrected[j]} images take it after correction, more than {found.limit[j]:.1%} of them",
        "generic": lambda j: f"{gap[j]:+.3f} against '{args.generic}', {args.margin:+g} is needed",
    }
    texts = candidates.embeddings
    candidates.drop({j: (r, why[r](j)) for j, r in enumerate(found.reasons) if r})
    facts |= bank_statistics(images, texts, kept, identity.tau)
    print(f"teacher entropy {facts['teacher_entropy']:.3f} of log T (0: hard labels, 1: says nothing)")
