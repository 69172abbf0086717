"""Flickr30k Entities in its authors' layout: the right characters and the right cells, whatever version a caption comes in."""

import json

import numpy as np
import pytest
from entities_folder import BOXED, FLAGGED, annotation, box_of, toy_flickr
from jpegs import jpeg

from lavender_min import data
from lavender_min.data import entities
from lavender_min.toy import data as toy

# As the authors have it: words apart, quotation marks in pairs.
SENTENCES = [
    "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#3/bodyparts/other their hands] in "
    "[/EN#4/scene the yard] .",
    "[/EN#5/people A man] in [/EN#6/clothing a `` green '' shirt] sees [/EN#7/notvisual it] and [/EN#8/other no one] , "
    "[/EN#0/notvisual it] .",
    "A man does n't see [/EN#5/people him] .",
]
# As Karpathy's file has them.
CAPTIONS = [
    "Two young guys  with shaggy hair look at their hands in the yard.",
    'A man in a "green" shirt sees it and no one, it.',
    "A man doesn't see him.",
]
# Guy 1 and guy 2, the hands of both, hair and hands in one box; a yard that is everywhere, and no one, who has no box.
OBJECTS = (
    BOXED.format(1, 1, 30, 50, names="<name>1</name>")
    + BOXED.format(91, 51, 150, 100, names="<name>1</name> <name>5</name>")
    + BOXED.format(61, 11, 75, 20, names="<name>2</name> <name>3</name>")
    + BOXED.format(76, 21, 90, 30, names="<name>6</name>")
    + FLAGGED.format(name=4, scene=1, nobox=0)
    + FLAGGED.format(name=8, scene=0, nobox=1)
)


def cells(*boxes, side=10):
    """Cells of 15 × 10 pixels: (left, top, right, bottom), the last two not included."""
    mask = np.zeros((side, side), dtype=bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def folders(tmp_path):
    """Pictures 1 and 2, and the annotations of the first, put there twice."""
    root, entities = tmp_path / "flickr30k", tmp_path / "entities"
    (root / "images").mkdir(parents=True)
    for i in (1, 2):
        (root / "images" / f"{i}.jpg").write_bytes(jpeg(i, (150, 100)))
        annotation(entities, str(i), SENTENCES, OBJECTS)
    images = [
        {"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": text} for text in CAPTIONS]} for i in (1, 2)
    ]
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return root, entities


def found(example, side=10):
    return {example.answer[region.start : region.end]: (region.kind, region.mask) for region in example.regions(side)}


def test_phrases_find_their_characters_and_boxes_their_cells(folders, capsys):
    first, second, third, *_ = data.load("flickr30k", folders[0], "test", "all", folders[1])
    guys, hair = cells((0, 0, 2, 5), (6, 5, 10, 10)), cells((4, 1, 5, 2))
    expected = {
        "Two": ("people", guys),
        "young": ("people", guys),
        "guys": ("people", guys),
        "shaggy": ("bodyparts", hair),
        "hair": ("bodyparts", hair),
        "hands": ("bodyparts", hair),
    }
    of_first = found(first)
    assert of_first.keys() == expected.keys()
    for word, (kind, mask) in expected.items():
        assert of_first[word][0] == kind and np.array_equal(of_first[word][1], mask), word
    # The caption has two spaces where the sentence has one: places are the caption's own.
    assert {(r.field, r.start, r.end) for r in first.regions(10)} >= {("answer", 10, 14), ("answer", 47, 52)}
    of_second = found(second)
    assert of_second.keys() == {"man"} and np.array_equal(of_second["man"][1], cells((6, 5, 10, 10)))
    # "doesn't" is one word in the caption and two in the sentence; the phrase behind it is found all the same.
    assert found(third).keys() == {"him"}
    assert capsys.readouterr().err == (
        f"--entities {folders[1]}: 2 of 12 phrases are not in the captions, the first: \"a `` green '' shirt\" of 1.jpg#1\n"
    )


def test_a_box_holds_its_last_pixel(folders):
    """With a cell a pixel, in a picture of 10 × 10: pixels 3 to 5, counted from 1, are cells 2, 3 and 4."""
    annotation(folders[1], "1", SENTENCES, BOXED.format(3, 1, 5, 10, names="<name>5</name>"))
    file = folders[1] / "Annotations" / "1.xml"
    file.write_text(file.read_text().replace(">150<", ">10<").replace(">100<", ">10<"))
    third = data.load("flickr30k", folders[0], "test", "all", folders[1])[2]
    assert np.array_equal(found(third)["him"][1], cells((2, 0, 5, 10)))


