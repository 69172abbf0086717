"""`extract.py` on data that has changed since the store was made."""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from test_extraction import ROOT, as_one_of, assert_same, command, make_world, of_folder, rows

from lavender_min.maps import MapStore
from lavender_min.maps.__main__ import main as check
from lavender_min.teachers.command import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def files_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_started_again_changes_no_byte(world, tmp_path):
    arguments = command(world, tmp_path / "maps", "--recipe", "noise", "--batch_size", "4", "--shard_size", "7")
    assert main(arguments) == 0
    before = files_of(tmp_path)
    assert main(arguments) == 0
    assert files_of(tmp_path) == before


def repaint(folder, numbers):
    for i in numbers:
        draw = np.random.default_rng(1000 + i)
        Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_the_maps_of_other_pictures_under_the_same_names_are_made_again(world, tmp_path, capsys):
    """Two folders with the same file names and texts."""
    other = shutil.copytree(world, tmp_path / "other", ignore=shutil.ignore_patterns("sd"))
    repaint(other, range(8, 20))
    options = ["--recipe", "noise", "--batch_size", "4", "--shard_size", "7"]
    assert main(command(world, tmp_path / "maps", *options)) == 0
    before = rows(tmp_path / "maps")
    assert main(of_folder(other, world, tmp_path / "wanted", *options)) == 0
    capsys.readouterr()
    assert main(of_folder(other, world, tmp_path / "maps", *options)) == 0
    out = capsys.readouterr().out
    assert "41 pictures of folder, 27 done already" in out and "12 pictures stored" in out
    assert "12 pictures or texts are others than those their maps were made from; these maps are made again" in out
    found = rows(tmp_path / "maps")
    assert_same(found, rows(tmp_path / "wanted"))
    assert {id for id in found if not torch.equal(found[id].maps, before[id].maps)} == {f"p{i}" for i in range(8, 20)}
    assert check(["check", str(tmp_path / "maps"), "--data", "folder", "--data_root", str(other)]) == 0
    assert check(["check", str(tmp_path / "maps"), "--data", "folder", "--data_root", str(world)]) == 1


def test_a_mended_caption_gets_maps_of_its_own(world, tmp_path, capsys):
    mended = shutil.copytree(world, tmp_path / "mended", ignore=shutil.ignore_patterns("sd"))
    lines = (world / "data.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("A red dog", "A red cat")
    (mended / "data.jsonl").write_text("\n".join(lines))
    arguments = command(world, tmp_path / "maps", "--recipe", "noise", "--limit", "9")
    assert main(arguments) == 0
    assert MapStore(tmp_path / "maps")["p4"].answer == "A red dog"
    capsys.readouterr()
    arguments = of_folder(mended, world, tmp_path / "maps", "--recipe", "noise", "--limit", "9")
    assert main(arguments) == 0
    assert "1 pictures stored" in capsys.readouterr().out
    row = MapStore(tmp_path / "maps")["p4"]
    assert row.answer == "A red cat" and [word.text for word in row.words] == ["A", "red", "cat"]
    assert len(MapStore(tmp_path / "maps")) == 8
    assert main(arguments) == 0
    assert "\n0 pictures stored" in capsys.readouterr().out


def test_a_new_picture_that_is_broken_leaves_no_maps_of_the_old_one(world, tmp_path):
    changed = shutil.copytree(world, tmp_path / "changed", ignore=shutil.ignore_patterns("sd"))
    arguments = command(world, tmp_path / "maps", "--recipe", "noise", "--limit", "9")
    assert main(arguments) == 0
    (changed / "3.png").write_bytes(b"no longer a picture")
    arguments = of_folder(changed, world, tmp_path / "maps", "--recipe", "noise", "--limit", "9")
    for _ in range(2):
        assert main(arguments) == 0
        assert "p3" not in MapStore(tmp_path / "maps") and len(MapStore(tmp_path / "maps")) == 7
        assert (tmp_path / "maps" / "skipped-r000.txt").read_text().splitlines()[0].startswith("p3\t")


def test_each_process_makes_its_own_stale_rows_again(world, tmp_path, monkeypatch):
    other = shutil.copytree(world, tmp_path / "other", ignore=shutil.ignore_patterns("sd"))
    repaint(other, range(0, 40, 3))
    options = ["--recipe", "noise", "--batch_size", "4", "--shard_size", "7"]
    assert main(command(world, tmp_path / "maps", *options)) == 0
    assert main(of_folder(other, world, tmp_path / "wanted", *options)) == 0
    for rank in (1, 0, 2):
        assert as_one_of(monkeypatch, rank, 3, of_folder(other, world, tmp_path / "maps", *options)) == 0
    assert_same(rows(tmp_path / "maps"), rows(tmp_path / "wanted"))


def newest(maps):
    """The number of the shard that was written last."""
    return max(int(file.stem.split("-")[-1]) for file in maps.glob("maps-*.parquet"))


@pytest.mark.slow
def test_sigkill_at_twenty_random_moments_while_rows_are_made_again(world, tmp_path):
    other = shutil.copytree(world, tmp_path / "other", ignore=shutil.ignore_patterns("sd"))
    # Not the missing one: a batch with one picture more rounds otherwise.
    repaint(other, [i for i in range(40) if i % 8 and i not in (7, 30)])
    options = ["--recipe", "noise", "--batch_size", "2", "--shard_size", "1"]
    assert main(command(world, tmp_path / "maps", *options)) == 0
    assert main(of_folder(other, world, tmp_path / "wanted", *options)) == 0
    old, new = rows(tmp_path / "maps"), rows(tmp_path / "wanted")
    kept = {id for id in old if torch.equal(old[id].maps, new[id].maps)}
    assert kept == {f"p{i}" for i in range(0, 41, 8)}
    arguments = [sys.executable, str(ROOT / "extract.py"), *of_folder(other, world, tmp_path / "maps", *options)]
    draw, mixed, began = random.Random(0), 0, time.time()
    for kill in range(20):
        child = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        # Three in four while it works, the others while it starts.
        if kill % 4:
            assert any(line.startswith("expected time") for line in child.stdout)
            # Some shards later, a shard being a row here.
            shards, more = newest(tmp_path / "maps"), draw.randrange(3)
            while newest(tmp_path / "maps") < shards + more:
                assert child.poll() is None
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 3))
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        found = rows(tmp_path / "maps")
        assert kept <= found.keys() <= new.keys()
        is_new = [torch.equal(row.maps, new[id].maps) for id, row in found.items()]
        assert all(same or torch.equal(found[id].maps, old[id].maps) for id, same in zip(found, is_new, strict=True))
        mixed += 0 < sum(is_new) - len(kept) < len(new) - len(kept)
    print(f"{mixed} of 20 kills left old rows beside new ones, in {time.time() - began:.0f} s")
    assert mixed >= 5
    assert subprocess.run(arguments, cwd=ROOT, capture_output=True).returncode == 0
    assert_same(rows(tmp_path / "maps"), new)
    assert check(["check", str(tmp_path / "maps")]) == 0 and not list((tmp_path / "maps").glob(".tmp*"))
