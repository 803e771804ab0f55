"""Small pictures of parametric vehicles, so that everything runs without gated data.

A vehicle is two to four solid slabs, each a side outline in metres extruded over the width, seen
through a pinhole camera and painted back to front with Pillow at two to three times the final
size. Body type, paint, make and small marks belong to the identity (`pid`); backdrop, light, lens
height, noise and JPEG quality belong to the camera (`camid`).

Every random number comes from a Philox stream keyed by the seed and the ids of the thing drawn:
a picture depends on (seed, pid, camid, viewid, shot, size) alone, and not on the number of
processes or pictures. Bytes are repeatable for one version of Pillow and numpy.

    python -m demo.draw --output demo --num_images 3000
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path

from demo.folder import demo_parser, holds_set, run_demo, write_folder, write_table
from demo.render import render, sheet
from demo.vehicle import BODIES, CAMERAS, VIEWS, captions, demo_rng, vehicle
from util.errors import InputError

VERSION = 2  # raise when the pictures change, so that an older folder is not taken for this one
COLUMNS = ("path", "split", "body", "colour", "make", "pid", "camid", "viewid", "caption", "short_caption")


def label_row(seed: int, pid: int, shot: int) -> dict:
    """The columns of labels.csv but path and split, of the `shot`-th picture of an identity.

    Five cameras and six views: thirty shots until a pair comes back.
    """
    attrs = vehicle(seed, pid)
    rng = demo_rng(seed, "plan", pid)
    cameras, views = rng.permutation(len(CAMERAS))[:5], rng.permutation(len(VIEWS))
    camid, viewid = int(cameras[shot % 5]), int(views[shot % len(views)])
    texts = captions(attrs, viewid, camid)
    return {
        **{key: attrs[key] for key in ("body", "colour", "make")},
        "pid": pid,
        "camid": camid,
        "viewid": viewid,
        "shot": shot,
        "caption": texts[shot % 3],
        "short_caption": texts[3],
    }


def _plan(num_images: int, seed: int, val_ratio: float) -> list[dict]:
    """The rows of labels.csv, each with the number of its shot.

    Picture k shows identity k modulo P, where P is about a twelfth of the pictures, at least 20
    and at most a third of them: every identity is seen by three cameras or more.
    """
    people = max(1, min(num_images // 3, max(20, num_images // 12)))
    rows = []
    for k in range(num_images):
        shot, pid = divmod(k, people)
        labels = label_row(seed, pid, shot)
        place, total = pid // len(BODIES), len(range(pid % len(BODIES), people, len(BODIES)))
        held = min(total - 1, max(1, round(total * val_ratio))) if val_ratio else 0
        split = "val" if place >= total - held else "train"
        rows.append({"path": f"images/{split}/{labels['body']}/{k:05d}.jpg", "split": split, **labels})
    return rows


def _write_picture(row: dict, folder: Path, seed: int, size: int):
    picture = render(seed, row["pid"], row["camid"], row["viewid"], row["shot"], size)
    picture.save(folder / row["path"], quality=CAMERAS[row["camid"]].quality)


def write_demo(
    output: Path,
    num_images: int = 3000,
    size: int = 96,
    seed: int = 0,
    val_ratio: float = 0.25,
    processes: int | None = None,
) -> dict:
    """Write images/<split>/<body>/NNNNN.jpg, labels.csv and demo.json into a new folder.

    Splits part the identities of each body type: about `val_ratio` of them (0..1, exclusive) go to
    val, at least one where a body has two. A folder that already holds this very set is left as it
    is ("written": False). `processes` (default: all cores) changes the speed only.

    Returns images, train, val, identities, cameras and written. Raises InputError for a number out
    of range and for an `output` that holds something else.
    """
    output = Path(output).absolute()
    if num_images < 1 or size < 16 or not 0 <= val_ratio < 1:
        raise InputError(
            f"num_images must be 1 or more, size 16 or more and val_ratio in [0, 1), "
            f"got {num_images}, {size} and {val_ratio}"
        )
    about = (
        json.dumps({"num_images": num_images, "size": size, "seed": seed, "val_ratio": val_ratio, "version": VERSION})
        + "\n"
    )
    rows = _plan(num_images, seed, val_ratio)
    splits = Counter(row["split"] for row in rows)
    counts = {
        "images": len(rows),
        "train": splits["train"],
        "val": splits["val"],
        "identities": len({row["pid"] for row in rows}),
        "cameras": len({row["camid"] for row in rows}),
        "written": False,
    }
    if holds_set(output, "demo.json", about, "demo set"):
        return counts

    def finish(folder: Path) -> None:
        write_table(folder / "labels.csv", COLUMNS, rows)
        (folder / "demo.json").write_text(about, encoding="utf-8")

    write_folder(output, rows, partial(_write_picture, seed=seed, size=size), processes, finish)
    return {**counts, "written": True}


def main():
    parser = demo_parser("demo", "Write a small set of drawn vehicle pictures.", 96, "side of a picture in pixels")
    add = parser.add_argument
    add("--num_images", type=int, default=3000, help="number of pictures")
    add("--val_ratio", type=float, default=0.25, help="share of the identities held out, 0 to 1")
    run_demo(parser, write_demo, lambda args: sheet(args.seed, args.size))


if __name__ == "__main__":
    main()
