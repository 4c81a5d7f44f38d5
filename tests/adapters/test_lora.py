"""LoRAs on whole models: the laws of `apply`. Whole runs against the reference are in test_lora_reference.py."""

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
from sfumato.adapters.live import Adapted, find
from sfumato.adapters.lora import Lora
from sfumato.errors import MismatchError, SfumatoError
from sfumato.model import Model
from sfumato.models.controlnet import ControlNet
from sfumato.types import Conditioning

from oracle import assert_close
from pipelines import small, small_net
from runs import Pair, noise

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
)
TEXT = tuple(f"text_model.encoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.fc2"))
PATHS = {"unet": UNET, "text_encoder": TEXT, "text_encoder_2": TEXT}


def delta(kernel: Any, kind: str, rng: np.random.Generator) -> Delta:
    """A random change of a kind, as files have it: numpy arrays."""
    *sides, inputs, outputs = kernel.shape
    ones = (1,) * len(sides)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    if kind == "LoHa":
        places = int(np.prod(sides))
        return LoHa(draw(outputs, 2), draw(2, inputs * places), draw(outputs, 2), draw(2, inputs * places), scale=0.1)
    if kind == "LoKr":
        return LoKr(w1=draw(2, 2), w2=draw(outputs // 2, inputs // 2, *sides), scale=0.1)
    if kind == "full":
        return Full(0.1 * draw(outputs, inputs, *sides))
    magnitude = abs(draw(outputs)) if kind == "DoRA" else None
    return LowRank(draw(2, inputs, *sides), draw(outputs, 2, *ones), scale=0.1, magnitude=magnitude)


def lora_of(model: Any, kind: str = "LoRA", seed: int = 0, components: tuple[str, ...] = tuple(PATHS)) -> Lora:
    """Random changes of a few layers of each network."""
    rng = np.random.default_rng(seed)
    networks = {"controlnet": model} if isinstance(model, ControlNet) else {"unet": model.unet, **model.text_encoders}
    return Lora({
        name: {path: delta(find(network, path).kernel, kind, rng)
               for path in PATHS.get(name, UNET) if find(network, path)}
        for name, network in networks.items() if name in (*components, "controlnet")
    })  # fmt: skip


@pytest.fixture(scope="module")
def models(loaded) -> Any:
    return functools.cache(lambda kind: small(kind, loaded(kind)))


def arrays(model: Any) -> list[jax.Array]:
    return jax.tree.leaves([model.unet, model.vae, dict(model.text_encoders)] if isinstance(model, Model) else model)


def latents(model: Model, **changes: Any) -> np.ndarray:
    return Pair(None, model).ours(**({"steps": 2} | changes))


KINDS = ("LoRA", "DoRA", "LoHa", "LoKr", "full")


# ---- The model that goes in


@pytest.mark.parametrize("live", [False, True])
def test_a_hundred_cycles_in_bfloat16_leave_the_weights_as_they_were(live, models):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (models("sd1").unet, dict(models("sd1").text_encoders)))
    model = dc.replace(models("sd1"), unet=half[0], text_encoders=half[1])
    held = arrays(model)
    bits = [np.asarray(a).tobytes() for a in held]
    kinds = {kind: lora_of(model, kind) for kind in KINDS}
    for cycle in range(100):
        other = kinds[KINDS[cycle % len(KINDS)]].apply(model, 0.01 * cycle + 0.1, live=live)
        assert other.unet is not model.unet
        assert all(ours is theirs for ours, theirs in zip(arrays(model), held, strict=True))
        assert other.dtype == "bfloat16"
    assert [np.asarray(a).tobytes() for a in arrays(model)] == bits


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("live", [False, True])
def test_what_is_not_changed_is_shared(kind, live, models):
    model = models(kind)
    lora = lora_of(model)
    other = lora.apply(model, 0.5, live=live)
    kept = {id(a) for a in arrays(other)}
    gone = [a for a in arrays(model) if id(a) not in kept]
    assert len(gone) == (0 if live else sum(map(len, lora.layers.values())))
    assert (other.vae, other.tokenizers, other.schedule) == (model.vae, model.tokenizers, model.schedule)
    assert lora_of(model, components=("unet",)).apply(model).text_encoders == model.text_encoders


# ---- Strengths


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_strength_0_is_the_same_networks(kind, models):
    model = models(kind)
    same = lora_of(model).apply(model, 0)
    assert same.unet is model.unet
    assert all(same.text_encoders[name] is encoder for name, encoder in model.text_encoders.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_live_is_merged_and_strength_0_is_absent(kind, models):
    model = models("sd1")
    lora = lora_of(model, kind)
    without, merged = latents(model), latents(lora.apply(model, 0.7))
    assert np.abs(merged - without).max() > 1e-2
    assert_close(latents(lora.apply(model, 0.7, live=True)), merged, 1e-4)
    np.testing.assert_array_equal(latents(lora.apply(model, 0, live=True)), without)


@pytest.mark.slow
def test_changing_strengths_compiles_nothing(models, compiled):
    model, lora, other = models("sdxl"), lora_of(models("sdxl"), "LoRA"), lora_of(models("sdxl"), "LoKr", 1)

    def run(lora: Lora, *strengths: float) -> np.ndarray:
        both = lora.apply(model, strengths[0], text=strengths[1], live=True)
        return latents(other.apply(both, strengths[2], live=True))

    seen = [run(lora, 0.5, 0.2, 1.0)]
    compiled.clear()
    seen.append(run(lora, 0.7, 0.2, 1.0))
    seen.append(run(lora, 0.5, 1.0, 1.0))
    seen.append(run(lora, 0.5, 0.2, 0.0))
    seen.append(run(lora_of(model, "LoRA", 7), 0.5, 0.2, 1.0))
    assert compiled == []
    assert all(np.any(seen[0] != each) for each in seen[1:])


@pytest.mark.parametrize("live", [False, True])
def test_strengths_of_the_unet_and_the_text_encoders_apart(live, models):
    model = models("sdxl")
    lora = lora_of(model)
    x = {"unet": jnp.ones((1, 4, find(model.unet, UNET[0]).kernel.shape[0])), "text_encoder": jnp.ones((1, 4, 12)),
         "text_encoder_2": jnp.ones((1, 4, 20))}  # fmt: skip

    def outputs(*args: Any, **strengths: Any) -> dict[str, np.ndarray]:
        other = lora.apply(model, *args, live=live, **strengths)
        networks = {"unet": other.unet, **other.text_encoders}
        return {name: np.asarray(find(net, PATHS[name][0])(x[name])) for name, net in networks.items()}

    both, apart = outputs(0.5), outputs(0.9, unet=0.5, text=0.25)
    only_unet, only_text, none = outputs(0.5, text=0), outputs(0, text=0.5), outputs(0)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        text = name.startswith("text")
        np.testing.assert_array_equal(only_unet[name], (none if text else both)[name])
        np.testing.assert_array_equal(only_text[name], (both if text else none)[name])
        change, half = both[name] - none[name], (0.5 if text else 1.0)
        assert np.abs(change).max() > 0.1
        assert np.abs(apart[name] - none[name] - half * change).max() < 1e-4


@pytest.mark.parametrize("live", [False, True])
def test_several_with_strengths_of_their_own(live, models):
    """Each adds its own part, whatever the order."""
    model = models("sd1")
    chosen = [(lora_of(model, kind, seed), 0.4 + seed) for seed, kind in enumerate(("LoRA", "LoHa", "LoKr"))]
    path, x = UNET[0], jnp.ones((1, 3, 16))
    before = find(model.unet, path)
    want = before.kernel[...]
    for lora, strength in chosen:
        want = changed(want, lora.layers["unet"][path], jnp.float32(strength))
    for order in (chosen, chosen[::-1]):
        other = model
        for lora, strength in order:
            other = lora.apply(other, strength, live=live)
        layer = find(other.unet, path)
        assert isinstance(layer, Adapted) == live
        assert_close(layer(x), x @ want, 1e-5)


@pytest.mark.parametrize("live", [False, True])
def test_apply_inside_of_a_compiled_program(live, models):
    """With a strength that the program is given, and 0 among them."""
    model = models("sd1")
    lora, path, x = lora_of(model), UNET[0], jnp.ones((1, 3, 16))
    layer = jax.jit(lambda lora, strength: find(lora.apply(model, strength, live=live).unet, path))
    for strength in (0.0, 0.8):
        assert_close(layer(lora, strength)(x), find(lora.apply(model, strength).unet, path)(x), 1e-6)
    np.testing.assert_array_equal(layer(lora, 0.0)(x), find(model.unet, path)(x))


@pytest.mark.slow
def test_gradients_with_respect_to_a_lora(models):
    """Through the whole UNet in live mode; those of a directional difference."""
    model = models("sd1")
    lora = lora_of(model, components=("unet",))
    lora = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), lora)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(lora))
    cond = Conditioning(jnp.asarray(noise((1, 5, 24))))

    @jax.jit
    def loss(lora: Lora) -> Any:
        unet = lora.apply(model, 1.0, live=True).unet
        return (unet(jnp.asarray(noise()), jnp.float32(300), cond).eps ** 2).mean()

    slopes = jax.grad(loss)(lora)
    along = jax.tree.map(lambda a: jnp.asarray(noise(a.shape)), lora)
    sizes = {jax.tree_util.keystr(p): float(jnp.abs(a).max()) for p, a in jax.tree_util.tree_leaves_with_path(slopes)}
    assert all((size == 0) == (".scale" in name) for name, size in sizes.items()), sizes
    along = dc.replace(along, layers={"unet": {
        path: dc.replace(each, scale=jnp.zeros(())) for path, each in along.layers["unet"].items()}})  # fmt: skip
    predicted = sum(float((a * b).sum()) for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(along), strict=True))
    step = 1e-3
    there, back = (loss(jax.tree.map(lambda a, b, s=s: a + s * b, lora, along)) for s in (step, -step))
    assert abs(float(there - back) / (2 * step) - predicted) < 0.02 * abs(predicted)


