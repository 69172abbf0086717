"""COCO's JSON, RefCOCO's Parquet and folders of mask pictures, in their layouts, broken entries included, against known cells."""

import json
import sys

import datasets
import numpy as np
import pycocotools.mask
import pytest
from datasets import Features, List, Value
from jpegs import is_broken, jpeg
from PIL import Image
from test_odd_values import own_caches  # noqa: F401

from lavender_min import data
from lavender_min.data.refcoco import head_end

# Pixels of every picture here: 40 × 20, so that a cell of a side of 10 is 4 × 2.
SIZE = (40, 20)


def cells(*boxes, side=10):
    mask = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def found(example, side=10):
    """{word: (kind, mask)}, of question and answer."""
    return {example.fields[r.field][r.start : r.end]: (r.kind, r.mask) for r in example.regions(side)}


def check(example, **expected):
    """Word by word: the kind, and the boxes of its cells."""
    of = found(example)
    assert of.keys() == expected.keys()
    for word, (kind, *boxes) in expected.items():
        assert of[word][0] == kind and np.array_equal(of[word][1], cells(*boxes)), word


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(jpeg(i, SIZE))


# ---- COCO ------------------------------------------------------------------------------------------------------------

CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 17, "name": "cat", "supercategory": "animal"},
    {"id": 67, "name": "dining table", "supercategory": "furniture"},
]


def image(id, name, **more):
    return {"id": id, "file_name": name, "width": 40, "height": 20, "license": 3, **more}


def runs(mask):
    """COCO's uncompressed run lengths of a mask [height, width]: column by column, outside first."""
    flat = np.concatenate([[0], mask.T.flatten(), [2]])
    at = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], at]) if flat[1] == 0 else np.concatenate([[0, 0], at]))
    return {"size": list(mask.shape), "counts": lengths.tolist()}


def test_cocos_own_folders(tmp_path):
    """Instances and captions of a split; a crowd in run lengths, and a cat in two polygons."""
    pictures(tmp_path / "val2017", "000000000001.jpg", "000000000002.jpg")
    images = [image(1, "000000000001.jpg"), image(2, "000000000002.jpg")]
    crowd = np.zeros((20, 40), dtype=bool)
    crowd[4:12, 8:24] = True
    things = [
        {"id": 1, "image_id": 1, "category_id": 17, "iscrowd": 0, "bbox": [0, 0, 40, 20], "area": 1.0,
         "segmentation": [[0, 0, 8, 0, 8, 4, 0, 4], [20.0, 10.0, 40.0, 10.0, 40.0, 20.0, 20.0, 20.0]]},
        {"id": 2, "image_id": 1, "category_id": 67, "iscrowd": 0, "bbox": [12, 2, 8, 10], "segmentation": []},
        {"id": 3, "image_id": 2, "category_id": 1, "iscrowd": 1, "bbox": [8, 4, 16, 8], "segmentation": runs(crowd)},
        {"id": 4, "image_id": 2, "category_id": 1, "iscrowd": 0, "bbox": [36, 18, 4, 2], "segmentation": []},
    ]  # fmt: skip
    captions = [
        {"id": 9, "image_id": 1, "caption": "A cat on the dining table. "},
        {"id": 10, "image_id": 1, "caption": "Two Cats?"},
        {"id": 11, "image_id": 2, "caption": "Persons , no cat."},
    ]
    (tmp_path / "annotations").mkdir()
    for part, entries in (("instances", things), ("captions", captions)):
        content = {"images": images, "annotations": entries, "categories": CATEGORIES, "info": {}}
        (tmp_path / "annotations" / f"{part}_val2017.json").write_text(json.dumps(content))
    first, second, third = data.load("coco", tmp_path, "val2017", "all")
    assert [(e.id, e.answer, e.picture) for e in (first, second)] == [
        ("1#0", "A cat on the dining table.", "000000000001.jpg"), ("1#1", "Two Cats?", "000000000001.jpg")
    ]  # fmt: skip
    assert first.image().size == SIZE
    cat, table = (0, 0, 2, 2), (3, 1, 5, 6)
    both = ("animal", cat, (5, 5, 10, 10))
    check(first, cat=both, dining=("furniture", table), table=("furniture", table))
    check(second, Cats=both)
    # Two of a kind count together; there is no cat here.
    check(third, Persons=("person", (2, 2, 6, 6), (9, 9, 10, 10)))
    assert [e.id for e in data.load("coco", tmp_path, "val2017")] == ["1#0", "2#0"]
    with pytest.raises(
        FileNotFoundError, match="no COCO data in .*: looked for annotations/instances_val2014.json and"
    ):
        data.load("coco", tmp_path, "val2014")


def own(tmp_path, annotations, images=None, **more):
    """A file of one's own beside its picture."""
    pictures(tmp_path, "a.jpg")
    file = tmp_path / "mine.json"
    images = images or [image("a", "a.jpg", caption="A black cat sees a cat.")]
    file.write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return file


