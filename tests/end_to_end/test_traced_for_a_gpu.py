"""A whole quantized tower with fake tensors on "cuda": what a GPU would be asked to do, without one.

No graph break, and nothing read on the host: so that towers can be compiled and captured in CUDA graphs.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import qclip
from qclip import models
from qclip.layers import QuantizedSite
from qkernels import triton

pytestmark = [
    pytest.mark.slow,  # traces ViT-B/32
    pytest.mark.skipif(triton.missing is not None, reason=f"needs triton: {triton.missing}"),
]

BLOCKS = 12


def on_a_gpu(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with fake tensors on "cuda" in place of its own, weights packed for the backend there."""
    for module in model.modules():
        site = module if isinstance(module, QuantizedSite) else None
        if site is not None:
            site.unpack()
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    with mode:
                        fake = fake.to("cuda")
                    group[name] = nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake
        if site is not None:
            with mode:
                site.pack()
            assert site.layout == "rows16"
    return model


Traced = tuple[nn.Module, Tensor, FakeTensorMode]


@functools.cache
def tower(dtype: torch.dtype) -> Traced:
    """The image tower of ViT-B/32 in W8A8, two images, and the mode that their tensors belong to."""
    model = qclip.quantize_(qclip.load_model("ViT-B-32").to(dtype), "w8a8")
    visual = models.towers(model)["vision"].module
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(2, 3, 224, 224, dtype=dtype, device="cuda")
    return on_a_gpu(visual, mode), x, mode


def called(graph: GraphModule) -> Counter[str]:
    """How often each op, function or method is called, by its name."""
    calls = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    return Counter(str(node.target).removesuffix(".default") for node in calls)


def check(ops: Counter[str]) -> None:
    assert ops["qkernels.attention"] == BLOCKS and ops["qkernels.quantize_patches"] == 1
    assert ops["qkernels.layer_norm_quantize"] == 2 * BLOCKS
    assert ops["qkernels.int8_linear"] >= 6 * BLOCKS + 1
    assert ops["qkernels.quantize_per_token"] <= 1  # the projection's input: fc1 writes the codes of fc2
    assert not {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "item", "tolist", "nonzero", "cpu"} & set(ops)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_a_tower_is_one_graph_that_reads_nothing_on_the_host(dtype: torch.dtype) -> None:
    visual, x, mode = tower(dtype)
    with mode:  # in which reading a value raises
        y = visual(x)
        graph = make_fx(visual)(x)
    assert y.shape == (2, 512) and y.device.type == "cuda" and y.dtype == x.dtype
    check(called(graph))
    # Biases and norms of 16 bits are read as they are: a cast of each would be a launch of its own.
    assert called(graph)["aten._to_copy"] == 0
    moved = [n for n in graph.graph.nodes if "device" in n.kwargs and torch.device(n.kwargs["device"]).type != "cuda"]
    assert not moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_attention_and_mlp_hand_over_what_suits_a_gpu(dtype: torch.dtype) -> None:
    """q, k, v in 16 bits also in a float32 model, and fc1's codes in groups of 128 to fc2."""
    visual, x, mode = tower(dtype)
    with mode:
        graph = make_fx(visual)(x).graph
    attention = [n for n in graph.nodes if "qkernels.attention" in str(n.target)]
    assert {n.args[0].meta["val"].dtype for n in attention} == {torch.bfloat16}
    linear = [n for n in graph.nodes if "qkernels.int8_linear" in str(n.target)]
    grouped = [n for n in linear if n.args[1].meta["val"].dim() == 3]
    assert len(grouped) == BLOCKS and {n.args[1].meta["val"].shape[-1] for n in grouped} == {3072 // 128}


@torch.no_grad()
def test_a_tower_compiles_without_a_graph_break() -> None:
    visual, x, mode = tower(torch.float32)
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with mode:
        y = torch.compile(visual, backend=keep, fullgraph=True)(x)
    assert len(graphs) == 1 and y.shape == (2, 512) and y.device.type == "cuda"
    check(called(graphs[0]))
