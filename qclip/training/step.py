"""One step's gradient: of a loss over a whole batch, whatever parts of it are embedded at a time and on which machine.

The embeddings of all parts and processes are gathered first, the loss and its gradient by the embeddings follow, and
each part is then sent back through the towers with its share of that (Gao et al. 2021, arXiv 2101.06983). So a batch
that is cut gives the gradient of the whole one. Weights are rounded once per step, and the gradient of the rounded
weight, summed over parts and processes, goes through the quantizer once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .. import models
from ..models import Encoders
from .objectives import Features, Objective
from .pairs import Pairs, Rows
from .preparation import trained_sites
from .processes import Processes
from .settings import Settings
from .site import TrainedSite

AT_ONCE = 64  # images, or texts, that the teacher embeds at a time


class Embedder:
    """Unit embeddings of a model's towers, float32, as training wants them."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.encoders: Encoders = models.encoders(model)
        self.precision = settings.precision
        towers = models.towers(model).values() if settings.checkpointing else ()
        self.blocks = [block.module for tower in towers for block in tower.blocks]

    def images(self, pixels: Tensor) -> Tensor:
        with self._run():
            return F.normalize(self.encoders.encode_image(pixels).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        with self._run():
            return F.normalize(self.encoders.encode_text(tokens).float(), dim=-1)

    @torch.no_grad()
    def all(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Of every image, and of every caption."""
        rows = np.array_split(np.arange(len(pairs)), -(-len(pairs) // AT_ONCE))
        images = torch.cat([self.images(pairs.pixels(part)) for part in rows])
        return images, torch.cat([self.texts(tokens) for tokens in pairs.tokens.split(AT_ONCE)])

    @contextlib.contextmanager
    def _run(self) -> Iterator[None]:
        device = self.encoders.device.type
        half = torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")
        with _plain(device), half, _recomputed(self.blocks if torch.is_grad_enabled() else (), device):
            yield


def _plain(device: str) -> contextlib.AbstractContextManager[None]:
    """The fused attention's backward is slow on a CPU at the lengths of images."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _recomputed(blocks: Iterable[nn.Module], device: str) -> Iterator[None]:
    """Blocks keep their inputs alone, and run again in backward."""
    blocks = list(blocks)

    def run(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with _plain(device):  # in backward, too
            return forward(*args, **kwargs)

    for block in blocks:
        block.__dict__["forward"] = functools.partial(checkpoint, run, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


class Gradient:
    """Fills `grad` of a prepared model's parameters, step by step."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Pairs,
        objective: Objective,
        settings: Settings,
        processes: Processes,
        classes: Tensor | None = None,
    ) -> None:
        self.objective, self.pairs, self.settings, self.processes = objective, pairs, settings, processes
        self.student = student
        self.embedder, own = Embedder(student, settings), Embedder(teacher, Settings())
        self.scale: nn.Parameter = student.logit_scale  # type: ignore[assignment]
        self.sites: list[TrainedSite] = [module for _, module in trained_sites(student)]
        self.classes = classes
        self.teacher_images, self.teacher_texts = own.all(pairs)
        with torch.no_grad():
            self.teacher_classes = None if classes is None else own.texts(classes)
        self.teacher_scale = teacher.logit_scale.detach().float().exp().reshape(())  # type: ignore[union-attr, operator]
        text = models.towers(student).get("text")
        learns = text is not None and any(p.requires_grad for p in text.module.parameters())
        self.text_learns = learns

    def features(
        self,
        rows: Rows,
        captions: Rows,
        image: Tensor,
        text: Tensor,
        classes: Tensor | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
    ) -> Features:
        """What the objective sees of pairs, of which these are the rows and captions; `teacher`: the float model's
        embeddings of all their images and captions, by default those of the pairs that are learned from."""
        images, texts = (self.teacher_images, self.teacher_texts) if teacher is None else teacher
        return Features(
            image,
            text,
            self.scale.float().exp().reshape(()),
            images[rows],
            texts[captions],
            self.teacher_scale,
            torch.from_numpy(captions).to(image.device),
            classes,
            self.teacher_classes,
        )

    def __call__(self, step: int, done: float) -> dict[str, float]:
        """Of the batch of this step. -> the loss and its terms by name."""
        rows, captions = self.pairs.batch(step, self.settings.batch, self.settings.seed)
        mine = self.processes.part(len(rows))
        own_rows, own_captions = rows[mine], captions[mine]
        parts = self._parts(len(own_rows))
        leaves = self._hold()
        whole = len(parts) == 1
        try:
            with torch.set_grad_enabled(whole):
                found = [self._embed(own_rows[part], own_captions[part]) for part in parts]
            image = self.processes.gathered(torch.cat([each[0] for each in found])).requires_grad_()
            text = self.processes.gathered(torch.cat([each[1] for each in found])).requires_grad_()
            listed = None if self.classes is None else self.embedder.texts(self.classes)
            held = None if listed is None else listed.detach().requires_grad_()
            loss, terms = self.objective(self.features(rows, captions, image, text, held))
            loss.backward()
            self._back(listed, None if held is None or not self.processes.first else held.grad)
            for i, part in enumerate(parts):
                one, other = found[i] if whole else self._embed(own_rows[part], own_captions[part])
                self._back(one, _rows(image.grad, mine, part))
                self._back(other, _rows(text.grad, mine, part))
            self._sum(leaves)
            terms |= self._through(leaves, done)
        finally:
            for site in self.sites:
                site.held = None
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in terms.items()}}

    @staticmethod
    def teacher(model: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What `held_out` compares with: a float model's embeddings of these pairs."""
        return Embedder(model, Settings()).all(pairs)

    @torch.no_grad()
    def held_out(self, pairs: Pairs, teacher: tuple[Tensor, Tensor]) -> tuple[float, Features]:
        """The objective of pairs that nobody learns from, each with its first caption, and their features."""
        rows, captions = pairs.firsts()
        images, texts = self.embedder.all(pairs)
        listed = None if self.classes is None else self.embedder.texts(self.classes)
        seen = self.features(rows, captions, images[rows], texts[captions], listed, teacher)
        return float(self.objective(seen)[0]), seen

    def _parts(self, count: int) -> list[slice]:
        size = min(count, self.settings.micro or count)
        return [slice(at, min(at + size, count)) for at in range(0, count, size)]

    def _embed(self, rows: Rows, captions: Rows) -> tuple[Tensor, Tensor]:
        image = self.embedder.images(self.pairs.pixels(rows))
        if not self.text_learns:
            return image, self.teacher_texts[captions]
        return image, self.embedder.texts(self.pairs.tokens[captions])

    def _back(self, found: Tensor | None, gradient: Tensor | None) -> None:
        if found is not None and gradient is not None and found.requires_grad:
            torch.autograd.backward(found, gradient)

    def _hold(self) -> list[tuple[Tensor, Tensor]]:
        """Round every weight once: (rounded, the leaf that calls multiply by)."""
        leaves = []
        for site in self.sites:
            if site.rounds:
                rounded = site.rounded()
                site.held = rounded.detach().requires_grad_(rounded.requires_grad)
                leaves.append((rounded, site.held))
        return leaves

    def _sum(self, leaves: list[tuple[Tensor, Tensor]]) -> None:
        """Gradients of all processes: of rounded weights, and of what no quantizer of weights stands before. The logit
        scale's is that of the whole batch in each of them already."""
        if self.processes.size == 1:
            return
        behind = {id(self.scale)}
        for site in self.sites:
            if site.held is not None:
                behind |= {id(p) for p in (site.weight, *site.rounding.parameters())}
        learned = [p for p in self.student.parameters() if p.requires_grad and id(p) not in behind]
        learned += [leaf for _, leaf in leaves if leaf.requires_grad]  # type: ignore[misc]
        for each in learned:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
        self.processes.sum_([each.grad for each in learned])  # type: ignore[misc]

    def _through(self, leaves: list[tuple[Tensor, Tensor]], done: float) -> dict[str, Tensor]:
        """The gradients of rounded weights, and penalties, to weights and scales."""
        learned = [(rounded, leaf.grad) for rounded, leaf in leaves if leaf.requires_grad]
        if learned:
            torch.autograd.backward([each for each, _ in learned], [grad for _, grad in learned])
        penalties = []
        seen: set[int] = set()
        for site in self.sites:
            for rounding, x in ((site.rounding, site.weight), (site.input_rounding, site.weight)):
                if rounding is not None and site.rounds and id(rounding) not in seen:
                    seen.add(id(rounding))
                    penalties.append(rounding.penalty(x, done))
        found = [each for each in penalties if each is not None]
        if not found:
            return {}
        total = torch.stack(found).sum()
        total.backward()
        return {"penalty": total}


def _rows(gradient: Tensor | None, mine: slice, part: slice) -> Tensor | None:
    return None if gradient is None else gradient[mine][part]
