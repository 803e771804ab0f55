"""Pre-train CGD-MAE: masked autoencoding plus global-context distillation from a frozen CLIP.

    torchrun --nproc_per_node=2 main_pretrain.py --batch_size 256 --model mae_vit_base_patch16 \\
        --mask_ratio 0.75 --epochs 400 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 \\
        --accum_iter 8 --norm_pix_loss --data_path PHOTOS

One process runs with plain `python main_pretrain.py ...`.
"""

import argparse
import datetime
import hashlib
import json
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from datasets.manifest import list_images
from datasets.pretrain import PretrainDataset, build_loader
from datasets.samplers import EpochBatches
from datasets.teacher_cache import TeacherCache
from datasets.text_bank import hash_texts, is_encoded, save_bank
from engine_pretrain import PretrainRun, train_one_epoch
from models_mae import CONTEXTS, MODELS
from models_teacher import FrozenTeacher, build_bank, load_clip
from reports.panels import save_panels
from util.dist import agree, barrier, get_rank, get_world_size, is_main_process, launch, wrap_ddp
from util.errors import InputError, run_or_explain
from util.fetch import fetch
from util.files import write_json
from util.meter import Meter, means, peak_gigabytes, trivial_distillation
from util.optim import build_adamw
from util.precision import pick_amp_dtype, pick_fused_attention
from util.run_files import RunFiles, environment, initialise_from, refuse_used_folder
from util.settings import check_args, print_header, resolve
from util.step_profile import StepProfile, compile_counts, profile_table
from util.stop import NoGuard, StopGuard, init_worker

