"""Mahalanobis distances to the classes of the training images (Lee et al. 1807.03888), and relative to the distance to
all of them (Ren et al. 2106.09022)."""

from __future__ import annotations

import dataclasses

import numpy as np

from qclip.metrics.arrays import Array

from ..sample import Known, Sample
from . import Score, UnfitError

RIDGE = 1e-6  # of the mean variance


@dataclasses.dataclass(frozen=True)
class Gaussians:
    """Means `[K, E]` and the whitening `[E, E]` of a covariance that they share: |(f - mean) whitening|^2."""

    means: Array
    whitening: Array
    shrunk: bool = False

    @classmethod
    def fit(cls, means: Array, deviations: Array) -> Gaussians:
        """deviations `[n, E]` from the means. The covariance is divided by n, whoever asks, and gets a ridge of 1e-6 of
        the mean variance; with fewer images than dimensions it is shrunk (Ledoit & Wolf 2004)."""
        n, width = deviations.shape
        covariance = deviations.T @ deviations / n
        variance = np.trace(covariance) / width
        if not variance > 0:
            raise UnfitError("needs training images that differ within their classes; these do not")
        if n < width:
            covariance = ledoit_wolf(deviations)
        covariance = covariance + RIDGE * variance * np.eye(width)
        inverse = np.linalg.inv(np.linalg.cholesky(covariance))
        return cls(means, inverse.T, n < width)

    def distances(self, features: Array) -> Array:
        """Squared distances `[n, K]`."""
        middle = self.means.mean(0)  # what all share would only be lost in the difference of two large squares
        points, means = (features - middle) @ self.whitening, (self.means - middle) @ self.whitening
        squares = np.sum(points**2, axis=1)[:, None] - 2 * points @ means.T + np.sum(means**2, axis=1)
        return np.maximum(squares, 0)  # type: ignore[no-any-return]


def ledoit_wolf(deviations: Array) -> Array:
    """The covariance of centred rows, shrunk towards the mean variance by Ledoit and Wolf's optimal share (2004)."""
    n, width = deviations.shape
    covariance = deviations.T @ deviations / n
    target = np.trace(covariance) / width
    distance = (np.sum(covariance**2) - width * target**2) / width
    noise = (np.sum(np.sum(deviations**2, axis=1) ** 2) / n - np.sum(covariance**2)) / (n * width)
    share = 0.0 if distance <= 0 else min(max(noise, 0.0) / distance, 1.0)
    return (1 - share) * covariance + share * target * np.eye(width)


def classes_of(train: Sample) -> Gaussians:
    """One Gaussian for each class that has images; they share the covariance within classes."""
    assert train.labels is not None
    present, labels = np.unique(train.labels, return_inverse=True)
    counts = np.bincount(labels)
    sums = np.zeros((len(present), train.features.shape[1]))
    np.add.at(sums, labels, train.features)
    means = sums / counts[:, None]
    return Gaussians.fit(means, train.features - means[labels])


def everything_of(train: Sample) -> Gaussians:
    """One Gaussian for all images."""
    mean = train.features.mean(0, keepdims=True)
    return Gaussians.fit(mean, train.features - mean)


class Mahalanobis:
    """Minus the squared distance to the nearest class mean."""

    name, label, needs = "mahalanobis", "Mahalanobis", frozenset({"train", "labels"})

    def __init__(self, classes: Gaussians | None = None) -> None:
        self.classes = classes

    def fit(self, known: Known) -> Score:
        return Mahalanobis(classes_of(known.images))

    @property
    def remark(self) -> str:
        few = self.classes is not None and self.classes.shrunk
        return "fewer training images than dimensions: covariances are shrunk (Ledoit-Wolf)" if few else ""

    def __call__(self, sample: Sample) -> Array:
        assert self.classes is not None
        return -self.classes.distances(sample.features).min(1)


class RelativeMahalanobis(Mahalanobis):
    """The same, minus what the distance to the mean of all images gives."""

    name, label = "relative_mahalanobis", "Relative Mahalanobis"

    def __init__(self, classes: Gaussians | None = None, everything: Gaussians | None = None) -> None:
        super().__init__(classes)
        self.everything = everything

    def fit(self, known: Known) -> Score:
        return RelativeMahalanobis(classes_of(known.images), everything_of(known.images))

    def __call__(self, sample: Sample) -> Array:
        assert self.everything is not None
        return super().__call__(sample) + self.everything.distances(sample.features)[:, 0]
