"""Samples from what a user gives, streamed through the float towers; what is kept of every site's input."""

from .gather import Samples, samples
from .observers import AbsMax, Histogram
from .stream import Batch, Hooks, Progress, See, batches, channel_maxima, reaching, run, static_scales

__all__ = [
    "AbsMax",
    "Batch",
    "Histogram",
    "Hooks",
    "Progress",
    "Samples",
    "See",
    "batches",
    "channel_maxima",
    "reaching",
    "run",
    "samples",
    "static_scales",
]
