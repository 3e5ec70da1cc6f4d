"""The float model's features as a basis, and what another model's features are on it."""

from __future__ import annotations

import dataclasses

import numpy as np

from qclip.errors import InputError

from .bands import FLOOR, bands


@dataclasses.dataclass(frozen=True)
class FeatureBasis:
    """The float features F `[n, d]`, centred by their mean: F = U S V'. `scores` are F V `[n, d]`."""

    mean: np.ndarray
    s: np.ndarray
    v: np.ndarray  # [d, d]
    scores: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureBasis:
        """Raises InputError unless there are more images than dimensions."""
        n, d = features.shape
        if n <= d:
            raise InputError(f"{n} images are too few for the spectrum of {d} features; give more than {d}")
        mean = features.mean(0)
        _, s, vh = np.linalg.svd(features - mean, full_matrices=False)
        return cls(mean, s, vh.T, (features - mean) @ vh.T)

    @property
    def bands(self) -> dict[str, slice]:
        return bands(len(self.s))


@dataclasses.dataclass(frozen=True)
class FeatureChange:
    """Other features on the float basis, without the shift of their mean; per image and band, each float64 `[n]`:
    the product with the float features, the float features' energy, and the energy of the difference."""

    product: dict[str, np.ndarray]
    energy: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    scores: np.ndarray  # [n, d]
    shift: float  # norm of the shift of the mean, in units of the features' root mean square distance from the mean

    @classmethod
    def of(cls, basis: FeatureBasis, features: np.ndarray) -> FeatureChange:
        mean = features.mean(0)
        mine, theirs = basis.scores, (features - mean) @ basis.v
        spread = float(np.sqrt((mine**2).sum(1).mean()))

        def by_band(values: np.ndarray) -> dict[str, np.ndarray]:
            return {name: values[:, part].sum(1) for name, part in basis.bands.items()}

        return cls(
            by_band(mine * theirs),
            by_band(mine**2),
            by_band((theirs - mine) ** 2),
            theirs,
            float(np.linalg.norm(mean - basis.mean)) / spread,
        )

    def gains(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Slope of these features on the float ones within each band, on every resample `[1 + R, n]` -> `[1 + R]`."""
        return {band: (drawn @ self.product[band]) / (drawn @ self.energy[band]) for band in self.product}

    def level(self, drawn: np.ndarray) -> np.ndarray:
        return (drawn @ sum(self.product.values())) / (drawn @ sum(self.energy.values()))

    def shape(self, drawn: np.ndarray) -> np.ndarray:
        gains = [*self.gains(drawn).values()]
        return np.log(np.maximum(gains[-1], FLOOR) / np.maximum(gains[0], FLOOR))

    def sqnr(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """In dB, by band."""
        with np.errstate(divide="ignore"):
            return {b: 10 * np.log10((drawn @ self.energy[b]) / (drawn @ self.noise[b])) for b in self.noise}
