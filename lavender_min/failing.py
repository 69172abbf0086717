"""Failing well: what comes from outside is read through a declared shape, and what is wrong with it is one line.

A line says which file, what was expected, what came, and where it helps what to do. Errors of this package are ValueError and
OSError with such a line. Everything else is a fault of ours, and `cli.run` says so.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 600


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def gpu_is_full(error: BaseException) -> bool:
    """Whether it is torch's OutOfMemoryError, known by its name: nothing heavy is imported here."""
    return type(error).__name__ == "OutOfMemoryError"


def say(line: str) -> None:
    # A file's name may hold line breaks, and bytes that are no UTF-8.
    print(" ".join(line.splitlines()).encode(errors="backslashreplace").decode(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def naming(what: str | Path, advice: str = "") -> Iterator[None]:
    """Whatever reading `what` raises inside this `with` becomes one ValueError that begins with its name.

    A decoder or a parser may raise anything. What is not about the file stays what it is: a full memory, a key that was pressed,
    and an error that names the file already.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if gpu_is_full(error):
            raise
        text = one_line(error)
        if isinstance(error, ValueError | OSError) and str(what) in text:
            raise
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{text}" + (f"; {advice}" if advice else "")) from error


@functools.cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def shaped(value: Any, shape: Any, where: str | Path) -> Any:
    """`value`, which came from outside, as `shape`: a NamedTuple, a TypedDict, or a type such as dict[str, int].

    Nothing is converted in silence: a number is no text. Raises ValueError with the field, what was expected and what came.
    """
    # Here and above, because kernels, hosts and the step are measured on machines that lack it, and read nothing by shape.
    from pydantic import ValidationError

    try:
        return _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Where a field may be one of several shapes, pydantic names them among the fields, as code.
        field = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "the whole"
        came = repr(first["input"])
        came = came if len(came) <= 60 else came[:59] + "…"
        raise ValueError(f"{where}, {field}: {first['msg'][0].lower()}{first['msg'][1:]}; got {came}") from None


def read_json(file: Path, shape: Any, advice: str = "") -> Any:
    """A JSON file as `shape`."""
    with naming(file, advice):
        return shaped(json.loads(file.read_text(encoding="utf-8-sig")), shape, file)
