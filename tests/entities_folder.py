"""A small Flickr30k with Entities, in their authors' layouts. Its pictures are toy scenes, stretched to 150 × 100 pixels."""

from pathlib import Path

import numpy as np

from lavender_min.toy import data as toy

SIZE = (150, 100)
XML = """<annotation>
  <filename>{name}</filename>
  <size> <width>150</width> <height>100</height> <depth>3</depth> </size>
{objects}</annotation>
"""
BOXED = """  <object>
    {names}
    <bndbox> <xmin>{0}</xmin> <ymin>{1}</ymin> <xmax>{2}</xmax> <ymax>{3}</ymax> </bndbox>
  </object>
"""
FLAGGED = """  <object> <name>{name}</name> <scene>{scene}</scene> <nobndbox>{nobox}</nobndbox> </object>
"""


def annotation(folder: Path, stem: str, sentences: list[str], objects: str) -> None:
    for part in ("Sentences", "Annotations"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "Sentences" / f"{stem}.txt").write_text("".join(f"{sentence}\n" for sentence in sentences))
    (folder / "Annotations" / f"{stem}.xml").write_text(XML.format(name=f"{stem}.jpg", objects=objects))


def box_of(mask: np.ndarray) -> tuple[int, ...]:
    """A square mask's box in the stretched picture: first and last pixel, counted from 1."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    left, top = (
        int(first * length // len(mask)) + 1 for first, length in zip((columns[0], rows[0]), SIZE, strict=True)
    )
    right, bottom = (
        (last + 1) * length // len(mask) for last, length in zip((columns[-1], rows[-1]), SIZE, strict=True)
    )
    return left, top, int(right), int(bottom)


def toy_flickr(root: Path, scenes: int) -> tuple[Path, Path]:
    """The folders of Flickr30k and of Entities, with the captions of `scenes` held-out scenes, of which each shape has a box."""
    pictures, entities, lines = root / "flickr", root / "entities", []
    (pictures / "flickr30k-images").mkdir(parents=True)
    for i, example in enumerate(e for e in toy.load("heldout", scenes) if not e.question):
        example.image().resize(SIZE).save(pictures / "flickr30k-images" / f"{i}.jpg")
        lines.append(f"{i}.jpg#0\t{example.answer}\n")
        sentence, objects = example.answer, ""
        shapes = sorted((r for r in example.regions(128) if r.kind == "shape"), key=lambda r: -r.start)
        for chain, region in enumerate(shapes, start=1):
            phrase = f"[/EN#{chain}/{'people' if chain == 1 else 'other/scene'} {sentence[region.start : region.end]}]"
            sentence = sentence[: region.start] + phrase + sentence[region.end :]
            objects += BOXED.format(*box_of(region.mask), names=f"<name>{chain}</name>")
        annotation(entities, str(i), [sentence], objects)
    (pictures / "results_20130124.token").write_text("".join(lines))
    return pictures, entities
