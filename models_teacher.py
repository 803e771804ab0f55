"""The frozen CLIP teacher: any open_clip model, in its own normalisation and resolution."""

import copy
import hashlib
import json
import logging
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from datasets.text_bank import TeacherIdentity, built_in_texts, is_encoded, read_encoded, read_texts
from util.dist import print_main
from util.errors import InputError


class FrozenTeacher(nn.Module):
    """The image side of a CLIP model; never trained, never in a checkpoint.

    Args:
        clip: an open_clip model.
        identity: who it is.
        dtype: dtype of weights and activations; the embeddings come out as float32.
    """

    def __init__(self, clip: nn.Module, identity: TeacherIdentity, dtype: torch.dtype):
        super().__init__()
        preprocess = open_clip.get_model_preprocess_cfg(clip)
        self.identity, self.dtype = identity, dtype
        self.size: tuple[int, int] = _as_pair(preprocess["size"])
        self.interpolation, self.resize_mode = preprocess["interpolation"], preprocess["resize_mode"]
        self.clip = copy.copy(clip)  # its own `encode_image`, without the text tower
        self.clip._modules, self.clip._parameters = {"visual": clip.visual}, {}
        self.clip.to(dtype).eval().requires_grad_(False)
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def train(self, mode: bool = True):
        """Stays in evaluation mode: dropout and batch statistics are part of the frozen function."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] of any size -> [N, D_t] float32, unit rows."""
        x = imgs.float() / 255
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        x = ((x - self.mean) / self.std).to(self.dtype)
        if x.device.type == "cpu":  # faster convolutions there
            x = x.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.clip.encode_image(x).float(), dim=1)


def load_clip(clip_model: str, clip_pretrained: str) -> tuple[nn.Module, object, TeacherIdentity]:
    """Load an open_clip model with both towers, on the CPU in float32.

    Args:
        clip_model: an open_clip model name, or the path of an open_clip JSON config.
        clip_pretrained: a pretrained tag (may be downloaded by open_clip), or a weight file
            (.pt, .bin, .safetensors; then no network call is made).
    Returns:
        (model, tokenizer, identity).
    Raises:
        InputError: unknown name or tag, missing file, weights that do not fit or cannot be had.
    """
    name = _register_config(clip_model)
    weights = _find_weights(name, clip_pretrained)
    tag = open_clip.get_pretrained_cfg(name, clip_pretrained) or {}
    twin = f"{name}-quickgelu"
    if Path(clip_pretrained).is_file() and open_clip.get_model_config(twin):
        print_main(
            f"note: {clip_pretrained} does not say how it was trained; --clip_model {name} runs it with GELU "
            f"and OpenAI's normalisation. OpenAI's, MetaCLIP's and DFN's weights want --clip_model {twin}"
        )
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip logs each step on the root logger
    try:
        model = open_clip.create_model(
            name,
            pretrained=str(weights),
            # OpenAI's weights were trained with QuickGELU although the plain names build GELU
            force_quick_gelu=bool(tag.get("quick_gelu")),
            force_preprocess_cfg={k: tag[k] for k in ("mean", "std") if k in tag},
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the teacher weights {weights} do not load into --clip_model {clip_model}: {reason}"
        ) from error
    finally:
        logging.disable(level)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        width = model.encode_image(
            torch.zeros(1, 3, *_as_pair(open_clip.get_model_preprocess_cfg(model)["size"]))
        ).shape[1]
    return model, tokenizer, TeacherIdentity(name, _hash_weights(model), width, 1 / model.logit_scale.exp().item())


def check_tokens(tokenizer, texts: list[str], context_length: int) -> int:
    """The longest text in tokens, with its start and end; the tokenizer alone would cut longer ones without a word.

    Raises:
        InputError: names the first text that does not fit and its tokens.
    """
    if hasattr(tokenizer, "encode"):  # open_clip's own
        counts = [len(tokenizer.encode(text)) + 2 for text in texts]
    else:
        counts = [len(tokenizer.tokenizer(text)["input_ids"]) for text in texts]
    over = [i for i, count in enumerate(counts) if count > context_length]
    if over:
        raise InputError(
            f"the text '{texts[over[0]]}' has {counts[over[0]]} tokens where the teacher reads {context_length} "
            f"({len(over)} of {len(texts)} texts are too long): shorten the template or the value"
        )
    return max(counts)


