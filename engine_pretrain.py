"""One epoch of pre-training: batches in, weights and meters changed."""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

from util.loop import Run, StepWatch, apply_update, to_device
from util.optim import cosine_lr, set_lr

# said of updates that are not finite: what makes training steadier
STEADIER = "lower --blr or set --clip_grad 1 (name lr or clip_grad after --allow_change), or use --amp none"


@dataclass
class PretrainRun(Run):
    """teacher: the frozen CLIP, or None where a cache holds its embeddings and for plain MAE.
    text_bank: (embeddings, texts, the teacher's identity), kept beside the checkpoints."""

    teacher: nn.Module | None = None
    text_bank: tuple | None = None


def train_one_epoch(run: PretrainRun, args) -> None:
    """Train the rest of `run.epoch` on pixel + ramp * (sim_weight * sim + kl_weight * kl) (MAE, Sec. 3, A.1; CGD-MAE).

    `run` is changed in place, always from one complete update to the next. Raises InputError: too many unreadable
    images, or too many non-finite updates in a row.
    """
    batches = run.loader.batch_sampler
    batches.set_epoch(run.epoch, run.batches_done)
    steps = batches.batches_per_epoch
    run.model.train()
    with StepWatch(run, args, shown_terms, STEADIER) as watch:  # progress, unreadable images, saving
        for step, batch in enumerate(watch.batches_of(run.loader), run.batches_done):
            first = step - step % args.accum_iter
            size = min(args.accum_iter, steps - first)  # of this update, in batches
            if step == first:
                epoch = run.epoch + first / steps
                lr = cosine_lr(epoch, args.lr, args.min_lr, args.warmup_epochs, args.epochs)
                set_lr(run.optimizer, lr)
                ramp = min(1.0, epoch / args.warmup_epochs) if args.warmup_epochs else 1.0
                weights = {name: weight * ramp for name, weight in args.weights.items()}
                update_terms, problems = [], []

            problems += [problem for problem in batch.pop("problem") if problem]
            batch = to_device(batch, run.device)
            is_last = step == first + size - 1
            update_terms.append(forward_backward(run, batch, args, weights, 1 / size, is_last))
            if is_last:
                apply_update(run, args, update_terms, problems, watch, lr)


def forward_backward(run: PretrainRun, batch: dict, args, weights: dict, share: float, is_last: bool) -> dict:
    """One batch through teacher and student and back, in micro-batches of at most `args.micro_batch` images -> its
    terms and their weighted sum `loss`, detached float32.

    Gradients and terms are those of the whole batch, since every term is a mean over images. They are exchanged between
    ranks with the last micro-batch of an update.
    """
    total, collected, done = len(batch["imgs"]), {}, 0
    for tensors in zip(*(tensor.split(args.micro_batch) for tensor in batch.values())):
        piece = dict(zip(batch, tensors))
        imgs, teacher_embed = piece["imgs"], piece.get("teacher_embed")
        done += len(imgs)
        exchange = run.model is run.bare or (is_last and done == total)
        with contextlib.nullcontext() if exchange else run.model.no_sync():
            if run.teacher is not None:  # in its own dtype; a teacher cache puts teacher_embed into the batch
                teacher_embed = run.teacher(imgs)  # [N, D_t]
            with run.autocast():
                terms = run.model(imgs, args.mask_ratio, piece["noise"], teacher_embed)
            loss = terms["pixel"] + sum(weight * terms[name] for name, weight in weights.items())
            fraction = len(imgs) / total
            run.backward(loss * (share * fraction))
        for name, value in ({"loss": loss} | terms).items():
            collected[name] = collected.get(name, 0) + value.detach().float() * fraction
    return collected


def shown_terms(values: dict[str, float]) -> list[str]:
    """What a log line says of an update."""
    parts = [f"pixel {values['pixel']:.4f}"]
    parts += [f"cos {1 - values['sim']:.3f}"] if "sim" in values else []
    return parts + ([f"kl {values['kl']:.3f}"] if "kl" in values else [])


def trivial_distillation(count: int, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The scores of a student that gives the same answer for every image.

    `cos_baseline`: mean cosine to the mean teacher embedding, which is the length of that mean;
    `kl_baseline`: mean KL(p_i || marginal) = entropy of the marginal - mean entropy of p_i, in nats.
    """
    if not count or "teacher_embed_mean" not in sums:
        return {}
    found = {"cos_baseline": (sums["teacher_embed_mean"] / count).norm().item()}
    if "teacher_marginal" in sums:
        marginal = (sums["teacher_marginal"] / count).clamp_min(1e-300)
        entropy = -(marginal * marginal.log()).sum().item()
        found["kl_baseline"] = entropy - (sums["teacher_entropy"] / count).item()
    return found