def test_captions_without_entities_are_the_same(folders):
    plain, boxed = (data.load("flickr30k", folders[0], "test", "all", given) for given in (None, folders[1]))
    assert [example.regions for example in plain] == [None] * 6
    for one, other in zip(plain, boxed, strict=True):
        assert one._replace(image=None) == other._replace(image=None, regions=None)


@pytest.mark.parametrize(
    "harm, says",
    [
        ("xml cut", "2.xml: ParseError: "),
        ("no xml", "2.xml"),
        ("no txt", "2.txt"),
        ("odd number", "2.xml: <bndbox/xmin>: expected a whole number; got 'left'"),
        ("no size", "2.xml: <size/width>: expected a whole number; got None"),
        ("open bracket", "2.txt, line 1: expected phrases such as [/EN#1/people A man]; got '[/EN#1/people Two young"),
    ],
)
def test_broken_annotations_leave_a_picture_without_regions(folders, harm, says, capsys):
    xml, txt = folders[1] / "Annotations" / "2.xml", folders[1] / "Sentences" / "2.txt"
    match harm:
        case "xml cut":
            xml.write_text(xml.read_text()[:-30])
        case "no xml":
            xml.unlink()
        case "no txt":
            txt.unlink()
        case "odd number":
            xml.write_text(xml.read_text().replace("<xmin>76<", "<xmin>left<"))
        case "no size":
            xml.write_text(xml.read_text().replace("size>", "sizes>"))
        case "open bracket":
            txt.write_text("[/EN#1/people Two young guys .\n")
    examples = data.load("flickr30k", folders[0], "test", "first", folders[1])
    assert [len(example.regions(10)) for example in examples] == [6, 0]
    said = capsys.readouterr().err
    assert "1 of 2 pictures' annotations are not as expected and are left out; the first: " in said and says in said
    (folders[1] / "Annotations" / "1.xml").unlink()
    with pytest.raises((ValueError, OSError), match="1.xml"):
        data.load("flickr30k", folders[0], "test", "first", folders[1])


def test_folders_that_hold_something_else(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="--entities .*: looked for Sentences/<picture>.txt, which is in annot"):
        data.load("flickr30k", folders[0], "test", "first", tmp_path)
    with pytest.raises(ValueError, match="--data folder takes no --entities"):
        data.load("folder", tmp_path, entities=folders[1])
    with pytest.raises(ValueError, match="--data flickr30k has no regions: .*flickr30k with --entities"):
        data.measured_split("flickr30k")
    assert data.measured_split("flickr30k", "entities") == "test"


def test_a_line_is_found_by_its_letters_before_its_number(folders):
    sentences = folders[1] / "Sentences" / "1.txt"
    sentences.write_text("Something else .\n" + sentences.read_text())
    assert len(data.load("flickr30k", folders[0], "test", "first", folders[1])[0].regions(10)) == 6


def test_toy_scenes_in_this_layout_keep_their_masks(tmp_path):
    """Each shape's region is the box around its exact mask."""
    flickr, boxes = toy_flickr(tmp_path, 5)
    examples = data.load("flickr30k", flickr, entities=boxes)
    scenes = [example for example in toy.load("heldout", 5) if not example.question]
    for example, scene in zip(examples, scenes, strict=True):
        exact = {(r.start, r.end): r.mask for r in scene.regions(128) if r.kind == "shape"}
        regions = example.regions(32)
        assert {(r.start, r.end) for r in regions} == exact.keys() and {r.kind for r in regions} == {"people", "other"}
        for region in regions:
            left, top, right, bottom = box_of(exact[region.start, region.end])
            x, y = ((np.arange(32) + 0.5) * length / 32 for length in (150, 100))
            inside = ((left - 1 <= x) & (x < right))[None] & ((top - 1 <= y) & (y < bottom))[:, None]
            assert np.array_equal(region.mask, inside)


def test_brackets_are_read_as_the_authors_do():
    text, phrases = entities.read_sentence(SENTENCES[0], "1.txt, line 1")
    assert text == "Two young guys with shaggy hair look at their hands in the yard ."
    assert [(text[p.start : p.end], p.kind, p.chain) for p in phrases] == [
        ("Two young guys", "people", "1"), ("shaggy hair", "bodyparts", "2"), ("their hands", "bodyparts", "3"),
        ("the yard", "scene", "4"),
    ]  # fmt: skip
