"""What the commands share: flags from a dataclass, errors in one line, exit codes.

A command's flags are the fields of one dataclass: name, type, default and help stand there once, `parse` makes the command
line of them, and whoever calls the code from Python fills in the same dataclass. What a value must be is checked in the
dataclass's own `__post_init__`, in a ValueError that names the flag. Nothing heavy is imported here: `--help`, and the error
for data that is not there, come before torch does.
"""

import math
import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, field
from typing import Any, NoReturn, TypeVar

# On its own it imports no torch.
from transformers import HfArgumentParser

from lavender_min.failing import gpu_is_full, one_line

Flags = TypeVar("Flags")


def flag(default: Any, help: str, choices: Iterable[Any] | None = None, **more: Any) -> Any:
    """A field of a flags dataclass. `more` goes to `ArgumentParser.add_argument` (metavar, nargs, aliases)."""
    # A registry stays itself, so that a row which is added later is a choice too.
    found = choices if choices is None or isinstance(choices, Mapping) else list(choices)
    metadata = {"help": help, **({} if found is None else {"choices": found}), **more}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str, choices: Iterable[Any] | None = None) -> Any:
    """A field that must be given."""
    return flag(MISSING, help, choices)


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """Prints the description as it is written, and a default where there is one and the help does not name it."""

    def _get_help_string(self, action: Action) -> str | None:
        if (
            action.default is None
            or action.default is False
            or action.default == ""
            or "(default" in (action.help or "")
        ):
            return action.help
        return super()._get_help_string(action)


class Parser(HfArgumentParser):
    """Says what is wrong in one line, instead of printing every flag before it."""

    def error(self, message: str) -> NoReturn:
        # A value may hold a line break.
        self.exit(2, f"{self.prog}: {one_line(ValueError(message))} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # argparse takes the value of `--name=--` for the mark that ends the flags, and leaves an empty list.
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value; got '--'")
        return super().parse_known_args(args, namespace)


def parse(flags: type[Flags], prog: str, about: str | None, argv: Sequence[str] | None = None) -> Flags:
    """The command line as an instance of the dataclass `flags`."""
    parsed, rest = parse_known(flags, prog, about, argv)
    if rest:
        raise ValueError(f"there is no flag {rest[0]} (see {prog} --help)")
    return parsed


def parse_known(
    flags: type[Flags], prog: str, about: str | None, argv: Sequence[str] | None = None
) -> tuple[Flags, list[str]]:
    """The same, and what is left of the command line for somebody else's parser."""
    parser = Parser(flags, prog=prog, description=about, formatter_class=HelpFormatter, allow_abbrev=False)  # type: ignore[arg-type]
    words = sys.argv[1:] if argv is None else list(argv)
    # transformers would also take flags from a file beside the script, extract.args, without a word.
    parsed, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    return parsed, rest


def at_least(low: int, **values: int | None) -> None:
    """Each value given is a whole number of at least `low`; the flag is named as the keyword is."""
    for name, value in values.items():
        if value is not None and value < low:
            raise ValueError(f"--{name} must be a whole number of at least {low}; got {value}")


def between(low: float, high: float, **values: float | None) -> None:
    """Each value given is a number of at least `low` and below `high`; the flag is named as the keyword is."""
    for name, value in values.items():
        if value is not None and not low <= value < high:
            wanted = f"a finite number of at least {low}" if high == math.inf else f"at least {low} and below {high}"
            raise ValueError(f"--{name} must be {wanted}; got {value}")


def run(prog: str, main: Callable[[], int | None]) -> int:
    """The exit code of `main`. Whatever goes wrong is one line on stderr: 2 for bad input, files that cannot be had or a full
    memory, 130 for Ctrl-C, 1 for a fault of our own, whose traceback LAVENDER_TRACEBACK=1 shows.
    """
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        if os.environ.get("LAVENDER_TRACEBACK") == "1":
            raise
        print(f"{prog}: {one_line(error)}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"{prog}: the memory of this machine is full", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: stopped; the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if gpu_is_full(error):
            print(f"{prog}: the memory of the GPU is full: {one_line(error)}", file=sys.stderr)
            return 2
        if os.environ.get("LAVENDER_TRACEBACK") == "1":
            raise
        print(
            f"{prog}: this is a bug in lavender-min ({type(error).__name__}: {one_line(error)}); "
            "run again with LAVENDER_TRACEBACK=1 and report it",
            file=sys.stderr,
        )
        return 1
