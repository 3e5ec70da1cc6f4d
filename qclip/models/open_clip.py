"""open_clip's models: made by name or from a JSON description, described again, and their towers."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm import is_model
from torch import Tensor, nn

from ..errors import ModelError, nearest
from ..untrusted import expand, is_file, reason, schema
from . import allowed, open_clip_form, open_clip_settings, open_clip_texts, timm
from .checkpoint import fill, read_state
from .describe import describe
from .explicit import unsupported
from .family import UnknownModelError, materialize_buffers
from .inputs import VOCABULARY, Preprocess, attach
from .open_clip_form import text_tower, vision_tower
from .open_clip_text_configs import named
from .tokenizer import check_folder
from .tower import Tower
from .value_path import ValuePath

CLASSES: dict[str, type[nn.Module]] = {"CLIP": CLIP, "CustomTextCLIP": CustomTextCLIP, "CoCa": CoCa}


def names() -> list[str]:
    """open_clip's architectures, by the names it knows them under."""
    return open_clip.list_models()


# ---- descriptions ----------------------------------------------------------------------------------------------------


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's own config (`model_cfg` of its JSON files) as `create_from_config` takes it: without what says how
    texts become tokens, and with the settings of a text tower of Hugging Face in place of its name. Raises ModelError
    for a name that is not known here."""
    config = deepcopy(config)
    custom, text = config.pop("custom_text", False), config.get("text_cfg")
    schema.validate(schema.flag, custom, "the description's custom_text", ModelError)
    if isinstance(text, dict):
        if (name := text.pop("hf_model_name", None)) is not None:
            schema.validate(schema.text(200), name, "the description's hf_model_name", ModelError)
            text["hf_config"] = named(name)
        text.pop("hf_model_pretrained", None)
        custom = custom or "hf_config" in text
        for name in open_clip_settings.TOKENIZER:
            text.pop(name, None)
    kind = "CLIP" if not custom else "CoCa" if "multimodal_cfg" in config else "CustomTextCLIP"
    return {"family": "open_clip", "class": kind, "config": config}


def create_from_config(config: dict[str, Any], device: str | torch.device = "cpu") -> nn.Module:
    """A model with random weights from `config_of`'s description, or from open_clip's own `model_cfg`.

    On the meta device it has no memory; when its parameters are there, call `materialize_buffers`. Raises ModelError
    for a description that builds no model, and for a setting that is not allowed (`open_clip_settings.py`).
    """
    if "family" not in config:
        config = architecture(config)
    allowed.check_architecture(config)
    arguments = deepcopy(config["config"])
    trunk = arguments["vision_cfg"].get("timm_model_name")
    if trunk and not is_model(trunk):
        raise ModelError(f"timm knows no model {trunk!r}, which the description asks for")
    if "cast_dtype" in arguments:
        arguments["cast_dtype"] = getattr(torch, arguments["cast_dtype"])
    try:
        with torch.device(device):
            model = _build(config["class"], arguments)
    except ModelError:
        raise
    except Exception as error:  # sizes that contradict each other
        raise ModelError(
            f"open_clip's {config['class']} cannot be built from its description ({reason(error)})"
        ) from error
    model.qclip_config = deepcopy(config)
    return model


def _build(kind: str, arguments: dict[str, Any]) -> Any:
    """The model by open_clip's own class; a text tower of Hugging Face takes the place of a small one."""
    if "hf_config" not in (hugging := arguments["text_cfg"]):
        return CLASSES[kind](**arguments)
    place = {"width": 8, "heads": 1, "layers": 1, "context_length": 1}
    vocabulary = {key: hugging[key] for key in ("vocab_size",) if key in hugging}  # CoCa's decoder has it
    model: Any = CLASSES[kind](**arguments | {"text_cfg": place | vocabulary})
    model.text = open_clip_texts.build(hugging, arguments["embed_dim"])
    if kind != "CoCa":
        model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """A JSON-able description: `create_from_config(config_of(m))` has m's architecture. Of a raw model of somebody
    else's it is read off the model and checked against its shapes. ModelError where that is impossible."""
    kept = model.__dict__.get("qclip_config")
    if isinstance(kept, ModelError):
        raise kept
    if kept is not None:
        return deepcopy(kept)
    kind = next((name for name, cls in CLASSES.items() if isinstance(model, cls)), None)
    if kind is None:
        raise unsupported(model)
    config = {"family": "open_clip", "class": kind, "config": describe(model)}
    twin = create_from_config(config, device="meta")
    mine, its = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, twin))
    if mine != its:
        odd = sorted(set(mine.items()) ^ set(its.items()))[0][0]
        raise unsupported(model, f"its architecture could not be read off (first difference at {odd!r})")
    return config


