"""Recipes: names compose, JSON both ways, every refusal in one sentence."""

import errno
import json
import os

import pytest

from qclip import recipes
from qclip.errors import OutputError, RecipeError
from qclip.models.tower import KINDS
from qclip.ptq import Method
from qclip.recipes import FLOAT, METHODS, Recipe, Treatment, step


@pytest.mark.parametrize("name", recipes.presets())
def test_presets_survive_json(name, tmp_path):
    recipe = recipes.get(name)
    path = tmp_path / "recipe.json"
    recipe.to_json(path)
    again = recipes.get(path)
    assert again == recipe and again.hash == recipe.hash
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    recipes.get("w8a8").to_json(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OutputError, match="No space left; what was there before is unchanged"):
            recipes.get("w4a8").to_json(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "weight", "activation", "group", "static", "method"),
    [
        ("w8a8", 8, 8, None, False, "rtn"),
        ("w8a8-static", 8, 8, None, True, "rtn"),
        ("w8a8-smoothquant", 8, 8, None, False, "smoothquant"),
        ("w8a8-static-smoothquant", 8, 8, None, True, "smoothquant"),
        ("w4a8", 4, 8, 128, False, "rtn"),
        ("w4a16", 4, FLOAT, 128, False, "rtn"),
        ("w3a8", 3, 8, None, False, "rtn"),
    ],
)
def test_names_compose(name, weight, activation, group, static, method):
    recipe = recipes.parse(name)
    assert recipe.default == Treatment(weight, activation, group, static)
    assert recipe.method == method and recipe.needs_data == (static or method == "smoothquant")


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "w6a8", "w4a4"])
def test_pixels_and_lookups_are_8_bits_whatever_the_blocks_use(name):
    recipe = recipes.get(name)
    assert recipe.plan("vision.blocks.0.attn.q", "q") == recipe.default
    assert recipe.plan("vision.patch", "patch") == Treatment(8, 8)
    assert recipe.plan("text.embedding", "embedding") == Treatment(8, FLOAT)


def test_exceptions_last_match_wins():
    recipe = Recipe("mine", exceptions=(("vision.blocks.*", "float"), ("vision.blocks.1.*", "w4a8")))
    assert recipe.plan("vision.blocks.0.attn.q", "q") is None
    assert recipe.plan("vision.blocks.1.mlp.fc1", "fc1") == Treatment(4, 8, 128)
    assert recipe.plan("text.blocks.0.attn.q", "q") == Treatment()


def test_an_observer_is_for_what_is_no_exception():
    """`wXaY` as an exception is what it is as a name; pixels and lookups are 8 bits by min-max in every recipe."""
    treatment = Treatment(4, group=64, weight_observer="mse")
    recipe = Recipe("mine", treatment, exceptions=(("*.k", "w4a8"), ("*.v", "w8a8")))
    plan = recipe.plan("vision.blocks.0.attn.q", "q")
    assert (plan.group, plan.weight_observer) == (64, "mse")
    assert recipe.plan("vision.blocks.0.attn.k", "k") == recipes.get("w4a8").plan("text.blocks.0.attn.k", "k")
    others = [("vision.blocks.0.attn.v", "v"), ("vision.patch", "patch"), ("text.embedding", "embedding")]
    assert {(p.weight_bits, p.weight_observer) for p in (recipe.plan(*o) for o in others)} == {(8, "min-max")}
    assert recipes.get("w4a8").default.weight_observer == "min-max"


def test_mixed_keeps_four_bits_where_most_weights_are():
    plans = {kind: recipes.get("w4a8-mixed").plan(f"text.a.{kind}", kind) for kind in KINDS}
    assert {kind for kind, plan in plans.items() if plan.weight_bits == 4} >= {"q", "k", "fc1", "fc2"}
    assert all(plans[kind].weight_bits == 8 for kind in ("v", "out", "projection", "patch", "embedding"))


def test_towers_left_out_stay_float():
    recipe = Recipe("vision only", towers=("vision",))
    assert recipe.plan("text.embedding", "embedding") is None
    assert recipe.plan("vision.patch", "patch") == Treatment()


