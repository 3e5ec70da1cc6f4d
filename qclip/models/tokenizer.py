"""What turns texts into token ids, described by JSON. A file can ask for CLIP's BPE or carry a `tokenizer.json`; names
that need the network, or a folder of a user's, are for models that were loaded by name."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SigLipTokenizer, get_clean_fn
from torch import Tensor

from ..errors import ModelError
from ..untrusted import is_file, read_json, reason, schema
from . import allowed

FILE = "tokenizer.json"  # in an artifact
SETTINGS = "tokenizer_config.json"
VOCABULARIES = (  # files of a tokenizer that hold data alone
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
PROBES = [
    "a photo of a dog",
    "A Photo, of TWO birds - on a wire!",
    "",
    "  blank   space\tand\nlines  ",
    "un café à 3,50 €; 猫の写真; кошка",
    "it's [SEP] </s> <eos> {braces} under_scores",
    "the old house near the sea " * 40,
]


class Tokenizer:
    """Texts -> int64 token ids `[n, context_length]`. `config` rebuilds it; it is loaded when first called.

    `config["kind"]`: "clip-bpe" (built into open_clip), "json" (`tokenizer.json` of Hugging Face's tokenizers, whose
    bytes are `file`), or "unknown" (none: calling it is a ModelError). Only of models that were loaded by name or from
    a user's folder, and for an artifact turned into "json" (`carried`): "siglip" (open_clip's, with `variant`), "hf" (a
    Hugging Face tokenizer with `name` and open_clip's `mode` and `options`), "hf-auto" (that of a Hugging Face model).
    """

    def __init__(self, config: dict[str, Any], file: bytes | None = None) -> None:
        if not isinstance(config, dict) or config.get("kind") not in allowed.NAMED_TOKENIZERS:
            allowed.check_tokenizer(config)
        if config["kind"] == "json":
            if file is None:
                raise ModelError(f"the tokenizer's file {FILE!r} is missing")
            if len(file) != config["bytes"] or hashlib.sha256(file).hexdigest() != config["sha256"]:
                raise ModelError(f"{FILE!r} does not match its checksum; it was changed after it was saved")
        self.config = dict(config)
        self.context_length: int = int(config.get("context_length", 77))
        self._file = file
        self._loaded: Any = None

    def __call__(self, texts: str | list[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.load()(texts)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict) -> Tokenizer:
        return self

    def load(self) -> Callable[[list[str]], Tensor]:
        """The function behind it. Raises ModelError where it cannot be had."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded  # type: ignore[no-any-return]

    def _load(self) -> Any:
        kind, options = self.config["kind"], self.config.get("options") or {}
        name = self.config.get("name")
        if kind == "clip-bpe":
            return open_clip.SimpleTokenizer(context_length=self.context_length, **options)
        if kind == "unknown":
            raise ModelError("the model's tokenizer is not known; set model.tokenizer to a function of list[str]")
        if kind == "json":
            assert self._file is not None
            return _FromJson(self.config, self._file)
        try:
            if kind == "siglip":
                return SigLipTokenizer(self.config["variant"], context_length=self.context_length)
            with tempfile.TemporaryDirectory(prefix="qclip-tokenizer-") as folder:
                stage(_folder_of(str(name)), Path(folder))
                if kind == "hf":
                    settings = {"context_length": self.context_length, "tokenizer_mode": self.config.get("mode")}
                    return HFTokenizer(folder, **settings, **options, **_LOCAL)
                return _FromTransformers(folder, self.context_length)
        except ModelError:
            raise
        except Exception as error:  # hub, proxy, disk, other libraries' parsers: each has errors of its own
            what = name if kind != "siglip" else f"SigLIP {self.config['variant']}"
            raise ModelError(
                f"tokenizer {what!r} could not be loaded ({reason(error)}); it needs transformers "
                "and the network or a local copy, or set model.tokenizer"
            ) from error

    def carried(self) -> tuple[dict[str, Any], bytes | None]:
        """The description and file with which an artifact has this tokenizer, whatever it was loaded from.

        One that cannot be had now, or of which a `tokenizer.json` gives other ids, becomes "unknown", with a
        UserWarning that says why.
        """
        if self.config["kind"] in allowed.TOKENIZERS:
            return dict(self.config), self._file
        try:
            config, file = _as_json(self.load(), self.config)
            twin = Tokenizer(config, file)
            if not torch.equal(twin(PROBES), self(PROBES)):
                raise ModelError("as a tokenizer.json it gives other ids")
            return config, file
        except ModelError as error:
            warnings.warn(
                f"the artifact will have no tokenizer ({error}); set model.tokenizer after loading it", stacklevel=3
            )
            return {"kind": "unknown", "context_length": self.context_length}, None


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


class _FromTransformers:
    """The tokenizer of a Hugging Face model."""

    def __init__(self, folder: str, length: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer, self.length = AutoTokenizer.from_pretrained(folder, **_LOCAL), length

    def __call__(self, texts: list[str]) -> Tensor:
        out = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return out["input_ids"].to(torch.int64)  # type: ignore[no-any-return]


class _FromJson:
    """A tokenizer of Hugging Face's `tokenizers` by its own file, with what open_clip does around it."""

    def __init__(self, config: dict[str, Any], file: bytes) -> None:
        try:
            from tokenizers import Tokenizer as Rust
        except ImportError as error:
            raise ModelError("the model's tokenizer needs the package tokenizers; install qclip[hf]") from error
        try:
            self.tokenizer = Rust.from_str(file.decode("utf-8"))
        except BaseException as error:  # a panic in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ModelError(f"{FILE!r} is no tokenizer ({reason(error)})") from None
        self.length: int = config["context_length"]
        self.clean = get_clean_fn(config["clean"]) if config.get("clean") else None
        self.strip, self.clips = config.get("strip_id"), config.get("clips")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if self.clips is None:
            self.tokenizer.enable_truncation(self.length, direction=config.get("truncation_side", "right"))
            self.tokenizer.enable_padding(
                direction=config.get("padding_side", "right"),
                pad_id=config["pad_id"],
                pad_token=config["pad_token"],
                length=self.length,
            )

    def __call__(self, texts: list[str]) -> Tensor:
        texts = texts if self.clean is None else [self.clean(text) for text in texts]
        try:
            rows = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=self.clips is None)]
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ModelError(f"the model's tokenizer failed ({reason(error)})") from None
        if self.clips is not None:  # open_clip's mode of that name: the class token last, behind the padding
            bos, eos, pad, cls = self.clips
            rows = [[bos, *ids[: self.length - 3], eos] for ids in rows]
            rows = [[*ids, *[pad] * (self.length - 1 - len(ids)), cls] for ids in rows]
        ids = torch.tensor(rows, dtype=torch.int64).reshape(len(texts), self.length)
        return ids if self.strip is None else ids.masked_fill(ids == self.strip, 0)


