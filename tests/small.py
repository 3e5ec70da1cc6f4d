"""A small CLIP with random weights, made the same way every time."""

import open_clip
import torch

from qclip import models

CONFIG = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a dog", "two birds on a wire near the old house", "red"]


def small_clip(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG).eval()
    return models.attach(model, {"image_size": 32}, {"kind": "clip-bpe", "context_length": 16}, source="small")
