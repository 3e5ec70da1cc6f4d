"""Every name of open_clip, and some of Hugging Face's (`HUGGING_FACE`), from float to `w8a8`: their own widths, few
blocks, random weights.

    python -m benchmarks.sweep             # all names: about ten minutes of one core, 3 GB
    python -m benchmarks.sweep NAME ...
    python -m benchmarks.sweep --whole NAME ...  # with all their blocks, each in a process, and with its peak memory
    python -m benchmarks.sweep --json FILE [NAME ...]  # kept as it goes: what is there is left alone

A name passes whose embeddings have a cosine of at least 0.999 to float's in both towers, or that is refused with the
reason that `qclip models --supported` gives. Ends with 1 where one does not. `pytest --full tests/models/test_sweep.py`
runs the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ModelError
from qclip.files import write_atomic
from qclip.machine import environment
from qclip.models import open_clip_names as names
from qclip.models.open_clip import architecture

LEAST = 0.999
BLOCKS, WORDS = 2, 1000  # of a tower; of a vocabulary that is larger than CLIP's
#: Models of Hugging Face: class, settings of the image and the text tower, of both.
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "hf:AltCLIP": (
        "AltCLIPModel",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"patch_size": 14},
        {},
        {"projection_dim": 768},
    ),
    "hf:ChineseCLIP-B-16": ("ChineseCLIPModel", {"patch_size": 16}, {"vocab_size": 21128}, {"projection_dim": 512}),
    "hf:SigLIP2-B-16-NaFlex": ("Siglip2Model", {}, {"vocab_size": 256000}, {}),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """cosines: the least of images, of texts; None where the name was refused. seconds: to make it, to quantize it, and
    to run both; peak_gb: of the process, where it was measured."""

    name: str
    cosines: Sequence[float] | None
    refused: str | None
    seconds: float
    peak_gb: float | None = None

    @property
    def passes(self) -> bool:
        if self.cosines is None:
            return self.name in (known := names.supported()[0]) and self.refused == known[self.name].refused
        return min(self.cosines) >= LEAST

    def __str__(self) -> str:
        told = self.refused or "cosine {:.5f} and {:.5f}".format(*self.cosines or (0, 0))
        peak = "" if self.peak_gb is None else f", peak {self.peak_gb:.2f} GB"
        return f"{'ok  ' if self.passes else 'FAIL'} {self.name}: {told} ({self.seconds:.1f} s{peak})"


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


def described(name: str) -> dict[str, Any]:
    """What `models.create_from_config` makes a model of that name of."""
    if name not in HUGGING_FACE:
        return architecture(open_clip.get_model_config(name))
    kind, vision, text, rest = HUGGING_FACE[name]
    config = deepcopy({"vision_config": vision, "text_config": text}) | rest
    return {"family": "huggingface", "class": kind, "config": config}


def shallow(description: dict[str, Any]) -> dict[str, Any]:
    """The same with few blocks and a small vocabulary."""
    config = description["config"]
    if description["family"] == "huggingface":
        config["vision_config"]["num_hidden_layers"] = config["text_config"]["num_hidden_layers"] = BLOCKS
        config["text_config"]["vocab_size"] = WORDS
        return description
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
        with models.explicit_form(model) as towers:
            for core in (getattr(*block.attention) for t in towers.values() for block in t.blocks if block.attention):
                if core.scale == 1:  # T5 has the factor on its logits in the weights of its queries
                    core.q.weight.mul_((core.q.weight.shape[0] / core.heads) ** -0.5)
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
    size = models.encoders(model).image_size
    images = torch.randn(samples, 3, size, size, generator=draw)
    with models.explicit_form(model) as towers:
        words = towers["text"].sites["text.embedding"].module.weight.shape[0]
    tokenizer = models.tokenizer_config(model)
    assert tokenizer is not None
    tokens = torch.randint(3, words - 1, (samples, min(tokenizer["context_length"], 77)), generator=draw)
    tokens[:, -1] = words - 1  # where texts end
    return images, tokens


@torch.no_grad()
def sweep(name: str, whole: bool = False) -> Outcome:
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        if whole:
            model = stirred(models.create_from_config(described(name)))
        else:
            with shallow_trunks():
                model = stirred(models.create_from_config(shallow(described(name))))
        images, tokens = inputs(model)
        settled(model, images)
        run = models.encoders(model)
        wanted = run.encode_image(images), run.encode_text(tokens)
        qclip.quantize_(model, "w8a8")
        found = run.encode_image(images), run.encode_text(tokens)
    except ModelError as error:
        return Outcome(name, None, str(error), round(time.perf_counter() - start, 1))
    pairs = zip(found, wanted, strict=True)
    image, text = (round(float(torch.cosine_similarity(a.double(), b.double()).min()), 7) for a, b in pairs)
    return Outcome(name, (image, text), None, round(time.perf_counter() - start, 1))


def alone(name: str) -> Outcome:
    """The whole model in a process of its own, whose peak memory is that of this name."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_with_peak, name).result()


def _with_peak(name: str) -> Outcome:
    outcome = sweep(name, whole=True)
    return dataclasses.replace(outcome, peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2))


def kept(file: Path | None) -> dict[str, Outcome]:
    """What an earlier run has written."""
    if file is None or not file.is_file():
        return {}
    return {name: Outcome(**fields) for name, fields in json.loads(file.read_text())["names"].items()}


def written(found: dict[str, Outcome]) -> str:
    """JSON: where it was measured, and a line for each name."""
    lines = [f"  {json.dumps(name)}: {json.dumps(dataclasses.asdict(outcome))}" for name, outcome in found.items()]
    return json.dumps(environment(), indent=1)[:-2] + ',\n "names": {\n' + ",\n".join(lines) + "\n }\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    found = kept(given.json)
    for name in given.names or [*open_clip.list_models(), *HUGGING_FACE]:
        if name in found:
            continue
        found[name] = alone(name) if given.whole else sweep(name)
        print(found[name], flush=True)
        if given.json is not None:
            write_atomic(given.json, written(found).encode())
        gc.collect()
    failed = [name for name, outcome in found.items() if not outcome.passes]
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else f"all {len(found)} pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
