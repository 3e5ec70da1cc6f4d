from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qclip import data as qdata
from qclip import metrics
from qclip.errors import DataError, InputError, NonFiniteError
from qclip.metrics.predictions import LABELLED
from qclip.metrics.record import OWN
from qclip.reliability import evaluate
from qclip.results import Results
from qclip.rewrite import Coverage
from tests.reliability.fakes import CLASSES, Tiny, pictures, preprocess, tokenizer

scipy = pytest.importorskip("scipy.stats", reason="needs scipy (extra test)") and pytest.importorskip("scipy")
TEMPLATES = ["a {}", "a drawing of a {}"]


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 200)


def run(models=None, data=None, **options) -> Results:
    models = {"float": Tiny(), "worse": Tiny(1.0)} if models is None else models
    return evaluate(models, pictures() if data is None else data, **{"templates": TEMPLATES, "cache": False} | options)


def logits(model: Tiny, data: qdata.ImageSet, corruption: str | None = None, severity: int = 0) -> np.ndarray:
    """By hand, one image at a time."""
    batches = list(qdata.batches(data, preprocess, size=len(data), corruption=corruption, severity=severity))
    images = torch.cat([pixels for _, pixels in batches])
    words = []
    for name in CLASSES:
        each = [model.encode_text(tokenizer([t.format(name)]))[0].double() for t in TEMPLATES]
        mean = sum(e / e.norm() for e in each) / len(each)
        words.append(mean / mean.norm())
    embedded = [model.image(x.flatten()).detach().double() for x in images]
    return np.array([[20 * float(e @ w / e.norm()) for w in words] for e in embedded])


def test_values_equal_an_evaluation_by_hand() -> None:
    models = {"float": Tiny(), "worse": Tiny(1.0)}
    data, dev = pictures(), pictures("dev", 60, seed=5)
    near, far = pictures("near-pets", 40, seed=2, strange=True), pictures("noise", 30, seed=3, strange=True)
    results = run(models, data, dev=dev, ood=[near, far])
    assert results.value(model="", set="pets", metric="chance_top1") == 1 / len(CLASSES)
    for label, model in models.items():
        z, y = logits(model, data), data.labels
        temperature = metrics.fit_temperature(logits(model, dev), dev.labels).value
        p = metrics.softmax(z)
        expected = {
            "top1": metrics.top_k_accuracy(z, y),
            "top5": metrics.top_k_accuracy(z, y, 5),
            "balanced_accuracy": metrics.balanced_accuracy(z, y),
            "ece": metrics.ece(p, y),
            "ece_ts": metrics.ece(metrics.softmax(z / temperature), y),
            "nll": metrics.nll(z, y),
            "brier": metrics.brier(p, y),
            "signed_gap": metrics.signed_gap(p, y),
            "mean_confidence": metrics.mean_confidence(p),
            "temperature": temperature,
        }
        found = {name: results.value(model=label, set="pets", subset="all", metric=name) for name in expected}
        assert found == pytest.approx(expected, rel=1e-4)
        for strange, kind in ((near, "ood-near"), (far, "ood")):
            out = logits(model, strange)
            for score, of in {
                "maxlogit": lambda z: z.max(1),
                "mcm": lambda z: metrics.softmax(z / 20).max(1),
                "energy": lambda z: np.log(np.exp(z).sum(1)),
            }.items():
                where = {"model": label, "set": strange.name, "role": kind, "score": score}
                assert results.value(metric="auroc", **where) == pytest.approx(metrics.auroc(of(z), of(out)), abs=1e-3)
                assert results.value(metric="fpr95", **where) == pytest.approx(
                    metrics.fpr_at_tpr(of(z), of(out)), abs=0.04
                )
    bins = metrics.reliability_bins(metrics.softmax(logits(models["worse"], data)), data.labels)
    filled = np.flatnonzero(bins.count)
    curve = results.curve(model="worse", set="pets", metric="reliability")
    assert curve["bin"] == filled.tolist() and curve["count"] == bins.count[filled].tolist()
    assert curve["accuracy"] == pytest.approx(bins.accuracy[filled])
    assert curve["confidence"] == pytest.approx(bins.confidence[filled], rel=1e-4)
    roc = results.curve(model="worse", set="noise", score="mcm", metric="roc")
    fpr, tpr = metrics.roc_curve_points(*(metrics.softmax(logits(models["worse"], s) / 20).max(1) for s in (data, far)))
    reached = [tpr[fpr <= at + 1e-12].max() for at in roc["fpr"]]
    assert roc["tpr"] == pytest.approx(reached, abs=0.04) and roc["tpr"] == sorted(roc["tpr"])


