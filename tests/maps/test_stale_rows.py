"""A row whose example has another text or picture now: it is found, made again, and never stands beside the new one."""

import json
import multiprocessing
from functools import partial
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_map_store import RECIPE, fill, row, same

from lavender_min.data import Example, open_image
from lavender_min.maps import MapStore, MapWriter, find_stale, shard
from lavender_min.maps.__main__ import main


def made_again(i):
    """Row i as another picture gives it."""
    id, question, answer, words, maps, sos = row(i)
    return id, question, answer, words, maps / 2, sos, f"digest {i}"


def remake(path, numbers, until=None, **options):
    """Make these rows again; `until`: stop after so many as a killed process does, without a last flush."""
    writer = MapWriter(path, RECIPE, **options)
    writer.remake([f"pic {i}.jpg#0" for i in numbers])
    for i in list(numbers)[:until]:
        assert f"pic {i}.jpg#0" not in writer.done
        writer.add(*made_again(i))
    if until is None:
        writer.__exit__(None)
    writer.close()


def ids_on_disk(path):
    return [id for file in sorted(path.glob("maps-*.parquet")) for id in pq.read_table(file)["id"].to_pylist()]


def test_a_row_made_again_takes_the_place_of_the_old_one(tmp_path):
    fill(tmp_path, range(100), shard_size=40)
    # Some of one shard, all of another.
    again = [3, 4, 39, *range(40, 80)]
    remake(tmp_path, again, shard_size=16)
    maps = MapStore(tmp_path)
    assert sorted(ids_on_disk(tmp_path)) == sorted(maps.ids) == sorted(f"pic {i}.jpg#0" for i in range(100))
    assert not (tmp_path / "maps-r000-00001.parquet").exists()
    origins = maps.origins()
    for i in range(100):
        id, question, answer, words, wanted, *_ = made_again(i) if i in again else row(i)
        stored = maps[id]
        assert stored[:3] == (question, answer, words) and torch.equal(stored.maps, wanted.half().float())
        assert origins[id] == (question, answer, f"digest {i}" if i in again else "")
    assert main(["check", str(tmp_path)]) == 0


def test_a_row_that_got_no_new_one_goes_at_the_end_and_only_there(tmp_path):
    fill(tmp_path, range(10))
    with pytest.raises(KeyboardInterrupt), MapWriter(tmp_path, RECIPE) as writer:
        writer.remake(["pic 1.jpg#0", "pic 2.jpg#0", "of other data"])
        writer.add(*made_again(1))
        raise KeyboardInterrupt
    assert sorted(ids_on_disk(tmp_path)) == sorted(f"pic {i}.jpg#0" for i in range(10))
    with MapWriter(tmp_path, RECIPE) as writer:
        writer.remake(["pic 2.jpg#0"])
    assert sorted(ids_on_disk(tmp_path)) == sorted(f"pic {i}.jpg#0" for i in range(10) if i != 2)


@pytest.mark.parametrize("until", range(12))
def test_a_kill_while_rows_are_made_again_loses_no_other_row(tmp_path, until):
    fill(tmp_path, range(20), shard_size=7)
    remake(tmp_path, range(5, 17), until, shard_size=3)
    found = ids_on_disk(tmp_path)
    assert len(set(found)) == len(found) == 20
    maps = MapStore(tmp_path)
    new = until // 3 * 3
    for i in range(20):
        id, *_, wanted, _ = row(i)
        assert torch.equal(maps[id].maps, (wanted / 2 if 5 <= i < 5 + new else wanted).half().float())


