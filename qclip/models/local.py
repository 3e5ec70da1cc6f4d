"""Checkpoints on disk with what is needed to know their architecture: files, and open_clip's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from torch import Tensor, nn

from ..errors import ModelError, nearest
from ..untrusted import expand, is_file, is_folder, read_json
from . import open_clip as family
from .allowed import check_preprocess
from .checkpoint import SUFFIXES, read_state
from .family import UnknownModelError
from .inputs import VOCABULARY, attach

CONFIG = "open_clip_config.json"


def load_directory(path: str | Path) -> nn.Module:
    """open_clip's `local-dir` layout: `open_clip_config.json` beside a checkpoint."""
    folder = expand(path, ModelError)
    if not is_folder(folder, ModelError):
        raise ModelError(f"'local-dir:{path}': there is no such folder")
    config, preprocess = read_config(folder / CONFIG)
    found = [p for suffix in SUFFIXES for p in sorted(folder.glob(f"*{suffix}"))]
    if not found:
        raise ModelError(f"'local-dir:{path}': no checkpoint ({', '.join(SUFFIXES)}) beside {CONFIG}")
    best = min(found, key=lambda p: (not p.stem.startswith("open_clip"), SUFFIXES.index(p.suffix)))
    return _load(config, preprocess, best, f"local-dir:{path}", folder)


def load_file_checkpoint(path: str | Path, arch: str | dict | None = None) -> nn.Module:
    """A checkpoint file. Its architecture is `arch` (an open_clip name or config), else `open_clip_config.json` beside
    it, else the one architecture of open_clip whose shapes it has.

    Raises ModelError when none or several fit: heads and activation cannot be told from shapes.
    """
    path = expand(path, ModelError)
    if not is_file(path, ModelError):
        raise ModelError(f"there is no file {str(path)!r}")
    if isinstance(arch, dict):
        return _load(arch, {}, path, str(path))
    if arch is not None:
        if arch not in family.names():
            raise UnknownModelError(f"open_clip knows no model {arch!r}; {nearest(arch, family.names())}")
        return family.create(arch, str(path))
    beside = path.parent / CONFIG
    if is_file(beside, ModelError):
        config, preprocess = read_config(beside)
        return _load(config, preprocess, path, str(path), path.parent)
    state = read_state(path)
    fits = fitting(state)
    if len(fits) != 1:
        told = f"its shapes fit {', '.join(fits)}" if fits else _why_none(state)
        raise ModelError(
            f"the architecture of {str(path)!r} is not known: {told}; name it (arch=..., --arch), or put "
            f"{CONFIG} beside it"
        )
    return family.create(fits[0], str(path))


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` of open_clip's JSON."""
    if not is_file(path, ModelError):
        raise ModelError(f"{str(path)!r} is missing; it describes the architecture")
    content = read_json(path, ModelError)
    config = content.get("model_cfg") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise ModelError(f"{str(path)!r} has no 'model_cfg' with embed_dim, vision_cfg and text_cfg")
    if not isinstance(config["text_cfg"], dict) or not isinstance(content.get("preprocess_cfg") or {}, dict):
        raise ModelError(f"{str(path)!r} has a 'text_cfg' or 'preprocess_cfg' that is no object")
    return config, content.get("preprocess_cfg") or {}


def _load(
    config: dict[str, Any], preprocess: dict[str, Any], path: Path, source: str, folder: Path | None = None
) -> nn.Module:
    plain = config["config"] if "family" in config else config
    tokenizer = family._tokenizer_for("", plain, folder)
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    described = {key: preprocess[key] for key in keys if preprocess.get(key) is not None}
    check_preprocess({"image_size": 1} | described)  # before the long work
    model: Any = family.from_checkpoint(config, path)
    return attach(model, {"image_size": model.visual.image_size} | described, tokenizer, source)


def fitting(state: dict[str, Tensor]) -> list[str]:
    """Names of open_clip's native ViT architectures that have the shapes of `state`."""
    text = "text." if "text.token_embedding.weight" in state else ""
    decoder = any(name.startswith("text_decoder.") for name in state)
    try:
        conv, table = state["visual.conv1.weight"], state[f"{text}token_embedding.weight"]
        mine = (
            conv.shape[0],
            conv.shape[-1],
            state["visual.positional_embedding"].shape[0],
            _layers(state, "visual."),
            *table.shape,
            state[f"{text}positional_embedding"].shape[0],
            _layers(state, text),
            state["visual.proj"].shape[1],
        )
    except KeyError:
        return []
    configs = {name: open_clip.get_model_config(name) for name in family.names()}
    return [name for name, cfg in configs.items() if _shapes(cfg) == mine and ("multimodal_cfg" in cfg) == decoder]


def _why_none(state: dict[str, Tensor]) -> str:
    """What hinders a state dict from being told by its shapes: names that none of open_clip's has, or their shapes."""
    text = "text." if "text.token_embedding.weight" in state else ""
    keys = ("visual.conv1.weight", "visual.positional_embedding", f"{text}token_embedding.weight")
    if missing := [key for key in keys if key not in state]:
        return f"it lacks {missing[0]!r}, and begins with {next(iter(state))[:120]!r}"
    return "its shapes fit none of open_clip's"


def _layers(state: dict[str, Tensor], prefix: str) -> int:
    prefix = f"{prefix}transformer.resblocks."
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


def _shapes(config: dict[str, Any]) -> tuple[int, ...] | None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or isinstance(vision.get("layers"), list):
        return None
    side = vision.get("image_size", 224) // vision.get("patch_size", 16)
    return (
        vision.get("width", 768),
        vision.get("patch_size", 16),
        side * side + 1,
        vision.get("layers", 12),
        text.get("vocab_size", VOCABULARY),
        text.get("width", 512),
        text.get("context_length", 77) + bool(text.get("embed_cls")),
        text.get("layers", 12),
        config["embed_dim"],
    )
