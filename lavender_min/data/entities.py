"""Flickr30k Entities: which things the phrases of Flickr30k's captions name, and the boxes of these things.

The folder is what the authors' annotations.zip holds (https://github.com/BryanPlummer/flickr30k_entities):

    Sentences/<picture>.txt      a caption a line, with its phrases in brackets: [/EN#<chain>/<type>/<type>… <words>]
    Annotations/<picture>.xml    the <size> of the picture and its <object>s. Each has the <name>s of one or more chains, and
                                 either a <bndbox> or a flag: <nobndbox> (it cannot be seen), <scene> (it is the whole picture)

A chain is a thing or a group of things; phrases in all five captions may name it. If it has several boxes, they count together. If
it has none, its phrases have no region. Boxes count pixels from 1, and xmax and ymax are the last pixels inside.

The captions of Flickr30k come in several versions, which differ in spaces and quotation marks. So a phrase is found in a caption by
its characters without spaces (`_letters`), not by its offsets.
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
    """A phrase in brackets: text[start:end] of its `Sentence`."""

    start: int
    end: int
    # The first of its types, which are people, clothing, bodyparts, animals, vehicles, instruments, scene, other and notvisual.
    kind: str
    chain: str


class Sentence(NamedTuple):
    """A line of Sentences/<picture>.txt."""

    # The caption without brackets.
    text: str
    phrases: list[Phrase]


class Boxes(NamedTuple):
    """A picture's Annotations/<picture>.xml."""

    # Its width and height in pixels.
    size: tuple[int, int]
    # The boxes of each chain that has any, as polygons.
    of_chain: dict[str, list[list[float]]]


class Placed(NamedTuple):
    """A phrase that has boxes, its words, and where they stand in a caption."""

    phrase: Phrase
    words: str
    # (start, end) in the caption; None where the caption does not hold these words.
    span: tuple[int, int] | None


class Picture(NamedTuple):
    """All that the annotations say of one picture."""

    name: str
    sentences: list[Sentence]
    boxes: Boxes


def with_regions(examples: list[Example], folder: Path) -> list[Example]:
    """The same examples of Flickr30k, with regions for the words of their phrases. `folder` holds the unpacked annotations.zip.

    If a picture's files are missing or broken, its examples stay and their words have no region. Two lines on stderr count such
    pictures, and the phrases that no caption holds. Raises FileNotFoundError if `folder` is not such a folder, and the first file's
    error if no picture has whole files.
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
    made, lost, total = [], [], 0
    for example in examples:
        places = []
        if picture := of_name.get(example.picture):
            for phrase, words, span in _placed(picture, example):
                total += 1
                if span is None:
                    lost.append(f"{words!r} of {example.id}")
                else:
                    mask = partial(polygon_mask, picture.boxes.of_chain[phrase.chain], picture.boxes.size)
                    places.append(Place("answer", *span, phrase.kind, mask))
        made.append(example._replace(regions=partial(regions, example.fields, places)))
    if lost:
        say(f"--entities {folder}: {len(lost):,} of {total:,} phrases are not in the captions, the first: {lost[0]}")
    return made


def _read(folder: Path, name: str, where: str) -> Picture:
    """The two files of the picture `name`; `where` is what `keep` passes."""
    stem = Path(name).stem
    sentences = [read_sentence(line, of) for of, line in lines(folder / "Sentences" / f"{stem}.txt")]
    return Picture(name, sentences, read_boxes(folder / "Annotations" / f"{stem}.xml"))


def read_sentence(line: str, where: str) -> Sentence:
    """A caption without its brackets, and its phrases. Raises ValueError, which names `where`, for a bracket of another form."""
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
    """The boxes by chain. Raises ValueError, which names the file, for XML that is broken or holds other values."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    with naming(file):
        root = ElementTree.parse(file).getroot()
        size = (_number(root, "size/width"), _number(root, "size/height"))
        if min(size) < 1:
            raise ValueError(f"expected a picture's width and height; got {size[0]} and {size[1]}")
        for thing in root.iterfind("object"):
            if thing.find("bndbox") is not None:
                left, top, right, bottom = (_number(thing, f"bndbox/{end}") for end in ("xmin", "ymin", "xmax", "ymax"))
                # From pixels counted from 1, the last included, to the edges of the box.
                for name in thing.iterfind("name"):
                    found[name.text or ""].append(box(left - 1, top - 1, right, bottom))
    return Boxes(size, dict(found))


def _number(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path)
    if text is None or not text.strip().isdecimal():
        raise ValueError(f"<{path}>: expected a whole number; got {text!r}")
    return int(text)


def _placed(picture: Picture, example: Example) -> Iterator[Placed]:
    """The phrases with boxes of the sentence that an example's caption is.

    That is the sentence with the same letters. If there is none, it is the one whose number the example's id ends in.
    """
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
    """A text without its white space."""
    return "".join(text.split())


def _positions(sentence: str, caption: str) -> dict[int, int]:
    """{offset in the sentence: offset in the caption} of each character that both have; white space is left out."""
    here, there = ([i for i, character in enumerate(text) if not character.isspace()] for text in (sentence, caption))
    if _letters(sentence) == _letters(caption):
        return dict(zip(here, there, strict=True))
    blocks = SequenceMatcher(None, _letters(sentence), _letters(caption), autojunk=False).get_matching_blocks()
    return {here[block.a + i]: there[block.b + i] for block in blocks for i in range(block.size)}
