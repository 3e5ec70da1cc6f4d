"""ONNX Runtime: INT8 per channel, static (QDQ) and dynamic.

Without VNNI its kernels for unsigned by signed bytes saturate (https://onnxruntime.ai/docs/performance/
model-optimizations/quantization.html, "When and why do I need to try U8U8?"). Two settings are right there: weights of
7 bits (`reduce_range`), and the session's `session.x64quantprecision=1`, which turns the weights into unsigned bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..case import Case, Run
from . import Setting


class OnnxRuntime:
    name, needs, held_by = "onnxruntime", ("onnx", "onnxruntime"), ()

    def settings(self, case: Case) -> Iterator[Setting]:
        case.say("exporting to ONNX")
        ready = _export(case)
        for kind, quantize in (("static", _static), ("dynamic", _dynamic)):
            for reduced in (False, True):
                end = ", reduce_range" if reduced else ""
                path = case.folder / f"{kind}-{reduced}.onnx"
                case.say(f"quantizing, {kind}{end}")
                quantize(case, ready, path, reduced)
                yield Setting(f"INT8 {kind}{end}", _session(case, path), exact=reduced)
                if not reduced:
                    run = _session(case, path, precise=True)
                    yield Setting(f"INT8 {kind}, x64quantprecision=1", run)


def _export(case: Case) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    full, ready = case.folder / "full.onnx", case.folder / "ready.onnx"
    with torch.no_grad():
        module, args = case.exported(), (case.x.clone(),)
        torch.onnx.export(module, args, str(full), input_names=["x"], verbose=False, dynamo=False, opset_version=17)
    quant_pre_process(full, ready, skip_symbolic_shape=True, skip_onnx_shape=True)
    return ready


def _static(case: Case, ready: Path, path: Path, reduced: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{"x": case.x.numpy()}])

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(ready, path, Once(), per_channel=True, reduce_range=reduced, **types)


def _dynamic(case: Case, ready: Path, path: Path, reduced: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(ready, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduced)


def _session(case: Case, path: Path, precise: bool = False) -> Run:
    import onnxruntime as ort

    options: Any = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": case.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])
