"""The largest logit (Hendrycks et al. 1911.11132)."""

from __future__ import annotations

from . import Formula

MAXLOGIT = Formula("maxlogit", "MaxLogit", lambda sample: sample.cosines.max(1))  # any positive scale ranks alike
