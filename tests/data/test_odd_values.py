"""Odd values, encodings and layouts of real files: read right, left out and counted, or refused in a line that names the file."""

import gzip
import json
import os
import re
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jpegs import is_broken, jpeg, shows
from test_laion50k import img2dataset_shard

from lavender_min import data

GOOD = {"image": "0.jpg", "text": "A red bus."}


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mine"
    root.mkdir()
    for i in range(4):
        (root / f"{i}.jpg").write_bytes(jpeg(i))
    return root


def write(path, value, encoding="utf-8"):
    path.write_bytes((value if isinstance(value, str) else json.dumps(value)).encode(encoding, "surrogatepass"))


def jsonl(folder, *rows, name="data.jsonl"):
    write(folder / name, "\n".join(json.dumps(row) for row in rows))


# ---- odd values in a row ---------------------------------------------------------------------------------------------

ODD_ROWS = {
    "a lone surrogate": ({"image": "1.jpg", "text": "a red \ud83d circle"}, "text: .*lone surrogate"),
    "a number": ({"image": "1.jpg", "text": 1999}, "text: input should be a valid string; got 1999"),
    "null": ({"image": "1.jpg", "text": None}, "'question' is missing; a line has image and text, or image, question"),
    "a list": ({"image": "1.jpg", "question": "?", "answer": ["a"]}, "answer: input should be a valid string"),
    "no picture": ({"text": "Only a text."}, "'image' is missing"),
    "a picture that is a number": ({"image": 3, "text": "a"}, "image: input should be a valid string; got 3"),
    "an id that is a list": ({"id": [1], "image": "1.jpg", "text": "a"}, "id: input should be a valid string"),
    "an id that is no Unicode": ({"id": "\udcff", "image": "1.jpg", "text": "a"}, "id.*lone surrogate"),
    "a name that is no Unicode": ({"image": "\udcff.jpg", "text": "a"}, "image: .*lone surrogate"),
    "no object": ([1], "the whole: input should be a valid dictionary; got .1."),
}


@pytest.mark.parametrize("kind", ODD_ROWS)
def test_an_odd_row_is_left_out_counted_and_named(folder, kind, capsys):
    row, message = ODD_ROWS[kind]
    jsonl(folder, GOOD, row, {**GOOD, "id": 7}, row)
    assert [e.id for e in data.load("folder", folder)] == ["0.jpg#1", "7"]
    said = capsys.readouterr().err
    assert said.startswith("2 of 4 rows are not as expected and are left out; the first: ") and said.count("\n") == 1
    assert re.search(f"data.jsonl, line 2[:,] {message}", said), said


@pytest.mark.parametrize("kind", ODD_ROWS)
def test_a_file_of_odd_rows_alone_is_refused(folder, kind):
    row, message = ODD_ROWS[kind]
    jsonl(folder, row, row)
    with pytest.raises(ValueError, match=f"data.jsonl, line 1[:,] {message}") as caught:
        data.load("folder", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [1999, None, {"text": "a"}, "a \ud83d", [3], [{"text": 3}]])
def test_odd_contents_of_a_conversation(folder, content, capsys):
    turns = [{"role": "user", "content": "Which year?"}, {"role": "assistant", "content": content}]
    good = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    rows = [{"id": str(i), "image": f"{i}.jpg", "conversations": c} for i, c in enumerate((good, turns))]
    write(folder / "ocrvqa30k.json", rows)
    assert [e.answer for e in data.load("ocrvqa30k", folder)] == ["Me."]
    assert (
        "1 of 2 rows are not as expected" in (said := capsys.readouterr().err) and "ocrvqa30k.json, row 1, conv" in said
    )
    write(folder / "ocrvqa30k.json", rows[1:])
    with pytest.raises(ValueError, match="ocrvqa30k.json, row 0, conversations"):
        data.load("ocrvqa30k", folder)


def test_parts_of_a_content_are_joined(folder):
    parts = [{"type": "image"}, {"type": "text", "text": "Which year?"}, {"type": "text", "text": "Be brief."}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "1999"}]}]
    write(folder / "ocrvqa30k.json", [{"id": "0", "image": "0.jpg", "conversations": turns}])
    (example,) = data.load("ocrvqa30k", folder)
    assert (example.question, example.answer) == ("Which year?\nBe brief.", "1999")


