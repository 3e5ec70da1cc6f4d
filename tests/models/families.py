"""What a model of any family must do, as functions of the model and the calls that embed with it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qclip
from qclip import models, recipes
from qclip.models import replay
from qclip.recipes import Recipe
from qkernels import cpu

Calls = dict[str, Callable[[nn.Module], Tensor]]  # by tower: embeddings [B, E] of some inputs


def recipe(preset: str, calls: Calls) -> Recipe:
    """The preset for the towers that are called."""
    return dataclasses.replace(recipes.parse(preset), towers=tuple(calls))


@torch.no_grad()
def explicit_form_equals(model: nn.Module, calls: Calls, atol: float = 1e-5) -> None:
    """The form computes what the model computed, shares its memory, is described again, and goes away."""
    wants = {name: call(model) for name, call in calls.items()}
    keys = list(model.state_dict())
    with models.explicit_form(model) as towers:
        assert towers.keys() == calls.keys()
        for name, call in calls.items():
            torch.testing.assert_close(call(model), wants[name], rtol=0, atol=atol)
        again = models.towers(model)
        assert [s.name for t in again.values() for s in t] == [s.name for t in towers.values() for s in t]
        assert [type(s.module) for t in towers.values() for s in t if not hasattr(s.module, "weight")] == []
    assert list(model.state_dict()) == keys
    for name, call in calls.items():
        assert torch.equal(call(model), wants[name])


@torch.no_grad()
def sites_are_what_runs(model: nn.Module, calls: Calls, shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Every site is called, sites of one input get it, and rows are counted; `shapes`: samples, and rows of one, by
    tower. -> the sites' names"""
    towers = models.towers(model)
    seen: dict[str, Tensor] = {}
    for tower in towers.values():
        for site in tower:
            site.module.register_forward_pre_hook(lambda _, args, n=site.name: seen.__setitem__(n, args[0]))
    for call in calls.values():
        call(model)
    shared: dict[str, Tensor] = {}
    for name, tower in towers.items():
        samples, rows = shapes[name]
        for site in tower:
            x = seen[site.name]
            first = shared.setdefault(site.shared, x)
            assert first is x or torch.equal(first, x), site.name
            if isinstance(site.module, nn.Linear) and site.rows == tower.tokens:
                assert x.numel() == samples * rows * site.module.in_features, site.name
    return [site.name for tower in towers.values() for site in tower]


@torch.no_grad()
def rows_and_pairs_are_those_that_run(model: nn.Module, calls: Calls, samples: int) -> None:
    """What multiply-accumulates are reckoned from, of towers called with all the positions that they have: each site's
    rows, and the pairs of a query and a key that attention multiplies."""
    seen: dict[object, tuple[torch.Size, torch.Size]] = {}

    def see(module: nn.Module, args: tuple, out: Tensor) -> None:
        seen[module] = args[0].shape, out.shape

    with models.explicit_form(model) as towers:
        for name, call in calls.items():
            modules = dict.fromkeys(site.module for site in towers[name])
            handles = [module.register_forward_hook(see) for module in modules]
            call(model)
            for handle in handles:
                handle.remove()
            for site in towers[name]:
                x, y = seen[site.module]
                channels = 1 if isinstance(site.module, nn.Conv2d) else -1
                assert y.numel() == samples * site.rows * y[channels], site.name
            for block in towers[name].blocks:
                if block.attention is not None:
                    q, k = (seen[block.sites.get(s, block.sites.get(f"pool_{s}")).module][1] for s in "qk")
                    pairs = towers[name].tokens ** 2 if block.pairs is None else block.pairs
                    assert samples * pairs == q.numel() // q[-1] * k[-2], block.name


