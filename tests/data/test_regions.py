"""Boxes, polygons and mask pictures against other ways to fill them; phrases against their words."""

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from lavender_min.data.regions import Place, box, find_label, naming_words, pixel_mask, polygon_mask, regions


def centres(size, side):
    """Of each cell, row by row, in pixels."""
    x, y = ((np.arange(side) + 0.5) * length / side for length in size)
    return np.stack(np.meshgrid(x, y), axis=-1)


@pytest.mark.parametrize("size, side", [((37, 23), 7), ((640, 427), 32), ((5, 5), 13)])
def test_a_box_holds_the_cells_whose_centres_lie_inside(size, side):
    draw = np.random.default_rng(side)
    for _ in range(20):
        (left, right), (top, bottom) = (np.sort(draw.uniform(-2, length + 2, 2)) for length in size)
        x, y = np.moveaxis(centres(size, side), -1, 0)
        expected = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        assert np.array_equal(polygon_mask([box(left, top, right, bottom)], size, side), expected)


def test_known_cells():
    """A picture of 8 × 4 in cells of 2 × 1: a centre on the left or upper edge is inside, on the others outside."""
    found = polygon_mask([box(1, 1.5, 5, 3.5)], (8, 4), 4)
    assert found.astype(int).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    # Thinner than a cell, between two rows of centres.
    assert not polygon_mask([box(0, 0.6, 8, 1.4)], (8, 4), 4).any()
    assert polygon_mask([box(0, 0, 8, 4)], (8, 4), 4).all()


def test_polygons_of_any_shape_against_matplotlib():
    draw, size, side = np.random.default_rng(0), (61, 47), 19
    # A star, whose border has dents, and a triangle beside it.
    angles = np.linspace(0, 2 * np.pi, 11, endpoint=False)
    star = np.stack([20 + 17 * np.cos(angles), 22 + 20 * np.sin(angles)], 1) * draw.uniform(0.6, 1, (11, 1))
    triangle = np.array([[40.3, 5.2], [58.1, 30.9], [44.7, 44.4]])
    points = centres(size, side).reshape(-1, 2)
    expected = Outline(star).contains_points(points) | Outline(triangle).contains_points(points)
    found = polygon_mask([star.flatten().tolist(), triangle.flatten().tolist()], size, side)
    assert np.array_equal(found, expected.reshape(side, side)) and 20 < found.sum() < 200


@pytest.mark.parametrize("shape", [(23, 37), (5, 3), (13, 26)])
def test_a_mask_picture_gives_the_pixel_at_each_centre(shape):
    pixels, side = np.random.default_rng(1).random(shape) > 0.5, 13
    found = pixel_mask(pixels, side)
    for (row, column), inside in np.ndenumerate(found):
        assert inside == pixels[int((row + 0.5) * shape[0] / side), int((column + 0.5) * shape[1] / side)]


def test_words_that_name():
    text = "The two dogs of a man's friend see her."
    assert [text[start:end] for start, end in naming_words(text, 0, 30)] == ["two", "dogs", "man's", "friend"]
    # Nothing else is there that could name her.
    assert [text[start:end] for start, end in naming_words(text, 35, 38)] == ["her"]
    # A word must lie in the phrase with all its letters.
    assert naming_words(text, 5, 11) == []


def test_labels_are_whole_words():
    text = "Dining tables, a dining\n table, tablecloths; two buses and a Bus-stop for a bus."
    assert [text[a:b] for a, b in find_label(text, "dining table")] == ["Dining tables", "dining\n table"]
    assert [text[a:b] for a, b in find_label(text, "bus")] == ["buses", "Bus", "bus"]
    assert find_label("c+ and c++", "c++") == [(7, 10)] and find_label("a cat", "at") == []


def test_a_word_of_two_things_has_both():
    places = [
        Place("answer", 0, 8, "animal", lambda side: np.eye(side, dtype=bool)),
        Place("answer", 4, 8, "other", lambda side: np.eye(side, dtype=bool)[::-1]),
        Place("question", 0, 3, "", lambda side: np.zeros((side, side), dtype=bool)),
    ]
    old, dogs = regions({"question": "Who?", "answer": "Old dogs."}, places, 5)
    assert old[:4] == ("answer", 0, 3, "animal") and np.array_equal(old.mask, np.eye(5))
    assert dogs[:4] == ("answer", 4, 8, "animal") and np.array_equal(dogs.mask, np.eye(5) + np.eye(5)[::-1] > 0)