def _as_json(loaded: Any, config: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A tokenizer of transformers as its `tokenizer.json` and what else its ids depend on. Raises ModelError."""
    theirs = loaded.tokenizer
    backend = getattr(theirs, "backend_tokenizer", None) or getattr(theirs, "_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ModelError(f"{type(theirs).__name__} has no tokenizer.json")
    content = json.loads(backend.to_str())
    file = json.dumps(content | {"truncation": None, "padding": None}, ensure_ascii=False).encode()
    options = config.get("options") or {}
    clean = {"hf": options.get("clean", "whitespace"), "siglip": "canonicalize"}.get(config["kind"])
    clips = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.cls_token_id]
    described = {
        "kind": "json",
        "context_length": int(config.get("context_length", 77)),
        "clean": clean,
        "pad_id": theirs.pad_token_id,
        "pad_token": theirs.pad_token,
        "padding_side": theirs.padding_side,
        "truncation_side": theirs.truncation_side,
        "strip_id": theirs.sep_token_id if options.get("strip_sep_token") else None,
        "clips": clips if config.get("mode") == "clips" else None,
        "sha256": hashlib.sha256(file).hexdigest(),
        "bytes": len(file),
    }
    allowed.check_tokenizer(described)
    return described, file


# ---- folders ---------------------------------------------------------------------------------------------------------


def _folder_of(name: str) -> Path:
    """The folder of a tokenizer's files: a local one, or what a hub repository holds of them."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")):
        raise ModelError(f"tokenizer {name!r} could not be loaded (there is no such folder); set model.tokenizer")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[*VOCABULARIES, SETTINGS], ignore_patterns=["*/*"]))


def check_folder(folder: Path) -> dict[str, Any]:
    """The settings of the tokenizer in a folder that may be handed to transformers. Raises ModelError for code, and for
    settings that are not known."""
    path = folder / SETTINGS
    if not is_file(path, ModelError):
        return {}
    settings = read_json(path, ModelError)
    if not isinstance(settings, dict):
        raise ModelError(f"{str(path)!r} is no JSON object")
    settings = {key: value for key, value in settings.items() if key not in allowed.TOKENIZER_BOOKKEEPING}
    schema.validate(schema.record(allowed.TOKENIZER_SETTINGS), settings, str(path), ModelError)
    return settings


def stage(source: Path, target: Path) -> None:
    """The data files and the allowed settings of a tokenizer in a fresh folder, for a library that would otherwise
    follow whatever stands beside them. Raises ModelError."""
    settings = check_folder(source)
    if not settings.get("tokenizer_class"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if not is_file(source / "tokenizer.json", ModelError):
            settings["tokenizer_class"] = "CLIPTokenizer" if is_file(source / "vocab.json", ModelError) else None
    found = [name for name in VOCABULARIES if is_file(source / name, ModelError)]
    if not found:
        raise ModelError(f"{str(source)!r} holds no tokenizer ({', '.join(VOCABULARIES[:7])})")
    for name in found:
        if (source / name).stat().st_size > allowed.TOKENIZER_BYTES:
            raise ModelError(f"{str(source / name)!r} is larger than any tokenizer; it is not read")
        shutil.copyfile(source / name, target / name)
    (target / SETTINGS).write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def tokenizer_from_config(config: dict[str, Any], file: bytes | None = None) -> Tokenizer:
    """The tokenizer that `config` describes (see `Tokenizer`)."""
    return Tokenizer(config, file)
