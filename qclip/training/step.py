"""One step's gradient: of a loss over a whole batch, whatever parts of it are embedded at a time and on which machine.

The embeddings of all parts and processes are gathered first, the loss and its gradient by the embeddings follow, and
each part is then sent back through the towers with its share of that (Gao et al. 2021, arXiv 2101.06983). So a batch
that is cut gives the gradient of the whole one. Weights are rounded once per step, and the gradient of the rounded
weight, summed over parts and processes, goes through the quantizer once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models, seeds
from .embedder import Embedder
from .inputs import Batch, Inputs
from .objectives import Apart, Features, Mixtures, Negatives, Objective, Views
from .pairs import Pairs, Rows
from .preparation import trained_sites
from .processes import Processes
from .quantizer import Rounding
from .settings import Settings
from .site import TrainedSite
from .teacher import Teacher


class Gradient:
    """Fills `grad` of a prepared model's parameters, step by step. `apart`: pairs for terms that need such."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Pairs,
        objective: Objective,
        settings: Settings,
        processes: Processes,
        classes: Tensor | None = None,
        apart: Pairs | None = None,
    ) -> None:
        self.objective, self.pairs, self.settings, self.processes = objective, pairs, settings, processes
        self.student = student
        self.embedder = Embedder(student, settings)
        self.scale: nn.Parameter = student.logit_scale  # type: ignore[assignment]
        self.sites: list[TrainedSite] = [module for _, module in trained_sites(student)]
        self.weights = [site.rounding for site in self.sites]
        of_inputs = [site.input_rounding for site in self.sites if site.input_rounding is not None]
        self.of_inputs = list(dict.fromkeys(of_inputs))  # shared by q, k and v
        self.classes = classes
        self.inputs = Inputs(pairs, objective.needs, settings, processes.size, apart)
        self.float_model = teacher
        self.teacher = Teacher.of(teacher, pairs, objective.needs, classes, self.inputs)
        text = models.towers(student).get("text")
        learns = text is not None and any(p.requires_grad for p in text.module.parameters())
        self.text_learns = learns

    def __call__(self, step: int, done: float) -> dict[str, float]:
        """Of the batch of this step. -> the loss and its terms by name."""
        batch = self.inputs.of(step)
        pieces = {name: self._pieces(each.count) for name, each in batch.images.items()}
        pieces |= {name: self._pieces(len(each)) for name, each in batch.texts.items()}
        self._begin(self.weights, f"step {step} weights")
        leaves = self._hold()
        whole = all(len(each) == 1 for each in pieces.values())
        try:
            with torch.set_grad_enabled(whole):
                found = {n: [self._embed(step, batch, n, i, at) for i, at in enumerate(p)] for n, p in pieces.items()}
            seen = {n: self.processes.gathered(torch.cat(each)).requires_grad_() for n, each in found.items()}
            listed = None if self.classes is None else self.embedder.texts(self.classes)
            held = None if listed is None else listed.detach().requires_grad_()
            answers = self._answers(batch, pieces["mixtures"]) if "mixtures" in pieces else None
            loss, terms = self.objective(self._features(batch, seen, held, answers))
            loss.backward()
            self._back(listed, None if held is None or not self.processes.first else held.grad)
            for name, each in pieces.items():
                for i, at in enumerate(each):
                    gradient = seen[name].grad
                    one = found[name][i] if whole else self._embed(step, batch, name, i, at)
                    self._begin_piece(step, name, i)  # blocks that run again in backward draw what they have drawn
                    self._back(one, None if gradient is None else gradient[at])
            self._sum(leaves)
            terms |= self._through(leaves, done)
        finally:
            for site in self.sites:
                site.held = None
        return {"loss": float(loss.detach()), **{name: float(value.detach()) for name, value in terms.items()}}

    @torch.no_grad()
    def _answers(self, batch: Batch, pieces: list[Rows]) -> Tensor:
        """What the float model says of a step's mixtures."""
        embedder, pixels = Embedder(self.float_model, Settings()), batch.images["mixtures"].pixels
        with models.evaluating(self.float_model):
            return self.processes.gathered(torch.cat([embedder.images(pixels(at)) for at in pieces]))

    def _features(
        self, batch: Batch, seen: dict[str, Tensor], classes: Tensor | None, answers: Tensor | None = None
    ) -> Features:
        """What the objective sees of a step, of which these are the embeddings by name; `answers`: the float model's of
        its mixtures."""
        found = self._of_pairs(batch.rows, batch.captions, seen["image"], seen["text"], classes, self.teacher)
        more: dict[str, Any] = {}
        if "views" in seen:
            more["views"] = Views(seen["views"], found.teacher_image[: len(seen["views"])])
        if "negatives" in seen:
            assert self.teacher.negatives is not None
            more["negatives"] = Negatives(seen["negatives"], self.teacher.negatives)
        if answers is not None:
            more["mixtures"] = Mixtures(seen["mixtures"], answers)
        if "apart" in seen:
            captions = torch.from_numpy(batch.texts["apart text"]).to(found.captions.device)
            more["apart"] = Apart(seen["apart"], seen["apart text"], captions)
        return dataclasses.replace(found, **more)

    def _of_pairs(
        self, rows: Rows, captions: Rows, image: Tensor, text: Tensor, classes: Tensor | None, teacher: Teacher
    ) -> Features:
        return Features(
            image,
            text,
            self.scale.float().exp().reshape(()),
            teacher.images[rows],
            teacher.texts[captions],
            teacher.scale,
            torch.from_numpy(captions).to(image.device),
            classes,
            self.teacher.classes,
            basis=self.teacher.basis,
            consensus=None if teacher.consensus is None else teacher.consensus[rows],
        )

    @torch.no_grad()
    def held_out(self, pairs: Pairs, teacher: Teacher) -> tuple[float, Features]:
        """The objective of pairs that nobody learns from, each with its first caption, without what it draws beside a
        batch (where that is all, the distance to float); and their features. `teacher`: of these pairs."""
        rows, captions = pairs.firsts()
        images, texts = self.embedder.all(pairs)
        listed = None if self.classes is None else self.embedder.texts(self.classes)
        seen = self._of_pairs(rows, captions, images[rows], texts[captions], listed, teacher)
        judge = self.objective.of_pairs() or Objective("mse")
        return float(judge(seen)[0]), seen

    def _begin(self, roundings: Sequence[Rounding], what: str) -> None:
        """Give each of them a number of its own for what it draws at random."""
        numbers = seeds.generator(self.settings.seed, what).integers(1 << 62, size=len(roundings))
        for rounding, number in zip(roundings, numbers, strict=True):
            rounding.begin(int(number))

    def _begin_piece(self, step: int, name: str, piece: int) -> None:
        self._begin(self.of_inputs, f"step {step} {name} {self.processes.rank} {piece}")

    def _pieces(self, count: int) -> list[Rows]:
        """Places of this process's part of so many inputs, those of each call."""
        mine = np.arange(count)[self.processes.part(count)]
        size = min(len(mine), self.settings.micro or len(mine))
        return [mine[at : at + size] for at in range(0, len(mine), size)]

    def _embed(self, step: int, batch: Batch, name: str, piece: int, at: Rows) -> Tensor:
        self._begin_piece(step, name, piece)
        if name in batch.images:
            return self.embedder.images(batch.images[name].pixels(at))
        places = batch.texts[name][at]
        return self.embedder.texts(self.pairs.tokens[places]) if self.text_learns else self.teacher.texts[places]

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
        learned = [(rounded, leaf.grad) for rounded, leaf in leaves if leaf.grad is not None]
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
