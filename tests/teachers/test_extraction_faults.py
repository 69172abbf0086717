"""`extract.py` with a teacher, texts or pictures that are not as they should be: one line that says so, or skipped and listed."""

import json
import os
import re
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_extraction import command, make_world, of_folder, refused, rows
from tiny_sd import LENGTH

from lavender_min import data
from lavender_min.maps import MapStore
from lavender_min.teachers import attention_maps, stable_diffusion
from lavender_min.teachers.command import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def sd(world, tmp_path):
    """The tiny Stable Diffusion, to be broken."""
    return shutil.copytree(world / "sd", tmp_path / "sd")


def with_sd(world, sd, maps, *more):
    arguments = command(world, maps, "--recipe", "noise", "--limit", "6", *more)
    arguments[arguments.index(str(world / "sd"))] = str(sd)
    return arguments


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


# ---- numbers that are no numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", ["1", "4", "8"])
def test_a_teacher_of_nans_stores_nothing_and_stops(world, sd, tmp_path, capsys, batch_size):
    file = sd / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if "final_layer_norm" in name)][3] = torch.nan
    save_file(weights, file, {"format": "pt"})
    assert main(with_sd(world, sd, tmp_path / "maps", "--batch_size", batch_size)) == 2
    tried = {"1": 4, "4": 4, "8": 6}[batch_size]
    assert last_line(capsys) == (
        f"extract.py: the maps of {tried} of {tried} pictures are not finite: Stable Diffusion's numbers overflow in float32 "
        "(try --dtype fp32 or bf16), or its weights are damaged"
    )
    assert len(MapStore(tmp_path / "maps")) == 0


@pytest.mark.parametrize("bad, code", [(["p3"], 0), (["p1", "p2", "p3", "p4"], 2)])
def test_a_picture_whose_maps_overflow_is_skipped_and_listed(world, tmp_path, monkeypatch, bad, code):
    plain = attention_maps.combine
    ids = []

    def record(sd, pixels, texts, own, *rest):
        ids[:] = own
        return plain_record(sd, pixels, texts, own, *rest)

    def combine(*args):
        return [
            of._replace(maps=of.maps * torch.inf) if id in bad else of for id, of in zip(ids, plain(*args), strict=True)
        ]

    plain_record = attention_maps.record
    monkeypatch.setattr(attention_maps, "record", record)
    monkeypatch.setattr(attention_maps, "combine", combine)
    arguments = command(world, tmp_path / "maps", "--recipe", "noise", "--limit", "6", "--batch_size", "2")
    assert main(arguments) == code
    assert set(rows(tmp_path / "maps")) == {f"p{i}" for i in range(6)} - set(bad)
    if code == 0:
        assert (tmp_path / "maps" / "skipped-r000.txt").read_text() == "p3\tits maps are not finite\n"


# ---- pipeline folders ------------------------------------------------------------------------------------------------


