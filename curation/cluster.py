"""Trees over the images that are left, one a domain where asked, and the sample drawn from them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from curation.duplicates import Embedded
from curation.hierarchy import Tree, build_tree, members_by_cluster, plan_levels, step_rng
from curation.rows import Rows
from curation.sample import sample_tree, water_fill
from util.dist import is_main_process
from util.errors import InputError
from util.files import write_atomic


@dataclass(frozen=True)
class Domain:
    """Images that get a tree of their own: rows [n] int64 of the index, ascending."""

    name: str
    rows: np.ndarray


def domains(rows: np.ndarray, source: np.ndarray, names: list[str], stratify: str) -> list[Domain]:
    """`none`: one tree of all; `source`: one for each source, which then cannot crowd out another."""
    if stratify == "none":
        return [Domain("all", rows)]
    found = []
    for number, name in enumerate(names):
        mine = rows[source[rows] == number]
        if len(mine):
            found.append(Domain(name, mine))
    return found


def quotas(found: list[Domain], target: int, wanted: list[str], seed: int) -> dict[str, int]:
    """Images of each domain: the fractions of `--quota NAME=SHARE` where given, the rest as equal as sizes
    allow.

    Raises:
        InputError: an unknown name, a share that is none, shares above 1, or fewer images than a share asks
        for.
    """
    sizes = {domain.name: len(domain.rows) for domain in found}
    fixed: dict[str, int] = {}
    total_share = 0.0
    for spec in wanted:
        name, _, text = spec.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if name not in sizes or not 0 <= share <= 1:
            raise InputError(f"--quota {spec}: write NAME=SHARE, a share of 0 to 1 of one of {', '.join(sizes)}")
        fixed[name] = int(share * target)
        total_share += share
        if fixed[name] > sizes[name]:
            raise InputError(
                f"--quota {spec} asks for {fixed[name]} images, but {name} has {sizes[name]} left: "
                "lower the share or --target_size"
            )
    if total_share > 1 + 1e-9:
        raise InputError(f"--quota: the shares add up to {total_share:.3f}, more than 1")
    if total_share > 1 - 1e-9:  # what rounding down has left over
        for name in [name for name in fixed if fixed[name] < sizes[name]][: target - sum(fixed.values())]:
            fixed[name] += 1
    others = [name for name in sizes if name not in fixed]
    left = target - sum(fixed.values())
    room = sum(sizes[name] for name in others)
    if left > room:
        raise InputError(
            f"--quota and --target_size {target}: the sources without a quota have {room} images for the "
            f"remaining {left}; raise a quota or lower the target"
        )
    room_of = np.array([sizes[name] for name in others], dtype=np.int64)
    shares = water_fill(room_of, left, step_rng(seed, 4000))
    return fixed | dict(zip(others, shares.tolist()))


def build_trees(
    found: list[Domain], embedded: Embedded, folder: Path, device: torch.device, args, resident_bytes: float
) -> list[Tree]:
    """One tree a domain; folder/NAME holds its arrays: rows, parents, indices, offsets of each level,
    distance."""
    trees = []
    for number, domain in enumerate(found):
        here = folder / domain.name
        plan = plan_levels(len(domain.rows), args.levels, args.members, args.resampling, clip=len(found) > 1)
        rows = Rows(embedded.data, device, embedded.place(domain.rows), args.spherical, resident_bytes=resident_bytes)
        tree = build_tree(
            rows,
            plan,
            here,
            seed=args.seed,
            tree_number=number,
            iterations=args.iterations,
            init=args.init,
            resample=args.resample,
        )
        if is_main_process():
            save_tree(here, tree, domain.rows)
        trees.append(tree)
    return trees


def save_tree(folder: Path, tree: Tree, rows: np.ndarray) -> None:
    """The tree as plain arrays: members of cluster j of level l are indices[offsets[j]:offsets[j + 1]]."""
    arrays = {"rows": rows, "distance": tree.distance}
    for level, (parents, k) in enumerate(zip(tree.parents, tree.sizes), start=1):
        indices, offsets = members_by_cluster(parents, k)
        arrays |= {f"parents{level}": parents, f"indices{level}": indices, f"offsets{level}": offsets}
    for name, values in arrays.items():
        write_atomic(folder / f"{name}.npy", lambda f, v=values: np.save(f, v))


def load_tree(folder: Path) -> tuple[Tree, np.ndarray]:
    """-> (tree, [n] int64 index rows of its images)."""
    levels = len(list(folder.glob("parents*.npy")))
    parents = [np.load(folder / f"parents{level}.npy") for level in range(1, levels + 1)]
    sizes = [len(np.load(folder / f"offsets{level}.npy")) - 1 for level in range(1, levels + 1)]
    return Tree(parents, sizes, np.load(folder / "distance.npy")), np.load(folder / "rows.npy")


def draw_sample(
    found: list[Domain], folder: Path, target: int, wanted: list[str], seed: int, how: str
) -> tuple[np.ndarray, dict[str, int]]:
    """-> ([n] int64 index rows, ascending, n = target exactly; images of each domain).

    Raises:
        InputError: fewer images are left than asked for, or see `quotas`.
    """
    total = sum(len(domain.rows) for domain in found)
    if target > total:
        raise InputError(
            f"--target_size {target}: only {total} images are left after filters and de-duplication; "
            "lower it, or add pools"
        )
    shares = quotas(found, target, wanted, seed)
    chosen = []
    for number, domain in enumerate(found):
        tree, rows = load_tree(folder / domain.name)
        positions, _ = sample_tree(tree, shares[domain.name], seed=seed, how=how, tree_number=number)
        chosen.append(rows[positions])
    return np.sort(np.concatenate(chosen)), shares