# ---- ControlNets


@pytest.mark.parametrize("live", [False, True])
def test_on_a_controlnet(live, models):
    """What was trained on it, and the encoder half of what was trained on a UNet."""
    net, model = small_net("sd1"), models("sd1")
    own = lora_of(net)
    assert set(own.layers) == {"controlnet"}
    half = dict(own.layers["controlnet"])
    decoder = {"up_blocks.0.resnets.0.conv1": delta(find(model.unet, "up_blocks.0.resnets.0.conv1").kernel, "LoRA",
                                                    np.random.default_rng(1))}  # fmt: skip
    of_a_unet = Lora({"unet": half | decoder, "text_encoder": lora_of(model).layers["text_encoder"]})
    x = jnp.ones((1, 3, 16))
    layers = [find(lora.apply(net, 0.5, live=live), UNET[0]) for lora in (own, of_a_unet)]
    np.testing.assert_array_equal(layers[0](x), layers[1](x))
    assert np.abs(layers[0](x) - find(net, UNET[0])(x)).max() > 0.1
    assert own.apply(net, 1.0, unet=0) is net
    with pytest.raises(MismatchError, match="changes nothing that a ControlNet has, but only unet"):
        Lora({"unet": decoder}).apply(net)


# ---- What does not fit


def test_an_adapter_for_another_model_is_refused(models):
    sd1, sdxl = models("sd1"), models("sdxl")
    with pytest.raises(MismatchError, match=r"This LoRA changes text_encoder_2, which .*model \(Stable Diffusion 1"):
        lora_of(sdxl, components=("text_encoder_2",)).apply(sd1)
    with pytest.raises(MismatchError, match=r"^This LoRA changes controlnet, which .* does not have\.$"):
        lora_of(small_net("sd1")).apply(sd1)
    wrong = f"of the 4 layers of text_encoder in this LoRA do not fit .*; in {re.escape(TEXT[0])} it changes a weight"
    with pytest.raises(MismatchError, match=wrong):
        lora_of(sdxl, components=("text_encoder",)).apply(sd1)


