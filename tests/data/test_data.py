"""Readers, on folders laid out as the data really comes."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from lavender_min import data
from lavender_min.data import BROKEN_PICTURE, Example

CAPTIONS = ["Two dogs run .", "A dog chases another ."]


def picture(path, size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 0, 0)).save(path, **options)


@pytest.fixture(params=["flickr30k-images", "flickr30k_images", "images", "."])
def root(tmp_path, request):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        picture(tmp_path / request.param / name)
    return tmp_path


def token_file(root, extra=""):
    lines = [f"{n}.jpg#{i}\t{caption} {n}\n" for n in (1, 2, 3) for i, caption in enumerate(CAPTIONS)]
    (root / "results_20130124.token").write_text("".join(lines) + extra, encoding="utf-8")


def karpathy_file(root):
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f" {c} {n}"} for c in CAPTIONS], "imgid": n}
        for n, split in ((1, "train"), (2, "test"), (3, "train"))
    ]
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))


def test_token_file(root):
    token_file(root)
    first = data.load("flickr30k", root)
    assert [e.id for e in first] == ["1.jpg#0", "2.jpg#0", "3.jpg#0"]
    assert first[1].question == "" and first[1].answer == "Two dogs run . 2"
    assert first[1].fields == {"question": "", "answer": "Two dogs run . 2"}
    assert first[1].image().size == (6, 4) and first[1].image().mode == "RGB"
    every = data.load("flickr30k", root, captions="all")
    assert [e.id for e in every][:3] == ["1.jpg#0", "1.jpg#1", "2.jpg#0"] and len(every) == 6
    assert [e.picture for e in every][:3] == ["1.jpg", "1.jpg", "2.jpg"]


def test_karpathy_file_and_its_splits(root):
    karpathy_file(root)
    assert [e.id for e in data.load("flickr30k", root)] == ["1.jpg#0", "3.jpg#0"]
    assert data.load("flickr30k", root)[0].answer == "Two dogs run . 1"
    assert [e.id for e in data.load("flickr30k", root, split="test", captions="all")] == ["2.jpg#0", "2.jpg#1"]
    assert len(data.load("flickr30k", root, split="all")) == 3
    with pytest.raises(ValueError, match="--split must be all or one of test, train; got 'dev'"):
        data.load("flickr30k", root, split="dev")


def test_flickr30k_that_is_not_there_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_flickr30k.json and results_20130124.token.*--data toy"):
        data.load("flickr30k", tmp_path)
    token_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not the pictures: looked for 1.jpg and others in .*flickr30k-images"):
        data.load("flickr30k", tmp_path)
    picture(tmp_path / "images" / "2.jpg")
    with pytest.raises(FileNotFoundError, match=r"--split test needs .*dataset_flickr30k.json"):
        data.load("flickr30k", tmp_path, split="test")
    assert len(data.load("flickr30k", tmp_path, split="all")) == 3  # the missing pictures are found out when opened


def test_bad_caption_files_are_named_with_the_line(root):
    token_file(root, "no tab here\n")
    with pytest.raises(ValueError, match=r"results_20130124.token, line 7: expected <file>#<number><tab><caption>"):
        data.load("flickr30k", root)
    (root / "dataset_flickr30k.json").write_text('{"pictures": []}')
    with pytest.raises(ValueError, match="is not Karpathy's caption file"):
        data.load("flickr30k", root)


def test_captions_beside_pictures(tmp_path):
    for name in ("b.jpg", "sub/a.PNG", "alone.jpg"):
        picture(tmp_path / name)
    (tmp_path / "b.txt").write_text("A red dog.\n", encoding="utf-8")
    (tmp_path / "sub/a.txt").write_text("Über all.", encoding="utf-8")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("What is this")
    found = data.load("folder", tmp_path)
    assert [(e.id, e.question, e.answer) for e in found] == [
        ("b.jpg", "", "A red dog."), ("broken.jpg", "", "What is this"), ("sub/a.PNG", "", "Über all."),
    ]  # fmt: skip
    assert found[2].image().size == (6, 4)
    with pytest.raises(BROKEN_PICTURE):
        found[1].image()


def test_own_folder(tmp_path):
    picture(tmp_path / "pics" / "a.png")
    lines = [
        {"image": "pics/a.png", "text": "A red square."},
        {"image": "pics/a.png", "question": "Which colour?", "answer": "red"},
        {"id": "mine", "image": "pics/b.png", "text": "Not there."},
    ]
    (tmp_path / "data.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    for root in (tmp_path, tmp_path / "data.jsonl"):
        examples = data.load("folder", root)
        assert [e.id for e in examples] == ["pics/a.png#1", "pics/a.png#3", "mine"]
        assert (examples[1].question, examples[1].answer) == ("Which colour?", "red")
        assert [e.picture for e in examples] == ["pics/a.png", "pics/a.png", "pics/b.png"]
        assert examples[0].image().size == (6, 4)
        with pytest.raises(BROKEN_PICTURE):
            examples[2].image()


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "data.jsonl, line 2: Expecting property name"),
        ("[" * 100_000, "data.jsonl, line 2: RecursionError"),
        ("9" * 5_000, "data.jsonl, line 2: Exceeds the limit"),
        ('{"image": "a.png", "text": "a", "id": "x"}', "the id 'x' stands for more than one example"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "text": "a", "id": "x"}\n' + line)
    with pytest.raises(ValueError, match=message):
        data.load("folder", tmp_path)


def test_wrong_names_and_options(tmp_path):
    with pytest.raises(
        ValueError,
        match="--data must be one of flickr30k, laion50k, rlaifv83k, ocrvqa30k, refcoco, coco, folder, masks, toy; got 'imagenet'",
    ):
        data.load("imagenet")
    with pytest.raises(ValueError, match="--data folder takes no --split"):
        data.load("folder", tmp_path, split="train")
    with pytest.raises(ValueError, match="--data toy takes no --data_root"):
        data.load("toy", tmp_path)
    with pytest.raises(ValueError, match="--captions must be first or all"):
        data.load("flickr30k", tmp_path, captions="some")
    with pytest.raises(FileNotFoundError, match="looked for .*data.jsonl"):
        data.load("folder", tmp_path)


def test_toy_examples():
    examples = data.load("toy")
    assert isinstance(examples[0], Example) and len(examples) > 100
    assert examples[0].image().mode == "RGB" and examples[0].answer


def test_an_example_needs_no_more_than_training_does():
    example = Example("a", lambda: Image.new("RGB", (1, 1)), "", "A dog.")
    assert (example.picture, example.kind, example.regions) == ("", "", None)


def test_data_that_can_be_measured_says_where_things_are():
    measured = {name for name, source in data.SOURCES.items() if source.measured_split is not None}
    assert measured == {"flickr30k", "refcoco", "coco", "masks", "toy"}
    assert data.measured_split("toy") == "heldout" and data.measured_split("masks") == ""
    assert all(example.regions is not None for example in data.load("toy", split="heldout"))
    with pytest.raises(
        ValueError, match="--data folder has no regions: .* data that does: flickr30k, refcoco, coco, ma"
    ):
        data.measured_split("folder")


def test_registry_imports_nothing_slow():
    code = "import sys, lavender_min.data; print(*{'torch', 'pyarrow', 'datasets', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_pictures_come_upright_and_whole(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture(tmp_path / "turned.jpg", exif=exif)
    assert data.open_image(tmp_path / "turned.jpg").size == (4, 6)
    Image.new("LA", (3, 2)).save(tmp_path / "grey.png")
    assert data.open_image(tmp_path / "grey.png").mode == "RGB"


@pytest.mark.parametrize("harm", ["cut", "empty", "text", "missing", "huge"])
def test_broken_pictures_raise_what_readers_expect(tmp_path, harm, monkeypatch):
    path = tmp_path / "p.png"
    picture(path, (64, 64))
    if harm == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    elif harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": path.read_bytes()[:-40], "empty": b"", "text": b"<html>not found"}[harm])
    with pytest.raises(BROKEN_PICTURE):
        data.open_image(path)


def test_camera_notes_that_make_no_sense_are_a_broken_picture(tmp_path):
    """The resolution, a fraction, is marked as a text: Pillow's own TypeError when it turns the picture upright."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    path = tmp_path / "p.jpg"
    picture(path, exif=exif)
    path.write_bytes(path.read_bytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02"))
    with pytest.raises(BROKEN_PICTURE):
        data.open_image(path)
