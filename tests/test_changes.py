"""Codes stored by how they moved: they come back bit for bit, take less, and what is no such change is refused."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qclip import changes
from qclip.errors import ArtifactError
from qkernels import Int4Weight

FILE = Path("difference.safetensors")


def stored(k: int = 192, group: int = 128, change: float = 0.01) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What is held of a trained layer, the base's weights, and the codes."""
    chance = torch.Generator().manual_seed(k + group)
    weight = torch.randn(48, k, generator=chance) * 0.02
    trained = Int4Weight.quantize(weight + change * 0.02 * torch.randn(48, k, generator=chance), group)
    tensors = {"fc.codes": trained.codes, "fc.scales": trained.scales}
    weights = {"fc.weight": weight}
    held = changes.moved("fc.codes", trained.codes, tensors, weights) | {"fc.scales": trained.scales}
    return held, weights, trained.codes


@pytest.mark.parametrize(("k", "group"), [(192, 128), (192, 64), (192, 192), (100, 32), (64, 64), (33, 33)])
def test_codes_come_back_and_take_less(k: int, group: int) -> None:
    held, weights, codes = stored(k, group)
    assert set(held) == {"fc.codes.moved", "fc.scales"}
    assert torch.equal(changes.whole(held, {}, weights, FILE)["fc.codes"], codes)
    assert held["fc.codes.moved"].numel() < 0.5 * codes.numel()


def test_codes_that_moved_by_any_number_of_steps_come_back() -> None:
    weights = {"fc.weight": torch.linspace(-1, 1, 256).view(4, 64)}
    scales = Int4Weight.quantize(weights["fc.weight"], 64).scales
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    codes[0, :] = 0xFF  # few others, so that they are worth storing so
    codes[1, 3] = 0x0F
    held = changes.moved("fc.codes", codes, {"fc.scales": scales}, weights) | {"fc.scales": scales}
    assert "fc.codes.moved" in held
    assert torch.equal(changes.whole(held, {}, weights, FILE)["fc.codes"], codes)


@pytest.mark.parametrize("without", ["scales", "weight", "symmetry", "likeness", "container"])
def test_what_cannot_be_stored_so_is_stored_as_it_is(without: str) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    made = Int4Weight.quantize(weight, 32)
    tensors, weights, codes = {"fc.codes": made.codes, "fc.scales": made.scales}, {"fc.weight": weight}, made.codes
    if without == "scales":
        del tensors["fc.scales"]
    if without == "weight":
        weights = {}
    if without == "symmetry":
        tensors["fc.zeros"] = torch.zeros_like(made.scales)
    if without == "likeness":
        weights = {"fc.weight": torch.randn(32, 64, generator=torch.Generator().manual_seed(1))}
    if without == "container":
        codes = torch.zeros(32, 64, dtype=torch.int8)
    assert changes.moved("fc.codes", codes, tensors, weights) == {"fc.codes": codes}
    assert set(changes.moved("fc.bias", codes, tensors, weights)) == {"fc.bias"}


def packed(found: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(found)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda held: held.pop("fc.scales"), "is no change of a weight"),
        (lambda held: held.update({"fc.scales": held["fc.scales"][:3]}), "is no change of a weight"),
        (lambda held: held.update({"fc.scales": held["fc.scales"].float()}), "is no change of a weight"),
        (lambda held: held.update({"fc.scales": held["fc.scales"] * torch.nan}), "is no change of a weight"),
        (lambda held: held.update({"fc.codes.moved": torch.zeros(9, dtype=torch.int8)}), "is no change of a weight"),
        (lambda held: held.update({"fc.codes.moved": torch.zeros(9, dtype=torch.uint8)}), "cannot be unpacked"),
        (lambda held: held.update({"fc.codes.moved": held["fc.codes.moved"][:-9]}), "another number of codes"),
        (lambda held: held.update({"fc.codes.moved": packed(bytes(10**7))}), "another number of codes"),
        (lambda held: held.update({"fc.codes.moved": packed(bytes(20))}), "another number of codes"),
        (lambda held: held.update({"fc.codes.moved": packed(bytes(4 + 48 * 96))}), "not those that were stored"),
    ],
)
def test_what_is_no_such_change_is_refused(spoil: Callable[[dict[str, Tensor]], object], told: str) -> None:
    held, weights, _ = stored()
    spoil(held)
    with pytest.raises(ArtifactError, match=re.escape(told)) as caught:
        changes.whole(held, {}, weights, FILE)
    assert "'fc.codes.moved' in 'difference.safetensors'" in str(caught.value)


def test_a_base_that_is_rounded_otherwise_is_noticed() -> None:
    held, weights, _ = stored()
    weights["fc.weight"][3, 5] += 0.5
    with pytest.raises(ArtifactError, match="rounded otherwise here"):
        changes.whole(held, {}, weights, FILE)


def test_floats_beside_codes_are_stored_as_they_are_and_of_a_float_model_rounded() -> None:
    held, _, codes = stored()
    base = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    trained = base + 0.01 * torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    tensors = {"positions": trained, "fc.codes": codes, "fc.scales": held["fc.scales"]}
    assert torch.equal(changes.stored(tensors, {"positions": base}, {})["positions"], trained)
    found = changes.stored({"positions": trained}, {"positions": base}, {})
    assert set(found) == {"positions.difference", "positions.step"}
    assert not torch.equal(changes.whole(found, {"positions": base}, {}, FILE)["positions"], trained)
