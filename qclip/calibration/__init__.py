"""Samples from what a user gives, streamed through the float towers; what is kept of every site's input."""

from .attention import attention_operands
from .gather import Samples, samples
from .gradients import SeeGradient, gradients
from .observers import OBSERVERS, AbsMax, Histogram, Moments, Observer, Quantizer, static_input
from .stream import (
    Batch,
    Hooks,
    Progress,
    See,
    batches,
    channel_maxima,
    channel_moments,
    reaching,
    run,
    static_quantizers,
)

__all__ = [
    "OBSERVERS",
    "AbsMax",
    "Batch",
    "Histogram",
    "Hooks",
    "Moments",
    "Observer",
    "Progress",
    "Quantizer",
    "Samples",
    "See",
    "SeeGradient",
    "attention_operands",
    "batches",
    "channel_maxima",
    "gradients",
    "channel_moments",
    "reaching",
    "run",
    "samples",
    "static_input",
    "static_quantizers",
]
