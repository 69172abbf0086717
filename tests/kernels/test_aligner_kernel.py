"""aligner_mse in Triton against plain PyTorch: values, gradients, ties, layouts, what is kept for the backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import DEVICE, HALVES, close, draw, few, with_gradients

from lavender_min import ops, reference


def check_aligner(
    dtype=torch.float32, m=4, c=5, gy=6, gx=7, output="minmax", channels_last=False, seed=0, change=None, least=-0.8
):
    features = draw(seed, m, c, gy, gx, dtype=dtype)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    if change:
        change(features)
    weight, bias, target = draw(1, c, dtype=dtype), draw(2, 1, dtype=dtype), draw(3, m, gy, gx).sigmoid()
    trust = (draw(4, m) - least).clamp(min=0)
    options = {"output": output, "trust": trust}
    inputs = (features, weight, bias)
    got = with_gradients(ops.aligner_mse, inputs, target, backend="triton", **options)
    low = with_gradients(low_precision_mse, inputs, target, **options)
    exact = with_gradients(reference.aligner_mse, [x.double() for x in inputs], target.double(), **options)
    for x, y, z in zip(got, low, exact, strict=True):
        close(x, y, z)
    assert got[1].dtype == dtype and got[1].stride() == features.stride() and got[3].shape == bias.shape
    return got, trust


def low_precision_mse(features, weight, bias, target, *, output, trust):
    z = (features * weight[:, None, None]).sum(1) + bias
    if output == "minmax":
        low, high = z.amin((1, 2), keepdim=True), z.amax((1, 2), keepdim=True)
        z = (z - low) / torch.where(high > low, high - low + 1e-6, torch.inf)
    error = (z - target)[trust > 0].square().float().mean((1, 2))
    return (error * trust[trust > 0]).sum() / (trust.sum() if trust.any() else 1)


@pytest.mark.parametrize("output", ["minmax", "none"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_aligner_mse(output, channels_last):
    (_, df, _, _), trust = check_aligner(output=output, channels_last=channels_last)
    assert 0 < (trust > 0).sum() < 4 and (df[trust == 0] == 0).all() and (df[trust > 0] != 0).any()


@pytest.mark.parametrize("dtype", HALVES)
def test_aligner_mse_in_half_precision(dtype):
    check_aligner(dtype=dtype, gy=32, gx=32)


@few
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["minmax", "none"]))
def test_aligner_mse_any_shape(m, c, gy, gx, output):
    check_aligner(m=m, c=c, gy=gy, gx=gx, output=output)


@pytest.mark.parametrize("axis", range(4))
def test_aligner_mse_of_expanded_features(axis):
    """What stands once in memory gets the sum of the gradients of all for which it stands."""
    shape = [4, 5, 6, 7]
    once = draw(0, *(1 if i == axis else n for i, n in enumerate(shape)))
    weight, bias, target, trust = draw(1, 5), draw(2, 1), draw(3, 4, 6, 7), torch.ones(4, device=DEVICE)

    def mse(x, weight, bias, backend):
        return ops.aligner_mse(x.expand(shape), weight, bias, target, trust=trust, backend=backend)

    got, want = (with_gradients(mse, (once, weight, bias), backend) for backend in ("triton", "torch"))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def test_aligner_mse_with_ties_and_constant_maps():
    def change(features):
        # a constant map
        features[0] = 1
        features[1].round_().clamp_(-1, 1)
        # pairs of equal cells, among them, most likely, the extremes
        features[2, :, 0, :3] = features[2, :, 1, :3]
        features[2, :, 0] *= 10

    check_aligner(c=2, change=change, least=-9)
    check_aligner(c=1, change=change, least=-9)


def test_aligner_mse_without_trust_and_without_words():
    for m in (3, 0):
        features, weight, bias = draw(0, m, 2, 4, 4), draw(1, 2), draw(2, 1)
        trust, target = torch.zeros(m, device=DEVICE), torch.zeros(m, 4, 4, device=DEVICE)
        inputs = [x.requires_grad_() for x in (features, weight, bias)]
        loss = ops.aligner_mse(*inputs, target, trust=trust, backend="triton")
        loss.backward()
        assert loss == 0 and all(x.grad is not None and (x.grad == 0).all() for x in inputs)


def test_aligner_mse_keeps_maps_not_features_for_the_backward():
    features, weight, bias = (
        draw(0, 4, 32, 8, 8).requires_grad_(),
        draw(1, 32).requires_grad_(),
        draw(2, 1).requires_grad_(),
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ops.aligner_mse(
            features,
            weight,
            bias,
            draw(3, 4, 8, 8),
            trust=torch.ones(4, device=DEVICE),
            backend="triton",
        )
    assert max(saved) == 4 * 8 * 8
