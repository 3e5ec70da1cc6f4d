from __future__ import annotations

import contextlib
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

from qclip.errors import InputError
from qclip.reliability import evaluate, keys
from qclip.reliability.keys import model_fingerprint, preprocess_fingerprint
from qclip.results import Results
from qclip.store import Entry, Store, StoreWarning, default_folder
from tests.reliability.fakes import Tiny, pictures, preprocess

ALL = 90 + 5 * 90  # images of one run: clean, and five severities


@pytest.fixture(autouse=True)
def fake_encoders(monkeypatch) -> None:
    prepare(monkeypatch)


def prepare(monkeypatch) -> None:
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.embed.SHARD", 30)
    monkeypatch.setattr("qclip.reliability.engine.REPLICATES", 50)


def run(model: Tiny, folder, **options) -> Results:
    return evaluate(
        {"m": model},
        options.pop("data", None) or pictures(),
        **{"templates": ["a {}"], "cache": folder, "batch": 10} | options,
    )


def embeddings(folder) -> list:
    """Entries with embeddings of images, the largest first; resampled metrics lie beside them."""
    found = [path for path in folder.rglob("*.safetensors") if b'"indices"' in path.read_bytes()]
    return sorted(found, key=lambda path: path.stat().st_size)[::-1]


def rows(results: Results) -> list[dict]:
    return results.rows


def test_a_second_evaluation_embeds_nothing_and_says_the_same(tmp_path) -> None:
    first, second = Tiny(), Tiny()
    one = run(first, tmp_path)
    two = run(second, tmp_path)
    assert first.images_seen == ALL and second.images_seen == 0
    assert rows(one) == rows(two)
    unread = pictures(bad=[4])
    told = run(Tiny(), tmp_path, data=unread).notes
    again = Tiny()
    assert run(again, tmp_path, data=pictures(bad=[4])).notes == told and again.images_seen == 0  # still named
    assert any("row 4 is broken" in note for note in told)


def test_a_killed_run_goes_on_where_it_stopped(tmp_path) -> None:
    killed = Tiny()
    killed.stop(8)  # batches of 10: two shards of 30 are whole
    with pytest.raises(KeyboardInterrupt):
        run(killed, tmp_path)
    resumed = Tiny()
    run(resumed, tmp_path)
    assert resumed.images_seen == ALL - 60
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in ("", ".safetensors")]


def test_parts_of_the_work_fill_one_cache(tmp_path) -> None:
    alone = run(Tiny(), tmp_path / "alone")
    parts = [Tiny() for _ in range(4)]
    for k, model in enumerate(parts):
        told = run(model, tmp_path / "shared", share=(k + 1, 4))
        assert any(f"part {k + 1} of 4" in note for note in told.notes) and not told.where(metric="top1").rows
    assert sum(model.images_seen for model in parts) == ALL
    assert min(model.images_seen for model in parts) > ALL // 8
    whole = Tiny()
    timed = ("ms_per_image", "seconds")
    found, wanted = ([r for r in rows(x) if r["metric"] not in timed] for x in (run(whole, tmp_path / "shared"), alone))
    assert found == wanted
    assert whole.images_seen == 0
    for bad in ((0, 2), (3, 2), ("1", "2"), (1, 2, 3), "12", (True, 2)):
        with pytest.raises(InputError, match="is no part"):
            run(Tiny(), tmp_path, share=bad)
    with pytest.raises(InputError, match="nothing is kept"):
        run(Tiny(), False, share=(1, 2))


class Meeting(Tiny):
    """Its first batch is encoded when that of another process is, too: both are at work at the same time."""

    def __init__(self, barrier) -> None:
        super().__init__()
        self._barrier = barrier  # an underscore: a key must not depend on it

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        if not self.seen:
            self._barrier.wait()
        return super().encode_image(images)


