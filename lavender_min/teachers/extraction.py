"""The run that fills a map store: it takes a list of examples and makes the maps of those that the store lacks.

The examples are cut into batches, always the same ones, and a process runs its share of them. While the UNet works on one
batch, the pictures of the next are opened. A picture that cannot be opened is skipped, counted and listed.
"""

import contextlib
import importlib.metadata
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lavender_min import data
from lavender_min.data import Example, picture_digest
from lavender_min.failing import naming, one_line
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import MAX_ENTROPY, MapStore, MapWriter, entropy, find_stale
from lavender_min.maps.store import read_recipe
from lavender_min.teachers import Recipe, attention_maps, find_recipe, stable_diffusion
from lavender_min.teachers.attention_maps import Stopwatch, WordMaps
from lavender_min.teachers.flags import ExtractionFlags
from lavender_min.teachers.stable_diffusion import StableDiffusion
from lavender_min.words import find_words

# A single picture may have odd maps; after so many it is time to wonder about the teacher.
ENOUGH = 4


class Picture(NamedTuple):
    """A framed picture, and which one it is."""

    pixels: Float[Tensor, "3 side side"]
    digest: str


def extract(flags: ExtractionFlags, examples: list[Example]) -> int:
    """Make and store the maps of all examples that the store lacks, and say so; the command's exit code.

    Raises OSError or ValueError, in one line, for a model, a store or a picture that cannot be used.
    """
    state, recipe = PartialState(cpu=not torch.accelerator.is_available()), flags.chosen_recipe()
    sd = stable_diffusion.load(flags.sd_name, state.device, flags.dtype)
    with naming(f"--sd {flags.sd_name}", "is it a pipeline of Stable Diffusion?"):
        attention_maps.try_out(sd)
    attention_maps.check_resolutions(sd, recipe)
    if flags.compile:
        sd.unet.compile()
    # One process chooses the batch size and writes it down; the others find it there and cut the same batches.
    with state.main_process_first() if flags.batch_size == "auto" else contextlib.nullcontext():
        size = choose_batch_size(flags, sd, recipe)
        contents = recipe_file(flags, recipe)
        contents["made_with"] |= {"batch_size": size, "dtype": str(sd.unet.dtype).removeprefix("torch.")}
        writer = MapWriter(flags.maps_folder, contents, flags.shard_size, state.process_index)
    too_long = longer_texts(examples, flags.max_words)
    examples = [example for example in examples if example.id not in too_long]
    with writer:
        share = batches_of(examples, size, state.process_index, state.num_processes)
        there = MapStore(writer.path)
        # Half a second for a gigabyte of maps: better here than when they train.
        there.read_through(state.process_index, state.num_processes)
        changed = find_stale(chain.from_iterable(share), there.origins())
        writer.remake(changed)
        if changed:
            print(
                f"{len(changed):,} pictures or texts are others than those their maps were made from; these maps are made again"
            )
        todo = [batch for batch in share if any(example.id not in writer.done for example in batch)]
        pictures = sum(example.id not in writer.done for batch in todo for example in batch)
        try:
            # It times a pass of a whole batch.
            if state.is_main_process:
                announce(examples, writer, contents, sd, state.num_processes)
            with tqdm(total=pictures, unit=" pictures", disable=not state.is_local_main_process, smoothing=0.1) as bar:
                tally = fill(writer, sd, recipe, todo, bar)
        except torch.OutOfMemoryError:
            raise ValueError(f"out of GPU memory at --batch_size {size}: try a smaller one") from None
    if state.is_main_process:
        tally.skipped |= too_long
    print((f"process {state.process_index}: " if state.num_processes > 1 else "") + tally.summary(writer.path))
    list_skipped(tally.skipped, writer.path / f"skipped-r{state.process_index:03d}.txt")
    # One of several may have no batch, or only broken pictures: an error of its own would end the others' work.
    if not writer.done and state.num_processes == 1:
        raise ValueError(f"nothing is stored in {writer.path}: all pictures were skipped, see the list above")
    return 0


def recipe_file(flags: ExtractionFlags, recipe: Recipe) -> dict[str, Any]:
    """The contents of recipe.json: all that decides what the maps are. A run that goes on must have the same.

    What stands under "made_with" moves the last digits only, or says where the store was begun, and may differ.
    """
    sd_name = flags.sd_name
    package, folder = Path(data.__file__).parents[2], Path(os.path.realpath(sd_name))
    # A folder that ships with the package keeps its name when the package moves.
    if folder.is_dir():
        sd_name = str(folder.relative_to(package)) if folder.is_relative_to(package) else str(folder)
    weights = recipe.resolutions
    return {
        "data": flags.data,
        "sd": sd_name,
        "recipe": recipe.name,
        "settings": dict(recipe.settings),
        "resolutions": None if weights is None else {str(side): weight for side, weight in weights.items()},
        "content_norm": recipe.content_norm,
        "frame": recipe.frame,
        "map_side": MAP_SIDE,
        "made_with": {
            **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
            "data_root": flags.data_root,
        },
    }


