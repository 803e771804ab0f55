"""The frozen CLIP teacher: any open_clip model, in its own normalisation and resolution."""

import contextlib
import copy
import logging
import re
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from torch import nn

from datasets.teacher import TeacherIdentity, built_in_texts, is_encoded, read_encoded, read_texts
from datasets.transforms import WholeView
from util.checkpoint import check_archive, not_finite, read_checkpoint, weights_sha256
from util.dist import print_main
from util.errors import InputError
from util.files import read_json

CONFIG = "open_clip_config.json"
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights in its archives


class FrozenTeacher(nn.Module):
    """The image side of an open_clip model; never trained, never in a checkpoint. dtype: of weights and activations."""

    def __init__(self, clip: nn.Module, identity: TeacherIdentity, dtype: torch.dtype):
        super().__init__()
        preprocess = open_clip.get_model_preprocess_cfg(clip)
        self.identity, self.dtype = identity, dtype
        more = (preprocess[name] for name in ("resize_mode", "interpolation", "fill_color"))
        self.size = WholeView(_as_pair(preprocess["size"]), *more)  # for `datasets.transforms.whole_image`
        self.clip = copy.copy(clip)  # its own `encode_image`, without the text tower
        self.clip._modules, self.clip._parameters = {"visual": clip.visual}, {}
        self.clip.to(dtype).eval().requires_grad_(False)
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def train(self, mode: bool = True):
        return super().train(False)  # dropout and batch statistics are part of the frozen function

    @torch.no_grad()
    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] of any size -> [N, D_t] float32, unit rows."""
        x = imgs.float() / 255
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, tuple(self.size), mode=self.size.interpolation, antialias=True).clamp(0, 1)
        x = ((x - self.mean) / self.std).to(self.dtype)
        if x.device.type == "cpu":  # faster convolutions there
            x = x.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.clip.encode_image(x).float(), dim=1)


def load_teacher(args) -> tuple[nn.Module, object, TeacherIdentity]:
    """`load_clip` by the flags of `util.cli.add_teacher_flags`."""
    return load_clip(args.clip_model, args.clip_pretrained, args.clip_mean, args.clip_std, args.clip_resize)


def load_clip(
    clip_model: str, clip_pretrained: str, mean: list[float] | None = None, std: list[float] | None = None,
    resize: str | None = None,
) -> tuple[nn.Module, object, TeacherIdentity]:  # fmt: skip
    """Load an open_clip model with both towers, on the CPU in float32 -> (model, tokenizer, identity).

    Args:
        clip_model: an open_clip model name; a folder with open_clip_config.json (also as local-dir:FOLDER), or that
            file; hf-hub:ORG/NAME or ORG/NAME; the path of another JSON config.
        clip_pretrained: a tag (may be downloaded by open_clip) or a weight file, as `read_checkpoint` reads or
            big_vision's .npz (then no network call is made); a folder's and a hub's own weights for a tag.
        mean, std: of the pixels, where neither a config nor the tags of the architecture say them.
        resize: how whole pictures are brought to its size (`WholeView`), default as its own preprocessing does.
    """
    name, own, words = _find_config(clip_model)
    weights, tag = _find_weights(name, words, clip_pretrained)
    content = {"": check_archive(weights)} if weights.suffix == ".npz" else read_checkpoint(weights)
    preprocess, source = _preprocessing(name, own, tag, weights, content)
    preprocess |= {k: v for k, v in {"mean": mean, "std": std, "resize_mode": resize}.items() if v}
    if std and not min(std) > 0:
        raise InputError(f"--clip_std {' '.join(map(str, std))}: give three positive numbers")
    if "mean" not in preprocess or "std" not in preprocess:
        cure = "give --clip_mean and --clip_std, or a tag as --clip_pretrained"
        raise InputError(f"{weights} does not say mean and std of its pixels, and {source}: {cure}")
    is_quick = bool(tag.get("quick_gelu") or content.get("quick_gelu"))  # plain names build GELU
    if not tag:
        stats = "mean {:.3g} {:.3g} {:.3g}, std {:.3g} {:.3g} {:.3g}".format(*preprocess["mean"], *preprocess["std"])
        print_main(f"teacher {weights}: pixels of {stats} ({'the flags' if mean or std else source})")
        if f"{name}-quickgelu" in open_clip.list_models() and not is_quick:
            print_main(f"note: it runs with GELU; OpenAI's, MetaCLIP's and DFN's weights want {name}-quickgelu")
    with _explained(f"the teacher weights {weights} do not load into --clip_model {clip_model}"):
        model = open_clip.create_model(
            name, load_weights=False, pretrained_text=False, force_quick_gelu=is_quick, force_preprocess_cfg=preprocess
        )
        _load_weights(model, weights, content)
    with _explained(f"the tokenizer of --clip_model {clip_model} cannot be had"):
        tokenizer = open_clip.get_tokenizer(words)
    model.eval().requires_grad_(False)
    size, tau = _as_pair(open_clip.get_model_preprocess_cfg(model)["size"]), 1 / model.logit_scale.exp().item()
    width = model.encode_image(torch.zeros(1, 3, *size)).shape[1]
    return model, tokenizer, TeacherIdentity(teacher_name(clip_model), _hash_weights(model), width, tau)


def check_tokens(tokenizer, texts: list[str], context_length: int) -> int:
    """The longest text in tokens, with its start and end; InputError where one would be cut without a word."""
    if hasattr(tokenizer, "encode"):  # open_clip's own
        counts = [len(tokenizer.encode(text)) + 2 for text in texts]
    else:
        counts = [len(tokenizer.tokenizer(text)["input_ids"]) for text in texts]
    if over := [i for i, count in enumerate(counts) if count > context_length]:
        words = f"'{texts[over[0]]}' has {counts[over[0]]} tokens where the teacher reads {context_length}"
        raise InputError(f"the text {words} ({len(over)} of {len(texts)} are too long): shorten template or value")
    return max(counts)


@torch.no_grad()
def encode_texts(clip: nn.Module, tokenizer, texts: list[str], batch_size: int = 256):
    """Texts -> [T, D_t] float32 on the model's device, unit rows."""
    batches = (texts[i : i + batch_size] for i in range(0, len(texts), batch_size))
    rows = [clip.encode_text(tokenizer(batch).to(clip.logit_scale.device)).float() for batch in batches]
    return F.normalize(torch.cat(rows), dim=1)


