"""A plan says what is wanted; what it cannot mean is refused with the line of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from qclip.errors import InputError
from qclip.study.plan import Product
from qclip.study.toml_lines import line_of
from qclip.study.variants import FLOAT, Impossible, expanded, named, variants
from tests.study.small import plan_of

SMALLEST = 'models = ["scenes-clean"]\nrecipes = ["w8a8", "w4a8"]\ndata = ["scenes:test?samples=300"]\n'


def test_the_smallest_plan_has_float_and_its_recipes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALLEST)
    recipes, impossible = expanded(plan, "scenes-clean")
    assert [each.label for each in variants(plan, recipes, "scenes-clean")[0]] == [FLOAT, "w8a8", "w4a8"]
    assert not impossible and [each.data for each in plan.sets] == ["scenes:test?samples=300"]


@pytest.mark.parametrize(
    ("line", "text", "said"),
    [
        (2, 'models = ["m"]\nrecipes = ["w8a8", "w8a8-smothquant"]\ndata = ["scenes:test"]', "'smoothquant'"),
        (4, 'models = ["m"]\nrecipes = ["w8a8"]\ndata = ["scenes:test",\n "scnes:dev"]', "'scenes'"),
        (3, 'models = ["m"]\nrecipes = ["w8a8"]\ndatas = ["scenes:test"]\ndata = ["scenes:test"]', "'data'"),
        (6, f'{SMALLEST}\n[corruptions]\nnames = ["noise", "gausian_noise"]', "'gaussian_noise'"),
        (6, f"{SMALLEST}\n[corruptions]\nseverities = [1, 6]", "1 to 5"),
        (7, f'{SMALLEST}\n[statistics]\nseed = 1\nscores = ["mmc"]', "'mcm'"),
        (6, f'{SMALLEST}\n[statistics]\nmeasurements = ["claen"]', "'clean'"),
        (6, f'{SMALLEST}\n[methods]\nmethods = ["rtn", "gtpq"]', "'gptq'"),
        (7, f"{SMALLEST}\n[methods]\nweights = [8]\nactivations = []", "empty"),
        (6, f'{SMALLEST}\n[ood]\nfra = ["scenes:far-ood"]', "'far'"),
        (6, f'{SMALLEST}\n[artifacts]\nphotos = ["x"]', "'photos'"),
        (4, f"{SMALLEST}seeds = [0, 0]", "twice"),
        (6, f"{SMALLEST}\n[corruptions]\nfull = 1", "true or false"),
        (6, f"{SMALLEST}\n[statistics]\nscores = [3]", "takes texts"),
        (6, f'{SMALLEST}\n[statistics]\nmeasurements = [["clean"]]', "takes texts"),
        (6, f"{SMALLEST}\n[corruptions]\nnames = [{{fog = 1}}]", "takes texts"),
        (6, f"{SMALLEST}\n[statistics]\nreplicates = [10, 20]", "takes one"),
        (6, f'{SMALLEST}\n[statistics]\nmeasurements = ["corrupted"]', "name more than"),
        (4, f"{SMALLEST}seeds = []", "empty"),
        (6, f"{SMALLEST}\n[corruptions]\nseverities = []", "empty"),
        (6, f"{SMALLEST}\n[statistics]\nscores = []", "empty"),
        (4, f'{SMALLEST}statistics.scores = ["mmc"]', "'mcm'"),
        (4, f'{SMALLEST}statistics = {{seed = 1, scores = ["mmc"]}}', "'mcm'"),
        (7, 'models = ["m"]\nrecipes = ["w8a8"]\n[[data]]\ndata = "scenes:test"\n[[data]]\n'
            'data = "scenes:dev"\nmodels = ["n"]', "no model of the plan is 'n'"),
        (8, 'models = ["m"]\nrecipes = ["w8a8"]\n[[data]]\ndata = "scenes:test"\n[[data]]\n'
            'data = "scenes:dev"\n\nshfit = ["scenes:test"]', "'shift'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_line(line: int, text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(tmp_path, text)
    assert f"plan.toml, line {line}:" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models = [", "no TOML"),
        ("models = " + "[" * 100_000, "too deeply"),
        ('models = ["m"]\nrecipes = ["w8a8"]', "`data`"),
        ('models = ["m"]\ndata = ["scenes:test"]', "empty"),
        ('models = []\nrecipes = ["w8a8"]\ndata = ["scenes:test"]', "`models`"),
    ],
)
def test_a_plan_of_nothing_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        plan_of(tmp_path, text)


def test_the_line_of_a_key_is_that_in_its_own_table() -> None:
    text = 'a = 1\n[x]\na = 2\n[[y]]\na = 3\n[[y]]\nb = [\n "q",\n "r"]\n'
    assert [line_of(text, "", "a"), line_of(text, "x", "a"), line_of(text, "y", "a", at=0)] == [1, 3, 5]
    assert line_of(text, "y", "b", "r", at=1) == 9
    assert line_of(text, "x", "missing") == 2


def test_a_product_names_what_it_makes_and_what_cannot_be() -> None:
    product = Product(("rtn", "gptq"), (8, 4), (8, 16), (0, 64), (False, True))
    found = list(named(product))
    made = {each.name: each for each in found if not isinstance(each, Impossible)}
    assert len(found) == 2 * 2 * 2 * 2 * 2
    assert made["w4a8-gptq-g64"].default.group == 64 and made["w4a8-channel"].default.group is None
    assert made["w4a8-gptq-g64"].steps[0][0] == "gptq"
    impossible = {each.name for each in found if isinstance(each, Impossible)}
    # there is no static scale of float activations, and no kernel for groups of 8-bit weights
    assert impossible == {n for each in found if "a16-static" in (n := each.name) or (n[:2] == "w8" and "g64" in n)}


def test_data_and_training_that_are_missing_make_a_variant_impossible(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALLEST.replace('"w4a8"', '"w4a8-gptq", "w4a4-lsq"'))
    recipes, impossible = expanded(plan, "m")
    made, unfit = variants(plan, recipes, "m")
    assert [each.label for each in made] == ["float", "w8a8"]
    assert {each.name: each.why for each in (*impossible, *unfit)} == {
        "w4a8-gptq": "it needs data to calibrate m with; name some in `calibration`",
        "w4a4-lsq": "it is trained, not computed: run `qclip train` and name what it writes in [artifacts]",
    }


def test_seeds_and_calibration_sets_multiply_what_needs_data_alone(tmp_path: Path) -> None:
    text = SMALLEST.replace('"w4a8"', '"w4a8-gptq"')
    text += 'seeds = [1, 2]\ncalibration = ["scenes:train?samples=8", "scenes:dev?samples=8"]\n'
    plan = plan_of(tmp_path, text)
    labels = [each.label for each in variants(plan, expanded(plan, "scenes-clean")[0], "scenes-clean")[0]]
    assert plan.calibrated_on("anything") == ("scenes:train?samples=8", "scenes:dev?samples=8")
    assert labels[:3] == [FLOAT, "w8a8", "w4a8-gptq on scenes:train?samples=8 seed 1"] and len(set(labels)) == 6


TWO_PRODUCTS = """models = ["scenes-clean", "scenes-noisy"]
data = ["scenes:test?samples=300"]
[[methods]]
methods = ["rtn"]
weights = [8, 4]
[[methods]]
methods = ["rtn", "hqq"]
weights = [4]
models = ["*-noisy"]
"""


def test_a_product_may_be_of_some_models_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TWO_PRODUCTS)
    made = {m: [each.label for each in variants(plan, expanded(plan, m)[0], m)[0]] for m in plan.models}
    assert made == {"scenes-clean": [FLOAT, "w8a8", "w4a8"], "scenes-noisy": [FLOAT, "w8a8", "w4a8", "w4a8-hqq"]}
    for wrong, told in (
        (TWO_PRODUCTS.replace("*-noisy", "*-nosy"), r"line 9: no model of the plan is '\*-nosy'"),
        (TWO_PRODUCTS.replace("weights = [4]", "weights = [9]"), "line 8: weights of 9 bits"),
        (TWO_PRODUCTS.replace('models = ["*', 'modls = ["*'), "line 9: unknown field 'modls' in .methods"),
    ):
        with pytest.raises(InputError, match=told):
            plan_of(tmp_path, wrong)


def test_models_calibrate_on_sets_of_their_own(tmp_path: Path) -> None:
    text = SMALLEST.replace('"w4a8"', '"w4a8-gptq"')
    text += '[calibration]\n"scenes-*" = ["scenes:train?samples=8"]\nphotos = "folder:pictures"\n'
    plan = plan_of(tmp_path, text)
    assert plan.calibrated_on("scenes-noisy") == ("scenes:train?samples=8",)
    assert plan.calibrated_on("photos") == ("folder:pictures",) and plan.calibrated_on("other") == ()
