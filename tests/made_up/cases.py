"""Which command meets which broken thing: a case is drawn from (seed, number) alone, in a fresh copy of the world.

The world is a folder with data in the forms people have (the same four pictures), a Stable Diffusion, a host, maps made with
the one and a run of the other. A command works inside it, with relative names.
"""

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import mutations
import pyarrow as pa
import pyarrow.parquet as pq
from mutations import Change

from lavender_min.evaluation.flags import Flags as EvaluationFlags
from lavender_min.teachers.flags import ExtractionFlags
from lavender_min.tuning.command import trainer_flags
from lavender_min.tuning.flags import Flags as TuningFlags

OUT = "out"
PICTURES = ("1.png", "2.jpg", "3.webp", "4.bmp")

EXTRACT = "--data folder --data_root jsonl --sd sd --recipe noise --timesteps 300 --batch_size 4 --maps out".split()
TUNE = (
    "--data folder --data_root jsonl --vlm vlm --maps maps --match all --logging_steps 1 --per_device_train_batch_size 4 "
    "--disable_tqdm true".split()
)
TRAIN = [*TUNE, *"--output_dir out --max_steps 1 --save_only_model true".split()]
# The run in the world has taken one step.
GO_ON = [*TUNE, *"--output_dir run --max_steps 2".split()]
PICTURE = "--image jsonl/1.png --vlm vlm --question what --out out".split()
TUNED = "--image jsonl/1.png --adapter run --question what --out out".split()
CHECK = "check maps --data folder --data_root jsonl".split()
SHOW = "show maps --data folder --data_root jsonl --n 2 --out out.png".split()
LOCALISE = "--scenes 2 --sd sd --only paper".split()
EXPORT = ["run", "out"]


class Case(NamedTuple):
    command: str
    argv: list[str]
    change: Change
    # What the command may write to; everything else in the world stays as it is.
    writes: str = OUT
    # Whether it must end with exit code 2.
    refused: bool = False


# ---- the world ------------------------------------------------------------------------------------------------------