def set_config(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def other_shapes(file):
    weights = load_file(file)
    save_file({name: torch.cat([value, value]) for name, value in weights.items()}, file, {"format": "pt"})


def some_missing(file):
    weights = load_file(file)
    del weights[sorted(weights)[0]]
    save_file(weights, file, {"format": "pt"})


TEXTS, UNET, VAE = (
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
HARMS = {
    **{f"cut {part[:4]}": (part, cut) for part in (TEXTS, UNET, VAE)},
    **{f"shapes {part[:4]}": (part, other_shapes) for part in (TEXTS, UNET, VAE)},
    **{f"missing {part[:4]}": (part, some_missing) for part in (TEXTS, UNET, VAE)},
    "tokens": ("tokenizer/tokenizer.json", cut),
    "window": ("tokenizer/tokenizer_config.json", lambda file: set_config(file, model_max_length=[20])),
    "not JSON": ("unet/config.json", cut),
    "a list": ("vae/config.json", lambda file: file.write_text("[]")),
    "nested": ("unet/config.json", lambda file: file.write_text("[" * 100_000)),
    "heads": ("unet/config.json", lambda file: set_config(file, attention_head_dim="2")),
    "side": ("unet/config.json", lambda file: set_config(file, sample_size="8")),
    "blocks": ("unet/config.json", lambda file: set_config(file, down_block_types=5)),
    "scaling": ("vae/config.json", lambda file: set_config(file, scaling_factor=None)),
    "layers": ("text_encoder/config.json", lambda file: set_config(file, num_hidden_layers="many")),
    "width": ("text_encoder/config.json", lambda file: set_config(file, hidden_size=None)),
    "betas": ("scheduler/scheduler_config.json", lambda file: set_config(file, beta_start="x")),
    "steps": ("scheduler/scheduler_config.json", lambda file: set_config(file, num_train_timesteps=[])),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_pipeline_folder_is_named_in_one_line(world, sd, tmp_path, capsys, harm):
    file, do = HARMS[harm]
    do(sd / file)
    line = refused(capsys, *with_sd(world, sd, tmp_path / "maps"))
    assert str(sd) in line and "Traceback" not in line and len(line) < 900
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize("harm", ["betas", "steps"])
def test_a_broken_schedule_is_found_with_the_folder_and_not_in_the_first_pass(sd, harm):
    file, do = HARMS[harm]
    do(sd / file)
    with pytest.raises(OSError, match=re.escape(str(sd))):
        stable_diffusion.load(str(sd))


@pytest.mark.parametrize("prediction", ["nope", "sample", None, 5])
def test_a_scheduler_that_predicts_something_else_is_refused(world, sd, tmp_path, capsys, prediction):
    set_config(sd / "scheduler" / "scheduler_config.json", prediction_type=prediction)
    line = refused(capsys, *with_sd(world, sd, tmp_path / "maps"))
    assert f"the scheduler's prediction_type must be epsilon or v_prediction; got {prediction!r}" in line


def test_no_code_of_a_model_folder_is_run(world, sd, tmp_path, monkeypatch):
    """Every part is loaded with trust_remote_code=False, whatever its configuration says."""
    asked = []

    def noted(plain, *args, **more):
        asked.append(more["trust_remote_code"])
        return plain(*args, **more)

    for kind in ("CLIPTextModel", "CLIPTokenizer", "AutoencoderKL", "UNet2DConditionModel"):
        kind = getattr(stable_diffusion, kind)
        monkeypatch.setattr(kind, "from_pretrained", partial(noted, kind.from_pretrained))
    for part in ("text_encoder", "tokenizer"):
        (sd / part / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        name = "config.json" if part == "text_encoder" else "tokenizer_config.json"
        set_config(sd / part / name, auto_map={"AutoModel": "evil.A", "AutoTokenizer": ["evil.A", None]})
    stable_diffusion.load(str(sd))
    assert asked == [False] * 4 and not (tmp_path / "ran").exists()


def test_ctrl_c_while_the_model_loads(world, tmp_path, capsys, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stable_diffusion.AutoencoderKL, "from_pretrained", pressed)
    assert main(command(world, tmp_path / "maps")) == 130
    assert capsys.readouterr().err == "extract.py: stopped; the same command goes on\n"


def test_a_folder_of_maps_may_have_a_colon(world, tmp_path, monkeypatch):
    """Arrow takes such a name for a URI."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(of_folder(world, world, "flickr:v2", "--recipe", "noise", "--limit", "3")) == 0
    assert len(MapStore("flickr:v2")) == 3 and MapStore("flickr:v2")["p1"].answer
    from lavender_min.maps.__main__ import main as maps

    assert maps(["check", "flickr:v2"]) == 0


# ---- texts and pictures ----------------------------------------------------------------------------------------------


def folder_of(folder, *texts):
    lines = []
    for i, text in enumerate(texts):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
        lines.append(json.dumps({"id": f"p{i}", "image": f"{i}.png", "text": text}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def test_a_long_text_is_announced_and_shows_how_far_it_is(world, tmp_path, capsys):
    folder = folder_of(tmp_path, "A red dog", "the cat " * 100)
    assert main(of_folder(folder, world, tmp_path / "maps", "--recipe", "noise")) == 0
    out, err = capsys.readouterr()
    assert "2 pictures of folder, 0 done already; the rest has 203 words, the longest text 200 (p1)\n" in out
    windows = -(-200 // (LENGTH - 2)) + 1
    shown = [int(done) for done in re.findall(rf"(\d+) of {windows} windows of these texts", err)]
    assert sorted(set(shown)) == [*range(2, windows, 2), windows]
    assert len(MapStore(tmp_path / "maps")["p1"].words) == 200


def test_longer_texts_can_be_left_out(world, tmp_path, capsys):
    folder = folder_of(tmp_path, "A red dog", "the cat " * 10_000, "a cat runs on grass")
    began = time.time()
    arguments = of_folder(folder, world, tmp_path / "maps", "--recipe", "noise", "--max_words", "5")
    for done in (0, 2):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert f"2 pictures of folder, {done} done already" in out and "1 skipped" in out
    assert "skipped p1: its text has 20,000 words, --max_words is 5" in out and time.time() - began < 30
    assert MapStore(tmp_path / "maps").ids == ["p0", "p2"]
    assert main([*arguments[:-1], "2", "--maps", str(tmp_path / "none")]) == 2


def test_whatever_a_bad_picture_raises_it_is_skipped_and_listed(world, tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path, *["A red dog"] * 4)
    (folder / "0.png").write_bytes(b"<html>gone</html>")
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes()[:500])
    (folder / "3.png").unlink()
    os.mkfifo(folder / "3.png")
    assert main(of_folder(folder, world, tmp_path / "maps", "--recipe", "noise")) == 0
    listed = (tmp_path / "maps" / "skipped-r000.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["p0", "p1", "p3"] and MapStore(tmp_path / "maps").ids == ["p2"]


def test_one_name_says_that_a_picture_is_broken(world, tmp_path, monkeypatch):
    """What `data.BROKEN_PICTURE` names is skipped, whatever it is."""

    class Odd(RuntimeError):
        pass

    def odd(path):
        if path.name == "0.png":
            raise Odd("what a decoder says")
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(data, "BROKEN_PICTURE", Odd)
    monkeypatch.setattr("lavender_min.data.folder.open_image", odd)
    folder = folder_of(tmp_path, "A red dog", "A cat")
    assert main(of_folder(folder, world, tmp_path / "maps", "--recipe", "noise")) == 0
    assert (tmp_path / "maps" / "skipped-r000.txt").read_text() == "p0\twhat a decoder says\n"


# ---- a store that was harmed -----------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_a_shard_in_which_a_byte_has_changed(world, sd, tmp_path, capsys):
    argv = with_sd(world, sd, tmp_path / "maps")
    assert main(argv) == 0
    (shard,) = (tmp_path / "maps").glob("*.parquet")
    whole = shard.read_bytes()
    place = len(whole) // 2
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    capsys.readouterr()
    assert main(argv) == 2
    assert last_line(capsys).startswith(f"extract.py: broken map shard {shard}")
    shard.write_bytes(whole)
    assert main(argv) == 0