def test_every_difference_is_paired_and_has_an_interval() -> None:
    models = {"float": Tiny(), "worse": Tiny(0.3)}
    results = run(models, ood=pictures("noise", 30, seed=3, strange=True), dev=pictures("dev", 60, seed=5))
    wanted = [{"set": "pets", "subset": "all", "metric": name} for name in LABELLED]
    wanted += [
        {"set": "noise", "score": score, "metric": name}
        for score in ("mcm", "maxlogit", "energy")
        for name in ("auroc", "fpr95")
    ]
    for row in wanted:
        one, other = (results.row(model=label, **row) for label in ("float", "worse"))
        gap = results.row(model="worse", reference="float", **row)
        assert gap["value"] == pytest.approx(other["value"] - one["value"], abs=1e-12)
        assert gap["low"] <= gap["value"] <= gap["high"] and one["low"] <= one["value"] <= one["high"]
        assert results.row(model="float", reference="float", **row) is None
    one, other, gap = (
        results.row(model=m, reference=r, set="pets", subset="all", metric="nll")
        for m, r in (("float", ""), ("worse", ""), ("worse", "float"))
    )
    width = lambda row: row["high"] - row["low"]  # noqa: E731
    assert 0 < width(gap) < 0.8 * math.hypot(width(one), width(other))  # narrower than if they were not paired


def test_an_equal_model_differs_by_exactly_nothing() -> None:
    results = run({"float": Tiny(), "same": Tiny()}, ood=pictures("noise", 30, seed=3, strange=True))
    gaps = results.where(model="same", reference="float").rows
    same = {
        "cosine_mean": 1,
        "cosine_min": 1,
        "agreement": 1,
        "mcnemar_p": 1,
        "mcnemar_exact_p": 1,
        "delong_p": 1,
        "error_ratio": 1,
    }
    same |= dict.fromkeys(OWN["neighbours"], 1)
    assert len(gaps) > 30
    for row in gaps:
        if row["metric"] in ("ece_ts", "nll_ts"):
            continue
        expected = same.get(row["metric"], 0)
        assert row["value"] == pytest.approx(expected, abs=1e-12), row
        assert row["low"] is None or (row["low"], row["high"]) == pytest.approx((expected, expected), abs=1e-12)


def test_agreement_and_flips_are_counted_against_the_reference() -> None:
    models, data = {"float": Tiny(), "worse": Tiny(2.0)}, pictures()
    results = run(models, data)
    one, other = (logits(m, data) for m in models.values())
    right = [z.argmax(1) == data.labels for z in (one, other)]
    where = {"model": "worse", "reference": "float", "set": "pets", "subset": "all"}
    assert results.value(metric="agreement", **where) == pytest.approx((one.argmax(1) == other.argmax(1)).mean())
    assert results.value(metric="flips_lost", **where) == (right[0] & ~right[1]).sum() > 0
    assert results.value(metric="flips_won", **where) == (~right[0] & right[1]).sum()
    assert results.value(metric="flips_all", **where) == (one.argmax(1) != other.argmax(1)).sum()
    flips = metrics.mcnemar(*right)
    assert results.value(metric="mcnemar_p", **where) == flips.p < flips.exact_p
    assert results.value(metric="mcnemar_exact_p", **where) == flips.exact_p
    pixels = torch.cat([p for _, p in qdata.batches(data, preprocess)]).flatten(1)
    cosines = torch.cosine_similarity(models["float"].image(pixels), models["worse"].image(pixels))
    assert results.value(metric="cosine_mean", **where) == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert results.value(metric="cosine_min", **where) == pytest.approx(cosines.min().item(), abs=1e-5)
    p, q = (scipy.special.softmax(z.astype(np.float64), 1) for z in (one, other))
    lost = scipy.stats.entropy(p, q, axis=1).mean()  # KL(p || q), nats
    assert results.value(metric="kl", **where) == pytest.approx(lost, rel=1e-4)
    assert lost != pytest.approx(scipy.stats.entropy(q, p, axis=1).mean(), rel=1e-2)  # the direction tells


