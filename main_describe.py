"""Turn vehicle attributes into a bank of texts for the distillation.

    python main_describe.py --attributes labels.csv --images labels.csv --split train --output texts
    python main_pretrain.py --text_bank texts --kl_weight 0.05 ...

Attributes (a table with whatever columns exist, or the files of VeRi-776, CompCars, StanfordCars) become words, fill
templates, and are encoded by the frozen teacher. With --images a text stays only if the images know it.
"""

import datetime
import time
from collections import Counter
from pathlib import Path

from description.texts import SLOTS
from util.cli import Parser, add_teacher_flags, check_numbers, run_tool
from util.errors import InputError

FORMATS = ("auto", "table", "veri", "compcars", "stanford")
TEMPLATES = Path(__file__).parent / "description" / "templates.json"


def get_args_parser() -> Parser:
    parser = Parser("main_describe.py", __doc__)
    # fmt: off
    add = parser.add_argument_group("attributes").add_argument
    add("--attributes", nargs="+", required=True, help="tables .csv .tsv .jsonl, or folders of datasets")
    add("--format", default="auto", choices=FORMATS, help="of --attributes (default auto: by names)")
    add("--column", nargs="+", default=[], metavar="SLOT=NAME",
        help=f"columns with names of their own, slots: {', '.join(SLOTS)} (default: by name)")

    add = parser.add_argument_group("texts").add_argument
    add("--templates", default=str(TEMPLATES), help=".json, or .txt of texts with {slots} (default templates.json)")
    add("--rows_only", action="store_true", help="no words of the template file, only those of the rows (default off)")
    add("--keep_invisible", action="store_true", help="keep texts about length, price, engine power ... (default off)")
    add("--ensemble", action="store_true", help="average each embedding over the file's wordings (default: the first)")
    add("--dedup_cos", default=0.98, type=float, help="cosine above which the longer of two texts goes (default 0.98)")
    add("--max_texts", default=20000, type=int, help="most texts; 0 for no limit (default 20000)")
    add("--max_per_make", default=500, type=int, help="most texts of one make; 0 for no limit (default 500)")

    add = parser.add_argument_group("teacher").add_argument
    add_teacher_flags(add)

    add = parser.add_argument_group("grounding").add_argument
    add("--images", default=None, help="folder, manifest or packed set of images (default: no grounding)")
    add("--split", default=None, help="rows with this `split`, of images and of attribute tables (default: all)")
    add("--max_images", default=0, type=int, help="images, evenly spread; 0 for all (default 0)")
    add("--topk", default=5, type=int, help="nearest texts of a kind that an image takes (default 5)")
    add("--n_min", default=3, type=int, help="images that must take a text (default 3)")
    add("--hub_share", default=0.02, type=float, help="share of the images that take a hub (default 0.02)")
    add("--margin", default=0.01, type=float, help="cosine by which a text must beat the generic prompt (default 0.01)")
    add("--generic", default="a photo of a vehicle.", help="generic prompt (default 'a photo of a vehicle.')")

    add = parser.add_argument_group("run").add_argument
    add("--output", required=True, help="folder for the bank and the report")
    add("--batch_size", default=128, type=int, help="texts or images at a time (default 128)")
    add("--num_workers", default=2, type=int, help="data processes (default 2)")
    add("--device", default="auto", help="auto, cuda or cpu (default auto)")
    # fmt: on
    return parser


if __name__ == "__main__":
    ARGS = get_args_parser().parse_args()  # before torch is imported: --help and a mistyped flag are answered at once

from datasets.path_list import list_images
from description.bank import Candidates, encode, ground_candidates, write_bank
from description.readers import read_rows
from description.texts import fill, invisible_reason, read_templates
from models_teacher import load_teacher
from util.dist import pick_device


def main(args) -> dict:
    started, facts, columns, limits = time.perf_counter(), {}, {}, "max_texts max_per_make max_images num_workers"
    check_numbers(args, at_least_one="topk n_min batch_size", not_negative=limits)
    for name in ("hub_share", "dedup_cos"):
        if not 0 < getattr(args, name) <= 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be above 0 and at most 1")
    for pair in args.column:
        slot, sign, columns[slot] = pair.partition("=")
        if not sign or slot not in (*SLOTS, "class_name"):
            raise InputError(f"--column {pair}: write SLOT=NAME with a slot of {', '.join(SLOTS)}, class_name")
    templates = read_templates(Path(args.templates))
    texts = fill(templates, read_rows(args, columns, templates, facts), use_words=not args.rows_only)
    facts["candidates"] = len(texts)
    if len(texts) < 2:
        raise InputError(f"the attributes give {len(texts)} texts and a bank needs 2: add rows, columns or templates")
    candidates = Candidates(texts)
    hidden = {} if args.keep_invisible else {i: invisible_reason(text) for i, text in enumerate(texts)}
    candidates.drop({i: ("invisible", reason) for i, reason in hidden.items() if reason})
    device, paths = pick_device(args.device), list_images(args.images, args.split) if args.images else None
    if paths is not None and len(paths) < args.n_min:
        raise InputError(f"--images {args.images} lists {len(paths)} images, fewer than --n_min {args.n_min}")
    clip, *others = load_teacher(args)
    teacher = clip.to(device), *others
    encode(args, candidates, templates, teacher, facts)
    if paths is not None:
        ground_candidates(args, candidates, paths, teacher, facts)
    facts["kept"] = len(candidates.texts)
    facts |= {f"removed_{r}": n for r, n in Counter(row["reason"] for row in candidates.removed).items()}
    facts["seconds"] = time.perf_counter() - started
    write_bank(args, candidates, templates, teacher[2], facts, paths)
    duration, output = datetime.timedelta(seconds=int(facts["seconds"])), Path(args.output)
    print(f"done in {duration}: {output} is a --text_bank of {facts['kept']:,} texts, see {output / 'report.html'}")
    return facts


if __name__ == "__main__":
    run_tool(main, ARGS, Path(ARGS.output) / "metrics.json")
