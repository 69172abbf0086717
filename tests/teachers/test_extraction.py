"""`extract.py` from the outside: what it writes, how it goes on after a kill, what it says when something is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_sd import build_tiny_sd

from lavender_min.maps import MapStore
from lavender_min.teachers import attention_maps, extraction, find_recipe, stable_diffusion
from lavender_min.teachers.command import main

ROOT = Path(__file__).parents[2]

WORDS = ["A red dog", "the cat on the grass runs with a dog", "turquoise", "dog with a turquoise cat"]


def make_world(folder):
    """A tiny Stable Diffusion and 41 noisy pictures with texts, two of them broken."""
    build_tiny_sd(folder / "sd")
    lines, draw = [], np.random.default_rng(0)
    for i in range(41):
        Image.fromarray(draw.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        text = {"text": WORDS[i % 4]} if i % 3 else {"question": "Is the cat on the grass?", "answer": WORDS[i % 4]}
        lines.append({"id": f"p{i}", "image": f"{i}.png", **text})
    (folder / "7.png").write_bytes(b"not a picture")
    (folder / "30.png").unlink()
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def of_folder(data, world, maps, *more):
    """The same command for other data."""
    return ["--data", "folder", "--data_root", str(data), "--sd", str(world / "sd"), "--maps", str(maps), *more]


def command(world, maps, *more):
    return of_folder(world, world, maps, *more)


def rows(maps):
    store = MapStore(maps)
    return {id: store[id] for id in sorted(store.ids)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for id in a:
        assert a[id][:3] == b[id][:3] and a[id].sos == b[id].sos and torch.equal(a[id].maps, b[id].maps), id


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    maps = tmp_path_factory.mktemp("unbroken") / "maps"
    assert main(command(world, maps, "--batch_size", "4")) == 0
    return rows(maps)


def test_what_is_stored_and_said(world, tmp_path, capsys):
    assert main(command(world, tmp_path / "maps", "--recipe", "noise", "--resolutions", "8:1,4:0.5")) == 0
    out, err = capsys.readouterr()
    assert "41 pictures of folder, 0 done already; the rest has 267 words, the longest text 15 (p9)\n" in out
    assert "recipe noise: 3 UNet passes a picture, 123 in all, 8 pictures at once in float32" in out
    assert "about 1 MB more; " in out and " MB are free\n" in out and "expected time on 1 x cpu: about 1 min" in out
    assert "39 pictures stored" in out and "2 skipped" in out and "nats" in out
    spent = re.search(r"^time: (.*)$", out, re.MULTILINE)[1]
    phases = {part.strip() for part in re.findall(r"([A-Za-z ]+) \d+%", spent)}
    assert phases == {"UNet", "VAE", "text", "waiting for pictures", "combining", "storing"}
    assert 98 <= sum(int(share) for share in re.findall(r"(\d+)%", spent)) <= 102
    assert re.search(r"skipped=2, words=6\.5", err)
    assert re.search(r"^skipped p7: .*7\.png", out, re.MULTILINE)
    assert re.search(r"^skipped p30: .*30\.png", out, re.MULTILINE)
    listed = (tmp_path / "maps" / "skipped-r000.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["p7", "p30"]
    store = MapStore(tmp_path / "maps")
    assert store.recipe["frame"] == "whole" and store.recipe["resolutions"] == {"8": 1.0, "4": 0.5}
    assert store.recipe["settings"] == {"timesteps": [51, 151, 301], "draws": 1, "seed": 0}
    row = store["p3"]
    assert (row.question, row.answer) == ("Is the cat on the grass?", WORDS[3])
    assert [word.field for word in row.words] == ["question"] * 6 + ["answer"] * 5
    assert row.maps.shape == (11, 32, 32) and (row.maps > 0).all() and 0 < row.sos < 1


def test_going_on_gives_the_same_rows(world, unbroken, tmp_path, capsys):
    maps = tmp_path / "maps"
    # Stops in the middle of a batch, and of a shard.
    for limit in ("9", "10", "41"):
        assert main(command(world, maps, "--batch_size", "4", "--shard_size", "3", "--limit", limit)) == 0
    found = rows(maps)
    assert found.keys() == unbroken.keys()
    # Batches of other sizes round differently, in the last digit of float16.
    for id, row in found.items():
        torch.testing.assert_close(row.maps, unbroken[id].maps, atol=2e-5, rtol=4e-3)
    capsys.readouterr()
    # Nothing left but the broken ones.
    assert main(command(world, maps, "--batch_size", "4")) == 0
    assert "39 done already" in capsys.readouterr().out
    assert_same(rows(maps), found)


def test_sigkill_in_the_middle(world, unbroken, tmp_path):
    maps = tmp_path / "maps"
    arguments = command(world, maps, "--batch_size", "4", "--shard_size", "3")
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "extract.py"), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while len(list(maps.glob("maps-*.parquet"))) < 3 and child.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    stored = len(MapStore(maps))
    assert 9 <= stored < 39 and child.returncode == -signal.SIGKILL
    assert main(arguments) == 0
    assert_same(rows(maps), unbroken)


# One of several processes, as `accelerate launch` would start it, but with no other to wait for.
AS_ONE_OF = """
import runpy, sys, types, accelerate, torch
rank, processes = int(sys.argv[1]), int(sys.argv[2])
state = types.SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
state.is_main_process = state.is_local_main_process = rank == 0
accelerate.PartialState = lambda cpu: state
sys.argv[:3] = ["extract.py"]
runpy.run_path("extract.py", run_name="__main__")
"""


def as_one_of(monkeypatch, rank, processes, arguments):
    """The same in this process."""
    state = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
    state.is_main_process = state.is_local_main_process = rank == 0
    monkeypatch.setattr(extraction, "PartialState", lambda cpu: state)
    return main(arguments)


def test_processes_share_the_work(world, unbroken, tmp_path, monkeypatch):
    """Each process its own batches and shards, in one folder; none waits for another."""
    for rank in (1, 0):
        assert as_one_of(monkeypatch, rank, 2, command(world, tmp_path / "maps", "--batch_size", "4")) == 0
    assert_same(rows(tmp_path / "maps"), unbroken)
    assert {shard.name[:9] for shard in (tmp_path / "maps").glob("maps-*")} == {"maps-r000", "maps-r001"}


def test_a_process_without_work_ends_well(world, tmp_path, monkeypatch):
    """More processes than batches, and a share in which no picture can be read: the others' work is not to be ended by that."""
    (tmp_path / "data.jsonl").write_text('{"image": "0.png", "text": "a dog"}\n{"image": "no.png", "text": "a cat"}\n')
    shutil.copy(world / "0.png", tmp_path)
    arguments = of_folder(tmp_path, world, tmp_path / "maps", "--recipe", "noise", "--batch_size", "1")
    for rank in (2, 1, 0):
        assert as_one_of(monkeypatch, rank, 3, arguments) == 0
    assert len(MapStore(tmp_path / "maps")) == 1


