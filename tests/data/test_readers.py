"""The readers of Parquet copies and of the authors' OCRVQA list, on folders as their distributors write them, broken entries
included. (Flickr30k's image folder: test_data.py; img2dataset's output: test_laion50k.py.)"""

import gzip
import io
import json
import pickle
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from datasets import Features, List, Value
from jpegs import HUGE, NOT_A_PICTURE, is_broken, jpeg, shows
from PIL import Image

from lavender_min import data


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


# ---- Flickr30k, Parquet ----------------------------------------------------------------------------------------------

FLICKR = {
    "image": datasets.Image(), "caption": List(Value("string")), "sentids": List(Value("string")),
    "split": Value("string"), "img_id": Value("string"), "filename": Value("string"),
}  # fmt: skip


def flickr_copy(folder: Path, splits=("train", "test", "train", "val", "train"), shards=2) -> Path:
    """nlphuji/flickr30k as the hub converts it: two shards; picture 2 is cut short, row 4 has lost its picture."""
    pictures = [jpeg(i) for i in range(5)]
    pictures[2] = pictures[2][:-200]
    rows = [
        {
            "image": {"bytes": picture, "path": f"{i}.jpg"} if i != 4 else None,
            "caption": [f"Two dogs run {i} .", f"Dogs {i} ."] if i != 3 else ["", "The first is empty ."],
            "sentids": [str(2 * i), str(2 * i + 1)], "split": splits and splits[i], "img_id": str(i), "filename": f"{i}.jpg",
        }
        for i, picture in enumerate(pictures)
    ]  # fmt: skip
    features = Features({name: kind for name, kind in FLICKR.items() if splits or name != "split"})
    whole = datasets.Dataset.from_list([{name: row[name] for name in features} for row in rows], features=features)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        whole.shard(shards, shard, contiguous=True).to_parquet(folder / f"{shard:04}.parquet")
    return folder


def test_flickr30k_parquet(tmp_path, capsys):
    root = flickr_copy(tmp_path / "TEST" / "test")
    train = data.load("flickr30k", tmp_path)
    assert [(e.id, e.answer, e.question) for e in train][:2] == [
        ("0.jpg#0", "Two dogs run 0 .", ""),
        ("2.jpg#0", "Two dogs run 2 .", ""),
    ]
    assert shows(train[0], 0) and is_broken(train[1]) and is_broken(train[2])
    every = data.load("flickr30k", root, split="all", captions="all")
    assert [e.id for e in every if e.id[0] in "13"] == ["1.jpg#0", "1.jpg#1", "3.jpg#1"]
    assert shows(every[2], 1) and shows(every[3], 1)
    assert "1 of 10 entries have no text and are left out" in capsys.readouterr().err
    assert [e.id for e in data.load("flickr30k", root, split="test")] == ["1.jpg#0"]
    with pytest.raises(ValueError, match="--split must be all or one of test, train, val; got 'dev'"):
        data.load("flickr30k", root, split="dev")


def test_flickr30k_parquet_without_splits(tmp_path):
    root = flickr_copy(tmp_path / "copy", splits=None)
    assert len(data.load("flickr30k", root, captions="all")) == 9
    with pytest.raises(FileNotFoundError, match="--split test needs .*or a Parquet copy that names the splits"):
        data.load("flickr30k", root, split="test")


def test_hub_copies(tmp_path):
    """The hub's cache with one revision in it, as an earlier download leaves it; the tests have no network."""
    with pytest.raises(
        OSError, match="lmms-lab/flickr30k could not be fetched .*pass a folder as --data_root"
    ) as caught:
        data.load("flickr30k", "lmms-lab/flickr30k")
    assert "\n" not in str(caught.value)
    home = tmp_path / "hub" / "datasets--nlphuji--flickr30k"
    flickr_copy(home / "snapshots" / "0123abcd" / "TEST" / "test")
    reference = home / "refs" / "refs" / "convert" / "parquet"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123abcd")
    assert [e.id for e in data.load("flickr30k", "nlphuji/flickr30k", split="val", captions="all")] == ["3.jpg#1"]


def test_offline_is_one_line_and_exit_code_2(capsys):
    main = runpy.run_path(str(ROOT / "extract.py"))["main"]
    assert main(["--data", "rlaifv83k", "--data_root", "openbmb/RLAIF-V-Dataset"]) == 2
    assert capsys.readouterr().err.startswith("extract.py: openbmb/RLAIF-V-Dataset could not be fetched (LocalEntryNot")


