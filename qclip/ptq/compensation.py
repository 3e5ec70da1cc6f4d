"""Rounding column by column, each error passed on to the columns that are still to come (GPTQ, arXiv 2210.17323).

With H = 2/n sum x xT of the inputs and D = W - Q, rounding moves outputs by tr(D H DT), in squares. Columns are
rounded in a fixed order; what a column errs by is made good, as far as possible, by those behind it. All that this
takes of H is U, upper triangular with UT U = H^-1: e = (w_i - q_i) / U_ii, w_j -= e U_ij for j > i, and the sum of all
e^2 is tr(D H DT) of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qkernels import weights
from qkernels.grids import Grid
from qkernels.weights import Weight

LEAST = 1e-4  # damping, as a share of mean diag H, that is tried after none


@dataclasses.dataclass(frozen=True)
class Factor:
    """`upper` `[K, K]`: U of a damped H, whose columns are in `order` (None: as they come)."""

    upper: Tensor
    order: Tensor | None
    damp: float  # what was needed, as a share of mean diag H

    @staticmethod
    def of(hessian: Tensor, damp: float = 0.01, sort: bool = False) -> Factor:
        """`hessian` float `[K, K]`, `damp` x mean diag H is added to its diagonal, ten times more where that leaves it
        indefinite. `sort`: columns of large diagonal first. A channel that never saw anything is only damped, so that
        it is rounded to nearest. Raises ValueError where H is not finite."""
        h = hessian.double()
        if not h.isfinite().all():
            raise ValueError("its inputs are NaN or infinite, or too large for their squares")
        order = h.diagonal().argsort(descending=True, stable=True) if sort else None
        if order is not None:
            h = h[order][:, order]
        mean = float(h.diagonal().mean()) or 1.0  # inputs that are all 0: every rounding is as good
        eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
        while True:
            # H = R RT with R upper triangular is a Cholesky factor of H turned around, and U = R^-1.
            turned, failed = torch.linalg.cholesky_ex((h + damp * mean * eye).flip(0, 1))
            if not failed and bool((turned.diagonal() > 0).all()):
                return Factor(torch.linalg.solve_triangular(turned.flip(0, 1), eye, upper=True), order, damp)
            damp = max(10 * damp, LEAST)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A weight, and tr(D H DT) of it by the damped H."""

    weight: Weight
    loss: float


Fit = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def round_columns(weight: Tensor, factor: Factor, grid: Grid, fit: Fit | None = None, block: int = 128) -> Rounded:
    """Float `[N, K]` on `grid`, with the scales and zeros `[N, groups]` that `fit` (None: `grid.fit`) finds: for all of
    it where columns were sorted, so that each keeps the group in which it lies; else for each group as it is when its
    first column is rounded. Errors go at once to the columns of a `block`, to those behind it when it is done. Raises
    ValueError on scales that no container holds."""
    fit = grid.fit if fit is None else fit
    n, k = weight.shape
    group = k if grid.group is None else min(grid.group, k)
    block = -(-block // group) * group if factor.order is None and grid.group is not None else block
    scales, zeros = fit(weight)
    weights.quantize_weight(weight, grid, scales, zeros)  # refuses what cannot be held
    refits = factor.order is None and group < k
    order = torch.arange(k, device=weight.device) if factor.order is None else factor.order
    columns = weight.T[order].contiguous()  # [K, N]: a column is a row
    upper = factor.upper.to(weight.dtype)
    # One part of a scale per column, so that none is looked up in the loop.
    by_group = [None if part is None else part.T.contiguous() for part in (scales, zeros)]
    codes, loss = torch.empty_like(columns), 0.0
    for start in range(0, k, block):
        end = min(start + block, k)
        part, within = columns[start:end], upper[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            at = int(order[start + i]) // group
            if refits and (start + i) % group == 0:
                found = fit(part[i : i + group].T)
                for kept, new in zip(by_group, found, strict=True):
                    if kept is not None and new is not None:
                        kept[at] = new[:, 0]
            scale, zero = (None if kept is None else kept[at] for kept in by_group)
            assert scale is not None
            codes[start + i] = grid.encode(part[i], scale, zero)
            errors[i] = (part[i] - grid.decode(codes[start + i], scale, zero)) / within[i, i]
            part[i + 1 :].addr_(within[i, i + 1 :], errors[i], alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        loss += float(errors.square().sum())
    back = torch.empty_like(codes)
    back[order] = codes
    scales, zeros = (None if kept is None else kept.T for kept in by_group)
    assert scales is not None
    return Rounded(weights.weight_from_codes(back.T, grid, scales, zeros), loss)
