"""What quantization took away, in relation to what was there; corruptions in relation to a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np

from qclip.errors import InputError

from .arrays import Array, ratio
from .record import Metric

ZERO = "what it is divided by is 0"
RELATIVE_DROP = Metric("relative_drop", "Relative drop of accuracy", -1, "share", 1, True, undefined=ZERO)
RELATIVE_DROP_AUROC = Metric("relative_drop_auroc", "Relative drop of AUROC", -1, "share", 1, True, undefined=ZERO)
RSG = Metric("rsg", "Relative spurious gap", -1, "share", 1, True, undefined=ZERO)
VULN_ADD = Metric("vuln_add", "Added vulnerability", -1, "share", 1, True, undefined=ZERO)

# Mean error of AlexNet over the five severities of ImageNet-C (Hendrycks & Dietterich 1903.12261), by name.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}

Number = TypeVar("Number", float, np.ndarray)


def relative_drop(reference: Number, other: Number) -> Number:
    """(reference - other) / reference: positive is a loss; nan where the reference is 0. Elementwise."""
    return _ratio(reference - other, reference)


def rsg(common: Number, counter: Number) -> Number:
    """Relative spurious gap (A_N - A_C)/A_N of accuracies on common and on counter images (2509.21173)."""
    return relative_drop(common, counter)


def delta_rsg(
    reference_common: Number, reference_counter: Number, other_common: Number, other_counter: Number
) -> Number:
    """RSG of the other model minus that of the reference."""
    return rsg(other_common, other_counter) - rsg(reference_common, reference_counter)


def vuln_add(
    reference_common: Number, reference_counter: Number, other_common: Number, other_counter: Number
) -> Number:
    """Relative drop on counter images minus that on common ones. It is delta RSG times
    A_N(other)/A_C(reference): the two always have one sign, and are one finding."""
    return relative_drop(reference_counter, other_counter) - relative_drop(reference_common, other_common)


def _ratio(a: Number, b: Number) -> Number:
    found: Array = ratio(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return float(found) if found.ndim == 0 else found  # type: ignore[return-value]


def corruption_errors(errors: Mapping[str, Mapping[int, float]], classes: int) -> dict[str, float]:
    """Corruption error of each corruption, and their mean under "mce": the mean error over severities 1 to 5 by that of
    AlexNet.

    Only for ImageNet-C itself, all 1,000 classes and all 15 corruptions at all severities (`errors[name][severity]`,
    shares of 0..1): anything else has no AlexNet to be compared with and raises InputError. Use the mean error and the
    ratio to your own reference there.
    """
    if classes != 1000 or set(errors) != set(ALEXNET):
        missing, more = sorted(set(ALEXNET) - set(errors)), sorted(set(errors) - set(ALEXNET))
        raise InputError(
            f"mCE is defined for the 15 corruptions of ImageNet-C with 1000 classes; here are {classes} classes, "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(more) or 'none'}. "
            "Report the mean error and its ratio to the reference instead."
        )
    out = {}
    for name, by_severity in errors.items():
        if set(by_severity) != {1, 2, 3, 4, 5}:
            raise InputError(f"{name} has severities {sorted(by_severity)}; the corruption error is over 1 to 5.")
        if not all(0 <= e <= 1 for e in by_severity.values()):
            raise InputError(f"the errors of {name} must be shares of 0..1.")
        out[name] = float(np.mean(list(by_severity.values()))) / ALEXNET[name]
    return out | {"mce": float(np.mean(list(out.values())))}
