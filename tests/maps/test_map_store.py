"""The store on disk and its command line: what is written is read, looked over, shown, and taken from elsewhere."""

import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from lavender_min.maps import MAX_ENTROPY, MapStore, MapWriter, entropy, shard, store
from lavender_min.maps.__main__ import main
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


def same(maps, numbers):
    assert sorted(maps.ids) == sorted(f"pic {i}.jpg#0" for i in numbers) and len(maps) == len(maps.ids)
    for i in random.Random(0).sample(list(numbers), len(numbers)):
        id, question, answer, words, wanted, sos = row(i)
        stored = maps[id]
        assert id in maps and stored[:3] == (question, answer, words)
        assert stored.maps.dtype == torch.float32 and torch.equal(stored.maps, wanted.half().float())
        assert stored.sos == pytest.approx(sos)


def test_round_trip_in_shards(tmp_path):
    fill(tmp_path, range(23), shard_size=10)
    assert len(list(tmp_path.glob("*.parquet"))) == 3 and not list(tmp_path.glob(".tmp*"))
    maps = MapStore(tmp_path)
    same(maps, range(23))
    assert maps.recipe == RECIPE
    assert list(maps) == maps.ids == [f"pic {i}.jpg#0" for i in range(23)]
    # As a DataLoader worker gets it, files open or not.
    same(pickle.loads(pickle.dumps(maps)), range(23))
    with pytest.raises(KeyError, match="has no maps for id 'nobody'"):
        maps["nobody"]


@pytest.mark.parametrize("rows_a_group", [1, 5, 32])
def test_few_open_files_serve_many_shards(tmp_path, monkeypatch, rows_a_group):
    monkeypatch.setattr(store, "OPEN_SHARDS", 2)
    monkeypatch.setattr(shard, "ROWS_PER_GROUP", rows_a_group)
    fill(tmp_path, range(120), shard_size=40)
    # A reader goes by what the file says.
    monkeypatch.setattr(shard, "ROWS_PER_GROUP", 7)
    maps = MapStore(tmp_path)
    files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    same(maps, range(120))
    assert len(maps._open) == 2 and (files is None or len(os.listdir("/proc/self/fd")) == files + 2)
    # The one not used for longest is let go.
    for i in (0, 40, 0, 80):
        maps[f"pic {i}.jpg#0"]
    assert list(maps._open) == [0, 2]


class Rows(torch.utils.data.Dataset):
    def __init__(self, maps):
        self.maps = maps

    def __len__(self):
        return 3 * len(self.maps)

    def __getitem__(self, i):
        i = i * 7 % len(self.maps)
        return i, self.maps[f"pic {i}.jpg#0"]


# A lambda could not be sent to a spawned worker.
def unchanged(x):
    return x


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_share_a_store(tmp_path, start):
    fill(tmp_path, range(30), shard_size=9)
    maps = MapStore(tmp_path)
    # All files are open when the workers are forked.
    same(maps, range(30))
    loader = torch.utils.data.DataLoader(
        Rows(maps), batch_size=None, num_workers=2, multiprocessing_context=start, collate_fn=unchanged
    )
    seen = 0
    for i, stored in loader:
        _, question, answer, words, wanted, _ = row(i)
        assert stored[:3] == (question, answer, words) and torch.equal(stored.maps, wanted.half().float())
        seen += 1
    assert seen == 90


def test_ordinary_parquet(tmp_path):
    fill(tmp_path, range(70), shard_size=40)
    rows = load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.num_rows == 70 and rows[2]["answer"] == "Über 2 dogs"
    assert rows[2]["words"][0] == {"text": "Über", "field": "answer", "start": 0, "end": 4}
    for i in (2, 31, 32, 69):
        assert np.array_equal(np.array(rows[i]["maps"]).reshape(-1, 32, 32), row(i)[4].half().numpy())