def preprocess_config(model: nn.Module) -> dict[str, Any] | None:
    """The description of the model's image transform: open_clip's record on the vision tower."""
    visual = getattr(model, "visual", None)
    size = getattr(visual, "image_size", None)
    if size is None:
        return None
    cfg = dict(getattr(visual, "preprocess_cfg", None) or {})
    known = {key: cfg[key] for key in ("mean", "std", "interpolation", "resize_mode", "fill_color") if key in cfg}
    return Preprocess({"image_size": size} | known).config


def tokenizer_config(model: nn.Module) -> dict[str, Any] | None:
    """The description of the model's tokenizer. CLIP's BPE is assumed where the vocabulary has its size."""
    text = getattr(model, "text", model)
    if isinstance(text, HFTextEncoder):
        return {"kind": "unknown", "context_length": open_clip_texts.context_of(text)}
    length, rows = getattr(text, "context_length", None), getattr(text, "vocab_size", None)
    if length is None:
        return None
    # CoCa's context holds one position more for its class token, which the tokenizer leaves free.
    return {"kind": "clip-bpe" if rows in (VOCABULARY, VOCABULARY + 1) else "unknown", "context_length": int(length)}


def _tokenizer_for(name: str, config: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """open_clip's choice (`get_tokenizer`) as a description. Raises ModelError for a setting that is not allowed, and
    for a tokenizer in `folder` that asks for code."""
    text = config["text_cfg"]
    settings = {key: text[key] for key in open_clip_settings.TOKENIZER if text.get(key) is not None}
    schema.validate(schema.record(open_clip_settings.TOKENIZER), settings, "the description's text_cfg", ModelError)
    length, options = text.get("context_length", 77), settings.get("tokenizer_kwargs", {})
    if settings.get("hf_tokenizer_name"):
        if folder is not None:
            check_folder(folder)
        return {
            "kind": "hf",
            "name": str(folder) if folder else settings["hf_tokenizer_name"],
            "context_length": length,
            "mode": settings.get("tokenizer_mode"),
            "options": options,
        }
    if folder is None and "siglip" in name.lower():
        variant = "gemma" if "siglip2" in name.lower() else "mc4" if "i18n" in name.lower() else "c4-en"
        return {"kind": "siglip", "variant": variant, "context_length": length}
    return {"kind": "clip-bpe", "context_length": length, "options": options}


# ---- by name ---------------------------------------------------------------------------------------------------------


def create(name: str, pretrained: str | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """An open_clip model in eval mode: `name` or `name:tag`; `pretrained` is a tag or a checkpoint file.

    Without either its weights are random, which a UserWarning says. Raises UnknownModelError for a name and ModelError
    for a tag that does not exist (both list the nearest), or weights that cannot be had.
    """
    if pretrained is None and ":" in name:
        name, pretrained = name.split(":", 1)
    known = name.replace("/", "-")
    config = open_clip.get_model_config(known) if known in names() else None
    if config is None:
        raise UnknownModelError(f"open_clip knows no model {name!r}; {nearest(name, names())}")
    tokenizer = _tokenizer_for(known, config)
    if pretrained is None:
        warnings.warn(f"{known} has random weights: no pretrained tag was given ('{known}:TAG')", stacklevel=2)
        fresh = create_from_config(config, device).eval()
        return attach(fresh, preprocess_config(fresh), tokenizer, known)
    path, overlay = _weights(known, pretrained, config)
    model: Any = from_checkpoint(config, path)
    attach(model, {"image_size": model.visual.image_size} | overlay, tokenizer, f"{known}:{pretrained}")
    return model.to(device)


def _weights(name: str, pretrained: str, config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file of a tag, downloaded if need be, and the preprocessing it was trained with. May set `quick_gelu`."""
    tag = get_pretrained_cfg(name, pretrained)
    if not tag:
        path = expand(pretrained, ModelError)
        if is_file(path, ModelError):
            return path, {}
        tags = list_pretrained_tags_by_model(name)
        hint = nearest(pretrained, tags) if tags else f"{name} has no pretrained weights"
        raise ModelError(f"{name} has no pretrained tag {pretrained!r}, and there is no such file; {hint}")
    try:
        path = Path(download_pretrained(tag))
    except Exception as error:  # hub, proxy, disk: every library below has errors of its own
        raise ModelError(
            f"the weights of {name}:{pretrained} could not be downloaded ({reason(error)}); check the "
            "network, or give a checkpoint file or 'local-dir:PATH'"
        ) from error
    if bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        config["quick_gelu"] = bool(tag.get("quick_gelu"))
        warnings.warn(
            f"{name}:{pretrained} was trained with {'QuickGELU' if config['quick_gelu'] else 'GELU'}, which "
            "is used here, although open_clip's architecture of that name says otherwise",
            stacklevel=3,
        )
    keys = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    return path, {key: tag[key] for key in keys if tag.get(key) is not None}


def from_checkpoint(config: dict[str, Any], path: Path) -> nn.Module:
    """The model of `config` (a description, or open_clip's `model_cfg`) with the weights of `path`, in eval mode.

    Raises ModelError when they do not fit, or for what `checkpoint.read_state` refuses. Nothing larger than the file is
    built: sizes are compared first.
    """
    description = config if "family" in config else architecture(config)
    allowed.check_architecture(description)
    state = read_state(path)
    _check_sizes(description, state, path)
    model = create_from_config(description, device="meta")
    needed, held = (sum(t.numel() for t in tensors.values()) for tensors in (model.state_dict(), state))
    if needed > 4 * held:  # positions may be resized
        raise ModelError(f"{str(path)!r} holds {held} numbers and its description asks for {needed}")
    materialize_buffers(model)
    model._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    return fill(model, state, path)


def _check_sizes(description: dict[str, Any], state: dict[str, Tensor], path: Path) -> None:
    if any(name.startswith("image_encoder.") for name in state):
        return  # Apple's names, which are converted when the model is there; their models are timm's, of known sizes
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if description["class"] != "CLIP" and "positional_embedding" in shapes:  # the text tower's names before it was one
        shapes = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": shape for n, shape in shapes.items()}
    allowed.check_sizes(description, shapes, str(path), exact=False)


# ---- towers ----------------------------------------------------------------------------------------------------------


def owns(model: nn.Module) -> bool:
    """Whether this adapter is for `model`."""
    return isinstance(model, CLIP | CustomTextCLIP | CoCa)


def towers(model: nn.Module) -> dict[str, Tower]:
    """Both towers of an open_clip model, which is brought into explicit form in place. Raises ModelError for ResNet
    image towers, and classes that no adapter knows; the model still computes the same."""
    visual: Any
    text: Any
    visual, text = model.visual, model if isinstance(model, CLIP) else model.text
    if isinstance(visual, ModifiedResNet):
        raise ModelError(
            "ResNet image towers (ModifiedResNet, open_clip's RN50 family) are not supported: their "
            "convolutions and batch norms have no kernels here; use a ViT or ConvNeXt model"
        )
    if not isinstance(visual, VisionTransformer | TimmModel):
        raise unsupported(visual)
    if not isinstance(text, CLIP | TextTransformer | HFTextEncoder):
        raise unsupported(text)
    if "qclip_config" not in model.__dict__:
        model.__dict__["qclip_config"] = _config_or_reason(model)
    vision = vision_tower(visual) if isinstance(visual, VisionTransformer) else timm.tower(visual)
    found = open_clip_texts.text_tower(text) if isinstance(text, HFTextEncoder) else text_tower(text)
    return {"vision": vision, "text": found}


def value_path(model: Any, tower: Tower) -> ValuePath:
    """Of a ViT of open_clip's own, or of timm's, that pools a class token. Raises ModelError."""
    visual = model.visual
    own = isinstance(visual, VisionTransformer)
    return open_clip_form.value_path(visual, tower) if own else timm.value_path(visual, tower)


def _config_or_reason(model: nn.Module) -> dict[str, Any] | ModelError:
    """An architecture that cannot be described can be quantized all the same, only not saved: the reason is kept."""
    try:
        return config_of(model)
    except ModelError as error:
        return error
    except AttributeError as error:  # a layer of the user's own
        return ModelError(f"the architecture cannot be described ({error})")
