"""Speed of a quantized tower beside its peers: interleaved calls on the same input and threads, medians, in one run.

A ratio is peer seconds over ours, both from the same minutes of the same machine. Every contender's output is compared
with the float32 model first, so that nobody is fast by computing something else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import models, recipes, rewrite, zoo
from .errors import InputError, nearest
from .machine import cpu_name
from .models.class_names import IMAGENET
from .ptq import quantize

Run = Callable[[], Tensor]
NEEDS = {
    "torch-fp32": (),
    "torch-bf16": (),
    "torchao": ("torchao",),
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
}
MIN_ROUNDS, TURN = 5, 0.05  # rounds at least; seconds that one timed turn lasts at least
SLOW = 0.75  # a round counts if the processor then ran at this share of its best speed
BATCH = {"image": 16, "text": 64}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to run the tower. `peer` may have several settings; the fastest speaks for it."""

    peer: str
    setting: str
    run: Run


def peer_names(text: str) -> tuple[str, ...]:
    """`"all"`, `"none"` or a comma-separated list -> names. Raises InputError for an unknown or missing peer."""
    names = tuple(NEEDS) if text == "all" else () if text == "none" else tuple(n.strip() for n in text.split(","))
    for name in names:
        if name not in NEEDS:
            raise InputError(f"unknown peer {name!r}; {nearest(name, NEEDS)} (or all, none)")
        if absent := [m for m in NEEDS[name] if importlib.util.find_spec(m) is None]:
            raise InputError(
                f"peer {name!r} needs {' and '.join(absent)}, which is not installed; "
                "`make bench` installs the peers (extra `bench`)"
            )
    return tuple(dict.fromkeys(names))


