"""Layouts in which people have their data: Kaggle, LLaVA, Hugging Face, the published splits, unfinished shards."""
# ruff: noqa: F811 (fixtures that another file has too)

import gzip
import json

import pytest
from jpegs import is_broken, jpeg, shows
from test_laion50k import img2dataset_shard
from test_odd_values import GOOD, folder, jsonl, own_caches, write  # noqa: F401

from lavender_min import data


@pytest.mark.parametrize("at", ["flickr30k_images", "."])
@pytest.mark.parametrize("pictures", ["flickr30k_images", "."])
def test_flickr30k_as_kaggle_has_it(tmp_path, at, pictures):
    """Its one broken line is repaired. --data_root may be the folder itself or the one it lies in."""
    root = tmp_path / "flickr30k_images"
    (root / pictures).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("1000092795.jpg", "2199200615.jpg")):
        (root / pictures / name).write_bytes(jpeg(i))
    write(root / "results.csv", "image_name| comment_number| comment\n"
        "1000092795.jpg| 0| Two young guys | with shaggy hair .\n1000092795.jpg| 1| Two young , White males .\n"
        "2199200615.jpg| 0| A dog .\n2199200615.jpg| 4   A dog runs across the grass .\n")  # fmt: skip
    found = data.load("flickr30k", tmp_path if at == "flickr30k_images" else root, captions="all")
    assert [(e.id, e.answer) for e in found] == [
        ("1000092795.jpg#0", "Two young guys | with shaggy hair ."), ("1000092795.jpg#1", "Two young , White males ."),
        ("2199200615.jpg#0", "A dog ."), ("2199200615.jpg#4", "A dog runs across the grass ."),
    ]  # fmt: skip
    assert shows(found[0], 0) and shows(found[3], 1)
    write(root / "results.csv", "image_name| comment_number| comment\nwhat is this\n")
    with pytest.raises(ValueError, match=r"results.csv, line 2: expected <file>\| <number>\| <caption>, got 'what is"):
        data.load("flickr30k", root)


LLAVA = [
    {"id": "a", "image": "0.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Red."}]},
    {"id": "text only", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
    {"id": "a", "image": "1.jpg", "conversations": [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A dog."}]},
    {"id": 3, "image": "2.jpg", "conversations": [
        {"from": "human", "value": "Unanswered?"}]},
]  # fmt: skip


@pytest.mark.parametrize("as_file", [False, True])
def test_llava_and_sharegpt_lists(folder, as_file, capsys):
    write(folder / "llava_instruct.json", LLAVA)
    root = folder / "llava_instruct.json" if as_file else folder
    found = data.load("folder", root)
    assert [(e.id, e.question, e.answer) for e in found] == [
        ("a#0", "What is it?", "A bus."), ("a#1", "Which colour?", "Red."), ("a#2", "What is it?", "A dog."),
    ]  # fmt: skip
    assert shows(found[1], 0) and shows(found[2], 1) and found[0].picture == found[1].picture == "0.jpg"
    said = capsys.readouterr().err
    assert "2 of 4 rows are not as expected" in said and "llava_instruct.json, row 1, image: field required" in said
    assert [e.answer for e in data.load("folder", root, captions="first")] == ["A bus.", "A dog."]
    write(folder / "other.json", [])
    if not as_file:
        with pytest.raises(ValueError, match="holds 2 JSON files .*pass the right one as --data_root"):
            data.load("folder", root)


def test_hugging_faces_image_folder(folder, capsys):
    jsonl(
        folder,
        {"file_name": "0.jpg", "text": "A red bus."},
        {"file_name": None, "text": "Text only."},
        {"file_name": "1.jpg", "question": "What?", "answer": "A dog.", "text": None},
        name="metadata.jsonl",
    )
    found = data.load("folder", folder)
    assert [(e.id, e.question, e.answer) for e in found] == [
        ("0.jpg#1", "", "A red bus."),
        ("1.jpg#3", "What?", "A dog."),
    ]
    assert shows(found[1], 1) and "1 of 3 rows" in capsys.readouterr().err
    (folder / "metadata.jsonl").unlink()
    write(
        folder / "metadata.csv",
        'file_name,text,more\n0.jpg,"A bus, red.\nIt waits.",x\n,Text only.,\n2.jpg,A cat.,,y\n',
    )
    found = data.load("folder", folder)
    assert [(e.answer, e.where.rpartition("/")[2]) for e in found] == [
        ("A bus, red.\nIt waits.", "metadata.csv, line 3"), ("A cat.", "metadata.csv, line 5")]  # fmt: skip
    assert shows(found[1], 2) and "metadata.csv, line 4: 'image' is missing" in capsys.readouterr().err


def test_special_tokens_in_texts_are_said_with_file_and_line(folder, capsys):
    jsonl(folder, GOOD, {"image": "1.jpg", "text": "a <|image|> b"}, {"image": "2.jpg", "text": "End<|eot_id|>"},
        {"image": "3.jpg", "question": "<image>?", "answer": "a < b"}, {"image": "1.jpg", "text": "<IMG_CONTEXT>"})  # fmt: skip
    assert [e.answer for e in data.load("folder", folder)][1:] == [
        "a <|image|> b",
        "End<|eot_id|>",
        "a < b",
        "<IMG_CONTEXT>",
    ]
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "4 entries hold what a model takes for a special token, the first <|image|> in " in said
    )
    assert "data.jsonl, line 2" in said


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name, ids", [("flickr30k", ["0.jpg#0", "1.jpg#0", "1.jpg#1"]), ("laion50k", ["a#0", "b#0", "b#1"])]
)
def test_the_authors_published_splits(folder, name, ids, zipped):
    """The layout of their OCRVQA list, the question for a caption included."""
    rows = [
        {"id": id, "image": f"/PATH/images/{i}.jpg", "conversations": [
            turn
            for n in range(i + 1)
            for turn in ({"role": "user", "content": f"<image>\n{data.CAPTION_PROMPT}"},
                         {"role": "assistant", "content": f"Caption {i} {n}"})
        ]}
        for i, id in enumerate("ab")
    ]  # fmt: skip
    text = json.dumps(rows).encode()
    (folder / f"{name}.json{'.gz' * zipped}").write_bytes(gzip.compress(text) if zipped else text)
    found = data.load(name, folder, **({"captions": "all"} if name == "flickr30k" else {}))
    assert [e.id for e in found] == ids
    assert {e.question for e in found} == {""} and [e.answer for e in found] == [
        "Caption 0 0",
        "Caption 1 0",
        "Caption 1 1",
    ]
    assert shows(found[0], 0) and shows(found[2], 1)