# ---- batches ---------------------------------------------------------------------------------------------------------


def choose_batch_size(flags: ExtractionFlags, sd: StableDiffusion, recipe: Recipe) -> int:
    """How many pictures are run together. `auto`: as many as when the store was begun, else as many as fit the GPU."""
    if flags.batch_size != "auto":
        return int(flags.batch_size)
    # There may be no store yet. One that is broken will be named by MapWriter.
    with contextlib.suppress(OSError, ValueError, KeyError):
        return read_recipe(flags.maps_folder)["made_with"]["batch_size"]
    if sd.unet.device.type != "cuda":
        return 8
    return stable_diffusion.fitting_batch(lambda pictures: heaviest_batch(sd, recipe, pictures))


def heaviest_batch(sd: StableDiffusion, recipe: Recipe, pictures: int) -> None:
    """Run a batch that needs as much memory as any batch of so many pictures can.

    Memory grows with the words of a window. There are most of them in a full window where each word is one token.
    """
    texts = [{"answer": "a " * (sd.tokenizer.model_max_length - 2)}] * pictures
    attention_maps.word_maps(sd, torch.zeros(pictures, 3, sd.side, sd.side), texts, [""] * pictures, recipe)


def batches_of(examples: list[Example], size: int, rank: int, processes: int) -> list[list[Example]]:
    """The batches of process `rank`.

    The cut into batches depends neither on what is done nor on the number of processes, and a batch is run whole or not at
    all. Two things follow. A picture's maps are the same bit for bit however often the run was broken off, as floating-point
    sums may round differently in a batch of another size. And what a process that died has left undone, any later run finds.
    """
    return [examples[i : i + size] for i in range(0, len(examples), size)][rank::processes]


def longer_texts(examples: list[Example], most: int | None) -> dict[str, str]:
    """{id: why it is left out} of the examples whose text has more words than `most`."""
    if most is None:
        return {}
    words = {example.id: len(find_words(example.fields)) for example in examples}
    return {id: f"its text has {count:,} words, --max_words is {most:,}" for id, count in words.items() if count > most}