CLIP_MODEL = "ViT-L-14"


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("main_pretrain.py", add_help=False, allow_abbrev=False)
    # fmt: off
    add = parser.add_argument_group("model").add_argument
    add("--model", default="mae_vit_base_patch16", choices=list(MODELS), metavar="NAME",
        help=f"one of {', '.join(MODELS)} (default mae_vit_base_patch16)")
    add("--input_size", default="224", help="pixels: one side, or H,W (default 224)")
    add("--mask_ratio", default=0.75, type=float, help="fraction of patches removed (default 0.75)")
    add("--norm_pix_loss", action="store_true",
        help="score pixels normalised per patch (default off, as in MAE)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", default=64, type=int, help="images per process and micro-batch (default 64)")
    add("--micro_batch", default=None, type=int,
        help="images in memory at once, same result (default: --batch_size on CUDA, at most 32 on CPU)")
    add("--accum_iter", default=1, type=int, help="micro-batches per update (default 1)")
    add("--epochs", default=400, type=int, help="length of the schedule in epochs (default 400)")
    add("--start_epoch", default=0, type=int, help="first epoch of a fresh run (default 0)")
    add("--warmup_epochs", default=40, type=float,
        help="epochs of linear warm-up of learning rate and distillation weights (default 40)")
    add("--lr", default=None, type=float, help="learning rate (default: from --blr)")
    add("--blr", default=1e-3, type=float, help="lr = blr * effective batch / 256 (default 1e-3)")
    add("--min_lr", default=0.0, type=float, help="learning rate at the end (default 0)")
    add("--weight_decay", default=0.05, type=float, help="AdamW weight decay (default 0.05)")
    add("--clip_grad", default=0.0, type=float, help="largest gradient norm, 0 for none (default 0)")

    add = parser.add_argument_group("distillation").add_argument
    add("--no_distill", action="store_true", help="plain MAE, no teacher (default off)")
    add("--context", default="attention", choices=CONTEXTS,
        help="the student's global token (default attention)")
    add("--sim_weight", default=8.0, type=float, help="weight of 1 - cosine (default 8)")
    add("--kl_weight", default=0.0, type=float,
        help="weight of the KL over the text bank; at 0 it is only logged (default 0)")
    add("--kl_tau", default=None, type=float,
        help="temperature of both softmaxes (default: the teacher's own, 1/exp(logit_scale))")
    add("--distill_hidden", default=0, type=int,
        help="width of a hidden layer in the projection, 0 for a linear one (default 0)")
    add("--clip_model", default=CLIP_MODEL,
        help="open_clip name or path of an open_clip JSON config (default ViT-L-14)")
    add("--clip_pretrained", default="openai",
        help="open_clip tag, or a weight file .pt .bin .safetensors (default openai)")
    add("--text_bank", default=None,
        help="texts .txt or .jsonl, or encoded: .safetensors or a folder of main_describe.py "
        "(default: built-in vocabulary)")
    add("--teacher_cache", default=None,
        help="folder of tools.reinforce: stored embeddings, no teacher runs (default none)")
    add("--teacher_view", default="crop", choices=("crop", "full"),
        help="what the teacher sees: the student's crop or the whole image (default crop)")

    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="data/automobile1m",
        help="folder or manifest .csv .tsv .jsonl .txt (default data/automobile1m)")
    add("--split", default=None, help="rows of a manifest with this `split` (default: all rows)")
    add("--crop_min", default=0.2, type=float, help="smallest crop, fraction of area (default 0.2)")
    add("--max_bad_ratio", default=0.01, type=float,
        help="stop above this fraction of unreadable images (default 0.01)")
    add("--num_workers", default=None, type=int,
        help="data processes per rank (default: cores / ranks on this machine, at most 10)")
    add("--pin_mem", action="store_true", default=True, help="pinned host memory for CUDA (default on)")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="switches it off (default on)")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", help="folder of the run (default ./output_dir)")
    add("--log_dir", default=None, help="folder for TensorBoard (default: the output folder)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "none"),
        help="precision (default auto: by device)")
    add("--compile", action="store_true", help="torch.compile student and teacher (default off)")
    add("--channels_last", action="store_true",
        help="channels-last memory for a convolutional teacher on CUDA; on the CPU always (default off)")
    add("--grad_checkpoint", action="store_true",
        help="compute activations again in the backward pass: less memory, a third slower (default off)")
    add("--profile", default=0, type=int, metavar="N",
        help="time N updates by part, write a trace to OUTPUT_DIR/profile and stop (default 0: train)")
    add("--seed", default=0, type=int, help="seed of weights, order, crops and masks (default 0)")
    add("--print_freq", default=20, type=int, help="updates between log lines (default 20)")
    add("--vis_epochs", default=20, type=int,
        help="epochs between reconstruction panels, 0 for none (default 20)")
    add("--max_bad_steps", default=10, type=int,
        help="stop after this many non-finite updates in a row (default 10)")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", default="", help="checkpoint to continue exactly, or auto (default: fresh start)")
    add("--allow_change", nargs="+", default=[], metavar="NAME",
        help="settings that may differ from the resumed run's (default none)")
    add("--init", default="", help="weights to start a new run from: .pth, .safetensors, a name of "
        "`python -m tools.checkpoint list`, or an address (default: random)")
    add("--save_freq", default=20, type=int, help="epochs between checkpoint-<epoch>.pth (default 20)")
    add("--save_minutes", default=15.0, type=float,
        help="minutes between saves of checkpoint-last.pth (default 15)")
    add("--keep_checkpoints", default=3, type=int, help="how many checkpoint-<epoch>.pth stay (default 3)")

    add = parser.add_argument_group("launch (torchrun sets these; accepted and unused)").add_argument
    for name in ("--local_rank", "--local-rank", "--world_size", "--dist_url"):
        add(name, help=argparse.SUPPRESS)
    add("--dist_on_itp", action="store_true", help=argparse.SUPPRESS)
    add("--dist_timeout", default=600.0, type=float,
        help="seconds to wait for missing ranks and stuck collectives (default 600)")
    # fmt: on
    return parser


def main(args) -> dict[str, float]:
    """Run the training that `args` describe; returns the last epoch's numbers."""
    check_args(args)
    return launch(args.device, args.output_dir, lambda device: train(args, device), args.dist_timeout)


def train(args, device: torch.device) -> dict[str, float]:
    started = time.time()
    args.device = device.type
    output_dir = Path(args.output_dir)
    if not (args.resume or args.profile):
        refuse_used_folder(output_dir)
    run, files, facts, lines = build_run(args, device)
    print_header(args, facts, lines)
    if args.profile:
        return profile_run(run, args)
    writer = None
    if is_main_process():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "args.json", facts)
        write_json(output_dir / "env.json", environment())
        if run.text_bank:
            save_bank(output_dir / "text_bank.safetensors", *run.text_bank)
        files.cut_log(run.epoch)
        # epoch e is drawn at 1000 (e + 1): the finished ones stay
        writer = SummaryWriter(args.log_dir or output_dir, purge_step=run.epoch * 1000 + 1)
    run.guard = StopGuard(lambda: files.save(run), is_main_process())
    record = files.last_record()  # of a run that is resumed and finished already
    with run.guard:
        while run.epoch < args.epochs:
            train_one_epoch(run, args)
            record = finish_epoch(run, args, files, writer)
    if is_main_process():
        files.export_encoder(run.bare)
        writer.close()
        write_json(output_dir / "metrics.json", record)
        print(
            f"done in {datetime.timedelta(seconds=int(time.time() - started))}: "
            f"{output_dir / 'encoder.pth'} holds the encoder"
        )
        print(json.dumps(record))
    return record


