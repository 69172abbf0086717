"""Resampling, against PyTorch's own interpolation and against first principles."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lavender_min.geometry import MAP_SIDE, PatchLayout, minmax, resize_map, resize_matrix

sides = st.integers(1, 70)


@given(sides, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_whole_line_equals_interpolate(n_patches, g):
    line = torch.randn(1, 1, 1, n_patches, generator=torch.Generator().manual_seed(n_patches * 100 + g))
    theirs = F.interpolate(line, size=(1, g), mode="bilinear", antialias=True, align_corners=False)
    ours = line @ resize_matrix(n_patches, g).T
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@given(sides, sides, st.integers(1, 33))
@settings(max_examples=40, deadline=None)
def test_whole_map_equals_interpolate(y, x, g):
    maps = torch.rand(2, 3, y, x, generator=torch.Generator().manual_seed(y * 100 + x))
    theirs = F.interpolate(maps, size=(g, g), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(resize_map(maps, g), theirs, atol=2e-5, rtol=1e-4)


@given(st.integers(1, 60), st.integers(1, 40), st.floats(0, 0.9), st.floats(0.01, 1))
@settings(deadline=None)
def test_a_stretch_ignores_what_lies_outside_and_keeps_flat_maps_flat(n_patches, g, begin, length):
    start = begin * n_patches
    stop = min(start + length * (n_patches - start), float(n_patches))
    matrix = resize_matrix(n_patches, g, start, stop)
    assert matrix.shape == (g, n_patches) and matrix.dtype == torch.float32
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(g))
    cell = torch.arange(n_patches, dtype=torch.float64)
    outside = (cell + 1 <= start) | (cell >= stop)
    assert (matrix[:, outside] == 0).all()


@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 20), st.integers(1, 33))
@settings(deadline=None)
def test_a_stretch_of_whole_cells_equals_cropping_first(n_patches, before, after, g):
    padded = resize_matrix(before + n_patches + after, g, before, before + n_patches)
    torch.testing.assert_close(padded[:, before : before + n_patches], resize_matrix(n_patches, g))


@given(st.integers(1, 30), st.integers(0, 20), st.integers(0, 20), st.integers(1, 33))
@settings(deadline=None)
def test_what_a_stretch_has_beyond_the_line_is_0(n_patches, before, after, g):
    """A flat line gives each output cell the part of it that lies on the line; the same stretch of a longer line is measured."""
    matrix = resize_matrix(n_patches, g, -before, n_patches + after)
    fine = torch.zeros(before + n_patches + after)
    fine[before : before + n_patches] = 1
    # Every output cell is the mean of as many pieces as the line has cells.
    expected = fine.repeat_interleave(g).view(g, -1).mean(1)
    torch.testing.assert_close(matrix.sum(1), expected)
    if before == after == 0:
        assert torch.equal(matrix, resize_matrix(n_patches, g))


def test_positions_are_kept_on_a_partial_stretch():
    # A ramp through the cell centres is a ramp after resampling, at the right places (away from the ends).
    matrix = resize_matrix(40, 32, 4.5, 30.25)
    ramp = torch.arange(40) + 0.5
    centres = 4.5 + (30.25 - 4.5) / 32 * (torch.arange(32) + 0.5)
    torch.testing.assert_close((matrix @ ramp)[1:-1], centres[1:-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0), (4, 4, 3, 3), (4, 4, -2, 0), (4, 4, 4, 5)])
def test_bad_stretches_are_refused(arguments):
    with pytest.raises(ValueError, match="start < stop that meets the line"):
        resize_matrix(*arguments)


def test_minmax():
    maps = torch.rand(3, 2, 5, 7) * 4 - 1
    stretched = minmax(maps)
    assert torch.allclose(stretched.amin((-2, -1)), torch.zeros(3, 2))
    assert torch.allclose(stretched.amax((-2, -1)), torch.ones(3, 2), atol=1e-5)
    assert (minmax(torch.full((2, 4, 4), 0.3)) == 0).all()


def test_layout_moves_as_one():
    layout = PatchLayout(torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 4, 2), torch.zeros(1, 4, 3))
    assert all(part.device.type == "meta" for part in layout.to("meta"))
    assert MAP_SIDE == 32
