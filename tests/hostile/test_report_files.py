"""Results files that are damaged or made by somebody who means harm: `qclip report` refuses each in one sentence, or
makes a page and a table in which everything is text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import qclip
from qclip.cli import main

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}{% raw %}\x1b[2J\x00\u202e"


def body(**changes: Any) -> dict[str, Any]:
    results = qclip.Results(notes=["a note"], meta={"command": "qclip evaluate", "seed": 0})
    for model in ("float", "w8a8"):
        results.add(metric="top1", model=model, set="s", role="id", n=100, value=0.5, low=0.4, high=0.6)
    results.add(metric="top1", model="w8a8", set="s", role="id", reference="float", value=0.0, low=-0.1, high=0.1)
    return {**json.loads(results.text()), **changes}


def row(**fields: Any) -> dict[str, Any]:
    return {"metric": "top1", "model": "m", "set": "s", "role": "id", "value": 0.5, **fields}


def text(content: Any) -> bytes:
    return json.dumps(content).encode()


LABELS = ("model", "source", "recipe", "method", "bits", "recipe_hash", "set", "host")
TO = ("/dev/zero", "results.json")  # without an end, and itself
REFUSED: dict[str, bytes] = {
    "empty": b"",
    "truncated": text(body())[:-40],
    "binary": bytes(range(256)) * 10,
    "UTF-16": json.dumps(body()).encode("utf-16"),
    "NaN": text(body(rows=[row(value=math.nan)])),
    "5,000 digits": text(body()).replace(b"100", b"9" * 5000),
    "a number that is no float": text(body(rows=[row(value=10**400)])),
    "nested 10^5 deep": b"[" * 100_000 + b"]" * 100_000,
    "nested in meta": text(body(meta=json.loads("[" * 80 + "]" * 80))),
    "an array": b"[]",
    "another format": text(body(format="x")),
    "a key twice": text(body()).replace(b'"version"', b'"version": 2, "version"'),
    "version 0": text(body(version=0)),
    "version true": text(body(version=True)),
    "version 99": text(body(version=99)),
    "version 1e400": text(body()).replace(b'"version": 2', b'"version": 1e400'),
    "rows an object": text(body(rows={})),
    "rows of numbers": text(body(rows=[1])),
    "no rows": text({k: v for k, v in body().items() if k != "rows"}),
    "notes of numbers": text(body(notes=[1])),
    "meta an array": text(body(meta=[])),
    "an unknown column": text(body(rows=[row(nope=1)])),
    "text as a value": text(body(rows=[row(value="0.5")])),
    "true as a value": text(body(rows=[row(value=True)])),
    "an array as a value": text(body(rows=[row(value=[1])])),
    "a number as a label": text(body(rows=[row(model=1)])),
    "half an image": text(body(rows=[row(n=0.5)])),
    "an unknown role": text(body(rows=[row(role=EVIL)])),
    "curves of text": text(body(curves=[{"metric": "roc", "points": {"x": ["a"]}}])),
    "curves of odd lengths": text(body(curves=[{"metric": "roc", "points": {"x": [1], "y": []}}])),
    "curves without points": text(body(curves=[{"metric": "roc"}])),
}
SHOWN: dict[str, bytes] = {
    "a byte order mark": b"\xef\xbb\xbf" + text(body()),
    "no column but the metric": text(body(rows=[{"metric": "top1"}])),
    "no rows at all": text(body(rows=[], curves=[], notes=[])),
    "duplicate rows": text(body(rows=body()["rows"] * 3)),
    "huge numbers": text(body(rows=[row(value=v, low=-v, high=v, n=10**15, seed=10**15) for v in (1e308, 5e-324)])),
    "infinities": text(body(rows=[row(value="inf", low="-inf", high="inf", metric=m) for m in ("top1", "nll", "ece")])),
    "labels that are markup": text(
        body(
            rows=[
                row(**dict.fromkeys(LABELS, EVIL)),
                row(model="q", set=EVIL, corruption=EVIL, severity=3, score=EVIL),
                row(model="q", set=EVIL, reference=EVIL, low=-1.0, high=1.0),
                row(metric=EVIL, axis=EVIL, at=EVIL),
            ],
            notes=[EVIL],
            meta={k: EVIL for k in ("command", "cpu", "created", "threads", "seed")} | {"versions": {EVIL: EVIL}},
            curves=[
                {"metric": "roc", "model": EVIL, "set": EVIL, "role": "ood", "points": {"fpr": [0, 1], "tpr": [0, 1]}}
            ],
        )
    ),
    "half a surrogate": text(body(rows=[row(model="\ud800")], notes=["\udfff"])),
    "meta of odd types": text(body(meta={"versions": 7, "threads": {}, "seed": [], "command": 5, "models": 3})),
    "long labels": text(body(rows=[row(model="m" * 10_000, set="s" * 10_000)])),
}


class Tags(HTMLParser):
    """What a browser would see: tags with their attributes, and the text outside of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag in ("img", "iframe", "object", "embed", "link", "base", "form"):
            self.handlers.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.words).append(data)


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def one_sentence(capsys: pytest.CaptureFixture) -> None:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qclip: ") and err.count("\n") == 1 and len(err) < 1000, err
    assert "--debug" not in err and "results.json" in err


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_results_file_is_refused(name: str, capsys: pytest.CaptureFixture) -> None:
    Path("results.json").write_bytes(REFUSED[name])
    assert main(["report", "results.json", "--output", "page.html"]) == 2
    one_sentence(capsys)
    assert [p.name for p in Path().iterdir()] == ["results.json"]


@pytest.mark.parametrize("make", [Path.mkdir, *(lambda p, to=to: p.symlink_to(to) for to in TO)])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], capsys: pytest.CaptureFixture) -> None:
    make(Path("results.json"))
    assert main(["report", "results.json"]) == 2
    one_sentence(capsys)


def test_a_file_of_400_mb_is_refused_unread(capsys: pytest.CaptureFixture) -> None:
    with open("results.json", "wb") as file:
        file.truncate(400 << 20)  # takes no room
    assert main(["report", "results.json"]) == 2
    one_sentence(capsys)


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_odd_is_shown_as_text(name: str, capsys: pytest.CaptureFixture) -> None:
    Path("results.json").write_bytes(text(body()))
    assert main(["report", "results.json", "--output", "plain.html"]) == 0
    plain = Tags(Path("plain.html").read_text(encoding="utf-8"))
    capsys.readouterr()
    Path("results.json").write_bytes(SHOWN[name])
    code = main(["report", "results.json", "--output", "page.html"])
    out, err = capsys.readouterr()
    assert code == 0 and err == "", err
    page = Path("page.html").read_text(encoding="utf-8")
    seen = Tags(page)
    assert seen.scripts == plain.scripts and seen.handlers == plain.handlers == ["link"]  # its own icon
    assert page.rstrip().endswith("</html>") and "\x1b" not in out and "\x00" not in out
    if name == "labels that are markup":
        assert "<script>alert(1)</script>" in "".join(seen.words) and "{{7*7}}" in "".join(seen.words)  # as text
