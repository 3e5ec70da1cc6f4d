"""Reading of files that anybody may have written: bounded in size and depth, and only what is allowed."""

from . import schema
from .files import expand, inside, is_file, is_folder, open_regular, read_bytes, reason
from .strict_json import parse_json, read_json
from .tensors import TensorFacts, TensorFile, read_header

__all__ = [
    "TensorFacts",
    "TensorFile",
    "expand",
    "inside",
    "is_file",
    "is_folder",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_header",
    "read_json",
    "reason",
    "schema",
]
