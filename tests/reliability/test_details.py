"""What `evaluate` says of whole sets beyond the usual rows, computed again by hand; and what is kept between runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qclip import metrics
from qclip.errors import InputError
from qclip.metrics.predictions import DETAILED, LABELLED
from qclip.reliability import evaluate
from qclip.results import Results
from qclip.store import Entry, Store, StoreWarning
from tests.reliability.fakes import CLASSES, Tiny, pictures, preprocess, tokenizer
from tests.reliability.test_engine import logits


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 100)


WINS = ("wins", "wins_clear", "wins_expected", "wins_p")
MODELS = {"float": Tiny(), "worse": Tiny(0.6), "worst": Tiny(2.0)}


def run(data=None, **options) -> Results:
    settings = {"templates": ["a {}", "a drawing of a {}"], "cache": False, "corruptions": ()} | options
    return evaluate(MODELS, pictures() if data is None else data, **settings)


@pytest.fixture(scope="module")
def sets() -> dict:
    near, far = pictures("near-pets", 40, seed=2, strange=True), pictures("noise", 30, seed=3, strange=True)
    return {"data": pictures(), "dev": pictures("dev", 60, seed=5), "ood": [near, far]}


def test_every_metric_of_a_whole_set_is_written(sets) -> None:
    results = run(**sets, measurements=["clean"])
    for label, model in MODELS.items():
        z, y = logits(model, sets["data"]), sets["data"].labels
        temperature = metrics.fit_temperature(logits(model, sets["dev"]), sets["dev"].labels).value
        expected = {k: v for k, v in metrics.measure(z, y, temperature).items() if "proxy" not in k}
        found = {name: results.value(model=label, set="pets", metric=name) for name in expected}
        assert found.keys() == {*LABELLED, *DETAILED} - {"ece_proxy", "nll_proxy"}
        assert found == pytest.approx(expected, abs=1e-5)
        row = results.row(model=label, set="pets", metric="aurc")
        assert row["low"] < row["value"] < row["high"]
        confidence, right = metrics.softmax(z).max(1), z.argmax(1) == y
        dev = metrics.softmax(logits(MODELS["float"], sets["dev"])).max(1)
        kept = confidence >= metrics.threshold_at(dev, 0.8)
        assert results.value(model=label, set="pets", metric="coverage_transferred") == pytest.approx(kept.mean())
        risk = 1 - right[kept].mean()
        assert results.value(model=label, set="pets", metric="risk_transferred") == pytest.approx(risk)
        curve = results.curve(model=label, set="pets", metric="risk_coverage")
        assert curve["coverage"][-1] == 1 and curve["risk"][-1] == pytest.approx(1 - right.mean())
    one, other = (results.value(model=m, set="pets", metric="top1") for m in ("float", "worst"))
    drop = results.row(model="worst", reference="float", set="pets", metric="relative_drop")
    assert drop["value"] == pytest.approx((one - other) / one) and drop["low"] < drop["value"] < drop["high"]


def test_detection_has_areas_tests_and_what_the_references_threshold_gives(sets) -> None:
    results = run(**sets, measurements=["ood"])
    of = {"maxlogit": lambda z: z.max(1), "mcm": lambda z: metrics.softmax(z / 20).max(1)}
    for score, read in of.items():
        inside = {m: read(logits(model, sets["data"])) for m, model in MODELS.items()}
        at = metrics.threshold_at(read(logits(MODELS["float"], sets["dev"])), 0.95)
        for strange in sets["ood"]:
            outside = {m: read(logits(model, strange)) for m, model in MODELS.items()}
            for m in MODELS:
                where = {"model": m, "set": strange.name, "score": score}
                for side in ("in", "out"):
                    expected = metrics.aupr(inside[m], outside[m], "id" if side == "in" else "ood")
                    assert results.value(metric=f"aupr_{side}", **where) == pytest.approx(expected, abs=1e-3)
                for name, side in (("tpr_transferred", inside[m]), ("fpr_transferred", outside[m])):
                    assert results.value(metric=name, **where) == pytest.approx((side >= at).mean(), abs=0.04)
            test = metrics.delong(np.stack(list(inside.values())), np.stack(list(outside.values())))
            for i, m in ((1, "worse"), (2, "worst")):
                where = {"model": m, "reference": "float", "set": strange.name, "score": score}
                assert results.value(metric="delong_p", **where) == pytest.approx(test.p(i), abs=0.02)
                drop = 1 - test.auroc[i] / test.auroc[0]
                assert results.value(metric="relative_drop_auroc", **where) == pytest.approx(drop, abs=2e-3)
    assert any("noise: AUPR is of 90 ID and 30 OOD images" in note for note in results.notes)
    mean = {"set": "mean of 2 OOD sets", "score": "mcm", "reference": "float"}
    wins = {name: results.row(model="", metric=name, **mean) for name in WINS}
    assert wins["wins"]["n"] == 2
    more = [results.value(model=m, metric="auroc", **mean) > 0 for m in ("worse", "worst")]
    assert wins["wins"]["value"] <= sum(more)
    assert 0 <= wins["wins_expected"]["low"] <= wins["wins_expected"]["value"] <= wins["wins_expected"]["high"] <= 2
    assert wins["wins_clear"]["value"] <= wins["wins"]["value"] and 0 < wins["wins_p"]["value"] <= 1


def captioned(n: int = 30, seed: int = 8):
    found = pictures("pairs", n, seed)
    captions = [[f"a {CLASSES[k]}{'!' * (i // 6 % 3)}", "another"] for i, k in enumerate(np.arange(n) % 6)]
    return dataclasses.replace(found, captions=captions)


def test_logit_scales_are_tuned_on_pairs_each_caption_once() -> None:
    proxy = captioned()
    results = run(proxy=proxy, measurements=["clean"])
    rows = np.arange(18)  # 18 different captions, first met in this order
    for label, model in MODELS.items():
        images = np.stack([preprocess(image).flatten().numpy() for image in proxy.read(range(30))])[rows]
        seen = images @ model.image.weight.detach().numpy().T
        said = model.encode_text(tokenizer([proxy.captions[i][0] for i in rows])).detach().numpy()
        unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        fitted = metrics.fit_logit_scale(20 * unit(seen.astype(float)) @ unit(said.astype(float)).T).value
        found = results.value(model=label, set="pets", metric="temperature_proxy")
        assert found == pytest.approx(fitted, rel=1e-3)
        z, y = logits(model, pictures()) / fitted, pictures().labels
        assert results.value(model=label, set="pets", metric="ece_proxy") == pytest.approx(
            metrics.ece(metrics.softmax(z), y), abs=1e-3
        )
        assert results.value(model=label, set="pets", metric="nll_proxy") == pytest.approx(metrics.nll(z, y), rel=1e-3)
    assert any("N = 18 images and captions of pairs, of 30" in note for note in results.notes)


def test_the_scale_is_never_tuned_on_what_is_evaluated() -> None:
    both = captioned()
    with pytest.raises(InputError, match="is evaluated, too"):
        run(both, proxy=captioned())
    with pytest.raises(InputError, match="no captions"):
        run(proxy=pictures("bare", 30, 4))
    with pytest.raises(InputError, match="1 different captions"):
        run(proxy=dataclasses.replace(both, captions=[["same"]] * 30))


def test_common_and_counter_images_give_the_papers_measures() -> None:
    kind = np.where(np.arange(90) % 3 == 0, "counter", "common")
    results = run(pictures(groups={"group": kind, "nobody": np.zeros(90, bool)}), measurements=["groups"])
    a = {
        (m, g): results.value(model=m, set="pets", axis="group", at=g, metric="top1")
        for m in MODELS
        for g in ("common", "counter")
    }
    gap = {m: metrics.rsg(a[m, "common"], a[m, "counter"]) for m in MODELS}
    for m in MODELS:
        assert results.value(model=m, set="pets", metric="rsg") == pytest.approx(gap[m])
    difference = results.value(model="worst", reference="float", set="pets", metric="rsg")
    assert difference == pytest.approx(gap["worst"] - gap["float"])
    added = results.value(model="worst", reference="float", set="pets", metric="vuln_add")
    assert added == pytest.approx(difference * a["worst", "common"] / a["float", "counter"])
    assert any("no image belongs to nobody" in note for note in results.notes)


def test_what_is_undefined_is_named() -> None:
    missing = pictures().select(np.flatnonzero(np.arange(90) % 6 != 2))
    notes = run(missing, measurements=["clean"]).notes
    assert any("1 of 6 classes have no image (cat): balanced accuracy is of the rest" in note for note in notes)


# -- kept between runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def resampled(monkeypatch) -> list[str]:
    """Names what is computed on resamples instead of read."""
    from qclip.reliability import writer
    from qclip.reliability.measurements import neighbours, ood

    done: list[str] = []
    on, ranking, recall = writer.evaluate_on, ood.Ranking, neighbours.neighbour_recall
    monkeypatch.setattr(writer, "evaluate_on", lambda *a: done.append("labelled") or on(*a))
    monkeypatch.setattr(neighbours, "neighbour_recall", lambda *a: done.append("recall") or recall(*a))
    monkeypatch.setattr(ood, "Ranking", lambda *a: done.append("ranking") or ranking(*a))
    return done


def values(results: Results) -> list:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in results.rows if row["metric"] != "ms_per_image"]


def test_a_second_run_resamples_nothing_and_says_the_same(sets, tmp_path: Path, resampled) -> None:
    first = run(**sets, cache=tmp_path)
    assert {"labelled", "ranking", "recall"} == set(resampled)
    resampled.clear()
    again = run(**sets, cache=tmp_path)
    assert resampled == [] and values(again) == values(first)
    assert again.notes == first.notes
    run(**sets, cache=tmp_path, seed=1)
    assert {"labelled", "ranking", "recall"} == set(resampled)  # other resamples
    resampled.clear()
    run(**sets | {"data": pictures(seed=1)}, cache=tmp_path)
    assert {"labelled", "ranking", "recall"} == set(resampled)  # other outputs


def test_a_raised_version_of_a_metric_voids_what_was_kept(sets, tmp_path: Path, resampled) -> None:
    run(**sets, cache=tmp_path, measurements=["clean"])
    resampled.clear()
    newer = dataclasses.replace(metrics.metric("ece"), version=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "qclip.reliability.resampled.metric", lambda name: newer if name == "ece" else metrics.metric(name)
        )
        run(**sets, cache=tmp_path, measurements=["clean"])
    assert resampled


@pytest.mark.parametrize("harm", ["cut", "foreign", "wrong shape"])
def test_an_entry_that_is_not_what_was_kept_is_named_and_computed_again(
    sets, tmp_path: Path, resampled, harm: str
) -> None:
    first = run(**sets, cache=tmp_path, measurements=["clean"])
    entries = [p for p in tmp_path.rglob("*.safetensors") if b"0 top1" in p.read_bytes()]
    assert len(entries) == len(MODELS)
    resampled.clear()
    if harm == "cut":
        entries[0].write_bytes(entries[0].read_bytes()[:-100])
    elif harm == "foreign":
        entries[0].write_bytes(entries[1].read_bytes())
    else:
        Store(tmp_path).write(entries[0].stem, Entry({"0 top1": np.zeros(3)}, {"order": ["0 top1"]}))
    with pytest.warns(StoreWarning, match=entries[0].stem):
        again = run(**sets, cache=tmp_path, measurements=["clean"])
    assert resampled == ["labelled"] and values(again) == values(first)