def test_an_unknown_layer_is_named_with_the_nearest(models):
    model = models("sd1")
    lora = Lora({"unet": {f"{BLOCK}.attn1.to_query": LowRank(np.ones((1, 16)), np.ones((16, 1)))}})
    want = (
        rf"1 of the 1 layers of unet .* are not in .*: {re.escape(BLOCK)}.attn1.to_query \(nearest: {re.escape(BLOCK)}"
    )
    for each in (model, lora_of(model).apply(model, live=True)):
        with pytest.raises(MismatchError, match=want):
            lora.apply(each)


@pytest.mark.parametrize(("path", "bias", "words"), [
    (UNET[0], 16, "changes a bias of 16 and the layer has none"),
    (f"{BLOCK}.attn1.to_out.0", 8, "changes a bias of 8 and the layer has 16"),
])  # fmt: skip
def test_a_bias_that_does_not_fit(path, bias, words, models):
    with pytest.raises(MismatchError, match=words):
        Lora({"unet": {path: Full(bias=np.ones(bias, np.float32))}}).apply(models("sd1"))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("strength", ["strong", float("nan"), None, [1, 2]])
def test_a_strength_is_a_number(strength, live, models, unchecked):
    with pytest.raises(SfumatoError, match="A LoRA's strength must be a"):
        lora_of(models("sd1")).apply(models("sd1"), strength, live=live)


def test_only_models_are_adapted(models, unchecked):
    with pytest.raises(SfumatoError, match=r"applied to a model \(sfumato.load\) or a ControlNet .*, not to a UNet\."):
        lora_of(models("sd1")).apply(models("sd1").unet)


def test_it_prints_in_a_line(models):
    assert repr(lora_of(models("sd1"))) == "Lora(unet: 5 layers, text_encoder: 4 layers)"