def build_run(args, device: torch.device) -> tuple[PretrainRun, RunFiles, dict, list[str]]:
    """Everything of a run that is ready to start or to go on: (run, its files, facts, header lines)."""
    torch.set_float32_matmul_precision("high")
    amp_dtype, amp_reason = pick_amp_dtype(args.amp, device)
    cache = TeacherCache(args.teacher_cache) if args.teacher_cache else None
    teacher, distill, teacher_facts, text_bank = build_teacher(args, device, amp_dtype, cache)
    paths = list_images(args.data_path, args.split)
    if cache:
        cache.check(
            {
                "teacher_view": args.teacher_view,
                "seed": args.seed,
                "crop_min": args.crop_min,
                "input_size": list(args.img_size),
                "images_sha": paths.sha256(),
            }
        )
    batches = EpochBatches(len(paths), args.batch_size, get_rank(), get_world_size(), args.seed)
    facts = resolve(args, paths, batches) | teacher_facts
    facts["precision"] = str(amp_dtype or torch.float32).removeprefix("torch.")
    facts["crop_views"] = 0 if cache is None or cache.is_full else cache.num_views  # 0: new crops each epoch

    torch.manual_seed(args.seed)
    fused = pick_fused_attention(device, amp_dtype)
    bare = MODELS[args.model](
        img_size=args.img_size, norm_pix_loss=args.norm_pix_loss, fused_attn=fused, distill=distill
    )
    bare.grad_checkpoint = args.grad_checkpoint
    lines = []
    if args.init:
        args.init = str(fetch(args.init))
        lines.append(f"weights from {args.init}:\n{initialise_from(bare, args.init)}")
    bare.to(device)
    config = {
        "kind": "CGD-MAE encoder",
        "model": args.model,
        "norm_pix_loss": args.norm_pix_loss,
        "mask_ratio": args.mask_ratio,
        **bare.settings(),
    }
    output_dir = Path(args.output_dir)
    files = RunFiles(output_dir, facts, config, args.save_minutes, args.keep_checkpoints)
    dataset = PretrainDataset(
        paths,
        args.img_size,
        bare.num_patches,
        seed=args.seed,
        min_area=args.crop_min,
        teacher_size=teacher.size if teacher and args.teacher_view == "full" else None,
        teacher_cache=cache,
    )
    pin_memory = args.pin_mem and device.type == "cuda"
    run = PretrainRun(
        bare,
        bare,
        teacher,
        build_adamw(bare, args.lr, args.weight_decay),
        torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None,
        build_loader(dataset, batches, args.num_workers, pin_memory, init_worker),
        device,
        amp_dtype,
        guard=NoGuard(),
        output_dir=output_dir,
        save_if_due=files.save_if_due,
        epoch=args.start_epoch,
        text_bank=text_bank,
    )
    barrier()  # rank 0 holds the folder now: nobody else writes to what is read here
    decision = files.resume(run, args.resume, args.allow_change)
    if not agree((run.epoch, run.batches_done)):
        raise InputError(
            f"the ranks did not find the same checkpoint in {output_dir} (rank {get_rank()}: {decision}): "
            "put --output_dir on a file system that all nodes share"
        )
    if args.compile:
        for block in [*bare.blocks, *bare.decoder_blocks]:
            block.compile()  # one compilation serves all blocks of a shape: seconds, not minutes
        if teacher:
            teacher.compile()
    if get_world_size() > 1:
        run.model = wrap_ddp(bare, device, one_backward=args.accum_iter == 1 and args.micro_batch >= args.batch_size)
    lines += [
        f"precision: {amp_reason}; attention: {'fused' if fused else 'explicit'}; device: {device}; "
        f"{args.num_workers} data workers a rank",
        f"start: {decision}",
    ]
    return run, files, facts, lines


def profile_run(run: PretrainRun, args) -> dict:
    """`--profile N`: a few updates, a table and the trace of rank 0; no checkpoint, no log."""
    run.save_if_due = lambda _: None
    run.profile = StepProfile(args.profile, run.output_dir / "profile", run.device)
    while run.profile.seconds == 0:
        train_one_epoch(run, args)
        run.epoch, run.batches_done = run.epoch + 1, 0
    result = run.profile.report(args.effective_batch)
    result["peak_gigabytes"] = peak_gigabytes(run.device)
    if args.compile:
        result |= compile_counts()
    if is_main_process():
        write_json(run.output_dir / "profile" / "metrics.json", result)
        print(profile_table(result))
        print(json.dumps(result))
        print(f"{run.output_dir / 'profile' / 'trace.json'}: open it in https://ui.perfetto.dev")
    return result


