"""Recording and replaying: the same bits as the function, on other data, and refusals."""

import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import Int4Weight, Int8Weight, cpu
from qkernels.recording import Program, UnrecordableError, record

pytestmark = pytest.mark.skipif(cpu.native is None, reason=f"needs the native kernels: {cpu.missing}")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["scalar", "avx2", "avx512vnni"])
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in qkernels.info()["tiers"]:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("QKERNELS_CPU_TIER", request.param)
    assert qkernels.info()["tier"] == request.param
    return request.param


def weight(n: int, k: int, seed: int = 0, bits: int = 8) -> Int8Weight | Int4Weight:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return qkernels.pack(Int8Weight.quantize(w) if bits == 8 else Int4Weight.quantize(w, 32))


def linear(codes: Tensor, scale: Tensor, w: Int8Weight | Int4Weight, **rest) -> Tensor:
    op = qkernels.int8_linear if isinstance(w, Int8Weight) else qkernels.int4_linear
    return op(codes, scale, w, **rest)


class Block:
    """A residual block with everything that a tower's block has."""

    def __init__(self, width: int, bits: int = 8) -> None:
        self.width, self.gamma, self.beta = width, torch.rand(width) + 0.5, torch.randn(width)
        self.q, self.k, self.v, self.out = (weight(width, width, seed, bits) for seed in range(4))
        self.fc1, self.fc2 = weight(3 * width, width, 5, bits), weight(width, 3 * width, 6, bits)
        self.bias = torch.randn(width)

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = qkernels.layer_norm_quantize(x, self.gamma, self.beta, 1e-5)
        q, k, v = (linear(codes, scale, w).unflatten(-1, (2, -1)) for w in (self.q, self.k, self.v))
        y, y_scale = qkernels.attention(q, k, v, out_dynamic=True)
        x = x + linear(y.flatten(-2), y_scale, self.out, bias=self.bias)
        codes, scale = qkernels.layer_norm_quantize(x, self.gamma, self.beta, 1e-5)
        hidden = linear(codes, scale, self.fc1, activation="gelu")
        return x + linear(*qkernels.quantize_per_token(hidden), self.fc2, bias=self.bias)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [32, 90, 128])
def test_blocks_replay_bit_by_bit_on_other_data(tier: str, width: int, bits: int) -> None:
    blocks = [Block(width, bits) for _ in range(3)]

    def tower(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        return x.mean(1)

    torch.manual_seed(0)
    program = record(tower, torch.randn(3, 7, width))
    for _ in range(3):
        x = torch.randn(3, 7, width) * 3
        assert torch.equal(program(x), tower(x))
    said = program.describe()
    assert said["native"] == 3 * 10
    # The first residual adds an input, which has no fixed place; all others moved into the linear op before them.
    assert said["torch"] <= 2


def test_codes_reach_the_vnni_kernels_shifted_and_only_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512vnni" not in qkernels.info()["tiers"]:
        pytest.skip("needs AVX512-VNNI")
    monkeypatch.setenv("QKERNELS_CPU_TIER", "avx512vnni")
    w = weight(20, 24)
    seen = []

    class Tape(type(cpu.native.module.Tape())):  # type: ignore[misc]
        def append(self, name, words):
            names = [p.split()[-1].lstrip("*") for p in cpu.native.module.parameters(name)[0].split(",")]
            seen.append((name, dict(zip(names, words, strict=True))))
            return super().append(name, words)

    monkeypatch.setattr(cpu.native, "Tape", Tape, raising=False)

    def shifted(x: Tensor) -> Tensor:
        return linear(*qkernels.quantize_per_token(x), w)

    def looked_at(x: Tensor) -> Tensor:
        codes, scale = qkernels.quantize_per_token(x)
        return linear(codes, scale, w) + codes.float().sum()

    x = torch.randn(5, 24)
    assert torch.equal(record(shifted, x)(-x), shifted(-x))
    quantize, product = (arguments for _, arguments in seen)
    assert quantize["shift"] == product["x_shifted"] == 1 and quantize["codes_stride"] == product["x_stride"] == 64
    seen.clear()
    assert torch.equal(record(looked_at, x)(-x), looked_at(-x))
    assert [arguments.get("shift", arguments.get("x_shifted")) for _, arguments in seen] == [0, 0]


def test_residuals_stay_apart_where_moving_them_would_change_something() -> None:
    w, x = weight(24, 24), torch.randn(5, 24)

    def used_twice(x: Tensor) -> tuple[Tensor, Tensor]:
        base = x * 2
        y = linear(*qkernels.quantize_per_token(base), w)
        return base + y, y

    def changed_between(x: Tensor) -> Tensor:
        base = x * 2
        y = linear(*qkernels.quantize_per_token(base), w)
        base.mul_(3)
        return base + y

    def scaled(x: Tensor) -> Tensor:
        base = x * 2
        return torch.add(base, linear(*qkernels.quantize_per_token(base), w), alpha=2)

    def half(x: Tensor) -> Tensor:
        base = (x * 2).bfloat16()
        return base + linear(*qkernels.quantize_per_token(base), w, out_dtype=torch.bfloat16)

    for function in (used_twice, changed_between, scaled, half):
        program = record(function, x)
        for a, b in zip([*program(x + 1)], [*function(x + 1)], strict=True):
            assert torch.equal(a, b), function.__name__


def test_input_may_lie_elsewhere_and_results_are_new_tensors() -> None:
    w = weight(24, 24)

    def function(x: Tensor) -> dict[str, Tensor]:
        return {"y": linear(*qkernels.quantize_per_token(x), w), "x": x[1:]}

    long = torch.randn(40, 24)
    program = record(function, long[:5])
    first = program(long[20:25])
    kept = first["y"].clone()
    assert torch.equal(kept, function(long[20:25])["y"])
    assert torch.equal(first["x"], long[21:25])
    program(long[10:15])
    assert torch.equal(first["y"], kept)


def test_results_made_early_outlive_what_follows() -> None:
    w = weight(64, 64)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = linear(*qkernels.quantize_per_token(x), w)
        codes, scale = qkernels.quantize_per_token(first)
        x = linear(codes, scale, w)
        for _ in range(4):
            x = linear(*qkernels.quantize_per_token(x), w)
        return first, codes, scale, x

    x = torch.randn(16, 64)
    program = record(function, x)
    for a, b in zip(program(x * 2 + 1), function(x * 2 + 1), strict=True):
        assert torch.equal(a, b)


def test_nan_and_inf_come_through() -> None:
    w = weight(24, 24)

    def function(x: Tensor) -> Tensor:
        return linear(*qkernels.quantize_per_token(x), w)

    x = torch.randn(5, 24)
    program = record(function, x)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    y = program(x)
    assert torch.equal(y.isnan().any(1), torch.tensor([False, True, False, True, False]))
    assert torch.equal(y.nan_to_num(), function(x).nan_to_num())


def test_constants_are_folded_and_temporaries_share_memory() -> None:
    w = weight(64, 64)
    scale = torch.rand(64)

    def function(x: Tensor) -> Tensor:
        for _ in range(8):
            x = linear(*qkernels.quantize_per_token(x, smooth=1 / scale.double().sqrt().float()), w)
        return x

    x = torch.randn(16, 64)
    program = record(function, x)
    assert program.describe()["torch"] == 0
    assert program.describe()["pieces"] == 1
    assert program.workspace_bytes < 4 * x.numel() * x.element_size()
    assert torch.equal(program(x + 1), function(x + 1))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x + torch.rand(3), "random"),
        (lambda x: x * float(x.sum()), "reads numbers"),
        (lambda x: x[x > 0], "reads numbers"),
        (lambda x: x.mul_(2), "changes a tensor that is not its own"),
        (lambda x: x.to_sparse(), "no plain one|reads numbers"),
    ],
)
def test_what_cannot_be_replayed_is_refused(function, why: str) -> None:
    with pytest.raises(UnrecordableError, match=why):
        record(function, torch.randn(3))