def test_spans_in_captions_of_ones_own(tmp_path):
    """The words are said, so no category is needed; --data_root is the file or its folder."""
    packed = pycocotools.mask.encode(np.asfortranarray(np.pad(np.ones((10, 20), np.uint8), ((0, 10), (20, 0)))))
    things = [
        {"image_id": "a", "bbox": [0, 0, 20, 10], "tokens_positive": [[0, 11]]},
        {"image_id": "a", "tokens_positive": [[19, 22]], "category_id": 17,
         "segmentation": {"size": [20, 40], "counts": packed["counts"].decode()}},
    ]  # fmt: skip
    file = own(tmp_path, things, categories=[{"id": 17, "name": "cat"}])
    for root in (file, tmp_path):
        (example,) = data.load("coco", root)
        regions = {(r.start, r.end): (r.kind, r.mask) for r in example.regions(10)}
        assert regions.keys() == {(2, 7), (8, 11), (19, 22)}
        for span, (kind, box) in {
            (2, 7): ("", (0, 0, 5, 5)),
            (8, 11): ("", (0, 0, 5, 5)),
            (19, 22): ("cat", (5, 0, 10, 5)),
        }.items():
            assert regions[span][0] == kind and np.array_equal(regions[span][1], cells(box)), span


def test_without_a_caption_of_its_own_a_picture_has_no_spans(tmp_path):
    """All captions are annotations, and name a thing by its category, though a tool wrote an empty "tokens_positive"."""
    thing = {"image_id": "a", "bbox": [0, 0, 20, 10], "category_id": 17, "tokens_positive": []}
    captions = [{"image_id": "a", "caption": text} for text in ("A cat.", "Some cat.")]
    file = own(tmp_path, [thing, *captions], [image("a", "a.jpg")], categories=[{"id": 17, "name": "cat"}])
    for example in data.load("coco", file, captions="all"):
        check(example, cat=("cat", (0, 0, 5, 5)))


BOX = {"image_id": "a", "bbox": [0, 0, 20, 10], "tokens_positive": [[8, 11]]}


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"bbox": [1, 2, 3]}, "annotations 1: expected a caption, a segmentation, or bbox: [x, y, width, height]; got [1"),
        ({"bbox": "all"}, "annotations 1, bbox: input should be a valid list; got 'all'"),
        ({"image_id": "b"}, "annotations 1: there is no picture 'b'"),
        ({"tokens_positive": [[8, 99]]}, "tokens_positive: expected [start, end] in the picture's caption; got [8, 99]"),
        ({"segmentation": [[0, 0, 1, 1, 2]]}, "expected polygons [x, y, x, y, …]; got one of 5 numbers"),
        ({"segmentation": {"size": [40, 20], "counts": [800]}}, "segmentation.size: expected the picture's, [20, 40]; got [40"),
        ({"segmentation": {"size": [20, 40], "counts": [1, 2]}}, "segmentation.counts: expected 800 pixels; got 3"),
    ],
)  # fmt: skip
def test_wrong_annotations_are_left_out(tmp_path, wrong, says, capsys):
    (example,) = data.load("coco", own(tmp_path, [BOX, BOX | wrong]))
    check(example, cat=("", (0, 0, 5, 5)))
    said = capsys.readouterr().err
    assert said.startswith("1 of 2 annotations are not as expected and are left out; the first: ") and says in said


def test_files_that_are_not_coco(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="annotations 0, image_id: "):
        data.load("coco", own(tmp_path, [{"bbox": [0, 0, 1, 1]}]))
    images = [image("a", "a.jpg", caption="A cat."), image("b", "b.jpg", caption="A dog.") | {"width": 0}]
    assert len(data.load("coco", own(tmp_path, [], images))) == 1
    assert "images 1: expected a width and height; got 0 and 20" in capsys.readouterr().err
    file = own(tmp_path, [BOX | {"segmentation": {"size": [20, 40], "counts": [800]}}])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match="masks in RLE are read by pycocotools.*pip install 'lavender-min.coco.'"):
        data.load("coco", file)
    file.write_text('{"images": [], "annotations": []}')
    with pytest.raises(ValueError, match="mine.json lists no pictures"):
        data.load("coco", file)
    file.write_text('[{"image": "a.jpg"}]')
    with pytest.raises(ValueError, match="mine.json is not a file in COCO's layout"):
        data.load("coco", file)


# ---- RefCOCO ---------------------------------------------------------------------------------------------------------

COPY = {
    "question_id": Value("string"), "image": datasets.Image(), "question": Value("string"), "answer": List(Value("string")),
    "segmentation": List(Value("float32")), "bbox": List(Value("float32")), "iscrowd": Value("int8"),
    "file_name": Value("string"),
}  # fmt: skip


def refcoco_copy(folder, rows):
    """lmms-lab's: two files of val and one of testA."""
    whole = [
        {"question_id": "7", "question": "Please describe it.", "segmentation": [0.0] * 6, "iscrowd": 0}
        | {
            "image": {"bytes": jpeg(i, SIZE), "path": "p.jpg"},
            "file_name": f"COCO_train2014_00000058185{i // 2}_{i}.jpg",
        }
        | row
        for i, row in enumerate(rows)
    ]
    (folder / "data").mkdir()
    table = datasets.Dataset.from_list(whole, features=Features(COPY))
    for shard in range(2):
        table.shard(2, shard, contiguous=True).to_parquet(folder / "data" / f"val-0000{shard}-of-00002.parquet")
    table.select([0]).to_parquet(folder / "data" / "testA-00000-of-00001.parquet")