def test_the_authors_flickr_split_in_karpathys_layout(folder):
    rows = [{"filename": f"{i}.jpg", "split": "train", "sentences": [{"raw": f"Caption {i}"}]} for i in range(2)]
    (folder / "flickr30k.json.gz").write_bytes(gzip.compress(json.dumps({"images": rows}).encode()))
    assert [(e.id, e.answer) for e in data.load("flickr30k", folder)] == [
        ("0.jpg#0", "Caption 0"),
        ("1.jpg#0", "Caption 1"),
    ]


@pytest.mark.parametrize("lost", ["00001.parquet", "00001.tar", "cut"])
def test_an_unfinished_shard_stops_no_other(tmp_path, lost, capsys):
    for shard in range(3):
        img2dataset_shard(tmp_path, shard, "webdataset", [("success", f"Picture {shard}", jpeg(shard))])
    texts = tmp_path / "00001.parquet"
    if lost == "cut":
        texts.write_bytes(texts.read_bytes()[:-20])
    else:
        (tmp_path / lost).unlink()
    found = data.load("laion50k", tmp_path)
    assert [e.answer for e in found] == ["Picture 0", "Picture 2"] and shows(found[1], 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("1 of 3 shards are not as expected and are left out; the first: ")
    assert ("00001.parquet" if lost == "cut" else lost) in said


def test_alt_texts_are_decoded_once(tmp_path):
    texts = ("Salt &amp; pepper &lt;b&gt;", "&amp;lt; stays", "5 < 6 & 7", None)
    img2dataset_shard(tmp_path, 0, "files", [("success", text, jpeg(i)) for i, text in enumerate(texts)])
    assert [e.answer for e in data.load("laion50k", tmp_path)] == ["Salt & pepper <b>", "&lt; stays", "5 < 6 & 7"]


def test_a_picture_path_that_is_no_file_is_a_broken_picture(folder):
    names = ("x" * 5000, "a\0b", "..", "/dev/zero", "two\nlines")
    jsonl(folder, GOOD, *({"image": name, "text": "a"} for name in names))
    good, *odd = data.load("folder", folder)
    assert shows(good, 0) and len(odd) == len(names) and all(is_broken(example) for example in odd)
