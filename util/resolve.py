"""Flag values that several entry points read the same way."""

from util.errors import InputError


def parse_input_size(text: str) -> tuple[int, int]:
    """ "224" -> (224, 224); "256,128" -> (256, 128) = (H, W) in pixels.

    Raises:
        InputError: anything else.
    """
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise InputError(f"--input_size {text}: give one side or H,W in pixels, for example 224")
    return int(sides[0]), int(sides[-1])
