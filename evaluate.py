"""Stage 3: where the models look and what they answer, on held-out pictures in which every word's place is known.

    python evaluate.py --data toy --seeds 3 --train "--qlora --num_train_epochs 20"     trains three pairs, then compares them
    python evaluate.py --data toy --plain runs/toy-plain --lavender runs/toy-lora       finished runs of train.py
    python evaluate.py --adapter runs/flickr30k-qlora --image my.jpg --question "What is this?"     one's own picture

With --image it prints the model's answer and draws where it looked for each word, into OUT/<name of the picture>.png. Otherwise it
writes report.md, report.json and pictures to --out. What is missing (Stable Diffusion's maps of the held-out pictures, with
--seeds the runs) is made first; stopped or killed, start it again with the same arguments and it goes on where it was.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from lavender_min import data
from lavender_min.evaluation import measures, own_picture, report
from lavender_min.hosts import base as hosts
from lavender_min.maps import MapStore
from lavender_min.toy.data import KINDS, word_masks
from lavender_min.tuning import collator, runs
from lavender_min.tuning.model import Lavender

HERE = Path(__file__).resolve().parent
OURS = ("--data", "--plain", "--seed", "--output_dir")  # flags of train.py that --seeds sets itself


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data",
        default="toy",
        choices=["toy"],
        help="the pictures; only the toy world knows where each word's thing is",
    )
    add("--plain", nargs="+", default=[], metavar="DIR", help="finished runs of train.py --plain, one a seed")
    add(
        "--lavender", nargs="+", default=[], metavar="DIR", help="finished runs of train.py, in the same order of seeds"
    )
    add("--seeds", type=positive, help="train this many pairs first, in OUT/plain-0, OUT/lavender-0, …")
    add("--train", default="", metavar="FLAGS", help="with --seeds: more flags for train.py, in quotes")
    add("--maps", help="Stable Diffusion's maps of the held-out pictures (default: maps/<data>-heldout)")
    add("--extract", default="", metavar="FLAGS", help="more flags for extract.py, which makes those maps, in quotes")
    add("--sd", help="Stable Diffusion for those maps (default: extract.py's)")
    add(
        "--image",
        metavar="FILE",
        help="one's own picture: answer about it, and draw where each word of the answer looks",
    )
    add("--question", metavar="TEXT", default="", help="with --image: what to ask (default: for a caption)")
    add(
        "--vlm",
        metavar="NAME",
        help="with --image: hub id or folder of the host (default: the adapter's, or the toy's)",
    )
    add("--adapter", metavar="DIR", help="with --image: a finished run of train.py, or a PEFT adapter")
    add("--scenes", type=positive, default=100, help="held-out pictures (default: 100)")
    add("--batch_size", type=positive, default=32, help="texts at once (default: 32)")
    add("--out", default="runs/report", help="folder for the report (default: runs/report)")
    argv = sys.argv[1:] if argv is None else list(argv)
    for i in range(len(argv) - 1, 0, -1):  # argparse takes a lone "--qlora" for a flag of our own, unless it is joined
        if argv[i - 1] in ("--train", "--extract"):
            argv[i - 1 : i + 1] = [f"{argv[i - 1]}={argv[i]}"]
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def split_flags(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r} cannot be read as flags: {error}") from None


def call(script: str, flags: list[str]) -> None:
    """Runs another stage, its progress on our own terminal."""
    print("── " + shlex.join(["python", script, *flags]), flush=True)
    code = subprocess.run([sys.executable, str(HERE / script), *flags]).returncode
    if code:
        raise ValueError(f"stopped, because {script} ended with exit code {code}; its flags were: {shlex.join(flags)}")


def held_out_maps(args: argparse.Namespace, examples: list[data.Example]) -> tuple[MapStore, list[list[str]]]:
    """The store, made or completed where it must be, and the commands that did it."""
    maps = Path(args.maps or f"maps/{args.data}-heldout")
    asked = [*(["--sd", args.sd] if args.sd else []), *split_flags("--extract", args.extract)]
    flags = ["--data", args.data, "--split", "heldout", "--limit", str(len(examples)), "--maps", str(maps), *asked]
    there = set(MapStore(maps).ids) if (maps / "recipe.json").exists() else set()
    if asked or any(example.id not in there for example in examples):  # asked: extract.py checks that the recipe fits
        call("extract.py", flags)
        return MapStore(maps), [["extract.py", *flags]]
    return MapStore(maps), []


def flags_of_pairs(args: argparse.Namespace, out: Path) -> list[str]:
    """The flags of --train, if the runs of --seeds can be made or gone on with."""
    if not args.seeds:
        if args.train:
            raise ValueError("--train is for the runs that --seeds makes: give --seeds too")
        return []
    if args.plain or args.lavender:
        raise ValueError("--seeds makes its own runs: leave out --plain and --lavender")
    more = split_flags("--train", args.train)
    taken = [flag for flag in more if flag.split("=")[0] in OURS]
    if taken:
        raise ValueError(f"--train must not hold {taken[0]}: --seeds sets {', '.join(OURS)} itself")
    note = out / "seeds.json"
    if note.exists() and json.loads(note.read_text()) != more:
        before = shlex.join(json.loads(note.read_text()))
        raise ValueError(f'{out} holds runs made with --train "{before}": take another --out, or delete it')
    if not note.exists() and any(out.glob("*-*/trainer_state.json")):
        raise ValueError(f"{out} holds runs that --seeds did not make: give them as --plain and --lavender")
    return more


def train_pairs(args: argparse.Namespace, out: Path, more: list[str]) -> list[list[str]]:
    """Makes the runs that are missing; the commands of all. Lavender comes first: if its maps are missing, that shows at once."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "seeds.json").write_text(json.dumps(more) + "\n")
    commands = []
    for seed in range(args.seeds):
        for kind, folders in (("lavender", args.lavender), ("plain", args.plain)):
            folder = out / f"{kind}-{seed}"
            plain = ["--plain"] if kind == "plain" else []
            flags = ["--data", args.data, *plain, "--seed", str(seed), "--output_dir", str(folder), *more]
            if not (folder / "trainer_state.json").exists():
                call("train.py", flags)
            folders.append(str(folder))
            commands.append(["train.py", *flags])
    return commands