KARPATHY_ROWS = [
    {"filename": 3, "split": "train", "sentences": [{"raw": "A."}]},
    {"filename": "1.jpg", "split": ["train"], "sentences": [{"raw": "A."}]},
    {"filename": "1.jpg", "split": "train", "sentences": [{"raw": None}]},
    {"filename": "1.jpg", "split": "train", "sentences": "A."},
    {"filename": "1.jpg", "split": "train"},
    None,
]


@pytest.mark.parametrize("row", KARPATHY_ROWS)
def test_odd_rows_of_karpathys_file(folder, row, capsys):
    good = {"filename": "0.jpg", "split": "train", "sentences": [{"raw": "A bus."}]}
    write(folder / "dataset_flickr30k.json", {"images": [good, row]})
    assert [e.id for e in data.load("flickr30k", folder)] == ["0.jpg#0"]
    assert "dataset_flickr30k.json, row 1" in capsys.readouterr().err
    write(folder / "dataset_flickr30k.json", {"images": [row]})
    with pytest.raises(ValueError, match="dataset_flickr30k.json, row 0"):
        data.load("flickr30k", folder)


@pytest.mark.parametrize("whole", ['{"images": 3}', "[]", "", "null", '{"images": ' + "[" * 100_000, "not json"])
@pytest.mark.parametrize("name, reader", [("dataset_flickr30k.json", "flickr30k"), ("ocrvqa30k.json", "ocrvqa30k")])
def test_json_of_another_structure_names_the_file(folder, whole, name, reader):
    if (name, whole) == ("ocrvqa30k.json", "[]"):
        whole = "{}"
    write(folder / name, whole)
    with pytest.raises(ValueError, match=f"{name} is not (Karpathy's caption file|the authors' list)") as caught:
        data.load(reader, folder)
    assert "\n" not in str(caught.value)


