"""What the float model says of pairs, as it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import normalize

import qclip
from qclip.training import Pairs, alterations
from qclip.training.teacher import Teacher
from tests.small import small_clip
from tests.training.world import pairs


@torch.no_grad()
def test_a_consensus_is_of_flipped_and_shifted_images() -> None:
    model = small_clip()
    data = Pairs.of(pairs(6), qclip.encoders(model))
    teacher, plain = Teacher.of(model, data, frozenset({"consensus"})), Teacher.of(model, data)
    looks = alterations.looks(data.pixels(np.arange(6)))
    wanted = normalize(sum(normalize(model.encode_image(each), dim=-1) for each in looks), dim=-1)
    assert teacher.consensus is not None and plain.consensus is None
    torch.testing.assert_close(teacher.consensus, wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(teacher.consensus, teacher.images, atol=1e-3)
