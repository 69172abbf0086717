"""What the readers share: text files, declared texts, and rows of which some may be wrong.

One rule holds for all data. A row (a line, an entry) in which something is missing, of another type or no Unicode is left out;
all such rows of a file are counted in one line on stderr, which names the first. A file that is broken as a whole, or whose
rows are all wrong, is a ValueError.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from lavender_min.failing import naming, say

Raw = TypeVar("Raw")
Made = TypeVar("Made")


def encodable(text: str) -> str:
    """The text itself; ValueError if no tokenizer and no store could take it: half of a surrogate pair stands in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text must be Unicode, and character {error.start} of it is a lone surrogate") from error
    return text


# A text in a declared shape (`failing.shaped`).
Text = Annotated[str, AfterValidator(encodable)]


def keep(rows: Iterable[tuple[str, Raw]], read: Callable[[Raw, str], Made], what: str = "rows") -> list[Made]:
    """read(row, name) of every named row, without those for which it raises ValueError or OSError.

    Those are counted in one line. If none is left, the first error is raised.
    """
    made: list[Made] = []
    first: ValueError | OSError | None = None
    wrong = 0
    for name, row in rows:
        try:
            made.append(read(row, name))
        except (ValueError, OSError) as error:
            first = first or error
            wrong += 1
    if first and not made:
        raise first
    if first:
        say(f"{wrong:,} of {wrong + len(made):,} {what} are not as expected and are left out; the first: {first}")
    return made


def read_text(file: Path, kind: str = "") -> str:
    """A file of UTF-8, also one that is packed (.gz) or begins with a byte order mark, as Windows writes it.

    `kind` says what the file should be, for the error of one that is not.
    """
    with naming(f"{file} is not {kind}" if kind else file):
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}, line {line}: expected UTF-8, got the byte 0x{raw[error.start]:02x}; if the file is in cp1252 or latin-1, "
            f"convert it: iconv -f cp1252 -t utf-8"
        ) from error


def lines(file: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not empty, with its name: "<file>, line <number>". Not split at U+2028, which JSON texts may hold."""
    for number, line in enumerate(io.StringIO(read_text(file), newline=None), start=1):
        # Files put one behind the other bring their marks along.
        line = line.lstrip("\ufeff").rstrip("\n")
        if line.strip():
            yield f"{file}, line {number}", line


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    for name, line in lines(file):
        with naming(name):
            value = json.loads(line)
        yield name, value


def numbered(entries: Any, file: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list out of a JSON file, each with its name: "<file>, row <number>", counted from 0."""
    if not isinstance(entries, list):
        raise ValueError(f"{file} is not {kind}: expected a list, got {type(entries).__name__}")
    return ((f"{file}, row {number}", entry) for number, entry in enumerate(entries))


def read_json(file: Path, kind: str) -> Any:
    """Any JSON; `kind` says what the file should be, for the error of one that is not."""
    text = read_text(file, kind)
    with naming(f"{file} is not {kind}"):
        return json.loads(text)