def test_going_on_and_several_writers(tmp_path):
    fill(tmp_path, range(0, 5), shard_size=2)
    with MapWriter(tmp_path, RECIPE, rank=0) as first, MapWriter(tmp_path, RECIPE, rank=1) as second:
        assert first.done == second.done == {f"pic {i}.jpg#0" for i in range(5)}
        for i in range(5, 20):
            (first if i % 2 else second).add(*row(i))
    fill(tmp_path, range(22), shard_size=100)
    same(MapStore(tmp_path), range(22))
    total = sum(len(store.read_ids(file)) for file in store.shard_files(tmp_path))
    # Nothing twice on the disk either.
    assert total == 22


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


# ---- the command line -------------------------------------------------------------------------------------------------


def test_check_counts_and_finds_nothing_wrong(tmp_path, capsys):
    fill(tmp_path, range(70), shard_size=40)
    words = sum(len(row(i)[3]) for i in range(70))
    assert main(["check", str(tmp_path)]) == 0
    out, bar = capsys.readouterr()
    size = sum(file.stat().st_size for file in tmp_path.glob("*.parquet")) / 1e6
    counted, spread, verdict = out.splitlines()
    assert counted == f"{tmp_path}: 70 rows, {words} words, 2 shards, {size:.1f} MB" and "100%" in bar
    maps = np.concatenate([np.asarray(row(i)[4], np.float16).astype(np.float64).reshape(-1, 1024) for i in range(70)])
    contrast = (maps.max(1) - maps.min(1)) / maps.mean(1)
    for shown, share in zip(spread.split(": ")[1].split(" (")[0].split(", "), (0, 0.2, 0.4, 0.6, 0.8, 1), strict=True):
        assert abs(float(shown) - np.quantile(contrast, share)) < 0.006
    assert verdict == "nothing is wrong"
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith("there is no recipe.json; run extract.py first\n")


