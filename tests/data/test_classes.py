"""Class files: labels by name where names match, refused where some do, by position with a note where none does."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from PIL import Image

from qclip.data import classes, load, read_lines
from qclip.data.imageset import ImageSet
from qclip.errors import DataError


def folder_of(root, *names):
    """One image per folder."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / "0.png")
    return root


def file_of(root, *lines, encoding="utf-8", end="\n"):
    path = root / "classes.txt"
    path.write_bytes(end.join(lines).encode(encoding))
    return path


def test_labels_are_by_name_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    root = folder_of(tmp_path / "set", "bird", "cat", "dog")
    data = load(f"folder:{root}", file_of(tmp_path, "dog", "bird", "cat", encoding="utf-8-sig", end="\r\n"))
    assert data.classes == ["dog", "bird", "cat"] and data.labels.tolist() == [1, 2, 0]
    assert data.notes == [] and data.label_notes == []


@pytest.mark.parametrize(
    "folder, line",
    [
        ("golden_retriever", "golden retriever"),
        ("Golden-Retriever", "golden_retriever"),
        ("golden__retriever ", "Golden  Retriever"),
        ("cafe\u0301", "CAF\u00c9"),
        ("Stra\u00dfe", "STRASSE"),
    ],
)
def test_case_underscores_hyphens_spaces_and_unicode_forms_do_not_count(tmp_path, folder, line):
    root = folder_of(tmp_path / "set", folder, "zebra")
    data = load(f"folder:{root}", file_of(tmp_path, "zebra", line))
    assert data.classes == ["zebra", line.strip()] and data.labels.tolist() == [1, 0]


@pytest.mark.parametrize("lines", [("bird", "cat", "dogs"), ("bird", "cat", "dog s", "cow")])
def test_some_names_and_not_all_are_refused_with_the_odd_and_the_nearest(tmp_path, lines):
    root = folder_of(tmp_path / "set", "bird", "cat", "dog")
    with pytest.raises(DataError, match=rf"class 'dog' is not a class of .*2 of its 3.*did you mean '{lines[2]}' for"):
        load(f"folder:{root}", file_of(tmp_path, *lines))


def test_labels_are_positional_only_where_no_name_matches_and_a_note_says_so(tmp_path):
    root = folder_of(tmp_path / "set", "n02084071", "n02121808")
    data = load(f"folder:{root}", file_of(tmp_path, "dog", "house cat"))
    assert data.labels.tolist() == [0, 1] and data.classes == ["dog", "house cat"]
    (note,) = data.label_notes
    assert "by position: 'n02084071' is 'dog', 'n02121808' is 'house cat'" in note
    with pytest.raises(DataError, match="2 classes .*but the classes file names 3"):
        load(f"folder:{root}", file_of(tmp_path, "dog", "house cat", "cow"))


@pytest.mark.parametrize(
    "line",
    ["{}s", '"{}"', "'{}'", "{},", "0: {}", "7\t{}", "0 {}", "[{}]", "{}\u200b", "a photo of a {}", "{};3"],
)
def test_a_list_that_nearly_names_the_classes_is_never_taken_by_position(tmp_path, line):
    root = folder_of(tmp_path / "set", "bird", "cat", "golden_retriever")
    lines = [line.format(name) for name in ("golden retriever", "bird", "cat")]
    with pytest.raises(DataError, match="line 1, .* looks like class 'golden_retriever', .* would name class 'bird'"):
        load(f"folder:{root}", file_of(tmp_path, *lines))
    lines = [line.format(name) for name in ("bird", "cat", "golden retriever")]  # in the same order there is no doubt
    assert load(f"folder:{root}", file_of(tmp_path, *lines)).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "names, lines",
    [
        (["n01440764", "n01443537"], ["tench", "goldfish"]),
        (["0", "1", "2"], ["boeing 2", "airbus 0", "type 1"]),
        (["1", "2"], ["1. dog", "2. cat"]),
    ],
)
def test_lists_by_position_are_taken_so(tmp_path, names, lines):
    data = load(f"folder:{folder_of(tmp_path / 'set', *names)}", file_of(tmp_path, *lines))
    assert data.labels.tolist() == list(range(len(names))) and "by position" in data.label_notes[0]


def test_ids_before_names_name_folders_in_any_order(tmp_path):
    lines = ("n01443537 goldfish, Carassius auratus", "n01440764 tench")  # as in LOC_synset_mapping.txt
    for names, labels in ((["n01440764", "n01443537"], [1, 0]), (["goldfish", "tench"], [0, 1]), (["0", "1"], [0, 1])):
        data = load(f"folder:{folder_of(tmp_path / names[0], *names)}", file_of(tmp_path, *lines))
        assert data.labels.tolist() == labels and data.classes == ["goldfish", "tench"]


def test_lines_that_name_no_folder_are_noted(tmp_path):
    root = folder_of(tmp_path / "set", "cat", "dog")
    (note,) = load(f"folder:{root}", file_of(tmp_path, "# pets", "dog", "cat", "\x1a")).label_notes
    assert r"2 of 4 lines of the classes file name none of its classes: '# pets', '\x1a'" in note


def test_more_names_than_folders_is_a_larger_label_space(tmp_path):
    root = folder_of(tmp_path / "set", "cat", "dog")
    data = load(f"folder:{root}", file_of(tmp_path, "dog", "cow", "cat"))
    assert data.labels.tolist() == [2, 0] and len(data.classes) == 3


