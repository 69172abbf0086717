"""`python -m lavender_min.maps check`: whether a store is whole, and whether it is still that of its data."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from lavender_min import data
from lavender_min.data import Example
from lavender_min.geometry import contrast
from lavender_min.maps.shard import Origin, Shard, StoredMaps, naming, read_origins
from lavender_min.maps.stale import find_stale
from lavender_min.maps.store import read_recipe, shard_files

# Lines of each kind of fault that are printed.
LISTED = 20


def check(
    folder: Path,
    name: str | None = None,
    root: str | None = None,
    split: str | None = None,
    captions: str | None = None,
) -> int:
    """Read every row of every shard, and print counts and faults; exit code 1 if there are any."""
    read_recipe(folder)
    examples = data.load(name, root, split, captions) if name else []
    shards = shard_files(folder)
    size = sum(shard.stat().st_size for shard in shards)
    faults: dict[str, list[str]] = defaultdict(list)
    # Id ─► the shard it stands in.
    home: dict[str, str] = {}
    origins: dict[str, Origin] = {}
    contrasts: list[np.ndarray] = []
    with tqdm(total=size, unit="B", unit_scale=True) as bar:
        for shard in shards:
            try:
                origins = read_origins(shard) | origins
                for id, stored in rows_of(shard):
                    if id in home:
                        faults["twice"].append(f"{id}: in {home[id]} and in {shard.name}")
                    home[id] = shard.name
                    contrasts.append(contrast(stored.maps).numpy())
                    for kind, bad in wrong_words(stored).items():
                        faults[kind].append(f"{id}: {', '.join(bad)}")
            except ValueError as error:
                faults["broken"].append(str(error))
            bar.update(shard.stat().st_size)
    of_words = np.concatenate(contrasts) if contrasts else np.zeros(0)
    print(f"{folder}: {len(home):,} rows, {len(of_words):,} words, {len(shards):,} shards, {size / 1e6:,.1f} MB")
    if len(of_words):
        shown = ", ".join(f"{value:.2f}" for value in np.nanquantile(of_words, (0, 0.2, 0.4, 0.6, 0.8, 1)))
        print(
            f"contrast of the maps, (largest - smallest) / mean, by fifths of the words: {shown} (see train.py --trust)"
        )
    if name:
        faults |= compare(name, examples, origins)
    for kind, lines in faults.items():
        print(f"{kind}: {len(lines):,}", *lines[:LISTED], *["…"] * (len(lines) > LISTED), sep="\n  ")
    if not faults:
        print("nothing is wrong")
    return 1 if faults else 0


def wrong_words(stored: StoredMaps) -> dict[str, list[str]]:
    """{what is wrong with a map: the words that have such a one}."""
    flat = stored.maps.flatten(1)
    kinds = {"not finite": ~flat.isfinite().all(1), "all zero": ~flat.any(1), "below zero": (flat < 0).any(1)}
    return {kind: [stored.words[i].text for i in bad.nonzero().flatten()] for kind, bad in kinds.items() if bad.any()}


def rows_of(shard: Path) -> Iterator[tuple[str, StoredMaps]]:
    """Each row of a shard with its id, read in two ways: as training does, and as any Parquet reader does, with checksums.

    Raises ValueError, naming the shard, where the two, or the ids in the footer, do not agree.
    """
    row = 0
    with naming(shard), pa.OSFile(str(shard)) as source:
        as_stored, file = Shard(shard), pq.ParquetFile(source, page_checksum_verification=True)
        for batch in file.iter_batches(64, use_threads=False):
            for id, maps in zip(batch["id"].to_pylist(), batch["maps"], strict=True):
                stored = as_stored[row]
                plain = maps.values.to_numpy().astype(np.float32)
                if not id == as_stored.ids[row] or not np.array_equal(
                    stored.maps.flatten().numpy(), plain, equal_nan=True
                ):
                    raise ValueError(f"row {row}: its id, words and maps do not fit together")
                yield id, stored
                row += 1


def compare(name: str, examples: list[Example], origins: dict[str, Origin]) -> dict[str, list[str]]:
    """The rows that are stale, as faults; what is no fault of the store is printed."""
    changed = find_stale(examples, origins)
    rows = [example.id for example in examples if example.id in origins]
    unknown = sum(not origins[id].digest for id in rows)
    print(
        f"--data {name}: {len(examples):,} examples; {len(rows):,} have maps, of which {len(changed):,} are stale; "
        f"{len(examples) - len(rows):,} have none"
        + f"; of {unknown:,} the store does not know the picture"
        * bool(unknown)
    )
    faults: dict[str, list[str]] = defaultdict(list)
    for id, what in changed.items():
        faults[f"another {what} now"].append(id)
    return faults
