"""LoRA: the same step as PEFT's, and files that give the trained model."""

from __future__ import annotations

import copy
import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato.errors import SfumatoError
from sfumato.io.fill import slots
from sfumato.train.recipes.lora import TARGETS, adapted_nets, as_lora, fresh_factors, lora
from sfumato.types import Conditioning

from training import Reference, assert_near, batch, beside, draws, step

PEFT = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"],
    "everywhere": ["to_q", "ff.net.2", "conv1", "time_emb_proj", "conv_in", "proj_in", "fc1"],
}
OURS = {
    "attention": "attention",
    "everywhere": [r"\.attn[12]\.to_q$", r"\.ff\.net\.2$", "conv1$", "time_emb_proj", "^conv_in$", "proj_in", "fc1"],
}


def moved(factors: Any, seed: int = 5) -> Any:
    """Factors as they are after some steps, when `up` is no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), factors)


def flat(factors: Any) -> dict[str, Any]:
    return {
        f"{component}.{path}.{side}": value
        for component, layers in factors.items()
        for path, pair in layers.items()
        for side, value in pair.items()
    }


def with_peft(pipeline: Any, factors: Any, rank: int, alpha: float, targets: list[str]) -> tuple[Any, dict[str, Any]]:
    """A pipeline of the reference with PEFT's layers, and their parameters by our names."""
    import torch
    from peft import LoraConfig

    parts = {name: copy.deepcopy(part) if hasattr(part, "parameters") else part
             for name, part in pipeline.components.items()}  # fmt: skip
    other, parameters = type(pipeline)(**parts), {}
    for component, layers in factors.items():
        module = getattr(other, component)
        module.requires_grad_(False)
        module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian"))
        own = dict(module.named_parameters())
        for path, pair in layers.items():
            path = path if f"{path}.lora_A.default.weight" in own else path.removeprefix("text_model.")
            for side, name in (("down", "A"), ("up", "B")):
                parameter = own.pop(f"{path}.lora_{name}.default.weight")
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(np.array(pair[side])))
                parameters[id(pair[side])] = parameter
        assert not [name for name in own if "lora_" in name], "PEFT changes further layers"
    return other, {name: parameters[id(value)] for name, value in flat(factors).items()}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "targets", "text"),
    [("sd1", "attention", True), ("sd1", "everywhere", True), ("sd2", "attention", False), ("sdxl", "attention", True)],
)
def test_steps_are_those_of_peft(kind, targets, text, pair):
    """Five of the usual ones, and one of the others."""
    both, count = pair(kind, small=True), 5 if (kind, targets) == ("sd1", "attention") else 1
    task = lora(both.model, rank=3, alpha=2, targets=OURS[targets], text=text)
    task = dc.replace(task, trainable=moved(task.trainable))
    pipeline, parameters = with_peft(both.pipeline, task.trainable, 3, 2, PEFT[targets])
    steps = beside(
        task, draws(count), list(map(batch, range(count))), parameters.values(), Reference(pipeline, {}).loss
    )
    for trained, gradients in steps:
        ours, after = flat(gradients), flat(trained)
        unread = [name for name, one in parameters.items() if one.grad is None]  # SDXL goes without the last layer
        assert all(name.startswith("text_encoder.") for name in unread)
        assert bool(unread) == (kind == "sdxl")
        assert not any(ours[name].any() for name in unread)
        kept = parameters.keys() - unread
        assert_near({name: ours[name] for name in kept}, {name: parameters[name].grad for name in kept})
        assert_near(after, {name: one.detach() for name, one in parameters.items()})


# The start


def test_every_target_is_found(loaded):
    model = loaded("sd1")
    found = {name: fresh_factors(model, 4, name, text=True) for name in TARGETS}
    assert {path.rsplit(".", 1)[-1] for path in found["attention"]["text_encoder"]} == set(PEFT["attention"][4:])
    for component, network in (("unet", model.unet), ("text_encoder", model.text_encoders["text_encoder"])):
        layers = {key.removesuffix(".weight") for key, slot in slots(network).items() if slot.path[-1] == "kernel"}
        assert found["all"][component].keys() == layers
        assert found["attention"][component].keys() < found["transformer"][component].keys() <= layers


