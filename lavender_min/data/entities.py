"""Flickr30k Entities: which things the phrases of Flickr30k's captions name, and the boxes of these things.

The folder is what the authors' annotations.zip holds (https://github.com/BryanPlummer/flickr30k_entities):

    Sentences/<picture>.txt      a caption a line, with its phrases in brackets: [/EN#<chain>/<type>/<type>… <words>]
    Annotations/<picture>.xml    the <size> of the picture and its <object>s, each with the <name>s of one or more chains and a
                                 <bndbox>, or with the flag <nobndbox> (not to be seen) or <scene> (all of the picture)

A chain is a thing, or a group of them, that phrases of all captions may name. It may have several boxes, which then count together,
or none: its phrases have no region. Boxes count pixels from 1, and their last pixel still belongs to them.

The captions of Flickr30k come in several versions, which differ in their spaces and quotation marks. So a phrase is found in a
caption by its letters.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lavender_min.data import Example
from lavender_min.data.regions import Place, box, polygon_mask, regions
from lavender_min.data.texts import keep, lines
from lavender_min.failing import naming, say

PHRASE = re.compile(r"\[/EN#(?P<chain>\d+)/(?P<kind>\w+)(?:/\w+)* (?P<words>[^\]]*)\]")


class Phrase(NamedTuple):
    """text[start:end] of a Sentence."""

    start: int
    end: int
    # The first of its types: people, clothing, bodyparts, animals, vehicles, instruments, scene, other, or notvisual.
    kind: str
    chain: str


class Sentence(NamedTuple):
    # Without brackets.
    text: str
    phrases: list[Phrase]


class Boxes(NamedTuple):
    """The boxes of a picture, by chain, as polygons; and its width and height."""

    size: tuple[int, int]
    of_chain: dict[str, list[list[float]]]


class Placed(NamedTuple):
    """A phrase that has boxes, and where it stands in a caption."""

    phrase: Phrase
    words: str
    # Start and end; None where the caption has other letters.
    span: tuple[int, int] | None


class Picture(NamedTuple):
    name: str
    sentences: list[Sentence]
    boxes: Boxes


def with_regions(examples: list[Example], folder: Path) -> list[Example]:
    """The same examples of Flickr30k, with regions for the words of their phrases.

    A picture without whole annotations keeps its examples, whose words then have no region. How many those are, and how many
    phrases stand otherwise in a caption, is said in a line each.
    """
    for part, ending in (("Sentences", "txt"), ("Annotations", "xml")):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"--entities {folder}: looked for {part}/<picture>.{ending}, which is in annotations.zip of "
                "https://github.com/BryanPlummer/flickr30k_entities"
            )
    names = dict.fromkeys(example.picture for example in examples)
    pictures = keep(((name, name) for name in names), partial(_read, folder), "pictures' annotations")
    of_name = {picture.name: picture for picture in pictures}
    made, lost, phrases = [], [], 0
    for example in examples:
        places = []
        if picture := of_name.get(example.picture):
            for phrase, words, span in _placed(picture, example):
                phrases += 1
                if span is None:
                    lost.append(f"{words!r} of {example.id}")
                else:
                    mask = partial(polygon_mask, picture.boxes.of_chain[phrase.chain], picture.boxes.size)
                    places.append(Place("answer", *span, phrase.kind, mask))
        made.append(example._replace(regions=partial(regions, example.fields, places)))
    if lost:
        say(f"--entities {folder}: {len(lost):,} of {phrases:,} phrases are not in the captions, the first: {lost[0]}")
    return made


def _read(folder: Path, name: str, where: str) -> Picture:
    stem = Path(name).stem
    sentences = [read_sentence(line, of) for of, line in lines(folder / "Sentences" / f"{stem}.txt")]
    return Picture(name, sentences, read_boxes(folder / "Annotations" / f"{stem}.xml"))


def read_sentence(line: str, where: str) -> Sentence:
    text, phrases, read = "", [], 0
    for match in PHRASE.finditer(line):
        text += line[read : match.start()]
        phrases.append(Phrase(len(text), len(text) + len(match["words"]), match["kind"], match["chain"]))
        text += match["words"]
        read = match.end()
    text += line[read:]
    if "[/EN" in text:
        raise ValueError(
            f"{where}: expected phrases such as [/EN#1/people A man]; got {text[text.index('[/EN') :][:40]!r}"
        )
    return Sentence(text, phrases)


def read_boxes(file: Path) -> Boxes:
    found: dict[str, list[list[float]]] = defaultdict(list)
    with naming(file):
        root = ElementTree.parse(file).getroot()
        size = (_number(root, "size/width"), _number(root, "size/height"))
        if min(size) < 1:
            raise ValueError(f"expected a picture's width and height; got {size[0]} and {size[1]}")
        for thing in root.iterfind("object"):
            if thing.find("bndbox") is not None:
                left, top, right, bottom = (_number(thing, f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax"))
                for name in thing.iterfind("name"):
                    found[name.text or ""].append(box(left - 1, top - 1, right, bottom))
    return Boxes(size, dict(found))


def _number(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path)
    if text is None or not text.strip().isdecimal():
        raise ValueError(f"<{path}>: expected a whole number; got {text!r}")
    return int(text)


def _placed(picture: Picture, example: Example) -> Iterator[Placed]:
    """The phrases of a caption that have boxes. Its sentence is the one with its letters, else the one with its number."""
    caption, number = example.answer, int(example.id.rpartition("#")[2])
    alike = [sentence for sentence in picture.sentences if _letters(sentence.text) == _letters(caption)]
    for sentence in (alike or picture.sentences[number:])[:1]:
        at = _positions(sentence.text, caption)
        for phrase in sentence.phrases:
            if phrase.chain in picture.boxes.of_chain:
                words = sentence.text[phrase.start : phrase.end]
                places = [at[i] for i in range(phrase.start, phrase.end) if i in at]
                start, end = (places[0], places[-1] + 1) if places else (0, 0)
                same = _letters(caption[start:end]) == _letters(words)
                yield Placed(phrase, words, (start, end) if same else None)


def _letters(text: str) -> str:
    return "".join(text.split())


def _positions(sentence: str, caption: str) -> dict[int, int]:
    """Where in the caption the characters of a sentence stand, spaces aside; those that it lacks are left out."""
    here, there = ([i for i, character in enumerate(text) if not character.isspace()] for text in (sentence, caption))
    if _letters(sentence) == _letters(caption):
        return dict(zip(here, there, strict=True))
    blocks = SequenceMatcher(None, _letters(sentence), _letters(caption), autojunk=False).get_matching_blocks()
    return {here[block.a + i]: there[block.b + i] for block in blocks for i in range(block.size)}
