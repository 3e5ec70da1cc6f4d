"""A lookup table in row-wise INT8: rows are dequantized after they are looked up."""

from __future__ import annotations

from torch import Tensor

from .site import QuantizedSite


class QuantizedEmbedding(QuantizedSite):
    """Token ids `[...]` -> float `[..., width]` of the compute dtype. One scale a row; never packed."""

    def pack(self) -> None:
        """Stays canonical: rows are gathered, not multiplied."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.codes[tokens].float() * self.scales[tokens].unsqueeze(-1)
        return rows.to(self.witness.dtype)
