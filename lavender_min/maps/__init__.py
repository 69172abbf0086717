"""The attention-map store: what stage 1 leaves on disk and stage 2 trains on.

A store is a folder:

    recipe.json                  how the maps were made; every shard here was made that way
    maps-r000-00000.parquet      shard 0 of process 0: up to `shard_size` rows, one row an example
    maps-r000-00001.parquet      ...

A row holds id, question, answer, words (text, field, start, end), sos (the share of attention the start-of-text token
took), digest (which picture they were made from: `data.picture_digest`) and maps (float16, flattened from [w, 32, 32], raw
probabilities). The shards are ordinary Parquet:
`datasets.load_dataset("parquet", data_files="maps/flickr30k/*.parquet")` reads them.

A shard is written aside, flushed to the disk, and only then given its name. So a shard that is there is whole, and a run
killed at any moment loses at most the rows it had not yet written. The footer of a shard lists its ids, so to open a store only
the footers are read. A row is then read from its place in the file, in constant memory.

A row is stale when its example now has another text or picture. `find_stale` finds such rows, and extract.py makes their maps
again. The old row goes before the new one comes, so no id stands twice.

`python -m lavender_min.maps` checks a store, shows it, and imports the maps that the paper's authors released.
"""

from lavender_min.maps.shard import Origin, StoredMaps
from lavender_min.maps.stale import find_stale
from lavender_min.maps.store import MAX_ENTROPY, MapStore, MapWriter, entropy

__all__ = ["MAX_ENTROPY", "MapStore", "MapWriter", "Origin", "StoredMaps", "entropy", "find_stale"]
