"""The Aligner's sizes are the released code's; parallel attention starts as the host's own and moves what it should."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lavender_min.align.aligner import Align, Aligner
from lavender_min.align.parallel import ParallelAttention, full_copy
from lavender_min.geometry import minmax
from lavender_min.hosts.base import WordRows
from lavender_min.hosts.load import load


@pytest.mark.parametrize(
    ("variant", "kernel", "parameters"),
    [("light", 3, 18_465), ("sim", 3, 27_681), ("deep", 3, 46_113), ("sim", 1, 3 * 32 * 32 + 33)],
)
def test_parameter_counts_for_32_heads(variant, kernel, parameters):
    aligner = Aligner(32, variant, kernel)
    assert sum(p.numel() for p in aligner.parameters()) == parameters


def test_without_a_network_the_heads_mean_is_aligned():
    maps, target, valid = torch.rand(3, 4, 9, 9), torch.rand(3, 9, 9), torch.tensor([True, True, False])
    align = Align({}, 4, "layer-mean", variant="none")
    assert not list(align.parameters())
    torch.testing.assert_close(align.aligner.predict(maps), maps.mean(1))
    expected = F.mse_loss(minmax(maps.mean(1))[valid], target[valid])
    torch.testing.assert_close(align.loss(maps, target, valid.float()), expected)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_loss_is_the_error_of_the_prediction(norm):
    torch.manual_seed(0)
    align = Align({}, 4, "layer-mean", norm=norm)
    maps, target = torch.rand(5, 4, 9, 9), torch.rand(5, 9, 9)
    valid = torch.tensor([True, False, True, True, False])
    expected = F.mse_loss(minmax(align.aligner.predict(maps))[valid], target[valid])
    torch.testing.assert_close(align.loss(maps, target, valid.float()), expected)


def test_an_unknown_aggregate_is_named():
    with pytest.raises(ValueError, match="--aggregate is one of learn, layer-mean, layer-max, .*; got 'max'"):
        Align({}, 4, "max")


def test_reading_nothing_asks_whether_the_host_was_hooked():
    with pytest.raises(RuntimeError, match="was the host hooked"):
        Align({}, 4, "layer-mean").pool_layers({}, {})


def picked(rows, counts):
    """A WordRows in which only the rows matter."""
    texts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    rows, nothing = torch.tensor(rows), torch.zeros(0)
    return WordRows(rows, counts, texts, rows, nothing, nothing, [], nothing)


@pytest.mark.parametrize("rank", [0, 8])
def test_parallel_attention_starts_as_the_hosts_own(vlm_folder, rank):
    host = load(vlm_folder)
    attention = host.family.layers(host.model)[3]
    parallel = ParallelAttention(attention, rank)
    hidden, states = torch.randn(2, 7, 128), torch.randn(2 * 4, 65, 128)
    inputs = {"hidden_states": hidden, "cross_attention_states": states}
    q, k = parallel(attention, host.family, inputs, picked([3, 0, 6], [2, 1]))
    own_q = attention.q_norm(attention.q_proj(hidden).view(2, 7, 4, 32).transpose(1, 2))
    own_k = attention.k_norm(attention.k_proj(states).view(2, 260, 2, 32).transpose(1, 2))
    torch.testing.assert_close(k, own_k)
    torch.testing.assert_close(q, torch.stack([own_q[0, :, 3], own_q[0, :, 0], own_q[1, :, 6]]))


def test_low_rank_moves_only_itself(vlm_folder):
    host = load(vlm_folder)
    attention = host.family.layers(host.model)[3]
    host.model.requires_grad_(False)
    parallel = ParallelAttention(attention, 8)
    hidden = torch.randn(1, 3, 128, requires_grad=True)
    inputs = {"hidden_states": hidden, "cross_attention_states": torch.randn(4, 65, 128)}
    q, k = parallel(attention, host.family, inputs, picked([1], [1]))
    (q.square().sum() + k.square().sum()).backward()
    assert all(p.grad is not None for p in parallel.parameters())
    # Not detached: the host's hidden states are to move.
    assert hidden.grad.abs().sum() > 0
    assert all(p.grad is None for p in attention.parameters())


def test_a_full_copy_of_a_4_bit_layer_holds_its_values():
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 64, bias=False)
    packed = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(copy.deepcopy(layer.state_dict()))
    packed = packed.to("cpu")  # this packs it
    assert packed.weight.dtype == torch.uint8
    x = torch.randn(5, 128)
    torch.testing.assert_close(full_copy(packed)(x), packed(x), atol=1e-3, rtol=1e-3)