def test_odd_rows_of_parquet_copies(tmp_path, capsys):
    picture = {"bytes": jpeg(0), "path": None}
    rows = [{"image": picture, "question": "?", "chosen": "!", "idx": i} for i in ("0", None, "2")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [e.id for e in data.load("rlaifv83k", tmp_path)] == ["0#0", "2#0"]
    assert "1 of 3 rows are not as expected" in (said := capsys.readouterr().err) and "a.parquet, row 1, idx" in said
    pq.write_table(pa.Table.from_pylist([{**row, "chosen": [1]} for row in rows]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 0, chosen: input should be a valid string"):
        data.load("rlaifv83k", tmp_path)


def test_a_plain_caption_in_parquet_is_one_caption(tmp_path):
    picture = {"bytes": jpeg(0), "path": None}
    rows = [{"image": picture, "caption": f"Two dogs {i} .", "filename": f"{i}.jpg"} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = data.load("flickr30k", tmp_path, captions="all")
    assert [(e.id, e.answer) for e in found] == [("0.jpg#0", "Two dogs 0 ."), ("1.jpg#0", "Two dogs 1 .")]


def test_parquet_files_that_do_not_go_together_are_named(tmp_path):
    for name, caption in (("a", "Two dogs ."), ("b", ["Two dogs ."])):
        row = {"image": {"bytes": jpeg(0), "path": None}, "caption": caption, "filename": f"{name}.jpg"}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="a.parquet and the Parquet files beside it do not go together") as caught:
        data.load("flickr30k", tmp_path)
    assert "\n" not in str(caught.value)


def test_bytes_of_parquet_that_are_no_unicode_name_the_file(tmp_path):
    picture = pa.array([{"bytes": jpeg(0), "path": None}])
    bad = pa.array([b"caf\xe9"]).view(pa.string())
    columns = {"image": picture, "question": bad, "chosen": pa.array(["!"]), "idx": pa.array(["0"])}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet .*cannot be read") as caught:
        data.load("rlaifv83k", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_picture_of_a_parquet_copy_is_named_by_its_row(tmp_path):
    rows = [{"image": {"bytes": b, "path": None}, "question": "?", "chosen": "!", "idx": 0} for b in (jpeg(0), b"no")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(data.BROKEN_PICTURE, match="a.parquet, row 1: not a picture of a kind"):
        data.load("rlaifv83k", tmp_path)[1].image()


# ---- encodings -------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_part_of_a_text_or_an_id(folder):
    write(folder / "0.txt", "A red bus.", "utf-8-sig")
    assert [(e.id, e.answer) for e in data.load("folder", folder)] == [("0.jpg", "A red bus.")]
    write(folder / "data.jsonl", json.dumps(GOOD), "utf-8-sig")
    assert [(e.id, e.answer) for e in data.load("folder", folder)] == [("0.jpg#1", "A red bus.")]
    # Two files, one behind the other.
    write(folder / "data.jsonl", json.dumps(GOOD) + "\n\ufeff" + json.dumps(GOOD), "utf-8-sig")
    assert len(data.load("folder", folder)) == 2
    (folder / "data.jsonl").unlink()
    write(folder / "metadata.csv", "file_name,text\r\n1.jpg,A bus.\r\n", "utf-8-sig")
    assert [(e.id, e.answer) for e in data.load("folder", folder)] == [("1.jpg#2", "A bus.")]
    write(folder / "results_20130124.token", "0.jpg#0\tTwo dogs .\r\n0.jpg#1\tDogs .\r\n", "utf-8-sig")
    assert [(e.id, e.answer) for e in data.load("flickr30k", folder)] == [("0.jpg#0", "Two dogs .")]
    assert shows(data.load("flickr30k", folder)[0], 0)


@pytest.mark.parametrize(
    "name, reader", [("data.jsonl", "folder"), ("metadata.csv", "folder"), ("results_20130124.token", "flickr30k")]
)
def test_texts_in_another_encoding_name_file_and_line(folder, name, reader):
    line = {"data.jsonl": json.dumps(GOOD), "metadata.csv": "file_name,text", "results_20130124.token": "0.jpg#0\tA"}
    write(folder / name, f"{line[name]}\n{line[name]} café", "cp1252")
    with pytest.raises(ValueError, match=f"{name}, line 2: expected UTF-8, got the byte 0xe9; .* cp1252 or latin-1"):
        data.load(reader, folder)


def test_a_caption_beside_a_picture_in_another_encoding_is_left_out_and_named(folder, capsys):
    write(folder / "0.txt", "Two\ncafés", "cp1252")
    with pytest.raises(ValueError, match="0.txt, line 2: expected UTF-8"):
        data.load("folder", folder)
    write(folder / "1.txt", "Two cafés")
    assert [e.answer for e in data.load("folder", folder)] == ["Two cafés"]
    assert "1 of 2 rows are not as expected" in (said := capsys.readouterr().err) and "0.txt, line 2" in said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such names")
def test_file_names_that_are_no_unicode_are_left_out_and_named(folder, capsys):
    write(folder / "0.txt", "A red bus.")
    for kind, content in (("jpg", jpeg(1)), ("txt", b"A caf\xc3\xa9.")):
        with open(os.fsencode(folder) + b"/caf\xe9." + kind.encode(), "wb") as file:
            file.write(content)
    assert [e.id for e in data.load("folder", folder)] == ["0.jpg"]
    assert "1 of 2 rows are not as expected" in (said := capsys.readouterr().err) and "lone surrogate" in said


def test_a_pipe_where_texts_should_be_does_not_hang(folder):
    for name in ("data.jsonl", "0.txt", "dataset_flickr30k.json", "a.parquet", "00000.tar", "00000.parquet"):
        os.mkfifo(folder / name)
    for reader in ("folder", "flickr30k", "rlaifv83k", "laion50k"):
        with pytest.raises((ValueError, OSError), match="looked for|there is no such file"):
            data.load(reader, folder)


# ---- layouts ---------------------------------------------------------------------------------------------------------


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
        {"image": "3.jpg", "question": "<image>?", "answer": "a < b"})  # fmt: skip
    assert [e.answer for e in data.load("folder", folder)][1:] == ["a <|image|> b", "End<|eot_id|>", "a < b"]
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "3 entries hold what a model takes for a special token, the first <|image|> in " in said
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
