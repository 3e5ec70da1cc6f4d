"""A score, a corruption, a metric, a measurement and a report section in one file outside the package: installed, they
stand in `--help`, run in `evaluate`, and are in the results and the report. Nothing of ours is edited."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import qclip.metrics
from qclip.data.corruptions import CORRUPTIONS, apply
from qclip.errors import DataError, InputError
from qclip.metrics import METRICS
from qclip.registry import Registry
from qclip.reliability import evaluate
from qclip.reliability.measurements import MEASUREMENTS
from qclip.reliability.measurements.ood import DETAILED, DETECTION, TRAPEZOIDS
from qclip.reliability.scores import SCORES, Formula
from qclip.reporting import html, table
from qclip.reporting.sections import SECTIONS
from tests.reliability.fakes import Tiny, pictures, preprocess

PLUG_IN = '''
from qclip.metrics import Metric
from qclip.reliability.request import Condition
from qclip.reporting.parts import Cell, Table
from qclip.reporting.sections import Section


class Nearest:
    """Cosine to the nearest training image."""

    name, label, needs = "toy_nearest", "Toy nearest", frozenset({"train"})

    def __init__(self, train=None):
        self.train = train

    def fit(self, known):
        return Nearest(known.train)

    def __call__(self, sample):
        return (sample.features @ self.train.features.T).max(1)


class Fade:
    name, label, version = "toy_fade", "Toy fade", 1

    def __call__(self, image, severity, small, rng):
        return image + (0.5 - image) * severity / 6


SPREAD = Metric("toy_spread", "Toy spread", 1, "share", 1)


class Spread:
    """How far embeddings lie apart."""

    name, label = "toy_spread", "Toy spread"

    def wants(self, request):
        return [Condition(each, vectors=True) for each in request.of("id")]

    def rows(self, request, embedded, out):
        for condition in self.wants(request):
            page = out.page(condition.set.name, condition.set.role, len(embedded.indices(condition)))
            for model, vectors in embedded.vectors(condition).items():
                page.add(model, "toy_spread", value=vectors.std(0).mean())


class SpreadSection(Section):
    name, title = "toy_spread", "How far embeddings lie apart"
    intro, absent = "Mean deviation over the dimensions.", "It was not measured."

    def tables(self, index):
        rows = [[Cell(row["model"]), Cell(f"toy {row['value']:.6f}")] for row in index.rows("toy_spread")]
        return [Table("Toy spread", [Cell("Model"), Cell("Spread")], rows)] if rows else []
'''
POINTS = """
[qclip.scores]
toy_nearest = a_toy:Nearest
[qclip.corruptions]
toy_fade = a_toy:Fade
[qclip.metrics]
toy_spread = a_toy:SPREAD
[qclip.measurements]
toy_spread = a_toy:Spread
[qclip.sections]
toy_spread = a_toy:SpreadSection
"""
REGISTRIES: tuple[Registry, ...] = (SCORES, CORRUPTIONS, METRICS, MEASUREMENTS, SECTIONS)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plug-in as pip leaves it: one module and its entry points."""
    (tmp_path / "a_toy.py").write_text(PLUG_IN)
    info = tmp_path / "a_toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in REGISTRIES:
        registry.forget()
    yield
    monkeypatch.undo()
    sys.modules.pop("a_toy", None)
    for registry in REGISTRIES:
        registry.forget()


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 50)


def run(models=None, **options):
    models = {"float": Tiny(), "worse": Tiny(1.0)} if models is None else models
    ood = pictures("noise", 30, seed=3, strange=True)
    return evaluate(models, pictures(), ood, **{"templates": ["a {}"], "cache": False} | options)


def features(model: Tiny, data) -> np.ndarray:
    images = np.stack([preprocess(image).numpy().ravel() for image in data.source.read(range(len(data)))])
    vectors = images @ model.image.weight.detach().numpy().T.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.usefixtures("installed")
