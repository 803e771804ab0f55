"""What programs need before torch is there: the error that a user can cure, and the names that flags offer."""

AWAY = "the file system is away"  # of a picture that could not be read for that reason
# width, depth, heads, patch size; tiny and small as in DeiT, the others as in MAE
ENCODER_SIZES = {
    "tiny": (192, 12, 3, 16), "small": (384, 12, 6, 16), "base": (768, 12, 12, 16), "large": (1024, 24, 16, 16),
    "huge": (1280, 32, 16, 14),
}  # fmt: skip
# width, blocks and heads of the decoder; tiny and small keep base's 2/3 width and head size 32
DECODER_SIZES = {"tiny": (128, 8, 4), "small": (256, 8, 8)} | dict.fromkeys(("base", "large", "huge"), (512, 8, 16))
MAE_MODELS = {f"mae_vit_{size}_patch{sizes[3]}": size for size, sizes in ENCODER_SIZES.items()}
ENCODER_MODELS = {name.removeprefix("mae_"): size for name, size in MAE_MODELS.items()}
CONTEXTS = ("attention", "cls", "mean", "decoder")
TEACHER_NORMS = ("none", "whiten")
FORMATS = ("mae", "timm", "hf", "transreid", "transfg", "setr", "safetensors", "onnx")  # that `convert` writes
OPEN_SCORES = ("cosine", "margin", "overlap")  # of metrics/open_set.py
REID_FORMATS = ("auto", "veri776", "vehicleid", "veriwild", "table")  # auto: by the files that are there


class InputError(ValueError):
    """Wrong path, value or file: the message names it and says what to do. Programs print it without a traceback."""
