"""Which rows of a store are stale: made from another text, or another picture, than their examples have now."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from lavender_min.data import BROKEN_PICTURE, Example, picture_digest
from lavender_min.maps.shard import Origin

# Pictures that are handed out at once: so many are still read when the key is pressed that stops the run.
AT_ONCE = 256


def find_stale(examples: Iterable[Example], origins: Mapping[str, Origin]) -> dict[str, str]:
    """{id: "text" or "picture"} of the examples whose row was made from another text or another picture.

    An example without a row is not stale, nor is one whose picture cannot be read, or of which the store does not know the
    picture. Texts are compared first. Then the files of the pictures are read, a gigabyte a second, but not decoded; a
    picture that several examples share is read once.
    """
    found: dict[str, str] = {}
    sharing: dict[tuple[bool, str], list[Example]] = defaultdict(list)
    for example in examples:
        origin = origins.get(example.id)
        if origin is None:
            continue
        if (example.question, example.answer) != (origin.question, origin.answer):
            found[example.id] = "text"
        elif origin.digest:
            sharing[bool(example.picture), example.picture or example.id].append(example)
    groups = list(sharing.values())
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=len(groups), desc="comparing with the store", unit=" pictures", delay=3, leave=False) as bar,
    ):
        for start in range(0, len(groups), AT_ONCE):
            some = groups[start : start + AT_ONCE]
            for group, digest in zip(some, pool.map(digest_of, (group[0] for group in some)), strict=True):
                changed = [example.id for example in group if digest and digest != origins[example.id].digest]
                found |= dict.fromkeys(changed, "picture")
            bar.update(len(some))
    return found


def digest_of(example: Example) -> str:
    """The digest of its picture; "" if it cannot be read."""
    try:
        return picture_digest(example)
    except OSError:
        return ""
    except BROKEN_PICTURE:
        return ""
