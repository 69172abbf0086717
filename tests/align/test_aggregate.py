"""Every aggregation against a loop over layers, heads and cells, written from the paper's section 4.2 and appendix D."""

import math

import pytest
import torch

from lavender_min.align import AGGREGATIONS, aggregate
from lavender_min.align.aligner import Align
from lavender_min.align.trust import places, trust, word_trust
from lavender_min.geometry import contrast, minmax
from lavender_min.hosts.load import load
from lavender_min.tuning import runs
from lavender_min.tuning.flags import ModelFlags

LAYERS = (2, 5, 7)
H, G = 3, 4


def attention():
    """{layer: [n, h, g, g]} of a host, in units of uniform attention."""
    draw = torch.Generator().manual_seed(0)
    return {layer: torch.rand(2, H, G, G, generator=draw, dtype=torch.float64) + 0.1 for layer in LAYERS}


def pooled(name, maps):
    how = AGGREGATIONS[name]
    return aggregate.pool_layers(how, {layer: aggregate.pool_heads(how, of) for layer, of in maps.items()})


def cell_by_cell(name, maps):
    """One channel, with plain Python numbers."""
    over = {"max": max, "mean": lambda values: sum(values) / len(values), "sum": sum, "product": math.prod}
    how, out = AGGREGATIONS[name], torch.zeros(2, 1, G, G, dtype=torch.float64)
    for n in range(2):
        for y in range(G):
            for x in range(G):
                of_layers = [over[how.heads](maps[layer][n, :, y, x].tolist()) for layer in LAYERS]
                out[n, 0, y, x] = over[how.layers](of_layers)
    return out


@pytest.mark.parametrize("name", ["max-max", "max-mean", "mean-max", "mean-mean", "flow-sum"])
def test_one_channel(name):
    maps = attention()
    torch.testing.assert_close(pooled(name, maps), cell_by_cell(name, maps))
    assert aggregate.channels(AGGREGATIONS[name], H) == 1


def test_the_names_first_half_is_the_layers_and_the_second_the_heads():
    for name in ("max-max", "max-mean", "mean-max", "mean-mean"):
        assert (AGGREGATIONS[name].layers, AGGREGATIONS[name].heads) == tuple(name.split("-"))


def test_a_flow_of_products_is_eq_41_up_to_a_factor():
    maps = attention()
    expected = torch.ones(2, 1, G, G, dtype=torch.float64)
    # Eq. 40 and 41: start with the first layer, multiply by each that follows.
    for layer in LAYERS:
        expected = expected * maps[layer].mean(1, keepdim=True)
    found = pooled("flow-mul", maps)
    torch.testing.assert_close(found, expected / expected.amax((-2, -1), keepdim=True))
    torch.testing.assert_close(minmax(found, 0.0), minmax(expected, 0.0))


def test_a_flow_of_many_layers_stays_in_range_and_has_gradients():
    """Sixty layers of attention to 6,404 keys: their product has 228 digits behind the point."""
    maps = {layer: (torch.rand(1, 1, G, G) / 6404).requires_grad_() for layer in range(60)}
    found = pooled("flow-mul", maps)
    assert found.isfinite().all() and found.amax() == 1
    found.sum().backward()
    assert all(of.grad.isfinite().all() for of in maps.values())
    assert aggregate.pool_layers(AGGREGATIONS["flow-mul"], {0: torch.zeros(1, 1, G, G)}).isfinite().all()


@pytest.mark.parametrize(("name", "over"), [("layer-mean", torch.mean), ("layer-max", torch.amax)])
def test_heads_stay_channels(name, over):
    maps = attention()
    torch.testing.assert_close(pooled(name, maps), over(torch.stack(list(maps.values())), 0))
    assert aggregate.channels(AGGREGATIONS[name], H) == H


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_every_aggregation_trains_what_it_reads(vlm_folder, name):
    """From flags to a gradient: own attention reaches the adapters, parallel attention its projections."""
    model, _ = runs.build(ModelFlags(vlm_folder, aggregate=name, parallel_rank=4))
    assert model.align.aligner.body[0].in_channels == aggregate.channels(AGGREGATIONS[name], 4)
    maps = {layer: torch.rand(3, 4, 8, 8, requires_grad=True) for layer in (1, 3, 5)}
    pooled_maps = model.align.pool_layers(*[{i: model.align.pool_heads(of) for i, of in maps.items()}] * 2)
    model.align.loss(pooled_maps, torch.rand(3, 8, 8), torch.tensor([1.0, 0.5, 0.0])).backward()
    for of in maps.values():
        assert of.grad[:2].abs().sum() > 0 and of.grad[2].abs().sum() == 0


# ----------------------------------------------------------------------------------------------------------- how much


def test_a_words_place_is_eq_43():
    """Tokens 0 … 9: the first has a tenth of the weight of the last; a word of two tokens has their mean."""
    found = places([[0], [4, 5], [9]], 10)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.55, 1.0]))


def test_trust_of_maps_made_by_hand():
    flat, sharp, twice = torch.ones(4, 4), torch.zeros(4, 4), torch.ones(4, 4)
    sharp[1, 2] = 16.0
    twice[0, 0], twice[3, 3] = 2.0, 0.0
    raw = torch.stack([flat, sharp, twice]) * 1e-4
    torch.testing.assert_close(contrast(raw), torch.tensor([0.0, 16.0, 2.0]))
    assert trust("none", raw).tolist() == [1, 1, 1]
    torch.testing.assert_close(trust("contrast", raw), torch.tensor([0.0, 16.0, 2.0]))
    assert trust("threshold:2.5", raw).tolist() == [0, 1, 0] and trust("threshold:.5", raw).tolist() == [0, 1, 1]
    assert trust("contrast", torch.zeros(1, 4, 4)).tolist() == [0]
    torch.testing.assert_close(word_trust("contrast", True, raw[1:], [[0], [7]], 8), torch.tensor([2.0, 2.0]))


def test_trust_weighs_errors_and_leaves_targets():
    align = Align({}, 1, "mean-mean", variant="none")
    maps, target = torch.rand(3, 1, 6, 6), torch.rand(3, 6, 6)
    errors = (minmax(maps[:, 0]) - target).square().mean((1, 2))
    weights = torch.tensor([0.3, 0.0, 1.7])
    torch.testing.assert_close(align.loss(maps, target, weights), (errors * weights).sum() / 2.0)


@pytest.mark.parametrize("spec", ["some", "threshold", "threshold:", "threshold:x", "contrast:1", ""])
def test_trust_that_is_none_is_refused(spec):
    with pytest.raises(ValueError, match="--trust is none, contrast or threshold:X, such as threshold:0.6; got"):
        ModelFlags("x", trust=spec)


@pytest.mark.parametrize("rank", [0, 6])
def test_parallel_projections_from_noise(vlm_folder, rank):
    """N(0, 0.02), and nothing of the host's own in what they make."""
    torch.manual_seed(0)
    align = Align(load(vlm_folder).family.layers(load(vlm_folder).model), 4, "learn", rank, "noise")
    attention = load(vlm_folder).family.layers(load(vlm_folder).model)[3]
    parallel = align.parallel["3"]
    matrix = torch.eye(128)
    for part in parallel.q:
        matrix = matrix @ part.weight.T
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.1) and part.bias is None
    x = torch.randn(2, 128)
    torch.testing.assert_close(parallel.query_of(attention, x), x @ matrix)
