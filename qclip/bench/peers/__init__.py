"""What a quantized tower is measured beside, one file per peer.

Each runs in a process of its own (`qclip/bench/worker.py`): what it prints, how it crashes and how long it takes stays
there. Another package adds one by an entry point of the group `qclip.peers`, a script by `PEERS.register`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Protocol

from qclip.errors import InputError, nearest
from qclip.registry import Registry

from ..case import Case, Run


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run the tower.

    run: a call, which returns the embeddings [B, E]. exact: whether its sums of integers are right on every processor;
    False where they can saturate on one without VNNI. instructions: what it runs, where it tells.
    """

    name: str
    run: Run
    exact: bool = True
    instructions: str = ""


class Peer(Protocol):
    """name: by which `--peers` asks for it. needs: modules that it imports. held_by: environment variables that hold it
    to an instruction set; empty where none does.

    settings: its settings, the most telling one first; each is made only when it is asked for, in turn with the other
    peers' and within the time that there is.
    """

    name: str
    needs: tuple[str, ...]
    held_by: tuple[str, ...]

    def settings(self, case: Case) -> Iterator[Setting]: ...


_HERE = "qclip.bench.peers"
PEERS: Registry[Peer] = Registry(
    "peer",
    "qclip.peers",
    {
        "torch-fp32": f"{_HERE}.torch_float:FLOAT32",
        "torch-bf16": f"{_HERE}.torch_float:BFLOAT16",
        "torchao": f"{_HERE}.torchao:TorchAO",
        "onnxruntime": f"{_HERE}.onnxruntime:OnnxRuntime",
        "openvino": f"{_HERE}.openvino:OpenVINO",
    },
    ("needs", "held_by", "settings"),
)


def peer_names(text: str) -> tuple[str, ...]:
    """`"all"`, `"none"` or a comma-separated list -> names. Raises InputError for an unknown or missing peer."""
    names = tuple(PEERS) if text == "all" else () if text == "none" else tuple(n.strip() for n in text.split(","))
    for name in names:
        if name not in PEERS:
            raise InputError(f"unknown peer {name!r}; {nearest(name, PEERS)} (or all, none)")
        if absent := [m for m in PEERS.get(name).needs if importlib.util.find_spec(m) is None]:
            raise InputError(
                f"peer {name!r} needs {' and '.join(absent)}, which is not installed; "
                "`make bench` installs the peers (extra `bench`)"
            )
    return tuple(dict.fromkeys(names))
