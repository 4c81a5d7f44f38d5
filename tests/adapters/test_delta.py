"""The change of one layer, against the formulas written out, and against PEFT's layers."""

from __future__ import annotations

import dataclasses as dc
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.adapters.delta import Delta, Full, LoHa, LoKr, LowRank, changed
from sfumato.models.layers import Shapes, conv, linear

from oracle import assert_close, from_torch, to_torch

RNG = np.random.default_rng(5)
O, I, R, S, K = 6, 8, 3, 2, 3  # noqa: E741  outputs, inputs, rank, another rank, side of the kernel


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def kronecker(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Blocks of b, each times an entry of a."""
    return np.block([[entry * b for entry in row] for row in a])


def by_place(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Kronecker product of a with every place of the kernel b [O, I, k, k]."""
    places = [[kronecker(a, b[:, :, y, x]) for x in range(b.shape[3])] for y in range(b.shape[2])]
    return np.array(places).transpose(2, 3, 0, 1)


def core(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sum_ij a[i, o] t[i, j, y, x] b[j, n], as [o, n, y, x]."""
    places = [[a.T @ t[:, :, y, x] @ b for x in range(t.shape[3])] for y in range(t.shape[2])]
    return np.array(places).transpose(2, 3, 0, 1)


def axes_of(weight: np.ndarray) -> tuple[int, ...]:
    """Torch's axes in our order: sides, inputs, outputs."""
    return (*range(2, weight.ndim), 1, 0)


def cases() -> dict[str, tuple[Delta, np.ndarray]]:
    """By name: a delta, and what it is in torch's layout."""
    found: dict[str, tuple[Delta, np.ndarray]] = {}
    down, up, down3, mid = draw(R, I), draw(O, R), draw(R, I, K, K), draw(R, R, K, K)
    ones = (1, 1)
    found["LoRA"] = LowRank(down, up, scale=0.5), 0.5 * up @ down
    found["LoRA, stored as a convolution"] = LowRank(down.reshape(R, I, *ones), up.reshape(O, R, *ones)), up @ down
    wide = (0.25 * up @ down3.reshape(R, -1)).reshape(O, I, K, K)
    found["LoCon"] = LowRank(down3, up.reshape(O, R, *ones), scale=0.25), wide
    tucker = LowRank(down.reshape(R, I, *ones), up.reshape(O, R, *ones), mid, scale=2.0)
    found["LoCon, Tucker"] = tucker, 2 * core(mid, up.T, down)

    a, b, c, d = draw(O, R), draw(R, I), draw(O, S), draw(S, I)
    found["LoHa"] = LoHa(a, b, c, d, scale=0.5), 0.5 * (a @ b) * (c @ d)
    b3, d3 = draw(R, I * K * K), draw(S, I * K * K)
    found["LoHa, convolution"] = LoHa(a, b3, c, d3), ((a @ b3) * (c @ d3)).reshape(O, I, K, K)
    t1, t2 = draw(R, R, K, K), draw(S, S, K, K)
    found["LoHa, Tucker"] = LoHa(a.T, b, c.T, d, t1, t2, scale=3.0), 3 * core(t1, a.T, b) * core(t2, c.T, d)

    firsts = {"w1": {"w1": draw(2, 4)}, "w1_a w1_b": {"w1_a": draw(2, S), "w1_b": draw(S, 4)}}
    seconds = {
        "w2": {"w2": draw(3, 2)}, "w2_a w2_b": {"w2_a": draw(3, S), "w2_b": draw(S, 2)},
        "w2 convolution": {"w2": draw(3, 2, K, K)},
        "w2_a w2_b convolution": {"w2_a": draw(3, S), "w2_b": draw(S, 2 * K * K)},
        "t2": {"t2": draw(S, S, K, K), "w2_a": draw(S, 3), "w2_b": draw(S, 2)},
    }  # fmt: skip
    for name, first in firsts.items():
        for other, second in seconds.items():
            left = first["w1"] if "w1" in first else first["w1_a"] @ first["w1_b"]
            if "t2" in second:
                right = core(second["t2"], second["w2_a"], second["w2_b"])
            else:
                right = second["w2"] if "w2" in second else second["w2_a"] @ second["w2_b"]
            right = right.reshape(3, 2, K, K) if "convolution" in other else right
            want = kronecker(left, right) if right.ndim == 2 else by_place(left, right)
            found[f"LoKr, {name}, {other}"] = LoKr(**first, **second, scale=1.5), 1.5 * want
    found["full"] = Full(down3.transpose(1, 0, 2, 3).copy()), down3.transpose(1, 0, 2, 3)
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_the_formula(name):
    """As a parameter of a layer of ours: outputs last, sides first."""
    delta, want = CASES[name]
    axes = axes_of(want)
    shape = tuple(want.shape[axis] for axis in axes)
    got = delta.matrix(shape)
    assert got.dtype == jnp.float32
    assert_close(got, want.transpose(axes), 1e-6)
    assert delta.misfit(shape) is None
    if delta.shape == want.shape:
        assert_close(delta.matrix(), got, 0)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["LoRA", "LoCon", "LoHa, Tucker", "LoKr, w1, t2", "LoKr, w1, w2_a w2_b"])
def test_what_it_does_to_a_layer_is_what_it_does_to_torchs(name):
    import torch

    delta, weight = CASES[name]
    outputs, inputs = weight.shape[:2]
    x = draw(2, 7, 5, inputs)
    make = functools.partial(conv, size=K, stride=2) if weight.ndim == 4 else linear
    layer: Any = make(inputs, outputs, bias=False, rngs=Shapes())
    layer.kernel = layer.kernel.replace(delta.matrix(layer.kernel.shape))
    if weight.ndim == 4:
        theirs = from_torch(torch.nn.functional.conv2d(to_torch(x), torch.tensor(weight), stride=2, padding=K // 2))
    else:
        theirs = torch.nn.functional.linear(torch.tensor(x), torch.tensor(weight)).numpy()
    assert_close(layer(jnp.asarray(x)), theirs, 1e-5)


def test_numbers_in_half_precision_are_multiplied_in_float32():
    delta = LowRank((100 * draw(R, I)).astype(np.float16), (1000 * draw(O, R)).astype(np.float16), scale=0.5)
    want = 0.5 * delta.up.astype(np.float32) @ delta.down.astype(np.float32)
    assert np.abs(want).max() > np.finfo(np.float16).max
    assert_close(delta.matrix(), want.T, 1e-6)


def test_a_dense_weight_fits_a_convolution_of_one_place_and_the_other_way_round():
    dense, pointwise = CASES["LoRA"][0], CASES["LoRA, stored as a convolution"][0]
    for delta in (dense, pointwise):
        for shape in ((I, O), (1, 1, I, O)):
            assert delta.misfit(shape) is None
            assert delta.matrix(shape).shape == shape


@pytest.mark.parametrize(("delta", "shape", "words"), [
    (LowRank(draw(R, I), draw(O, R)), (I + 1, O), r"changes a weight of \[6, 8\] and the layer has \[6, 9\]"),
    (LowRank(draw(R, I), draw(O, R)), (O, I), "and the layer has"),
    (LowRank(draw(R, I, K, K), draw(O, R, 1, 1)), (1, 1, I, O), r"changes a weight of \[6, 8, 3, 3\]"),
    (LowRank(draw(R, I), draw(O, R + 1)), (I, O), r"factors of \[3, 8\], \[6, 4\] do not go together"),
    (LoHa(draw(O, R), draw(R, I), draw(O, S), draw(S, I + 1)), (I, O), "do not go together"),
    (LowRank(draw(R, I), draw(O, R), magnitude=draw(1, O)), (I, O), r"magnitude has \[1, 6\] numbers"),
    (Full(draw(O)), (O + 1,), r"changes a weight of \[6\] and the layer has \[7\]"),
])  # fmt: skip
def test_a_change_of_another_shape_says_why(delta, shape, words, unchecked):
    assert re.search(words, delta.misfit(shape))


def test_the_rank():
    assert {name: delta.rank for name, (delta, _) in CASES.items() if "LoKr" not in name} == {
        "LoRA": R, "LoRA, stored as a convolution": R, "LoCon": R, "LoCon, Tucker": R, "LoHa": R,
        "LoHa, convolution": R, "LoHa, Tucker": R, "full": None,
    }  # fmt: skip
    assert CASES["LoKr, w1, w2"][0].rank is None
    assert CASES["LoKr, w1_a w1_b, w2"][0].rank == CASES["LoKr, w1, t2"][0].rank == S


# ---- DoRA


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("shape", [(O,), (O, 1), (1, I)])
@pytest.mark.parametrize("name", ["LoRA", "LoCon", "LoHa", "LoKr, w1, w2 convolution", "full"])
def test_dora(name, shape, strength):
    """m (W + s dW) / |W + s dW|, a length for each output, or for each input."""
    delta, change = CASES[name]
    weight = draw(*change.shape)
    outputs, inputs, *sides = change.shape
    sizes = {O: outputs, I: inputs, 1: 1}
    shape = tuple(sizes[n] for n in shape) + (1,) * (len(shape) > 1) * len(sides)
    magnitude = np.abs(draw(*shape))
    changed_by = weight + strength * change
    want = np.empty_like(weight)
    for o in range(outputs):
        for i in range(inputs):
            column = changed_by[:, i] if shape[0] == 1 else changed_by[o]
            want[o, i] = magnitude.reshape(-1)[i if shape[0] == 1 else o] * changed_by[o, i] / np.linalg.norm(column)
    axes = axes_of(weight)
    got = changed(jnp.asarray(weight.transpose(axes)), dc.replace(delta, magnitude=magnitude), jnp.float32(strength))
    assert_close(got, want.transpose(axes), 1e-6)


@pytest.mark.parametrize("name", ["LoRA", "LoHa, convolution"])
@pytest.mark.parametrize("magnitude", [None, np.float32(7) + draw(O)])
def test_strength_0_is_the_layer_itself(name, magnitude):
    delta, change = CASES[name]
    kernel = jnp.asarray(draw(*change.shape).transpose(axes_of(change)), jnp.bfloat16)
    kernel = kernel.at[0].set(-0.0)
    got = jax.jit(changed)(kernel, dc.replace(delta, magnitude=magnitude), jnp.float32(0)).astype(kernel.dtype)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), np.asarray(kernel).view(np.uint16))


def test_a_column_of_zeros_has_no_length_and_stays_zero():
    delta = LowRank(np.zeros((R, I), np.float32), draw(O, R), magnitude=draw(O))
    assert np.all(np.asarray(changed(jnp.zeros((I, O)), delta, jnp.float32(1))) == 0)


def test_the_length_is_a_constant_to_the_gradient():
    """arXiv:2402.09353, section 4.3: d/dW' of m W' / |W'| is m / |W'|."""
    kernel, magnitude = jnp.asarray(draw(I, O)), np.abs(draw(O))
    delta = Full(draw(O, I), magnitude=magnitude)
    slopes = jax.grad(lambda delta: changed(kernel, delta, jnp.float32(1)).sum())(delta)
    length = np.linalg.norm(kernel.T + delta.diff, axis=1)
    assert_close(slopes.diff, np.tile((magnitude / length)[:, None], (1, I)), 1e-5)
    assert_close(slopes.magnitude, (kernel.T + delta.diff).sum(1) / length, 1e-5)


def test_training_leaves_the_scale_alone():
    delta = LowRank(draw(R, I), draw(O, R), scale=0.5)
    slopes = jax.grad(lambda delta: (delta.matrix() ** 2).sum())(delta)
    assert slopes.scale == 0
    assert np.abs(slopes.down).max() > 0


# ---- PEFT


def peft_layer(config: Any, base: Any, *, spread: float = 1.0) -> Any:
    """A torch layer with an adapter of PEFT's around it, with random numbers throughout."""
    import torch
    from peft import inject_adapter_in_model

    torch.manual_seed(1)
    model = inject_adapter_in_model(config, torch.nn.Sequential(base))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name:
                parameter.copy_(torch.randn_like(parameter).abs() + 0.1 if "magnitude" in name else
                                spread * torch.randn_like(parameter))  # fmt: skip
    return model[0]


def bases() -> dict[str, Any]:
    import torch

    return {"dense": torch.nn.Linear(16, 24), "convolution": torch.nn.Conv2d(16, 24, K, padding=1)}


def parameters(layer: Any, prefix: str) -> dict[str, np.ndarray]:
    """The adapter's arrays by their names in a file."""
    named = ((name.split(".")[0], value) for name, value in layer.named_parameters() if prefix in name)
    return {name.removeprefix(prefix): value.detach().numpy() for name, value in named}


def assert_like_peft(delta: Delta, layer: Any) -> None:
    theirs = layer.get_delta_weight("default").detach().numpy()
    axes = axes_of(theirs)
    shape = tuple(theirs.shape[axis] for axis in axes)
    assert delta.misfit(shape) is None
    assert_close(delta.matrix(shape), theirs.transpose(axes), 1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("base", ["dense", "convolution"])
@pytest.mark.parametrize("tucker", [False, True])
def test_loha_is_that_of_peft(base, tucker):
    from peft import LoHaConfig

    config = LoHaConfig(r=4, alpha=2, target_modules=["0"], use_effective_conv2d=tucker)
    layer = peft_layer(config, bases()[base])
    assert_like_peft(LoHa(**parameters(layer, "hada_"), scale=0.5), layer)


@pytest.mark.parity
@pytest.mark.parametrize("base", ["dense", "convolution"])
@pytest.mark.parametrize(("rank", "both"), [(2, False), (1, True), (64, False)])
@pytest.mark.parametrize("tucker", [False, True])
def test_lokr_is_that_of_peft(base, rank, both, tucker):
    from peft import LoKrConfig

    config = LoKrConfig(
        r=rank, alpha=3 * rank, target_modules=["0"], use_effective_conv2d=tucker, decompose_both=both,
        decompose_factor=4,
    )  # fmt: skip
    layer = peft_layer(config, bases()[base])
    assert_like_peft(LoKr(**parameters(layer, "lokr_"), scale=3.0), layer)


@pytest.mark.parity
@pytest.mark.parametrize("base", ["dense", "convolution"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_dora_are_those_of_peft(base, strength, dora):
    """The whole layer, at a strength that is set as diffusers sets it."""
    import torch
    from peft import LoraConfig

    layer = peft_layer(LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=dora), bases()[base], spread=0.2)
    layer.eval()
    layer.set_scale("default", strength)
    got = parameters(layer, "lora_")
    magnitude = got["magnitude_vector"].reshape(-1) if dora else None
    delta = LowRank(got["A"], got["B"], scale=2.0, magnitude=magnitude)
    weight = layer.base_layer.weight.detach().numpy()
    axes = axes_of(weight)
    kernel = changed(jnp.asarray(weight.transpose(axes)), delta, jnp.float32(strength))
    x = draw(2, 16, 5, 5) if base == "convolution" else draw(2, 16)
    with torch.no_grad():
        theirs = layer(torch.tensor(x)).numpy()
        ours = layer.base_layer
        ours.weight.copy_(torch.tensor(np.asarray(kernel).transpose((-1, -2, *range(weight.ndim - 2)))))
        assert_close(ours(torch.tensor(x)).numpy(), theirs, 1e-5)
