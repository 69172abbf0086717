"""What can be wrong with a file: each function changes one in place, at random, and says what it did.

A change is `strict` where a command that says nothing about it must give what the file gave before. Where it is not, another
value may stand in the file that is as good as the first (another letter, another number).
"""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


class Change(NamedTuple):
    what: str
    strict: bool = False


Mutation = Callable[[Path, random.Random], Change]

# Values of every type JSON has, and numbers beyond what programs take.
VALUES: list[Any] = [None, True, False, 0, -1, 3, 1.5, float("nan"), float("inf"), 10**30, -(10**30), 1e300]
VALUES += [
    "", "x", "nan", "\ud83d", "a\0b", "\ufeff", "<|image|>", "x" * 3000, [], [[]], [None], {}, {"a": 1},
    ["a", 1],
]  # fmt: skip


# ---- bytes ----------------------------------------------------------------------------------------------------------


def cut(file: Path, rng: random.Random) -> Change:
    raw = file.read_bytes()
    length = rng.choice([0, 1, 7, len(raw) // 2, max(len(raw) - 1, 0), rng.randrange(len(raw) + 1)])
    file.write_bytes(raw[:length])
    return Change(f"cut to {length} of {len(raw)} bytes")


def flip(file: Path, rng: random.Random) -> Change:
    raw = bytearray(file.read_bytes())
    places = [rng.randrange(len(raw)) for _ in range(rng.choice([1, 1, 8, 64]))]
    for place in places:
        raw[place] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    return Change(f"bits flipped at {places[:4]}")


def insert(file: Path, rng: random.Random) -> Change:
    raw, more = file.read_bytes(), rng.randbytes(rng.choice([1, 16, 1000]))
    place = rng.randrange(len(raw) + 1)
    file.write_bytes(raw[:place] + more + raw[place:])
    return Change(f"{len(more)} bytes put in at {place}")


def zero(file: Path, rng: random.Random) -> Change:
    raw = file.read_bytes()
    begin = rng.randrange(len(raw))
    end = min(len(raw), begin + rng.choice([1, 64, 4096]))
    file.write_bytes(raw[:begin] + bytes(end - begin) + raw[end:])
    return Change(f"zeros from {begin} to {end}")


BYTES: list[Mutation] = [cut, flip, insert, zero]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of each value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, held in inside for place in places(held, (*path, key))]


def odd_json(value: Any, rng: random.Random) -> tuple[Any, str]:
    """The value with one thing in it changed, and what that is."""
    path = rng.choice(places(value)[:400])
    deed = rng.choice(["retype", "retype", "retype", "delete", "nest", "repeat"])
    new = rng.choice(VALUES)
    if not path:
        return (new, f"the whole is {new!r:.60}") if deed == "retype" else ([value], "the whole is in a list")
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    name = ".".join(map(str, path))
    if deed == "delete":
        del holder[path[-1]]
    elif deed == "nest":
        holder[path[-1]] = [[[{"a": holder[path[-1]]}]]]
    elif deed == "repeat" and isinstance(holder, list):
        holder.insert(0, holder[path[-1]])
    else:
        holder[path[-1]], deed = new, f"{new!r:.60} in place of {holder[path[-1]]!r:.60}"
    return value, f"{name}: {deed}"


def json_value(file: Path, rng: random.Random) -> Change:
    changed, what = odd_json(json.loads(file.read_text()), rng)
    file.write_text(json.dumps(changed))
    return Change(what)


def json_line(file: Path, rng: random.Random) -> Change:
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    changed, what = odd_json(json.loads(lines[number]), rng)
    lines[number] = json.dumps(changed)
    file.write_text("\n".join(lines) + "\n")
    return Change(f"line {number + 1}, {what}")


def deep_json(file: Path, rng: random.Random) -> Change:
    depth = rng.choice([500, 100_000])
    open_, close = rng.choice([("[", "]"), ('{"a":', "}")])
    file.write_text(open_ * depth + "1" + close * depth)
    return Change(f"{open_} nested {depth} deep", strict=True)


def double_key(file: Path, rng: random.Random) -> Change:
    text = file.read_text()
    keys = list(json.loads(text.splitlines()[0] if file.suffix == ".jsonl" else text) or [""])
    key = rng.choice(keys) if isinstance(keys[0], str) else "id"
    file.write_text(text.replace("{", "{" + f"{json.dumps(key)}: {json.dumps(rng.choice(VALUES))}, ", 1))
    return Change(f"the key {key!r} twice")


JSON: list[Mutation] = [json_value, json_value, json_value, deep_json, double_key, *BYTES]
JSON_LINES: list[Mutation] = [json_line, json_line, json_line, deep_json, double_key, *BYTES]


# ---- text -----------------------------------------------------------------------------------------------------------


def encoding(file: Path, rng: random.Random) -> Change:
    text = file.read_text()
    name = rng.choice(["utf-8-sig", "utf-16", "utf-32", "cp1252"])
    file.write_bytes(text.replace("the", "thé").encode(name, errors="replace"))
    return Change(f"in {name}")


def odd_characters(file: Path, rng: random.Random) -> Change:
    text, odd = (
        file.read_text(),
        rng.choice(["\0", "\ud83d", "\u2028", "\ufeff", "\r", '"', "|", "\t", "\x1b[2J", "\n"]),
    )
    place = rng.randrange(len(text) + 1)
    file.write_bytes((text[:place] + odd + text[place:]).encode(errors="surrogatepass"))
    return Change(f"{odd!r} at {place}")


def odd_lines(file: Path, rng: random.Random) -> Change:
    lines = file.read_text().splitlines(keepends=True)
    number = rng.randrange(len(lines))
    deed = rng.choice(["drop", "repeat", "empty", "endless"])
    lines[number : number + 1] = {
        "drop": [],
        "repeat": [lines[number]] * 2,
        "empty": ["\n"],
        "endless": [lines[number].rstrip("\n") + " dog" * 2000 + "\n"],
    }[deed]
    file.write_text("".join(lines))
    return Change(f"line {number + 1}: {deed}")


def cells(file: Path, rng: random.Random) -> Change:
    rows = list(csv.reader(io.StringIO(file.read_text())))
    row = rng.choice(rows)
    deed = rng.choice(["drop", "more", "odd"])
    if deed == "drop":
        row.pop()
    elif deed == "more":
        row += ["x"] * 3
    else:
        row[rng.randrange(len(row))] = rng.choice(["", "null", "nan", "5", "../..", "x" * 3000, "a\nb"])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    file.write_text(text.getvalue())
    return Change(f"a cell: {deed}, {row!r:.80}")


TEXT: list[Mutation] = [encoding, odd_characters, odd_lines, *BYTES]
TABLE: list[Mutation] = [cells, cells, *TEXT]


# ---- pictures -------------------------------------------------------------------------------------------------------


def other_format(file: Path, rng: random.Random) -> Change:
    kind = rng.choice(["PNG", "GIF", "BMP", "TIFF", "PPM", "EPS", "PDF", "ICO", "TGA", "WEBP", "JPEG2000"])
    with Image.open(file) as image:
        image = image.convert("RGB")
    image.save(file, kind)
    return Change(f"{kind} under the name {file.name}")


def odd_size(file: Path, rng: random.Random) -> Change:
    size = rng.choice([(1, 1), (1, 3000), (3000, 1), (2, 2), (7, 300)])
    Image.new("RGB", size, (9, 200, 30)).save(file, "PNG")
    return Change(f"a picture of {size}")


def huge_claim(file: Path, rng: random.Random) -> Change:
    side = rng.choice([20_000, 2**31 - 1])
    file.write_bytes(b"P6 %d %d 255\n" % (side, side) + b"\0" * 100)
    return Change(f"claims to be {side} wide", strict=True)


def odd_mode(file: Path, rng: random.Random) -> Change:
    mode, kind = rng.choice(
        [("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("F", "TIFF"), ("CMYK", "JPEG"), ("RGBA", "PNG")]
    )
    Image.new(mode, (40, 30), 0).save(file, kind)
    return Change(f"mode {mode}")


def no_file(file: Path, rng: random.Random) -> Change:
    file.unlink()
    deed = rng.choice(["gone", "a folder", "a link to itself", "a link into nowhere"])
    if deed == "a folder":
        file.mkdir()
    elif deed != "gone":
        file.symlink_to(file.name if "itself" in deed else "nowhere")
    return Change(deed)


def cut_picture(file: Path, rng: random.Random) -> Change:
    return cut(file, rng)._replace(strict=True)


PICTURE: list[Mutation] = [cut_picture, flip, insert, zero, other_format, odd_size, huge_claim, odd_mode, no_file]


# ---- Parquet and safetensors ----------------------------------------------------------------------------------------


def columns(file: Path, rng: random.Random) -> Change:
    table = pq.read_table(file)
    place = rng.randrange(table.num_columns)
    name, deed = table.column_names[place], rng.choice(["renamed", "dropped", "numbers", "texts", "null", "cut rows"])
    if deed == "renamed":
        table = table.rename_columns([f"{old}_" if old == name else old for old in table.column_names])
    elif deed == "dropped":
        table = table.drop_columns([name])
    elif deed == "cut rows":
        table = table.slice(0, rng.randrange(table.num_rows))
    else:
        kind = {"numbers": pa.int64(), "texts": pa.string(), "null": pa.null()}[deed]
        value = {"numbers": 5, "texts": "x", "null": None}[deed]
        table = table.set_column(place, name, pa.array([value] * table.num_rows, kind))
    pq.write_table(table, file)
    return Change(f"column {name}: {deed}")


def tensors(file: Path, rng: random.Random) -> Change:
    held = load_file(file)
    name = rng.choice(sorted(held))
    deed = rng.choice(["other shape", "dropped", "renamed", "NaN", "whole numbers", "no axes"])
    tensor = held.pop(name)
    if deed == "other shape":
        held[name] = torch.zeros(*tensor.shape, 2)
    elif deed == "renamed":
        held[name + "_"] = tensor
    elif deed == "NaN":
        held[name] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
    elif deed == "whole numbers":
        held[name] = tensor.to(torch.int32)
    elif deed == "no axes":
        held[name] = torch.zeros(())
    save_file(held, file, {"format": "pt"})
    return Change(f"{name}: {deed}", strict=deed in ("other shape", "NaN"))


PARQUET: list[Mutation] = [columns, columns, *BYTES]
SAFETENSORS: list[Mutation] = [tensors, tensors, cut_picture, zero]


# ---- flags ----------------------------------------------------------------------------------------------------------

# Also names of the inputs: no output may replace them.
ODD = [
    "", " ", "-1", "-5", "0", "nan", "inf", "1e400", "null", "None", "[]", "{}", "true", "no", "1,2", "é",
    "\ud83d", "a\nb",
]  # fmt: skip
ODD += [
    "--", "(", "x" * 5000, "/dev/null", "nowhere/at/all", "jsonl", "jsonl/1.png", "vlm", "sd", "maps", "run",
    "1.5", "9" * 30,
]  # fmt: skip
# A large number means a long time, or many processes, and says so.
LONG = ("steps", "epochs", "draws", "scenes", "seeds", "workers", "prefetch", "rank", "lora_r", "--n")


def odd_value(flag: str, rng: random.Random) -> str:
    value = rng.choice(ODD)
    return "-5" if value == "9" * 30 and any(part in flag for part in LONG) else value
