"""Errors that name their file, and values from outside that are what they should be."""

from typing import NamedTuple

import pytest
import torch

from lavender_min import cli
from lavender_min.failing import naming, read_json, shaped


class Row(NamedTuple):
    image: str
    count: int = 1


def test_whatever_is_raised_names_the_file():
    with pytest.raises(ValueError, match=r"^a\.jpg: KeyError: 'x'; delete it$"), naming("a.jpg", "delete it"):
        {}["x"]
    with pytest.raises(ValueError, match=r"^a\.jpg: two lines$"), naming("a.jpg"):
        raise ValueError("two\n  lines")
    with pytest.raises(ValueError, match=r"^a\.jpg is bad$"), naming("a.jpg"):
        raise ValueError("a.jpg is bad")
    for error in (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt):
        with pytest.raises(error), naming("a.jpg"):
            raise error


def test_values_are_checked_and_not_converted():
    assert shaped({"image": "a"}, Row, "f") == Row("a", 1)
    with pytest.raises(ValueError, match="f, line 3, image: input should be a valid string; got 7"):
        shaped({"image": 7}, Row, "f, line 3")
    with pytest.raises(ValueError, match="f, count: .*; got 'two'"):
        shaped({"image": "a", "count": "two"}, Row, "f")
    with pytest.raises(ValueError, match=r"f, the whole: .*; got 5"):
        shaped(5, Row, "f")


def test_a_json_file_that_is_none_is_named(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b'\xef\xbb\xbf{"image": "a"}')
    assert read_json(file, Row) == Row("a")
    for text in ("", "[" * 100_000, '{"image": null}', "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"^{file}") as error:
            read_json(file, Row)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("--x must\nbe y"), 2, "p: --x must be y"),
        (OSError("no room"), 2, "p: no room"),
        (torch.OutOfMemoryError("CUDA out of\nmemory."), 2, "p: the memory of the GPU is full: CUDA out of memory."),
        (KeyboardInterrupt(), 130, "p: stopped; the same command goes on"),
        (TypeError("oh"), 1, "p: this is a bug in lavender-min (TypeError: oh); run again with LAVENDER_TRACEBACK=1"),
    ],
)
def test_the_boundary_of_a_command(error, code, says, capsys, monkeypatch):
    def main():
        raise error

    assert cli.run("p", main) == code
    said = capsys.readouterr().err
    assert said.startswith(says) and said.count("\n") == 1
    if code == 1:
        monkeypatch.setenv("LAVENDER_TRACEBACK", "1")
        with pytest.raises(TypeError):
            cli.run("p", main)
