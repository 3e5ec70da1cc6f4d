"""Cores, the processor's speed, and instruction sets that are not alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from qclip.bench import processor

TIERS = ["scalar", "avx2", "avx512vnni"]
ONEDNN = ("ONEDNN_MAX_CPU_ISA",)


def test_a_run_that_is_slow_throughout_is_told_from_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "peak", lambda threads: {1: 100.0}[threads])
    assert processor.crowded(190.0, 2) is None
    said = processor.crowded(110.0, 2)
    assert said is not None and said.startswith("2 threads reached 55% of 2 times one thread's INT8 peak")


def test_threads_keep_to_different_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[int]] = []
    siblings = {0: "0,2", 2: "0,2", 1: "1,3", 3: "1,3"}
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(processor.os, "sched_setaffinity", lambda pid, cpus: chosen.append(list(cpus)), raising=False)
    monkeypatch.setattr(processor.Path, "is_file", lambda path: True)
    monkeypatch.setattr(processor.Path, "read_text", lambda path: siblings[int(path.parts[5][3:])])
    for threads in (1, 2, 3):
        monkeypatch.setattr(processor.torch, "get_num_threads", lambda threads=threads: threads)
        processor.keep_to_cores()
    assert chosen == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("held_by", "tier", "environment", "said"),
    [
        (ONEDNN, "avx512vnni", {}, None),
        (ONEDNN, "avx2", {"ONEDNN_MAX_CPU_ISA": "avx2"}, None),
        (ONEDNN, "avx2", {}, "is not held to avx2, as our kernels are; set ONEDNN_MAX_CPU_ISA=AVX2"),
        (ONEDNN, "avx2", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, "is not held to avx2"),
        (ONEDNN, "scalar", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "cannot be held to scalar, as our kernels are"),
        ((), "avx512vnni", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, None),
        ((), "avx2", {}, "cannot be held to avx2, as our kernels are, and runs the best that this processor has"),
        (ONEDNN, "avx512vnni", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "is held by ONEDNN_MAX_CPU_ISA=AVX2, our kernels are"),
        (processor.TORCH_HELD_BY, "avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "set MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_"),
    ],
)
def test_different_instruction_sets_are_told(
    held_by: tuple[str, ...], tier: str, environment: dict[str, str], said: str | None
) -> None:
    found = processor.unequal(held_by, tier, TIERS, environment)
    assert found is None if said is None else found is not None and said in found


@pytest.mark.parametrize(
    ("instructions", "tier", "more"),
    [
        ("avx512_bf16, avx512_f32", "avx2", True),
        ("AVX512", "avx2", True),
        ("AVX2", "avx2", False),
        ("avx512_core", "avx512vnni", False),
        ("", "avx2", False),
    ],
)
def test_instructions_that_a_peer_tells_of_are_compared_with_ours(instructions: str, tier: str, more: bool) -> None:
    assert processor.beyond(instructions, tier) is more


@pytest.mark.parametrize(
    ("flags", "vnni"),
    [("fpu avx2", False), ("avx2 avx512_vnni", True), ("avx2 avx_vnni fpu", True), (None, True)],
)
def test_vnni_is_read_from_the_processor_s_flags(tmp_path: Path, flags: str | None, vnni: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n" if flags else "Features : asimd\n")
    assert processor.has_vnni(tmp_path / "cpuinfo") is vnni


def test_sums_saturate_without_vnni_and_where_a_library_is_held_to_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(processor, "has_vnni", lambda: True)
    assert processor.saturates(ONEDNN, "avx2", TIERS)
    assert not processor.saturates((), "avx2", TIERS)  # it cannot be held, so it runs VNNI
    assert not processor.saturates(ONEDNN, "avx512vnni", TIERS)
    monkeypatch.setattr(processor, "has_vnni", lambda: False)
    assert processor.saturates((), "avx2", TIERS[:2])