def meets(barrier, folder, told=None) -> dict[int, tuple[list[dict], int, list[tuple[str, int, int]]]]:
    """Rows, images embedded and what was told of them, by the size of the set: three shards, one shard."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        prepare(patched)
        for images in (90, 30):
            model, said = Meeting(barrier), []
            results = run(
                model,
                folder / str(images),
                data=pictures(n=images),
                progress=lambda what, done, total, said=said: said.append((what, done, total)),
            )
            found[images] = rows(results), model.images_seen, said
    if told is not None:
        told.send(found)
    return found


def test_processes_at_one_time_embed_nothing_twice(tmp_path) -> None:
    """Of several shards each takes another one; where there is one, the second goes on with what comes next."""
    spawning = multiprocessing.get_context("spawn")
    barrier, (told, tells) = spawning.Barrier(2, timeout=300), spawning.Pipe(duplex=False)
    other = spawning.Process(target=meets, args=(barrier, tmp_path, tells))
    other.start()
    both = meets(barrier, tmp_path), told.recv()
    other.join()
    for images in (90, 30):
        alone = run(Tiny(), False, data=pictures(n=images))
        (one, seen, said), (two, seen_there, said_there) = (each[images] for each in both)
        assert seen + seen_there == 6 * images and seen and seen_there
        timed = ("ms_per_image", "seconds")
        assert [r for r in one if r["metric"] not in timed] == [r for r in rows(alone) if r["metric"] not in timed]
        assert [r for r in two if r["metric"] not in timed] == [r for r in rows(alone) if r["metric"] not in timed]
        for each in (said, said_there):  # nothing is counted twice, or taken back
            counts = [done for _, done, total in each if total == 6 * images]
            assert counts == sorted(counts) and counts[-1] == 6 * images
        assert "waiting for what another process embeds" in {what for what, *_ in (*said, *said_there)}


def test_what_was_computed_while_this_process_waited_is_taken(tmp_path, monkeypatch) -> None:
    claimed = Store.claimed

    @contextlib.contextmanager
    def late(self: Store, keys, wait: bool):
        """The lock comes when another run has ended."""
        with monkeypatch.context() as other:
            other.setattr(Store, "claimed", claimed)
            run(Tiny(), tmp_path)
        yield set(keys)

    monkeypatch.setattr(Store, "claimed", late)
    model = Tiny()
    run(model, tmp_path)
    assert model.images_seen == 0


def test_what_cannot_be_kept_is_not_embedded_ahead(tmp_path, monkeypatch) -> None:
    """Another process is at the first images, and the disk is full."""
    claimed, times = Store.claimed, []

    @contextlib.contextmanager
    def busy(self: Store, keys, wait: bool):
        times.append(wait)
        with claimed(self, keys, wait) as mine:
            yield mine if len(times) > 1 else set()

    (tmp_path / "file").write_text("no folder can be here")
    monkeypatch.setattr(Store, "claimed", busy)
    model = Tiny()
    with pytest.warns(StoreWarning, match="nothing more is kept"):
        run(model, tmp_path / "file" / "folder")
    assert model.images_seen == ALL and True in times


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign", "swap"])
def test_a_damaged_file_is_computed_again_and_replaced(tmp_path, damage: str) -> None:
    first = Tiny()
    one = run(first, tmp_path)
    files = embeddings(tmp_path)
    victim, content = files[0], files[0].read_bytes()
    changed = {
        "truncate": content[: len(content) // 2],
        "flip": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        "empty": b"",
        "foreign": b"not a tensor file",
        "swap": files[1].read_bytes(),  # whole and sound, but of another key
    }[damage]
    victim.write_bytes(changed)
    second = Tiny()
    with pytest.warns(StoreWarning, match="is not what was stored: .*; it is computed again") as told:
        two = run(second, tmp_path)
    assert len(told) == 1 and second.images_seen == 30 and victim.read_bytes() != changed
    assert [r for r in rows(two) if r["metric"] != "ms_per_image"] == [
        r for r in rows(one) if r["metric"] != "ms_per_image"
    ]


def test_damaged_files_are_counted_at_the_end_of_a_run(tmp_path) -> None:
    run(Tiny(), tmp_path)
    victims = embeddings(tmp_path)[:4]
    for path in victims:
        path.write_bytes(path.read_bytes()[:100])
    second = Tiny()
    with pytest.warns(StoreWarning) as told:
        run(second, tmp_path)
    assert len(told) == 2 and second.images_seen == 4 * 30
    last = str(told[1].message)
    assert "4 entries" in last and "computed again" in last and all(path.stem in last for path in victims)


def test_a_part_of_the_work_counts_damaged_files_too(tmp_path) -> None:
    run(Tiny(), tmp_path)
    for path in embeddings(tmp_path)[:3]:
        path.write_bytes(b"")
    with pytest.warns(StoreWarning) as told:
        run(Tiny(), tmp_path, share=(1, 1))
    assert len(told) == 2 and "3 entries" in str(told[1].message)


def test_an_image_that_can_be_read_again_is_embedded_again(tmp_path) -> None:
    data = pictures(bad=[4])
    assert run(Tiny(), tmp_path, data=data).row(metric="top1", set="pets")["n"] == 89
    back = pictures(bad=[4])
    back.source.digest = data.source.digest  # of a file that was gone the store knows no other name
    back.source.bad = set()
    again = Tiny()
    found = run(again, tmp_path, data=back)
    assert found.row(metric="top1", set="pets")["n"] == 90 and 0 < again.images_seen < ALL
    assert not any("cannot be read" in note for note in found.notes)


def test_what_changes_the_embedding_changes_the_key(tmp_path, monkeypatch) -> None:
    run(Tiny(), tmp_path)

    def embedded(model: Tiny | None = None, **options) -> int:
        model = model or Tiny()
        run(model, tmp_path, **options)
        return model.images_seen

    assert embedded() == 0
    assert embedded(Tiny(1e-3)) == ALL
    assert embedded(seed=1) == 5 * 90  # the noise; the clean images stay
    assert embedded(batch=15) == ALL
    assert embedded(data=pictures(seed=1)) == ALL
    monkeypatch.setattr("tests.reliability.fakes.preprocess", lambda image: preprocess(image) * 1.001)
    assert embedded() == ALL
    monkeypatch.undo()
    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", Tiny.encoders)
    monkeypatch.setattr("qclip.reliability.embed.SHARD", 30)
    monkeypatch.setitem(keys.STAGES, "images", 999)
    assert embedded() == ALL
    monkeypatch.setattr(keys, "NUMBERS", 999)
    assert embedded() == ALL
    monkeypatch.setenv("QKERNELS_CPU_TIER", "scalar")
    assert embedded() == ALL
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert embedded() == ALL
    finally:
        torch.set_num_threads(threads)


def test_another_logit_scale_embeds_nothing_and_is_measured(tmp_path, monkeypatch) -> None:
    def encoders(model: Tiny):
        found = Tiny.encoders(model)
        found.logit_scale = float(model.logit_scale.detach().exp())
        return found

    def scaled(by: float) -> Tiny:
        model = Tiny()
        model.logit_scale = nn.Parameter(torch.tensor(by).log())
        return model

    monkeypatch.setattr("qclip.reliability.embed.qmodels.encoders", encoders)
    first, second = scaled(20), scaled(2)
    one, two = (run(model, tmp_path).value(metric="nll", role="id", corruption="") for model in (first, second))
    assert first.images_seen == ALL and second.images_seen == 0
    assert two > one * 1.01
    assert run(scaled(2), tmp_path / "fresh").value(metric="nll", role="id", corruption="") == two


def test_without_a_cache_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder("embeddings") == tmp_path / "qclip" / "embeddings"
    run(Tiny(), False)
    assert not list(tmp_path.iterdir())
    run(Tiny(), None)
    assert len(list((tmp_path / "qclip" / "embeddings").rglob("*.safetensors"))) > 3


def test_strict_does_not_pass_over_what_was_left_out_before(tmp_path) -> None:
    run(Tiny(), tmp_path, data=pictures(bad=[4]))
    with pytest.raises(Exception, match="row 4 is broken"):
        run(Tiny(), tmp_path, data=pictures(bad=[4]), strict=True)


def test_a_comment_in_the_code_voids_nothing(tmp_path, monkeypatch) -> None:
    """No file of ours is read to make a key."""
    opened, real = [], open

    def spying(path, *rest, **options):
        opened.append(str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr("builtins.open", spying)
    found = keys.runtime(torch.device("cpu"))
    assert not [path for path in opened if "qclip" in path or "qkernels" in path]
    assert found["kernels"] == keys.NUMBERS and found["torch"] == torch.__version__


def forged(folder, change) -> None:
    """Give the largest embeddings other content, under a right checksum and the right key."""
    path = embeddings(folder)[0]
    store, key = Store(folder), path.stem
    found = store.open(key)
    arrays, facts = dict(found.arrays), dict(found.facts)
    change(arrays, facts)
    path.unlink()
    assert store.write(key, Entry(arrays, facts))


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, facts: arrays.update(vectors=arrays["vectors"][:-1]),
        lambda arrays, facts: arrays.update(vectors=arrays["vectors"].astype(np.float64)),
        lambda arrays, facts: arrays.update(vectors=arrays["vectors"].ravel()),
        lambda arrays, facts: arrays.update(vectors=arrays["vectors"] * np.float32(np.nan)),
        lambda arrays, facts: arrays.pop("vectors"),
        lambda arrays, facts: arrays.pop("indices"),
        lambda arrays, facts: arrays.update(indices=arrays["indices"][::-1]),
        lambda arrays, facts: arrays.update(indices=arrays["indices"] + 1),
        lambda arrays, facts: arrays.update(indices=arrays["indices"].astype(np.float32)),
        lambda arrays, facts: facts.pop("seconds"),
        lambda arrays, facts: facts.update(seconds="soon"),
        lambda arrays, facts: facts.update(unreadable=7),
        lambda arrays, facts: facts.update(unreadable=[[0, "why"]]),
        lambda arrays, facts: facts.update(unreadable=["ab"]),
    ],
)
def test_wrong_content_under_a_right_checksum_is_computed_again(tmp_path, change) -> None:
    one = run(Tiny(), tmp_path)
    forged(tmp_path, change)
    second = Tiny()
    with pytest.warns(StoreWarning, match="is not what was stored") as told:
        two = run(second, tmp_path)
    assert len(told) == 1 and second.images_seen == 30
    assert {r["value"] for r in two.where(metric="top1")} == {r["value"] for r in one.where(metric="top1")}
    third = Tiny()
    run(third, tmp_path)
    assert third.images_seen == 0  # it was replaced


def test_a_run_goes_on_where_nothing_can_be_kept(tmp_path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.warns(StoreWarning, match="nothing more is kept in .*file") as told:
        results = run(Tiny(), in_the_way / "below")
    assert len(told) == 1 and results.value(model="m", set="pets", metric="top1") > 0.5


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear, self.heads = nn.LayerNorm(4), nn.Linear(4, 4), 2
        self.register_buffer("hidden", torch.ones(2), persistent=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.linear.weight.data.__setitem__((1, 2), 3.0),
        lambda m: m.linear.bias.data.neg_(),
        lambda m: m.hidden.mul_(2),
        lambda m: m.half(),
        lambda m: setattr(m, "heads", 4),
        lambda m: setattr(m.norm, "eps", 1e-3),
        lambda m: setattr(m, "norm", nn.BatchNorm1d(4)),
        lambda m: setattr(m, "act", torch.nn.functional.gelu),
    ],
)
def test_the_fingerprint_sees_every_change_of_a_model(change) -> None:
    model, changed = Layered(), Layered()
    assert model_fingerprint(model) == model_fingerprint(changed)
    change(changed)
    assert model_fingerprint(model) != model_fingerprint(changed)


def test_the_fingerprint_does_not_see_what_computes_the_same() -> None:
    model, other = Layered(), Layered()
    other.eval()
    other.qclip_source, other.linear.layout = "elsewhere", "packed"
    assert model_fingerprint(model) == model_fingerprint(other)
    assert preprocess_fingerprint(preprocess) == preprocess_fingerprint(lambda image: preprocess(image))