def test_noise_is_on_one_sample_the_same_pixels_for_all_models(monkeypatch) -> None:
    monkeypatch.setattr("qclip.reliability.request.SAMPLE", 36)
    models, data = {"float": Tiny(), "worse": Tiny(1.0)}, pictures()
    results = run(models, data, batch=10)
    for a, b in zip(models["float"].seen, models["worse"].seen, strict=True):
        assert torch.equal(a, b)
    assert models["float"].images_seen == 90 + 5 * 36
    assert data.source.reads == 90 + 36  # decoded once for both models and all severities
    rows = np.sort(np.random.default_rng(0).permutation(90)[:36])
    sample = data.select(rows)
    where = {"set": "pets", "subset": "all", "corruption": "gaussian_noise", "metric": "nll", "model": "worse"}
    for severity in (1, 3, 5):
        expected = metrics.nll(logits(models["worse"], sample, "gaussian_noise", severity), sample.labels)
        row = results.row(severity=severity, **where)
        assert row["value"] == pytest.approx(expected, rel=1e-4) and row["n"] == 36
    clean = metrics.nll(logits(models["worse"], sample), sample.labels)
    assert results.value(severity=0, **where) == pytest.approx(clean, rel=1e-4)
    five = [results.value(severity=s, **where) for s in range(1, 6)]
    mean = results.row(**where | {"metric": "mean_nll"})
    assert mean["value"] == pytest.approx(np.mean(five)) and mean["low"] < mean["value"] < mean["high"]
    assert any("36 of 90 images" in note for note in results.notes)
    whole = run(models, data, full=True)
    assert whole.row(severity=1, **where)["n"] == 90


def test_corrupted_images_are_stored_as_jpeg_only_where_it_is_asked_for(tmp_path) -> None:
    common = {"corruptions": ["contrast"], "measurements": ["corrupted"], "cache": tmp_path}
    plain, stored, again = (run(**common, jpeg85=each) for each in (False, True, False))
    where = {"model": "float", "set": "pets", "corruption": "contrast", "reference": ""}
    nll = [results.value(metric="mean_nll", **where) for results in (plain, stored, again)]
    assert nll[0] == nll[2] != nll[1]  # what is kept of one is not taken for the other
    assert None not in nll
    clean = [results.value(metric="nll", severity=0, **where) for results in (plain, stored)]
    assert clean[0] == clean[1] and clean[0] is not None
    said = "corrupted images went through JPEG of quality 85, as those of ImageNet-C did"
    assert [said in results.notes for results in (plain, stored, again)] == [False, True, False]


