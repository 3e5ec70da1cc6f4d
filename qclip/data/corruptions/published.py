"""What the corruptions of ImageNet-C and CIFAR-10-C have in common: two tables of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qclip.errors import DataError

Image = NDArray[np.floating[Any]]  # [H, W, 3] in 0..1


class Published(ABC):
    """`large` has the parameters of the published code for 224 pixels, `small` those for 32, severities 1 to 5.
    `least`: the shortest side of an image for which the corruption is defined."""

    name: ClassVar[str]
    label: ClassVar[str]
    group: ClassVar[str]
    version: ClassVar[int] = 1
    large: ClassVar[tuple[Any, ...]]
    small: ClassVar[tuple[Any, ...]]
    least: ClassVar[int] = 1

    def __call__(self, image: NDArray[np.float64], severity: int, small: bool, rng: np.random.Generator) -> Image:
        if min(image.shape[:2]) < self.least:
            height, width = image.shape[:2]
            raise DataError(f"{self.name} needs {self.least} x {self.least} pixels or more, not {height} x {width}.")
        return self.worsen(image, (self.small if small else self.large)[severity - 1], rng)

    @abstractmethod
    def worsen(self, image: NDArray[np.float64], strength: Any, rng: np.random.Generator) -> Image:
        """The corrupted image, strength being an entry of a table."""
