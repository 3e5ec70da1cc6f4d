"""What a run says of peers whose times are not comparable."""

from __future__ import annotations

import pytest

from qclip.bench import processor, run


def test_unequal_instruction_sets_are_never_compared_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "tiers", lambda: ("avx2", ["scalar", "avx2", "avx512vnni"]))
    for name, value in processor.HOLD["avx2"].items():
        monkeypatch.setenv(name, value)
    names = ("torch-fp32", "torchao", "onnxruntime", "openvino")
    ready = {name: [{"instructions": "AVX2"}] for name in names}
    ready["openvino"] = [{"instructions": ""}, {"instructions": "avx512_bf16, avx512_f32"}]
    found = run._unequal(names, ready)
    assert set(found) == {"onnxruntime", "openvino"}
    assert found["onnxruntime"].startswith("cannot be held to avx2, as our kernels are, and runs the best that this")
    assert found["openvino"].startswith("runs avx512_bf16, avx512_f32 in part, our kernels avx2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    assert "set ATEN_CPU_CAPABILITY=avx2" in run._unequal(names, ready)["torch-fp32"]
