"""The map store at the paper's scale: 100,000 rows of 8 words, random numbers that no compressor could shorten (1.7 GB).

Seconds are the process's own where other work keeps the processors busy, and the clock's where none does; both are printed.
"Cold" is after the system was told to forget the files, as when a store is larger than memory.
"""

import os
import pickle
import shutil
import time

import numpy as np
import psutil
import pytest
import torch

from lavender_min.maps import MapStore, MapWriter
from lavender_min.maps.__main__ import main
from lavender_min.words import find_words

# Of 8 words.
TEXT = "A brown dog runs past two children playing"


class Stopwatch:
    """Seconds and resident megabytes (what the process holds; the system's cache of files is not its own) spent inside."""

    def __enter__(self):
        self._began = time.process_time(), time.perf_counter(), psutil.Process().memory_info().rss
        return self

    def __exit__(self, *_):
        own, clock, held = self._began
        self.own, self.clock = time.process_time() - own, time.perf_counter() - clock
        self.grew = (psutil.Process().memory_info().rss - held) / 1e6
        self.seconds = self.own if os.getloadavg()[0] > 0.75 * os.cpu_count() else self.clock

    def says(self, what: str, count: int = 0) -> None:
        rate = f" = {count / self.own:,.0f} | {count / self.clock:,.0f} rows/s" * bool(count)
        print(f"{what:34} {self.own:7.2f} s own | {self.clock:7.2f} s clock{rate}; memory {self.grew:+.1f} MB")


def write(folder, rows: int) -> None:
    draw, words = torch.Generator().manual_seed(0), find_words({"answer": TEXT})
    with MapWriter(folder, {"recipe": "synthetic", "frame": "whole"}) as writer:
        for i in range(rows):
            if i % 512 == 0:
                block = torch.rand(512, len(words), 32, 32, generator=draw).half()
            writer.add(f"{i:07}.jpg#0", "", TEXT, words, block[i % 512], 0.9)


def forget(folder) -> None:
    for shard in folder.glob("*.parquet"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def figures(folder, rows: int, reads: int) -> dict[str, Stopwatch]:
    pick = np.random.default_rng(0)
    print(f"\n{rows:,} rows, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    found = {name: Stopwatch() for name in ("write", "open", "pickle", "first", "second", "cold", "check")}
    with found["write"] as watch:
        write(folder, rows)
    watch.says("write", rows)
    with found["open"] as watch:
        store = MapStore(folder)
    watch.says("open")
    assert len(store) == rows
    with found["pickle"] as watch:
        size = len(pickle.dumps(store))
        pickle.loads(pickle.dumps(store))
    watch.says(f"to a worker and back, {size / 1e6:.1f} MB")
    ids = [f"{i:07}.jpg#0" for i in pick.integers(rows, size=reads)]
    for name in ("first", "second"):
        with found[name] as watch:
            for id in ids:
                stored = store[id]
        watch.says(f"{reads:,} random reads, {name} time", reads)
    assert stored.maps.shape == (8, 32, 32) and stored.answer == TEXT and len(stored.words) == 8
    forget(folder)
    with found["cold"] as watch:
        for id in ids[: reads // 10]:
            store[id]
    watch.says(f"{reads // 10:,} random reads, cold", reads // 10)
    with found["check"] as watch:
        assert main(["check", str(folder)]) == 0
    watch.says("check", rows)
    return found


@pytest.mark.benchmark
def test_a_hundred_thousand_rows(tmp_path):
    try:
        found = figures(tmp_path, 100_000, 20_000)
    finally:
        shutil.rmtree(tmp_path)
    assert found["open"].seconds < 2 and found["pickle"].seconds < 1
    assert 20_000 / found["second"].seconds > 2_000
    # The first time opens the files.
    assert found["first"].grew < 50 and found["second"].grew < 10


def test_the_benchmark_runs(tmp_path):
    found = figures(tmp_path, 600, 1500)
    assert all(watch.own > 0 and watch.clock > 0 for watch in found.values())
    # 25 MB of maps went by.
    assert found["second"].grew < 20
