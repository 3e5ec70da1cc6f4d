"""Hadamard matrices of small order by Paley's constructions, and which widths a transform can have.

A transform of width n = m * 2^k is `H_m (x) S_(2^k) / sqrt(n)` with Sylvester's matrix S. The base order m is 1 for a
power of two, else the smallest multiple of 4 with the same odd part as n for which a prime q gives a matrix: q = m -
1 = 3 mod 4 (Paley I: 12, 20, 44, 60, ...) or q = m / 2 - 1 = 1 mod 4 (Paley II: 28, 36, 76, ...). Paley I matrices
are not symmetric.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_BASE = 256  # the base order is multiplied densely: m additions an element


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % p for p in range(2, int(q**0.5) + 1))


def _prime_of(order: int) -> int | None:
    """The prime whose quadratic residues make a Hadamard matrix of this order, if there is one."""
    for q, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == residue and _is_prime(q):
            return q
    return None


def base_order(width: int) -> int | None:
    """The m of `width = m * 2^k`, or None where no transform of that width is known here."""
    if width < 1:
        return None
    odd = width
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return 1
    order = 4 * odd
    while order <= min(width, MAX_BASE):
        if width % order == 0 and _prime_of(order) is not None:
            return order
        order *= 2
    return None


@cache
def base_matrix(order: int) -> Tensor:
    """The int8 matrix of +-1, `[order, order]`, with rows orthogonal: `H H^T = order * I`. `order` comes from
    `base_order`."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    q = _prime_of(order)
    assert q is not None
    residues = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in residues else -1 for i in range(1, q)], dtype=torch.int8)
    index = torch.arange(q)
    jacobsthal = chi[(index[:, None] - index[None, :]) % q]
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if q % 4 == 3 else 1
    bordered[1:, 1:] = jacobsthal
    if q % 4 == 3:  # skew: S + I
        return bordered + torch.eye(q + 1, dtype=torch.int8)
    one, zero = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(bordered, one) + torch.kron(torch.eye(q + 1, dtype=torch.int8), zero)
