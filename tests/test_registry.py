"""Items come from our table, from a script, or from another package's entry points; names are known without imports."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from qclip.errors import DataError, InputError
from qclip.registry import Registry


def registry(**options) -> Registry:
    return Registry("score", "qclip.tested", {"order": "collections:OrderedDict"}, **options)


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Installs a package of one module with these entry points: name -> attribute."""

    def install(text: str, **points: str) -> None:
        (tmp_path / "a_plug_in.py").write_text(text)
        info = tmp_path / "a_plug_in-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: a-plug-in\nVersion: 1.0\n")
        lines = [f"{name} = a_plug_in:{attribute}" for name, attribute in points.items()]
        (info / "entry_points.txt").write_text("[qclip.tested]\n" + "\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "a_plug_in", raising=False)

    return install


def test_names_are_known_without_imports_and_items_come_when_asked_for(plug_in) -> None:
    plug_in("class Toy:\n    name = 'toy'\n", toy="Toy")
    scores = registry()
    assert scores.names() == ["order", "toy"] and "toy" in scores and "a_plug_in" not in sys.modules
    assert scores.get("toy").__module__ == "a_plug_in" and scores.get("order").__name__ == "OrderedDict"
    assert [name for name, _ in scores.items()] == list(scores) == ["order", "toy"]


def test_a_script_registers_and_takes_back() -> None:
    scores = registry()

    @scores.register
    class Mine:
        name = "mine"

    assert scores.register(Mine) is Mine and scores.get("mine") is Mine and scores.names() == ["order", "mine"]
    with pytest.raises(InputError, match="a score named 'mine' is there already"):
        scores.register(SimpleNamespace(name="mine"))
    with pytest.raises(InputError, match="a score named 'order' is there already"):
        scores.register(SimpleNamespace(name="order"))
    scores.unregister("mine")
    assert "mine" not in scores
    with pytest.raises(InputError, match="no score named 'mine' was registered"):
        scores.unregister("mine")
    with pytest.raises(InputError, match="has no name"):
        scores.register(3)


def test_an_unknown_name_is_refused_with_the_nearest_and_the_kind_s_own_error() -> None:
    with pytest.raises(DataError, match="unknown score 'ordr'; did you mean 'order'"):
        registry(error=DataError).get("ordr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module_here", "'toy' of a-plug-in .* cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("class Other: name = 'toy'", "cannot be imported: AttributeError"),
        ("class Toy: label = 'Toy'\nToy.name = 'other'", "calls itself 'other' and is named 'toy'"),
        ("class Toy: name = 'toy'", "the score 'toy' of a-plug-in has no 'label'"),
    ],
)
def test_a_broken_plug_in_is_named_and_leaves_the_others_alone(plug_in, text: str, message: str) -> None:
    plug_in(text, toy="Toy")
    scores = Registry("score", "qclip.tested", {"order": "collections:OrderedDict"}, attributes=("label",))
    assert scores.names() == ["order", "toy"]
    with pytest.raises(InputError, match=message):
        scores.get("toy")
    assert scores.get("order").__name__ == "OrderedDict"


def test_two_packages_with_one_name_are_refused(plug_in, monkeypatch) -> None:
    plug_in("class Toy: pass", order="Toy")
    with pytest.raises(InputError, match="a-plug-in adds a score named 'order', which qclip has already"):
        registry().names()
    both = [EntryPoint("toy", f"{package}:Toy", "qclip.tested") for package in ("one", "two")]
    monkeypatch.setattr("qclip.registry.entry_points", lambda group: both)
    with pytest.raises(InputError, match="two adds a score named 'toy', which one has already"):
        registry().names()
