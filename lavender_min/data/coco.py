"""Pictures with things marked in them, as JSON in COCO's layout: COCO's own files, and data of one's own.

    {"images":      [{"id", "file_name", "width", "height", "caption"?}, …],
     "annotations": [{"image_id", "bbox": [x, y, width, height], "segmentation"?, "category_id"?, "tokens_positive"?}, …,
                     {"image_id", "caption"}, …],
     "categories":  [{"id", "name", "supercategory"?}, …]}

A "?" marks what may be missing. Captions are entries among the annotations, as in COCO's captions_….json, or a picture has one of
its own, as in MDETR's files. A segmentation is a list of polygons, or run lengths (RLE); where it is missing, the box is taken.

A thing's words in the picture's own caption are those at "tokens_positive", [[start, end], …]. In other captions, and for a thing
without "tokens_positive", its words are wherever its category's name stands.

`--data_root` is one file, or a folder whose *.json files are read as one. With `--split val2017` two files of the folder are read,
annotations/instances_val2017.json and annotations/captions_val2017.json. Pictures are looked for in a folder named as the split, in
images/, and in the folder itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import numpy as np
from jaxtyping import Bool
from typing_extensions import TypedDict

from lavender_min.data import Example, check_captions
from lavender_min.data.pictures import open_image, picture_folder
from lavender_min.data.regions import Place, box, find_label, pixel_mask, polygon_mask, regions
from lavender_min.data.texts import Text, keep, numbered, read_json
from lavender_min.failing import naming, shaped

KIND = 'a file in COCO\'s layout, {"images": […], "annotations": […]}'

Id = int | Text


class Picture(TypedDict):
    id: Id
    file_name: Text
    width: int
    height: int
    caption: NotRequired[Text]


class Rle(TypedDict):
    size: list[int]
    counts: str | list[int]


class Annotation(TypedDict):
    image_id: Id
    caption: NotRequired[Text]
    bbox: NotRequired[list[float]]
    segmentation: NotRequired[list[list[float]] | Rle]
    category_id: NotRequired[Id]
    tokens_positive: NotRequired[list[list[int]]]


class Category(TypedDict):
    id: Id
    name: Text
    supercategory: NotRequired[Text]


class Shown(NamedTuple):
    """A picture, and where in the files its entry stands, for messages."""

    picture: Picture
    where: str


class Thing(NamedTuple):
    """Something marked in a picture."""

    # mask(side): the cells that it covers.
    mask: Callable[[int], Bool[np.ndarray, "side side"]]
    # None: of no category, or of one that the file does not name.
    category: Category | None
    # [start, end] of its words in the picture's own caption; None where the data does not say.
    spans: list[list[int]] | None


class Whole(NamedTuple):
    """The lists of all files, put together. Each entry comes with its name, "<file>, <list> <number>"."""

    images: list[tuple[str, Any]]
    annotations: list[tuple[str, Any]]
    categories: list[tuple[str, Any]]


def load(root: Path, split: str | None = None, captions: str = "first") -> list[Example]:
    """One example a picture (`captions="first"`) or a caption (`"all"`); its id is "<picture's id>#<caption index>"."""
    check_captions(captions)
    whole = _read(_files(root, split))
    if any(isinstance(entry, dict) and isinstance(entry.get("segmentation"), dict) for _, entry in whole.annotations):
        # If it is missing, one error here is better than one for each mask.
        _pycocotools()
    shown: dict[Id, Shown] = {}
    for one in keep(whole.images, _picture, "pictures"):
        # A split's two files list the same pictures, so most come twice.
        shown.setdefault(one.picture["id"], one)
    if not shown:
        raise ValueError(f"{root} lists no pictures: expected {KIND}")
    categories: dict[Id, Category] = {one["id"]: one for one in keep(whole.categories, _category, "categories")}
    # A picture's own caption stays as it is, because "tokens_positive" counts its characters; others are stripped.
    texts: dict[Id, list[str]] = {id: [of.picture["caption"]] for id, of in shown.items() if "caption" in of.picture}
    things: dict[Id, list[Thing]] = defaultdict(list)
    for entry, thing in keep(whole.annotations, partial(_annotation, shown, categories), "annotations"):
        if thing:
            things[entry["image_id"]].append(thing)
        else:
            texts.setdefault(entry["image_id"], []).append(entry["caption"].strip())
    names = [of.picture["file_name"] for of in shown.values()]
    base = root.parent if root.is_file() else root
    folder = picture_folder(base, (*([split] if split else []), "images", "."), names[:100])
    return [
        Example(
            f"{id}#{number}",
            partial(open_image, folder / of.picture["file_name"]),
            "",
            text,
            picture=of.picture["file_name"],
            regions=partial(regions, {"answer": text}, list(_places(of.picture, number, text, things[id]))),
            where=of.where,
        )
        for id, of in shown.items()
        for number, text in enumerate(texts.get(id, [""])[: 1 if captions == "first" else None])
    ]


def _files(root: Path, split: str | None) -> list[Path]:
    if root.is_file():
        return [root]
    wanted = [f"annotations/{part}_{split}.json" for part in ("instances", "captions")] if split else ["*.json"]
    found = sorted(file for pattern in wanted for file in root.glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"no COCO data in {root}: looked for {' and '.join(wanted)}; pass --data_root, the file or its folder, or with "
            "COCO's own folders --split val2017, or try --data toy"
        )
    return found


def _read(files: list[Path]) -> Whole:
    whole = Whole([], [], [])
    for file in files:
        content = read_json(file, KIND)
        if not isinstance(content, dict) or "images" not in content:
            raise ValueError(f"{file} is not {KIND}")
        for name, entries in whole._asdict().items():
            entries += [
                (where.replace(", row", f", {name}"), entry)
                for where, entry in numbered(content.get(name, []), file, KIND)
            ]
    return whole


def _picture(entry: Any, where: str) -> Shown:
    picture = shaped(entry, Picture, where)
    if min(picture["width"], picture["height"]) < 1:
        raise ValueError(f"{where}: expected a width and height; got {picture['width']} and {picture['height']}")
    return Shown(picture, where)


def _category(entry: Any, where: str) -> Category:
    return shaped(entry, Category, where)


def _annotation(
    shown: dict[Id, Shown], categories: dict[Id, Category], entry: Any, where: str
) -> tuple[Annotation, Thing | None]:
    """An annotation, and the thing it marks: None if it is a caption. Raises ValueError if it fits neither, or no picture."""
    annotation: Annotation = shaped(entry, Annotation, where)
    if annotation["image_id"] not in shown:
        raise ValueError(f"{where}: there is no picture {annotation['image_id']!r}")
    if "caption" in annotation:
        return annotation, None
    picture = shown[annotation["image_id"]].picture
    spans = annotation.get("tokens_positive")
    for span in spans or []:
        if len(span) != 2 or not 0 <= span[0] < span[1] <= len(picture.get("caption", "")):
            raise ValueError(f"{where}, tokens_positive: expected [start, end] in the picture's caption; got {span}")
    category = categories.get(annotation.get("category_id", ""))
    return annotation, Thing(_mask(annotation, (picture["width"], picture["height"]), where), category, spans)


def _mask(annotation: Annotation, size: tuple[int, int], where: str) -> Callable[[int], Bool[np.ndarray, "side side"]]:
    """mask(side) of a marked thing; `size` is the picture's width and height. Raises ValueError for numbers that do not fit."""
    polygons = annotation.get("segmentation") or []
    if isinstance(polygons, dict):
        rle, (width, height) = polygons, size
        if rle["size"] != [height, width]:
            raise ValueError(
                f"{where}, segmentation.size: expected the picture's, {[height, width]}; got {rle['size']}"
            )
        if isinstance(rle["counts"], list) and sum(rle["counts"]) != height * width:
            raise ValueError(
                f"{where}, segmentation.counts: expected {height * width} pixels; got {sum(rle['counts'])}"
            )
        return partial(rle_mask, rle, where)
    if not polygons:
        if len(bbox := annotation.get("bbox", [])) != 4:
            raise ValueError(f"{where}: expected a caption, a segmentation, or bbox: [x, y, width, height]; got {bbox}")
        left, top, across, down = bbox
        polygons = [box(left, top, left + across, top + down)]
    if odd := [polygon for polygon in polygons if len(polygon) < 6 or len(polygon) % 2]:
        raise ValueError(f"{where}, segmentation: expected polygons [x, y, x, y, …]; got one of {len(odd[0])} numbers")
    return partial(polygon_mask, polygons, size)


