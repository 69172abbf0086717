"""What may go wrong with a store: nothing is lost that was written, nothing is there twice, the error names the file.

Two of these run `extract.py` itself for minutes; the quick ones try the store alone.
"""

import multiprocessing
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_script
from test_map_store import RECIPE, fill, row, same

from lavender_min.maps import MapStore, MapWriter, shard, store
from lavender_min.maps.__main__ import main


@pytest.mark.parametrize("harm", ["cut", "empty", "rubbish", "foreign"])
def test_a_broken_shard_is_named(tmp_path, harm):
    fill(tmp_path, range(8), shard_size=4)
    file = tmp_path / "maps-r000-00001.parquet"
    whole = file.read_bytes()
    if harm == "foreign":
        pq.write_table(pa.table({"id": ["a"]}), file)
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "rubbish": b"x" * 5000}[harm])
    for opened in (lambda: MapStore(tmp_path), lambda: MapWriter(tmp_path, RECIPE)):
        with pytest.raises(ValueError, match="broken map shard .*maps-r000-00001.parquet.*delete that file") as error:
            opened()
        assert "\n" not in str(error.value)
    file.unlink()
    # As the message says.
    fill(tmp_path, range(8), shard_size=4)
    same(MapStore(tmp_path), range(8))


def test_a_shard_that_breaks_while_it_is_read_is_named(tmp_path):
    fill(tmp_path, range(80), shard_size=40)
    file = tmp_path / "maps-r000-00001.parquet"
    maps = MapStore(tmp_path)
    # Both files are open.
    same(maps, range(80))
    whole = file.read_bytes()
    # Between texts and maps of the second group; in the texts of the first.
    for size in (len(whole) // 2, 10):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="broken map shard .*maps-r000-00001.parquet"):
            for i in range(40, 80):
                maps[f"pic {i}.jpg#0"]
        assert maps["pic 3.jpg#0"].answer == row(3)[2]
    # All but our own way of writing.
    for options in ({}, {"compression": "none", "row_group_size": 32}):
        file.write_bytes(whole)
        pq.write_table(pq.read_table(file), file, **options)
        with pytest.raises(ValueError, match="00001.parquet: another program rewrote it, with compressed maps"):
            MapStore(tmp_path)["pic 40.jpg#0"]


def rewritten(path, change):
    """The second shard with another table in it, written as ours are."""
    file = path / "maps-r000-00001.parquet"
    table = change(pq.ParquetFile(file).read())
    shard._write(file, table, path / ".aside")
    return file


def with_maps(table, change, kind=None):
    """The table with the maps of its third row changed, as a list of numbers."""
    maps = table["maps"].to_pylist()
    maps[2] = change(maps[2])
    return table.set_column(table.column_names.index("maps"), "maps", pa.array(maps, pa.list_(kind or pa.float16())))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.drop_columns(["maps"]), "it has no column 'maps'"),
        (lambda table: table.drop_columns(["words"]), "it has no column 'words'"),
        (lambda table: with_maps(table, lambda maps: maps, pa.float32()), "expected maps as list<.*float>; got list<.*: float>"),
        (lambda table: table.set_column(4, "sos", pa.array(["0"] * len(table))), "expected sos as float; got string"),
    ],
)  # fmt: skip
def test_a_shard_of_other_columns_is_named_when_the_store_is_opened(tmp_path, change, message):
    """A generator within reading would end there in silence: a DataLoader takes StopIteration for the end of the epoch."""
    fill(tmp_path, range(8), shard_size=4)
    file = rewritten(tmp_path, change)
    for opened in (lambda: MapStore(tmp_path), lambda: MapWriter(tmp_path, RECIPE), lambda: shard.Shard(file)):
        with pytest.raises(ValueError, match=message):
            opened()
    with pytest.raises(ValueError, match=f"broken map shard {file}: {message}; delete that file"):
        MapStore(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda maps: maps + [0.5] * 1024, r"its rows have 12 maps for 11 words"),
        (lambda maps: maps[1024:], r"its rows have 10 maps for 11 words"),
        (
            lambda maps: [-1.0, *maps[1:]],
            "the maps of pic 6.jpg#0 are no probabilities, which are finite and at least 0",
        ),
        (lambda maps: [*maps[:-1], float("nan")], "the maps of pic 6.jpg#0 are no probabilities"),
        (lambda maps: [*maps[:-1], float("inf")], "the maps of pic 6.jpg#0 are no probabilities"),
    ],
)
def test_maps_that_cannot_be_are_named_when_they_are_read(tmp_path, change, message, capsys):
    # Row 8 has no words.
    fill(tmp_path, [0, 1, 2, 3, 4, 5, 6, 8], shard_size=4)
    file = rewritten(tmp_path, lambda table: with_maps(table, change))
    maps = MapStore(tmp_path)
    with pytest.raises(ValueError, match=f"broken map shard {file}: {message}.*; delete that file"):
        maps["pic 6.jpg#0"]
    assert maps["pic 2.jpg#0"].answer == row(2)[2]
    # The rows beside it are still what they were.
    if "no probabilities" in message:
        assert torch.equal(maps["pic 5.jpg#0"].maps, row(5)[4].half().float())
    assert main(["check", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("5", r"recipe.json, the whole: input should be a .*dictionary; got 5"),
        ("[]", r"recipe.json, the whole: input should be a .*dictionary; got \[\]"),
        ("{}", r"recipe.json, frame: field required"),
        ('{"frame": "round"}', r"recipe.json, frame: input should be 'whole' or 'crop'; got 'round'"),
        ('{"frame": "crop", "made_with": 5}', r"recipe.json, made_with: input should be a .*dictionary; got 5"),
        (
            '{"frame": "crop", "made_with": {"batch_size": "8"}}',
            r"recipe.json, made_with.batch_size: .* integer; got '8'",
        ),
        ("[" * 100_000, "recipe.json: "),
        ("\udcff", "recipe.json: "),
    ],
)
def test_a_recipe_file_that_cannot_be_is_named(tmp_path, text, message):
    fill(tmp_path, range(2))
    (tmp_path / "recipe.json").write_bytes(text.encode(errors="surrogateescape"))
    for opened in (lambda: MapStore(tmp_path), lambda: MapWriter(tmp_path, RECIPE)):
        with pytest.raises(ValueError, match=message) as error:
            opened()
        assert "\n" not in str(error.value)


