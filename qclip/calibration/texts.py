"""What a text tower alone is calibrated on."""

from __future__ import annotations

from torch import Tensor

from ..data import as_set, is_set
from ..errors import DataError
from ..models import Encoders
from .captions import CAPTIONS


def texts(calibration: object, encoders: Encoders, count: int) -> tuple[Tensor, str, str]:
    """Token ids int64 `[n, L]` of at most `count` texts, their source, and whose captions they are, from a list of
    captions, token ids, or a set, whose captions are taken, else the built-in ones. Raises DataError for anything else,
    and where captions are given and there is no tokenizer."""
    if isinstance(calibration, Tensor):
        if calibration.is_floating_point() or calibration.ndim != 2 or not calibration.numel():
            raise _wanted(f"a {calibration.dtype} tensor of shape {list(calibration.shape)}")
        return calibration[:count].long(), "Tensor", "the caller's tokens"
    captions: list[str] | None = None
    if is_set(calibration):
        data = as_set(calibration)
        source = data.spec
        if data.captions is not None:
            captions = [caption for group in data.captions for caption in group[:1]]
    elif isinstance(calibration, list | tuple) and calibration and all(isinstance(text, str) for text in calibration):
        source, captions = type(calibration).__name__, list(calibration)
    else:
        raise _wanted(type(calibration).__name__)
    if encoders.tokenizer is None:
        raise DataError("the model has no tokenizer; calibrate with token ids [n, L], or set model.tokenizer")
    tokens = encoders.tokenizer((captions or CAPTIONS)[:count])
    return tokens, source, "the set's captions" if captions else "built-in captions"


def _wanted(given: str) -> DataError:
    return DataError(
        f"the model takes texts alone, so it is calibrated with a list of captions, token ids [n, L], or a set with "
        f"captions, not {given}"
    )