def test_two_processes_take_rows_out_of_one_shard_at_once(tmp_path):
    fill(tmp_path, range(90))
    fork = multiprocessing.get_context("fork")
    shares = [range(rank, 90, 3) for rank in range(2)]
    writers = [
        fork.Process(target=remake, args=(tmp_path, share), kwargs={"shard_size": 2, "rank": rank})
        for rank, share in enumerate(shares)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(ids_on_disk(tmp_path)) == sorted(f"pic {i}.jpg#0" for i in range(90))
    origins = MapStore(tmp_path).origins()
    assert all(bool(origins[f"pic {i}.jpg#0"].digest) == (i % 3 < 2) for i in range(90))


def test_whoever_reads_meanwhile_gets_no_other_row(tmp_path):
    fill(tmp_path, range(20), shard_size=10)
    maps = MapStore(tmp_path)
    # One file is open, and stays what it was; the other is opened after its rows have moved up.
    before = maps["pic 5.jpg#0"]
    remake(tmp_path, [2, 12])
    assert torch.equal(maps["pic 5.jpg#0"].maps, before.maps)
    with pytest.raises(
        ValueError, match="maps-r000-00001.parquet was written anew while it was being read: start again"
    ):
        maps["pic 15.jpg#0"]
    assert torch.equal(MapStore(tmp_path)["pic 15.jpg#0"].maps, row(15)[4].half().float())


def without_digest(path):
    """A store as earlier versions wrote it."""
    for file in path.glob("maps-*.parquet"):
        shard._write(file, pq.ParquetFile(file).read().drop_columns(["digest"]), file.with_suffix(".aside"))
        assert "digest" not in pq.read_schema(file).names


def test_a_store_of_an_earlier_version_is_read_and_gone_on_with(tmp_path):
    fill(tmp_path, range(50), shard_size=40)
    without_digest(tmp_path)
    same(MapStore(tmp_path), range(50))
    assert {origin.digest for origin in MapStore(tmp_path).origins().values()} == {""}
    remake(tmp_path, [7, 45])
    assert MapStore(tmp_path).origins()["pic 7.jpg#0"].digest == "digest 7"
    assert torch.equal(MapStore(tmp_path)["pic 8.jpg#0"].maps, row(8)[4].half().float())
    assert main(["check", str(tmp_path)]) == 0


# ---- the data beside it ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Six pictures of one colour each, two of them shared by two captions, and a store that was made from them."""
    lines = []
    for i in range(6):
        Image.new("RGB", (4, 3), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines += [{"id": f"{i}{n}", "image": f"{i}.png", "text": f"Text {i} {n}"} for n in range(1 + (i < 2))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with MapWriter(tmp_path / "maps", RECIPE) as writer:
        for line in lines[:-1]:
            digest = sha256((tmp_path / line["image"]).read_bytes()).hexdigest() * (line["id"] != "40")
            writer.add(line["id"], "", line["text"], [], torch.zeros(0, 32, 32), 0.5, digest)
    return tmp_path


def examples(folder):
    from lavender_min import data

    return data.load("folder", folder)


@pytest.mark.parametrize("column", ["id", "answer", "digest"])
def test_a_row_that_lacks_what_it_was_made_from_is_named(tmp_path, column):
    fill(tmp_path, range(4))
    (file,) = tmp_path.glob("maps-*.parquet")
    table = pq.read_table(file)
    values = [None, *table[column].to_pylist()[1:]]
    number = table.column_names.index(column)
    pq.write_table(table.set_column(number, table.schema.field(column), pa.array(values, pa.string())), file)
    with pytest.raises(ValueError, match=f"{file.name}: a row has no {column}: delete the shard and extract again"):
        shard.read_origins(file)


def test_other_texts_and_pictures_are_found(folder, monkeypatch):
    origins = MapStore(folder / "maps").origins()
    assert find_stale(examples(folder), origins) == {}
    for i in (0, 3, 4, 5):
        Image.new("RGB", (4, 3), (i, 9, 0)).save(folder / f"{i}.png")
    (folder / "1.png").unlink()
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("Text 2 0", "Test 2 0"))
    # Of 40 the store does not know the picture, 50 has no maps, and no one can tell about 1.png.
    assert find_stale(examples(folder), origins) == {"00": "picture", "01": "picture", "20": "text", "30": "picture"}
    # What two captions share is read once.
    opened = []
    monkeypatch.setattr("lavender_min.maps.stale.picture_digest", lambda example: opened.append(example.id) or "")
    find_stale(examples(folder), origins)
    assert sorted(opened) == ["00", "10", "30"]


def test_what_is_compared_is_not_decoded(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(b"no picture")
    example = Example("x", partial(open_image, file), "", "a")
    origins = {"x": shard.Origin("", "a", sha256(b"no picture").hexdigest())}
    assert find_stale([example], origins) == {}
    file.write_bytes(b"another")
    assert find_stale([example], origins) == {"x": "picture"}


def test_check_compares_with_the_data(folder, capsys):
    command = ["check", str(folder / "maps"), "--data", "folder", "--data_root", str(folder)]
    assert main(command) == 0
    said = "--data folder: 8 examples; 7 have maps, of which {} are stale; 1 have none; of 1 the store does not know the picture"
    assert capsys.readouterr().out.splitlines()[1:] == [said.format(0), "nothing is wrong"]
    Image.new("RGB", (4, 3)).save(folder / "1.png")
    (folder / "data.jsonl").write_text((folder / "data.jsonl").read_text().replace("Text 2 0", "Test 2 0"))
    assert main(command) == 1
    out = capsys.readouterr().out.splitlines()[1:]
    assert out == [said.format(3), "another text now: 1", "  20", "another picture now: 2", "  10", "  11"]
    assert main([*command[:-1], str(folder / "nowhere")]) == 2
