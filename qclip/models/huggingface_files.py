"""Hugging Face's CLIP and SigLIP from folders and the hub. Everything but the tensors is read here, by an allow-list:
transformers gets settings and tensors, and never a path, a name or a switch out of a file."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..untrusted import expand, is_file, is_folder, read_json, reason, schema
from . import allowed, huggingface_descriptions
from . import huggingface_settings as settings
from .checkpoint import difference, read_state
from .huggingface_kinds import ALIGN, KINDS
from .inputs import Preprocess
from .tokenizer import SETTINGS, VOCABULARIES, check_folder
from .values import check_float, check_values

# By `model_type`. A tower alone has its projection where its file has one: see `load`.
TYPES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip_text_model": "CLIPTextModel",
    "altclip": "AltCLIPModel",
    "chinese_clip": "ChineseCLIPModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2Model",
    "siglip2_vision_model": "Siglip2VisionModel",
    "siglip2_text_model": "Siglip2TextModel",
}
PILLOW = {2: "bilinear", 3: "bicubic"}  # numbers of PIL.Image.Resampling
PROJECTIONS = {"visual_projection.weight", "text_projection.weight"}
WEIGHTS = (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))
SHARD = schema.text(120, r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.(safetensors|bin)")

Loaded = tuple[nn.Module, dict[str, Any] | None, dict[str, Any] | None]  # with preprocessing and tokenizer


def transformers() -> Any:
    """The library. Raises ModelError naming the extra that brings it."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("Hugging Face models need transformers; install qclip[hf]") from error
    return transformers


