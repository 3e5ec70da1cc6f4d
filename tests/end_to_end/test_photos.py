"""What the precisions cost on real images: embeddings of the shipped `photos` beside its float ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qclip
from qclip.data import batches, load

pytestmark = pytest.mark.slow  # a trained model over photographs


@pytest.fixture(scope="module")
def cosines(shared_data: Path) -> Callable[[str], Tensor]:
    """Recipe -> cosine to float of 250 images of CIFAR-10 test, lossless and JPEG."""
    model = qclip.load_model("photos")
    data = load(f"parquet:{shared_data / 'cifar10_test.parquet'}?samples=250&seed=1")
    pixels = [batch for _, batch in batches(data, model.preprocess)]

    @torch.inference_mode()
    def embed(recipe: str | None) -> Tensor:
        chosen = model if recipe is None else qclip.quantize(model, recipe)
        return torch.cat([chosen.encode_image(batch) for batch in pixels]).double()

    wanted = embed(None)
    return lambda recipe: torch.cosine_similarity(embed(recipe), wanted, dim=-1)


# Of all 10,000 images: w8a8 0.99994, worst 0.9997; w4a8-mixed 0.9983; w4a8 0.9949. The bounds are the project's aims:
# 0.9998 and 0.999 at 8 bits, 0.998 at 4. At 4 bits cosines have a deviation of 0.0009 (measured), so a mean of 250 is
# off by 0.00006: five of these fit between what is measured and the aim.
def test_int8_embeddings_are_those_of_float(cosines: Callable[[str], Tensor]) -> None:
    found = cosines("w8a8")
    assert found.mean() >= 0.9998 and found.min() >= 0.999


def test_mixed_int4_embeddings_are_near_to_float(cosines: Callable[[str], Tensor]) -> None:
    mixed, plain = cosines("w4a8-mixed"), cosines("w4a8")
    assert mixed.mean() >= 0.998 and 1 - mixed.mean() < 0.5 * (1 - plain.mean())
