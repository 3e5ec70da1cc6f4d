"""What calibrates: counts, what is held and what is decoded again, and which images the rows are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qclip
from qclip import calibration, data
from qclip.calibration import gather
from qclip.models import encoders
from tests.small import small_clip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of 20 images each, one of which is broken."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / name / f"{i:02}.png")
    broken = tmp_path / "cat" / "03.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return tmp_path


def test_a_thousand_images_each_with_a_caption() -> None:
    seen = calibration.samples(data.load("scenes:train?samples=1200"), encoders(small_clip()))
    assert (seen.description["images"], seen.description["captions"], len(seen)) == (1000, 1000, 2000)
    assert seen.description["captions_from"] == "the set's captions"


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_pixels_of_a_large_set_are_decoded_again_and_nothing_else_changes(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = small_clip(), data.load(f"folder:{pictures}")
    held = calibration.samples(images, encoders(model))
    codes = qclip.quantize(model, "w8a8-static-smoothquant", images)
    monkeypatch.setattr(gather, "HELD", 3 * 32 * 32 * 4 * 35)
    streamed = calibration.samples(images, encoders(model))
    assert isinstance(held.images, torch.Tensor) and isinstance(streamed.images, gather.Decoded)
    assert len(streamed.images) == len(held.images) == 39 and streamed.description == held.description
    some = torch.cat([gather.loaded(part) for part in streamed.first(20).image_batches()])
    assert torch.equal(some, held.images[:20])
    again = qclip.quantize(model, "w8a8-static-smoothquant", images)
    for (name, one), (_, other) in zip(codes.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_only_a_batch_is_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_clip(), data.load("scenes:train?samples=100")
    monkeypatch.setattr(gather, "HELD", 0)
    seen = calibration.samples(images, encoders(model))
    loaded: list[int] = []
    decode = gather.Decoded.loaded
    monkeypatch.setattr(gather.Decoded, "loaded", lambda self: (loaded.append(len(self)), decode(self))[1])
    calibration.run(encoders(model), seen, ("vision",))
    assert loaded == [32, 32, 32, 4]


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_labels_stay_with_their_images_behind_an_unreadable_one(pictures: Path) -> None:
    images = data.load(f"folder:{pictures}")
    seen = calibration.samples(images, encoders(small_clip()))
    assert seen.rows is not None and 3 not in seen.rows and len(seen.rows) == 39
    from qclip.sensitivities.probe import labelled

    labels, classes = labelled(images, seen.rows)
    assert classes == ("cat", "dog") and labels is not None
    assert labels.tolist() == [0] * 19 + [1] * 20


def test_a_broken_number_is_named_wherever_it_is() -> None:
    images = torch.zeros(70, 3, 32, 32)
    images[67, 0, 0, 0] = torch.nan
    with pytest.raises(qclip.errors.DataError, match="calibration image 67 holds NaN"):
        calibration.samples(images, encoders(small_clip()))
