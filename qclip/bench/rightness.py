"""Whether a contender computes what it is meant to: nobody is fast by computing something else."""

from __future__ import annotations

#: Least relative squared error of a uniform quantizer with 2^b levels for normal values (Max 1960, "Quantizing for
#: minimum distortion", IRE Trans. Inf. Theory 6(1), table II).
ERROR = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


def least_cosine(bits: int) -> float:
    """The cosine to float32 below which a tower of `bits` (2 to 16) bits is wrong: that of embeddings which are
    themselves rounded to half as many bits, `sqrt(1 - ERROR)`; 0.9942 for 8 bits and more.

    Rounding every layer to `bits` costs less than that: INT8 towers lie at 0.9998. What is beyond it has a fault - sums
    that overflowed, ranges that clip - or its ranges were found badly.
    """
    return float((1 - ERROR[min(bits // 2, max(ERROR))]) ** 0.5)