def rle_mask(rle: Rle, where: str, side: int) -> Bool[np.ndarray, "side side"]:
    """The cells of a mask in COCO's run-length encoding.

    Its counts say how many pixels in turn lie outside, inside, outside, …, column by column: as a list, or packed into a text.
    """
    coco = _pycocotools()
    with naming(f"{where}, segmentation"):
        packed = coco.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
        return pixel_mask(coco.decode(packed).astype(bool), side)


def _pycocotools() -> Any:
    """The module `pycocotools.mask`. Raises ValueError, in one line, if it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ValueError(
            f"--data coco: masks in RLE are read by pycocotools, which is not here ({error}); "
            "pip install 'lavender-min[coco]'"
        ) from None
    return mask


def _places(picture: Picture, number: int, text: str, things: list[Thing]) -> Iterator[Place]:
    """Where the picture's caption `text` names each thing. Of its captions, its own is number 0."""
    own = number == 0 and "caption" in picture
    for thing in things:
        category = thing.category
        if thing.spans is not None and own:
            spans = [(start, end) for start, end in thing.spans]
        else:
            spans = find_label(text, category["name"]) if category else []
        kind = (category.get("supercategory") or category["name"]) if category else ""
        yield from (Place("answer", start, end, kind, thing.mask) for start, end in spans)
