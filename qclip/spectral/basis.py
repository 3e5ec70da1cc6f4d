"""Singular vectors of a float weight, and what another weight is on them (docs/methods.md, Spectra)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from .bands import bands

EMPTY = 1e-24  # share of the energy below which a band of a float64 SVD is rounding noise


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of sigma / sum sigma (Roy & Vetterli 2007); r for the identity, 1 for rank one."""
    share = singular / singular.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def stable_rank(singular: Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm."""
    return float((singular**2).sum() / singular.max() ** 2)


def band_energy(singular: Tensor) -> dict[str, float]:
    """Share of the squared singular values in each band."""
    energy = singular**2
    return {name: float(energy[part].sum() / energy.sum()) for name, part in bands(len(singular)).items()}


def band_gaps(singular: Tensor) -> dict[str, float]:
    """How far each band but the last is set off from the next: (sigma_last - sigma_next) / sigma_last. Vectors on both
    sides of a small gap turn into each other under any perturbation."""
    edges = {name: part.stop for name, part in bands(len(singular)).items() if part.stop < len(singular)}
    return {
        name: float(1 - singular[end] / singular[end - 1])
        for name, end in edges.items()
        if float(singular[end - 1]) > 0
    }


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """A weight's singular values s `[r]` and the singular vectors of its shorter side `[r, r]`, float64, from the
    eigenvectors of its Gram matrix: half the time of an SVD, with singular values right to 1e-8 of the largest."""

    s: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Spectrum:
        weight = weight.double()
        gram = weight.mT @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.mT
        values, vectors = torch.linalg.eigh(gram)
        return cls(values.flip(0).clamp(min=0).sqrt(), vectors.flip(1))


@dataclasses.dataclass(frozen=True)
class Basis:
    """Singular vectors of a weight `[N, K]`: u `[N, r]`, s `[r]`, v `[K, r]`, float64."""

    u: Tensor
    s: Tensor
    v: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Basis:
        weight = weight.double()
        if weight.shape[0] < weight.shape[1]:
            turned = cls.of(weight.mT)
            return cls(turned.v, turned.s, turned.u)
        if weight.shape[0] == weight.shape[1]:
            u, s, vh = torch.linalg.svd(weight)
            return cls(u, s, vh.mT)
        q, r = torch.linalg.qr(weight)  # a third of the time for the four-to-one matrices of an MLP
        u, s, vh = torch.linalg.svd(r)
        return cls(q @ u, s, vh.mT)

    @functools.cached_property
    def energy(self) -> dict[str, float]:
        """Sum of sigma^2 of each band that holds any: a weight of lower rank has nothing there that could be damped."""
        whole = float((self.s**2).sum())
        found = {name: float((self.s[part] ** 2).sum()) for name, part in bands(len(self.s)).items()}
        return {name: value for name, value in found.items() if value > EMPTY * whole}

    @functools.cached_property
    def parts(self) -> dict[str, Tensor]:
        """The weight's part in each band of `energy`, flat, float32."""
        ranks = bands(len(self.s))
        return {
            name: ((self.u[:, part] * self.s[part]) @ self.v[:, part].mT).float().flatten()
            for name, part in ((name, ranks[name]) for name in self.energy)
        }

    def gains(self, shift: Tensor) -> dict[str, float]:
        """Gain of each band from u_i' E v_i `[r]`: sum(sigma_i M_ii) / sum(sigma_i^2) with M = U' W^ V. It is the
        least-squares slope of W^ on W over the band, equal to g_i where all are equal, and not ruled by the smallest
        sigma as a plain mean would be."""
        ranks = bands(len(self.s))
        return {
            name: 1 + float((self.s[ranks[name]] * shift[ranks[name]]).sum()) / energy
            for name, energy in self.energy.items()
        }

    def gains_of(self, residual: Tensor) -> dict[str, float]:
        """The same from E `[N, K]` itself, in float32: 1 + <E, W_band> / |W_band|^2."""
        flat = residual.float().flatten()
        return {name: 1 + float(torch.dot(flat, self.parts[name])) / energy for name, energy in self.energy.items()}

    def angles(self, other: Spectrum) -> dict[str, Tensor]:
        """Principal angles in radians between each band's subspace and that of another weight of this shape, largest
        first; angles that are 0 because the dimensions leave no other choice are left out.

        On the shorter side of the weight, where all singular vectors together are a basis of the space: there the sines
        are the singular values of V_rest' V^_band, exact for small angles (Björck & Golub 1973).
        """
        tall = self.u.shape[0] >= self.v.shape[0]
        rotation = (self.v if tall else self.u).mT @ other.vectors
        out = {}
        for name, part in bands(len(self.s)).items():
            rest = np.ones(len(self.s), bool)
            rest[part] = False
            if rest.any():
                sines = torch.linalg.svdvals(rotation[torch.from_numpy(rest), part])
                out[name] = torch.arcsin(sines.clamp(max=1))
        return out