def build_bank(text_bank: str | None, clip, tokenizer, identity: TeacherIdentity):
    """The bank U of the distillation: of texts (.txt, .jsonl, None: the built-in vocabulary), or encoded already
    (.safetensors, a folder of main_describe.py) -> (embeddings [T, D_t] float32 CPU unit rows, texts, what it is)."""
    if text_bank is None:
        texts, source = built_in_texts(), "built-in vehicle vocabulary"
    elif not (file := Path(text_bank)).exists():
        raise InputError(f"--text_bank {file} does not exist: give texts, one a line (.txt)")
    elif is_encoded(file):
        return read_encoded(file, identity)
    elif file.suffix not in (".txt", ".jsonl"):
        raise InputError(f"--text_bank {file}: give .txt, .jsonl, .safetensors or a folder of main_describe.py")
    else:
        texts, source = read_texts(file), str(file)
        check_tokens(tokenizer, texts, getattr(tokenizer, "context_length", None) or clip.context_length)
    embeddings = encode_texts(clip, tokenizer, texts).cpu()
    return embeddings, texts, f"{len(texts)} texts of {source}"


def teacher_name(clip_model: str) -> str:
    """What caches and banks call a teacher: the name of its folder or config where it is no name of open_clip's."""
    path = Path(clip_model.removeprefix("local-dir:"))
    path = path.parent if path.name == CONFIG else path
    if path.is_dir():
        return path.absolute().name
    return path.stem if path.suffix == ".json" else clip_model.removeprefix("hf-hub:").replace("/", "-")


def _find_config(clip_model: str) -> tuple[str, dict, str]:
    """(open_clip's name of the model, the preprocess_cfg that lies with its config, the name for its tokenizer)."""
    path, hub = Path(clip_model.removeprefix("local-dir:")), clip_model.removeprefix("hf-hub:")
    built_in, words = clip_model.replace("/", "-"), ""
    is_folder = path.is_dir() or clip_model.startswith("local-dir:")
    is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not path.exists() and path.suffix != ".json" and not is_folder
    if is_hub and (hub != clip_model or open_clip.get_model_config(built_in) is None):  # ViT-B/32 is built in
        with _explained(f"{CONFIG} of --clip_model {clip_model} cannot be had"):
            path = Path(open_clip.pretrained.download_pretrained_from_hf(hub, filename=CONFIG))
        words = f"hf-hub:{hub}"
    elif is_folder:
        path = path / CONFIG
    if path.suffix != ".json":
        if open_clip.get_model_config(built_in) is None:
            near = ", ".join([known for known in open_clip.list_models() if known[:5] == built_in[:5]][:8]) or "none"
            raise InputError(
                f"--clip_model {clip_model} is unknown to open_clip {open_clip.__version__}; similar: {near}"
            )
        return built_in, {}, built_in
    config = _read_config(path)
    if path.name == CONFIG and "model_cfg" in config:
        return f"local-dir:{path.parent}", config.get("preprocess_cfg", {}), words or f"local-dir:{path.parent}"
    open_clip.add_model_config(path)
    if open_clip.get_model_config(path.stem) is None:
        raise InputError(f"--clip_model {path} is no open_clip config: it needs embed_dim, vision_cfg and text_cfg")
    return path.stem, config.get("preprocess_cfg", {}), path.stem


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise InputError(f"--clip_model {file} does not exist: give an open_clip config, or a folder with {CONFIG}")
    return read_json(file, "fetch it again")