def test_one_file_outside_the_package_is_everywhere() -> None:
    from qclip.cli.app import app

    train, models = pictures("album", 60, seed=8), {"float": Tiny(), "worse": Tiny(1.0)}
    results = run(models, train=train, corruptions=["gaussian_noise", "toy_fade"])
    for label, model in models.items():
        learned = features(model, train)
        inside, outside = (
            (features(model, each) @ learned.T).max(1)
            for each in (pictures(), pictures("noise", 30, seed=3, strange=True))
        )
        found = results.value(model=label, set="noise", score="toy_nearest", metric="auroc")
        assert found == pytest.approx(qclip.metrics.auroc(inside, outside), abs=2e-3)
        spread = results.value(model=label, set="pets", metric="toy_spread")
        assert spread == pytest.approx(features(model, pictures()).std(0).mean(), rel=1e-4)
        assert results.value(model=label, set="pets", metric="top1", corruption="toy_fade", severity=5) is not None
        assert model.images_seen == 90 + 30 + 60 + 2 * 5 * 90  # every condition once, whoever wants it
    page, text = html(results), table(results)
    for said in ("Toy nearest", "Toy fade", "How far embeddings lie apart", f"toy {spread:.6f}"):
        assert said in page, said
    assert "Toy fade" in page and results.value(model="worse", set="pets", metric="mean_top1", corruption="toy_fade")
    assert "Against float" in text
    shown = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).output
    for name in ("toy_nearest", "toy_fade", "toy_spread", "gaussian_noise", "mcm", "agreement"):
        assert name in shown, name


@pytest.mark.usefixtures("installed")
def test_a_score_that_learns_is_left_out_by_name_or_refused_without_training_images() -> None:
    results = run()
    assert any("toy_nearest (each learns from training images" in note for note in results.notes)
    assert "mcm" in (scores := results.where(metric="auroc").unique("score")) and "toy_nearest" not in scores
    with pytest.raises(InputError, match=r"name a set \(train=\)"):
        run(scores=["toy_nearest"])


def test_names_choose_what_is_measured() -> None:
    model = Tiny()
    results = run({"m": model}, measurements=["ood"], scores=["energy"])
    assert set(results.where(role="ood").unique("metric")) == {*DETECTION, *DETAILED, *TRAPEZOIDS}
    assert results.unique("score") == ["energy"] and not results.where(metric="top1").rows
    assert model.images_seen == 90 + 30  # nothing was embedded that nobody wants
    assert run(corruptions=[]).unique("corruption") == []
    for options, message in (
        ({"measurements": ["odd"]}, "unknown measurement 'odd'; did you mean 'ood'"),
        ({"scores": ["mcmm"]}, "unknown score 'mcmm'; did you mean 'mcm'"),
        (
            {"corruptions": ["gaussian"]},
            "unknown corruption 'gaussian'; did you mean 'gaussian_blur', 'gaussian_noise'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            run(**options)


@pytest.fixture
def registered() -> Iterator[Callable]:
    added = []

    def add(registry: Registry, item) -> None:
        registry.register(item)
        added.append((registry, item.name))

    yield add
    for registry, name in added:
        registry.unregister(name)


@pytest.mark.parametrize(
    ("of", "needs", "message"),
    [
        (lambda s: s.features, (), r"score 'bad' gives \[90, 16\] with 0 NaN or infinite values for 90 images"),
        (lambda s: s.cosines.max(1) * np.nan, (), r"gives \[90\] with 90 NaN or infinite values"),
        (lambda s: 1.0, (), r"gives \[\] with 0 NaN"),
        (
            lambda s: s.cosines.max(1),
            ("captions",),
            "score 'bad' needs 'captions'; evaluate gives labels, negatives, patches, train",
        ),
    ],
)
def test_a_score_that_is_unfit_is_named(registered, of, needs, message: str) -> None:
    registered(SCORES, Formula("bad", "Bad", of, frozenset(needs)))
    with pytest.raises(InputError, match=message):
        run()


@pytest.mark.parametrize("wrong", [lambda image: image[:2], lambda image: image * np.nan, lambda image: image[0, 0, 0]])
def test_a_corruption_that_gives_no_image_is_named(registered, wrong) -> None:
    def bad(image, severity, small, rng):
        return wrong(image)

    bad.name, bad.label, bad.version = "bad", "Bad", 1
    registered(CORRUPTIONS, bad)
    with pytest.raises(DataError, match="corruption 'bad' gives .* it must give finite numbers of the same shape"):
        apply(np.zeros((4, 5, 3), np.uint8), "bad", 1, 0)


def test_a_new_version_of_a_corruption_is_embedded_again(registered, tmp_path: Path) -> None:
    def fade(image, severity, small, rng):
        return image * 0.9**severity

    fade.name, fade.label, fade.version = "fade", "Fade", 1
    registered(CORRUPTIONS, fade)

    def seen() -> int:
        model = Tiny()
        run({"m": model}, corruptions=["fade"], cache=tmp_path)
        return model.images_seen

    assert seen() == 90 + 30 + 5 * 90 and seen() == 0
    fade.version = 2
    assert seen() == 5 * 90


def test_what_is_not_fit_to_be_registered_is_refused() -> None:
    for registry in REGISTRIES:
        with pytest.raises((InputError, DataError), match="has no "):
            registry.register(SimpleNamespace(name="half"))