def test_a_dead_processs_share_is_taken_up(world, unbroken, tmp_path, monkeypatch):
    """Of two processes one is killed in the middle and the other finishes; one process, or three, do what is left."""
    arguments = command(world, tmp_path / "maps", "--batch_size", "4", "--shard_size", "3")
    child = subprocess.Popen(
        [sys.executable, "-c", AS_ONE_OF, "1", "2", *arguments],
        **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}},
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
    )
    deadline = time.time() + 120
    while not list((tmp_path / "maps").glob("maps-r001-*")) and child.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert as_one_of(monkeypatch, 0, 2, arguments) == 0
    assert 20 < len(MapStore(tmp_path / "maps")) < 39
    for processes in (1, 3):
        maps = shutil.copytree(tmp_path / "maps", tmp_path / f"by {processes}")
        for rank in reversed(range(processes)):
            arguments[arguments.index("--maps") + 1] = str(maps)
            assert as_one_of(monkeypatch, rank, processes, arguments) == 0
        tables = [pq.read_table(shard, columns=["id"]) for shard in maps.glob("maps-*.parquet")]
        # Nothing twice.
        assert sum(map(len, tables)) == 39
        assert_same(rows(maps), unbroken)


def test_auto_goes_on_with_the_batches_the_store_was_begun_with(world, tmp_path, capsys):
    base, maps = command(world, tmp_path / "maps", "--recipe", "noise", "--batch_size"), tmp_path / "maps"
    assert main([*base, "5", "--limit", "7"]) == 0
    assert MapStore(maps).recipe["made_with"]["batch_size"] == 5
    capsys.readouterr()
    assert main([*base, "auto"]) == 0
    assert "7 done already" in (out := capsys.readouterr().out) and "5 pictures at once" in out
    assert main(command(world, tmp_path / "whole", "--recipe", "noise", "--batch_size", "5")) == 0
    assert_same(rows(maps), rows(tmp_path / "whole"))
    assert main(command(world, tmp_path / "new", "--limit", "1", "--batch_size", "auto")) == 0
    # Where there is no GPU.
    assert "8 pictures at once" in capsys.readouterr().out


