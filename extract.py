"""Stage 1: what Stable Diffusion looks at for every word of every picture's text, stored for stage 2.

    python extract.py --data toy                                     any machine, minutes
    python extract.py --data flickr30k --data_root ~/flickr30k       Stable Diffusion v1.4, one GPU
    accelerate launch extract.py --data flickr30k ...                several GPUs; each writes its own shards

Stopped or killed, start it again with the same arguments: it goes on where it was, with the same maps.
"""

import argparse
import importlib.metadata
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from tqdm import tqdm

from lavender_min import data, diffusion
from lavender_min.data import Example
from lavender_min.geometry import MAP_SIDE
from lavender_min.maps import MAX_ENTROPY, MapWriter, entropy
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
    add("--recipe", choices=list(diffusion.RECIPES), default="paper", help="how it is asked (default: paper)")
    add("--timesteps", type=time_steps, help="noise: time steps, e.g. 51,151,301 (the default)")
    add("--draws", type=positive, help="noise: noisy copies of a picture at each time step (default: 1)")
    add("--frame", choices=diffusion.FRAMES, default="whole", help="the whole picture, or its centre (default: whole)")
    add("--resolutions", type=layer_weights, help="layer weights by side, e.g. 16:1,8:0.5 (default: all layers alike)")
    add("--batch_size", type=positive, default=8, help="pictures at once (default: 8)")
    add("--shard_size", type=positive, default=512, help="pictures a file; a kill loses at most as many (default: 512)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


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
    """Everything that decides what the maps are: stored as recipe.json and compared when a run goes on."""
    settings = dict(diffusion.RECIPES[args.recipe].settings)
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
        "frame": args.frame,
        "map_side": MAP_SIDE,
        "made_with": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    }


def batches_of(examples: list[Example], size: int, done: set[str], state: PartialState) -> list[list[Example]]:
    """This process's batches that are not done yet.

    The cut into batches never depends on what is done, and a batch is run whole or not at all: numbers that are added
    up in the same company round the same way, so a run that was broken off gives bit for bit the same maps.
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
            return diffusion.frame_image(example.image(), side, frame)
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
    args: argparse.Namespace, examples: list[Example], recipe: dict[str, Any], maps: Path, done: set[str],
    sd: diffusion.StableDiffusion, state: PartialState,
) -> None:  # fmt: skip
    passes = diffusion.RECIPES[args.recipe].passes(recipe["settings"])
    words = sum(len(find_words(example.fields)) for example in examples)
    megabytes = (words * MAP_SIDE**2 * 2 + len(examples) * 1000) / 1e6  # float16 maps, and 1 kB of text a picture
    todo = sum(example.id not in done for example in examples)
    print(
        f"{len(examples):,} pictures of {args.data}, {words:,} words; {recipe['sd']}, recipe {args.recipe}: "
        f"{passes} UNet passes a picture, {passes * len(examples):,} in all\n"
        f"maps go to {maps}: about {megabytes:,.0f} MB; {len(examples) - todo:,} pictures are done already",
        flush=True,
    )
    together = args.batch_size if state.device.type == "cuda" else 1
    seconds = diffusion.seconds_a_pass(sd, together) / together * passes * todo / state.num_processes
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
    began: float = field(default_factory=time.time)

    def summary(self, maps: Path) -> str:
        text = f"{self.stored:,} pictures stored in {maps}, {len(self.skipped):,} skipped"
        if self.stored:
            rate = self.stored / (time.time() - self.began)
            text += f"; {rate:.2g} pictures/s, {self.words / self.stored:.1f} words a picture"
        if self.words:
            text += f"; mean map entropy {self.entropy / self.words:.2f} of {MAX_ENTROPY:.2f} nats"
        return text


def run(
    args: argparse.Namespace, sd: diffusion.StableDiffusion, settings: dict[str, Any], batches: list[list[Example]],
    writer: MapWriter, tally: Tally, bar: tqdm,
) -> None:  # fmt: skip
    """Make and store the maps of these batches."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for batch, pictures in read_ahead(batches, sd.side, args.frame, pool):
            new = {example.id for example in batch if example.id not in writer.done}
            whole, pixels = [], []
            for example, picture in zip(batch, pictures, strict=True):
                if isinstance(picture, torch.Tensor):
                    whole.append(example)
                    pixels.append(picture)
                else:
                    tally.skipped[example.id] = " ".join(f"{type(picture).__name__}: {picture}".split())
            if any(example.id in new for example in whole):
                found = diffusion.word_maps(
                    sd,
                    torch.stack(pixels),
                    [example.fields for example in whole],
                    [example.id for example in whole],
                    args.recipe,
                    settings,
                    args.resolutions,
                )
                for example, result in zip(whole, found, strict=True):
                    if example.id in new:
                        writer.add(example.id, example.question, example.answer, *result)
                        tally.stored += 1
                        tally.words += len(result.words)
                        tally.entropy += entropy(result.maps).sum().item()
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
        sd = diffusion.load(sd_name, state.device)
        diffusion.check_resolutions(sd, args.resolutions)
        maps = Path(args.maps or f"maps/{args.data}")
        writer = MapWriter(maps, recipe, args.shard_size, state.process_index)
    except (OSError, ValueError) as error:
        return fail(error)
    if state.is_main_process:
        announce(args, examples, recipe, maps, writer.done, sd, state)

    batches, tally = batches_of(examples, args.batch_size, writer.done, state), Tally()
    todo = sum(example.id not in writer.done for batch in batches for example in batch)
    bar = tqdm(total=todo, unit=" pictures", disable=not state.is_local_main_process, smoothing=0.1)
    try:
        with writer, bar:
            run(args, sd, recipe["settings"], batches, writer, tally, bar)
    except OSError as error:  # a full or vanished disk
        return fail(error)
    except torch.OutOfMemoryError:
        return fail(f"out of GPU memory at --batch_size {args.batch_size}: try a smaller one")
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