def test_equal_names_are_noted_by_position_and_refused_by_name(tmp_path):
    numbered = folder_of(tmp_path / "numbered", "0", "1", "2")
    file = file_of(tmp_path, "missile", "Missile", "cat")
    data = load(f"folder:{numbered}", file)
    assert data.labels.tolist() == [0, 1, 2]
    assert any("2 of 3 class names stand more than once" in note and "'missile'" in note for note in data.label_notes)
    named = folder_of(tmp_path / "named", "missile", "cat")
    with pytest.raises(DataError, match="'missile' and 'Missile' are the same class name, .* could be either"):
        load(f"folder:{named}", file)


def test_folders_that_differ_in_spelling_only_are_refused(tmp_path):
    root = folder_of(tmp_path / "set", "red_fox", "Red Fox", "ant")
    with pytest.raises(DataError, match="'Red Fox' and 'red_fox' are the same class name"):
        load(f"folder:{root}")


@pytest.mark.parametrize(
    "names, match",
    [
        (["n01440764", "n01443537"], "2 of 2 class names look like WordNet ids"),
        (["n01440764 tench", "cat"], "1 of 2 class names look like WordNet ids"),
        (["golden_retriever", "cat"], "1 of 2 class names hold underscores.*'golden_retriever'"),
        (["0", "1"], "2 of 2 class names are numbers"),
    ],
)
def test_names_that_are_odd_in_a_prompt_are_noted(tmp_path, names, match):
    (note,) = load(f"folder:{folder_of(tmp_path / 'set', *names)}").label_notes
    assert re.search(match, note)


def test_ordinary_names_have_no_notes(tmp_path):
    assert load(f"folder:{folder_of(tmp_path / 'set', 'cat', 'ice cream', 'x-ray')}").label_notes == []


def test_an_empty_class_folder_is_noted(tmp_path):
    root = folder_of(tmp_path / "set", "cat", "dog")
    (root / "cow").mkdir()
    data = load(f"folder:{root}")
    assert data.classes == ["cat", "cow", "dog"] and data.labels.tolist() == [0, 2]
    assert data.label_notes == [f"folder:{root}: 1 class folders hold no image: 'cow'"]


def labelled(names, labels, spec="memory:x") -> ImageSet:
    n = len(labels)
    return ImageSet(spec, spec, list(names), np.array(labels), None, {}, None, None, np.arange(n))  # type: ignore[arg-type]


def test_labels_in_the_classes_of_another_set_compare_names_alike():
    ids = labelled(["golden retriever", "tabby cat", "cow"], [0, 1, 2])
    assert labelled(["Tabby_cat", "golden-retriever"], [0, 1, 1]).labels_in(ids).tolist() == [1, 0, 0]
    assert labelled(["a", "a"], [0, 1]).labels_in(labelled(["a", "a"], [0, 1])).tolist() == [0, 1]  # one and the same
    with pytest.raises(DataError, match="class 'caw' is not a class of memory:x, .*did you mean 'cow' for 'caw'"):
        labelled(["tabby cat", "caw"], [0, 1], "memory:y").labels_in(ids)
    with pytest.raises(DataError, match="class 'ox' is not a class of memory:x, nor is any other"):
        labelled(["ox", "ant"], [0, 1]).labels_in(ids)
    with pytest.raises(DataError, match="'a' and 'A' are the same class name"):
        labelled(["a", "b"], [0, 1]).labels_in(labelled(["a", "A", "b"], [0, 1]))


def test_a_classes_file_names_a_set_that_has_names_of_its_own(tmp_path):
    data = labelled(["bird", "cat"], [0, 1, -1, 7])
    data.name_classes(["cat", "bird"])
    assert data.labels.tolist() == [1, 0, -1, -1] and data.classes == ["cat", "bird"]
    data = labelled(["bird", "cat"], [0, 1])
    data.classes = None
    data.name_classes(["cat", "bird"])
    assert data.labels.tolist() == [0, 1] and "by position: 0 is 'cat'" in data.label_notes[0]
    scenes = load("scenes:test?samples=4")
    reverse = file_of(tmp_path, *scenes.classes[::-1])
    again = load("scenes:test?samples=4", reverse)
    assert [again.classes[k] for k in again.labels] == [scenes.classes[k] for k in scenes.labels]


# -- text files --------------------------------------------------------------------------------------------------------


def test_lines_are_stripped_and_blank_ones_dropped(tmp_path):
    path = tmp_path / "lines.txt"
    for end in ("\n", "\r\n", "\r"):
        for encoding in ("utf-8", "utf-8-sig"):
            path.write_bytes(end.join(["a photo of a {}.", "", "  \u00e9 \u2028 {} ", ""]).encode(encoding))
            assert read_lines(path, "templates") == ["a photo of a {}.", "\u00e9 \u2028 {}"]


@pytest.mark.parametrize(
    "content, match",
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n \n", "is empty"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        ("cat\ndog".encode("utf-16"), "is not UTF-8 text"),
        ("cat\ndog".encode("utf-16-le"), "is not UTF-8 text .it holds NUL"),
    ],
)
def test_unusable_text_files_are_named(tmp_path, content, match):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"classes file '.*names.txt' {match}"):
        read_lines(path, "classes")


def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path, match in ((tmp_path / "pipe", "is a pipe"), (tmp_path, "is a folder"), ("/dev/zero", "is a device")):
        with pytest.raises(DataError, match=match):
            read_lines(path, "templates")
    monkeypatch.setattr(classes, "LARGEST_TEXT", 10)
    (tmp_path / "long").write_text("x" * 11)
    with pytest.raises(DataError, match="more than 10 bytes"):
        read_lines(tmp_path / "long", "templates")