def test_check_names_what_is_wrong(tmp_path, capsys):
    fill(tmp_path, range(40), shard_size=8)
    with MapWriter(tmp_path, RECIPE, rank=1) as writer:
        words = find_words({"answer": "one dog runs"})
        for id, (i, value) in {"nan": (1, np.nan), "inf": (2, np.inf), "zero": (0, 0)}.items():
            maps = torch.ones(3, 32, 32)
            maps[i] = 0 if value == 0 else maps[i]
            maps[i, 3, 4] = value
            writer.add(id, "", "one dog runs", words, maps, 0.5)
        # Stands in the first shard already.
        writer.add(*row(3))
    cut, flipped, misread = (tmp_path / f"maps-r000-0000{i}.parquet" for i in (1, 2, 3))
    cut.write_bytes(cut.read_bytes()[:-100])
    for harmed, place in ((flipped, len(flipped.read_bytes()) // 2), (misread, misread.read_bytes().index(b" dogs"))):
        data = bytearray(harmed.read_bytes())
        # One bit of a map; of a text.
        data[place] ^= 1
        harmed.write_bytes(data)
    assert main(["check", str(tmp_path)]) == 1
    # A heading with its list, a line.
    parts = capsys.readouterr().out.replace("\n  ", "\0").splitlines()
    found = {part.split("\0")[0]: part.split("\0")[1:] for part in parts}
    names = [line.split("/")[-1].split(":")[0] for line in found["broken: 3"]]
    assert names == [cut.name, flipped.name, misread.name]
    assert all("CRC checksum" in line for line in found["broken: 3"][1:])
    assert found["not finite: 2"] == ["nan: dog", "inf: runs"] and found["all zero: 1"] == ["zero: one"]
    assert found["twice: 1"] == ["pic 3.jpg#0: in maps-r000-00000.parquet and in maps-r001-00000.parquet"]


def test_show_draws_every_map_over_its_picture(store_folder, tmp_path, capsys):
    sheets = []
    for more in ([], ["--data", "toy"]):
        out = tmp_path / "sheet.png"
        assert main(["show", store_folder, "--n", "2", "--out", str(out), *more]) == 0
        sheets.append(np.asarray(Image.open(out).convert("RGB"), int))
    plain, pictured = sheets
    said = capsys.readouterr().out.splitlines()
    total = len(MapStore(store_folder))
    assert said == [f"2 of {total} examples: {out}"] * 2 and plain.shape == pictured.shape
    # Dark where maps are low.
    assert (plain < 60).all(-1).mean() > 0.1
    # The same sheet with pictures showing through.
    assert 0.05 < (abs(plain - pictured).max(-1) > 20).mean() < 0.9
    fill(tmp_path, range(1))
    assert main(["show", str(tmp_path)]) == 0
    # One line instead of two.
    assert Image.open(tmp_path / "maps.png").height < plain.shape[0] * 0.6
    assert main(["show", store_folder, "--data", "folder", "--data_root", str(tmp_path)]) == 2
    assert "no data in" in capsys.readouterr().err
    assert main(["show", store_folder, "--n", "0"]) == 2
    assert capsys.readouterr().err.endswith(": --n must be a whole number of at least 1; got 0\n")


def released(root, picture, words, sub="x"):
    folder = root / picture / "lpm_attention" / sub
    folder.mkdir(parents=True)
    for i, word in enumerate(words):
        grey = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(grey).save(folder / f"attention_{word}.jpg", quality=95)
    return folder


def test_the_released_maps_become_a_store(tmp_path, capsys):
    captions = ["A dog saw a Dog.", "Two dogs."], ["The child's red T-shirt"]
    lines = [f"{i}.jpg#{k}\t{text}" for i, own in enumerate(captions) for k, text in enumerate(own)]
    (tmp_path / "flickr").mkdir()
    (tmp_path / "flickr" / "results_20130124.token").write_text("\n".join(lines))
    Image.new("RGB", (8, 8)).save(tmp_path / "flickr" / "0.jpg")
    jpegs = tmp_path / "jpegs"
    zero = released(jpegs, "0.jpg", ["dog", "A", "dogs", "cat", "saw"], "0")
    (zero / "attention_saw.jpg").write_bytes(b"not a picture")
    one = released(jpegs, "1.jpg", ["child's", "T-shirt"])
    Image.new("L", (16, 16)).save(one / "attention_red.jpg")
    released(jpegs, "unknown.jpg", ["dog"])
    arguments = ["import", str(jpegs), str(tmp_path / "maps"), "--data_root", str(tmp_path / "flickr")]
    # The second time adds nothing.
    for _ in range(2):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "holds 2 captions; of 9 files 5 found no place" in out
        left = (tmp_path / "maps" / "left_out.txt").read_text().splitlines()
        assert {tuple(line.split("\t")[:2]) for line in left} == {
            ("0.jpg", "dogs"), ("0.jpg", "cat"), ("0.jpg", "saw"), ("1.jpg", "red"), ("unknown.jpg", "dog")
        }  # fmt: skip
        assert sum("in no caption" in line for line in left) == 3 and "(16, 16) cells" in str(left)
    maps = MapStore(tmp_path / "maps")
    assert (
        maps.ids == ["0.jpg#0", "1.jpg#0"] and maps.recipe["recipe"] == "released" and maps.recipe["frame"] == "whole"
    )
    stored = maps["0.jpg#0"]
    assert [(w.text, w.start) for w in stored.words] == [("A", 0), ("dog", 2), ("a", 10), ("Dog", 12)]
    for word, one in zip(stored.words, stored.maps, strict=True):
        name = {"a": "A", "dog": "dog"}[word.text.casefold()]
        grey = torch.from_numpy(np.array(Image.open(zero / f"attention_{name}.jpg"), np.float32) / 255)
        assert torch.equal(one, grey.half().float()) and one.max() > 0.9
    # Goes on with the other captions.
    assert main([*arguments, "--captions", "all"]) == 0
    assert [w.text for w in MapStore(tmp_path / "maps")["0.jpg#1"].words] == ["dogs"]
    assert main(["check", str(tmp_path / "maps")]) == 0
    assert main([*arguments, "--frame", "crop"]) == 2 and "another recipe (frame" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "flickr"), *arguments[2:]]) == 2
    assert "looked for <picture>/lpm_attention/<folder>/attention_<word>.jpg" in capsys.readouterr().err
