"""What `extract.py` says in one line where it cannot begin, or has to stop."""
# ruff: noqa: F811 (fixtures that another file has too)

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_extraction import ROOT, command, refused, rows, world  # noqa: F401

from lavender_min.maps import MapStore
from lavender_min.teachers import attention_maps, stable_diffusion
from lavender_min.teachers.command import main


def test_missing_data_and_models_say_what_to_get(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    line = refused(capsys, "--data", "flickr30k", "--data_root", str(tmp_path))
    assert "dataset_flickr30k.json and results_20130124.token" in line and "--data toy" in line
    line = refused(capsys, "--data", "folder", "--data_root", str(tmp_path))
    assert "looked for" in line and "data.jsonl" in line
    line = refused(capsys, "--data", "folder", "--data_root", str(world), "--maps", str(tmp_path / "maps"))
    assert "cannot load Stable Diffusion CompVis/stable-diffusion-v1-4" in line
    assert "run this once where there is network" in line and "python extract.py --data toy" in line
    line = refused(capsys, "--data", "folder", "--data_root", str(world), "--sd", str(tmp_path / "sd"))
    assert "sd: the pipeline folder is not there; it must hold tokenizer" in line


def test_flickr30k_by_its_defaults_ends_in_one_line(tmp_path):
    """The real names, as a newcomer would first type them, without data."""
    script = [sys.executable, str(ROOT / "extract.py"), "--data", "flickr30k"]
    done = subprocess.run(
        script, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("extract.py: no Flickr30k in data/flickr30k: looked for")
    # Nothing made, nothing left.
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --data"),
        (["--data", "imagenet"], "invalid choice: 'imagenet'"),
        (["--data", "toy", "--data_root", "x"], "--data toy takes no --data_root"),
        (["--data", "toy", "--batch_size", "0"], "--batch_size must be a whole number of at least 1, or auto; got '0'"),
        (["--data", "toy", "--batch_size", "many"], "--batch_size must be a whole number of at least 1, or auto"),
        (["--data", "toy", "--shard_size", "0"], "--shard_size must be a whole number of at least 1; got 0"),
        (["--data", "toy", "--limit", "0"], "--limit must be a whole number of at least 1; got 0"),
        (["--data", "toy", "--limit", "-1"], "--limit must be a whole number of at least 1; got -1"),
        (["--data", "toy", "--max_words", "0"], "--max_words must be a whole number of at least 1; got 0"),
        (["--data", "toy", "--limit", "few"], "argument --limit: invalid int value: 'few'"),
        (
            ["--data", "toy", "--resolutions", "16"],
            "--resolutions must be side:weight pairs, such as 16:1,8:0.5; got '16'",
        ),
        (["--data", "toy", "--resolutions", "16:0"], "--resolutions must be side:weight pairs"),
        (["--data", "toy", "--resolutions", "16:1,8:nan"], "--resolutions must be side:weight pairs"),
        (["--data", "toy", "--recipe", "noise", "--timesteps", "1200"], "--timesteps must be time steps from 0 to 999"),
        (["--data", "toy", "--recipe", "noise", "--timesteps", "9,x"], "--timesteps must be time steps from 0 to 999"),
        (["--data", "toy", "--recipe", "paint"], "argument --recipe: invalid choice: 'paint' (choose from"),
        (["--data", "toy", "--timesteps", "100"], "--recipe paper takes no --timesteps"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_wrong_stores_are_one_line(world, tmp_path, capsys):
    maps = tmp_path / "maps"
    base = command(world, maps, "--recipe", "noise", "--limit", "3")
    assert main(base) == 0
    capsys.readouterr()
    assert "recipe.json was made with another recipe (frame: 'whole' there, 'crop' now" in refused(
        capsys, *base, "--frame", "crop"
    )
    assert "this UNet attends to text at [8, 4]; got [16]" in refused(capsys, *base, "--resolutions", "16:1")
    shard = next(maps.glob("maps-*.parquet"))
    shutil.copy(shard, maps / "maps-r000-00007.parquet")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert f"broken map shard {shard}" in refused(capsys, *base)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        (torch.OutOfMemoryError(), 2, "out of GPU memory at --batch_size 4: try a smaller one"),
        (OSError("cannot write x: No space left on device"), 2, "cannot write x: No space left on device"),
    ],
)
def test_stopping_in_the_middle_keeps_what_is_done(world, tmp_path, capsys, monkeypatch, error, code, message):
    plain, calls = attention_maps.record, []

    def fails_later(*args):
        calls.append(1)
        if len(calls) > 2:
            raise error
        return plain(*args)

    monkeypatch.setattr(attention_maps, "record", fails_later)
    arguments = command(world, tmp_path / "maps", "--recipe", "noise", "--batch_size", "4", "--shard_size", "4")
    assert main(arguments) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"extract.py: {message}"
    assert len(MapStore(tmp_path / "maps")) >= 4


def test_a_batch_too_large_for_the_first_pass_that_is_timed(world, tmp_path, capsys, monkeypatch):
    def full(sd, pictures):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(stable_diffusion, "seconds_a_pass", full)
    assert main(command(world, tmp_path / "maps", "--batch_size", "4")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "extract.py: out of GPU memory at --batch_size 4: try a smaller one"


def test_no_picture_at_all_is_an_error(world, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"image": "gone.png", "text": "A red dog"}')
    arguments = ["--data", "folder", "--data_root", str(tmp_path), "--sd", str(world / "sd")]
    assert main([*arguments, "--maps", str(tmp_path / "maps")]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"^skipped gone\.png#1: .*gone\.png", out, re.MULTILINE)
    assert (
        err.splitlines()[-1]
        == f"extract.py: nothing is stored in {tmp_path / 'maps'}: all pictures were skipped, see the list above"
    )
