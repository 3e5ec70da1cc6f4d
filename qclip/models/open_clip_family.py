"""open_clip's models as a family."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.transformer import MultimodalTransformer, TextTransformer
from torch import Tensor, nn

from ..errors import ModelError
from ..untrusted import expand, is_file
from . import local, open_clip, open_clip_settings, open_clip_texts, timm
from .checkpoint import SUFFIXES
from .family import Family


class OpenClip(Family):
    """CLIP, CustomTextCLIP and CoCa, with towers of open_clip's own, of timm's and text towers of Hugging Face's."""

    name = "open_clip"
    classes = open_clip_settings.CLASSES
    prefixes = ("local-dir:",)
    examples = (
        ("ViT-B-32:laion2b_s34b_b79k", "an open_clip name with its pretrained tag (downloads)"),
        ("ViT-B-32", "an open_clip architecture with random weights: good for speed only"),
        ("FILE", "a .safetensors or .pt checkpoint (with --arch where the file does not say)"),
        ("local-dir:PATH", "an open_clip model folder"),
    )

    owns = staticmethod(open_clip.owns)
    towers = staticmethod(open_clip.towers)
    value_path = staticmethod(open_clip.value_path)
    preprocess_config = staticmethod(open_clip.preprocess_config)
    tokenizer_config = staticmethod(open_clip.tokenizer_config)
    names = staticmethod(open_clip.names)
    config_of = staticmethod(open_clip.config_of)
    create_from_config = staticmethod(open_clip.create_from_config)
    grid = staticmethod(open_clip_settings.grid)
    sizes = staticmethod(open_clip_settings.sizes)

    def encode_image(self, model: Any, images: Tensor) -> Tensor:
        return model.encode_image(images, normalize=False)  # CoCa normalises unless told not to

    def encode_text(self, model: Any, tokens: Tensor) -> Tensor:
        """Tokens in host memory are cut at the last EOT before they move, where that is exact, so that a GPU need not
        be asked for the length."""
        device = model.logit_scale.device
        if tokens.device != device:
            text = getattr(model, "text", model)
            tokens = (text.visible_tokens(tokens) if hasattr(text, "visible_tokens") else tokens).to(device)
        return model.encode_text(tokens, normalize=False)

    def text_positions(self, model: Any, tokens: Tensor) -> Tensor | None:
        """CoCa pools a class token behind the padding, so its tower runs to the end; its mask says what it reads. What
        Hugging Face's towers read is no padding."""
        text: Any = getattr(model, "text", None)
        if isinstance(text, HFTextEncoder):
            read = open_clip_texts.positions(
                text, text.visible_tokens(tokens) if hasattr(text, "visible_tokens") else tokens
            )
            return None if bool(read.all()) else read.to(model.logit_scale.device)
        if getattr(text, "cls_emb", None) is None:
            return None
        mask = text._embeds(tokens.to(model.logit_scale.device))[1]  # additive, [B * heads, S, S]
        read = mask[:: len(mask) // len(tokens), -1] == 0
        read[:, -1] = True
        return read

    def text_ends(self, model: Any, tokens: Tensor) -> Tensor:
        text: Any = getattr(model, "text", None)
        own = not isinstance(text, HFTextEncoder)
        return super().text_ends(model, tokens) if own else open_clip_texts.ends(text, tokens)

    def load(self, name: str, device: str | torch.device = "cpu", arch: str | dict | None = None) -> nn.Module:
        if name.startswith("local-dir:"):
            return local.load_directory(name.removeprefix("local-dir:")).to(device)
        path = expand(name, ModelError)
        if is_file(path, ModelError) or path.suffix in SUFFIXES:
            return local.load_file_checkpoint(path, arch).to(device)
        return open_clip.create(name, device=device)

    def rebuild_buffers(self, model: nn.Module) -> None:
        timm.rebuild_buffers(model)
        if isinstance(text := getattr(model, "text", None), HFTextEncoder):
            open_clip_texts.rebuild_buffers(text)
        for module in model.modules():
            mask = getattr(module, "attn_mask", None)
            if isinstance(module, CLIP | TextTransformer | MultimodalTransformer) and isinstance(mask, Tensor):
                if mask.is_meta:
                    module.attn_mask = torch.full(mask.shape, float("-inf"), device="cpu").triu_(1).to(mask.dtype)


FAMILY = OpenClip()