def build_teacher(args, device, amp_dtype, cache: TeacherCache | None):
    """-> (teacher, keyword arguments of the distillation head, facts, what `save_bank` wants); for MAE None
    but for the facts, and no teacher but a head where a cache stands in for it."""
    if args.no_distill:
        return None, None, {"teacher": "none (plain MAE)"}, None
    teacher = None
    if cache:
        identity = cache.identity
        named = Path(args.clip_model).stem if args.clip_model.endswith(".json") else args.clip_model
        if named != CLIP_MODEL and named.replace("/", "-") != identity.model:
            raise InputError(
                f"--clip_model {args.clip_model}: the --teacher_cache {args.teacher_cache} was made by "
                f"{identity.model}: drop the flag, or build another cache with python -m tools.reinforce"
            )
        bank, texts, source = cache.bank(args.text_bank)
    else:
        clip, tokenizer, identity = load_clip(args.clip_model, args.clip_pretrained)
        clip.to(device)
        bank, texts, source = build_bank(args.text_bank, clip, tokenizer, identity)
        dtype = amp_dtype if device.type == "cuda" and amp_dtype else torch.float32
        teacher = FrozenTeacher(clip, identity, dtype, args.channels_last or None).to(device)
    tau = args.kl_tau or identity.tau
    facts = {
        "teacher": f"{identity.model} {identity.weights_sha256[:16]}",
        "text_bank_used": source,
        "text_bank_sha": bank_identity(args.text_bank, cache, bank, texts),
        "tau": tau,
    }
    distill = {"context": args.context, "bank": bank, "tau": tau, "hidden": args.distill_hidden}
    return teacher, distill, facts, (bank, texts, identity)


def bank_identity(text_bank: str | None, cache, bank: torch.Tensor, texts: list[str]) -> str:
    """What a continuation must share: the texts where they are encoded at each start, which on another
    device gives other last bits; the numbers themselves where a file brings them."""
    if cache is None and not (text_bank and is_encoded(Path(text_bank))):
        return hash_texts(texts)[:16]
    return hashlib.sha256(bank.numpy().tobytes()).hexdigest()[:16]


def finish_epoch(run: PretrainRun, args, files: RunFiles, writer) -> dict[str, float]:
    """Log the epoch, move on to the next and save."""
    count, sums = run.meter.read()
    values = means(count, sums) | trivial_distillation(count, sums)
    images = files.args["global_batch"] * run.batches_done
    record = {"train_lr": run.optimizer.param_groups[0]["lr"], "train_loss": values.pop("loss", float("nan"))}
    if "sim" in values:
        record["train_cos"] = 1 - values["sim"]
    bad_images = round(values.pop("bad_images", 0) * count * get_world_size())
    record |= {f"train_{'loss_' if k in ('pixel', 'sim', 'kl') else ''}{k}": v for k, v in values.items()}
    record |= {
        "images_per_s": images / max(run.seconds["total"], 1e-9),
        "data_wait": run.seconds["data"] / max(run.seconds["total"], 1e-9),
        "bad_images": bad_images,
        "skipped_updates": files.args["updates_per_epoch"] - count,
        "peak_gigabytes": peak_gigabytes(run.device),
        "epoch": run.epoch,
    }
    if args.compile:
        record |= {f"compile_{name}": count for name, count in compile_counts().items()}
    is_main, finished, is_last = is_main_process(), run.epoch, run.epoch + 1 == args.epochs
    if is_main:  # before the epoch counts as done: a resumed run drops lines of epochs it repeats
        with open(run.output_dir / "log.txt", "a") as opened:
            opened.write(json.dumps(record) + "\n")
    with run.guard.committing():
        run.epoch, run.batches_done = finished + 1, 0
        run.meter = Meter()
        run.seconds = {"total": 0.0, "data": 0.0}
    if is_main:
        for name, value in record.items():
            writer.add_scalar(name, value, run.epoch * 1000)
        if args.vis_epochs and (is_last or run.epoch % args.vis_epochs == 0):
            panel = save_panels(run.bare, run.loader.dataset, run, finished, args.mask_ratio)
            writer.add_image("reconstruction", panel, run.epoch * 1000, dataformats="HWC")
        if finished % args.save_freq == 0 or is_last:
            files.save_epoch(run)
        files.save(run)
        summary = "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch")
        print(f"epoch {finished}: {summary}", flush=True)
    return record


if __name__ == "__main__":
    parsed = argparse.ArgumentParser(
        parents=[get_args_parser()],
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    run_or_explain(lambda: main(parsed))