def test_the_numbers_to_start_from(loaded):
    factors = flat(fresh_factors(loaded("sd1"), 5, "all"))
    down = factors["unet.down_blocks.0.resnets.0.conv1.down"]
    assert down.shape == (5, 32, 3, 3)
    assert factors["unet.down_blocks.0.resnets.0.conv1.up"].shape == (32, 5, 1, 1)
    bound = (32 * 9) ** -0.5
    assert 0.95 * bound < np.abs(down).max() <= bound
    assert not any(value.any() for name, value in factors.items() if name.endswith("up"))
    assert all(value.dtype == np.float32 for value in factors.values())
    again, other = (flat(fresh_factors(loaded("sd1"), 5, "all", seed=seed)) for seed in (0, 1))
    assert all(np.array_equal(again[name], value) for name, value in factors.items())
    assert not np.array_equal(other["unet.conv_in.down"], factors["unet.conv_in.down"])


@pytest.mark.slow
def test_at_the_start_nothing_is_changed(models):
    """Not by one bit, operation by operation; a whole program may be compiled in another order."""
    model = models("sd1")
    task = lora(model, targets=OURS["everywhere"])
    live = adapted_nets(as_lora(task.trainable), model, task.frozen)["unet"]
    rng = np.random.default_rng(0)
    x, context = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1, 8, 8, 4), (1, 77, 24)))
    got, want = (unet(x, jnp.float32(300), Conditioning(context)).eps for unet in (live, model.unet))
    np.testing.assert_array_equal(got, want)


def test_bad_settings(loaded):
    model = loaded("sd1")
    for settings, message in (
        ({"rank": 0}, "rank from 1 on"), ({"alpha": float("nan")}, "finite"), ({"targets": "nowhere"}, "nowhere"),
        ({"targets": "("}, "regular expression"), ({"targets": []}, "needs targets"),
    ):  # fmt: skip
        with pytest.raises(SfumatoError, match=message):
            lora(model, **settings)
    with pytest.raises(SfumatoError, match="9"):
        lora(loaded("sd1-inpaint"))
    with pytest.raises(SfumatoError, match="live"):
        lora(as_lora(fresh_factors(model, 2)).apply(model, live=True))


# The end


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora.safetensors", "pytorch_lora_weights.safetensors"])
def test_files_give_the_trained_model(name, models, tmp_path):
    model = models("sd1")
    task = lora(model, rank=3, alpha=6, targets="transformer", text=True)
    factors = moved(task.trainable)
    task.export(factors, tmp_path / "new")
    loaded = sfumato.load_lora(tmp_path / "new" / name, model)
    assert loaded.report.unmatched == ()
    merged = loaded.apply(model)
    plain, none = lora(merged), {"unet": {}}
    want = step(task, factors, batch(), draws()[0])[0]
    assert step(plain, none, batch(), draws()[0])[0] == pytest.approx(want, rel=1e-5)
    assert step(task, none, batch(), draws()[0])[0] != pytest.approx(want, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parity
def test_the_reference_loads_the_files(pair, tmp_path):
    both = pair("sd1", small=True)
    task = lora(both.model, rank=3, alpha=6, text=True)
    factors = moved(task.trainable)
    task.export(factors, tmp_path)
    want = step(task, factors, batch(), draws()[0])[0]
    for name in ("lora.safetensors", "pytorch_lora_weights.safetensors"):
        parts = {key: copy.deepcopy(part) if hasattr(part, "parameters") else part
                 for key, part in both.pipeline.components.items()}  # fmt: skip
        pipeline = type(both.pipeline)(**parts)
        pipeline.load_lora_weights(str(tmp_path), weight_name=name)
        loss = Reference(pipeline, {}).loss(batch(), draws()[0])
        assert float(loss.detach()) == pytest.approx(want, rel=1e-4)


@pytest.mark.slow
def test_bfloat16_with_gradient_checkpointing(models):
    model = models("sd1")
    wide, narrow = (lora(model, dtype=dtype, remat=remat) for dtype, remat in (("float32", False), ("bfloat16", True)))
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.frozen)} == {jnp.dtype(jnp.bfloat16)}
    factors = moved(wide.trainable)
    want, got = (step(task, factors, batch(), draws()[0]) for task in (wide, narrow))
    assert got[0] == pytest.approx(want[0], rel=0.02)
    for ours, theirs in zip(flat(got[1]).values(), flat(want[1]).values(), strict=True):
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(theirs)
