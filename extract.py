"""Stage 1: what Stable Diffusion looks at for every word of every picture's text, stored for stage 2.

    python extract.py --data toy                                     any machine, minutes
    python extract.py --data flickr30k --data_root ~/flickr30k       Stable Diffusion v1.4, one GPU
    accelerate launch extract.py --data flickr30k ...                several GPUs; each writes its own shards

Stopped or killed, start it again with the same arguments: it goes on where it was, with the same maps.
"""

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from tqdm import tqdm

from lavender_min import data
from lavender_min.data import Example
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import MAX_ENTROPY, MapStore, MapWriter, entropy
from lavender_min.teachers import attention_maps, stable_diffusion
from lavender_min.words import find_words


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("extract.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, choices=list(data.SOURCES), help="which data set")
    add("--data_root", help="where its files are: a folder, or a copy's hub id (default: data/<data>)")
    add("--split", help="which part of it (default: the part for training)")
    add("--captions", choices=["first", "all"], help="captions (flickr30k: first) or questions (ocrvqa30k: all)")
    add("--limit", type=positive, help="only the first so many examples")
    add("--maps", help="folder to write (default: maps/<data>)")
    add("--sd", help=f"Stable Diffusion: model name or pipeline folder (default: {data.SOURCES['flickr30k'].sd})")
    add("--recipe", choices=list(attention_maps.RECIPES), default="paper", help="how it is asked (default: paper)")
    add("--timesteps", type=time_steps, help="noise: time steps, e.g. 51,151,301 (the default)")
    add("--draws", type=positive, help="noise: noisy copies of a picture at each time step (default: 1)")
    add(
        "--frame",
        choices=attention_maps.FRAMES,
        default="whole",
        help="the whole picture, or its centre (default: whole)",
    )
    add("--resolutions", type=layer_weights, help="layer weights by side, e.g. 16:1,8:0.5 (default: all layers alike)")
    add("--content_norm", action="store_true", help="divide each pixel by what all the words' tokens get there")
    add("--batch_size", type=batch_size, default=8, help="pictures at once; auto: what fits the GPU (default: 8)")
    add("--dtype", choices=list(stable_diffusion.DTYPES), help="the UNet's numbers (default: fp16 on a GPU, else fp32)")
    add("--compile", action="store_true", help="torch.compile the UNet: minutes at the start, then faster passes")
    add("--shard_size", type=positive, default=512, help="pictures a file; a kill loses at most as many (default: 512)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def time_steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        steps = [-1]
    if not all(0 <= step < 1000 for step in steps):
        raise argparse.ArgumentTypeError(f"expected time steps from 0 to 999 such as 51,151,301, got {text!r}")
    return steps


def layer_weights(text: str) -> dict[int, float]:
    try:
        weights = {int(side): float(weight) for side, weight in (part.split(":") for part in text.split(","))}
        if not (min(weights.values()) >= 0 and 0 < max(weights.values()) < float("inf")):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected side:weight pairs such as 16:1,8:0.5, got {text!r}") from None
    return weights


def recipe_of(args: argparse.Namespace, sd_name: str) -> dict[str, Any]:
    """Everything that decides what the maps are: stored as recipe.json and compared when a run goes on.

    What stands under "made_with" moves the last digits only, and may differ.
    """
    settings = dict(attention_maps.RECIPES[args.recipe].settings)
    for name in ("timesteps", "draws"):
        if getattr(args, name) is not None:
            if name not in settings:
                raise ValueError(f"--recipe {args.recipe} takes no --{name}")
            settings[name] = getattr(args, name)
    package = Path(data.__file__).parents[2]
    folder = Path(sd_name).resolve()
    if folder.is_dir():  # a folder that ships with the package keeps its name when the package moves
        sd_name = str(folder.relative_to(package)) if folder.is_relative_to(package) else str(folder)
    return {
        "data": args.data,
        "sd": sd_name,
        "recipe": args.recipe,
        "settings": settings,
        "resolutions": args.resolutions and {str(side): weight for side, weight in args.resolutions.items()},
        "content_norm": args.content_norm,
        "frame": args.frame,
        "map_side": MAP_SIDE,
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def choose_batch_size(wish: int | str, maps: Path, sd: attention_maps.StableDiffusion, recipe: dict[str, Any]) -> int:
    """`auto`: what the store was begun with, so that a run that goes on cuts the same batches; else what fits the GPU."""
    if wish != "auto":
        return int(wish)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no store yet, or one whose fault MapWriter will name
        return MapStore(maps).recipe["made_with"]["batch_size"]
    if sd.unet.device.type != "cuda":
        return 8
    return stable_diffusion.fitting_batch(lambda pictures: heaviest_batch(sd, recipe, pictures))


def heaviest_batch(sd: attention_maps.StableDiffusion, recipe: dict[str, Any], pictures: int) -> None:
    """No batch of so many pictures needs more memory than one whose windows are full of words of one token each."""
    texts = [{"answer": "a " * (sd.tokenizer.model_max_length - 2)}] * pictures
    pixels = torch.zeros(pictures, 3, sd.side, sd.side)
    attention_maps.word_maps(sd, pixels, texts, [""] * pictures, recipe["recipe"], recipe["settings"])


def batches_of(examples: list[Example], size: int, done: Iterable[str], state: PartialState) -> list[list[Example]]:
    """This process's batches that are not done yet.

    The cut into batches depends neither on what is done nor on how many processes there are, and a batch is run whole
    or not at all: numbers that are added up in the same company round the same way, so a run that was broken off gives
    bit for bit the same maps, and a process that died can have its share taken up by any later run.
    """
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    mine = batches[state.process_index :: state.num_processes]
    return [batch for batch in mine if any(example.id not in done for example in batch)]


def read_ahead(
    batches: list[list[Example]], side: int, frame: str, pool: ThreadPoolExecutor, ahead: int = 2
) -> Iterator[tuple[list[Example], list[torch.Tensor | Exception]]]:
    """The batches with their pictures, which are opened and resized while the model works on earlier ones."""

    def read(example: Example) -> torch.Tensor | Exception:
        try:
            return attention_maps.frame_image(example.image(), side, frame)
        except data.BROKEN_PICTURE as error:
            return error

    waiting: deque[tuple[list[Example], list[Future]]] = deque()
    for batch in batches:
        waiting.append((batch, [pool.submit(read, example) for example in batch]))
        if len(waiting) > ahead:
            batch, pictures = waiting.popleft()
            yield batch, [picture.result() for picture in pictures]
    for batch, pictures in waiting:
        yield batch, [picture.result() for picture in pictures]


def announce(
    args: argparse.Namespace, examples: list[Example], recipe: dict[str, Any], maps: Path, done: Iterable[str],
    sd: attention_maps.StableDiffusion, state: PartialState,
) -> None:  # fmt: skip
    passes, batch = attention_maps.RECIPES[args.recipe].passes(recipe["settings"]), recipe["made_with"]["batch_size"]
    todo = [example for example in examples if example.id not in done]
    words = sum(len(find_words(example.fields)) for example in todo)
    disk = (words * MAP_SIDE**2 * 2 + len(todo) * 1000) / 1e6  # MB: float16 maps, and 1 kB of text a picture
    free = shutil.disk_usage(maps).free / 1e6
    print(
        f"{len(examples):,} pictures of {args.data}, {len(examples) - len(todo):,} done already; the rest has {words:,} "
        f"words\n{recipe['sd']}, recipe {args.recipe}: {passes} UNet passes a picture, {passes * len(todo):,} in all, "
        f"{batch} pictures at once in {recipe['made_with']['dtype']}\n"
        f"maps go to {maps}: about {disk:,.0f} MB more; {free:,.0f} MB are free"
        + (
            ": too little; the run will stop when they are used up, and go on where there is room"
            if disk > free
            else ""
        ),
        flush=True,
    )
    together = batch if state.device.type == "cuda" else 1
    seconds = stable_diffusion.seconds_a_pass(sd, together) / together * passes * len(todo) / state.num_processes
    print(f"expected time on {state.num_processes} x {state.device.type}: about {clock(seconds)}", flush=True)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{max(minutes, 1)} min"


@dataclass
class Tally:
    """What this run has done so far."""

    stored: int = 0
    words: int = 0
    entropy: float = 0.0  # nats, summed over words
    skipped: dict[str, str] = field(default_factory=dict)  # id ─► why
    times: dict[str, float] = field(default_factory=dict)  # seconds by phase
    began: float = field(default_factory=time.time)

    def summary(self, maps: Path) -> str:
        text = f"{self.stored:,} pictures stored in {maps}, {len(self.skipped):,} skipped"
        if self.stored:
            rate = self.stored / (time.time() - self.began)
            text += f"; {rate:.2g} pictures/s, {self.words / self.stored:.1f} words a picture"
        if self.words:
            text += f"; mean map entropy {self.entropy / self.words:.2f} of {MAX_ENTROPY:.2f} nats"
        total = sum(self.times.values()) or 1
        text += "\ntime: " + ", ".join(f"{phase} {spent / total:.0%}" for phase, spent in self.times.items())
        if torch.cuda.is_available():
            text += f"; at most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of GPU memory"
        return text


def run(
    args: argparse.Namespace, sd: attention_maps.StableDiffusion, settings: dict[str, Any], batches: list[list[Example]],
    writer: MapWriter, tally: Tally, bar: tqdm,
) -> None:  # fmt: skip
    """Make and store the maps of these batches."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead = read_ahead(batches, sd.side, args.frame, pool)
        for _ in batches:
            with attention_maps.timed(tally.times, "waiting for pictures"):
                batch, pictures = next(ahead)
            new = {example.id for example in batch if example.id not in writer.done}
            whole, pixels = [], []
            for example, picture in zip(batch, pictures, strict=True):
                if isinstance(picture, torch.Tensor):
                    whole.append(example)
                    pixels.append(picture)
                else:
                    tally.skipped[example.id] = " ".join(f"{type(picture).__name__}: {picture}".split())
            if any(example.id in new for example in whole):
                found = attention_maps.word_maps(
                    sd,
                    torch.stack(pixels),
                    [example.fields for example in whole],
                    [example.id for example in whole],
                    args.recipe,
                    settings,
                    args.resolutions,
                    args.content_norm,
                    tally.times,
                )
                with attention_maps.timed(tally.times, "storing"):
                    for example, result in zip(whole, found, strict=True):
                        if example.id in new:
                            writer.add(example.id, example.question, example.answer, *result)
                            tally.stored += 1
                            tally.words += len(result.words)
                            tally.entropy += entropy(result.maps).sum().item()
            bar.set_postfix(
                words=f"{tally.words / max(tally.stored, 1):.1f}", skipped=len(tally.skipped), refresh=False
            )
            bar.update(len(new))


def fail(message: object, code: int = 2) -> int:
    print(f"extract.py: {message}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())
    try:
        examples = data.load(args.data, args.data_root, args.split, args.captions)[: args.limit]
        sd_name = args.sd or data.SOURCES[args.data].sd
        recipe = recipe_of(args, sd_name)
        sd = attention_maps.load(sd_name, state.device, args.dtype)
        attention_maps.check_resolutions(sd, args.resolutions)
        maps = Path(args.maps or f"maps/{args.data}")
        if args.compile:
            sd.unet.compile()
        # One process chooses the batch size and writes it down; the others find it there and cut the same batches.
        with state.main_process_first() if args.batch_size == "auto" else contextlib.nullcontext():
            size = choose_batch_size(args.batch_size, maps, sd, recipe)
            recipe["made_with"] |= {"batch_size": size, "dtype": str(sd.unet.dtype).removeprefix("torch.")}
            writer = MapWriter(maps, recipe, args.shard_size, state.process_index)
    except (OSError, ValueError) as error:
        return fail(error)
    if state.is_main_process:
        announce(args, examples, recipe, maps, writer.done, sd, state)

    batches, tally = batches_of(examples, size, writer.done, state), Tally()
    todo = sum(example.id not in writer.done for batch in batches for example in batch)
    bar = tqdm(total=todo, unit=" pictures", disable=not state.is_local_main_process, smoothing=0.1)
    try:
        with writer, bar:
            run(args, sd, recipe["settings"], batches, writer, tally, bar)
    except OSError as error:  # a full or vanished disk
        return fail(error)
    except torch.OutOfMemoryError:
        return fail(f"out of GPU memory at --batch_size {size}: try a smaller one")
    except KeyboardInterrupt:
        return fail("stopped; what is done is stored, the same command goes on", 130)

    process = f"process {state.process_index}: " if state.num_processes > 1 else ""
    print(process + tally.summary(maps))
    if tally.skipped:
        listing = maps / f"skipped-r{state.process_index:03d}.txt"
        listing.write_text("".join(f"{id}\t{reason}\n" for id, reason in tally.skipped.items()))
        for id, reason in list(tally.skipped.items())[:10]:
            print(f"skipped {id}: {reason}")
        print(f"all skipped pictures are listed in {listing}")
    if todo and len(tally.skipped) == sum(len(batch) for batch in batches):
        return fail("no picture could be read: see the list above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
