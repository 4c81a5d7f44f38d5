"""Files of every format are read as the programs that wrote them meant; the rest is refused in a sentence."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from real_files import real_file
from sfumato.adapters.delta import Full, LoHa, LoKr, LowRank
from sfumato.adapters.lora import Lora
from sfumato.adapters.lora_file import load_lora
from sfumato.adapters.lora_names import layers_of_model
from sfumato.errors import MismatchError
from sfumato.io.family import Family
from sfumato.io.inspect import inspect
from sfumato.io.tensors import open_tensors
from sfumato.models.config import ControlNetConfig, from_dict
from sfumato.models.controlnet import ControlNet

import loras
from loras import (
    ATTENTION,
    BLOCK,
    CONV,
    EVERYWHERE,
    FLAT,
    FORMATS,
    NORM,
    QUERY,
    WIDTH,
    Layer,
    draw,
    kohya,
    names,
    one,
    peft,
    some,
    write,
)
from oracle import fresh
from pipelines import net_config


def assert_holds(lora: Lora, layers: list[Layer]) -> None:
    """Just these layers with just these numbers."""
    assert names(lora) == {f"{layer.component}.{layer.path}" for layer in layers}
    for layer in layers:
        delta: Any = lora.layers[layer.component][layer.path]
        assert np.array_equal(delta.down, layer.down)
        assert np.array_equal(delta.up, layer.up)
        assert float(delta.scale) == np.float32(1 if layer.alpha is None else layer.alpha / len(layer.down))
        if layer.magnitude is not None:
            assert np.array_equal(np.ravel(delta.magnitude), layer.magnitude)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, kind: str, loaded: Any, tmp_path: Path) -> None:
    layers = draw(loaded(kind), ranks=(2, 3))
    if form == "PEFT":  # one network a file
        layers = [layer for layer in layers if layer.component == "unet"]
    lora = load_lora(write(tmp_path / "a.safetensors", FORMATS[form](layers)), loaded(kind))
    assert_holds(lora, layers)
    assert (lora.report.format, lora.report.unmatched, set(lora.report.ranks)) == (form, (), {2, 3})
    assert lora.report.family == loaded(kind).family


@pytest.mark.parametrize("container", ["safetensors", "pt", "old.pt"])
def test_containers(container: str, loaded: Any, tmp_path: Path) -> None:
    import torch

    layers = draw(loaded("sd1"), alpha=2.0)
    tensors, file = kohya(layers), tmp_path / f"a.{container}"
    if container == "safetensors":
        write(file, tensors)
    else:
        state = {key: torch.from_numpy(value) for key, value in tensors.items()}
        torch.save(state, file, _use_new_zipfile_serialization=container == "pt")
    assert_holds(load_lora(file, loaded("sd1")), layers)


REFERENCE = {
    "kohya": (EVERYWHERE.replace("|add_embedding", ""), ("sd1", "sd2", "sdxl")),
    "kohya, original numbers": (EVERYWHERE, ("sdxl",)),
    "diffusers (old)": (ATTENTION, ("sd1", "sdxl")),
    "diffusers": (ATTENTION, ("sd1", "sdxl")),
    "diffusers (PEFT names)": (EVERYWHERE, ("sd1", "sdxl")),
}
"""The layers and the models that the reference knows in each format."""


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("form", "kind"), [(form, kind) for form, (_, kinds) in REFERENCE.items() for kind in kinds])
def test_the_reference_reads_the_same(form: str, kind: str, saved: Any, loaded: Any, tmp_path: Path) -> None:
    model, pipeline = loaded(kind), saved(kind)[1]
    layers = draw(model, REFERENCE[form][0], ranks=(2, 4), alpha=2.0 if "kohya" in form else None)
    make: Callable = FORMATS.get(form) or (lambda layers: kohya(layers, loras.original(model)))
    file = write(tmp_path / "a.safetensors", make(layers))
    assert_holds(load_lora(file, model), layers)
    assert_changes(layers, loras.weights(pipeline), loras.fused(pipeline, file))


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following")  # PEFT names the settings that were the default already
@pytest.mark.parametrize("dora", [False, True])
def test_the_reference_reads_the_same_settings(dora: bool, saved: Any, loaded: Any, tmp_path: Path) -> None:
    """diffusers keeps PEFT's settings in the metadata, and does not write alphas otherwise."""
    layers = draw(loaded("sd1"), r"\.attn1\.to_[qk]$|self_attn|conv1", ranks=(2, 4), dora=dora)
    ours = [dc.replace(layer, alpha=3.0 if layer.path.endswith("to_k") else 1.0) for layer in layers]
    settings = {"r": 2, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": []}
    for layer in ours:
        path = layer.path.removeprefix("text_model.")  # as newer versions of transformers have it
        settings["target_modules"].append(path)
        settings["rank_pattern"][path] = len(layer.down)
        settings["alpha_pattern"][path] = layer.alpha
    text = {key: value for key, value in settings.items() if key != "target_modules"}
    every = {f"unet.{key}": value for key, value in (settings | {"use_dora": dora}).items()}
    every |= {f"text_encoder.{key}": value for key, value in (text | {"use_dora": dora}).items()}
    every |= {"text_encoder.target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    file = write(tmp_path / "a.safetensors", peft(layers), lora_adapter_metadata=every)
    assert_holds(load_lora(file, loaded("sd1")), ours)
    pipeline = saved("sd1")[1]
    assert_changes(ours, loras.weights(pipeline), loras.fused(pipeline, file))


def assert_changes(layers: list[Layer], before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> None:
    """The reference has made these changes, and no others."""
    differ = {name for name in before if not np.array_equal(before[name], after[name])}
    assert differ == {f"{layer.component}.{layer.path}" for layer in layers}
    for layer in layers:
        name = f"{layer.component}.{layer.path}"
        wanted = before[name] + layer.change
        if layer.magnitude is not None:  # arXiv:2402.09353, eq. 5
            columns = tuple(range(1, wanted.ndim))
            wanted *= layer.magnitude.reshape(-1, *[1] * len(columns)) / np.sqrt(
                (wanted**2).sum(columns, keepdims=True)
            )
        np.testing.assert_allclose(after[name], wanted, atol=1e-5 * np.ptp(wanted), rtol=0)


def relatives() -> dict[str, tuple[str, dict[str, np.ndarray], Any]]:
    """By variant, a layer, its tensors in a file, and what they mean."""
    r, w = 4, WIDTH
    a, b, c, d = some(w, r), some(r, w), some(w, r), some(r, w)
    wide_b, wide_d, t, u = some(r, 9 * w), some(r, 9 * w), some(r, r, 3, 3), some(r, r, 3, 3)
    down, mid = some(r, w, 1, 1), some(r, r, 3, 3)
    first, second = some(4, 8), some(8, 4)
    half, number = np.asarray(0.5, np.float32), np.asarray(2.0, np.float32)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    per_input, per_output = np.abs(some(1, w)) + 1, np.abs(some(w, 1)) + 1
    lora = {"lora_down.weight": b, "lora_up.weight": a}
    return {
        "LoHa": (QUERY, loha | {"alpha": number}, LoHa(a, b, c, d, scale=half)),
        "LoHa of a convolution": (
            CONV, {"hada_w1_a": a, "hada_w1_b": wide_b, "hada_w2_a": c, "hada_w2_b": wide_d}, 
            LoHa(a, wide_b, c, wide_d)),
        "LoHa in Tucker form": (
            CONV, {"hada_t1": t, "hada_w1_a": b, "hada_w1_b": b, "hada_t2": u, "hada_w2_a": d, "hada_w2_b": d},
            LoHa(b, b, d, d, t, u)),
        "LoKr": (QUERY, {"lokr_w1": first, "lokr_w2": second, "alpha": number}, LoKr(first, w2=second)),
        "LoKr with low-rank factors": (
            QUERY, {"lokr_w1_a": some(8, r), "lokr_w1_b": some(r, 4), "lokr_w2_a": some(4, r), "lokr_w2_b": some(r, 8),
                    "alpha": number}, None),
        "LoKr of a convolution": (CONV, {"lokr_w1": first, "lokr_w2": some(8, 4, 3, 3)}, None),
        "LoKr in Tucker form": (
            CONV, {"lokr_w1": first, "lokr_t2": t, "lokr_w2_a": some(r, 8), "lokr_w2_b": some(r, 4)}, None),
        "LoCon in Tucker form": (
            CONV, {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": a[..., None, None],
                   "alpha": number}, LowRank(down, a[..., None, None], mid, scale=half)),
        "full difference": (QUERY, {"diff": some(w, w)}, None),
        "full difference with bias": (CONV, {"diff": some(w, w, 3, 3), "diff_b": some(w)}, None),
        "difference of a norm": (NORM, {"w_norm": some(w), "b_norm": some(w)}, None),
        "difference of a bias": (CONV, {"diff_b": some(w)}, None),
        "DoRA by outputs": (QUERY, lora | {"dora_scale": per_output}, LowRank(b, a, magnitude=per_output)),
        "DoRA by inputs": (QUERY, lora | {"dora_scale": per_input}, LowRank(b, a, magnitude=per_input)),
        "dense as a convolution": (
            QUERY, {"lora_down.weight": down, "lora_up.weight": a[..., None, None]}, LowRank(down, a[..., None, None])),
    }  # fmt: skip


RELATIVES = relatives()


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_unet_", "lycoris_"])
@pytest.mark.parametrize("variant", RELATIVES)
def test_relatives(variant: str, prefix: str, loaded: Any, tmp_path: Path) -> None:
    path, tensors, meant = RELATIVES[variant]
    flat = prefix + path.replace(".", "_")
    file = write(tmp_path / "a.safetensors", {f"{flat}.{part}": value for part, value in tensors.items()})
    lora = load_lora(file, loaded("sd1"))
    assert names(lora) == {f"unet.{path}"}
    got = lora.layers["unet"][path]
    if meant is None:  # the fields have the names of the tensors
        roles = {"diff_b": "bias", "w_norm": "diff", "b_norm": "bias", "alpha": "scale"}
        kind = LoKr if "LoKr" in variant else Full
        fields = {roles.get(part, part.removeprefix("lokr_")): value for part, value in tensors.items()}
        meant = kind(**{name: np.asarray(value / 4) if name == "scale" else value for name, value in fields.items()})
    assert type(got) is type(meant)
    for field in dc.fields(meant):
        ours, theirs = getattr(got, field.name), getattr(meant, field.name)
        assert (ours is None) == (theirs is None), field.name
        assert ours is None or np.array_equal(ours, theirs), field.name


def test_peft_names_of_relatives(loaded: Any, tmp_path: Path) -> None:
    """PEFT has LoHa and LoKr under LyCORIS' names."""
    tensors = {f"base_model.model.{QUERY}.{part}": value for part, value in RELATIVES["LoHa"][1].items()}
    lora = load_lora(write(tmp_path / "a.safetensors", tensors), loaded("sd1"))
    assert (names(lora), lora.report.variant) == ({f"unet.{QUERY}"}, "LoHa")


@pytest.mark.parametrize(("alpha", "scale"), [
    (None, 1.0), (np.float32(2), 0.5), (np.asarray([2.0], np.float16), 0.5), (np.asarray(2, ml_dtypes.bfloat16), 0.5),
    (np.asarray(2), 0.5), (np.float32(0), 0.0),
])  # fmt: skip
def test_alphas(alpha: Any, scale: float, loaded: Any, tmp_path: Path) -> None:
    """A missing alpha is the rank, layer by layer."""
    tensors = one(alpha) | one(np.float32(8), CONV)
    lora = load_lora(write(tmp_path / "a.safetensors", tensors), loaded("sd1"))
    got: Any = lora.layers["unet"]
    assert (float(got[QUERY].scale), float(got[CONV].scale)) == (scale, 2.0)
    assert (None if alpha is None else float(np.ravel(alpha)[0]), 4, scale) in lora.report.scales


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn])
def test_types(dtype: Any, loaded: Any, tmp_path: Path) -> None:
    """The type of the file is kept, as far as jax has it."""
    import torch
    from safetensors.torch import save_file

    tensors = {key: value.astype(dtype) for key, value in one().items()}
    kind = getattr(torch, np.dtype(dtype).name)
    save_file({key: torch.from_numpy(value.astype(np.float32)).to(kind) for key, value in tensors.items()},
              tmp_path / "a.safetensors")  # fmt: skip
    delta: Any = load_lora(tmp_path / "a.safetensors", loaded("sd1")).layers["unet"][QUERY]
    down = delta.down
    assert down.dtype == (np.float32 if dtype == np.float64 else dtype)
    assert np.array_equal(np.asarray(down, np.float32), tensors[f"{FLAT[QUERY]}.lora_down.weight"].astype(np.float32))


@pytest.mark.parametrize("listed", [False, True], ids=["safetensors", "list"])
def test_cloneofsimo(listed: bool, loaded: Any, tmp_path: Path) -> None:
    """Numbers for names, with the tokens that belong to them; the oldest files are lists of one network."""
    import torch

    from sfumato.adapters.lora_names import DEFAULT_TARGETS, numbered

    model, order, layers = loaded("sd1"), {}, []
    for component, held in layers_of_model(model).items():
        paths = numbered({}, held, DEFAULT_TARGETS[component])
        order |= {f"{component}.{path}": i for i, path in paths.items()}
        layers += [layer for layer in draw(model, ".", ranks=(2,), seed=3)
                   if layer.component == component and layer.path in paths.values()]  # fmt: skip
    if listed:
        layers = [layer for layer in layers if layer.component == "unet"]
        pairs = sorted(layers, key=lambda layer: order[f"unet.{layer.path}"])
        file = tmp_path / "a.pt"
        torch.save([torch.from_numpy(array) for layer in pairs for array in (layer.up, layer.down)], file)
        assert_holds(load_lora(file, model), layers)
        return
    tensors, metadata = {}, {"<s1>": "<embed>", "unet": ["CrossAttention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
    for layer in layers:
        stem = f"{layer.component}:{order[f'{layer.component}.{layer.path}']}"
        tensors |= {f"{stem}:down": layer.down, f"{stem}:up": layer.up}
        metadata[f"{stem}:rank"] = "2"
    tensors["<s1>"] = some(24)
    lora = load_lora(write(tmp_path / "a.safetensors", tensors, **metadata), model)
    assert_holds(lora, layers)
    assert lora.report.tokens == ("<s1>",)
    known = lora.embeddings["<s1>"].apply(model)
    table = known.text_encoders["text_encoder"].text_model.embeddings.token_embedding.embedding
    assert np.array_equal(table[-1], tensors["<s1>"])


def test_original_names_with_dots(tmp_path: Path) -> None:
    """As the code of the original layout itself calls its layers."""
    stem = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": some(2, 320), f"{stem}.lora_B.weight": some(320, 2)}
    file = write(tmp_path / "a.safetensors", tensors)
    assert names(load_lora(file)) == {f"unet.{QUERY}"}
    assert inspect(file).problem is None


def test_bundled_tokens(loaded: Any, tmp_path: Path) -> None:
    """Other programs put a whole file of an embedding into a LoRA."""
    tokens = {"bundle_emb.cat.string_to_param.*": some(2, 24), "bundle_emb.dog.clip_l": some(3, 768),
              "bundle_emb.dog.clip_g": some(3, 1280)}  # fmt: skip
    lora = load_lora(write(tmp_path / "a.safetensors", one() | tokens), loaded("sd1"))
    assert lora.report.tokens == tuple(lora.embeddings) == ("cat", "dog")
    assert {name: v.shape for name, v in lora.embeddings["dog"].vectors.items()} == {
        "text_encoder": (3, 768), "text_encoder_2": (3, 1280)}  # fmt: skip
    assert np.array_equal(lora.embeddings["cat"].vectors["text_encoder"], tokens["bundle_emb.cat.string_to_param.*"])


@pytest.mark.parametrize(("width", "path", "family", "target"), [
    (768, f"{BLOCK}.attn2.to_k", "sd1", "Stable Diffusion 1.x"),
    (1024, f"{BLOCK}.attn2.to_k", "sd2", "Stable Diffusion 2.x"),
    (2048, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "sdxl", "Stable Diffusion XL"),
    (320, f"{BLOCK}.attn1.to_k", None, "Stable Diffusion 1.x and Stable Diffusion 2.x"),
    (1280, "mid_block.attentions.0.transformer_blocks.9.attn1.to_k", "sdxl", "Stable Diffusion XL"),
    (1536, "mid_block.attentions.0.transformer_blocks.0.attn1.to_k", "sdxl-refiner", "Stable Diffusion XL refiner"),
])  # fmt: skip
def test_without_a_model_the_published_shapes_count(
    width: int, path: str, family: str | None, target: str, tmp_path: Path
) -> None:
    outputs = {2048: 640, 1280: 1280, 1536: 1536}.get(width, 320)
    flat = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": some(2, width), f"{flat}.lora_up.weight": some(outputs, 2)}
    report = load_lora(write(tmp_path / "a.safetensors", tensors)).report
    assert (report.family, report.target, report.unmatched) == (family and Family(family), target, ())


def test_controlnets_take_what_they_have(loaded: Any, tmp_path: Path) -> None:
    net = fresh(ControlNet, from_dict(ControlNetConfig, net_config("sd1")))
    layers = draw(loaded("sd1"))
    file = write(tmp_path / "a.safetensors", kohya(layers))
    lora = load_lora(file, net)
    inner = [dc.replace(layer, component="controlnet") for layer in layers
             if layer.component == "unet" and not layer.path.startswith("up_blocks")]  # fmt: skip
    assert_holds(lora, inner)
    assert lora.report.beyond == len(layers) - len(inner)
    own = draw(net, "controlnet_cond_embedding|controlnet_mid_block")
    assert_holds(load_lora(write(tmp_path / "b.safetensors", peft(own)), net), own)
    text = [layer for layer in layers if layer.component == "text_encoder"]
    with pytest.raises(MismatchError, match=r"all of its 12 layers are of parts that a ControlNet does not have\.$"):
        load_lora(write(tmp_path / "c.safetensors", kohya(text)), net)


@pytest.mark.parametrize("name", ["sd15_lora_diffusers_old.safetensors", "sd15_lora_diffusers_old.bin",
                                  "sd15_lora_cloneofsimo_with_tokens.safetensors"])  # fmt: skip
def test_real_files(name: str) -> None:
    """They fit the published shapes of SD 1.5, and every number is the one that torch reads.

    The two containers of the first do not hold the same numbers: they are of two trainings.
    """
    import torch
    from safetensors.torch import load_file

    lora = load_lora(real_file(name))
    report = lora.report
    theirs = (
        torch.load(real_file(name), "cpu", weights_only=True) if name.endswith("bin") else load_file(real_file(name))
    )
    assert report.family is Family.SD1
    assert (len(report.matched), report.unmatched) == ((192 if "cloneofsimo" in name else 128), ())
    for layer in report.matched:
        delta: Any = lora.layers[layer.component][layer.path]
        stem = layer.name + ("" if "cloneofsimo" in name else "_lora")
        for role, array in (("down", delta.down), ("up", delta.up)):
            key = f"{stem}:{role}" if "cloneofsimo" in name else f"{stem}.{role}.weight"
            assert np.array_equal(array, theirs.pop(key).numpy())
        assert float(delta.scale) == 1
    for token, embedding in lora.embeddings.items():
        assert np.array_equal(embedding.vectors["text_encoder"], theirs.pop(token).numpy()[None])
    assert not theirs
    assert tuple(lora.embeddings) == (("<s1>", "<s2>") if "cloneofsimo" in name else ())


def test_the_containers_of_the_real_file_have_the_same_layers() -> None:
    def shapes(lora: Lora) -> list[Any]:
        return [(path, np.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(lora.layers)]

    first, second = (load_lora(real_file(f"sd15_lora_diffusers_old.{end}")) for end in ("safetensors", "bin"))
    assert shapes(first) == shapes(second)
    assert open_tensors(real_file("sd15_lora_diffusers_old.bin")).container == "pickle"