# ---- RLAIF-V ---------------------------------------------------------------------------------------------------------


def rlaif_shard(path: Path, rows: list[dict]) -> None:
    """Columns as in openbmb/RLAIF-V-Dataset, written by pyarrow alone: pictures are plain structs there."""
    full = [
        {
            "ds_name": "RLAIF-V",
            "rejected": "No.",
            "origin_dataset": "COCO",
            "origin_split": "{}",
            "image_path": "a.jpg",
            **row,
        }
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(full), path)


def test_rlaif(tmp_path, capsys):
    root = tmp_path / "with [odd] *signs?"
    root.mkdir()

    def row(i, **other):
        texts = {"question": f"What is in picture {i}?", "chosen": f" Thing {i}.\n", "idx": str(i)}
        return {"image": {"bytes": jpeg(i), "path": f"{i}.jpg"}, **texts, **other}

    rlaif_shard(root / "RLAIF-V-Dataset_000.parquet", [row(0), row(1), row(2, idx="1"), row(3, chosen=None)])
    broken = [row(4), row(5), row(6), row(7)]
    for entry, bytes_ in zip(broken, (jpeg(4)[:300], HUGE, None, NOT_A_PICTURE), strict=True):
        entry["image"]["bytes"] = bytes_
    broken.append(row(8, image=None))
    rlaif_shard(root / "RLAIF-V-Dataset_001.parquet", [*broken, row(9)])
    examples = data.load("rlaifv83k", root)
    assert "1 of 10 entries have no text" in capsys.readouterr().err
    assert [e.id for e in examples] == ["0#0", "1#0", "1#1", "4#0", "5#0", "6#0", "7#0", "8#0", "9#0"]
    assert (examples[2].question, examples[2].answer) == ("What is in picture 2?", "Thing 2.")
    assert shows(examples[0], 0) and shows(examples[2], 2) and shows(examples[-1], 9)
    assert all(is_broken(example) for example in examples[3:8])
    again = data.load("rlaifv83k", root / "RLAIF-V-Dataset_000.parquet")  # one file alone: the same ids
    assert [e.id for e in again] == ["0#0", "1#0", "1#1"]


