"""Small pictures inside HTML pages."""

import base64
import io

from PIL import Image


def jpeg_uri(picture: Image.Image, side: int, quality: int = 75) -> str:
    """An RGB picture as a data URI, shrunk to at most `side` px where it is larger."""
    data = io.BytesIO()
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    small.save(data, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
