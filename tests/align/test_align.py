"""The Aligner's sizes are the released code's; parallel attention starts as the host's own and moves what it should."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lavender_min.align.aligner import Align, Aligner, ParallelAttention, full_copy
from lavender_min.geometry import minmax
from lavender_min.hosts import base as hosts


@pytest.mark.parametrize(
    ("variant", "kernel", "parameters"),
    [("light", 3, 18_465), ("sim", 3, 27_681), ("deep", 3, 46_113), ("sim", 1, 3 * 32 * 32 + 33)],
)
def test_parameter_counts_for_32_heads(variant, kernel, parameters):
    aligner = Aligner(32, variant, kernel)
    assert sum(p.numel() for p in aligner.parameters()) == parameters


def test_without_a_network_the_heads_mean_is_aligned():
    maps, target, valid = torch.rand(3, 4, 9, 9), torch.rand(3, 9, 9), torch.tensor([True, True, False])
    align = Align({0: Heads(4)}, "layer-mean", variant="none")
    assert not list(align.parameters())
    torch.testing.assert_close(align.aligner.predict(maps), maps.mean(1))
    expected = F.mse_loss(minmax(maps.mean(1))[valid], target[valid])
    torch.testing.assert_close(align.loss(maps, target, valid), expected)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_loss_is_the_error_of_the_prediction(norm):
    torch.manual_seed(0)
    attentions = {0: Heads(4)}
    align = Align(attentions, "layer-mean", norm=norm)
    maps, target = torch.rand(5, 4, 9, 9), torch.rand(5, 9, 9)
    valid = torch.tensor([True, False, True, True, False])
    expected = F.mse_loss(minmax(align.aligner.predict(maps))[valid], target[valid])
    torch.testing.assert_close(align.loss(maps, target, valid), expected)


class Heads(torch.nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.num_heads = heads


def test_an_unknown_aggregate_is_named():
    with pytest.raises(ValueError, match="--aggregate is one of learn, layer-mean, got 'max'"):
        Align({0: Heads(4)}, "max")


def test_reading_nothing_asks_whether_the_host_was_hooked():
    with pytest.raises(RuntimeError, match="was the host hooked"):
        Align({0: Heads(4)}, "layer-mean").pooled({}, {})


@pytest.mark.parametrize("rank", [0, 8])
def test_parallel_attention_starts_as_the_hosts_own(vlm_folder, rank):
    vlm, _, host = hosts.load(vlm_folder)
    attention = host.layers(vlm)[3]
    parallel = ParallelAttention(attention, rank)
    hidden, states = torch.randn(2, 7, 128), torch.randn(2 * 4, 65, 128)
    tokens = torch.tensor([[3, -1, 0], [6, 6, -1]])
    q, k, renumbered = parallel(attention, hidden, states, tokens)
    assert renumbered.tolist() == [[0, -1, 2], [0, 1, -1]]
    own_q = attention.q_norm(attention.q_proj(hidden).view(2, 7, 4, 32).transpose(1, 2))
    own_k = attention.k_norm(attention.k_proj(states).view(2, 260, 2, 32).transpose(1, 2))
    torch.testing.assert_close(k, own_k)
    torch.testing.assert_close(q[0, :, 0], own_q[0, :, 3])
    torch.testing.assert_close(q[1, :, 1], own_q[1, :, 6])


def test_low_rank_moves_only_itself(vlm_folder):
    vlm, _, host = hosts.load(vlm_folder)
    attention = host.layers(vlm)[3]
    vlm.requires_grad_(False)
    parallel = ParallelAttention(attention, 8)
    hidden = torch.randn(1, 3, 128, requires_grad=True)
    q, k, _ = parallel(attention, hidden, torch.randn(4, 65, 128), torch.tensor([[1]]))
    (q.square().sum() + k.square().sum()).backward()
    assert all(p.grad is not None for p in parallel.parameters())
    assert hidden.grad.abs().sum() > 0  # not detached: the host's hidden states are to move
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
