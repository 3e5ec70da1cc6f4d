"""A small study: two recipes of `scenes-clean` on a few images."""

from __future__ import annotations

from pathlib import Path

from qclip.study.measure import Outcome
from qclip.study.plan import Plan
from qclip.study.plan_file import read
from qclip.study.run import Ready, engine_of, prepare, run
from qclip.study.store import StudyStore
from qclip.study.tasks import Task

DATA = "scenes:test?samples=60"
OOD = "scenes:far-ood?samples=40"
TEXT = f"""
models = ["scenes-clean"]
recipes = ["w8a8", "w4a8"]
data = ["{DATA}"]

[ood]
far = ["{OOD}"]

[corruptions]
names = ["gaussian_noise"]
severities = [3]

[statistics]
measurements = ["clean", "ood", "corrupted"]
scores = ["mcm"]
replicates = 50
batch = 32
"""


class Told:
    """Remembers what an engine told."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.began_with: list[Task] = []

    def began(self, task: Task, worker: str) -> None:
        self.began_with.append(task)

    def progress(self, worker: str, what: str, done: int, total: int) -> None:
        pass

    def ended(self, task: Task, worker: str, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    @property
    def done(self) -> list[str]:
        return [cell for outcome in self.outcomes for cell in outcome.done]

    @property
    def failed(self) -> list[str]:
        return [cell for outcome in self.outcomes for cell in outcome.failed]


def plan_of(folder: Path, text: str = TEXT) -> Plan:
    file = folder / "plan.toml"
    file.write_text(text)
    return read(file)


def ready_of(plan: Plan, folder: Path | str, **how: object) -> Ready:
    return prepare(plan, StudyStore.create(folder), threads=1, **how)  # type: ignore[arg-type]


def measured(plan: Plan, folder: Path | str, workers: int = 1, **how: object) -> tuple[Ready, Told]:
    ready, told = ready_of(plan, folder, workers=workers, **how), Told()
    run(ready, engine_of(workers), told)
    return ready, told
