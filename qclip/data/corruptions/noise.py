"""Noise of ImageNet-C and CIFAR-10-C."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NOISE_SIGMA = {"large": (0.08, 0.12, 0.18, 0.26, 0.38), "small": (0.04, 0.06, 0.08, 0.09, 0.10)}


class GaussianNoise:
    """The same deviation in every pixel and channel."""

    name = "gaussian_noise"
    label = "Gaussian noise"
    version = 1

    def __call__(
        self, image: NDArray[np.float64], severity: int, small: bool, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        sigma = NOISE_SIGMA["small" if small else "large"][severity - 1]
        return image + sigma * rng.standard_normal(image.shape)
