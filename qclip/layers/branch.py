"""A float side term of a site: a low-rank map beside the codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .fixed import Fixed
from .values import check_finite


class Branch(Fixed):
    """`y += (x' @ down.T) @ up.T` for x' `[..., K]`, the input behind a site's transforms, not quantized: down
    `[rank, K]`, up `[N, rank]`. The codes stand for the rest of the weight.

    Whatever is kept in float beside codes is one: singular vectors (SVDQuant), the mean of all outputs (up is
    constant), input columns (rows of down are unit vectors). Held in float16, each pair of vectors scaled to
    magnitudes alike. Raises ValueError for shapes that do not fit and numbers that float16 does not hold.
    """

    FIXED = ("down", "up")
    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1] or not len(down):
            raise ValueError(f"a branch is [rank, K] and [N, rank], not {tuple(down.shape)} and {tuple(up.shape)}")
        if not down.is_meta and down.dtype != torch.float16:
            down, up = down.detach().float(), up.detach().float()
            high, wide = down.abs().amax(1), up.abs().amax(0)
            factor = torch.where((high > 0) & (wide > 0), (wide / high).sqrt(), 1.0)
            # Contiguous, as a file gives them back: another order in memory is summed in another order.
            down, up = ((down * factor[:, None]).half().contiguous(), (up / factor).half().contiguous())
            if not (down.isfinite().all() and up.isfinite().all()):
                raise ValueError("a branch holds numbers beyond float16")
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    @property
    def rank(self) -> int:
        return len(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def weight(self) -> Tensor:
        """What it adds to the weight of the transformed input: float32 `[N, K]`."""
        return self.up.float() @ self.down.float()

    @classmethod
    def empty(cls, rank: int, n: int, k: int) -> Branch:
        """One without values, on the current default device."""
        return cls(torch.empty(rank, k, dtype=torch.float16), torch.empty(n, rank, dtype=torch.float16))

    def check_tensor(self, attribute: str, tensor: Tensor, what: str, turned: bool = False) -> None:
        """Raises ArtifactError for NaN and Inf; `what` names the tensor."""
        check_finite(tensor, what)

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
