"""Trains a prepared model: AdamW, cosine and warm-up, checkpoints that a killed run goes on from, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError, OutputError, QclipError
from ..progress import Progress
from . import checkpoint
from .log import Log
from .preparation import restart, trained_sites
from .processes import Processes
from .quantizer import Rounding
from .settings import Settings
from .site import RoundingError
from .step import Gradient

BETAS = (0.9, 0.98)


class TrainingError(QclipError):
    """Training that cannot go on; names the step and the last good checkpoint."""


class Trainer:
    """A run: the student, what it learns from, and how far it is. `folder`: where checkpoints and the log are kept;
    None: nowhere. `made_of`: all that the run depends on, as JSON."""

    def __init__(
        self,
        student: nn.Module,
        gradient: Gradient,
        settings: Settings,
        processes: Processes,
        folder: Path | None = None,
        made_of: dict[str, Any] | None = None,
    ) -> None:
        self.student, self.gradient, self.settings, self.processes = student, gradient, settings, processes
        self.folder, self.made_of = folder, made_of or {}
        self.sites = list(trained_sites(student))
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("no parameter of the model may learn (requires_grad); set it on those that shall")
        self.optimizer = self._optimizer()
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if settings.ema else {}
        self.done = 0
        self.log = Log(folder if processes.first else None)
        self._round(settings.first_rounded == 0)

    def run(self, progress: Progress | None = None) -> None:
        """To the last step, from the last checkpoint where there is one. Raises TrainingError, and NonFiniteError."""
        self._go_on()
        self.student.eval()  # dropout of a few hundred steps is noise
        self._learning(True)
        try:
            self._steps(progress)
        finally:
            self._learning(False)
        self._round(True)  # a run that goes on behind its last step takes none, which would have set it

    def _steps(self, progress: Progress | None) -> None:
        settings = self.settings
        while self.done < settings.steps:
            if self.done == settings.first_rounded > 0:
                restart(self.student, self.gradient.pairs.samples())
            self._round(self.done >= settings.first_rounded)
            self._step()
            if self.done % settings.save_every == 0 or self.done == settings.steps:
                if spoiled := self._spoiled():
                    raise self._stopped(NonFiniteError, spoiled, step=self.done)
                self._save()
            if progress is not None and self.processes.first:
                progress(f"training, loss {self.log.last('loss'):.4f}", self.done, settings.steps)

    # -- a step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        settings, share = self.settings, self.settings.share(self.done)
        done = self.done / settings.steps
        self.optimizer.zero_grad(set_to_none=True)
        try:
            terms = self.gradient(self.done, done)
        except RoundingError as why:
            raise self._stopped(TrainingError, str(why)) from None
        if not np.isfinite(terms["loss"]):
            raise self._stopped(NonFiniteError, f"the loss is {terms['loss']}", self._culprit())
        norms = {}
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * share
        for kind in ("weights", "scales"):
            members = [p for group in self.optimizer.param_groups if group["kind"] == kind for p in group["params"]]
            if members:
                norms[f"norm_{kind}"] = float(torch.nn.utils.clip_grad_norm_(members, settings.clip or float("inf")))
        if not np.isfinite(list(norms.values())).all():
            raise self._stopped(NonFiniteError, "a gradient is NaN or Inf", self._culprit())
        self.optimizer.step()
        self._after(done)
        self.done += 1
        self.log.add(self.done, {**terms, "rate": settings.rate * share, **norms})

    @torch.no_grad()
    def _after(self, done: float) -> None:
        for site, module in self.sites:
            if not module.rounds:
                continue
            for rounding in (module.rounding, module.input_rounding):
                if rounding is not None:
                    rounding.after(module.weight, done)
                    if fault := rounding.fault():
                        raise self._stopped(TrainingError, f"at {site.name} {fault}", hint="lower scale_rate")
        if isinstance(scale := self.student.logit_scale, nn.Parameter) and scale.requires_grad:
            scale.clamp_(max=float(np.log(100)))
        for name, average in self.average.items():
            average.lerp_(self.parameters[name], 1 - self.settings.ema)

    def _learning(self, learning: bool) -> None:
        """Whether roundings are those of training: noise is none afterwards."""
        for module in self.student.modules():
            if isinstance(module, Rounding):
                module.train(learning)

    def _round(self, rounds: bool) -> None:
        for _, module in self.sites:
            module.rounds = rounds

    def _optimizer(self) -> torch.optim.Optimizer:
        """Groups: weights, with decay; norms, biases and positions, without; scales of quantizers, without and with
        their own rate."""
        settings = self.settings
        scales = {id(p) for m in self.student.modules() if isinstance(m, Rounding) for p in m.parameters()}
        own = {id(module.weight) for _, module in self.sites}
        groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for parameter in self.parameters.values():
            if id(parameter) in scales:
                key = ("scales", settings.scale_rate, 0.0)
            else:
                decays = id(parameter) in own
                key = ("weights", settings.rate, settings.decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
        described = [
            {"params": members, "kind": kind, "rate": rate, "lr": rate, "weight_decay": decay}
            for (kind, rate, decay), members in groups.items()
        ]
        return torch.optim.AdamW(described, betas=BETAS)

    # -- what stops it -----------------------------------------------------------------------------------------------

    def _stopped(
        self,
        kind: type[QclipError],
        why: str,
        culprit: str = "",
        *,
        hint: str = "lower the rate",
        step: int | None = None,
    ) -> QclipError:
        """`step`: counted from 1; None: the one that is being taken."""
        kept = None if self.folder is None else checkpoint.latest(self.folder)
        last = f"the last good checkpoint is {str(kept)!r}" if kept else "no checkpoint was written yet"
        at, told = self.done + 1 if step is None else step, f"{culprit}; {hint}" if culprit else hint
        return kind(f"training stopped at step {at}: {why} ({told}); {last}")

    def _spoiled(self) -> str:
        """The first parameter that is not finite, as a clause; empty where all are."""
        for name, parameter in self.parameters.items():
            if not parameter.detach().isfinite().all():
                return f"{name} holds NaN or Inf"
        return ""

    @torch.no_grad()
    def _culprit(self) -> str:
        """The first thing that is not finite, as a clause: a parameter, what a site gives for this step's batch, or a
        gradient; empty where all are."""
        if spoiled := self._spoiled():
            return spoiled
        odd: list[str] = []
        handles = [
            site.module.register_forward_hook(
                lambda _, __, y, name=site.name: None if y.isfinite().all() else odd.append(name)
            )
            for site, _ in self.sites
        ]
        try:
            rows, captions = self.gradient.pairs.batch(self.done, self.settings.batch, self.settings.seed)
            self.gradient.embedder.images(self.gradient.pairs.pixels(rows))
            self.gradient.embedder.texts(self.gradient.pairs.tokens[captions])
        finally:
            for handle in handles:
                handle.remove()
        if odd:
            return f"the first site whose output is not finite is {odd[0]}"
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name} is not"
        return ""

    # -- on disk -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.folder is None:
            return
        if self.processes.first:
            facts = {"made_of": self.made_of, "step": self.done, "columns": self.log.columns}
            try:
                checkpoint.write(self.folder, self.done, self._state(), facts)
                self.log.write()
            except OutputError as error:
                hint = "make room for it, and start it again"
                raise self._stopped(OutputError, str(error), hint=hint, step=self.done) from error
        self.processes.wait()

    def _go_on(self) -> None:
        path = None if self.folder is None else checkpoint.latest(self.folder)
        if path is not None:
            tensors, facts = checkpoint.read(path, self.made_of)
            self._load(tensors)
            self.done = int(facts["step"])
            self.log.load(facts["columns"], tensors["log"])
        found = self.processes.each(self.done)
        if len(set(found)) > 1:
            raise checkpoint.CheckpointError(
                f"the processes would go on from different steps ({', '.join(map(str, sorted(set(found))))}), as "
                f"{str(self.folder)!r} is not the same for all of them; name an output that they share"
            )

    def _state(self) -> dict[str, Tensor]:
        """Everything that a step changes, or reads and a start does not make again."""
        out = {f"model.{name}": tensor for name, tensor in self._tensors().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        out |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        out["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            out |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        out["log"] = self.log.values()
        return out

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the student, each once; not the memory of what never changes."""
        tensors: dict[str, Tensor] = dict(self.student.named_parameters())
        for site, module in self.sites:
            tensors |= {f"{site.name}.{name}": buffer for name, buffer in module.named_buffers()}
        return tensors

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor]) -> None:
        own = self._tensors()
        try:
            for name, tensor in own.items():
                tensor.copy_(tensors[f"model.{name}"])
            for name, average in self.average.items():
                average.copy_(tensors[f"average.{name}"])
            for name, parameter in self.parameters.items():
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
                if keys:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"].to("cpu" if key == "step" else parameter.device)
                        for key in keys
                    }
            torch.set_rng_state(tensors["random"])
            if torch.cuda.is_available() and "random.cuda.0" in tensors:
                count = torch.cuda.device_count()
                torch.cuda.set_rng_state_all([tensors[f"random.cuda.{i}"] for i in range(count)])
        except (KeyError, RuntimeError) as error:
            raise checkpoint.CheckpointError(
                f"{str(self.folder)!r} holds a run of another model ({error}); name another output, or remove it"
            ) from None