def test_the_heaviest_batch_is_one_full_window_a_picture(world, monkeypatch):
    sd, seen, plain = stable_diffusion.load(str(world / "sd")), [], attention_maps.Recorder
    monkeypatch.setattr(attention_maps, "Recorder", lambda *args: seen.append(args[0].shape) or plain(*args))
    extraction.heaviest_batch(sd, find_recipe("noise", timesteps=[9]), 2)
    length = sd.tokenizer.model_max_length
    # Its words, and SOS.
    assert seen == [(2, length, length - 1)]


def test_content_norm_and_number_format_are_written_down(world, tmp_path, capsys):
    base = command(world, tmp_path / "maps", "--recipe", "noise", "--limit", "3", "--dtype", "bf16")
    assert main([*base, "--content_norm"]) == 0
    assert "8 pictures at once in bfloat16" in capsys.readouterr().out
    store = MapStore(tmp_path / "maps")
    assert store.recipe["content_norm"] is True and store.recipe["made_with"]["dtype"] == "bfloat16"
    # A word's share of the words, not of all tokens.
    assert max(float(store[id].maps.max()) for id in store.ids) > 0.2
    assert "content_norm: True there, False now" in refused(capsys, *base)


def test_a_store_of_an_earlier_version_can_be_gone_on_with(world, tmp_path):
    """recipe.json keeps its keys, their order and their values: this text was written before recipes were one value."""
    written = f"""{{
  "data": "folder",
  "sd": "{world / "sd"}",
  "recipe": "noise",
  "settings": {{
    "timesteps": [
      151
    ],
    "draws": 1,
    "seed": 0
  }},
  "resolutions": {{
    "8": 1.0,
    "4": 0.5
  }},
  "content_norm": false,
  "frame": "whole",
  "map_side": 32,
  "made_with": {{"""
    base = command(world, tmp_path / "new", "--recipe", "noise", "--timesteps", "151", "--resolutions", "8:1,4:0.5")
    assert main([*base, "--limit", "1"]) == 0
    new = (tmp_path / "new" / "recipe.json").read_text()
    assert new.startswith(written)
    assert list(json.loads(new)["made_with"]) == [
        "torch",
        "diffusers",
        "transformers",
        "data_root",
        "batch_size",
        "dtype",
    ]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "recipe.json").write_text(written + "}}")
    base[base.index("--maps") + 1] = str(tmp_path / "old")
    assert main([*base, "--limit", "1"]) == 0 and len(MapStore(tmp_path / "old")) == 1


def test_a_disk_too_small_is_said_before_the_first_pass(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extraction.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(command(world, tmp_path / "maps", "--recipe", "noise", "--limit", "3")) == 0
    assert "0 MB are free: too little; the run will stop when they are used up" in capsys.readouterr().out


def refused(capsys, *arguments):
    """Exit code 2 and exactly one line on stderr: that line."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("extract.py: ") and err.count("\n") == 1, err
    return err


@pytest.mark.slow
def test_two_real_processes(world, unbroken, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "extract.py")]
    done = subprocess.run([*launch, *command(world, tmp_path / "maps", "--batch_size", "4")], capture_output=True)
    assert done.returncode == 0 and b"process 0: " in done.stdout and b"process 1: " in done.stdout
    assert_same(rows(tmp_path / "maps"), unbroken)
