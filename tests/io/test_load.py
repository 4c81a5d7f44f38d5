"""Folders, files and the way back: what diffusers saved loads here, what is saved here loads in diffusers."""

from __future__ import annotations

import dataclasses as dc
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato.io.fill import slots
from sfumato.io.folder import choose_weights
from sfumato.model import check_fits

from models.test_unet import inputs, run, run_torch
from models.tiny import CONTROLNETS
from oracle import assert_close, from_torch, seeded, to_torch
from pipelines import KINDS, net_config


def family(kind: str) -> str:
    """The family that a kind of pipeline belongs to."""
    return kind if kind == "sdxl-refiner" else {"instruct": "sd1"}.get(kind.split("-")[0], kind.split("-")[0])


def parameters(module: nnx.Module) -> dict[str, np.ndarray]:
    values = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    return {key: values[slot.path] for key, slot in slots(module).items()}


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_diffusers_loads_and_computes_the_same(kind, saved):
    import torch

    folder, pipeline = saved(kind)
    model = sfumato.load(folder)
    assert model.family == family(kind)
    assert model.schedule.prediction_type == pipeline.scheduler.config.prediction_type
    values = inputs(model.unet.config)
    assert_close(run(model.unet, values).eps, from_torch(run_torch(pipeline.unet, values)))
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    want = pipeline.vae.decode(to_torch(latents) / pipeline.vae.config.scaling_factor).sample
    assert_close(jax.jit(lambda vae, z: vae.decode(z))(model.vae, jnp.asarray(latents)), from_torch(want))
    prompt = ["a photograph of an astronaut riding a horse!"]
    for name, encoder in model.text_encoders.items():
        theirs = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        ids = model.tokenizers[name.replace("text_encoder", "tokenizer")](prompt)
        want_ids = theirs(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        np.testing.assert_array_equal(ids, want_ids)
        out = getattr(pipeline, name)(torch.tensor(want_ids), output_hidden_states=True)
        assert_close(encoder(jnp.asarray(ids)).hidden, out.last_hidden_state.detach())
        if encoder.config.projects:
            assert_close(encoder(jnp.asarray(ids)).pooled, out.text_embeds.detach())


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_in_diffusers_with_identical_tensors(kind, saved, tmp_path):
    import diffusers

    folder, pipeline = saved(kind)
    model = sfumato.load(folder)
    out = sfumato.save(model, tmp_path / "out")
    # The reference insists on being told of a depth estimator, even of none.
    absent = {"depth_estimator": None, "feature_extractor": None} if kind == "sd2-depth" else {}
    loaded = getattr(diffusers, KINDS[kind][0]).from_pretrained(out, **absent)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(loaded, name, None), getattr(pipeline, name, None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            mine, want = ours.state_dict(), theirs.state_dict()
            assert mine.keys() == want.keys()
            assert all(mine[key].equal(want[key]) for key in want)
    assert loaded.scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type
    assert loaded.scheduler.config.steps_offset == 1
    again = sfumato.load(out)
    assert again.schedule.to_config() == sfumato.load(out).schedule.to_config()
    for a, b in zip(jax.tree.leaves(again.unet), jax.tree.leaves(model.unet), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd1", "sdxl", "bgr"])
def test_a_controlnet_goes_both_ways(name, tmp_path):
    from diffusers import ControlNetModel

    theirs = seeded(lambda: ControlNetModel(**CONTROLNETS[name]))
    theirs.save_pretrained(tmp_path / "theirs")
    net = sfumato.load_controlnet(tmp_path / "theirs")
    back = ControlNetModel.from_pretrained(sfumato.save(net, tmp_path / "ours"))
    want = theirs.state_dict()
    assert back.state_dict().keys() == want.keys()
    assert all(back.state_dict()[key].equal(want[key]) for key in want)
    assert back.config.controlnet_conditioning_channel_order == net.config.controlnet_conditioning_channel_order


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_rounded_float32(dtype, saved, tmp_path):
    folder, _ = saved("sd1")
    whole, half = sfumato.load(folder), sfumato.load(folder, dtype=dtype)
    rounded = parameters(half.unet)
    for key, value in parameters(whole.unet).items():
        np.testing.assert_array_equal(rounded[key], value.astype(jnp.dtype(dtype)), err_msg=key)
    again = sfumato.load(sfumato.save(half, tmp_path / "half"), dtype=dtype)
    read = parameters(again.unet)
    for key, value in rounded.items():
        np.testing.assert_array_equal(read[key], value, err_msg=key)


@pytest.mark.parity
def test_variants_pickles_and_shards(saved, tmp_path):
    folder, pipeline = saved("sd1")
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    pipeline.vae.save_pretrained(tmp_path / "vae", safe_serialization=False, variant="fp16")
    for name in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "model_index.json", tmp_path)
    model = sfumato.load(tmp_path)
    for part in ("unet", "vae"):
        want = parameters(getattr(sfumato.load(folder), part))
        for key, value in parameters(getattr(model, part)).items():
            np.testing.assert_array_equal(value, want[key], err_msg=key)


@pytest.mark.parametrize(
    ("names", "variant", "chosen"),
    [
        (["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"], None, ".safetensors"),
        (["diffusion_pytorch_model.fp16.safetensors"], None, ".fp16.safetensors"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.bin"], "fp16", ".fp16.bin"),
        (["diffusion_pytorch_model.safetensors.index.fp16.json"], "fp16", ".safetensors.index.fp16.json"),
        (["diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.bin"], "fp16",
         ".fp16.safetensors.index.json"),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.safetensors"], None, ".safetensors"),
        (["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.safetensors.index.json"],
         None, ".safetensors.index.json"),
    ],
)  # fmt: skip
def test_which_weights_are_read(names, variant, chosen):
    assert choose_weights(names, variant=variant, where="here") == "diffusion_pytorch_model" + chosen


@pytest.mark.parametrize(
    ("names", "variant", "words"),
    [
        ([], None, "here has no weights"),
        (["diffusion_pytorch_model.safetensors"], "fp16", "no variant 'fp16'; there is plain weights"),
        (["model.fp16.safetensors", "model.ema.safetensors"], None, "no plain weights; there is 'ema', 'fp16'"),
    ],
)
def test_weights_that_are_not_there(names, variant, words):
    with pytest.raises(sfumato.FileError, match=words):
        choose_weights(names, variant=variant, where="here")


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v != "gone"}))


