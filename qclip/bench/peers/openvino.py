"""OpenVINO with NNCF's INT8: static, per tensor.

NNCF's default guards the first layer alone against sums that saturate without VNNI; `OverflowFix.ENABLE` quantizes all
weights within half the range. Held to AVX2, 256 products of ones gave 129.6 at the default (OpenVINO 2026.4.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from ..case import Case, Run
from . import Setting


class OpenVINO:
    name, needs, held_by = "openvino", ("openvino", "nncf"), ("ONEDNN_MAX_CPU_ISA",)

    def settings(self, case: Case) -> Iterator[Setting]:
        import nncf
        import openvino as ov

        case.say("converting")
        with torch.no_grad():
            float_model = ov.convert_model(case.exported(), example_input=case.x.clone())
        core = ov.Core()
        native_bf16 = not case.saturates and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        for fixed in (True, False) if case.saturates else (False, True):
            case.say("NNCF calibration" + ", OverflowFix" * fixed)
            fix = nncf.OverflowFix.ENABLE if fixed else nncf.OverflowFix.FIRST_LAYER
            small = nncf.quantize(
                float_model.clone(),
                nncf.Dataset([case.x.numpy()]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=1,
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
            )
            for rest in ("f32", "bf16") if native_bf16 else ("f32",):
                compiled = core.compile_model(
                    small, "CPU", {"INFERENCE_PRECISION_HINT": rest, "INFERENCE_NUM_THREADS": case.threads}
                )
                name = f"NNCF INT8, rest {rest}" + ", OverflowFix" * fixed
                yield Setting(name, _run(case, compiled), exact=fixed, instructions=_instructions(compiled))


def _run(case: Case, compiled: Any) -> Run:
    x = case.x.numpy()
    return lambda: torch.from_numpy(compiled(x)[0])


def _instructions(compiled: Any) -> str:
    """Instruction sets in the names of the primitives that the compiled model runs, such as "avx2, avx512_core"."""
    kinds = set()
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if "primitiveType" in info:
            kinds.update(re.findall(r"(?:avx|sse|amx)\w*?(?=_[IUFB][\w]*\d+$|$)", info["primitiveType"].astype(str)))
    return ", ".join(sorted(kinds))