def test_groups_give_subsets_the_worst_group_and_the_gap() -> None:
    n = 90
    rng = np.random.default_rng(0)
    groups = {
        "group": rng.choice(["land", "sea"], n),
        "lossless": rng.random(n) < 0.4,
        "style": rng.choice(["x", "y"], n),
    }
    data = pictures(groups=groups)
    models = {"float": Tiny(), "worse": Tiny(2.0)}
    results = run(models, data)
    right = logits(models["worse"], data).argmax(1) == data.labels
    by_group = {g: right[groups["group"] == g].mean() for g in ("land", "sea")}
    assert abs(by_group["land"] - by_group["sea"]) > 0.01
    value = lambda **f: results.value(model="worse", set="pets", **f)  # noqa: E731
    for name, accuracy in by_group.items():
        assert value(axis="group", at=name, metric="top1") == pytest.approx(accuracy)
    assert value(subset="lossless", metric="top1") == pytest.approx(right[groups["lossless"]].mean())
    assert results.row(model="worse", set="pets", subset="lossless", metric="ece")["n"] == groups["lossless"].sum()
    assert value(metric="worst_group_top1") == pytest.approx(min(by_group.values()))
    assert value(metric="group_gap") == pytest.approx(max(by_group.values()) - min(by_group.values()))
    assert value(metric="mean_worst_gap") == pytest.approx(right.mean() - min(by_group.values()))
    gap = results.row(model="worse", set="pets", metric="group_gap", reference="float")
    assert gap["low"] <= gap["value"] <= gap["high"]
    assert "x" not in results.unique("at")  # another text column makes no groups


def test_groups_and_subsets_without_a_name_of_their_own_are_not_taken_for_the_whole() -> None:
    groups = {"group": np.array(["", "sea", "all"] * 30), "all": np.arange(90) < 40}
    found = run({"float": Tiny()}, pictures(groups=groups), measurements=["clean", "groups"])
    right = logits(Tiny(), pictures()).argmax(1) == pictures().labels
    assert found.value(set="pets", metric="top1") == pytest.approx(right.mean())
    assert found.value(set="pets", metric="top1", subset="all (a column)") == pytest.approx(right[:40].mean())
    for k, name in enumerate(("(no name)", "sea", "all")):
        assert found.value(set="pets", metric="top1", axis="group", at=name) == pytest.approx(right[k::3].mean())


def test_a_shift_set_may_have_some_of_the_classes_in_another_order() -> None:
    shifted = pictures("shifted", 60, seed=9)
    chosen = ["elk", "ant"]
    keep = [i for i, k in enumerate(shifted.labels) if CLASSES[k] in chosen]
    part = shifted.select(keep)
    part = dataclasses.replace(part, classes=chosen, labels=np.array([chosen.index(CLASSES[k]) for k in part.labels]))
    model = Tiny(2.0)
    results = run({"m": model}, shift=[part])
    expected = metrics.top_k_accuracy(logits(model, shifted.select(keep)), shifted.labels[keep])
    assert results.value(model="m", set="shifted", subset="all", metric="top1") == pytest.approx(expected)
    with pytest.raises(DataError, match="class 'gnu' is not a class of memory:pets"):
        run(shift=[dataclasses.replace(part, classes=["elk", "gnu"])])


def test_without_a_dev_set_the_row_says_that_it_is_missing() -> None:
    results = run()
    for metric in ("temperature", "ece_ts"):
        row = results.row(model="float", set="pets", subset="all", metric=metric)
        assert row is not None and row["value"] is None
    assert any("no dev set" in note for note in results.notes)


def test_unreadable_images_are_named_counted_and_left_out() -> None:
    data = pictures(bad=[4, 70])
    results = run(data=data)
    row = results.row(model="float", set="pets", subset="all", metric="top1")
    good = [i for i in range(90) if i not in (4, 70)]
    assert row["n"] == 88 and row["value"] == pytest.approx(
        (logits(Tiny(), data).argmax(1) == data.labels[good]).mean()
    )
    (note,) = [note for note in results.notes if "cannot be read" in note]
    assert "2 of 90" in note and "row 4 is broken" in note and "row 70 is broken" in note
    assert (
        results.row(model="float", set="pets", subset="all", metric="top1", corruption="gaussian_noise", severity=2)[
            "n"
        ]
        == 88
    )
    with pytest.raises(DataError, match="row 4 is broken"):
        run(data=data, strict=True)
    with pytest.raises(DataError, match="none of 5 images can be read"):
        run(data=pictures(n=5, bad=range(5)))


