"""The store on disk: what is written is read, whatever happens in between."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from datasets import load_dataset

from lavender_min.maps import store as maps_module
from lavender_min.maps import MAX_ENTROPY, MapStore, MapWriter, entropy
from lavender_min.words import Word, find_words

RECIPE = {"recipe": "paper", "settings": {"inversion_steps": 5}, "frame": "whole", "made_with": {"torch": "2.13.0"}}


def row(i):
    """Row i, always the same: some rows have no words, some an umlaut, some a question."""
    question, answer = ("Où est-ce?", "Là, à côté.") if i % 3 == 0 else ("", "" if i % 7 == 1 else f"Über {i} dogs")
    words = find_words({"question": question, "answer": answer})
    maps = torch.rand(len(words), 32, 32, generator=torch.Generator().manual_seed(i)) * 10.0 ** -(i % 5)
    return f"pic {i}.jpg#0", question, answer, words, maps, i / 100


def fill(path, numbers, **options):
    with MapWriter(path, RECIPE, **options) as writer:
        for i in numbers:
            if f"pic {i}.jpg#0" not in writer.done:
                writer.add(*row(i))


def same(store, numbers):
    assert sorted(store.ids) == sorted(f"pic {i}.jpg#0" for i in numbers) and len(store) == len(store.ids)
    for i in random.Random(0).sample(list(numbers), len(numbers)):
        id, question, answer, words, maps, sos = row(i)
        stored = store[id]
        assert id in store and stored[:3] == (question, answer, words)
        assert stored.maps.dtype == torch.float32 and torch.equal(stored.maps, maps.half().float())
        assert stored.sos == pytest.approx(sos)


def test_round_trip_in_shards(tmp_path):
    fill(tmp_path, range(23), shard_size=10)
    assert len(list(tmp_path.glob("*.parquet"))) == 3 and not list(tmp_path.glob(".tmp*"))
    store = MapStore(tmp_path)
    same(store, range(23))
    assert store.recipe == RECIPE
    assert list(store) == store.ids == [f"pic {i}.jpg#0" for i in range(23)]
    same(pickle.loads(pickle.dumps(store)), range(23))  # as a DataLoader worker gets it, files open or not
    with pytest.raises(KeyError, match="has no maps for id 'nobody'"):
        store["nobody"]


def test_few_open_files_serve_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(maps_module, "OPEN_SHARDS", 2)
    fill(tmp_path, range(20), shard_size=4)
    store = MapStore(tmp_path)
    same(store, range(20))
    assert len(store._open) == 2


def test_ordinary_parquet(tmp_path):
    fill(tmp_path, range(7), shard_size=3)
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.num_rows == 7 and rows[2]["answer"] == "Über 2 dogs"
    assert rows[2]["words"][0] == {"text": "Über", "field": "answer", "start": 0, "end": 4}
    assert np.array(rows[2]["maps"]).reshape(-1, 32, 32).shape == (3, 32, 32)


def test_going_on_and_several_writers(tmp_path):
    fill(tmp_path, range(0, 5), shard_size=2)
    with MapWriter(tmp_path, RECIPE, rank=0) as first, MapWriter(tmp_path, RECIPE, rank=1) as second:
        assert first.done == second.done == {f"pic {i}.jpg#0" for i in range(5)}
        for i in range(5, 20):
            (first if i % 2 else second).add(*row(i))
    fill(tmp_path, range(22), shard_size=100)
    same(MapStore(tmp_path), range(22))
    total = sum(len(maps_module.read_ids(shard)) for shard in maps_module.shard_files(tmp_path))
    assert total == 22  # nothing twice on the disk either


def test_two_writers_of_one_rank_are_refused(tmp_path):
    with MapWriter(tmp_path, RECIPE):
        with pytest.raises(ValueError, match="another process is already writing to .* as rank 0"):
            MapWriter(tmp_path, RECIPE)
    MapWriter(tmp_path, RECIPE).close()


def test_another_recipe_is_refused_and_named(tmp_path):
    fill(tmp_path, range(2))
    with pytest.raises(
        ValueError, match=r"recipe.json was made with another recipe \(frame: 'whole' there, 'crop' now"
    ):
        MapWriter(tmp_path, RECIPE | {"frame": "crop"})
    MapWriter(tmp_path, RECIPE | {"made_with": {"torch": "3"}}).close()  # for the record only
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"recipe.json is missing, but its folder holds map shards"):
        MapWriter(tmp_path, RECIPE)
    with pytest.raises(FileNotFoundError, match="no attention maps in .*run extract.py first"):
        MapStore(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*recipe.json"):
        MapStore(tmp_path)


@pytest.mark.parametrize("harm", ["cut", "empty", "rubbish", "foreign"])
def test_a_broken_shard_is_named(tmp_path, harm):
    fill(tmp_path, range(8), shard_size=4)
    shard = tmp_path / "maps-r000-00001.parquet"
    whole = shard.read_bytes()
    if harm == "foreign":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": ["a"]}), shard)
    else:
        shard.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "rubbish": b"x" * 5000}[harm])
    for opened in (lambda: MapStore(tmp_path), lambda: MapWriter(tmp_path, RECIPE)):
        with pytest.raises(ValueError, match="broken map shard .*maps-r000-00001.parquet.*delete that file") as error:
            opened()
        assert "\n" not in str(error.value)
    shard.unlink()
    fill(tmp_path, range(8), shard_size=4)  # as the message says
    same(MapStore(tmp_path), range(8))


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(table, aside, **options):
        aside.write_bytes(b"PAR1 half a shard")
        raise OSError(28, "No space left on device")

    fill(tmp_path, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(maps_module.pq, "write_table", full)
        with pytest.raises(OSError, match="cannot write .*maps-r000-00001.parquet: No space left on device"):
            fill(tmp_path, range(6))
    same(MapStore(tmp_path), range(3))
    fill(tmp_path, range(6))
    same(MapStore(tmp_path), range(6))


def test_killed_in_the_middle(tmp_path):
    """SIGKILL while shards are being written; what is there is whole, and going on gives every row once."""
    script = f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_maps import *
        for i in range(10_000):  # endless for our purposes
            fill({str(tmp_path)!r}, range(i * 3, i * 3 + 3), shard_size=2)
            print("filled", flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    for _ in range(5):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    (tmp_path / ".tmp-r000-09999.parquet").write_bytes(b"half a shard")  # what a kill during a write leaves
    n = len(MapStore(tmp_path))
    assert n >= 15
    fill(tmp_path, range(n + 5))
    same(MapStore(tmp_path), range(n + 5))
    assert not list(tmp_path.glob(".tmp*"))


def test_wrong_shapes_are_refused(tmp_path):
    with MapWriter(tmp_path, RECIPE) as writer:
        with pytest.raises(ValueError, match=r"x: maps must be \[1, 32, 32\], got \[2, 32, 32\]"):
            writer.add("x", "", "a", [Word("a", "answer", 0, 1)], torch.zeros(2, 32, 32), 0.0)


def test_rows_in_hand_are_kept_when_the_run_stops(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with MapWriter(tmp_path, RECIPE) as writer:
            writer.add(*row(0))
            raise KeyboardInterrupt
    same(MapStore(tmp_path), range(1))


def test_entropy():
    maps = torch.zeros(3, 32, 32)
    maps[0], maps[1, 3, 4], maps[2, 0] = 0.01, 5, 1
    assert entropy(maps).tolist() == pytest.approx([MAX_ENTROPY, 0, np.log(32)], rel=1e-5)
    assert json.loads(json.dumps(MAX_ENTROPY)) == pytest.approx(np.log(1024))
