"""Out-of-distribution scores. Higher = in distribution (ID)."""

from __future__ import annotations

import numpy as np


def scores(cosines: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """From cosines float64 `[n, K]` to the class embeddings and the exp'd logit scale:

    - `mcm`: max softmax of the bare cosines, tau = 1 (Ming et al. 2211.13445)
    - `maxlogit`: max cosine (any positive scale ranks alike)
    - `energy`: log-sum-exp of scale * cosine, T = 1 (Liu et al. 2010.03759)
    """
    top = cosines.max(1)
    shifted = cosines - top[:, None]
    return {
        "mcm": 1 / np.exp(shifted).sum(1),
        "maxlogit": top,
        "energy": scale * top + np.log(np.exp(scale * shifted).sum(1)),
    }
