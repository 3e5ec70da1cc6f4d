from __future__ import annotations

import math

import numpy as np
import pytest

from qclip.reliability.wins import joint_wins


def gains(rng: np.random.Generator, variants: int, correlation: float, at: float = 0.0, replicates: int = 4000):
    """Gains in three metrics whose bootstrap noise is correlated alike among metrics."""
    shape = np.full((3, 3), correlation) + (1 - correlation) * np.eye(3)
    noise = rng.multivariate_normal(np.zeros(3), shape, (variants, replicates)).transpose(0, 2, 1)
    return {str(v): np.concatenate([np.full((3, 1), at), at + noise[v]], axis=1) for v in range(variants)}


@pytest.mark.parametrize(("correlation", "share"), [(0.0, 0.125), (0.3, 0.198), (0.6, 0.280)])
def test_chance_is_more_than_one_in_eight_where_metrics_go_together(correlation: float, share: float) -> None:
    found = joint_wins(gains(np.random.default_rng(0), 5, correlation), 4000)
    assert found.expected == pytest.approx(5 * share, abs=0.05)
    assert found.low == 0 and 2 <= found.high <= 4 and found.count == 0 and found.p == 1


def test_the_null_is_centred_and_wins_are_counted_on_the_sample() -> None:
    rng = np.random.default_rng(1)
    better = joint_wins(gains(rng, 6, 0.0, at=5.0), 4000)  # every replicate wins; around its estimate chance does
    assert better.count == 6 and better.expected == pytest.approx(6 / 8, abs=0.05) and better.p < 0.01
    mixed = gains(rng, 4, 0.0, at=5.0)
    mixed["0"][1, 0] = -0.1  # one metric is worse on the sample
    mixed["1"][:, 0] = 0.0  # equal is no improvement
    assert joint_wins(mixed, 4000).count == 2


def test_variants_that_share_their_reference_win_together() -> None:
    rng = np.random.default_rng(2)
    shared = gains(rng, 1, 0.3)["0"]
    found = joint_wins({str(v): shared for v in range(4)}, 4000)
    assert found.high == 4 and found.expected == pytest.approx(4 * 0.198, abs=0.1)  # all or none


def test_the_jackknife_behind_the_replicates_is_not_read_and_what_is_undefined_is_left_out() -> None:
    one = gains(np.random.default_rng(3), 1, 0.0, replicates=200)["0"]
    padded = np.concatenate([one, np.full((3, 50), 99.0)], axis=1)
    assert joint_wins({"a": padded}, 200) == joint_wins({"a": one}, 200)
    holes = one.copy()
    holes[0, 1:101] = np.nan
    assert joint_wins({"a": holes}, 200) == joint_wins({"a": np.delete(one, range(1, 101), axis=1)}, 100)
    one[0] = np.nan
    assert math.isnan(joint_wins({"a": one}, 200).p)
