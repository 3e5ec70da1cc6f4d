"""A lookup table in row-wise INT8: rows are dequantized after they are looked up."""

from __future__ import annotations

from torch import Tensor, nn

from qkernels import Int8Weight

from .site import Description, QuantizedSite


class QuantizedEmbedding(QuantizedSite):
    """Token ids `[...]` -> float `[..., width]` of the compute dtype. One scale per row; never packed."""

    STANDS_FOR = (nn.Embedding,)
    CONTAINERS = (Int8Weight,)
    packs = False

    def describe(self) -> Description:
        return Description(self.shape, "real", self.grid.bits, None, stored_bits=self.stored_bits)

    def dequantized(self) -> nn.Module:
        weight = self.dequantized_weight().to(self.witness.dtype)
        return nn.Embedding(*self.shape, _weight=weight).train(self.training)

    def pack(self) -> None:
        """Stays canonical: rows are gathered, not multiplied."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.codes[tokens].float() * self.scales[tokens].unsqueeze(-1)
        return rows.to(self.witness.dtype)