def test_hash_ignores_the_name_only():
    assert Recipe("a").hash == Recipe("b").hash
    assert Recipe("a").hash != Recipe("a", Treatment(6)).hash
    assert Recipe("a").hash != Recipe("a", exceptions=(("*", "float"),)).hash
    searched, fixed = (Recipe("a", steps=(step("smoothquant", **o),)) for o in ({}, {"alpha": 0.5}))
    assert len({Recipe("a").hash, searched.hash, fixed.hash}) == 3


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: recipes.get("w8a8-smothquant"), "smoothquant"),
        (lambda: recipes.get("int8"), "unknown recipe"),
        (lambda: recipes.get("w9a8"), "9 bits"),
        (lambda: recipes.get("w8a8-"), "unknown recipe"),
        (lambda: recipes.get("w8a8--static"), "unknown recipe"),
        (lambda: recipes.get("w8a12"), "12 bits"),
        (lambda: recipes.get("w4a16-static"), "static"),
        (lambda: recipes.get("missing.json"), "does not exist"),
        (lambda: Recipe.from_dict({"name": "x", "weigth_bits": 8}), "weight_bits"),
        (lambda: Recipe.from_dict({"bits": 8}), "JSON object"),
        (lambda: Recipe.from_json('{"name": '), "not valid JSON"),
        (
            lambda: Recipe.from_dict({"name": "x", "group": 128}),
            "recipe 'x': no kernel multiplies.*groups of weights are for up to 4 bits",
        ),
        (lambda: Recipe.from_dict({"name": "x", "weight_bits": 4, "group": 48}), "recipe 'x': groups of 48"),
        (lambda: Recipe("x", towers=("audio",)), "towers"),
        (lambda: Treatment(weight_grid="symful"), "unknown weight_grid.*'symfull'"),
        (lambda: Treatment(8, weight_grid="asym"), "no kernel multiplies"),
        (lambda: Treatment(weight_observer="msr"), "unknown weight_observer.*'mse'"),
        (lambda: Recipe("x", exceptions=(("*", "half"),)), "wXaY"),
        (lambda: Recipe("x", exceptions=(("*.q", "w9a8"),)), r"exception '\*.q': weights of 9 bits"),
        (lambda: Recipe("x", exceptions=(("*", "w4a8"), ("*", "float"))), "two exceptions"),
        (lambda: Recipe("x", exceptions=((3, "w4a8"),)), "pattern is a text"),
        (lambda: Recipe("x\ny"), "one line"),
        (lambda: Recipe("x", steps=(("gtpq", None),)), "unknown method 'gtpq'"),
        (lambda: Recipe("x", steps=(step("smoothquant"),) * 2), "twice"),
        (lambda: recipes.get("w8a8-smoothquant+smoothquant"), "twice"),
        (lambda: step("smoothquant", alpah=0.5), "unknown field 'alpah'.*'alpha'"),
        (lambda: step("smoothquant", alpha="0.5"), "'alpha' has the wrong type; it takes a finite number or null"),
        (lambda: step("smoothquant", alpha=1.5), "'smoothquant': alpha .* between 0 and 1"),
        *[
            (lambda change=change: Recipe.from_dict({"name": "x"} | change), word)
            for change, word in (
                (
                    {"exceptions": {"*.q": {"weigth_bits": 4}}},
                    r"exception '\*.q': unknown field 'weigth_bits'.*'weight_bits'",
                ),
                ({"exceptions": {"*.q": {"weight_bits": "4"}}}, r"exception '\*.q': 'weight_bits' has the wrong type"),
                ({"exceptions": {"*.q": {"weight_bits": 9}}}, r"exception '\*.q': weights of 9 bits"),
                ({"exceptions": {"*.q": 4}}, r"exception '\*.q' is 'float', 'wXaY' or an object"),
                ({"steps": [{"alpha": 0.5}]}, "a step is a method's name"),
                ({"steps": [["smoothquant"]]}, "a step is a method's name"),
                ({"steps": ["smothquant"]}, "unknown method 'smothquant'.*'smoothquant'"),
                ({"steps": [{"method": "smoothquant", "alpah": 1}]}, "'smoothquant': unknown field 'alpah'.*'alpha'"),
                ({"steps": ["smoothquant"], "method": "rtn"}, "drop 'method'"),
                ({"steps": "smoothquant"}, "'steps' has the wrong type"),
                ({"steps": [{"method": "smoothquant", "alpha": float("nan")}]}, "a finite number"),
                ({"towers": [1]}, "'towers' has the wrong type"),
                ({"name": "y" * 10**6, "weight_bits": 0}, "^.{0,400}$"),
                ({"weight_bits": 10**400}, "^.{0,400}$"),
                ({"steps": [[[[[[[[]]]]]]]] * 1000}, "^.{0,400}$"),
            )
        ],
        *[
            (lambda change=change: Recipe.from_dict({"name": "x"} | change), f"{next(iter(change))}.*wrong type")
            for change in (
                {"weight_bits": "eight"},
                {"weight_bits": 4.0},
                {"weight_bits": True},
                {"activation_bits": None},
                {"static": "no"},
                {"static": 0},
                {"group": "128"},
                {"method": 3},
                {"name": 5},
                {"towers": "vision"},
                {"weight_observer": None},
                {"exceptions": "abc"},
                {"exceptions": [1]},
            )
        ],
    ],
)
def test_refusals_say_what_is_wrong(make, word):
    with pytest.raises(RecipeError, match=word) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_json_is_plain():
    content = json.loads(recipes.get("w4a8").to_json())
    assert content["weight_bits"] == 4 and content["towers"] == ["vision", "text"] and content["exceptions"] == {}
    assert json.loads(recipes.get("w4a8-mixed").to_json())["exceptions"]["*.v"] == "w8a8"
    smooth = json.loads(recipes.get("w8a8-smoothquant").to_json())
    assert smooth["steps"] == [{"method": "smoothquant", "alpha": None, "tried": 21, "samples": 32}]