@torch.no_grad()
def encode_texts(clip: nn.Module, tokenizer, texts: list[str], batch_size: int = 256):
    """Texts -> [T, D_t] float32 on the model's device, unit rows."""
    device = clip.logit_scale.device
    rows = [
        F.normalize(clip.encode_text(tokenizer(texts[i : i + batch_size]).to(device)).float(), dim=1)
        for i in range(0, len(texts), batch_size)
    ]
    return torch.cat(rows)


def build_bank(text_bank: str | None, clip, tokenizer, identity: TeacherIdentity):
    """The bank U of the distillation.

    Args:
        text_bank: .txt or .jsonl of texts, an encoded bank (.safetensors, or a folder of
            main_describe.py), or None for the built-in vehicle vocabulary.
        clip, tokenizer, identity: the teacher; only used to encode where the file is not encoded.
    Returns:
        (embeddings [T, D_t] float32 CPU unit rows, texts, one line that says what it is).
    Raises:
        InputError: no such file, too few texts, or a bank that is damaged or that another teacher made.
    """
    if text_bank is None:
        texts, source = built_in_texts(), "built-in vehicle vocabulary"
    else:
        file, source = Path(text_bank), str(text_bank)
        if not file.exists():
            raise InputError(f"--text_bank {file} does not exist: give texts, one a line (.txt)")
        if is_encoded(file):
            return read_encoded(file, identity)
        if file.suffix not in (".txt", ".jsonl"):
            raise InputError(f"--text_bank {file}: give .txt, .jsonl, .safetensors or a folder of main_describe.py")
        texts = read_texts(file)
        check_tokens(tokenizer, texts, getattr(tokenizer, "context_length", None) or clip.context_length)
    embeddings = encode_texts(clip, tokenizer, texts).cpu()
    return embeddings, texts, f"{len(texts)} texts of {source}"


def _register_config(clip_model: str) -> str:
    path = Path(clip_model)
    if path.suffix == ".json":
        if not path.is_file():
            raise InputError(f"--clip_model {path} does not exist: give an open_clip JSON config")
        open_clip.add_model_config(path)
        if open_clip.get_model_config(path.stem) is None:
            raise InputError(f"--clip_model {path} is no open_clip config: it needs embed_dim, vision_cfg and text_cfg")
        return path.stem
    name = clip_model.replace("/", "-")
    if open_clip.get_model_config(name) is None:
        near = [known for known in open_clip.list_models() if known[:5] == name[:5]][:8]
        raise InputError(
            f"--clip_model {clip_model} is unknown to open_clip {open_clip.__version__}; "
            f"similar: {', '.join(near) or 'none'} (all: open_clip.list_models())"
        )
    return name


def _find_weights(name: str, clip_pretrained: str) -> Path:
    path = Path(clip_pretrained)
    if path.is_file():
        return path
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or len(path.parts) > 1:
        raise InputError(f"teacher weights not found: no file {path.absolute()}. " + _three_ways(name, "openai"))
    config = open_clip.get_pretrained_cfg(name, clip_pretrained)
    if not config:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise InputError(
            f"--clip_pretrained {clip_pretrained} is neither a file nor a tag of {name}: its tags are "
            f"{', '.join(tags) or 'none, so give a weight file'}"
        )
    wanted = config.get("hf_hub") or config.get("url")
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:
        raise InputError(
            f"teacher weights not available: looked for {wanted} (tag {clip_pretrained} of {name}) in "
            f"the local caches and on the network ({type(error).__name__}). " + _three_ways(name, clip_pretrained)
        ) from error


def _three_ways(name: str, tag: str) -> str:
    # the model that runs a tag's weights as they were trained when they come as a file, which names no activation
    twin = f"{name}-quickgelu"
    is_quick = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu") and open_clip.get_model_config(twin)
    return (
        'Three ways to supply them: (1) with a network, run once: python -c "import open_clip; '
        f"open_clip.create_model('{name}', pretrained='{tag}')\"; (2) copy that machine's "
        "~/.cache/huggingface and ~/.cache/clip to this one; (3) pass the weight file itself: "
        f"--clip_model {twin if is_quick else name} --clip_pretrained /path/to/weights.safetensors"
    )


def _hash_weights(model: nn.Module) -> str:
    """sha256 over names and float32 values, QuickGELU or not, and the preprocessing: the same for every file
    format of the same weights, another where the same weights would answer otherwise."""
    preprocess = open_clip.get_model_preprocess_cfg(model)
    settings = {
        "size": _as_pair(preprocess["size"]),
        "mean": [float(value) for value in preprocess["mean"]],
        "std": [float(value) for value in preprocess["std"]],
        "quick_gelu": any(type(module).__name__ == "QuickGELU" for module in model.modules()),
    }
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().data)
    return digest.hexdigest()


def _as_pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
