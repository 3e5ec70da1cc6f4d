"""What a killed quantization goes on from: after each block the states of its sites, kept in a store until the run is
over.

Entries are found by content: weights, recipe, calibration samples, seed, versions, and all that was decided when the
step began. So nothing that is found under a key was made for something else, and a run that differs in any of these
starts from its beginning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkernels import Int4Weight, Int8Weight
from qkernels.weights import Weight, levels

from .. import typed
from ..errors import ArtifactError, RecipeError
from ..layers import transforms as site_transforms
from ..layers.transforms import Transform
from ..recipes import Treatment
from ..store import Entry, Store, key_of
from .base import SiteState

VERSION = 1  # of what entries mean
_FIELDS = [field.name for field in dataclasses.fields(SiteState) if field.name not in ("site", "source")]


class Resumption:
    """What is kept of one run. `made_of`: all that the result depends on, as JSON."""

    def __init__(self, store: Store, made_of: dict[str, Any]) -> None:
        self._store, self._made_of = store, made_of
        self._keys: list[str] = []
        self._began: dict[str, Any] = {}
        self._keeps = False

    def begin(self, step: int, states: Mapping[str, SiteState]) -> None:
        """Of a step of the recipe: from now on its blocks are asked for and kept."""
        self._began = {"step": step}
        self._keeps = self._store.folder is not None
        if self._keeps:
            try:
                self._began["states"] = _digest(_encoded(states))
            except TypeError as why:
                self._keeps = False
                warnings.warn(f"nothing is kept for a run that goes on ({why})", stacklevel=2)

    def find(self, block: str, states: Mapping[str, SiteState], notes: dict) -> bool:
        """Bring states, by site name, and notes to where they were when the block was done; whether that is known."""
        if not self._keeps:
            return False
        found: list[dict[str, dict]] = []

        def check(entry: Entry) -> str:
            try:
                if not isinstance(entry.facts["notes"], dict):
                    raise ValueError("its notes are no object")
                found.append(_decoded(entry, states))
            except (ValueError, KeyError, TypeError, IndexError, ArtifactError, RecipeError) as why:
                return f"{type(why).__name__}: {why}"
            return ""

        entry = self._store.open(self._key(block), check)
        if entry is None:
            return False
        for name, values in found[0].items():
            for field, value in values.items():
                if not _equal(value, getattr(states[name], field)):  # what another step decided stays the same object
                    setattr(states[name], field, value)
        notes.update(entry.facts["notes"])
        return True

    def keep(self, block: str, states: Mapping[str, SiteState], notes: dict) -> None:
        if not self._keeps:
            return
        try:
            entry = _encoded(states)
            json.dumps(notes)
        except TypeError as why:
            warnings.warn(f"{block} is not kept for a run that goes on ({why})", stacklevel=2)
            return
        self._store.write(self._key(block), dataclasses.replace(entry, facts={**entry.facts, "notes": notes}))

    def forget(self) -> None:
        """The run is over: nothing is left behind."""
        for key in self._keys:
            self._store.remove(key)
        self._keys.clear()

    def _key(self, block: str) -> str:
        key = key_of("quantize", VERSION, block=block, **self._began, **self._made_of)
        if key not in self._keys:
            self._keys.append(key)
        return key


def _digest(entry: Entry) -> str:
    digest = hashlib.sha256(json.dumps(entry.facts, sort_keys=True).encode())
    for name in sorted(entry.arrays):
        digest.update(f"{name}:{entry.arrays[name].dtype}:{entry.arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(entry.arrays[name]).tobytes())
    return digest.hexdigest()


# -- states as arrays and JSON, and back -------------------------------------------------------------------------------


def _encoded(states: Mapping[str, SiteState]) -> Entry:
    """Raises TypeError where a state holds something that nobody has said how to keep."""
    arrays: dict[str, np.ndarray] = {}
    known: list[Transform] = []  # sites that share an input share these

    def put(name: str, tensor: Tensor) -> str:
        held = tensor.detach().cpu()
        arrays[name] = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
        return str(tensor.dtype).removeprefix("torch.")

    def written(name: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return put(name, value)
        if isinstance(value, Treatment):
            return dataclasses.asdict(value)
        if isinstance(value, Int8Weight | Int4Weight):
            weight = value.canonical()
            for part in ("codes", "scales", "zeros"):
                if getattr(weight, part, None) is not None:
                    put(f"{name}.{part}", getattr(weight, part))
            return {"class": type(weight).__name__, "group": getattr(weight, "group", None)}
        if isinstance(value, list) and all(isinstance(each, Transform) for each in value):
            for each in value:
                if not any(each is other for other in known):
                    known.append(each)
            return [next(i for i, other in enumerate(known) if other is each) for each in value]
        raise TypeError(f"a {type(value).__name__} of a state has no form that a file can hold")

    sites = {
        site: {field: written(f"{site}.{field}", getattr(state, field)) for field in _FIELDS}
        for site, state in states.items()
    }
    for i, each in enumerate(known):
        for name in each.FIXED:
            put(f"transform.{i}.{name}", getattr(each, name))
    return Entry(arrays, {"sites": sites, "transforms": [each.facts() for each in known]})


def _decoded(entry: Entry, states: Mapping[str, SiteState]) -> dict[str, dict[str, Any]]:
    """The values of the states' fields, by site name. Raises ValueError, KeyError, TypeError, IndexError, ArtifactError
    or RecipeError where the entry does not hold what states of these sites can be."""
    facts, sites = entry.facts, entry.facts["sites"]
    if sites.keys() != states.keys():
        raise ValueError("it is of other sites")
    widths = {i: states[site].float_weight().shape[1] for site in sites for i in sites[site]["transforms"]}
    devices = {site: state.source.weight.device for site, state in states.items()}  # type: ignore[union-attr]
    made = [_transform(i, each, widths[i], entry) for i, each in enumerate(facts["transforms"])]
    out = {}
    for site, state in states.items():
        n, k = state.float_weight().shape
        given = sites[site]
        plan = typed.from_dict(Treatment, given["plan"], "plan", RecipeError)
        values: dict[str, Any] = {"plan": plan, "transforms": [made[i] for i in given["transforms"]]}
        for field, shape in (("input_scale", ()), ("input_zero", ()), ("bias", (n,))):
            values[field] = None if given[field] is None else _tensor(entry, f"{site}.{field}", shape, given[field])
        values["weight"] = None if given["weight"] is None else _weight(entry, site, given["weight"], plan, (n, k))
        if rest := set(_FIELDS) - values.keys():
            for field in rest:
                if given[field] is not None:
                    raise ValueError(f"{field} cannot be read")
                values[field] = None
        out[site] = {field: _moved(value, devices[site]) for field, value in values.items()}
    return out


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return site_transforms.same(a, b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (isinstance(a, Treatment) and a == b)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Int8Weight | Int4Weight):
        parts = {name: getattr(value, name, None) for name in ("codes", "scales", "zeros")}
        return dataclasses.replace(value, **{name: part.to(device) for name, part in parts.items() if part is not None})
    if isinstance(value, list):
        return [each.to(device) for each in value]
    return value


def _tensor(entry: Entry, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    tensor = torch.from_numpy(entry.arrays[name].copy())
    if shape == () and tensor.numel() == 1:  # the store's arrays have an axis at least
        tensor = tensor.reshape(())
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {shape}")
    if dtype not in ("float32", "float16", "bfloat16", "float64", "int32") or not tensor.isfinite().all():
        raise ValueError(f"{name} does not hold finite numbers of a known type")
    return tensor.to(getattr(torch, dtype))


def _weight(entry: Entry, site: str, given: dict, plan: Treatment, shape: tuple[int, int]) -> Weight:
    n, k = shape
    name, group = f"{site}.weight", given["group"]
    codes = torch.from_numpy(entry.arrays[f"{name}.codes"].copy())
    weight: Weight
    if given["class"] == "Int8Weight":
        weight = Int8Weight(codes, _tensor(entry, f"{name}.scales", (n,), "float32"), shape)
        fits = codes.dtype == torch.int8 and tuple(codes.shape) == shape
    else:
        if group != (k if plan.grid.group is None else min(plan.grid.group, k)):
            raise ValueError(f"{name} has groups of {group}")
        groups = (n, -(-k // group))
        scales = _tensor(entry, f"{name}.scales", groups, "float16")
        zeros = f"{name}.zeros"
        weight = Int4Weight(
            codes, scales, _tensor(entry, zeros, groups, "float16") if zeros in entry.arrays else None, shape, group
        )
        fits = codes.dtype == torch.uint8 and tuple(codes.shape) == (n, -(-k // 2))
    if not fits:
        raise ValueError(f"{name} has codes of another type or shape")
    levels(weight, plan.grid)  # raises where a code is outside the grid
    return weight


def _transform(i: int, facts: dict, width: int, entry: Entry) -> Transform:
    site_transforms.check(facts, f"transforms[{i}]")
    made = site_transforms.from_facts(facts, width)
    for name in made.FIXED:
        tensor = _tensor(entry, f"transform.{i}.{name}", tuple(getattr(made, name).shape), "float32")
        made.check_tensor(name, tensor, f"{name} of transforms[{i}]")
        setattr(made, name, tensor)
    return made