def test_parts_of_a_set_fit_together(monkeypatch) -> None:
    """Labels, subsets and the names of unreadable images do not depend on how many images are in one file."""
    groups = {"lossless": np.arange(90) >= 50}
    whole = run(data=pictures(bad=[4, 70], groups=groups))
    monkeypatch.setattr("qclip.reliability.embed.SHARD", 20)
    parts = run(data=pictures(bad=[4, 60, *range(61, 80)], groups=groups), batch=20)  # a part with none to read
    assert parts.row(model="float", set="pets", subset="all", metric="top1")["n"] == 69
    parts = run(data=pictures(bad=[4, 70], groups=groups), batch=20)
    assert parts.notes == whole.notes
    for one, other in zip(whole.where(metric="nll"), parts.where(metric="nll"), strict=True):
        assert one["value"] == pytest.approx(other["value"], rel=1e-5, abs=1e-6) and one["n"] == other["n"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "has no labels"),
        ({"classes": None}, "no class names"),
        ({"labels": np.full(90, 6)}, "90 labels are outside its 6 classes"),
    ],
)
def test_unusable_data_is_refused_with_the_reason(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(data=dataclasses.replace(pictures(), **change))


def test_unusable_arguments_are_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="no model"):
        run({})
    with pytest.raises(InputError, match="no data"):
        run(data=[])
    with pytest.raises(InputError, match="needs one '{}'"):
        run(templates=["a photo"])
    with pytest.raises(InputError, match="unknown templates 'simpel'"):
        run(templates="simpel")
    with pytest.raises(InputError, match="batch=0"):
        run(batch=0)
    with pytest.raises(InputError, match="'near' or 'far'"):
        run(ood={"middle": pictures(strange=True)})


def test_one_class_leaves_calibration_undefined_and_ends_nothing() -> None:
    one = pictures()
    one = dataclasses.replace(one, labels=np.zeros(len(one), np.int64), classes=["cat"])
    found = run({"float": Tiny(), "worse": Tiny(1.0)}, one, ood=pictures("noise", 30, seed=3, strange=True))
    assert found.value(model="float", metric="top1", role="id", corruption="") == 1
    assert [row["value"] for row in found.where(metric="ece", role="id").rows] == [None, None]
    assert any("ece" in note and "undefined with 1 class" in note for note in found.notes)
    assert found.value(model="worse", metric="auroc", score="maxlogit", reference="float") is not None


def test_braces_in_prompts_and_names_are_letters() -> None:
    data = dataclasses.replace(pictures(), classes=[f"{{{name}}}" for name in pictures().classes])
    found = run(data=data, templates=["a {photo} of {}"])
    assert found.value(model="float", set="pets", subset="all", metric="top1") > 0.5


def test_nan_in_a_model_leaves_its_numbers_undefined_and_says_where() -> None:
    broken, silent = Tiny(), Tiny()
    broken.image.weight.data[2, 5] = math.nan
    silent.words[1] = math.nan
    sets = {"dev": pictures("dev", 60, seed=5), "ood": pictures("noise", 30, seed=3, strange=True)}
    results = run({"float": Tiny(), "broken": broken, "silent": silent, "worse": Tiny(1.0)}, **sets)
    alone = run({"float": Tiny(), "worse": Tiny(1.0)}, **sets)
    told, expected = (
        [row for row in found.where(model=["float", "worse"]).rows if row["metric"] != "ms_per_image"]
        for found in (results, alone)
    )
    assert told == expected
    for label, what in (
        ("broken", "60 of 60 image embeddings of 'broken' on dev"),
        ("silent", "embeddings of 'silent'"),
    ):
        assert results.row(model=label, set="pets", metric="ece")["value"] is None
        assert results.row(model=label, reference="float", set="pets", metric="top1")["value"] is None
        assert {row["value"] for row in results.where(model=label).rows if row["set"]} == {None}
        assert any(note.startswith(f"{label}: ") and what in note and "are undefined" in note for note in results.notes)
    with pytest.raises(NonFiniteError, match="image embeddings of 'broken' on pets.*first at row 0"):
        run({"broken": broken, "float": Tiny()})


