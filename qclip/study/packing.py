"""A quantized model as one file, which machines share."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from qclip import artifact
from qclip.errors import InputError
from qclip.files import whole_folder

FILES = (artifact.TENSORS, artifact.TOKENIZER, artifact.DESCRIPTION)


def packed(folder: Path) -> bytes:
    """The same bytes for the same files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for each in (folder / name for name in FILES):
            if each.exists():
                info = tarfile.TarInfo(each.name)
                info.size = each.stat().st_size
                with each.open("rb") as file:
                    tar.addfile(info, file)
    return out.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Only files that an artifact has; `artifact.load` checks what is in them. Raises InputError."""
    with (
        whole_folder(folder, last=artifact.DESCRIPTION, alone=True) as fresh,
        tarfile.open(fileobj=io.BytesIO(content)) as tar,
    ):
        for info in tar:
            file = tar.extractfile(info) if info.isreg() and info.name in FILES else None
            if file is None:
                raise InputError(f"{info.name!r} is no file of a quantized model")
            (fresh / info.name).write_bytes(file.read())
