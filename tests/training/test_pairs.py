"""Pairs from sets with captions, with classes alone, and from several."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qclip
from qclip.errors import DataError
from qclip.models import Encoders
from qclip.training import Pairs


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return qclip.encoders(qclip.load_model("scenes-clean"))


def folder_of_classes(at: Path) -> str:
    from PIL import Image

    for name, count in (("tench", 3), ("grey owl", 2)):
        (at / name).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (32, 32), (k, len(name), 9)).save(at / name / f"{k}.png")
    return f"folder:{at}"


def test_a_set_with_classes_alone_has_their_names_for_captions(encoders: Encoders, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no captions: of each image it is its class name, as in 'a photo of a"):
        found = Pairs.of(folder_of_classes(tmp_path / "a"), encoders)
    assert found.description["captions"] == 2, "images of a class share a caption, and are no negatives of each other"
    assert sorted(len([c for c in found.captions if c == [k]]) for k in (0, 1)) == [2, 3]
    expected = encoders.tokenizer(["a photo of a grey owl.", "a photo of a tench."])
    assert torch.equal(found.tokens, expected)


@pytest.mark.filterwarnings("ignore:.*has no captions")
def test_several_sets_are_pairs_together(encoders: Encoders, tmp_path: Path) -> None:
    sets = ["scenes:train?samples=40", folder_of_classes(tmp_path / "a")]
    both = Pairs.of(sets, encoders)
    assert len(both) == 45 and both.description["source"].startswith("scenes:train?samples=40 + folder:")
    one, other = Pairs.of(sets[0], encoders), Pairs.of(sets[1], encoders)
    assert torch.equal(both.pixels(np.arange(45)), torch.cat([one.pixels(np.arange(40)), other.pixels(np.arange(5))]))
    texts = [both.tokens[each[0]] for each in both.captions]
    assert torch.equal(torch.stack(texts[40:]), other.tokens[[each[0] for each in other.captions]])
    few = [Pairs.of(sets, encoders, 20, seed) for seed in (0, 1)]
    assert [len(each) for each in few] == [20, 20] and few[0].description["sha256"] != few[1].description["sha256"]
    with pytest.raises(DataError, match="pairs are a data name"):
        Pairs.of([sets[0], 3], encoders)
    with pytest.raises(DataError, match=r"scenes:train\?samples=40 was named twice; .*held out would be learned from"):
        Pairs.of([*sets, sets[0]], encoders)


def test_scales_are_calibrated_on_a_thousand_pairs_from_first_to_last(encoders: Encoders) -> None:
    found = Pairs.of("scenes:train?samples=60", encoders)
    some = found.samples(20)
    assert torch.equal(some.images, found.pixels(np.arange(0, 60, 3))) and len(some.tokens) == 20  # type: ignore[arg-type]
    assert len(found.samples().images) == 60