def test_refcoco(tmp_path, capsys):
    refcoco_copy(
        tmp_path,
        [
            {"answer": ["man in the red shirt ", "left guy"], "bbox": [4, 2, 8, 6]},
            {"answer": ["on the right"], "bbox": [20.5, 0, 19.5, 20]},
            {"answer": ["no box"], "bbox": [1, 2]},
            {"answer": ["broken"], "bbox": [0, 0, 40, 20], "image": {"bytes": jpeg(3)[:200], "path": "p.jpg"}},
            {"answer": [], "bbox": [0, 0, 1, 1]},
        ],
    )
    first, second, third, fourth = data.load("refcoco", tmp_path, captions="all")
    said = capsys.readouterr().err
    assert (
        "1 of 5 rows are not as expected" in said and "row 2, bbox: expected [x, y, width, height]; got [1.0, 2" in said
    )
    assert "1 of 5 entries have no text" in said
    assert [(e.id, e.answer, e.question) for e in (first, second)] == [
        ("val-00000#0", "man in the red shirt", ""), ("val-00000#1", "left guy", "")
    ]  # fmt: skip
    # Two things of one picture; a copy may name the cut beside the picture.
    assert first.picture == second.picture == third.picture == "COCO_train2014_000000581850.jpg"
    box = (1, 1, 3, 4)
    check(first, man=("", box))
    check(second, left=("", box), guy=("", box))
    check(third, right=("", (5, 0, 10, 10)))
    assert fourth.id == "val-00003#0" and is_broken(fourth)
    with pytest.raises(data.BROKEN_PICTURE):
        fourth.regions(10)
    assert [e.id for e in data.load("refcoco", tmp_path, "testA")] == ["testA-00000#0"]
    with pytest.raises(FileNotFoundError, match="looked for test-.*parquet; it has testA, val; pass --split"):
        data.load("refcoco", tmp_path, "test")


@pytest.mark.parametrize(
    "expression, head",
    [
        ("man in a red shirt", "man "), ("the second guy from left", "the second guy "), ("On the left", "On the left"),
        ("woman who is sitting", "woman "), ("far right", "far right"), ("the one", "the one"), ("", ""),
    ],
)  # fmt: skip
def test_an_expression_names_its_thing_first(expression, head):
    assert expression[: head_end(expression)] == head


# ---- masks -----------------------------------------------------------------------------------------------------------


def mask(file, box, size=SIZE, mode="L", value=255):
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.new(mode, size)
    drawn.paste(value, box)
    drawn.save(file)


def test_a_folder_of_masks(tmp_path, capsys):
    pictures(tmp_path / "dogs", "1.jpg", "2.jpg")
    (tmp_path / "dogs" / "1.txt").write_text("A dog with a red  ball.\n")
    (tmp_path / "dogs" / "2.txt").write_text("Grass.")
    masks = tmp_path / "masks" / "dogs" / "1"
    # A tenth of the picture's size, in bits; ones in place of 255; a name that is in no text; and a broken one.
    mask(masks / "dog.png", (0, 0, 20, 10), mode="1", value=1)
    mask(masks / "red ball.png", (5, 5, 10, 10), size=(10, 10), value=1)
    mask(masks / "tree.png", (0, 0, 1, 1))
    (masks / "grass.png").write_bytes((masks / "dog.png").read_bytes()[:-20])
    first, second = data.load("masks", tmp_path)
    assert (first.id, first.answer) == ("dogs/1.jpg", "A dog with a red  ball.") and second.regions(10) == []
    check(first, dog=("", (0, 0, 5, 5)), red=("", (5, 5, 10, 10)), ball=("", (5, 5, 10, 10)))
    said = capsys.readouterr().err.splitlines()
    assert "1 of 4 masks are not as expected" in said[0] and "grass.png" in said[0]
    assert said[1] == f"1 of 3 masks have a name that no text of their picture has; the first: {masks / 'tree.png'}"


def test_masks_of_questions_and_answers(tmp_path):
    pictures(tmp_path, "a.jpg")
    row = {"image": "a.jpg", "question": "Where is the cat?", "answer": "The cat is left.", "id": 5}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    with pytest.raises(FileNotFoundError, match="no masks in .*masks: looked for <picture>/<word>.png"):
        data.load("masks", tmp_path)
    mask(tmp_path / "masks" / "a" / "cat.png", (0, 0, 4, 20))
    for root in (tmp_path, tmp_path / "data.jsonl"):
        (example,) = data.load("masks", root)
        assert [(r.field, r.start, r.end) for r in example.regions(10)] == [("question", 13, 16), ("answer", 4, 7)]
        assert all(np.array_equal(r.mask, cells((0, 0, 1, 10))) for r in example.regions(10))