@torch.inference_mode()
def bench(
    model: str | Path | nn.Module,
    recipe: str | Path | dict | recipes.Recipe = "w8a8",
    *,
    tower: str = "image",
    batch: int | None = None,
    peers: Iterable[str] = ("torch-fp32",),
    calibration: object = None,
    full: bool = False,
    seconds: float = 20.0,
    arch: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Time `recipe` on one tower of `model`, and peers, on a CPU with torch's threads. Float32 in, embeddings out.

    `batch` images of standard normal pixels, or prompts "a photo of a NAME" (`full`: prompts that fill the context);
    `seconds` for all measurements together.
    Returns JSON: `ours` and `peers[NAME]` (seconds per call: median and quartiles; ms_per_item; cosine to float32),
    `ratios[NAME]` = peer seconds / our seconds, `cpu`, `threads`, `peak_gops`, `percent_of_peak`, notes.
    """
    chosen = recipes.get(recipe)
    names = peer_names(",".join(peers) or "none")
    batch = batch or BATCH[tower]
    say = progress or (lambda what, done, total: None)
    say("loading", 0, 1)
    original = zoo.load_model(model, arch=arch)
    x = _input(original, tower, batch, seed, full)
    wanted = _encode(original, tower)(x).float()

    with torch.inference_mode(False):
        quantized = quantize(original, chosen, calibration, seed)
    notes = []
    contenders = [Contender("ours", chosen.name, _bound(quantized, tower, x))]
    explicit = copy.deepcopy(original)
    models.towers(explicit)
    macs = count_macs(explicit, tower, x)
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            say(f"preparing {name}", number, len(names))
            with contextlib.redirect_stdout(sys.stderr):  # exporters talk, and stdout is for results
                contenders += PEERS[name](original, explicit, tower, x, Path(folder))
        cosines = {c: _cosine(c.run(), wanted) for c in contenders}
        times, speeds = interleave({c: c.run for c in contenders}, seconds, say, _peak)
    peak = max(speeds) if _peak() else None
    disturbed = len(speeds) - len(times[contenders[0]])
    if disturbed:
        notes.append(
            f"{disturbed} of {len(speeds)} rounds do not count: the processor ran at less than {SLOW:.0%} of "
            "its best speed"
        )
    if peak and (crowded := _crowded(peak, torch.get_num_threads())):
        notes.append(crowded)

    best: dict[str, Contender] = {}
    for c in contenders:
        if c.peer not in best or statistics.median(times[c]) < statistics.median(times[best[c.peer]]):
            best[c.peer] = c
    rows = {name: _row(c, times[c], cosines[c], batch) for name, c in best.items()}
    ours = rows.pop("ours")
    done = rewrite.quantization(quantized)
    if done is not None and done.coverage.share("simulated"):
        notes.append(f"{chosen.name} is simulated in float arithmetic here: its time says nothing about a kernel")
    if tower == "text":
        notes.append(
            "the text tower runs up to the last end-of-text token of the batch where that is exact; "
            "percent_of_peak counts what was computed"
        )
    gops = 2 * macs / ours["seconds"] / 1e9
    return {
        "model": str(getattr(original, "qclip_source", None) or model),
        "recipe": chosen.name,
        "tower": tower,
        "batch": batch,
        "full": full,
        "unit": "image" if tower == "image" else "prompt",
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "rounds": len(times[contenders[0]]),
        "ours": ours,
        "peers": rows,
        "ratios": {name: row["seconds"] / ours["seconds"] for name, row in rows.items()},
        "macs": macs,
        "gops": gops,
        "peak_gops": peak,
        "percent_of_peak": None if not peak else 100 * gops / peak,
        "notes": notes,
    }


def keep_to_cores() -> None:
    """Keep this process, and the threads that it will start, to as many processors as torch has threads, each
    on a core of its own where there are enough cores.

    Binding OpenMP's threads alone would put all threads of other pools on one core.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    usable = sorted(os.sched_getaffinity(0))
    cores: dict[object, int] = {}
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(path.read_text() if path.is_file() else cpu, cpu)
    first = list(cores.values())
    chosen = (first + [cpu for cpu in usable if cpu not in first])[: torch.get_num_threads()]
    os.sched_setaffinity(0, chosen)


def interleave(
    runs: dict[Any, Run],
    seconds: float,
    say: Callable[[str, int, int], None],
    probe: Callable[[], float | None] = lambda: None,
) -> tuple[dict[Any, list[float]], list[float]]:
    """Seconds per call, one value per round and contender, and the speed of the processor (`probe`) after each round.

    Each turn begins with an untimed call, because the one before left its data in the caches and its threads spinning;
    the order turns round after round. A round after which the probe finds the processor far slower than at its best
    (both threads on one core, a busy neighbour) is run again, for twice the seconds at most.
    """
    calls = {}
    for key, run in runs.items():
        run()
        began = time.perf_counter()
        run()
        calls[key] = max(1, math.ceil(TURN / (time.perf_counter() - began)))
    rounds: list[tuple[float, dict[Any, float]]] = []
    order = list(runs)
    began = time.perf_counter()
    while True:
        times: dict[Any, float] = {}
        for key in order:
            runs[key]()
            start = time.perf_counter()
            for _ in range(calls[key]):
                runs[key]()
            times[key] = (time.perf_counter() - start) / calls[key]
        rounds.append((probe() or 1.0, times))
        order = order[1:] + order[:1] if len(rounds) % 2 else order[::-1]
        spent = time.perf_counter() - began
        say("measuring", min(int(spent), int(seconds)), max(1, int(seconds)))
        good = [r for r in rounds if r[0] >= SLOW * max(speed for speed, _ in rounds)]
        if (len(good) >= MIN_ROUNDS and spent >= seconds) or (len(rounds) >= MIN_ROUNDS and spent >= 2 * seconds):
            break
    return {key: [times[key] for _, times in good] for key in runs}, [speed for speed, _ in rounds]


def count_macs(explicit: nn.Module, tower: str, x: Tensor) -> int:
    """Multiply-accumulates that one call with `x` does in the linear maps and in attention of a float model in
    explicit form (`qclip.towers`), counted from the shapes that pass by."""
    total = 0

    def site(module: Any, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * (module.weight.numel() // module.weight.shape[0])

    def attention(module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        nonlocal total
        source, query = args[0], kwargs.get("query", args[3] if len(args) > 3 else None)
        length, width = source.shape[1], module.v.weight.shape[0]
        queries = length if query is None else query.shape[1]
        total += 2 * source.shape[0] * queries * length * width

    seen = models.towers(explicit)["vision" if tower == "image" else "text"]
    hooks = [s.module.register_forward_hook(site) for s in seen if s.kind != "embedding"]
    cores = [getattr(*block.attention) for block in seen.blocks if block.attention is not None]
    hooks += [core.register_forward_hook(attention, with_kwargs=True) for core in cores]
    _encode(explicit, tower)(x)
    for hook in hooks:
        hook.remove()
    return total


class _Tower(nn.Module):
    """One encoder as a module, for exporters."""

    def __init__(self, model: nn.Module, tower: str) -> None:
        super().__init__()
        self.model, self.encode = model, _encode(model, tower)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def _encode(model: nn.Module, tower: str) -> Callable[[Tensor], Tensor]:
    encoders = models.encoders(model)
    return encoders.encode_image if tower == "image" else encoders.encode_text


def _bound(model: nn.Module, tower: str, x: Tensor) -> Run:
    encode = _encode(model.eval(), tower)
    return lambda: encode(x)


def _input(model: nn.Module, tower: str, batch: int, seed: int, full: bool) -> Tensor:
    encoders = models.encoders(model)
    if tower == "text":
        if encoders.tokenizer is None:
            raise InputError("the model has no tokenizer, so its text tower gets no prompts; use --tower image")
        names = [IMAGENET[i % len(IMAGENET)] for i in range(batch)]
        return encoders.tokenizer([f"a photo of a {name}" + f" and a {name}" * (100 * full) for name in names])
    side = encoders.image_size
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def _cosine(out: Tensor, wanted: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(out.float(), wanted, dim=-1).mean())


def _row(contender: Contender, times: list[float], cosine: float, batch: int) -> dict[str, Any]:
    low, median, high = statistics.quantiles(times, n=4)
    return {
        "setting": contender.setting,
        "seconds": median,
        "low": low,
        "high": high,
        "ms_per_item": 1000 * median / batch,
        "cosine": cosine,
    }


def _peak(threads: int | None = None) -> float | None:
    import qkernels

    return qkernels.cpu.peak_gops(threads) if qkernels.info()["built"] else None


def _crowded(peak: float, threads: int) -> str | None:
    """What to say where the run was slow from start to end, so that no round stood out: threads that share a core, a
    neighbour that never rests."""
    together = threads * max(_peak(1) or 0.0 for _ in range(3))
    if peak >= SLOW * together:
        return None
    return (
        f"{threads} threads reached {peak / together:.0%} of {threads} times one thread's INT8 peak: do they share "
        "cores?"
    )


def _fp32(original: nn.Module, explicit: nn.Module, tower: str, x: Tensor, folder: Path) -> list[Contender]:
    return [
        Contender("torch-fp32", "eager, the model as it was loaded", _bound(original, tower, x)),
        Contender("torch-fp32", "compiled", _compiled(original, tower, x)),
    ]


def _bf16(original: nn.Module, explicit: nn.Module, tower: str, x: Tensor, folder: Path) -> list[Contender]:
    model = copy.deepcopy(original).bfloat16()
    y = x.bfloat16() if x.is_floating_point() else x
    return [
        Contender("torch-bf16", "eager, model and input bfloat16", _bound(model, tower, y)),
        Contender("torch-bf16", "compiled, model and input bfloat16", _compiled(model, tower, y)),
    ]


def _compiled(model: nn.Module, tower: str, x: Tensor) -> Run:
    encode = torch.compile(_encode(model.eval(), tower))
    return lambda: encode(x)


def _torchao(original: nn.Module, explicit: nn.Module, tower: str, x: Tensor, folder: Path) -> list[Contender]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    with torch.inference_mode(False):
        model = copy.deepcopy(explicit)
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return [Contender("torchao", "int8 dynamic, eager, attention as plain linears", _bound(model, tower, x))]


def _onnxruntime(original: nn.Module, explicit: nn.Module, tower: str, x: Tensor, folder: Path) -> list[Contender]:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([feed])

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    feed = {"x": x.numpy()}
    full, ready, small, static = (folder / f"{name}.onnx" for name in ("full", "ready", "int8", "static"))
    with torch.inference_mode(False), torch.no_grad():
        module = _Tower(copy.deepcopy(explicit), tower).eval()
        torch.onnx.export(
            module, (x.clone(),), str(full), input_names=["x"], verbose=False, dynamo=False, opset_version=17
        )
    quant_pre_process(full, ready, skip_symbolic_shape=True, skip_onnx_shape=True)
    quantize_dynamic(ready, small, weight_type=QuantType.QInt8, per_channel=True)
    quantize_static(
        ready, static, Once(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    out = []
    for setting, path in (("INT8 dynamic", small), ("INT8 static, QDQ", static)):
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        run = lambda session=session: torch.from_numpy(session.run(None, feed)[0])  # noqa: E731
        out.append(Contender("onnxruntime", setting, run))
    return out


def _openvino(original: nn.Module, explicit: nn.Module, tower: str, x: Tensor, folder: Path) -> list[Contender]:
    import nncf
    import openvino as ov

    with torch.inference_mode(False), torch.no_grad():
        converted = ov.convert_model(_Tower(copy.deepcopy(explicit), tower).eval(), example_input=x.clone())
    data = nncf.Dataset([x.numpy()])
    small = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    out = []
    for rest in ("f32", "bf16"):
        settings = {"INFERENCE_PRECISION_HINT": rest, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = ov.Core().compile_model(small, "CPU", settings)
        run = lambda compiled=compiled: torch.from_numpy(compiled(x.numpy())[0])  # noqa: E731
        out.append(Contender("openvino", f"NNCF INT8 static, rest {rest}", run))
    return out


PEERS: dict[str, Callable[[nn.Module, nn.Module, str, Tensor, Path], list[Contender]]] = {
    "torch-fp32": _fp32,
    "torch-bf16": _bf16,
    "torchao": _torchao,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