def test_ood_kinds_come_from_keys_prefixes_or_names() -> None:
    sets = [pictures(name, 20, seed=k, strange=True) for k, name in enumerate(("a", "b"))]
    results = run(ood={"near": sets[0], "far": [sets[1]]})
    kinds = {(row["set"], row["role"]) for row in results.where(metric="auroc")}
    assert kinds == {("a", "ood-near"), ("b", "ood-far"), ("mean of 2 OOD sets", "ood-mean")}
    mean = results.value(set="mean of 2 OOD sets", model="worse", score="mcm", metric="auroc")
    both = [results.value(set=name, model="worse", score="mcm", metric="auroc") for name in ("a", "b")]
    assert mean == pytest.approx(np.mean(both))


def test_sets_of_one_name_are_told_apart() -> None:
    data, twin = pictures(n=60), pictures(n=30, seed=4)
    results = run(data=[data, twin], dev=twin)
    assert results.row(model="float", set="pets", subset="all", metric="top1")["n"] == 60
    assert results.row(model="float", set="pets (2)", subset="all", metric="top1")["n"] == 30
    assert data.name == twin.name == "pets"
    assert any("images that fitted the temperature" in note for note in results.notes)


def test_what_the_model_is_goes_on_its_rows() -> None:
    def site(name: str, state: str, macs: int) -> SimpleNamespace:
        return SimpleNamespace(
            site=name, kind="q", state=state, weight_bits=8, activation_bits=16, macs=macs, parameters=10, backend="cpu"
        )

    recipe = SimpleNamespace(name="w8a16", method="rtn", bits="8/float", hash="abc")
    small = Tiny()
    small.qclip_quantization = SimpleNamespace(
        recipe=recipe,
        source="tiny",
        coverage=Coverage([site("vision.a", "real", 30), site("vision.b", "float", 10)]),  # type: ignore[list-item]
    )
    results = run({"float": Tiny(), "small": small})
    row = results.row(model="small", set="pets", subset="all", metric="top1")
    assert (row["recipe"], row["method"], row["bits"], row["recipe_hash"], row["source"]) == (
        "w8a16",
        "rtn",
        "8/float",
        "abc",
        "tiny",
    )
    share = {
        state: results.value(model="small", metric="coverage_macs", axis="state", at=state)
        for state in ("real", "simulated", "float")
    }
    assert share == {"real": 0.75, "simulated": 0, "float": 0.25}
    assert results.value(model="small", metric="coverage_params", axis="state", at="real") == 0.5
    assert (
        results.value(model="small", metric="site_macs", set="vision.a", at="real", backend="cpu", bits="8/float") == 30
    )
    size = 4 * (16 * 192 + 6 * 16)
    assert results.value(model="float", metric="model_bytes") == size
    assert results.row(model="float", metric="ms_per_image")["value"] > 0


def test_training_mode_and_gradients_come_back() -> None:
    model = Tiny()
    model.train()
    model.image.eval()
    run({"m": model})
    assert model.training and not model.image.training and torch.is_grad_enabled()


def test_progress_ends_where_it_said_it_would() -> None:
    told: list[tuple[str, int, int]] = []
    run(ood=pictures("noise", 30, seed=3, strange=True), progress=lambda *step: told.append(step))
    assert told[-1][1] == told[-1][2] == 2 * (90 + 30 + 5 * 90)
    words = [step for step in told if step[0].endswith("class names")]
    assert told[: len(words)] == words and words[:2] == [("float: class names", 0, 12), ("float: class names", 12, 12)]
    images = told[len(words) :]
    assert [done for _, done, _ in images] == sorted(done for _, done, _ in images)
    assert images[0][0] == "float: pets"
