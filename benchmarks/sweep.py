"""Every name of open_clip, from float to `w8a8`: its own widths, few blocks, random weights.

    python -m benchmarks.sweep             # all names: about ten minutes of one core, 3 GB
    python -m benchmarks.sweep NAME ...
    python -m benchmarks.sweep --whole NAME ...  # with all their blocks, and with peak memory

A name passes whose embeddings have a cosine of at least 0.999 to float's in both towers, or that is refused with the
reason that `qclip models --supported` gives. Ends with 1 where one does not. `pytest --full tests/models/test_sweep.py`
runs the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ModelError
from qclip.models import open_clip_names as names
from qclip.models.open_clip import architecture

LEAST = 0.999
BLOCKS, WORDS = 2, 1000  # of a tower; of a vocabulary that is larger than CLIP's


@dataclasses.dataclass(frozen=True)
class Outcome:
    """cosines: the least of images, of texts; None where the name was refused."""

    name: str
    cosines: tuple[float, float] | None
    refused: str | None
    seconds: float

    @property
    def passes(self) -> bool:
        if self.cosines is None:
            return self.refused == names.supported()[0][self.name].refused
        return min(self.cosines) >= LEAST

    def __str__(self) -> str:
        told = self.refused or "cosine {:.5f} and {:.5f}".format(*self.cosines or (0, 0))
        return f"{'ok  ' if self.passes else 'FAIL'} {self.name}: {told} ({self.seconds:.1f} s)"


def fewer_blocks(trunk: str) -> dict[str, Any]:
    """Settings of timm's architecture of this name for as many blocks as can be left out."""
    if trunk.startswith("fastvit"):
        return {"layers": (1,) * (5 if trunk.endswith(("mci3", "mci4")) else 4)}
    if trunk.startswith("convnext"):
        return {"depths": (1, 1, 2, 1)}
    return {"depths": (2, 2, 2, 2)} if trunk.startswith("swin") else {"depth": BLOCKS}


@contextlib.contextmanager
def shallow_trunks() -> Iterator[None]:
    """open_clip makes timm's trunks with few blocks meanwhile."""
    create = timm.create_model
    with mock.patch("timm.create_model", lambda name, **rest: create(name, **rest | fewer_blocks(name))):
        yield


def shallow(name: str) -> dict[str, Any]:
    """The description of an open_clip name with few blocks and a small vocabulary."""
    description = architecture(open_clip.get_model_config(name))
    config = description["config"]
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not vision.get("timm_model_name") and not isinstance(vision.get("layers"), list):
        vision["layers"] = BLOCKS
    words = text.get("hf_config") or text  # settings of Hugging Face have names of their own
    named = [key for key in ("num_hidden_layers", "encoder_layers", "num_layers") if key in words]
    words[named[0] if named else "layers"] = BLOCKS
    if words.get("vocab_size", 0) > 60_000:
        words["vocab_size"] = WORDS
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = 1
    return description


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with weights, biases, norms and factors of layers that hide nothing by being 0, 1 or tiny."""
    draw = torch.Generator().manual_seed(seed)
    layers = (m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    with torch.no_grad():
        for weight in layers:  # timm's heads begin a thousand times smaller
            weight.copy_(torch.randn(weight.shape, generator=draw) * weight[0].numel() ** -0.5)
        for parameter in model.parameters():
            same = parameter.min() == parameter.max()
            if parameter.ndim < 2 or (same and parameter.max() != 0):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
            elif not 0 < parameter.abs().max() < 100:  # zeros, or memory that the library never fills (CoCa's decoder)
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def settled(model: nn.Module, images: Tensor) -> None:
    """Batch norms with the statistics of these images, as those of a trained model have them of its data."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        models.encoders(model).encode_image(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def inputs(model: Any, samples: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    run, text = models.encoders(model), getattr(model, "text", model)
    images = torch.randn(samples, 3, run.image_size, run.image_size, generator=draw)
    words = text.vocab_size or text.config.vocab_size
    tokens = torch.randint(3, words - 1, (samples, min(text.context_length or 77, 77)), generator=draw)
    tokens[:, -1] = words - 1  # where texts end
    return images, tokens


@torch.no_grad()
def sweep(name: str, whole: bool = False) -> Outcome:
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        with contextlib.nullcontext() if whole else shallow_trunks():
            model = stirred(models.create_from_config(open_clip.get_model_config(name) if whole else shallow(name)))
        images, tokens = inputs(model)
        settled(model, images)
        run = models.encoders(model)
        wanted = run.encode_image(images), run.encode_text(tokens)
        qclip.quantize_(model, "w8a8")
        found = run.encode_image(images), run.encode_text(tokens)
    except ModelError as error:
        return Outcome(name, None, str(error), time.perf_counter() - start)
    pairs = zip(found, wanted, strict=True)
    image, text = (float(torch.cosine_similarity(a.double(), b.double()).min()) for a, b in pairs)
    return Outcome(name, (image, text), None, time.perf_counter() - start)


def main(wanted: list[str]) -> int:
    whole, failed = "--whole" in wanted, []
    for name in [each for each in wanted if each != "--whole"] or open_clip.list_models():
        outcome = sweep(name, whole)
        peak = f"; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB" if whole else ""
        print(f"{outcome}{peak}", flush=True)
        failed += [] if outcome.passes else [name]
        gc.collect()
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
