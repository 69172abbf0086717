"""Odd values, encodings and layouts of real files: read right, left out and counted, or refused in a line that names the file."""

import json
import os
import re
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jpegs import jpeg, shows

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