def _find_weights(name: str, words: str, clip_pretrained: str) -> tuple[Path, dict]:
    """(file, what open_clip's table says of a tag); a folder's and a hub's own file where no other is given."""
    path = Path(clip_pretrained)
    if path.is_file():
        return path, {}
    if path.suffix in (".pt", ".pth", ".bin", ".npz", ".safetensors") or len(path.parts) > 1:
        raise InputError(f"teacher weights not found: no file {path.absolute()}. " + _three_ways(name, "openai"))
    if name.startswith("local-dir:"):
        with _explained(f"the weights of --clip_model {words} cannot be had"):
            if words != name:
                return Path(open_clip.pretrained.download_pretrained_from_hf(words.removeprefix("hf-hub:"))), {}
            folder = Path(name.removeprefix("local-dir:"))
            if found := open_clip.factory._find_checkpoint_in_dir(folder):
                return Path(found), {}
            raise InputError(f"{folder} holds no weights beside its {CONFIG}: give them as --clip_pretrained FILE")
    config = open_clip.get_pretrained_cfg(name, clip_pretrained)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none, so give a weight file"
        raise InputError(f"--clip_pretrained {clip_pretrained} is neither a file nor a tag of {name}, which has {tags}")
    try:
        return Path(open_clip.download_pretrained(config)), config
    except Exception as error:
        words = f"{config.get('hf_hub') or config.get('url')} is neither in the local caches nor on the network"
        ways = _three_ways(name, clip_pretrained)
        raise InputError(f"teacher weights not available: {words} ({type(error).__name__}). {ways}") from error


def _preprocessing(name: str, own: dict, tag: dict, weights: Path, content: dict) -> tuple[dict, str]:
    """(what is known of the weights' mean, std, interpolation and resize_mode, where it stands)."""
    beside = weights.with_name(CONFIG)
    own_too = _read_config(beside).get("preprocess_cfg", {}) if beside.is_file() else {}
    for config, source in ((own, f"its {CONFIG}"), (tag, "its tag"), (own_too, str(beside))):
        if "mean" in (found := {k: v for k, v in config.items() if k in PREPROCESS and v is not None}):
            return found, source
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    if content.get("quick_gelu") or not tags:
        source = "an archive with OpenAI's GELU" if tags else "open_clip's default; others by --clip_mean, --clip_std"
        return {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}, source
    shared = {k: tags[0][k] for k in PREPROCESS if k in tags[0] and all(t.get(k) == tags[0][k] for t in tags)}
    return shared, f"the {len(tags)} tags of {name} {'agree' if 'mean' in shared else 'differ'}"


def _load_weights(model: nn.Module, weights: Path, content: dict) -> None:
    """What `open_clip.load_checkpoint` does, of tensors that are read already."""
    if weights.suffix == ".npz":  # big_vision's
        return open_clip.load_checkpoint(model, weights)
    state = {k.removeprefix("module."): v for k, v in content["model"].items() if k not in OPENAI_FACTS}
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if getattr(model, "logit_bias", None) is not None:
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    for name in {"logit_scale", "logit_bias"} & state.keys():  # a number in some, a vector in others
        if getattr(model, name, None) is not None:
            state[name] = state[name].reshape(getattr(model, name).shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # of older transformers
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    if bad := [name for name in not_finite(state) if not name.startswith("text_decoder.")]:  # CoCa's is not used
        raise ValueError(f"numbers are not finite in {len(bad)} tensors, first {bad[0]}")
    model.load_state_dict(state)


@contextlib.contextmanager
def _explained(what: str):
    """Library errors as one sentence; open_clip, which logs each step on the root logger, is quiet."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, ImportError) or "transformers" in reason:
            reason += "; it needs a package that is not here: pip install transformers"
        raise InputError(f"{what}: {reason}") from error
    finally:
        logging.disable(level)


def _three_ways(name: str, tag: str) -> str:
    # of weights in a file nobody knows with which activation they were trained: the name says it
    is_quick = (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu") and not name.endswith("-quickgelu")
    return (
        f"Three ways to supply them: (1) run python -c \"import open_clip; open_clip.create_model('{name}', "
        f"pretrained='{tag}')\" where there is a network; (2) copy its ~/.cache/huggingface and ~/.cache/clip to here; "
        f"(3) --clip_model {name}{'-quickgelu' * bool(is_quick)} --clip_pretrained /path/to/weights.safetensors"
    )


def _hash_weights(model: nn.Module) -> str:
    """sha256 over names and float32 values, QuickGELU or not, and the preprocessing, whatever the file format."""
    preprocess = open_clip.get_model_preprocess_cfg(model)
    settings = {name: [float(value) for value in preprocess[name]] for name in ("mean", "std")}
    settings |= {"size": _as_pair(preprocess["size"]), "resize": [preprocess[name] for name in PREPROCESS[2:]]}
    settings["quick_gelu"] = any(type(module).__name__ == "QuickGELU" for module in model.modules())
    return weights_sha256(model.state_dict(), settings)


def _as_pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
