"""The reader of img2dataset's output, on shards written as img2dataset writes them, broken entries included."""

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jpegs import HUGE, NOT_A_PICTURE, is_broken, jpeg, shows

from lavender_min import data


def img2dataset_shard(root: Path, number: int, layout: str, rows: list[tuple[str, str | None, bytes | None]]) -> None:
    """A shard as img2dataset writes it; rows of (status, caption, picture), in the order the downloads ended."""
    keys = [f"{number * 10_000 + i:09}" for i in range(len(rows))]
    meta = [
        {"url": f"http://a/{key}", "caption": caption, "key": key, "status": status,
         "error_message": None if status == "success" else "HTTP Error 404: Not Found", "sha256": None}
        for key, (status, caption, _) in zip(keys, rows, strict=True)
    ]  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    names = {name: pa.string() for name in meta[0]}
    pq.write_table(pa.Table.from_pylist(meta[::-1], pa.schema(names)), root / f"{number:05}.parquet")
    (root / f"{number:05}_stats.json").write_text("{}")
    files = {
        f"{row['key']}.{kind}": content
        for row, (_, caption, picture) in zip(meta, rows, strict=True)
        if picture is not None
        for kind, content in (("jpg", picture), ("json", json.dumps(row).encode()), ("txt", (caption or "").encode()))
    }
    if layout == "files":
        (root / f"{number:05}").mkdir()
        for name, content in files.items():
            (root / f"{number:05}" / name).write_bytes(content)
        return
    with tarfile.open(root / f"{number:05}.tar", "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(params=["webdataset", "files"])
def laion(tmp_path, request):
    root = tmp_path / "laion"
    img2dataset_shard(root, 0, request.param, [
        ("success", "A red bus", jpeg(0)),
        ("failed_to_download", "Gone", None),
        ("success", None, jpeg(2)),
        ("success", "Cut short", jpeg(3)[:-200]),
        ("success", "Not a picture", NOT_A_PICTURE),
        ("success", "Too large to be meant", HUGE),
    ])  # fmt: skip
    rows = [("success", f"Picture {i}", jpeg(i)) for i in range(40)]
    img2dataset_shard(root, 1, request.param, rows + [("success", "Lost", None)])
    return root


def test_laion50k(laion, capsys):
    examples = {e.id: e for e in data.load("laion50k", laion)}
    said = capsys.readouterr().err
    assert "1 of 47 links gave no picture and are left out" in said
    assert "1 of 46 entries have no text and are left out" in said
    assert list(examples) == sorted(examples) and len(examples) == 45
    assert (examples["000000000"].question, examples["000000000"].answer) == ("", "A red bus")
    assert shows(examples["000000000"], 0)
    assert is_broken(examples["000000003"]) and is_broken(examples["000000004"])
    with pytest.raises(data.BROKEN_PICTURE, match="000000005.jpg: Image size .* exceeds limit"):
        examples["000000005"].image()
    with pytest.raises(data.BROKEN_PICTURE, match="holds no picture 000010040"):
        examples["000010040"].image()


def test_pictures_of_a_tar_are_read_by_many_threads_in_any_order(laion):
    examples = [e for e in data.load("laion50k", laion) if e.answer.startswith("Picture")]
    assert len(examples) == 40
    order = np.random.default_rng(0).permutation(400) % 40
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda i: shows(examples[i], i), order))


def test_a_tar_cut_short_keeps_what_lies_before_the_cut(tmp_path):
    img2dataset_shard(tmp_path, 3, "webdataset", [("success", f"Picture {i}", jpeg(i)) for i in range(6)])
    tar = tmp_path / "00003.tar"
    with tarfile.open(tar) as whole:
        cut = whole.getmember("000030004.jpg").offset_data + 300
    tar.write_bytes(tar.read_bytes()[:cut])
    examples = data.load("laion50k", tmp_path)
    assert len(examples) == 6
    assert all(shows(examples[i], i) for i in range(4)) and is_broken(examples[4]) and is_broken(examples[5])
    tar.write_bytes(b"")
    assert all(is_broken(example) for example in data.load("laion50k", tmp_path))


def test_unfinished_downloads_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Laion50k in .*img2dataset writes, 00000.parquet with 00000.tar"):
        data.load("laion50k", tmp_path)
    img2dataset_shard(tmp_path, 0, "webdataset", [("success", "A bus", jpeg(0))])
    texts = tmp_path / "00000.parquet"
    whole = texts.read_bytes()
    texts.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="00000.parquet is missing or not a whole Parquet file"):
        data.load("laion50k", tmp_path)
    pq.write_table(pq.read_table(io.BytesIO(whole)).drop_columns("caption"), texts)
    with pytest.raises(ValueError, match="00000.parquet: expected a column 'caption'; it has url, key, status"):
        data.load("laion50k", tmp_path)
    texts.unlink()
    with pytest.raises(ValueError, match="00000.parquet is missing or not"):
        data.load("laion50k", tmp_path)
    texts.write_bytes(whole)
    (tmp_path / "00000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="00000.tar"):
        data.load("laion50k", tmp_path)