def test_gradients_are_refused() -> None:
    with torch.enable_grad(), pytest.raises(UnrecordableError, match="gradients"):
        record(lambda x: x + 1, torch.randn(3))


def test_memory_that_was_freed_and_taken_again_is_told_apart() -> None:
    """Temporaries of a recording are freed as they go, so that addresses come back with other contents."""
    w = weight(32, 32)

    def function(x: Tensor) -> Tensor:
        total = x * 0
        for i in range(6):
            y = torch.empty_like(x).copy_(x)
            y = linear(*qkernels.quantize_per_token(y * i), w)
            total = total + y
            del y
        return total

    x = torch.randn(33, 32)
    assert torch.equal(record(function, x)(-2 * x), function(-2 * x))


def test_a_program_says_what_it_holds() -> None:
    program = record(lambda x: x + 1, torch.randn(3))
    assert isinstance(program, Program)
    assert program.describe() == {"native": 0, "pieces": 0, "torch": 1, "workspace_bytes": 64}


def test_inputs_that_share_memory_when_recorded_need_not_later() -> None:
    w, both = weight(32, 64), torch.randn(2, 5, 64)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return linear(*qkernels.quantize_per_token(x), w) - linear(*qkernels.quantize_per_token(y * 2), w)

    for inputs in ((both[0], both[1]), (both[0], both[0])):
        program = record(function, *inputs)
        x, y = torch.randn(5, 64), torch.randn(5, 64)
        assert torch.equal(program(*inputs), function(*inputs))
        assert torch.equal(program(x, y), function(x, y))
        assert torch.equal(program(y, y), function(y, y))


@pytest.mark.parametrize("part", [slice(0, 5), slice(1, 6)])
def test_a_part_of_a_product_is_added_as_it_was(part: slice) -> None:
    w = weight(64, 64)

    def function(x: Tensor) -> Tensor:
        x = x * 2
        return x[:5] + linear(*qkernels.quantize_per_token(x), w)[part]

    program = record(function, torch.randn(6, 64))
    x = torch.randn(6, 64)
    assert torch.equal(program(x), function(x))


def test_a_forked_process_leaves_the_pages_that_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that it shares with its parent would be copied into huge pages of its own."""
    asked = []
    monkeypatch.setattr(cpu.native.module, "use_huge_pages", asked.append)
    x, w = torch.randn(6, 64), weight(64, 64)

    def function(x: Tensor) -> Tensor:
        return linear(*qkernels.quantize_per_token(x), w)

    record(function, x)
    assert len(asked) == 2  # the weights, the workspace
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert torch.equal(record(function, x)(x), function(x))
    assert len(asked) == 2


def test_batch_norm_is_replayed_which_gives_tensors_without_elements_too() -> None:
    norm = torch.nn.BatchNorm2d(5).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, other = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 4, 3)
    program = record(lambda x: norm(x * 2).relu(), x)
    assert torch.equal(program(other), norm(other * 2).relu())
