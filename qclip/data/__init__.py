"""Image sets (generated scenes, Parquet files, folders), and batches of them for a model."""

from qclip.data import corruptions
from qclip.data.arrow import from_dataset
from qclip.data.batches import Crops, batches
from qclip.data.classes import read_lines
from qclip.data.decoding import too_large
from qclip.data.imageset import ImageSet, UnreadableImage
from qclip.data.sources import as_set, is_set, load

__all__ = [
    "Crops",
    "ImageSet",
    "UnreadableImage",
    "as_set",
    "batches",
    "corruptions",
    "from_dataset",
    "is_set",
    "load",
    "read_lines",
    "too_large",
]