def near(name: str) -> str:
    """A model that ships with this repository is named by its place in it, wherever the repository lies."""
    return str(Path(name).relative_to(HERE)) if Path(name).is_relative_to(HERE) else name


def recall(name: str, folder: str) -> tuple[report.Run, runs.ModelFlags]:
    """What a finished run was made with, or a line that says why it cannot be used."""
    flags = runs.recall(folder)
    state = Path(folder) / "trainer_state.json"
    if not state.exists():
        raise FileNotFoundError(
            f"{folder} is not finished (no trainer_state.json): start its train.py again, it goes on"
        )
    if flags.plain != (name == report.PLAIN):
        raise ValueError(
            f"{folder} was tuned {'without' if flags.plain else 'with'} alignment: give it as "
            f"--{'plain' if flags.plain else 'lavender'}"
        )
    return report.Run(
        name, folder, asdict(flags) | {"vlm": near(flags.vlm)}, json.loads(state.read_text())["log_history"]
    ), flags


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        if args.image:
            evaluate_picture(args)
            return 0
        if args.question or args.vlm or args.adapter:
            raise ValueError("--question, --vlm and --adapter are about one's own picture: give --image too")
        evaluate(args, shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]))
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def half_of_gpu() -> torch.dtype:
    """As in train.py: bf16 on a GPU that has it, fp16 on one that has not, float32 without."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def evaluate_picture(args: argparse.Namespace) -> None:
    image = own_picture.picture(args.image)  # before anything that takes time
    vlm = args.vlm if args.vlm or args.adapter else data.SOURCES[args.data].vlm
    model, processor, host, attend = own_picture.load_tuned(vlm, args.adapter, half_of_gpu())
    reply, words, maps = own_picture.ask(model, processor, host, attend, image, args.question)
    print(reply)
    if not words:
        raise ValueError(f"the answer, {reply!r}, has no words to draw")
    path = Path(args.out) / f"{Path(args.image).stem}.png"
    own_picture.draw_answer(path, image, words, maps)
    print(f"{path} shows where it looked for each word")


def evaluate(args: argparse.Namespace, command: str) -> None:
    out = Path(args.out)
    examples = data.load(args.data, split="heldout")
    texts = len(KINDS)  # about one picture
    if args.scenes * texts > len(examples):
        raise ValueError(f"--scenes {args.scenes}: there are {len(examples) // texts} held-out pictures")
    more = flags_of_pairs(args, out)
    examples = examples[: args.scenes * texts]
    given = [(report.PLAIN, args.plain), (report.LAVENDER, args.lavender)]
    checked = [recall(name, folder) for name, folders in given for folder in folders]  # before anything takes time
    store, commands = held_out_maps(args, examples)
    sheet = measures.make_sheet(examples, store, word_masks)
    if args.seeds:
        commands += train_pairs(args, out, more)
        checked = [recall(name, folder) for name, folders in given for folder in folders]
    folders = [run for run, _ in checked]
    base = checked[0][1] if checked else runs.ModelFlags(data.SOURCES[args.data].vlm)
    for run, flags in checked:
        if (flags.vlm, flags.mode) != (base.vlm, base.mode):
            raise ValueError(
                f"{run.folder} tuned {flags.vlm} by {flags.mode}, {folders[0].folder} {base.vlm} by {base.mode}"
            )

    dtype = half_of_gpu()
    models = {report.CHANCE: [measures.chance_numbers(sheet)], report.SD: [measures.map_numbers(sheet.maps, sheet)]}
    shown = {report.SD: sheet.maps}

    def take(name: str, label: str, flags: runs.ModelFlags, model: Lavender, processor, host) -> None:
        collate = collator.Collator(processor, model.host.config, host, store.recipe["frame"], "answer", flags.attend)
        numbers, maps = measures.measure(model, processor, collate, sheet, args.batch_size, label)
        models.setdefault(name, []).append(numbers["own"])
        shown.setdefault(name, maps["own"])
        if "aligned" in numbers:
            models.setdefault(report.ALIGNED, []).append(numbers["aligned"])

    vlm, processor, host = hosts.load(base.vlm, quantize=base.mode == "qlora", dtype=dtype)
    take(report.UNTUNED, report.UNTUNED, base, Lavender(vlm), processor, host)
    del vlm
    for run, flags in checked:
        take(run.name, f"{run.name} {Path(run.folder).name}", flags, *runs.build(flags, dtype, trained=run.folder))

    out.mkdir(parents=True, exist_ok=True)
    report.draw_maps(out / "maps.png", sheet, report.choose(sheet), shown)
    pictures = ["maps.png", *(["curves.png"] if report.draw_curves(out / "curves.png", folders) else [])]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "diffusers")}
    about = {
        "commands": [*(shlex.join(["python", *c]) for c in commands), command],
        "versions": {"python": ".".join(map(str, sys.version_info[:3])), **versions},
        "recipe": store.recipe,
        "host": f"{near(base.vlm)}, {'NF4, ' if base.mode == 'qlora' else ''}{str(dtype).removeprefix('torch.')}",
        "scenes": args.scenes,
    }
    report.write(out, sheet, models, folders, about, pictures)
    print("\n\n".join(filter(None, [report.main_table(models), report.differences_table(models, report.MAIN)])))
    print(f"{out / 'report.md'}, report.json and {' and '.join(pictures)} are written")


if __name__ == "__main__":
    sys.exit(main())