def read_ahead(
    batches: list[list[Example]], side: int, frame: str, pool: ThreadPoolExecutor, ahead: int = 2
) -> Iterator[list[Picture | Exception]]:
    """The pictures of each batch, which are opened and resized while the model works on earlier batches."""

    def framed(example: Example) -> Picture | Exception:
        try:
            # Should the file change in between, the digest is the older one's, and the next run makes the maps again.
            digest = picture_digest(example)
            return Picture(attention_maps.frame_image(example.image(), side, frame), digest)
        except OSError as error:
            return error
        except data.BROKEN_PICTURE as error:
            return error

    waiting: deque[list[Future[Picture | Exception]]] = deque()
    for batch in batches:
        waiting.append([pool.submit(framed, example) for example in batch])
        if len(waiting) > ahead:
            yield [picture.result() for picture in waiting.popleft()]
    for pictures in waiting:
        yield [picture.result() for picture in pictures]


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What this run has done so far."""

    stored: int = 0
    words: int = 0

    # Nats, summed over words.
    entropy: float = 0.0

    # Pictures whose maps were not finite.
    overflowed: int = 0

    # Id ─► why.
    skipped: dict[str, str] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)
    began: float = field(default_factory=time.time)

    def summary(self, maps: Path) -> str:
        text = f"{self.stored:,} pictures stored in {maps}, {len(self.skipped):,} skipped"
        if self.stored:
            rate = self.stored / (time.time() - self.began)
            text += f"; {rate:.2g} pictures/s, {self.words / self.stored:.1f} words a picture"
        if self.words:
            text += f"; mean map entropy {self.entropy / self.words:.2f} of {MAX_ENTROPY:.2f} nats"
        seconds = self.watch.seconds
        total = sum(seconds.values()) or 1
        text += "\ntime: " + ", ".join(f"{phase} {spent / total:.0%}" for phase, spent in seconds.items())
        if torch.cuda.is_available():
            text += f"; at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of GPU memory"
        return text


def fill(writer: MapWriter, sd: StableDiffusion, recipe: Recipe, batches: list[list[Example]], bar: tqdm) -> Tally:
    """Make and store the maps of these batches."""
    tally = Tally()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead = read_ahead(batches, sd.side, recipe.frame, pool)
        for batch in batches:
            with tally.watch("waiting for pictures"):
                pictures = next(ahead)
            whole, framed = [], []
            for example, picture in zip(batch, pictures, strict=True):
                if isinstance(picture, Exception):
                    tally.skipped[example.id] = one_line(picture)
                else:
                    whole.append(example)
                    framed.append(picture)
            new = {example.id for example in batch if example.id not in writer.done}
            if any(example.id in new for example in whole):
                texts, ids = [example.fields for example in whole], [example.id for example in whole]
                pixels = torch.stack([picture.pixels for picture in framed])
                recorded = attention_maps.record(sd, pixels, texts, ids, recipe, partial(tell, bar, len(batch)))
                tally.watch.add(recorded.seconds)
                with tally.watch("combining"):
                    found = attention_maps.combine(recorded, recipe)
                with tally.watch("storing"):
                    for example, picture, of in zip(whole, framed, found, strict=True):
                        if example.id in new:
                            store(writer, tally, example, picture.digest, of)
                stop_at_overflow(tally, sd, ENOUGH)
            words = f"{tally.words / max(tally.stored, 1):.1f}"
            bar.set_postfix(words=words, skipped=len(tally.skipped), refresh=False)
            bar.update(len(new))
    stop_at_overflow(tally, sd, 1)
    return tally


def tell(bar: tqdm, pictures: int, windows: int, of: int) -> None:
    """Behind the bar, how far a batch with a long text is, which alone may take minutes: one of many windows a picture."""
    if of > 4 * pictures:
        bar.set_postfix_str(f"{windows:,} of {of:,} windows of these texts")


def store(writer: MapWriter, tally: Tally, example: Example, digest: str, of: WordMaps) -> None:
    """Keep the maps of one example, if they are numbers."""
    if not (of.maps.isfinite().all() and math.isfinite(of.sos)):
        tally.overflowed += 1
        tally.skipped[example.id] = "its maps are not finite"
        return
    writer.add(example.id, example.question, example.answer, of.words, of.maps, of.sos, digest)
    tally.stored += 1
    tally.words += len(of.words)
    tally.entropy += entropy(of.maps).sum().item()


def stop_at_overflow(tally: Tally, sd: StableDiffusion, least: int) -> None:
    """Raises ValueError if so many pictures at least, and more than half of all that were run, have maps that are not finite."""
    run = tally.stored + tally.overflowed
    if tally.overflowed >= least and 2 * tally.overflowed > run:
        dtype = str(sd.unet.dtype).removeprefix("torch.")
        raise ValueError(
            f"the maps of {tally.overflowed} of {run} pictures are not finite: Stable Diffusion's numbers overflow in {dtype} "
            "(try --dtype fp32 or bf16), or its weights are damaged"
        )


# ---- what is said ----------------------------------------------------------------------------------------------------


def announce(
    examples: Sequence[Example], writer: MapWriter, contents: dict[str, Any], sd: StableDiffusion, processes: int
) -> None:
    """Before the run: how much there is to do, how, where it goes, and how long it may take."""
    todo = [example for example in examples if example.id not in writer.done]
    words = {example.id: len(find_words(example.fields)) for example in todo}
    total, longest = sum(words.values()), ""
    if words:
        id = max(words, key=lambda id: words[id])
        longest = f", the longest text {words[id]:,} ({id})"
    passes = find_recipe(contents["recipe"]).passes(contents["settings"])
    batch, dtype = contents["made_with"]["batch_size"], contents["made_with"]["dtype"]
    # In megabytes: maps of float16, and about 1 kB of text a picture.
    needed = (total * MAP_SIDE**2 * 2 + len(todo) * 1000) / 1e6
    free = shutil.disk_usage(writer.path).free / 1e6
    print(
        f"{len(examples):,} pictures of {contents['data']}, {len(examples) - len(todo):,} done already; "
        f"the rest has {total:,} words{longest}\n"
        f"{contents['sd']}, recipe {contents['recipe']}: {passes} UNet passes a picture, {passes * len(todo):,} in all, "
        f"{batch} pictures at once in {dtype}\n"
        f"maps go to {writer.path}: about {needed:,.0f} MB more; {free:,.0f} MB are free"
        + (": too little; the run will stop when they are used up, and go on where there is room" * (needed > free)),
        flush=True,
    )
    device = sd.unet.device.type
    together = batch if device == "cuda" else 1
    seconds = stable_diffusion.seconds_a_pass(sd, together) / together * passes * len(todo) / processes
    print(f"expected time on {processes} x {device}: about {clock(seconds)}", flush=True)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def list_skipped(skipped: dict[str, str], listing: Path) -> None:
    """After the run: the first skipped pictures on the screen, all of them in a file."""
    if not skipped:
        # An earlier run's: what it lists has been stored since.
        listing.unlink(missing_ok=True)
    else:
        listing.write_text("".join(f"{id}\t{reason}\n" for id, reason in skipped.items()))
        for id, reason in list(skipped.items())[:10]:
            print(f"skipped {id}: {reason}")
        print(f"all skipped pictures are listed in {listing}")