def test_another_recipe_is_refused_and_named(tmp_path):
    fill(tmp_path, range(2))
    with pytest.raises(
        ValueError, match=r"recipe.json was made with another recipe \(frame: 'whole' there, 'crop' now"
    ):
        MapWriter(tmp_path, RECIPE | {"frame": "crop"})
    # For the record only.
    MapWriter(tmp_path, RECIPE | {"made_with": {"torch": "3"}}).close()
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ValueError, match=r"recipe.json is missing, but its folder holds map shards"):
        MapWriter(tmp_path, RECIPE)
    with pytest.raises(FileNotFoundError, match="no attention maps in .*run extract.py first"):
        MapStore(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="recipe.json: Expecting property name"):
        MapStore(tmp_path)


def test_a_disk_that_takes_no_more_leaves_no_half_shard(tmp_path):
    """The kernel refuses bytes in the middle of a shard: no file may grow beyond 40 kB."""
    fill(tmp_path, range(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*maps-r000-00001.parquet: .*File too large"):
            fill(tmp_path, range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    same(MapStore(tmp_path), range(3))
    assert not list(tmp_path.glob(".tmp*"))
    fill(tmp_path, range(60))
    same(MapStore(tmp_path), range(60))


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path):
    fill(tmp_path, range(3))
    for name in (".tmp-r000-00001.parquet", ".tmp-r000-recipe.json", ".tmp-r001-00000.parquet"):
        (tmp_path / name).write_bytes(b"half")
    same(MapStore(tmp_path), range(3))
    fill(tmp_path, range(5))
    # Another process's: not ours.
    assert [file.name for file in tmp_path.glob(".tmp*")] == [".tmp-r001-00000.parquet"]


def test_two_writers_of_one_rank_are_refused(tmp_path):
    with MapWriter(tmp_path, RECIPE):
        with pytest.raises(ValueError, match="another process is already writing to .* as rank 0"):
            MapWriter(tmp_path, RECIPE)
    MapWriter(tmp_path, RECIPE).close()


def test_processes_of_several_ranks_write_at_once(tmp_path):
    """Both start an empty folder together; meanwhile whoever opens it finds whole shards."""
    fork = multiprocessing.get_context("fork")
    writers = [
        fork.Process(target=fill, args=(tmp_path, range(rank, 120, 2)), kwargs={"shard_size": 3, "rank": rank})
        for rank in (0, 1)
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "recipe.json").exists():
            maps = MapStore(tmp_path)
            assert seen <= set(maps.ids)
            seen = set(maps.ids)
            for id in list(seen)[-3:]:
                maps[id]
    assert [writer.exitcode for writer in writers] == [0, 0]
    same(MapStore(tmp_path), range(120))
    assert sum(len(store.read_ids(file)) for file in store.shard_files(tmp_path)) == 120


# ---- extract.py itself, on the toy data ------------------------------------------------------------------------------

TOY = "--data toy --recipe noise --timesteps 151 --batch_size 4 --shard_size 3 --limit".split()
LIMIT = 360


def start(maps, limit=LIMIT):
    command = [sys.executable, str(ROOT / "extract.py"), *TOY, str(limit), "--maps", str(maps)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def until_it_works(child):
    for line in child.stdout:
        if line.startswith("expected time"):
            return
    raise AssertionError(f"extract.py ended with {child.wait()}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The rows of a run that nothing disturbs, and how many seconds it took to start."""
    maps, began = tmp_path_factory.mktemp("unbroken") / "maps", time.time()
    child = start(maps)
    until_it_works(child)
    starting = time.time() - began
    assert child.wait() == 0
    whole = MapStore(maps)
    assert len(whole) == LIMIT
    return {id: whole[id] for id in whole.ids}, starting


def assert_part_of(maps, whole):
    """Every row that is there is bit for bit the unbroken run's; returns their ids."""
    found = MapStore(maps)
    for id in found.ids:
        assert found[id][:3] == whole[id][:3] and found[id].sos == whole[id].sos, id
        assert torch.equal(found[id].maps, whole[id].maps), id
    return set(found.ids)


def assert_whole(maps, whole):
    assert assert_part_of(maps, whole) == whole.keys()
    # Nothing twice either.
    assert main(["check", str(maps)]) == 0
    assert not list(maps.glob(".tmp*"))


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments(tmp_path, unbroken, capsys):
    whole, starting = unbroken
    maps, draw, seen, grew = tmp_path / "maps", random.Random(0), set(), 0
    for kill in range(20):
        child = start(maps)
        # Three in four while it works, some shards later, of which there are 120.
        if kill % 4:
            until_it_works(child)
            shards, more = len(store.shard_files(maps)), draw.randrange(4)
            while len(store.shard_files(maps)) < shards + more:
                assert child.poll() is None
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
        else:
            # On a machine that is faster by now, the first shard ends the wait.
            shards, until = len(store.shard_files(maps)), time.time() + draw.uniform(0, starting)
            while time.time() < until and len(store.shard_files(maps)) == shards:
                time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        if (maps / "recipe.json").exists():
            now = assert_part_of(maps, whole)
            assert seen <= now
            grew, seen = grew + (seen < now), now
    print(f"{grew} of 20 runs left new rows, {len(seen)} of {LIMIT} in all")
    assert grew >= 8 and len(seen) < LIMIT
    assert start(maps).wait() == 0
    assert_whole(maps, whole)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, unbroken):
    """A real one, of 1 MB; where mounting is not allowed, the quick test above stands for it."""
    whole = unbroken[0]
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode
    ):
        pytest.skip("may not mount a tmpfs")
    try:
        arguments = ["extract.py", *TOY, LIMIT, "--maps", disk / "maps"]
        done = run_script(*arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"extract.py: cannot write {disk}/maps/maps-r000-000") and last.endswith(
            "left on device"
        )
        assert 20 < len(assert_part_of(disk / "maps", whole)) < LIMIT and not list((disk / "maps").glob(".tmp*"))
        # Room is made.
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert run_script(*arguments).returncode == 0
        assert_whole(disk / "maps", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_two_processes_on_one_folder(tmp_path, unbroken):
    first = start(tmp_path / "maps")
    until_it_works(first)
    second = run_script("extract.py", *TOY, LIMIT, "--maps", tmp_path / "maps")
    assert second.returncode == 2
    last = second.stderr.strip().splitlines()[-1]
    assert last.startswith(f"extract.py: another process is already writing to {tmp_path}/maps as rank 0")
    assert first.wait() == 0
    assert_whole(tmp_path / "maps", unbroken[0])
