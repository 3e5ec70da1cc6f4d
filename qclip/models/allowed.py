"""Every setting that a description of a model may carry: preprocessing, tokenizer, and the architecture, whose settings
stand with its family (`Family.classes`).

A description is data. What is not listed here is refused by name, whether it comes from an artifact, an open_clip
folder, a Hugging Face folder or the hub, so that no switch of a library that runs code, loads kernels or asks the
network can be set from a file. Ranges are beyond any published model, and small enough that no size in them harms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from ..errors import InputError, ModelError
from ..untrusted.schema import (
    Check,
    anything,
    either,
    flag,
    listing,
    mapping,
    null,
    one_of,
    optional,
    real,
    record,
    shown,
    text,
    validate,
    whole,
)
from .family import FAMILIES, Shapes, described_family

LAYERS, WIDTH, TOKENS, VOCABULARY, SIDE, POSITIONS = 256, 16384, 2048, 2_000_000, 2048, 16384


def sides(low: int, high: int) -> Check:
    """One number, or height and width."""
    return either(listing(whole(low, high), 2, 2), whole(low, high))


def dropout(value: Any, where: str) -> None:
    real(0, 0.99)(value, where)


# ---- preprocessing and tokenizer -------------------------------------------------------------------------------------

_COLOURS = listing(real(-1e3, 1e3), 3, 3)
PREPROCESS = record(
    {
        "image_size": sides(1, SIDE),
        "mean": _COLOURS,
        "std": listing(real(1e-6, 1e6), 3, 3),
        "interpolation": one_of("bicubic", "bilinear", "random"),
        "resize_mode": one_of("shortest", "longest", "squash"),
        "fill_color": whole(0, 255),
    },
    ("image_size",),
)

CLEANING = one_of("lower", "whitespace", "canonicalize")
_LENGTH = {"context_length": whole(1, TOKENS)}
_DIGEST = text(64, "[0-9a-f]{64}")
TOKENIZER_BYTES = 64_000_000
# In a file: CLIP's own, the artifact's own `tokenizer.json`, or none.
TOKENIZERS: dict[str, Check] = {
    "clip-bpe": record({"kind": one_of("clip-bpe"), "options": record({"clean": CLEANING}), **_LENGTH}),
    "unknown": record({"kind": one_of("unknown"), **_LENGTH}),
    "json": record(
        {
            "kind": one_of("json"),
            "clean": optional(CLEANING),
            "pad_id": whole(0, VOCABULARY),
            "pad_token": text(200),
            "padding_side": one_of("right", "left"),
            "truncation_side": one_of("right", "left"),
            "strip_id": optional(whole(0, VOCABULARY)),
            "clips": optional(listing(whole(0, VOCABULARY), 4, 4)),
            "sha256": _DIGEST,
            "bytes": whole(2, TOKENIZER_BYTES),
            **_LENGTH,
        },
        ("context_length", "pad_id", "pad_token", "sha256", "bytes"),
    ),
}
NAMED_TOKENIZERS = ("siglip", "hf", "hf-auto")  # of models that were loaded by name; no file may ask for them

# Tokenizers of transformers that are data: a vocabulary and rules, nothing that is looked up or run.
TOKENIZER_CLASSES = frozenset(
    name + fast
    for name in "CLIP Siglip Siglip2 T5 MT5 Gemma Bert Roberta XLMRoberta Nllb DistilBert Llama GPT2 Albert".split()
    for fast in ("Tokenizer", "TokenizerFast")
) | {"PreTrainedTokenizerFast", "TokenizersBackend"}
_TOKEN = either(
    text(200),
    null,
    record(
        {"__type": one_of("AddedToken"), "content": text(200), "id": whole(0, VOCABULARY)}
        | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), flag)
    ),
)
_WORD = optional(either(flag, text(200)))
TOKENIZER_SETTINGS: dict[str, Check] = {
    "tokenizer_class": optional(one_of(*sorted(TOKENIZER_CLASSES))),
    "model_max_length": either(real(1, 1e31), null),
    **dict.fromkeys([f"{n}_token" for n in "bos eos unk pad sep cls mask image boi eoi".split()], _TOKEN),
    "additional_special_tokens": optional(listing(_TOKEN, 0, 10_000)),
    "extra_special_tokens": either(null, listing(_TOKEN, 0, 10_000), mapping(text(200), _TOKEN, 10_000)),
    "added_tokens_decoder": mapping(text(20), _TOKEN, 20_000),
    "extra_ids": whole(0, 1000),
    "padding_side": one_of("right", "left"),
    "truncation_side": one_of("right", "left"),
    "model_input_names": listing(text(80), 0, 8),
    "src_lang": _WORD,
    "tgt_lang": _WORD,
    "errors": one_of("replace", "ignore", "strict"),
    "vocab_size": whole(1, VOCABULARY),
    **dict.fromkeys(
        """add_prefix_space do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars keep_accents
        clean_up_tokenization_spaces add_bos_token add_eos_token legacy legacy_behaviour
        spaces_between_special_tokens split_special_tokens remove_space trim_offsets from_slow
        use_default_system_prompt""".split(),
        optional(flag),
    ),
}
# Names of files and of whoever wrote the settings: not handed over either.
TOKENIZER_BOOKKEEPING = frozenset(
    """name_or_path special_tokens_map_file tokenizer_file vocab_file merges_file processor_class chat_template
    backend is_local local_files_only never_split max_length pad_to_multiple_of pad_token_type_id stride
    truncation_strategy sp_model_kwargs sentencepiece_model_file use_fast cache_dir""".split()
)


# ---- the checks ------------------------------------------------------------------------------------------------------


def check_architecture(description: Any, refuse: type[InputError] = ModelError) -> None:
    """Raises `refuse` unless every setting of `{"family", "class", "config"}` is one that a file may carry."""
    where = "the description's architecture"
    validate(record(dict.fromkeys(("family", "class", "config"), anything)), description, where, refuse)
    family, name = (value if isinstance(value := description.get(key), str) else "" for key in ("family", "class"))
    known = described_family(description).classes if family in FAMILIES else {}
    if name not in known:
        of_it = f"known classes: {', '.join(known)}" if known else f"known families: {', '.join(FAMILIES)}"
        raise refuse(
            f"the description is of no model that is supported (family {shown(family)}, class {shown(name)}); {of_it}"
        )
    validate(known[name], description.get("config"), f"{where}, {name}", refuse)
    if (grid := described_family(description).grid(description)) is not None:
        down, across = grid[1]
        if not 1 <= down * across <= POSITIONS:
            raise refuse(f"{where}: {down} x {across} patches; there must be from 1 to {POSITIONS}")


def check_preprocess(description: Any, refuse: type[InputError] = ModelError) -> None:
    """Raises `refuse` unless the settings of an image transform exist and are in range."""
    validate(PREPROCESS, description, "preprocessing", refuse)


def check_image_size(architecture: dict[str, Any], preprocess: dict[str, Any], refuse: type[InputError]) -> None:
    """Raises `refuse` where an image transform makes images of another size than the model has positions for."""
    if (grid := described_family(architecture).grid(architecture)) is not None:
        mine, its = pair(preprocess["image_size"]), grid[0]
        if mine != its:
            raise refuse(
                f"preprocessing takes images of {mine[0]} x {mine[1]} and the architecture {its[0]} x {its[1]}"
            )


def check_tokenizer(description: Any, refuse: type[InputError] = ModelError) -> None:
    """Raises `refuse` unless a file may describe its tokenizer so."""
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind in NAMED_TOKENIZERS:
        raise refuse(
            f"tokenizer kind {kind!r} is loaded from the hub or a folder, which a file cannot ask for; artifacts carry "
            "their tokenizer: save the model again"
        )
    if not isinstance(kind, str) or kind not in TOKENIZERS:
        raise refuse(f"tokenizer kind {shown(kind)} is unknown; known: {', '.join(TOKENIZERS)}")
    validate(TOKENIZERS[kind], description, "the tokenizer's description", refuse)


# ---- sizes against tensors -------------------------------------------------------------------------------------------


def pair(value: Any) -> tuple[int, int]:
    """Height and width of one number or two."""
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def check_sizes(
    description: dict[str, Any], shapes: Shapes, what: str, refuse: type[InputError] = ModelError, exact: bool = True
) -> None:
    """Raises `refuse` unless tensors of these shapes can be those of this (checked) architecture: as many blocks, and
    tables of positions and tokens as large. Not `exact`: positions may be resized, up to four times the file's numbers.

    Called before anything is built, so that what is built is no larger than the file.
    """
    family = described_family(description)
    (blocks, tables), shapes = family.sizes(description), family.plain(description, shapes)
    for prefix, count in blocks:
        found = _numbered(shapes, prefix)
        if found != count:
            first = "" if found else f" (it begins with {next(iter(shapes), '')[:120]!r})"
            raise refuse(
                f"{what} holds {found} blocks {prefix + '*'!r}{first} and its description says {count}; "
                "one of them is of another model"
            )
    total = sum(math.prod(shape) for shape in shapes.values())
    for name, shape in tables:
        held = shapes.get(name) or shapes.get(f"{name.removesuffix('.weight')}.codes")
        if held is None:
            raise refuse(f"{what} lacks {name!r}, which its description asks for")
        same = held[1:] == shape[1:] and (math.prod(shape) <= 4 * total if "position" in name else held == shape)
        if held != shape if exact else not same:
            raise refuse(f"{name!r} in {what} is {held} and its description says {shape}")


def _numbered(names: Iterable[str], prefix: str) -> int:
    """How many blocks there are, which must be numbered without a gap."""
    pattern = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
    found = {int(match[1]) for name in names if (match := pattern.match(name))}
    return len(found) if found == set(range(len(found))) else -1


__all__ = [
    "NAMED_TOKENIZERS",
    "TOKENIZER_BOOKKEEPING",
    "TOKENIZER_BYTES",
    "TOKENIZER_CLASSES",
    "TOKENIZER_SETTINGS",
    "check_architecture",
    "check_preprocess",
    "check_sizes",
    "check_tokenizer",
]