def test_parquet_pictures_stay_on_disk(tmp_path):
    """A list of examples is small to hand to another process, and threads may open its pictures."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    rows = [
        {"image": {"bytes": out.getvalue(), "path": None}, "question": "?", "chosen": "!", "idx": i} for i in range(40)
    ]
    rows += [
        {"image": {"bytes": jpeg(i), "path": None}, "question": "?", "chosen": "!", "idx": 40 + i} for i in range(40)
    ]
    rlaif_shard(tmp_path / "a.parquet", rows)
    before = pa.total_allocated_bytes()
    examples = data.load("rlaifv83k", tmp_path)
    assert pa.total_allocated_bytes() - before < 1e6 < 40 * len(out.getvalue())
    packed = pickle.dumps(examples)
    assert len(packed) < 1e5
    small = pickle.loads(packed)[40:]
    order = np.random.default_rng(0).permutation(400) % 40
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: shows(small[i], i), order))


def test_broken_parquet_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no RLAIF-V in .*--data_root openbmb/RLAIF-V-Dataset"):
        data.load("rlaifv83k", tmp_path)
    row = {"image": {"bytes": jpeg(0), "path": None}, "question": "What?", "chosen": "This.", "idx": "0"}
    rlaif_shard(tmp_path / "RLAIF-V-Dataset_000.parquet", [row])
    second = tmp_path / "RLAIF-V-Dataset_001.parquet"
    whole = (tmp_path / "RLAIF-V-Dataset_000.parquet").read_bytes()
    second.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="001.parquet is missing or not a whole Parquet file: fetch it again"):
        data.load("rlaifv83k", tmp_path)
    footer = 8 + int.from_bytes(whole[-8:-4], "little")
    second.write_bytes(
        whole[:4].ljust(len(whole) - footer, b"\0") + whole[-footer:]
    )  # a whole footer, nothing before it
    with pytest.raises(ValueError, match="001.parquet cannot be read: fetch it again"):
        data.load("rlaifv83k", tmp_path)
    pq.write_table(pa.table({"image": ["a.jpg"], "question": ["What?"]}), second)
    with pytest.raises(ValueError, match="001.parquet: expected a column 'chosen'; it has image, question"):
        data.load("rlaifv83k", tmp_path)


# ---- OCRVQA ----------------------------------------------------------------------------------------------------------


def cover_turns(i: int) -> list[tuple[str, str]]:
    return [(f"Who wrote book {i}?\nKeep it short.", f"Author {i}."), (f"Is book {i} a cookbook?", "No.")]


def authors_json(root: Path, zipped: bool, covers=4) -> None:
    rows = [
        {"id": str(i), "image": f"/LOCAL_OCRVQA_IMG_PATH/imgs/image_{i}.jpg", "conversations": [
            {"role": role, "content": text}
            for n, turn in enumerate(cover_turns(i))
            for role, text in zip(("user", "assistant"), (("" if n else "<image>\n") + turn[0], turn[1]), strict=True)
        ]}
        for i in range(covers)
    ]  # fmt: skip
    rows[2]["conversations"][3]["content"] = " "
    text = json.dumps(rows, indent=4).encode()
    root.mkdir(exist_ok=True)
    (root / f"ocrvqa30k.json{'.gz' * zipped}").write_bytes(gzip.compress(text) if zipped else text)


def cauldron_shard(path: Path, first: int, count: int) -> None:
    """HuggingFaceM4/the_cauldron, ocrvqa: a list of one picture, a list of turns; picture 1 is missing."""
    turn = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
    rows = [
        {
            "images": [{"bytes": jpeg(i), "path": None}] if i != 1 else [],
            "texts": [{"user": q, "assistant": a, "source": "OCR-VQA"} for q, a in cover_turns(i)],
        }
        for i in range(first, first + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({"images": List(datasets.Image()), "texts": [turn]})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder", ["imgs", "."])
def test_ocrvqa_as_the_authors_release_it(tmp_path, zipped, folder, capsys):
    authors_json(tmp_path, zipped)
    (tmp_path / folder).mkdir(exist_ok=True)
    for i in (0, 2, 3):
        (tmp_path / folder / f"image_{i}.jpg").write_bytes(jpeg(i))
    examples = data.load("ocrvqa30k", tmp_path)
    assert "1 of 8 entries have no text" in capsys.readouterr().err
    assert [e.id for e in examples] == ["0#0", "0#1", "1#0", "1#1", "2#0", "3#0", "3#1"]
    assert [(e.question, e.answer) for e in examples[:2]] == cover_turns(0)
    assert [e.picture for e in examples] == ["0", "0", "1", "1", "2", "3", "3"]
    assert shows(examples[0], 0) and shows(examples[1], 0) and is_broken(examples[2]) and shows(examples[-1], 3)
    assert [e.id for e in data.load("ocrvqa30k", tmp_path, captions="first")] == ["0#0", "1#0", "2#0", "3#0"]


def test_ocrvqa_of_the_cauldron(tmp_path, monkeypatch):
    cauldron_shard(tmp_path / "ocrvqa" / "train-00000-of-00003-f83c.parquet", 0, 3)
    cauldron_shard(tmp_path / "ocrvqa" / "train-00001-of-00003-fef4.parquet", 3, 3)
    (tmp_path / "ocrvqa" / "train-00002-of-00003-c073.parquet").write_bytes(b"never needed")
    monkeypatch.setattr("lavender_min.data.ocrvqa30k.COVERS", 5)
    examples = data.load("ocrvqa30k", tmp_path)
    assert [e.id for e in examples] == [f"{i}#{n}" for i in range(5) for n in range(2)]
    assert [(e.question, e.answer) for e in examples[6:8]] == cover_turns(3)
    assert shows(examples[1], 0) and is_broken(examples[2]) and shows(examples[-1], 4)


def test_ocrvqa_that_is_not_there_or_not_right(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no OCRVQA30k in .*ocrvqa30k.json.gz and ocrvqa30k.json.*the_cauldron"
    ):
        data.load("ocrvqa30k", tmp_path)
    authors_json(tmp_path, True)
    with pytest.raises(FileNotFoundError, match="but not the pictures: looked for image_0.jpg and others in .*imgs"):
        data.load("ocrvqa30k", tmp_path)
    path = tmp_path / "ocrvqa30k.json.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="ocrvqa30k.json.gz is not the authors' list of conversations"):
        data.load("ocrvqa30k", tmp_path)
    with pytest.raises(ValueError, match="--captions must be first or all"):
        data.load("ocrvqa30k", tmp_path, captions="some")
    with pytest.raises(ValueError, match="--data ocrvqa30k takes no --split"):
        data.load("ocrvqa30k", tmp_path, split="test")
