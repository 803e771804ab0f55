"""What PartImageNet (He et al., ECCV 2022, arXiv 2112.00933) calls vehicles: synsets and ids of parts."""

BACKGROUND_ID = 40  # in the masks of the release "_Seg"
NUM_IDS = 40  # 0 to 23 are parts of animals, 38 and 39 of bottles
PARTS = {  # as published: "Tier" is its spelling of tyre
    "Car": {24: "Car Body", 25: "Car Tier", 26: "Car Side Mirror"},
    "Bicycle": {27: "Bicycle Body", 28: "Bicycle Head", 29: "Bicycle Seat", 30: "Bicycle Tier"},
    "Boat": {31: "Boat Body", 32: "Boat Sail"},
    "Aeroplane": {
        33: "Aeroplane Head",
        34: "Aeroplane Body",
        35: "Aeroplane Engine",
        36: "Aeroplane Wing",
        37: "Aeroplane Tail",
    },
}
SYNSETS = {
    "Car": (
        "n02701002 n02814533 n02930766 n03100240 n03417042 n03444034 n03445924 n03594945 n03670208 n03769881 "
        "n03770679 n03977966 n04037443 n04065272 n04146614 n04252225 n04285008 n04465501 n04487081"
    ).split(),
    "Bicycle": "n02835271 n03785016 n03791053 n03792782 n04482393 n04509417".split(),
    "Boat": "n03947888 n04147183 n04483307 n04612504".split(),
    "Aeroplane": "n02690373 n04552348".split(),
}
KINDS = {  # label spaces: whose parts they hold; everything else is background
    "car_parts": ("Car",),
    "car_bicycle": ("Car", "Bicycle"),
    "vehicle_parts": ("Car", "Bicycle", "Boat", "Aeroplane"),
}


def part_names(space: str) -> tuple[str, ...]:
    """Names of the classes of a label space, in the order of their ids; the background comes before them."""
    return tuple(name for kind in KINDS[space] for name in PARTS[kind].values())


def kind_of(synset: str) -> str | None:
    """Car, Bicycle, Boat, Aeroplane, or None for what is no vehicle."""
    return next((kind for kind, synsets in SYNSETS.items() if synset in synsets), None)
