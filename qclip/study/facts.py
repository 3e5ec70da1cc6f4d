"""What the values of a plan's cells depend on and only a look at models and images tells, as hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qclip import artifact, models, ptq, zoo
from qclip import data as qdata
from qclip.data import ImageSet
from qclip.errors import InputError
from qclip.reliability.keys import model_fingerprint, preprocess_fingerprint, runtime
from qclip.rewrite import quantization, weight_hash
from qclip.store import key_of

from .plan import Plan
from .variants import expanded

STAGES = {"model": 1, "set": 1, "variant": 1, "condition": 1, "quantize": 1}  # raise where what they mean changes


@dataclasses.dataclass(frozen=True)
class Facts:
    """Hashes by the name that the plan uses, and of each model its bytes and whether it is quantized already."""

    models: dict[str, str]
    sets: dict[str, str]
    artifacts: dict[str, str]
    quantized: frozenset[str] = frozenset()
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    images: dict[str, int] = dataclasses.field(default_factory=dict)  # in each set
    refused: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # by model: recipe's hash -> why
    strange: dict[str, str] = dataclasses.field(default_factory=dict)  # by artifact of other weights: their name

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with a checksum."""
        content = dataclasses.asdict(self) | {"quantized": sorted(self.quantized)}
        return content | {"sha256": _sum(content)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Facts:
        """Raises ValueError, TypeError or KeyError where it is not what `to_dict` gave."""
        plain = {name: value for name, value in content.items() if name != "sha256"}
        now = _sum(plain)
        if content.get("sha256", now) != now:  # older stores have none
            raise ValueError("its content does not fit its checksum")
        return cls(**{**plain, "quantized": frozenset(plain["quantized"])})


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def look(plan: Plan, device: str = "cpu", progress: Callable[[str], None] = lambda _: None) -> Facts:
    """Loads every model and set of the plan once, one after the other. Raises InputError with the line."""
    found: dict[str, str] = {}
    quantized, sizes, refused, sources = set(), {}, {}, {}
    for name in plan.models:
        progress(f"looking at {name}")
        try:
            model = zoo.load_model(name, device)
            found[name] = model_key(model)
            if dict(plan.artifacts).get(name):
                with models.explicit_form(model):
                    sources[name] = weight_hash(model)
            if quantization(model) is None:
                refused[name] = ptq.refusals(model, expanded(plan, name)[0])
        except InputError as why:
            raise plan.refusal(why, "", "models", name) from None
        sizes[name] = sum(each.numel() * each.element_size() for each in model.state_dict().values())
        if quantization(model) is not None:
            quantized.add(name)
    sets, images = {}, {}
    names = [name for model in plan.models for name in plan.calibrated_on(model)]
    names += [name for each in plan.sets for name in each.names()]
    for name in dict.fromkeys(names):
        progress(f"looking at {name}")
        try:
            data = qdata.load(name)
        except InputError as why:
            raise plan.refusal_of(name, why) from None
        sets[name], images[name] = set_key(data), len(data)
    folders, strange = {}, {}
    for model, listed in plan.artifacts:
        for folder in listed:
            try:
                content = artifact.read_description(folder)
            except InputError as why:
                raise plan.refusal(why, "artifacts", model, folder) from None
            folders[folder] = artifact.description_hash(content)
            if content["provenance"].get("source_sha256") != sources[model]:  # as `qclip verify` asks
                strange[folder] = content["source"]
    return Facts(found, sets, folders, frozenset(quantized), sizes, images, refused, strange)


def model_key(model: nn.Module) -> str:
    """Of all that a float model does with images and texts: weights, logit scale and bias, what feeds them."""
    encoders = models.encoders(model)
    tokens = None if encoders.tokenizer is None else encoders.tokenizer(["a photo of a red Zebra, 7 of them"])
    return key_of(
        "model",
        STAGES["model"],
        weights=model_fingerprint(model),
        scale=encoders.logit_scale,
        bias=encoders.logit_bias,
        pixels=None if encoders.preprocess is None else preprocess_fingerprint(encoders.preprocess),
        tokens=None if not isinstance(tokens, torch.Tensor) else tokens.tolist(),
    )


def set_key(data: ImageSet) -> str:
    """Of the images, and of what is known of them."""
    known = hashlib.sha256()
    arrays = {"labels": data.labels, "counts": data.counts, **data.groups}
    for name, values in arrays.items():
        if values is not None:
            known.update(f"{name} {values.dtype} {values.shape} {values.tolist()}".encode())
    return key_of(
        "set",
        STAGES["set"],
        name=data.name,
        images=data.digest,
        known=known.hexdigest(),
        classes=data.classes,
        captions=data.captions,
        prompts=data.prompts,
        own=data.own_classes,
    )


def runtime_of(device: str, threads: int, batch: int) -> dict[str, Any]:
    """What beside a cell's definition decides the last bits of its values."""
    return runtime(torch.device(device)) | {"threads": threads, "batch": batch}


def runtime_key(facts: dict[str, Any]) -> str:
    return key_of("runtime", 1, **facts)[:16]
