"""Which layers a word of --align_layers takes, against lists written by hand."""

import pytest

from lavender_min.align.layers import check, choose

LLAMA = [3, 8, 13, 18, 23, 28, 33, 38]
# Of Gemma 3 4B's 34 layers.
GEMMA = [5, 11, 17, 23, 29]


@pytest.mark.parametrize(
    ("spec", "seeing", "taken"),
    [
        ("all", LLAMA, LLAMA),
        # The paper's figure 22.
        ("first", LLAMA, [3, 8, 13]),
        ("mid", LLAMA, [13, 18, 23, 28]),
        ("last", LLAMA, [23, 28, 33, 38]),
        ("first", GEMMA, [5]),
        ("mid", GEMMA, [11, 17]),
        ("last", GEMMA, [23, 29]),
        ("first", [1, 3, 5], [1]),
        ("mid", [1, 3, 5], [3]),
        ("last", [1, 3, 5], [5]),
        ("last", [7], [7]),
        ("every-5", range(28), [2, 7, 12, 17, 22, 26]),
        ("every-5", range(40), [2, 7, 12, 17, 22, 27, 32, 37]),
        ("every-5", GEMMA, [17]),
        ("every-5", [1, 3], [3]),
        ("every-1", LLAMA, LLAMA),
        ("every-2", LLAMA, [8, 18, 28, 38]),
        ("every-100", LLAMA, [23]),
        ("38,3,38", LLAMA, [3, 38]),
        ("0", [0, 1], [0]),
    ],
)
def test_layers_are_those_of_the_list(spec, seeing, taken):
    check(spec)
    assert choose(spec, list(seeing)) == taken


@pytest.mark.parametrize(
    "spec", ["third", "every-0", "every-", "every-5,6", "3,,8", "3,", "-1", "3, 8", "ALL", " ", "3-8"]
)
def test_what_names_no_layers_is_refused(spec):
    with pytest.raises(ValueError) as error:
        check(spec)
    assert str(error.value) == (
        "--align_layers is all, first, mid, last, every-N (such as every-5) or layers' numbers (such as 3,8,13); "
        f"got {spec!r}"
    )


@pytest.mark.parametrize(("spec", "blind"), [("3,4", "4"), ("40", "40"), ("9,8,0", "0, 9")])
def test_a_layer_that_sees_no_picture_is_named_and_those_that_do(spec, blind):
    with pytest.raises(ValueError) as error:
        choose(spec, LLAMA)
    assert str(error.value) == (
        f"--align_layers {spec}: no layer {blind} sees the picture; these do: 3, 8, 13, 18, 23, 28, 33, 38"
    )
