"""Is a quantized model good enough to be deployed in its model's place? Requirements against measured intervals."""

from .bisect import blame
from .gate import Outcome, Verdict, check, judge, measure, measurements, verify
from .ranking import worst_first
from .requirement import Requirement, requirements

__all__ = [
    "Outcome",
    "Requirement",
    "Verdict",
    "blame",
    "check",
    "judge",
    "measure",
    "measurements",
    "requirements",
    "verify",
    "worst_first",
]