def test_json_of_before_is_read():
    """`method` names methods joined by "+"; exceptions are "float" or "wXaY"."""
    old = {
        "name": "mine",
        "weight_bits": 4,
        "activation_bits": 8,
        "group": 64,
        "static": True,
        "method": "smoothquant",
        "towers": ["vision"],
        "exceptions": {"*.q": "float", "*.k": "w4a8", "*.v": "w8a16"},
        "weight_observer": "mse",
    }
    recipe = Recipe.from_dict(old)
    assert recipe.default == Treatment(4, 8, 64, True, "mse") and recipe.towers == ("vision",)
    assert recipe.steps == (step("smoothquant"),) and recipe.method == "smoothquant"
    # "wXaY" is static where the recipe is and its activations can be.
    wanted = {"*.q": None, "*.k": Treatment(4, 8, 128, True), "*.v": Treatment(8, FLOAT)}
    assert dict(recipe.exceptions) == wanted
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(old | {"method": "rtn"}).steps == () == Recipe.from_dict({"name": "x"}).steps


def test_an_exception_may_say_everything_that_a_default_says():
    fields = {"weight_bits": 4, "activation_bits": 8, "group": 32, "static": True, "weight_observer": "mse"}
    recipe = Recipe.from_dict({"name": "mine", "exceptions": {"*.fc1": fields, "*.fc2": {"weight_bits": 6}}})
    assert recipe.needs_data  # because of the exception alone
    plan = recipe.plan("vision.blocks.0.mlp.fc1", "fc1")
    assert (plan.weight_bits, plan.activation_bits, plan.group, plan.static, plan.weight_observer) == (
        4,
        8,
        32,
        True,
        "mse",
    )
    assert dict(recipe.exceptions)["*.fc2"] == Treatment(6)  # what it leaves out is as in a recipe that leaves it out
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.hash == Recipe.from_json(recipe.to_json()).hash


def test_options_of_a_step_survive_json():
    recipe = Recipe("mine", steps=(step("smoothquant", alpha=1),))
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and again.hash == recipe.hash and again.steps[0][1].alpha == 1.0
    assert recipe != Recipe("mine", steps=(step("smoothquant"),))


def test_a_method_that_needs_what_nobody_gives_is_refused():
    class Odd:
        name, options, needs, inputs = "odd", Treatment, frozenset({"input"}), "float"
        decides = leaves = frozenset()

    METHODS.register(Odd)
    try:
        with pytest.raises(RecipeError, match="method 'odd' needs 'input'; did you mean 'inputs'"):
            Recipe("x", steps=(step("odd"),))
    finally:
        METHODS.unregister("odd")


def deciding(of: str, what: set[str]) -> type[Method]:
    class Deciding(Method):
        name, decides = of, frozenset(what)

    return METHODS.register(Deciding)


def test_methods_that_contradict_each_other_are_refused():
    made = [deciding("rotated", {"input"}), deciding("coded", {"weight"}), deciding("both", {"input", "weight"})]
    made += [deciding("corrected", set()), deciding("odd", {"weights"}), deciding("yields", {"input", "weight"})]
    made[-1].leaves = frozenset({"weight"})
    try:
        for good in (
            "rotated+coded",
            "smoothquant+rotated+both",
            "rotated+coded+corrected",
            "corrected+both",
            "yields+rotated+coded",
        ):
            assert recipes.get(f"w4a8-{good}").method == good
        yields = recipes.get("w4a8-yields+rotated+coded").decides("yields")
        assert yields == {"input"} and recipes.get("w4a8-yields").decides("yields") == {"input", "weight"}
        for bad, why in (
            (
                "coded+rotated",
                "'rotated' changes inputs for which 'coded' has.*put 'rotated' before 'coded'",
            ),
            ("coded+corrected+both", "methods 'coded' and 'both' both decide the weights' codes; keep one"),
            ("both+smoothquant", "'smoothquant' changes inputs"),
            ("yields+smoothquant", "'smoothquant' changes inputs for which 'yields' has"),
            ("coded+yields", "methods 'coded' and 'yields' both decide"),
            ("odd", "method 'odd' decides 'weights'; did you mean 'weight'"),
        ):
            with pytest.raises(RecipeError, match=why):
                recipes.get(f"w4a8-{bad}")
            with pytest.raises(RecipeError, match=why):
                Recipe.from_dict({"name": "x", "steps": bad.split("+")})
    finally:
        for kind in made:
            METHODS.unregister(kind.name)


def test_reliable_rotates_inputs_of_few_bits_first():
    assert recipes.get("w4a4-reliable").method == "rotation+reliable"
    assert recipes.get("w4a8-reliable").method == "reliable" == recipes.get("w8a8-reliable").method
    assert recipes.get("w4a4-smoothquant+reliable").method == "smoothquant+reliable"
    recipe = recipes.get("w4a4-reliable")
    assert Recipe.from_json(recipe.to_json()) == recipe
