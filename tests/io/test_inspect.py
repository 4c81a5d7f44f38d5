"""Files and folders of every kind are named; broken ones say why."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from real_files import real_file
from sfumato.errors import FileError
from sfumato.io.family import Family, family_of_context
from sfumato.io.inspect import Report, inspect
from sfumato.io.lazy import LazyTensor
from sfumato.io.recognise import recognise

from broken_files import BROKEN, MARK, Broken, tensor, torch_zip
from published import CONTROLNETS, UNETS, checkpoint, clip_l, file_of, old, state, stub

Shapes = dict[str, tuple[int, ...]]


def family_named(name: str) -> Family:
    return Family("sdxl-refiner" if name == "sdxl-refiner" else name.split("-")[0])


def stubs(shapes: Shapes) -> dict[str, LazyTensor]:
    return {key: stub(shape) for key, shape in shapes.items()}


def write(path: Path, shapes: Shapes, dtype: type = np.float16) -> Path:
    save_file({key: np.ones(shape, dtype) for key, shape in shapes.items()}, path)
    return path


PURPOSE = {"sd1-inpaint": "inpainting", "sd1-pix2pix": "InstructPix2Pix", "sd2-depth": "depth to image"}


@pytest.mark.parametrize("name", UNETS)
def test_checkpoints(name: str) -> None:
    finding = recognise(file_of(checkpoint(name)))
    assert (finding.kind, finding.family, finding.problem) == ("checkpoint", family_named(name), None)
    assert finding.details["layout"] == "original"
    assert finding.details["purpose"] == PURPOSE.get(name, "text to image")
    assert "vae" in finding.details["parts"]
    assert "text encoder" in finding.details["parts"]
    assert "lacks" not in finding.details


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("layout", ["original", "diffusers", "unet only"])
def test_unets(name: str, layout: str) -> None:
    prefix = "model.diffusion_model." if layout == "unet only" else ""
    tensors = state("unet", name) if layout == "diffusers" else old("unet", name, prefix)
    finding = recognise(file_of(tensors))
    assert finding.kind == ("checkpoint" if prefix else "unet")
    assert finding.family is family_named(name)
    assert finding.details["layout"] == ("diffusers" if layout == "diffusers" else "original")
    assert finding.details["input channels"] == str(UNETS[name].get("in_channels", 4))
    if prefix:
        assert finding.details["lacks"] == "vae, text encoder"


@pytest.mark.parametrize("name", CONTROLNETS)
@pytest.mark.parametrize("prefix", [None, "", "control_model."])
def test_controlnets(name: str, prefix: str | None) -> None:
    tensors = state("controlnet", name) if prefix is None else old("controlnet", name, prefix)
    finding = recognise(file_of(tensors))
    assert (finding.kind, finding.problem) == ("controlnet", None)
    assert finding.family is (None if name == "sdxl-small" else family_named(name))
    assert finding.details == {"layout": "diffusers" if prefix is None else "original", "picture channels": "3"}


def test_other_networks() -> None:
    assert recognise(file_of(state("vae", "vae"))).details == {
        "layout": "diffusers", "parts": "encoder, decoder", "latent channels": "4 (SD 1.x, 2.x and SDXL)"}  # fmt: skip
    for prefix in ("", "first_stage_model."):
        finding = recognise(file_of(old("vae", "vae", prefix)))
        assert (finding.kind, finding.details["layout"]) == ("vae", "original")
    for name, family in (("CLIP_L", "sd1"), ("OPEN_CLIP_H", "sd2"), ("OPEN_CLIP_G", "sdxl")):
        finding = recognise(file_of(state("text", name)))
        assert (finding.kind, finding.family) == ("text encoder", family)
    short = {key.removeprefix("text_model."): t for key, t in state("text", "CLIP_L").items()}
    assert recognise(file_of(short)).family is Family.SD1
    assert recognise(file_of(clip_l("cond_stage_model.transformer."))).kind == "text encoder"


def test_the_rest_of_a_checkpoint() -> None:
    averaged = stubs({"model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3), "v_pred": (), "ztsnr": ()})
    finding = recognise(file_of(checkpoint("sdxl") | averaged, **{"modelspec.title": "Some\nmodel"}))
    assert "averaged weights" in finding.details["parts"]
    assert finding.details["prediction"] == "v with zero terminal SNR"
    assert finding.details["title"] == "Some\\nmodel"
    odd = {key: stub((*t.shape[:-1], 999)) if "attn2.to_k" in key else t for key, t in checkpoint("sd1").items()}
    finding = recognise(file_of(odd))
    assert (finding.kind, finding.family) == ("checkpoint", None)
    assert "none of the known families" in str(finding.problem)


def test_tiny_autoencoders() -> None:
    taesd = {f"{i}.{name}": (64, 64, 3, 3) for i in (1, 3, 4) for name in ("conv.0.weight", "conv.2.weight")}
    encoder = taesd | {"0.weight": (64, 3, 3, 3), "0.bias": (64,), "14.weight": (4, 64, 3, 3), "14.bias": (4,)}
    decoder = taesd | {"1.weight": (64, 4, 3, 3), "1.bias": (64,), "19.weight": (3, 64, 3, 3), "19.bias": (3,)}
    both = {f"encoder.layers.{key}": shape for key, shape in encoder.items()}
    both |= {f"decoder.layers.{key}": shape for key, shape in decoder.items()}
    for shapes, layout, parts in ((encoder, "original", "encoder"), (decoder, "original", "decoder"),
                                  (both, "diffusers", "encoder, decoder")):  # fmt: skip
        finding = recognise(file_of(stubs(shapes)))
        assert finding.kind == "tiny autoencoder"
        assert finding.details == {
            "layout": layout, "parts": parts, "latent channels": "4 (SD 1.x, 2.x and SDXL)"}  # fmt: skip


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = "lora_unet_" + BLOCK.replace(".", "_")
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def pair(stem: str, down: str, up: str, inputs: int = 768, rank: int = 4) -> Shapes:
    return {stem + down: (rank, inputs), stem + up: (320, rank)}


def kohya(name: str = FLAT, inputs: int = 768, rank: int = 4, alpha: bool = True) -> Shapes:
    shapes = pair(name, ".lora_down.weight", ".lora_up.weight", inputs, rank)
    return shapes | ({f"{name}.alpha": ()} if alpha else {})


def peft(stem: str, inputs: int = 768, name: str = "") -> Shapes:
    return pair(stem, f".lora_A{name}.weight", f".lora_B{name}.weight", inputs)


LORAS: dict[str, tuple[Shapes, str, str, str | None]] = {
    # tensors, format, variant, family
    "kohya sd1": (kohya(), "kohya", "LoRA", "sd1"),
    "kohya sd2": (kohya(inputs=1024), "kohya", "LoRA", "sd2"),
    "kohya sdxl": (kohya(inputs=2048), "kohya", "LoRA", "sdxl"),
    "kohya original names": (
        kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048), "kohya", "LoRA", "sdxl"),
    "kohya deep": (kohya("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q", 1280), "kohya", "LoRA", "sdxl"),
    "kohya text": (kohya("lora_te_" + TEXT.replace(".", "_")), "kohya", "LoRA", "sd1"),
    "kohya text 2": (kohya("lora_te2_" + TEXT.replace(".", "_"), 1280), "kohya", "LoRA", "sdxl"),
    "kohya self": (kohya(FLAT.replace("attn2", "attn1"), 320), "kohya", "LoRA", None),
    "locon": (kohya() | {"lora_unet_conv_in.lora_down.weight": (4, 4, 3, 3),
                         "lora_unet_conv_in.lora_up.weight": (320, 4, 1, 1)},
              "kohya", "LoCon (LoRA with convolutions)", "sd1"),
    "loha": ({f"{FLAT}.hada_{w}": shape for w, shape in {
        "w1_a": (320, 4), "w1_b": (4, 768), "w2_a": (320, 4), "w2_b": (4, 768)}.items()}, "kohya", "LoHa", "sd1"),
    "lokr": ({f"{FLAT}.lokr_w1": (16, 16), f"{FLAT}.lokr_w2_a": (20, 4), f"{FLAT}.lokr_w2_b": (4, 128)},
             "kohya", "LoKr", "sdxl"),
    "lycoris": ({f"lycoris_{FLAT[5:]}.lokr_w1": (16, 16), f"lycoris_{FLAT[5:]}.lokr_w2": (20, 64)},
                "kohya", "LoKr", "sd2"),
    "dora": (kohya() | {f"{FLAT}.dora_scale": (1, 768)}, "kohya", "LoRA + DoRA", "sd1"),
    "diffusers old": (pair(BLOCK.replace("to_k", "processor.to_k_lora"), ".down.weight", ".up.weight"),
                      "diffusers (old)", "LoRA", "sd1"),
    "diffusers": (pair(f"unet.{BLOCK}", ".lora.down.weight", ".lora.up.weight")
                  | pair(f"text_encoder.{TEXT}.lora_linear_layer", ".down.weight", ".up.weight"),
                  "diffusers", "LoRA", "sd1"),
    "diffusers peft": (peft(f"unet.{BLOCK}", 2048), "diffusers (PEFT names)", "LoRA", "sdxl"),
    "peft": (peft(f"base_model.model.{BLOCK}", 1024), "PEFT", "LoRA", "sd2"),
    "peft dora": (peft(f"base_model.model.{BLOCK}", name=".default")
                  | {f"base_model.model.{BLOCK}.lora_magnitude_vector": (320,)}, "PEFT", "LoRA + DoRA", "sd1"),
    "cloneofsimo": (pair("unet:0", ":down", ":up", 320) | pair("unet:1", ":down", ":up"), "cloneofsimo", "LoRA", "sd1"),
}  # fmt: skip


@pytest.mark.parametrize("name", LORAS)
def test_loras(name: str) -> None:
    shapes, layout, variant, family = LORAS[name]
    finding = recognise(file_of(stubs(shapes)))
    assert (finding.kind, finding.family, finding.problem) == ("lora", family, None)
    assert (finding.details["format"], finding.details["variant"]) == (layout, variant)
    assert finding.details["rank"] == ("4" if name != "lycoris" else "full")


def test_what_loras_carry() -> None:
    finding = recognise(file_of(stubs(kohya() | kohya("lora_unet_mid", rank=64, alpha=False) | {"x": (3,)})))
    assert finding.details["rank"] == "4 to 64"
    assert finding.details["alphas"] == "for 1 of 2 layers"
    assert finding.details["other tensors"] == "1 (x)"
    assert recognise(file_of(stubs(kohya()))).details["alphas"] == "in the file"
    assert "none" in recognise(file_of(stubs(kohya(alpha=False)))).details["alphas"]
    alone = stubs(kohya(FLAT.replace("attn2", "attn1")))
    assert recognise(file_of(alone, ss_base_model_version="sdxl_base_v1-0")).family is Family.SDXL
    tokens = stubs(pair("unet:0", ":down", ":up") | {"<s1>": (768,)})
    assert recognise(file_of(tokens, **{"<s1>": "<embed>"})).details["embedded tokens"] == "<s1>"


@pytest.mark.parametrize(("shapes", "words"), [
    (kohya("lora_unet_unet_" + BLOCK.replace(".", "_")), "lora_unet_unet_"),
    (kohya("lora_te_te_" + TEXT.replace(".", "_")), "lora_te_te_"),
    (kohya() | {f"{FLAT}_2.lora_down.weight": (4, 768)}, "1 of its 2 layers have only one"),
    (kohya("lora_unet_double_blocks_0_img_attn_qkv", 3072), "FLUX"),
    (peft("transformer.single_transformer_blocks.0.attn.to_q", 3072), "FLUX"),
    (peft("transformer.transformer_blocks.0.attn.to_q", 1536), "Stable Diffusion 3"),
])  # fmt: skip
def test_loras_with_a_problem(shapes: Shapes, words: str) -> None:
    finding = recognise(file_of(stubs(shapes)))
    assert finding.kind == "lora"
    assert words in str(finding.problem)


@pytest.mark.parametrize(("shapes", "family", "details"), [
    ({"<cat>": (768,)}, "sd1", {"tokens": "<cat>", "vectors per token": "1", "layout": "diffusers"}),
    ({"<cat>": (4, 1024)}, "sd2", {"vectors per token": "4"}),
    ({"<a>": (768,), "<b>": (768,)}, "sd1", {"tokens": "<a>, <b>"}),
    ({"string_to_param.*": (5, 768)}, "sd1", {"tokens": "cat", "vectors per token": "5", "layout": "AUTOMATIC1111"}),
    ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "sdxl", {"vectors per token": "2", "layout": "SDXL pair"}),
    ({"emb_params": (2, 768)}, "sd1", {"vectors per token": "2"}),
])  # fmt: skip
def test_textual_inversions(shapes: Shapes, family: str, details: dict[str, str]) -> None:
    finding = recognise(file_of(stubs(shapes), name="cat"))
    assert (finding.kind, finding.family) == ("textual inversion", family)
    assert details.items() <= finding.details.items()


def test_vectors_of_no_text_encoder() -> None:
    assert "999" in str(recognise(file_of(stubs({"string_to_param.*": (5, 999)}))).problem)
    assert recognise(file_of(stubs({"a": (999,)}))).kind == "unknown"


@pytest.mark.parametrize(("key", "words"), [
    ("adapter.body.0.resnets.0.block1.weight", "T2I-Adapter"), ("image_proj.norm.weight", "IP-Adapter"),
    ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"), ("double_blocks.0.x", "Flux"),
])  # fmt: skip
def test_other_things_are_named(key: str, words: str) -> None:
    finding = recognise(file_of(stubs({key: (4, 4)})))
    assert finding.kind == "unknown"
    assert words in str(finding.problem)


def test_unknown_things_show_their_keys() -> None:
    finding = recognise(file_of(stubs({f"layer{i}.w": (4, 4) for i in range(9)})))
    assert finding == dc.replace(finding, kind="unknown", family=None, problem=None)
    assert finding.details == {"first keys": "layer0.w, layer1.w, layer2.w, layer3.w"}


def test_odd_shapes_are_no_reason_to_fail() -> None:
    """A file may have the right names and any shapes."""
    files = [checkpoint("sd1"), state("unet", "sdxl"), state("controlnet", "sd2"), old("vae", "vae", ""),
             state("text", "CLIP_L"), *(stubs(shapes) for shapes, *_ in LORAS.values()),
             stubs({"0.weight": (1,)}), stubs({"1.weight": (1,)}), stubs({"clip_l": (1,)})]  # fmt: skip
    for tensors in files:
        for shape in ((), (1,), (0, 0), (2, 3, 4)):
            assert recognise(file_of({key: stub(shape) for key in tensors})).kind


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_broken_files(broken: Broken, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = broken.make(folder)
    if not path.exists():
        with pytest.raises(FileError, match="There is no"):
            inspect(path)
    elif path.is_file():
        report = inspect(path)
        assert (report.kind, report.family, report.tensors) == ("broken", None, 0)
        assert report.bytes == path.stat().st_size
        assert all(words in str(report.problem) for words in broken.words)
        assert str(report.problem) in str(report)
        assert json.loads(report.to_json())["problem"] == report.problem
    assert not (folder / MARK).exists()


def test_report_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ckpt", kohya())
    report = inspect(path)
    assert (report.kind, report.family, report.container) == ("lora", Family.SD1, "safetensors")
    assert (report.tensors, report.parameters, report.bytes) == (3, 4 * 768 + 320 * 4 + 1, path.stat().st_size)
    assert report.dtypes == {"float16": 3}
    assert report.details["note"] == "a.ckpt is a safetensors file despite its name."
    assert str(report).splitlines()[:2] == [str(path), "  lora, Stable Diffusion 1.x"]
    assert "4,353 numbers (float16)" in str(report)
    told = json.loads(report.to_json())
    assert told == report.asdict()
    assert told["family"] == "sd1"
    assert [field.name for field in dc.fields(Report)] == list(told)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_deep_look_finds_broken_numbers(dtype: type, tmp_path: Path) -> None:
    from sfumato.io.safetensors_file import DTYPES

    def report(array: np.ndarray) -> Report:
        name = next(name for name, known in DTYPES.items() if known == dtype)
        text = json.dumps({"a": {"dtype": name, "shape": [7], "data_offsets": [0, array.nbytes]}}).encode()
        (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + array.tobytes())
        assert inspect(tmp_path / "a").problem is None
        return inspect(tmp_path / "a", deep=True)

    good = np.arange(7).astype(dtype)
    assert report(good).problem is None
    good[3] = np.nan
    assert report(good).problem == "1 of 1 tensors hold NaN or infinite numbers, the first of them a"
    assert report(np.zeros(7, dtype)).problem == "every number in it is zero"


def make_folder(path: Path, unet: Shapes, **config: object) -> Path:
    """A small diffusers folder. Kinds are told by keys, so few tensors do."""
    for name, settings in {
        "unet": {"_class_name": "UNet2DConditionModel", "in_channels": 4, "cross_attention_dim": 768, **config},
        "vae": {"_class_name": "AutoencoderKL"},
        "text_encoder": {"architectures": ["CLIPTextModel"], "hidden_size": 768},
    }.items():
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text(json.dumps(settings))
    (path / "scheduler").mkdir()
    write(path / "unet/diffusion_pytorch_model.safetensors", unet)
    write(path / "vae/diffusion_pytorch_model.safetensors", {"encoder.conv_in.weight": (8, 3, 3, 3)})
    write(path / "text_encoder/model.safetensors", {"text_model.embeddings.token_embedding.weight": (9, 768)})
    (path / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": [None, None],
    }))  # fmt: skip
    return path


UNET: Shapes = {
    "conv_in.weight": (8, 4, 3, 3), "down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 768),
}  # fmt: skip


def test_folder(tmp_path: Path) -> None:
    report = inspect(make_folder(tmp_path / "model", UNET))
    assert (report.kind, report.family, report.problem) == ("diffusers folder", Family.SD1, None)
    assert (report.tensors, report.container) == (5, "safetensors")
    assert report.details["pipeline"] == "StableDiffusionPipeline"
    assert report.details["unet"] == "UNet2DConditionModel, text to image"
    assert report.details["scheduler"] == "PNDMScheduler"
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(("damage", "words"), [
    (remove(WEIGHTS), "unet: it has a config.json, but no weights"),
    (lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_pytorch_model-00001-of-00002.safetensors"), "not the index"),
    (lambda f: (f / WEIGHTS).rename(f / "unet/diffusion_flax_model.msgpack"), "msgpack"),
    (replace(WEIGHTS, "version https://git-lfs.github.com/spec/v1\nsize 3438167534\n"), "git-lfs pointer"),
    (replace("unet/config.json", "{"), "config.json"),
    (remove("unet/config.json"), "config.json"),
    (lambda f: (f / "unet").rename(f / "net"), "lists unet (UNet2DConditionModel), but there is no such folder"),
    (replace("model_index.json", "{}"), "lists no components"),
    (lambda f: write(f / WEIGHTS, {key: (8, 1024) if "attn2" in key else shape for key, shape in UNET.items()}),
     "describes Stable Diffusion 1.x, but the weights are of Stable Diffusion 2.x"),
    (lambda f: write(f / WEIGHTS, {"encoder.conv_in.weight": (8, 3, 3, 3)}), "describes a unet, but"),
])  # fmt: skip
def test_folders_with_a_problem(damage: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", UNET)
    damage(folder)
    report = inspect(folder)
    assert report.kind == "diffusers folder"
    assert words in str(report.problem)


def test_damaged_main_file_of_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", UNET)
    (folder / "model_index.json").write_text("{")
    report = inspect(folder)
    assert report.kind == "broken"
    assert "model_index.json" in str(report.problem)


def test_component_folders(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", UNET)
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    report = inspect(folder / "unet")
    assert (report.kind, report.family) == ("unet", Family.SD1)
    assert report.details["variants"] == "fp16"
    assert inspect(folder / "vae").kind == "vae"
    assert inspect(folder / "text_encoder").family is Family.SD1
    torch_zip(folder / "vae/diffusion_pytorch_model.fp16.bin", {"encoder.conv_in.weight": tensor()})
    assert inspect(folder / "vae").details["variants"] == "plain, fp16"
    (folder / "vae/config.json").write_text('{"_class_name": "VQModel", "architectures": 3}')
    assert inspect(folder / "vae").details["class"] == "VQModel"


def test_sharded_component(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", UNET)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / WEIGHTS).unlink()
    first, *rest = UNET
    write(folder / "unet" / names[0], {first: UNET[first]})
    write(folder / "unet" / names[1], {key: UNET[key] for key in rest})
    index = {"weight_map": {first: names[0], **dict.fromkeys(rest, names[1])}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    report = inspect(folder / "unet")
    assert (report.kind, report.tensors) == ("unet", 3)
    assert report.bytes == sum((folder / "unet" / name).stat().st_size for name in names)
    (folder / "unet" / names[1]).unlink()
    assert "1 of 2 parts" in str(inspect(folder).problem)


def test_folders_around_a_file(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_lora_weights.safetensors", kohya())
    (tmp_path / "README.md").write_text("x")
    report = inspect(tmp_path)
    assert (report.kind, report.details["file"]) == ("lora", "pytorch_lora_weights.safetensors")
    torch_zip(tmp_path / "pytorch_lora_weights.bin", {"a": tensor()})
    assert inspect(tmp_path).kind == "lora", "the safe one of the two"
    write(tmp_path / "other.safetensors", kohya())
    report = inspect(tmp_path)
    assert report.kind == "unknown"
    assert "3 files of weights" in str(report.problem)
    (tmp_path / "empty").mkdir()
    assert inspect(tmp_path / "empty").details == {"contents": "nothing"}


def test_families() -> None:
    assert [family_of_context(width) for width in (768, [1024, 1024], (2048,), 1280, 5, None, [768, 1024], [[]])] == [
        "sd1", "sd2", "sdxl", "sdxl-refiner", None, None, None, None]  # fmt: skip
    assert all(family.full_name.startswith("Stable Diffusion") for family in Family)


REAL_FILES = {
    "sd15_lora_diffusers_old.safetensors": (
        "lora", "sd1", {"format": "diffusers (old)", "rank": "4", "layers": "128 of unet"}),
    "sd15_lora_diffusers_old.bin": ("lora", "sd1", {"format": "diffusers (old)", "variant": "LoRA"}),
    "sd15_lora_cloneofsimo_with_tokens.safetensors": (
        "lora", "sd1", {"format": "cloneofsimo", "rank": "1", "embedded tokens": "<s1>, <s2>",
                        "layers": "192 of unet and text encoder"}),
    "sd15_textual_inversion.bin": ("textual inversion", "sd1", {"tokens": "<birb-style>", "vectors per token": "1"}),
    "taef2_encoder.pth": ("tiny autoencoder", None, {"parts": "encoder", "latent channels": "32 (FLUX.2)"}),
    "taef2_decoder.pth": ("tiny autoencoder", None, {"parts": "decoder", "latent channels": "32 (FLUX.2)"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files(name: str) -> None:
    kind, family, details = REAL_FILES[name]
    report = inspect(real_file(name), deep=True)
    assert (report.kind, report.family, report.problem) == (kind, family, None)
    assert details.items() <= report.details.items()


def test_reading_headers_only(tmp_path: Path) -> None:
    """A checkpoint of 4 GB, sparse, is told in no time."""
    header, here = {}, 0
    for key, lazy in checkpoint("sd1").items():
        size = int(np.prod(lazy.shape)) * 4
        header[key] = {"dtype": "F32", "shape": list(lazy.shape), "data_offsets": [here, here + size]}
        here += size
    text = json.dumps(header).encode()
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + here)
    report = inspect(tmp_path / "a.safetensors")
    assert (report.kind, report.family) == ("checkpoint", Family.SD1)
    assert report.bytes > 4e9
