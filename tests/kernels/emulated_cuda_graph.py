"""CUDA graphs on CPU tensors: while one is captured it notes torch's ops with the tensors that they read and wrote; a
replay runs them again into the same memory. Streams and events only note what was asked of them. This stands for
`torch.cuda` where there is no GPU: it says what our code does, not what CUDA does with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class EmulatedCuda:
    """What `install` puts in the place of parts of `torch.cuda`; `log` is what happened, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = Stream(self, "default")
        self.streams = 0
        self.fails: Exception | None = None  # raised at the end of a capture

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "stream", self.use)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(torch.cuda, "graph", self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.log.append("empty cache"))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1000 * self.log.count("captured"))

    def new_stream(self) -> Stream:
        self.streams += 1
        return Stream(self, f"stream {self.streams}")

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def capturing(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and stream.name != "default"
        with self.use(stream), graph:
            yield
        if self.fails is not None:
            raise self.fails
        self.log.append("captured")


class Stream:
    def __init__(self, cuda: EmulatedCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.cuda.log.append(f"{self.name} waits for what {event.stream} did")


class Event:
    def __init__(self, cuda: EmulatedCuda) -> None:
        self.cuda, self.stream, self.time = cuda, "nobody", 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.stream, self.time = (stream or self.cuda.current).name, time.perf_counter()

    def synchronize(self) -> None:
        self.cuda.log.append(f"waited for what {self.stream} did")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000 * (end.time - self.time)


class Graph(TorchDispatchMode):
    def __init__(self, cuda: EmulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.name == "aten::_local_scalar_dense":
            raise RuntimeError("operation not permitted when stream is capturing\nSearch for `cudaError`")
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, _tensors(result)))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            for place, value in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                if place.data_ptr() != value.data_ptr():  # else a view of what is there, or changed in place
                    place.copy_(value)
        self.cuda.log.append(f"replayed on {self.cuda.current.name}")

    def reset(self) -> None:
        self.cuda.log.append("reset")


def _tensors(tree: Any) -> list[Tensor]:
    return [value for value in tree_flatten(tree)[0] if isinstance(value, Tensor)]