def rewrite(path: Path, change) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGE = {
    "no index": (lambda p: (p / "model_index.json").unlink(), "model_index.json is missing"),
    "another kind of model": (
        lambda p: edit(p / "model_index.json", _class_name="FluxPipeline", unet="gone"),
        "holds FluxPipeline, which has no UNet",
    ),
    "a lost component": (lambda p: shutil.rmtree(p / "vae"), "model_index.json names vae, which is not there"),
    "no weights": (lambda p: (p / UNET).unlink(), "has no weights"),
    "a damaged configuration": (lambda p: (p / "unet/config.json").write_text("{"), "config.json is damaged"),
    "an option that is not there": (
        lambda p: edit(p / "unet/config.json", class_embed_type="projection"), "class_embed_type='projection'"
    ),
    "a missing tensor": (
        lambda p: rewrite(p / UNET, lambda t: t.pop("conv_in.weight")), "1 missing: conv_in.weight"
    ),
    "a renamed tensor": (
        lambda p: rewrite(p / UNET, lambda t: t.update({"conv_inn.weight": t.pop("conv_in.weight")})),
        r"1 missing: conv_in.weight \(nearest in the file: conv_inn.weight\)",
    ),
    "a misshapen tensor": (
        lambda p: rewrite(p / UNET, lambda t: t.update({"conv_in.bias": np.zeros(5, np.float32)})),
        r"conv_in.bias is \[5\] and should be \[32\]",
    ),
    "whole numbers": (
        lambda p: rewrite(p / UNET, lambda t: t.update({"conv_in.bias": np.zeros(32, np.int64)})),
        "conv_in.bias holds int64",
    ),
    "not a number": (
        lambda p: rewrite(p / UNET, lambda t: t.update({"conv_in.bias": np.full(32, np.nan, np.float32)})),
        "conv_in.bias holds numbers that are not finite",
    ),
    "a damaged tokenizer": (lambda p: (p / "tokenizer/tokenizer.json").write_text("[]"), "tokenizer.json"),
    "an unknown beta schedule": (
        lambda p: edit(p / "scheduler/scheduler_config.json", beta_schedule="sigmoid"), "beta schedule 'sigmoid'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_one_clear_sentence(what, saved, tmp_path):
    folder, _ = saved("sd1")
    shutil.copytree(folder, tmp_path / "model")
    damage, words = DAMAGE[what]
    damage(tmp_path / "model")
    with pytest.raises(sfumato.SfumatoError, match=words) as caught:
        sfumato.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_all_wrong_keys_are_named_at_once(saved, tmp_path):
    folder, _ = saved("sd1")
    shutil.copytree(folder, tmp_path / "model")

    def damage(tensors):
        del tensors["conv_in.weight"], tensors["conv_out.bias"]
        tensors["surprise"] = np.zeros(1, np.float32)
        tensors["conv_norm_out.bias"] = np.zeros(3, np.float32)

    rewrite(tmp_path / "model" / UNET, damage)
    with pytest.raises(sfumato.MismatchError) as caught:
        sfumato.load(tmp_path / "model")
    for word in ("2 missing", "conv_in.weight", "conv_out.bias", "1 unexpected: surprise", "1 misshapen"):
        assert word in str(caught.value)


@pytest.mark.parity
def test_a_controlnet_of_another_family_is_refused(saved, tmp_path):
    from diffusers import ControlNetModel

    folder, _ = saved("sdxl")
    ControlNetModel(**net_config("sd1")).save_pretrained(tmp_path / "net")
    net, model = sfumato.load_controlnet(tmp_path / "net"), sfumato.load(folder)
    with pytest.raises(sfumato.MismatchError, match=r"made for Stable Diffusion 1\.x .* is Stable Diffusion XL"):
        check_fits(net, model)
    check_fits(net, sfumato.load(saved("sd1")[0]))


def test_another_autoencoder(saved, tmp_path):
    folder, _ = saved("sd1")
    model, other = sfumato.load(folder), sfumato.load(saved("sdxl")[0])
    mixed = sfumato.load(folder, vae=saved("sdxl")[0] / "vae")
    assert mixed.vae.config == other.vae.config
    for a, b in zip(jax.tree.leaves(mixed.vae), jax.tree.leaves(other.vae), strict=True):
        np.testing.assert_array_equal(a, b)
    assert mixed.unet.config == model.unet.config


def test_saving_is_all_or_nothing(saved, tmp_path, monkeypatch):
    model = sfumato.load(saved("sd1")[0])
    out = sfumato.save(model, tmp_path / "out")
    with pytest.raises(sfumato.SfumatoError, match="is there already"):
        sfumato.save(model, out)
    before = sorted(p.relative_to(out) for p in out.rglob("*"))
    broken = dc.replace(model, options={"unwritable": object()})
    with pytest.raises(sfumato.SfumatoError, match="cannot be written as JSON"):
        sfumato.save(broken, out, overwrite=True)
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    sfumato.save(model, out, overwrite=True)
    assert sorted(p.relative_to(out) for p in out.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_saving_over_the_files_that_a_model_came_from(saved, tmp_path):
    shutil.copytree(saved("sd1")[0], tmp_path / "model")
    model = sfumato.load(tmp_path / "model")
    want = parameters(model.unet)
    sfumato.save(model, tmp_path / "model", overwrite=True)
    for key, value in parameters(sfumato.load(tmp_path / "model").unet).items():
        np.testing.assert_array_equal(value, want[key], err_msg=key)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/folder", "no/such/folder does not exist"),
        ("model.safetensors", "model.safetensors does not exist"),
        ("emojy", "emojy does not exist"),
    ],
)
def test_what_does_not_exist(source, words):
    with pytest.raises(sfumato.FileError, match=words):
        sfumato.load(source)


def test_unknown_types_are_refused_before_anything_is_read():
    with pytest.raises(sfumato.MismatchError, match="float32, float16, bfloat16, not 'int8'"):
        sfumato.load("nowhere", dtype="int8")


def test_a_blank_model_has_the_shapes_of_the_folder_and_numbers_of_its_own(saved, tmp_path):
    folder, _ = saved("sd1")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    model, again, other = (sfumato.blank(bare, seed=seed) for seed in (0, 0, 1))
    whole = sfumato.load(folder)
    assert model.family == whole.family
    assert model.schedule == whole.schedule
    for part in ("unet", "vae"):
        values = [parameters(getattr(each, part)) for each in (model, again, other, whole)]
        assert {key: value.shape for key, value in values[0].items()} == {k: v.shape for k, v in values[3].items()}
        assert all(np.array_equal(values[0][key], values[1][key]) for key in values[0])
        assert any(not np.array_equal(values[0][key], values[2][key]) for key in values[0])
    sfumato.save(model, tmp_path / "saved")
    kept = parameters(sfumato.load(tmp_path / "saved").unet)
    assert all(np.array_equal(value, kept[key]) for key, value in parameters(model.unet).items())


def test_a_blank_model_needs_a_folder(tmp_path):
    with pytest.raises(sfumato.FileError, match="is no folder"):
        sfumato.blank(tmp_path / "nowhere")