def write_data(world: Path, examples: list) -> None:
    """The same four pictures and captions in seven forms."""
    texts = [example.answer for example in examples]
    rows = [{"image": name, "text": text} for name, text in zip(PICTURES, texts, strict=True)]
    rows[1] = {"image": PICTURES[1], "question": "What is it?", "answer": texts[1]}
    for form in ("jsonl", "csv", "talks", "beside", "flickr30k", "ocrvqa30k", "laion50k", "rlaifv83k"):
        (world / form).mkdir()
        for name, example in zip(PICTURES, examples, strict=True):
            if form not in ("laion50k", "rlaifv83k"):
                example.image().save(world / form / name)
    (world / "jsonl/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = ["file_name,text", *(f'{name},"{text}"' for name, text in zip(PICTURES, texts, strict=True))]
    (world / "csv/metadata.csv").write_text("\n".join(table) + "\n")
    for name, text in zip(PICTURES, texts, strict=True):
        (world / "beside" / name).with_suffix(".txt").write_text(text)
    talks = [
        {"id": str(i), "image": row["image"], "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}]}
        for i, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]  # fmt: skip
    (world / "talks/talks.json").write_text(json.dumps(talks))
    said = [
        {**talk, "conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]}
        for talk, text in zip(talks, texts, strict=True)
    ]
    (world / "ocrvqa30k/ocrvqa30k.json").write_text(json.dumps(said))
    lines = [f"{name}| {n}| {text}" for name, text in zip(PICTURES, texts, strict=True) for n in range(2)]
    (world / "flickr30k/results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines) + "\n")
    keys = [f"00000000{i}" for i in range(4)]
    links = {"key": keys, "caption": texts, "status": ["success"] * 4}
    pq.write_table(pa.table(links), world / "laion50k/00000.parquet")
    with tarfile.open(world / "laion50k/00000.tar", "w") as tar:
        for key, name in zip(keys, PICTURES, strict=True):
            tar.add(world / "jsonl" / name, f"{key}.{'jpg' if name == '4.bmp' else name.rpartition('.')[2]}")
    images = [{"bytes": (world / "jsonl" / name).read_bytes(), "path": name} for name in PICTURES]
    answers = {"image": images, "question": ["What?"] * 4, "chosen": texts, "idx": list(range(4))}
    pq.write_table(pa.table(answers), world / "rlaifv83k/RLAIF-V-Dataset_000.parquet")


# ---- one function a kind of case ------------------------------------------------------------------------------------


def broken(world: Path, pattern: str, kinds: list[mutations.Mutation], rng: random.Random) -> Change:
    """One file of the world changed; Change.what says which, and how."""
    file = rng.choice(sorted(path for path in world.glob(pattern) if path.is_file() and path.stat().st_size))
    change = rng.choice(kinds)(file, rng)
    return change._replace(what=f"{file.relative_to(world)}: {change.what}")


def of_data(world: Path, rng: random.Random) -> Case:
    file, name, kinds = rng.choice(
        [
            ("jsonl/data.jsonl", "folder", mutations.JSON_LINES + mutations.TEXT),
            ("csv/metadata.csv", "folder", mutations.TABLE),
            ("talks/talks.json", "folder", mutations.JSON),
            ("beside/*.txt", "folder", mutations.TEXT),
            ("flickr30k/results.csv", "flickr30k", mutations.TEXT),
            ("ocrvqa30k/ocrvqa30k.json", "ocrvqa30k", mutations.JSON),
            ("laion50k/00000.parquet", "laion50k", mutations.PARQUET),
            ("laion50k/00000.tar", "laion50k", mutations.BYTES),
            ("rlaifv83k/*.parquet", "rlaifv83k", mutations.PARQUET),
        ]
    )
    change = broken(world, file, kinds, rng)
    return Case("extract", [*EXTRACT, "--data", name, "--data_root", file.partition("/")[0]], change)


def of_picture(world: Path, rng: random.Random) -> Case:
    command, argv = rng.choice([("extract", EXTRACT)] * 3 + [("train", TRAIN), ("evaluate", PICTURE), ("maps", SHOW)])
    pattern = "jsonl/1.png" if command == "evaluate" else "jsonl/[1-4].*"
    return Case(command, argv, broken(world, pattern, mutations.PICTURE, rng))


def of_store(world: Path, rng: random.Random) -> Case:
    command, argv, writes = rng.choice(
        [
            ("maps", CHECK, OUT),
            ("maps", SHOW, OUT),
            ("extract", [*EXTRACT, "--maps", "maps"], "maps"),
            ("train", TRAIN, OUT),
        ]
    )
    pattern, kinds = rng.choice([("maps/*.parquet", mutations.PARQUET)] * 2 + [("maps/recipe.json", mutations.JSON)])
    return Case(command, argv, broken(world, pattern, kinds, rng), writes)


def of_run(world: Path, rng: random.Random) -> Case:
    command, argv, writes = rng.choice([("train", GO_ON, "run"), ("evaluate", TUNED, OUT), ("export", EXPORT, OUT)])
    where = "run/checkpoint-1" if command == "train" and rng.random() < 0.7 else "run"
    pattern, kinds = rng.choice(
        [
            ("*.safetensors", mutations.SAFETENSORS),
            ("*.json", mutations.JSON),
            ("lavender.json", mutations.JSON),
            ("adapter_config.json", mutations.JSON),
            ("*.*", mutations.BYTES),
            ("*.pt*", mutations.BYTES),
        ]
    )
    if not list(world.glob(f"{where}/{pattern}")):
        pattern, kinds = "*.json", mutations.JSON
    return Case(command, argv, broken(world, f"{where}/{pattern}", kinds, rng), writes)


def of_model(world: Path, rng: random.Random) -> Case:
    command, argv, model = rng.choice(
        [("extract", EXTRACT, "sd")] * 2
        + [("localise", LOCALISE, "sd"), ("evaluate", PICTURE, "vlm"), ("train", TRAIN, "vlm")]
    )
    pattern, kinds = rng.choice(
        [("**/*.json", mutations.JSON)] * 2
        + [("**/*.safetensors", mutations.SAFETENSORS), ("**/*.*", mutations.BYTES), ("**/*.*", [mutations.no_file])]
    )
    change = broken(world, f"{model}/{pattern}", kinds, rng)
    # What other libraries make of odd values of their own configs is theirs; it must be told, or run.
    return Case(command, argv, change._replace(strict=change.strict and kinds is mutations.SAFETENSORS))


# Flags that start other programs, take minutes or need a network.
LEFT_OUT = ("compile", "deepspeed", "fsdp", "hub", "ddp", "local_rank", "debug", "torch_compile", "multiprocessing")
TOGETHER = [
    ("train", TRAIN, "--qlora --full"),
    ("train", TRAIN, "--lora --qlora"),
    ("train", TRAIN, "--eval_share 0.5 --eval_split x"),
    ("train", TRAIN, "--split train"),
    ("train", TRAIN, "--eval_strategy epoch"),
    ("train", TRAIN, "--fp16 --bf16"),
    ("train", TRAIN, "--no_such_flag 1"),
    ("extract", EXTRACT, "--timesteps 1,2 --recipe paper"),
    ("extract", EXTRACT, "--no_such_flag"),
    ("extract", EXTRACT, "--split train"),
    ("evaluate", PICTURE, "--no_such_flag"),
    ("evaluate", ["--question", "what"], ""),
    ("evaluate", ["--seeds", "1", "--plain", "run"], ""),
    ("maps", CHECK, "--no_such_flag"),
    ("maps", ["explode", "maps"], ""),
    ("localise", LOCALISE, "--no_such_flag"),
]
# What the numbers and choices of our own flags are never.
NEVER = ["nan", "-5", "null", "[]", "", "x"]


def of_flags(world: Path, rng: random.Random) -> Case:
    deed = rng.choice(["ours", "ours", "trainer", "trainer", "odd", "odd", "drop", "twice", "together"])
    if deed == "together":
        command, argv, more = rng.choice(TOGETHER)
        return Case(command, [*argv, *more.split()], Change(f"{argv[:2]} with {more}"), refused=True)
    if deed == "ours":
        command, argv, flags = rng.choice([("extract", EXTRACT, ExtractionFlags), ("train", TRAIN, TuningFlags)])
        typed = [
            field for field in fields(flags) if field.metadata.get("choices") or field.type not in (str, str | None)
        ]
        typed = [field for field in typed if field.type is not bool]
        chosen, value = rng.choice(typed), rng.choice(NEVER)
        # What has a value for each data set takes '' for its default. (A parser of transformers strips None from a field's type.)
        refused = value != "" or chosen.default is not None or "list[str]" not in str(chosen.type)
        return Case(command, [*argv, f"--{chosen.name}={value}"], Change(f"--{chosen.name}={value}"), refused=refused)
    if deed == "trainer":
        names = [name for name in trainer_flags() if not any(part in name for part in LEFT_OUT)]
        name = rng.choice(names)
        value = mutations.odd_value(name, rng)
        return Case("train", [*TRAIN, f"{name}={value}"], Change(f"{name}={value!r:.60}"))
    command, argv, own = rng.choice(
        [
            ("extract", EXTRACT, ExtractionFlags),
            ("train", TRAIN, TuningFlags),
            ("evaluate", PICTURE, EvaluationFlags),
            ("evaluate", TUNED, EvaluationFlags),
            ("maps", CHECK, None),
            ("maps", SHOW, None),
            ("localise", LOCALISE, None),
            ("export", EXPORT, None),
        ]
    )
    places = [i for i, word in enumerate(argv) if word.startswith("--")] or [0]
    # Without --scenes the whole held-out split is looked at, which is right and takes minutes.
    place = rng.choice([i for i in places if deed != "drop" or argv[i] != "--scenes"])
    if deed == "drop":
        return Case(command, argv[:place] + argv[place + rng.choice([1, 2]) :], Change(f"without {argv[place]}"))
    if deed == "twice":
        more = argv[place : place + 2]
        return Case(command, [*argv, *more], Change(f"{more} twice", strict=command != "export"))
    name = rng.choice([f"--{field.name}" for field in fields(own)] if own else [argv[i] for i in places])
    if any(part in name for part in LEFT_OUT):
        name = argv[places[0]]
    value = mutations.odd_value(name, rng)
    if not name.startswith("--"):
        spot = rng.randrange(len(argv))
        return Case(
            command, [*argv[:spot], value, *argv[spot + 1 :]], Change(f"{value!r:.60} in place of {argv[spot]}")
        )
    return Case(command, [*argv, f"{name}={value}"], Change(f"{name}={value!r:.60}"))


KINDS: dict[Callable[[Path, random.Random], Case], int] = {
    of_flags: 30, of_data: 20, of_picture: 15, of_store: 13, of_run: 12, of_model: 10,
}  # fmt: skip


def draw(seed: int, number: int, pristine: Path, world: Path) -> Case:
    """Case `number` of a seed; `world` becomes a copy of the pristine one with this case's fault in it."""
    rng = random.Random(f"{seed}-{number}")
    shutil.copytree(pristine, world)
    return rng.choices(list(KINDS), list(KINDS.values()))[0](world, rng)
