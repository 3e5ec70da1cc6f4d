"""SigLIP 2 with NaFlex inputs (Tschannen et al. 2502.14786): patches of grids of any shape, with masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from . import replay
from .allowed import pair
from .hooks import watched
from .huggingface_form import ExplicitModel, asks, refuse_attentions
from .huggingface_kinds import inner

NAMES = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class ExplicitNaflexTower(ExplicitModel):
    """The vision transformer. Positions are interpolated outside of the recorded program, one time for each shape: they
    depend on numbers, all else on tensors."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().forward  # type: ignore[misc]
        refuse_attentions(self.config, kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return whole(*args, **kwargs)
        given = dict(zip(NAMES, args, strict=False)) | kwargs
        pixels: Any = given.get("pixel_values")
        shapes: Any = given.get("spatial_shapes")
        mask: Any = given.get("attention_mask" if "attention_mask" in given else "pixel_attention_mask")  # of version 4
        full = _check(pixels, mask, shapes, self.embeddings.patch_embedding.weight.shape[1])
        rest = [value for key, value in given.items() if key not in (*NAMES, "attention_mask")]
        simple = not any(isinstance(value, Tensor) or value for value in rest) and given.get("return_dict") is not False
        if not simple or asks(self.config, "output_hidden_states", kwargs) or watched(self.embeddings):
            return whole(*args, **kwargs)
        inputs = (pixels, self._positions(shapes, pixels.shape[1]))
        found = replay.run(self, self._encode, *inputs, *(() if full else (mask.bool(),)))
        tokens, pooled = found if isinstance(found, tuple) else (found, None)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)

    def _positions(self, shapes: Tensor, length: int) -> Tensor:
        """`[B, N, D]`, by transformers' own interpolation."""
        embeddings = self.embeddings
        side, table = embeddings.position_embedding_size, embeddings.position_embedding.weight
        distinct, which = torch.unique(shapes, dim=0, return_inverse=True)
        found = embeddings.resize_positional_embeddings(table.reshape(side, side, -1), distinct, max_length=length)
        return found[which.to(found.device)]  # type: ignore[no-any-return]

    def _encode(self, pixels: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        patches = self.embeddings.patch_embedding
        x = patches(pixels.to(patches.weight.dtype)) + positions
        x = self.encoder(inputs_embeds=x, attention_mask=None if mask is None else mask[:, None, None, :])[0]
        x = self.post_layernorm(x)
        return (x, self.head(x, mask)) if hasattr(self, "head") else x


def _check(pixels: Any, mask: Any, shapes: Any, values: int) -> bool:
    """Whether no patch is padding. `values`: of a patch. Raises ModelError for inputs that contradict each other."""
    if not isinstance(pixels, Tensor) or not isinstance(shapes, Tensor) or not isinstance(mask, Tensor | None):
        raise ModelError(
            "SigLIP 2 takes patches: pixel_values [B, N, C * patch * patch], pixel_attention_mask [B, N] and "
            "spatial_shapes [B, 2], as its processor gives them (qclip.encoders(model).encode_image takes images)"
        )
    whole = not (shapes.is_floating_point() or shapes.is_complex())
    if pixels.ndim != 3 or pixels.shape[2] != values or tuple(shapes.shape) != (len(pixels), 2) or not whole:
        raise ModelError(
            f"pixel_values {list(pixels.shape)} and spatial_shapes {list(shapes.shape)} must be [B, N, C * patch * "
            f"patch = {values}] and whole numbers [B, 2]"
        )
    count, grids = pixels.shape[1], shapes.tolist()
    for row, (down, across) in enumerate(grids):
        if not (down >= 1 and across >= 1 and down * across <= count):
            raise ModelError(f"spatial_shapes[{row}] is {down} x {across} patches, and pixel_values hold {count}")
    held = torch.tensor([down * across for down, across in grids])
    wanted = torch.arange(count) < held[:, None]
    if mask is None and bool(wanted.all()):
        return True
    if mask is None:
        raise ModelError("pixel_attention_mask is missing, and by spatial_shapes some patches are padding")
    if tuple(mask.shape) != tuple(pixels.shape[:2]):
        raise ModelError(f"pixel_attention_mask {list(mask.shape)} must be {list(pixels.shape[:2])}, as pixel_values")
    if not torch.equal(mask.bool().cpu(), wanted):
        row = int((mask.bool().cpu() != wanted).any(1).nonzero()[0])
        raise ModelError(
            f"pixel_attention_mask[{row}] marks {int(mask[row].bool().sum())} patches, and spatial_shapes[{row}] says "
            f"that its first {int(held[row])} are those of the image ({grids[row][0]} x {grids[row][1]})"
        )
    return bool(wanted.all())


def patches(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Images `[B, 3, H, W]` as NaFlex inputs in the order of transformers' processor: rows of patches, pixels, colours.
    Raises ModelError for sides that are no multiple of the patch's."""
    embeddings = inner(model, "vision").embeddings
    height, width = pair(embeddings.patch_size)
    if images.ndim != 4 or images.shape[-2] % height or images.shape[-1] % width or not images.numel():
        raise ModelError(f"images {list(images.shape)} must be [B, 3, H, W], cut into patches of {height} x {width}")
    down, across = images.shape[-2] // height, images.shape[-1] // width
    cut = images.unflatten(3, (across, width)).unflatten(2, (down, height))  # [B, 3, down, h, across, w]
    pixels = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.int64, device=images.device),
        "spatial_shapes": torch.tensor([[down, across]] * len(images), dtype=torch.int64),
    }
