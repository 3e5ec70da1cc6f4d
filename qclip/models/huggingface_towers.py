"""The towers of transformers' CLIP and SigLIP models, whole ones and towers alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import huggingface_bert
from .explicit import become, by_name, embedding_site, patch_site, projection_site
from .huggingface_calls import image_features, text_features
from .huggingface_form import ExplicitCausalTower, ExplicitModel, ExplicitTower, blocks_of, pool_of
from .huggingface_kinds import inner, kind_of, nested
from .huggingface_naflex import ExplicitNaflexTower
from .tower import Block, Site, Tower
from .value_path import ValuePath, undefined


def towers(model: Any) -> dict[str, Tower]:
    """The towers of a known model, brought into explicit form in place. Raises ModelError for others."""
    return {name: (_vision if name == "vision" else _text)(model) for name in kind_of(model).towers}


def _vision(model: Any) -> Tower:
    kind = kind_of(model)
    vision = _wrapped(model, "vision", ExplicitNaflexTower if kind.naflex else ExplicitTower)
    patches = vision.embeddings.num_patches
    tokens = patches if kind.naflex else vision.embeddings.num_positions
    blocks = blocks_of("vision", vision.encoder, tokens)
    if not kind.clip and hasattr(vision, "head"):
        blocks.append(pool_of(vision.head, tokens))
    sites = [patch_site("vision", vision.embeddings, "patch_embedding", patches), _of_blocks(blocks)]
    if kind.projected:
        sites.append(projection_site("vision", model, "visual_projection"))
    return Tower("vision", _whole(model, "vision"), blocks, by_name(*sites), tokens, vision)


def _text(model: Any) -> Tower:
    kind = kind_of(model)
    if kind.bert:
        become(model, ExplicitModel)
        return huggingface_bert.text_tower(model, _whole(model, "text"))
    text = _wrapped(model, "text", ExplicitCausalTower if kind.clip else ExplicitTower)
    length = text.embeddings.position_embedding.weight.shape[0]
    blocks = blocks_of("text", text.encoder, length)
    sites = [embedding_site(text.embeddings, "token_embedding", length), _of_blocks(blocks)]
    if kind.projected or not kind.clip:
        sites.append(projection_site("text", *((model, "text_projection") if kind.clip else (text, "head"))))
    return Tower("text", _whole(model, "text"), blocks, by_name(*sites), length, text)


def _of_blocks(blocks: list[Block]) -> list[Site]:
    return [site for block in blocks for site in block.sites.values()]


def _wrapped(model: nn.Module, tower: str, form: type) -> Any:
    """The transformer of a tower in its `form`, and what is around it as `ExplicitModel`s."""
    *around, found = nested(model, tower)
    for whole in around:
        become(whole, ExplicitModel)
    become(found, form)
    return found


def _whole(model: nn.Module, tower: str) -> nn.Module:
    """What encodes: of a model of two towers with projections, a view of one."""
    kind = kind_of(model)
    if len(kind.towers) == 1:
        return model
    return Features(model, tower) if kind.projected else inner(model, tower)  # type: ignore[no-any-return]


def value_path(model: Any, tower: Tower) -> ValuePath:
    """Of CLIP, which pools its class token. Raises ModelError for SigLIP, which pools by attention."""
    if not kind_of(model).clip:
        raise undefined(model, "it pools by attention")
    norm, projection = inner(model, "vision").post_layernorm, getattr(model, "visual_projection", nn.Identity())
    return ValuePath.of(tower.blocks[-1], lambda x: projection(norm(x)))


class Features(nn.Module):
    """One tower of a model with its projection, seen as one module; it owns nothing."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["clip"] = model
        self.tower = name

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True):  # noqa: ANN201
        memo = set() if memo is None else memo
        yield prefix, self
        projection = "visual_projection" if self.tower == "vision" else "text_projection"
        for name in (f"{self.tower}_model", projection):
            below = f"{prefix}.{name}" if prefix else name
            yield from getattr(self.clip, name).named_modules(memo, below, remove_duplicate)

    def forward(self, inputs: Tensor) -> Tensor:
        return (image_features if self.tower == "vision" else text_features)(self.clip, inputs)
