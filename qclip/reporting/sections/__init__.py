"""The page below the verdicts, by topic: one file per section holds what is asked, drawn, tabulated and said.

Another package adds a section by an entry point of the group `qclip.sections`, a script by `SECTIONS.register`.
"""

from __future__ import annotations

from qclip.registry import Registry

from .. import overview, verdicts
from ..index import Cohort, Index
from ..overview import Axis
from ..parts import Panel, Table
from ..verdicts import Answers, Question


class Section:
    """One topic. Subclasses fill what they have; a section without panels and tables shows only `absent`."""

    name: str  # the anchor in the page
    title: str
    intro: str  # how to read the figures
    absent: str  # what is said where the results hold nothing of it
    tables_printed = True  # False: too long for paper
    tables_title = "All numbers"  # the tables are folded behind it; "" shows them openly

    def questions(self, index: Index) -> list[Question]:
        """What is compared between a model and its reference: lines of the verdict tables."""
        return []

    def lines(self, index: Index) -> dict[str, list[Question]]:
        """Lines of the overview, each with the questions that speak for it; one without any says "not measured"."""
        leading = [question for question in self.questions(index) if question.leading]
        return {self.title: leading} if leading else {}

    def overview(self, index: Index, cohort: Cohort, answers: Answers) -> list[Axis]:
        """Marks of each variant on the lines of this section."""
        return [overview.axis(name, cohort, asked, answers) for name, asked in self.lines(index).items()]

    def panels(self, index: Index) -> list[Panel]:
        return []

    def tables(self, index: Index) -> list[Table]:
        return []

    def sentences(self, index: Index) -> list[str]:
        """Findings that stand above the figures."""
        return []

    def about(self, index: Index, cohort: Cohort, model: str, answers: Answers) -> list[str]:
        """What explains the verdicts on one model; it follows them on the model's card."""
        return []


_HERE = "qclip.reporting.sections"
SECTIONS: Registry[type[Section]] = Registry(
    "report section",
    "qclip.sections",
    {
        "controls": f"{_HERE}.controls:ControlsSection",
        "accuracy": f"{_HERE}.accuracy:AccuracySection",
        "selective": f"{_HERE}.selective:SelectiveSection",
        "ood": f"{_HERE}.ood:OodSection",
        "corruptions": f"{_HERE}.corruptions:CorruptionsSection",
        "shift": f"{_HERE}.shift:ShiftSection",
        "groups": f"{_HERE}.groups:GroupsSection",
        "agreement": f"{_HERE}.agreement:AgreementSection",
        "neighbours": f"{_HERE}.neighbours:NeighboursSection",
        "retrieval": f"{_HERE}.retrieval:RetrievalSection",
        "paired": f"{_HERE}.paired:PairedSection",
        "human": f"{_HERE}.human:HumanSection",
        "probe": f"{_HERE}.probe:ProbeSection",
        "pairwise": f"{_HERE}.pairwise:PairwiseSection",
        "spectra": f"{_HERE}.spectra:SpectraSection",
        "features": f"{_HERE}.features:FeaturesSection",
        "interventions": f"{_HERE}.interventions:InterventionsSection",
        "sensitivity": f"{_HERE}.sensitivity:SensitivitySection",
        "coverage": f"{_HERE}.coverage:CoverageSection",
        "speed": f"{_HERE}.speed:SpeedSection",
    },
    attributes=("title", "intro", "absent", "questions", "panels", "tables", "sentences", "about"),
)


def all_sections() -> list[Section]:
    """One of each, in the order of the page."""
    return [kind() for _, kind in SECTIONS.items()]


def compare(index: Index, cohort: Cohort) -> Answers:
    """What every section asks of a cohort, in the order of the page, with its answers."""
    return verdicts.compare(index, cohort, [q for section in all_sections() for q in section.questions(index)])


def overview_of(index: Index, cohort: Cohort, answers: Answers) -> list[Axis]:
    """The overview of a cohort, in the order of the page."""
    return [axis for section in all_sections() for axis in section.overview(index, cohort, answers)]


def about(index: Index, cohort: Cohort, model: str, answers: Answers) -> list[str]:
    """What is said of one model against its reference: the verdicts, then what the sections have to explain them."""
    said = verdicts.about(cohort, model, answers)
    return said + [line for section in all_sections() for line in section.about(index, cohort, model, answers)]
