"""docs/findings.md is what its committed results say; sums that saturate are those of the instruction."""

from __future__ import annotations

import torch

from benchmarks.findings import FOLDER, PAGE
from benchmarks.findings_page import page
from benchmarks.saturation import excess, with_pair_sums
from qclip import Results, quantize
from tests.small import IMAGES, small_clip


def test_the_page_is_that_of_its_results() -> None:
    found = {path.stem: Results.from_json(path) for path in sorted(FOLDER.glob("*.json"))}
    assert set(found) == {"photos", "scenes-clean", "scenes-noisy", "saturation"}
    assert PAGE.read_text() == page(found), "write it again: python -m benchmarks.findings write"


def results(ece: tuple[float, float, float], gap: float) -> Results:
    out = Results()
    out.add(model="float", metric="signed_gap", set="s", role="id", value=gap, low=gap - 0.01, high=gap + 0.01)
    for name in ("ece", "signed_gap"):
        row = {"model": "w4a8", "metric": name, "set": "s", "role": "id", "reference": "float"}
        out.add(**row, value=ece[0], low=ece[1], high=ece[2])
    return out


def test_sentences_follow_from_intervals() -> None:
    better, worse, open_ = (-0.02, -0.03, -0.01), (0.02, 0.01, 0.03), (0.02, -0.01, 0.05)
    opposite = page({"scenes-clean": results(worse, 0.1), "scenes-noisy": results(better, -0.1)})
    assert "Yes, here: the underconfident model gains" in opposite
    other = page({"scenes-clean": results(better, 0.1), "scenes-noisy": results(worse, -0.1)})
    assert "Yes, here: the overconfident model gains" in other
    none = page({"scenes-clean": results(open_, 0.1), "scenes-noisy": results(better, -0.1)})
    assert "Not shown here: differences in ECE are 1 better, 0 worse, 1 without" in none
    assert "**−2.00 [−3.00, −1.00]**" in none and "| +2.00 [−1.00, +5.00]" in none


def test_pairs_saturate_as_the_instruction_does() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, weight = (torch.randint(-127, 128, (n, 51), generator=generator).to(torch.int8) for n in (9, 13))
    weight[0], codes[0] = 127, 127
    shifted, padded = (torch.nn.functional.pad(each.int(), (0, 1)) for each in (codes, weight))
    pairs = ((shifted + 128)[:, None] * padded[None]).view(9, 13, -1, 2).sum(-1).clamp(-(2**15), 2**15 - 1)
    wanted = pairs.sum(-1) - 128 * padded.sum(1)
    exact = codes.double() @ weight.double().t()
    assert torch.equal((exact + excess(codes, weight)).long(), wanted.long())
    assert (wanted != exact.long()).any() and not excess(codes, weight.clamp(-64, 64)).any()


@torch.no_grad()
def test_exact_sums_are_those_of_the_kernels() -> None:
    model = small_clip()
    small = quantize(model, "w8a8")
    exact, saturated = (with_pair_sums(model, small, saturate) for saturate in (False, True))
    near = torch.nn.functional.cosine_similarity(exact.encode_image(IMAGES), small.encode_image(IMAGES))
    assert near.min() > 0.999
    assert not torch.equal(exact.encode_image(IMAGES), saturated.encode_image(IMAGES))
