"""What is the same on every processor, and how far the rest lies apart: the CPU tiers of this one, each in a process.

    python benchmarks/exactness.py [photos ViT-B-32 ...]

Runs the same inputs on every tier that this processor has (`QKERNELS_CPU_TIER`) and compares with the first. First the
ops: integer products, quantization codes and scales, whether bit by bit. Then embeddings of models (a name without
weights gets random ones from a fixed seed) by recipe: the largest difference of a component of a unit vector, the least
cosine, over 32 images of `scenes:test` and as many captions (`--images`), at the model's size. Where a tier has
native bfloat16 products, q, k and v reach attention in bfloat16 (`qkernels.attention_dtype`), which is most of what
differs there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RECIPES = ("float", "w8a8", "w4a8", "w4a16")


def ops() -> dict[str, Tensor]:
    """Results of the ops that are compared, on seeded inputs."""
    import qkernels
    from qkernels import Int4Weight, Int8Weight

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 776, generator=generator) * 3
    weight = torch.randn(200, 776, generator=generator)
    int8, int4 = qkernels.pack(Int8Weight.quantize(weight)), qkernels.pack(Int4Weight.quantize(weight))
    codes, scales = qkernels.quantize_per_token(x)
    plain = qkernels.pack(Int8Weight(Int8Weight.quantize(weight).codes, torch.ones(200), (200, 776)))
    static, _ = qkernels.quantize_per_token(x, scale=0.05, zero_point=3)
    normed, _ = qkernels.layer_norm_quantize(x, None, None, 1e-5)
    q = x[:, :768].reshape(2, 25, 12, 64)
    return {
        "quantize_per_token, dynamic: codes": codes,
        "quantize_per_token, dynamic: scales": scales,
        "quantize_per_token, static: codes": static,
        "channel_absmax": qkernels.channel_absmax(x),
        "fake_quantize": qkernels.fake_quantize(x, 0.1, None, -8, 7, "lsq"),
        "int8_linear: integer sums": qkernels.int8_linear(codes, 1.0, plain),
        "int8_linear, with scales and bias": qkernels.int8_linear(codes, scales, int8, weight[:, 0].contiguous()),
        "int8_linear, gelu": qkernels.int8_linear(codes, scales, int8, activation="gelu"),
        "int4_linear, W4A8": qkernels.int4_linear(codes, scales, int4),
        "int4_linear, W4A16": qkernels.int4_linear(x, None, int4),
        "layer_norm_quantize: codes": normed,
        "attention": qkernels.attention(q, q, q),
        "hadamard_transform": qkernels.hadamard_transform(x[:, :768]),
    }


def embeddings(name: str, count: int) -> dict[str, Tensor]:
    """Unit vectors of images and captions, by recipe."""
    import open_clip

    import qclip
    from qclip.data.scenes import load_scenes

    torch.manual_seed(0)
    shipped = name in ("photos", "scenes-clean", "scenes-spurious")
    model = qclip.load_model(name) if shipped else open_clip.create_model(name, pretrained=None).eval()
    found = {}
    for recipe in RECIPES:
        tower = model if recipe == "float" else qclip.quantize(model, recipe)
        encoders = qclip.encoders(tower)
        scenes = load_scenes("test", count, side=encoders.image_size)
        images = torch.stack([encoders.preprocess(image) for image in scenes.images(range(count))])
        captions = [f"a photo of a {scenes.classes[i % len(scenes.classes)]}, {i}" for i in range(count)]
        with torch.inference_mode():
            for kind, y in (
                ("images", encoders.encode_image(images)),
                ("texts", encoders.encode_text(encoders.tokenizer(captions))),
            ):
                found[f"{recipe}, {kind}"] = torch.nn.functional.normalize(y.float(), dim=-1).clone()
    return found


def measure(what: str, tier: str, count: int, folder: Path) -> dict[str, Tensor]:
    """`ops()` or `embeddings(what)` of a process that runs `tier`."""
    path = folder / f"{what}-{tier}.pt"
    command = [sys.executable, __file__, "--one", what, "--to", str(path), "--images", str(count)]
    subprocess.run(command, check=True, env={**os.environ, "QKERNELS_CPU_TIER": tier})
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


def compare(title: str, found: dict[str, dict[str, Tensor]]) -> None:
    first, *tiers = found
    print(f"\n{title}: difference to {first}")
    for key, theirs in found[first].items():
        cells = []
        for tier in tiers:
            ours = found[tier][key]
            if torch.equal(ours, theirs):
                cells.append(f"{tier}: the same bits")
                continue
            a, b = ours.double(), theirs.double()
            cell = f"{tier}: up to {(a - b).abs().max():.1e} (values up to {b.abs().max():.1e})"
            if title != "ops":
                cell += f", 1 - cosine {1 - torch.cosine_similarity(a, b).min():.1e}"
            cells.append(cell)
        print(f"  {key:<38} {'; '.join(cells)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["photos", "ViT-B-32"])
    parser.add_argument("--images", type=int, default=32, help="and captions, per model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        found: Any = ops() if args.one == "ops" else embeddings(args.one, args.images)
        torch.save(found, args.to)
        return
    from qkernels import cpu

    assert cpu.native is not None, cpu.missing
    with tempfile.TemporaryDirectory() as folder:
        for what in ("ops", *args.models):
            compare(what, {tier: measure(what, tier, args.images, Path(folder)) for tier in cpu.native.tiers()})


if __name__ == "__main__":
    main()
