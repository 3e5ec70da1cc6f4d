"""Our weight methods beside the field's own packages: the same layers, the same inputs, 4 bits in groups of 64.

    python -m benchmarks.ptq_packages --data DIR [--json FILE]      # DIR: as for benchmarks.ptq

Prints, for every package that can be imported (`hqq`, `optimum-quanto`, `neural-compressor`), the squared error of the
products of each linear map of the image tower of `photos` with its float inputs, over that of rounding to nearest by
us, as a geometric mean. Inputs are those of the first half of the images; errors are taken on the other half.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import qclip
from qclip import calibration, models
from qclip.files import write_atomic
from qclip.machine import cpu_name

GROUP = 64
Quantize = Callable[[Tensor, Tensor], Tensor]  # weight [N, K], inputs [n, K] -> the weight that the codes stand for
OURS = {"rounding to nearest": [], "hqq": ["hqq"], "awq": ["awq"], "gptq": ["gptq"]}


def inputs(model: nn.Module, data: calibration.Samples) -> dict[str, Tensor]:
    """Float32 `[n, K]` by name of the linear sites of the image tower."""
    tower, seen = models.towers(model)["vision"], dict[str, list[Tensor]]()
    with calibration.Hooks() as hooks, torch.no_grad():
        for site in tower:
            if site.kind not in ("patch", "embedding", "projection"):
                hooks.add(site.module, seen.setdefault(site.name, []).append)
        calibration.run(models.encoders(model), data, ["vision"], hooks)
    return {name: torch.cat([x.flatten(0, -2) for x in parts]).float() for name, parts in seen.items()}


def packages() -> Iterator[tuple[str, Quantize]]:
    try:
        from hqq.core.quantize import Quantizer
    except ImportError:
        print("hqq is not installed")
    else:

        def theirs(w: Tensor, _: Tensor) -> Tensor:
            settings = {"nbits": 4, "group_size": GROUP, "axis": 1, "optimize": True, "device": "cpu"}
            codes, meta = Quantizer.quantize(w, compute_dtype=torch.float32, view_as_float=False, **settings)
            return Quantizer.dequantize(codes, meta).float()  # type: ignore[no-any-return]

        yield "hqq", theirs
    try:
        from optimum.quanto import HqqOptimizer, MaxOptimizer, qint4, quantize_weight
    except ImportError:
        print("optimum-quanto is not installed")
    else:
        for name, optimizer in (("max", MaxOptimizer()), ("hqq", HqqOptimizer())):

            def quanto(w: Tensor, _: Tensor, optimizer=optimizer) -> Tensor:
                scale, shift = optimizer(w, qint4, axis=0, group_size=GROUP)
                found = quantize_weight(w, qint4, 0, scale, shift, group_size=GROUP, optimized=False)
                return found.dequantize().float()  # type: ignore[no-any-return]

            yield f"optimum-quanto, {name}", quanto
    try:
        from neural_compressor.torch.algorithms.weight_only.gptq import GPTQ
    except ImportError:
        print("neural-compressor is not installed")
    else:

        def gptq(w: Tensor, x: Tensor) -> Tensor:
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
            layer.weight.data = w.clone()
            found = GPTQ(layer, w.clone(), "cpu")
            double = {"use_double_quant": False, "double_quant_dtype": "int", "double_quant_bits": 8}
            double |= {"double_quant_sym": True, "double_quant_group_size": 256}
            found.quantizer.configure(
                {"dtype": "int", "bits": 4, "sym": True, "perchannel": True, "mse": False, **double}
            )
            for part in x.split(4096):
                found.add_batch(part, None)
            return found.fasterquant(w.clone(), groupsize=GROUP)[-1].float()  # type: ignore[no-any-return]

        yield "neural-compressor, GPTQ", gptq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the Parquet files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = qclip.load_model("photos")
    encoders = models.encoders(model)
    every = calibration.samples(f"parquet:{args.data}/flickr8k_train_64.parquet?samples=512", encoders)
    pixels = torch.cat([calibration.gather.loaded(part) for part in every.image_batches()])
    seen, tests = pixels[::2], pixels[1::2]
    learned = inputs(copy.deepcopy(model), calibration.samples(seen, encoders))
    tested = inputs(copy.deepcopy(model), calibration.samples(tests, encoders))
    floats = {name: site.module.weight.detach().float() for name, site in _sites(copy.deepcopy(model)).items()}
    errors: dict[str, dict[str, float]] = {}

    def error(name: str, w: Tensor) -> float:
        return float((tested[name] @ (w - floats[name]).T).square().sum())

    for name, steps in OURS.items():
        settings = {"name": "x", "weight_bits": 4, "activation_bits": 16, "group": GROUP, "towers": ["vision"]}
        recipe = qclip.Recipe.from_dict(settings | {"steps": [{"method": each} for each in steps]})
        small = qclip.quantize(model, recipe, seen)
        found = {site: _sites(small)[site].module.dequantized_weight() for site in tested}
        errors[f"ours, {name}"] = {site: error(site, w.float()) for site, w in found.items()}
    for name, quantize in packages():
        errors[name] = {site: error(site, quantize(floats[site], learned[site])) for site in tested}
    plain = errors["ours, rounding to nearest"]
    rows = {
        name: math.exp(sum(math.log(each[site] / plain[site]) for site in plain) / len(plain))
        for name, each in errors.items()
    }
    for name, ratio in rows.items():
        print(f"{name:28} {ratio:.3f}")
    if args.json is not None:
        told = {"model": "photos", "bits": 4, "group": GROUP, "layers": len(plain), "cpu": cpu_name()}
        rounded = {name: round(ratio, 4) for name, ratio in rows.items()}
        write_atomic(args.json, f"{json.dumps(told | {'error_over_rtn': rounded}, indent=1)}\n".encode())


def _sites(model: nn.Module) -> dict[str, models.Site]:
    return {site.name: site for site in models.towers(model)["vision"]}


if __name__ == "__main__":
    main()
