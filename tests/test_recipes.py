"""Recipes: names compose, JSON both ways, every refusal in one sentence."""

import json

import pytest

from qclip import recipes
from qclip.errors import RecipeError
from qclip.models.tower import KINDS
from qclip.recipes import FLOAT, Recipe


@pytest.mark.parametrize("name", recipes.presets())
def test_presets_survive_json(name, tmp_path):
    recipe = recipes.get(name)
    path = tmp_path / "recipe.json"
    recipe.to_json(path)
    again = recipes.get(path)
    assert again == recipe and again.hash == recipe.hash
    assert Recipe.from_json(recipe.to_json()) == recipe


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
    assert (recipe.weight_bits, recipe.activation_bits, recipe.group, recipe.static, recipe.method) == (
        weight,
        activation,
        group,
        static,
        method,
    )


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("w8a8", "real"),
        ("w4a8", "real"),
        ("w4a16", "real"),
        ("w6a8", "simulated"),
        ("w4a4", "simulated"),
        ("w8a6", "simulated"),
    ],
)
def test_real_only_where_a_kernel_runs(name, state):
    recipe = recipes.get(name)
    plan = recipe.plan("vision.blocks.0.attn.q", "q")
    assert plan.state == state
    # Pixels and lookups are 8 bits in every preset, whatever the blocks use.
    assert recipe.plan("vision.patch", "patch") == recipes.SitePlan("real", 8, 8)
    assert recipe.plan("text.embedding", "embedding").state == "real"


def test_exceptions_last_match_wins():
    recipe = Recipe("mine", exceptions=(("vision.blocks.*", "float"), ("vision.blocks.1.*", "w4a8")))
    assert recipe.plan("vision.blocks.0.attn.q", "q").state == "float"
    plan = recipe.plan("vision.blocks.1.mlp.fc1", "fc1")
    assert (plan.state, plan.weight_bits, plan.group) == ("real", 4, 128)
    assert recipe.plan("text.blocks.0.attn.q", "q").state == "real"


def test_an_observer_is_for_what_is_no_exception():
    """`wXaY` as an exception is what it is as a name; pixels and lookups are 8 bits by min-max in every recipe."""
    recipe = Recipe("mine", 4, group=64, weight_observer="mse", exceptions=(("*.k", "w4a8"), ("*.v", "w8a8")))
    plan = recipe.plan("vision.blocks.0.attn.q", "q")
    assert (plan.group, plan.weight_observer) == (64, "mse")
    assert recipe.plan("vision.blocks.0.attn.k", "k") == recipes.get("w4a8").plan("text.blocks.0.attn.k", "k")
    others = [("vision.blocks.0.attn.v", "v"), ("vision.patch", "patch"), ("text.embedding", "embedding")]
    assert {(p.weight_bits, p.weight_observer) for p in (recipe.plan(*o) for o in others)} == {(8, "min-max")}
    assert recipes.get("w4a8").weight_observer == "min-max"


def test_mixed_keeps_four_bits_where_most_weights_are():
    plans = {kind: recipes.get("w4a8-mixed").plan(f"text.a.{kind}", kind) for kind in KINDS}
    assert {kind for kind, plan in plans.items() if plan.weight_bits == 4} >= {"q", "k", "fc1", "fc2"}
    assert all(plans[kind].weight_bits == 8 for kind in ("v", "out", "projection", "patch", "embedding"))
    assert all(plan.state == "real" for plan in plans.values())


def test_towers_left_out_stay_float():
    recipe = Recipe("vision only", towers=("vision",))
    assert recipe.plan("text.embedding", "embedding").state == "float"
    assert recipe.plan("vision.patch", "patch").state == "real"


def test_hash_ignores_the_name_only():
    assert Recipe("a").hash == Recipe("b").hash
    assert Recipe("a").hash != Recipe("a", weight_bits=6).hash
    assert Recipe("a").hash != Recipe("a", exceptions=(("*", "float"),)).hash


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
        (lambda: Recipe("x", group=128), "4-bit"),
        (lambda: Recipe("x", weight_bits=4, group=48), "groups of 48"),
        (lambda: Recipe("x", towers=("audio",)), "towers"),
        (lambda: Recipe("x", weight_observer="msr"), "unknown weight_observer.*'mse'"),
        (lambda: Recipe("x", exceptions=(("*", "half"),)), "wXaY"),
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
