"""torchao: INT8 with a scale per row of activations.

Its `torch._int_mm` goes through oneDNN, whose sums saturate without VNNI: held to AVX2 256 products of 127 by 127 gave
32,640 (torch 2.14.1), which is what pairs of unsigned by signed products leave in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..case import Case
from ..processor import TORCH_HELD_BY
from . import Setting


class TorchAO:
    name, needs, held_by = "torchao", ("torchao",), TORCH_HELD_BY

    def settings(self, case: Case) -> Iterator[Setting]:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = case.explicit()  # by itself it leaves packed attention float
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        instructions = torch.backends.cpu.get_cpu_capability()
        yield Setting("INT8 dynamic, eager", case.run(model), exact=False, instructions=instructions)
