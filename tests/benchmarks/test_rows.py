"""What one long word costs: eight texts of 63 words, one of which ends in a word of ninety tokens, against the same without it.

Rows are one flat list, so the long word adds its own rows (the 63 words of eight texts have about 550) and multiplies nothing.
"""

import statistics
import time

import pytest
import torch
from measure import DEVICE, Row, extra_peak_mib, write
from PIL import Image

from lavender_min.data import Example
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import StoredMaps
from lavender_min.toy.models import VLM_FOLDER
from lavender_min.tuning import runs
from lavender_min.tuning.collator import Collator
from lavender_min.tuning.flags import ModelFlags
from lavender_min.words import find_words

TURNS = 5


def examples(last: str):
    """Eight texts of 63 short words; the first one's last word is `last`."""
    draw, found = torch.Generator().manual_seed(0), []
    for i in range(8):
        answer = " ".join(["red", "ring", "blue", "star", "a", "left", "of"] * 9)
        answer = answer if i else answer.rsplit(" ", 1)[0] + " " + last
        words = find_words({"answer": answer})
        assert len(words) == 63
        maps = torch.rand(63, MAP_SIDE, MAP_SIDE, generator=draw)
        example = Example(f"{i}", lambda: Image.new("RGB", (128, 128), (90, 120, 60)), "what is there?", answer)
        found.append((example, StoredMaps(example.question, answer, words, maps, 0.9)))
    return found


@pytest.mark.benchmark
def test_a_long_word_costs_its_own_rows_only(capsys):
    torch.manual_seed(0)
    model, processor = runs.build(ModelFlags(str(VLM_FOLDER), mode="qlora", match="all", lora_targets="language"))
    model.train().to(DEVICE)
    collate = Collator(processor, model.family, model.base.config)
    # A letter that the toy's tokenizer joins with no other.
    batches = {"63 words": collate(examples("of")), "and one of ninety tokens": collate(examples("q" * 90))}
    rows = {name: len(batch["words"]["rows"]) for name, batch in batches.items()}
    surplus = rows["and one of ninety tokens"] - rows["63 words"]
    assert surplus >= 80

    def step(batch):
        model(**batch)["loss"].backward()
        model.zero_grad()

    times = {name: [] for name in batches}
    for turn in range(TURNS + 1):
        for name, batch in batches.items():
            start = time.perf_counter()
            step(batch)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    peaks = {name: extra_peak_mib(lambda batch=batch: step(batch)) for name, batch in batches.items()}
    short, long = batches
    faster = statistics.median(b / a for a, b in zip(times[short], times[long], strict=True))
    larger = peaks[long] / peaks[short]
    with capsys.disabled():
        for name in batches:
            print(
                f"\n{name}: {rows[name]} rows, {statistics.median(times[name]):.0f} ms, {peaks[name]:.0f} MiB", end=""
            )
        print(f"\none long word: {faster:.2f}x time, {larger:.2f}x memory")
    found = [
        Row("one long word", f"rows {rows[name]}", name, 0, statistics.median(times[name]), 0, peaks[name], 0, 0)
        for name in batches
    ]
    write(found)
    assert faster <= 1.3 and larger <= 1.3