@torch.no_grad()
def every_preset(model: nn.Module, calls: Calls, calibration: object, names: Iterable[str] | None = None) -> None:
    """All sites of the towers that are called are on kernels (or said to be simulated), embeddings stay near the float
    model's."""
    wants = {name: call(model) for name, call in calls.items()}
    for preset in recipes.presets() if names is None else names:
        done = qclip.quantize(model, recipe(preset, calls), calibration)
        rows = [r for r in qclip.coverage(done).rows if r.kind not in ("attention", "other", "convolution")]
        rows = [row for row in rows if row.site.split(".")[0] in calls]
        assert rows and {row.state for row in rows} <= ({"real"} if preset != "w4a4" else {"real", "simulated"}), preset
        near = 0.99 if preset.startswith(("w8", "w6")) else 0.5 if preset in ("w4a4", "w3.3a8-raana") else 0.85
        for name, call in calls.items():
            got = call(done)
            assert F.cosine_similarity(wants[name], got).min() > near, (preset, name)
            assert not torch.equal(wants[name], got), (preset, name)


@torch.no_grad()
def artifact_gives_the_same_bits(
    model: nn.Module, calls: Calls, folder: Path, preset: str, calibration: object
) -> None:
    done = qclip.quantize(model, recipe(preset, calls), calibration)
    again = qclip.load(qclip.save(done, folder))
    assert type(again).__name__ == type(model).__name__
    for name, call in calls.items():
        assert torch.equal(call(again), call(done)), name
    assert models.config_of(again) == models.config_of(model)


@torch.no_grad()
def programs_give_the_same_bits(
    model: nn.Module, calls: Calls, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> None:
    """Each call is replayed from a program sooner or later, bit by bit what the modules give."""
    if cpu.native is None:
        return
    for dtype in dtypes:
        done = qclip.quantize(model, recipe("w8a8", calls)).to(dtype)
        seen: list[str] = []
        whole = replay.Program.__call__
        with monkeypatch.context() as patch:
            patch.setattr(replay.Program, "__call__", lambda *a: (seen.append("program"), whole(*a))[1])  # noqa: B023
            for name, call in calls.items():
                for _ in range(12):
                    got = call(done)
                assert seen, (name, qclip.program_counts(done))
                patch.setenv("QKERNELS_PROGRAM", "0")
                seen.clear()
                assert torch.equal(call(done), got) and not seen, name
                patch.delenv("QKERNELS_PROGRAM")


@torch.no_grad()
def hooks_see(model: nn.Module, calls: Calls) -> None:
    """Of a quantized model: hooks on blocks and on sites are called, and change no number but by fusion."""
    done = qclip.quantize(model, recipe("w8a8", calls))
    wants = {name: call(done) for name, call in calls.items()}
    seen: list[str] = []
    handles = []
    towers = {name: tower for name, tower in models.towers(done).items() if name in calls}
    for tower in towers.values():
        for block in tower.blocks:
            handles.append(block.module.register_forward_hook(lambda *_, n=block.name: seen.append(n)))
        for site in tower:
            handles.append(site.module.register_forward_hook(lambda *_, n=site.name: seen.append(n)))
    for name, call in calls.items():
        assert F.cosine_similarity(call(done), wants[name]).min() > 0.999
    expected = [b.name for t in towers.values() for b in t.blocks] + [s.name for t in towers.values() for s in t]
    assert sorted(set(seen)) == sorted(expected)
    for handle in handles:
        handle.remove()
    for name, call in calls.items():
        assert torch.equal(call(done), wants[name])


@torch.no_grad()
def works_in_bfloat16(model: nn.Module, calls: Calls) -> None:
    done = qclip.quantize(model, recipe("w8a8", calls))
    wants = {name: call(done) for name, call in calls.items()}
    half = copy.deepcopy(done).to(torch.bfloat16)
    for name, call in calls.items():
        got = call(half)
        assert got.dtype == torch.bfloat16, name
        assert F.cosine_similarity(got.float(), wants[name]).min() > 0.99, name


@torch.no_grad()
def compiles(model: nn.Module, calls: Calls, fullgraph: bool = True) -> None:
    done = qclip.quantize(model, recipe("w8a8", calls))
    for name, call in calls.items():
        want = call(done)
        torch._dynamo.reset()
        got = torch.compile(lambda call=call: call(done), backend="eager", fullgraph=fullgraph)()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5, msg=name)
