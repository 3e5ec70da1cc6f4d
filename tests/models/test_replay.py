"""Towers run from programs in eval mode without gradients, and from their modules as soon as anything asks for them."""

import copy
import random
import threading

import pytest
import torch

import qclip
from qclip import models
from qclip.layers import QuantizedAttention
from qclip.models import replay
from qkernels import cpu
from qkernels.recording import GraphProgram, capture, ledger
from tests.kernels.emulated_cuda_graph import EmulatedCuda

from ..small import IMAGES, TEXTS, small_clip

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")


@pytest.fixture
def model() -> torch.nn.Module:
    return qclip.quantize_(small_clip(), "w8a8")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "module" for every run of a block's modules, "program" for every replay."""
    seen: list[str] = []
    call = replay.Program.__call__
    monkeypatch.setattr(replay.Program, "__call__", lambda *a: (seen.append("program"), call(*a))[1])
    fused = QuantizedAttention.forward
    monkeypatch.setattr(QuantizedAttention, "forward", lambda *a, **k: (seen.append("module"), fused(*a, **k))[1])
    return seen


@torch.no_grad()
def settle(model: torch.nn.Module, calls: list[str]) -> torch.Tensor:
    for _ in range(3):
        y = model.encode_image(IMAGES)
    calls.clear()
    assert torch.equal(model.encode_image(IMAGES), y)
    assert calls == ["program"]
    calls.clear()
    return y


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", "w8a8-static", "w4a4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_towers_replay_the_numbers_of_their_modules(
    recipe: str, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qclip.quantize_(small_clip(), recipe, calibration=IMAGES).to(dtype)
    tokens = model.tokenizer(TEXTS)
    for images in (IMAGES, -2 * IMAGES, IMAGES + 1, IMAGES * 0.1):
        image, text = model.encode_image(images.to(dtype)), model.encode_text(tokens)
    assert calls[-2:] == ["program", "program"]
    monkeypatch.setenv("QKERNELS_PROGRAM", "0")
    calls.clear()
    assert torch.equal(model.encode_image((IMAGES * 0.1).to(dtype)), image)
    assert torch.equal(model.encode_text(tokens), text)
    assert "program" not in calls


def test_gradients_hooks_training_and_tracing_use_the_modules(model: torch.nn.Module, calls: list[str]) -> None:
    y = settle(model, calls)
    assert torch.allclose(model.encode_image(IMAGES), y)  # grad mode is on
    assert set(calls) == {"module"}
    calls.clear()

    with torch.no_grad():
        seen = []
        handle = model.visual.transformer.resblocks[1].register_forward_hook(lambda *a: seen.append(1))
        model.encode_image(IMAGES)
        assert seen == [1]
        handle.remove()
        settle(model, calls)

        model.train()
        model.encode_image(IMAGES)
        assert set(calls) == {"module"}
        model.eval()
        settle(model, calls)

        with torch.autocast("cpu", torch.bfloat16):
            model.encode_image(IMAGES)
        assert set(calls) == {"module"}
        calls.clear()

        compiled = torch.compile(lambda x: model.encode_image(x), backend="eager", fullgraph=True)
        assert torch.allclose(compiled(IMAGES), y, atol=1e-5)
        assert "program" not in calls


@torch.no_grad()
def test_changed_parameters_modules_and_settings_are_noticed(model: torch.nn.Module, calls: list[str]) -> None:
    y = settle(model, calls)
    model.visual.ln_post.weight.mul_(2)  # a new version
    doubled = model.encode_image(IMAGES)
    assert not torch.allclose(doubled, y)
    settle(model, calls)

    model.visual.ln_post.weight = torch.nn.Parameter(model.visual.ln_post.weight / 2)
    assert torch.allclose(model.encode_image(IMAGES), y)
    settle(model, calls)

    model.visual.output_tokens = True
    pooled, tokens = model.encode_image(IMAGES)
    assert torch.allclose(pooled, y) and tokens.shape[:2] == (6, 16)
    model.visual.output_tokens = False

    block = model.visual.transformer.resblocks[0]
    model.visual.transformer.resblocks[0] = torch.nn.Identity()
    model.visual.transformer.resblocks[0].forward = lambda x, attn_mask=None: x
    assert not torch.allclose(model.encode_image(IMAGES), y)
    model.visual.transformer.resblocks[0] = block
    settle(model, calls)

    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["visual.proj.scales"] *= 2
    model.load_state_dict(state)
    assert torch.allclose(model.encode_image(IMAGES), 2 * y, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer.resblocks.0.mlp.fc2.bias", "positional_embedding"])
def test_data_that_is_set_is_noticed(name: str, model: torch.nn.Module, calls: list[str]) -> None:
    """It changes neither the parameter nor its version, and frees what it held."""
    settle(model, calls)
    parameter = model.visual.get_parameter(name)
    parameter.data = parameter.data + 1
    freed = [torch.full_like(parameter, torch.nan) for _ in range(200)]
    changed = model.encode_image(IMAGES)
    assert calls[-1] != "program" and changed.isfinite().all()
    assert torch.equal(settle(model, calls), changed)
    del freed


@torch.no_grad()
def test_a_change_under_a_folded_constant_is_noticed(calls: list[str]) -> None:
    """Biases in bfloat16 are turned into float32 for the kernels, once."""
    model = qclip.quantize_(small_clip(), "w8a8").bfloat16()
    images = IMAGES.bfloat16()
    for _ in range(4):
        y = model.encode_image(images)
    assert calls[-1] == "program"
    model.visual.transformer.resblocks[1].mlp.fc2.bias[:9].add_(3)
    assert not torch.allclose(model.encode_image(images).float(), y.float(), atol=0.1)


@torch.no_grad()
def test_copies_and_other_threads_have_programs_of_their_own(model: torch.nn.Module, calls: list[str]) -> None:
    y = settle(model, calls)
    other = copy.deepcopy(model)
    other.visual.proj.scales.mul_(2)
    assert torch.allclose(other.encode_image(IMAGES), 2 * y, atol=1e-6)
    assert torch.equal(model.encode_image(IMAGES), y)

    wrong = []

    def work(images: torch.Tensor) -> None:
        with torch.no_grad():
            wanted = other.encode_image(images)
            for _ in range(20):
                if not torch.equal(other.encode_image(images), wanted):
                    wrong.append(1)

    threads = [threading.Thread(target=work, args=(IMAGES * k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_five_sizes_in_rotation_are_traced_once_and_all_replayed(
    model: torch.nn.Module, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (1, 6, 2, 5, 3) * 6
    found = [model.encode_image(IMAGES[:n]) for n in sizes]
    assert calls[-10:] == ["program"] * 10
    counts = replay.counts(model.visual)
    assert (counts["recorded"], counts["derived"], counts["modules"], counts["replayed"]) == (1, 5, 13, 17)
    assert counts["dropped"] == counts["refused"] == 0 and counts["why"] is None
    buffers = {program._buffer.data_ptr() for program in replay.programs(model.visual)}
    assert len(buffers) == 1, "one workspace"
    monkeypatch.setenv("QKERNELS_PROGRAM", "0")
    for n, y in zip(sizes, found, strict=True):
        assert torch.equal(model.encode_image(IMAGES[:n]), y)


@torch.no_grad()
def test_prompts_of_all_lengths_are_traced_once(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [model.tokenizer([" ".join(["dog"] * words)] * batch) for words in (1, 3, 9, 14) for batch in (1, 3)]
    found = [[model.encode_text(tokens) for tokens in prompts] for _ in range(32)]
    counts = replay.counts(model)
    assert (counts["recorded"], counts["derived"]) == (1, len(prompts)) and counts["replayed"] >= len(prompts)
    monkeypatch.setenv("QKERNELS_PROGRAM", "0")
    for tokens, *ys in zip(prompts, *found, strict=True):
        assert all(torch.equal(model.encode_text(tokens), y) for y in ys)


@torch.no_grad()
def test_programs_stay_within_their_bytes_and_the_rest_runs_by_modules(
    model: torch.nn.Module, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        y = model.encode_image(IMAGES[:1])
    most = ledger.bytes + 10_000
    monkeypatch.setenv("QKERNELS_PROGRAM_BYTES", str(most))
    large = torch.cat([IMAGES] * 10)
    for images in (large, large, large, large[:50], large[:50]):
        model.encode_image(images)
        assert calls[-1] == "module" and ledger.bytes <= most
    counts = replay.counts(model.visual)
    assert counts["refused"] >= 2 and "QKERNELS_PROGRAM_BYTES" in counts["why"]
    calls.clear()
    assert torch.equal(model.encode_image(IMAGES[:1]), y) and calls == ["program"]
    assert replay.process_counts()["limit"] == most and replay.process_counts()["bytes"] == ledger.bytes


@torch.no_grad()
def test_a_model_that_treats_large_batches_otherwise_is_never_replayed_wrongly(
    model: torch.nn.Module, calls: list[str]
) -> None:
    """Each size that the family gets wrong is recorded by itself."""
    pool = model.visual.ln_post
    forward = type(pool).forward

    class Otherwise(type(pool)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x) * (3 if len(x) > 4 else 1)

    pool.__class__ = Otherwise
    model.visual.__dict__["qclip_programs"] = replay.Programs()
    for n in (2, 2, 2, 6, 6, 6, 6):
        wanted = _by_modules(model, IMAGES[:n])
        calls.clear()
        assert torch.equal(model.encode_image(IMAGES[:n]), wanted)
    assert calls == ["program"] and "other numbers" in replay.counts(model.visual)["why"]


@torch.no_grad()
def test_threads_share_a_trace_and_have_workspaces_of_their_own(model: torch.nn.Module) -> None:
    model.visual.__dict__["qclip_programs"] = replay.Programs()
    wanted = {n: _by_modules(model, IMAGES[:n]) for n in (1, 2, 3, 5, 6)}
    wrong, buffers, together = [], set(), threading.Barrier(4)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        together.wait()
        with torch.no_grad():
            for n in draw.choices(list(wanted), k=60):
                if not torch.equal(model.encode_image(IMAGES[:n]), wanted[n]):
                    wrong.append(n)
        buffers.update(program._buffer.data_ptr() for program in replay.programs(model.visual))
        together.wait()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = replay.counts(model.visual)
    assert not wrong and len(buffers) == 4
    assert counts["recorded"] == 1 and counts["derived"] == 4 * len(wanted)
    assert counts["replayed"] + counts["modules"] == 4 * 60


def test_a_float_model_has_none() -> None:
    model = small_clip()
    models.towers(model)
    assert "qclip_programs" not in model.visual.__dict__
    small = qclip.quantize_(model, "w8a8")
    assert "qclip_programs" in small.visual.__dict__
    assert not any("program" in name for name in small.state_dict())
    qclip.dequantize_(small)
    assert "qclip_programs" not in small.visual.__dict__


@pytest.fixture
def graphs(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> EmulatedCuda:
    """The GPU's programs, on the CPU."""
    emulated = EmulatedCuda()
    emulated.install(monkeypatch)
    monkeypatch.setattr(replay, "_free", lambda inputs: ())
    monkeypatch.setattr(replay, "record", lambda function, *inputs, workspace: capture(function, *inputs))
    return emulated


@torch.no_grad()
def test_on_a_gpu_towers_run_from_graphs_and_drop_them_when_something_changes(
    model: torch.nn.Module, graphs: EmulatedCuda
) -> None:
    y = [model.encode_image(IMAGES) for _ in range(3)][-1]
    (program,) = model.visual.qclip_programs.programs
    assert isinstance(program, GraphProgram) and program.describe()["graphs"] == 1
    assert torch.equal(model.encode_image(IMAGES), y)
    assert torch.equal(model.encode_image(IMAGES * 2), _by_modules(model, IMAGES * 2))
    del program
    graphs.log.clear()
    model.visual.ln_post.weight.mul_(2)  # a new version
    doubled = model.encode_image(IMAGES)
    assert not torch.allclose(doubled, y) and "reset" in graphs.log and "replayed on default" not in graphs.log
    assert torch.equal([model.encode_image(IMAGES) for _ in range(2)][-1], doubled)
    seen = []
    handle = model.visual.transformer.resblocks[0].register_forward_hook(lambda *a: seen.append(1))
    assert torch.equal(model.encode_image(IMAGES), doubled) and seen == [1]
    handle.remove()


@torch.no_grad()
def test_where_memory_runs_out_the_modules_run(model: torch.nn.Module, graphs: EmulatedCuda) -> None:
    graphs.fails = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    y = [model.encode_image(IMAGES) for _ in range(4)]
    assert torch.equal(y[0], y[-1]) and not model.visual.qclip_programs.programs
    assert "out of memory" in model.visual.qclip_programs.refused
    assert graphs.log.count("empty cache") == 2  # before the one attempt, and after it


@torch.no_grad()
def test_which_device_and_backend_have_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capturing = torch.device("cuda", 1), False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(replay.dispatch, "backend_for", lambda device: cpu)  # any that is not the reference
    assert replay._recordable(cuda)
    capturing = True  # by whoever captures the whole model: our modules go into that graph
    assert not replay._recordable(cuda)
    capturing = False
    monkeypatch.setattr(replay.dispatch, "backend_for", lambda device: replay.reference)
    assert not replay._recordable(cuda)
    assert not replay._possible((torch.empty(2, device="meta"),))
    assert not replay._possible((IMAGES, torch.empty(2, device="meta")))


def _by_modules(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    programs = model.visual.__dict__.pop("qclip_programs")
    y = model.encode_image(images)
    model.visual.__dict__["qclip_programs"] = programs
    return y
