"""A model of a known family in which one module is of another class: refused by its name, and left as it was."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from torch import Tensor, nn

import qclip
from qclip import models
from qclip.errors import ModelError

from .architectures import COCA, OPEN_CLIP
from .test_every_family import sample

#: By family: classes of its modules.
PARTS = {
    "eva": ("EvaBlock", "Mlp"),
    "eva02": ("EvaBlock", "EvaAttention|AttentionRope", "SwiGLU"),
    "eva02_packed": ("GluMlp",),
    "eva_post_norm": ("EvaBlockPostNorm",),
    "pe": ("EvaBlock", "AttentionPoolLatent"),
    "vitamin": ("Block", "Attention", "GeGluMlp"),
    "fastvit": ("AttentionBlock", "Attention", "RepMixerBlock", "ConvMlp"),
    "relpos": ("RelPosBlock", "RelPosAttention", "Mlp"),
    "swin": ("SwinTransformerBlock", "WindowAttention", "PatchMerging", "Mlp"),
    "roberta": ("RobertaLayer", "RobertaSelfAttention", "RobertaSelfOutput", "RobertaIntermediate", "RobertaOutput"),
    "xlm-roberta": ("XLMRobertaLayer", "XLMRobertaSelfAttention", "XLMRobertaIntermediate", "MeanPooler"),
    "bert": ("BertLayer", "BertSelfAttention", "BertOutput"),
    "m2m_100": ("M2M100EncoderLayer", "M2M100Attention", "ClsPooler"),
    "mt5": ("MT5Block", "MT5LayerSelfAttention", "MT5Attention", "MT5LayerFF", "MT5DenseGatedActDense"),
    "CLIPVisionModelWithProjection": ("CLIPEncoderLayer", "CLIPAttention", "CLIPMLP"),
    "CLIPTextModel": ("CLIPEncoderLayer", "CLIPAttention", "CLIPMLP"),
    "SiglipVisionModel": ("SiglipEncoderLayer", "SiglipAttention", "SiglipMLP", "SiglipMultiheadAttentionPoolingHead"),
    "Siglip2Model": ("Siglip2EncoderLayer", "Siglip2Attention", "Siglip2MultiheadAttentionPoolingHead"),
    "AltCLIPModel": ("AltCLIPEncoderLayer", "AltRobertaLayer", "AltRobertaSelfAttention"),
    "ChineseCLIPModel": ("ChineseCLIPVisionLayer", "ChineseCLIPTextLayer", "ChineseCLIPTextIntermediate"),
}


class Other(nn.Module):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


class Same(nn.Module):
    """Holds what the module held, but computes something else."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(held.__dict__)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def is_refused(model: nn.Module, name: str, why: str) -> None:
    before = [(module, type(module)) for module in model.modules()]
    with pytest.raises(ModelError, match=f"^{re.escape(name)}: .*{why}"):
        qclip.quantize_(model, "w8a8")
    assert [(module, type(module)) for module in model.modules()] == before


@pytest.mark.parametrize("put", [Other, Same])
@pytest.mark.parametrize(("family", "part"), [(family, part) for family, parts in PARTS.items() for part in parts])
def test_the_module_that_differs_is_named(family: str, part: str, put: type) -> None:
    model = copy.deepcopy(sample(family).model)
    kinds = {name: {kind.__name__ for kind in type(module).__mro__} for name, module in model.named_modules()}
    name = [name for name, classes in kinds.items() if classes & set(part.split("|"))][-1]
    old = model.get_submodule(name)
    model.set_submodule(name, put(old) if put is Same else put())
    is_refused(model, name, rf"test_almost_known\.{put.__name__} is not supported")


#: Family, a module in it, what is put there, what is said.
OTHERS: dict[str, tuple[str, str, nn.Module, str]] = {
    "an activation": ("relpos", "visual.trunk.blocks.1.mlp.act", nn.Tanh(), "activation .*Tanh is not supported"),
    "a convolution": (
        "fastvit",
        "visual.trunk.stages.1.blocks.0.mlp.fc1",
        nn.Conv2d(16, 48, 3, padding=1),
        "Conv2d is not supported: it is no 1x1 convolution",
    ),
    "a projection": ("mt5", "text.proj", nn.Sequential(nn.Linear(32, 24)), "a projection of 1 layers"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_parts_that_are_told_by_more_than_their_class(what: str) -> None:
    family, name, put, why = OTHERS[what]
    model = copy.deepcopy(sample(family).model)
    model.set_submodule(name, put)
    is_refused(model, name, why)


def test_a_pool_of_another_class() -> None:
    model = OPEN_CLIP["coca"]().eval()
    assert COCA["vision_cfg"]["attentional_pool"]
    model.visual.attn_pool = Same(model.visual.attn_pool)
    is_refused(model, "visual.attn_pool", r"test_almost_known\.Same is not supported")


def test_a_module_that_lacks_what_its_class_has() -> None:
    model = copy.deepcopy(sample("relpos").model)
    del model.visual.trunk.blocks[1].mlp.fc2
    is_refused(model, "visual.trunk.blocks.1.mlp", "Mlp is not supported: it has no 'fc2'")


def test_descriptions_say_it_too() -> None:
    model = copy.deepcopy(sample("mt5").model)
    del model.qclip_config
    model.text.pooler = Other()
    with pytest.raises(ModelError, match=r"^text\.pooler: .*Other is not supported"):
        models.config_of(model)


def test_a_model_that_is_not_known_at_all_has_no_name_in_itself() -> None:
    with pytest.raises(ModelError, match=r"^torch.*Linear is not supported"):
        qclip.quantize_(nn.Linear(2, 2), "w8a8")