def create_from_config(config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """A model with random weights, or without memory on the meta device. Raises ModelError."""
    allowed.check_architecture(config)
    kind = getattr(transformers(), config["class"])
    try:
        settings = kind.config_class.from_dict(deepcopy(config["config"]))
        with torch.device(device):
            return kind(settings)  # type: ignore[no-any-return]
    except Exception as error:  # sizes that contradict each other; transformers has error classes of its own for them
        raise ModelError(f"{config['class']} cannot be built from its description ({reason(error)})") from error


def load(name: str, device: str | torch.device = "cpu") -> Loaded:
    """A model from a local folder or, by its ID, from the hub (`safetensors`, or `.bin` read as plain tensors), in eval
    mode, with the descriptions of its preprocessing and tokenizer. Raises ModelError.

    A folder contacts no network, and no code of a repository is run.
    """
    library, what = transformers(), f"'hf:{name}'"
    folder = _folder(name, what)
    description = read_config(folder, what)
    tokenizer_files = any(is_file(folder / file, ModelError) for file in VOCABULARIES)
    if tokenizer_files:
        check_folder(folder)
    state = _state(folder, what)
    for key, tensor in state.items():
        if not key.endswith("position_ids"):
            check_float(key, tensor, what, ModelError)
    if f"{description['class']}WithProjection" in KINDS and state.keys() & PROJECTIONS:
        description["class"] += "WithProjection"
    allowed.check_sizes(description, {n: tuple(t.shape) for n, t in state.items()}, what)
    cls = getattr(library, description["class"])
    try:
        settings = cls.config_class.from_dict(deepcopy(description["config"]))
        model, found = cls.from_pretrained(None, config=settings, state_dict=state, output_loading_info=True)
    except Exception as error:
        raise ModelError(
            f"{what} could not be loaded ({reason(error)}); its weights do not fit its config.json"
        ) from error
    odd = [key for key in found["unexpected_keys"] if not key.endswith("position_ids")]
    if differ := difference(found["missing_keys"], odd):  # transformers would go on with random weights
        raise ModelError(f"{what} does not fit {description['class']}: it {differ}; get the whole checkpoint")
    for parameter, tensor in model.named_parameters():
        check_values(parameter, tensor, what, ModelError)
    preprocess = huggingface_descriptions.preprocess_config(model)
    if preprocess is not None:
        preprocess = read_preprocess(folder, preprocess)
    tokenizer = huggingface_descriptions.tokenizer_config(model)
    if tokenizer_files and tokenizer is not None:
        tokenizer = {"kind": "hf-auto", "name": str(folder), "context_length": tokenizer["context_length"]}
    return model.float().eval().to(device), preprocess, tokenizer


def _folder(name: str, what: str) -> Path:
    """The local folder, or what is needed of a hub repository, downloaded if need be."""
    folder = expand(name, ModelError)
    if is_folder(folder, ModelError):
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{what}: there is no such folder")
    from huggingface_hub import snapshot_download

    texts = [
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "*.index.json",
        SETTINGS,
        *VOCABULARIES,
    ]
    try:
        for weights in WEIGHTS:
            found = Path(snapshot_download(name, allow_patterns=[*texts, *weights], ignore_patterns=["*/*"]))
            if any(found.glob(weights[0])) or any(found.glob(weights[1])):
                return found
    except Exception as error:  # hub, proxy, disk: every library below has errors of its own
        raise ModelError(
            f"{what} could not be loaded ({reason(error)}); check the name and the network, or give a local folder"
        ) from error
    return found


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """`config.json` as `create_from_config` takes it. Raises ModelError for models that are not supported, and by name
    for settings that are not allowed: code of its own (`auto_map`), kernels, quantization."""
    path = folder / "config.json"
    if not is_file(path, ModelError):
        raise ModelError(f"{what} could not be loaded ({path.name} is missing); give a folder of `save_pretrained`")
    content = read_json(path, ModelError)
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError(f"{what} could not be loaded ({path.name} has no 'model_type')")
    if (name := TYPES.get(content["model_type"])) is None:
        reason = ALIGN if content["model_type"] == "align" else f"known are {', '.join(TYPES)}"
        raise ModelError(f"{what} is a {content['model_type'][:60]!r} model, which is not supported: {reason}")
    config = {key: value for key, value in content.items() if key not in settings.BOOKKEEPING}
    for part in ("text_config", "vision_config") if len(KINDS[name].towers) == 2 else ():
        merged: dict[str, Any] = {}
        for found in (config.get(part), config.pop(f"{part}_dict", None)):  # the second of old files, and it wins
            if found is not None and not isinstance(found, dict):
                raise ModelError(f"{str(path)!r}: {part!r} is no object")
            merged |= {key: value for key, value in (found or {}).items() if key not in settings.BOOKKEEPING}
        config[part] = merged
    description = {"family": "huggingface", "class": name, "config": config}
    allowed.check_architecture(description)
    return description


def _state(folder: Path, what: str) -> dict[str, Tensor]:
    """All tensors of the folder's weights, whole or in shards."""
    for whole, _ in WEIGHTS:
        if is_file(folder / whole, ModelError):
            return read_state(folder / whole)
        index = folder / f"{whole}.index.json"
        if is_file(index, ModelError):
            content = read_json(index, ModelError)
            names = content.get("weight_map") if isinstance(content, dict) else None
            schema.validate(schema.mapping(schema.text(400), SHARD, 20_000), names, str(index), ModelError)
            state: dict[str, Tensor] = {}
            for shard in sorted(set(names.values())):  # type: ignore[union-attr]
                state |= read_state(folder / shard)
            return state
    raise ModelError(f"{what} could not be loaded (it holds no {WEIGHTS[0][0]}); give a folder of `save_pretrained`")


def read_preprocess(folder: Path, default: dict[str, Any]) -> dict[str, Any]:
    """The image transform that a folder's processor describes; `default` where there is none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if is_file(folder / name, ModelError):
            content = read_json(folder / name, ModelError)
            if isinstance(content, dict):
                content = content.get("image_processor", content)
            if not isinstance(content, dict):
                raise ModelError(f"{str(folder / name)!r} is no JSON object")
            try:
                return _from_processor(content, default)
            except (TypeError, KeyError, ValueError) as error:
                raise ModelError(f"{str(folder / name)!r} describes no image transform ({reason(error)})") from None
    return default


def _from_processor(found: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    crops = found.get("do_center_crop")
    crops = default["resize_mode"] == "shortest" if crops is None else bool(crops)
    size = found.get("crop_size") if crops else found.get("size")
    out = dict(default)
    if isinstance(size, dict) and "height" in size:
        out["image_size"] = [size["height"], size["width"]]
    elif type(size) is int:  # files of older versions
        out["image_size"] = size
    out["resize_mode"] = "shortest" if crops else "squash"
    if found.get("do_normalize", True) and found.get("image_mean"):
        out |= {"mean": list(found["image_mean"]), "std": list(found["image_std"])}
    if found.get("resample") in PILLOW:
        out["interpolation"] = PILLOW[found["resample"]]
    return Preprocess(out).config
