"""Seconds and results of sfumato against diffusers on torch, turn by turn in one process.

    python benchmarks/against_torch.py unet [--family sd15|sdxl] [--dtype bfloat16] [--size 64] [--runs 5] [--compile]
    python benchmarks/against_torch.py unet --dtype bfloat16 --torch-dtype float32
    python benchmarks/against_torch.py unet --peak

Both have the same random weights and the same inputs, so that the results are compared, too: the difference is given in
parts of the deviation of what torch computes in float32's place. torch runs in channels_last; with --compile it is also
compiled, and the better of the two counts. A processor without instructions for bfloat16 may be far slower in it with
torch than in float32; --torch-dtype sets sfumato against torch's better type. Prints medians, the spread, and the ratio
sfumato / torch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses as dc
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peak_memory import memory

from sfumato import compiler
from sfumato.bench import timed

SD15 = {"cross_attention_dim": 768, "sample_size": 64}
SDXL = {
    "cross_attention_dim": 2048, "sample_size": 128, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
UNETS = {"sd15": SD15, "sdxl": SDXL}
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@dc.dataclass(frozen=True)
class Pair:
    """The same computation twice; each side gives a channel-last array."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    compiled: Callable[[], Any] | None = None


def module(kind: Any, config: dict[str, Any], dtype: str) -> torch.nn.Module:
    """A torch network with random weights, made in its type, so that no float32 copy takes memory."""
    with torch.device("meta"):
        empty = kind(**config)
    made = empty.to(getattr(torch, dtype)).to_empty(device="cpu").eval().requires_grad_(requires_grad=False)
    torch.manual_seed(0)
    for name, value in made.named_parameters():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5)
        else:
            value.fill_(float(name.endswith("weight")))
    return made.to(memory_format=torch.channels_last)


def twin(network: Any, config: Any, theirs: torch.nn.Module, dtype: str) -> Any:
    """Our network with the weights of a torch module, in `dtype`."""
    from sfumato.io.fill import fill
    from sfumato.io.tensors import LazyTensor
    from sfumato.models.layers import abstract

    def lazy(value: torch.Tensor) -> LazyTensor:
        return LazyTensor(tuple(value.shape), np.dtype("float32"), lambda: value.float().contiguous().numpy())

    return fill(abstract(network, config), {key: lazy(each) for key, each in theirs.state_dict().items()}, dtype=dtype)


def last(x: torch.Tensor) -> torch.Tensor:
    """[B C H W] -> [B H W C]."""
    return x.permute(0, 2, 3, 1).float()


def first(x: np.ndarray, dtype: str) -> torch.Tensor:
    """[B H W C] -> [B C H W], channels last in memory."""
    return torch.from_numpy(x).permute(0, 3, 1, 2).to(getattr(torch, dtype))


def unet(args: argparse.Namespace, controlled: bool = False) -> Pair:
    """A step with guidance: two rows of latents; with a ControlNet if `controlled`."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict
    from sfumato.models.controlnet import ControlNet
    from sfumato.models.unet import UNet
    from sfumato.prepare import prepared
    from sfumato.types import Conditioning

    config, rng = UNETS[args.family], np.random.default_rng(0)
    theirs = module(UNet2DConditionModel, config, args.torch_dtype)
    change = prepared if args.prepare else lambda network: network
    ours = change(twin(UNet, from_dict(UNetConfig, config), theirs, args.dtype))
    x = rng.standard_normal((2, args.size, args.size, 4), np.float32)
    context = rng.standard_normal((2, 77, config["cross_attention_dim"]), np.float32)
    added, cond = None, Conditioning(jnp.asarray(context))
    if args.family == "sdxl":
        pooled, ids = (
            rng.standard_normal((2, 1280), np.float32),
            np.tile(np.float32([512, 512, 0, 0, 512, 512]), (2, 1)),
        )
        added = {"text_embeds": torch.from_numpy(pooled).to(theirs.dtype), "time_ids": torch.from_numpy(ids)}
        cond = dc.replace(cond, pooled=jnp.asarray(pooled), time_ids=jnp.asarray(ids))
    texts = torch.from_numpy(context).to(theirs.dtype)
    how = {"encoder_hidden_states": texts, "added_cond_kwargs": added, "return_dict": False}
    net = their_net = picture = None
    if controlled:
        shared = {key: value for key, value in config.items() if key not in ("sample_size", "up_block_types")}
        their_net = module(ControlNetModel, shared, args.torch_dtype)
        net = change(twin(ControlNet, from_dict(ControlNetConfig, shared), their_net, args.dtype))
        picture = rng.uniform(size=(2, 8 * args.size, 8 * args.size, 3)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=compiler.options())
    def step(ours: Any, net: Any, x: Any, seen: Any, hint: Any) -> Any:
        if net is not None:
            seen = dc.replace(seen, residuals=net.residuals(x, jnp.float32(500), seen, hint))
        return ours(x, jnp.float32(500), seen).eps

    x_torch, shown = first(x, args.torch_dtype), None if picture is None else first(picture, args.torch_dtype)

    def reference(network: Any, controlnet: Any) -> torch.Tensor:
        more = {}
        if controlnet is not None:
            down, mid = controlnet(x_torch, 500, controlnet_cond=shown, **how)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return last(network(x_torch, 500, **how, **more)[0])

    # Once a run, sfumato makes keys and values of the text and embeds the control picture; diffusers in every step.
    heard = jax.jit(type(ours).hear)(ours, cond.context)
    hint = None if net is None else jax.jit(type(net).hint)(net, jnp.asarray(picture))
    at = jnp.asarray(x), dc.replace(cond, heard=heard), hint
    compiled = (
        [torch.compile(each, mode=args.compile) if each is not None else None for each in (theirs, their_net)]
        if args.compile
        else []
    )
    return Pair(
        lambda: step(ours, net, *at), lambda: reference(theirs, their_net),
        (lambda: reference(*compiled)) if compiled else None,
    )  # fmt: skip


def controlnet(args: argparse.Namespace) -> Pair:
    """A step with guidance and a ControlNet, within a run: sfumato's control picture is embedded, diffusers' is not."""
    return unet(args, controlled=True)


def decode(args: argparse.Namespace) -> Pair:
    """One picture out of latents."""
    from diffusers import AutoencoderKL as Theirs

    from sfumato.models.config import from_dict
    from sfumato.models.vae import AutoencoderKL, VAEConfig

    theirs = module(Theirs, VAE, args.torch_dtype)
    config = from_dict(VAEConfig, VAE | {"force_upcast": False, "scaling_factor": 1.0})
    ours = twin(AutoencoderKL, config, theirs, args.dtype)
    x = np.random.default_rng(0).standard_normal((1, args.size, args.size, 4), np.float32)
    run = jax.jit(lambda vae, x: vae.decode(x), compiler_options=compiler.options())
    latents, at = first(x, args.torch_dtype), jnp.asarray(x, args.dtype)
    compiled = torch.compile(theirs.decode, mode=args.compile) if args.compile else None
    return Pair(
        lambda: run(ours, at), lambda: last(theirs.decode(latents).sample),
        (lambda: last(compiled(latents).sample)) if compiled else None,
    )  # fmt: skip


def generate(args: argparse.Namespace) -> Pair:
    """A whole run of 20 steps at SD 1.5's size, from the prompt to the picture."""
    import diffusers
    from load import make

    import sfumato

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.dtype)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, torch_dtype=getattr(torch, args.torch_dtype), safety_checker=None
        )
        model = sfumato.load(folder, dtype=args.dtype)
        model = sfumato.prepare(model) if args.prepare else model
        jax.block_until_ready((model.unet, model.vae))
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    return pipelines(pipeline, model, args, steps=20, size=8 * args.size, channels=4)


def emoji(args: argparse.Namespace) -> Pair:
    """A picture of the embedded model at its default steps, the text encoder and the decoder included."""
    import diffusers

    import sfumato
    from sfumato.embedded import find

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        find("emoji").path, torch_dtype=getattr(torch, args.torch_dtype), safety_checker=None
    )
    model = sfumato.load("emoji", dtype=args.dtype)
    return pipelines(pipeline, model, args, steps=model.steps, size=128, channels=8)


PROMPT = "red apple, noto"


def drawing(model: Any, steps: int, size: int, channels: int, count: int = 1) -> tuple[np.ndarray, Callable[[], Any]]:
    """Noise, and what draws `count` pictures from it by DDIM, with the model's own guidance."""
    import sfumato

    side = size // model.vae.factor
    noise = np.random.default_rng(0).standard_normal((count, side, side, channels), np.float32)
    how = {"steps": steps, "size": (size, size), "sampler": "ddim", "count": count, "latents": noise}
    return noise, lambda: np.stack([picture.array for picture in sfumato.generate(model, PROMPT, **how)])


def pipelines(
    pipeline: Any, model: Any, args: argparse.Namespace, steps: int, size: int, channels: int, count: int = 1
) -> Pair:
    """Both draw the same prompt, `count` times at once, from the same noise by DDIM, with the model's own guidance."""
    import diffusers

    def unguided(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Leaves guidance out after the model's window, as diffusers' guide to callbacks shows."""
        if (step + 1) / steps >= model.guided.stop and pipeline.do_classifier_free_guidance:
            pipeline._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise, ours = drawing(model, steps, size, channels, count)
    settings = {"num_inference_steps": steps, "guidance_scale": model.guidance, "output_type": "pt"}
    settings |= {"num_images_per_prompt": count, "height": size, "width": size}
    if model.guided.stop < 1:
        settings |= {"callback_on_step_end": unguided, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    at = first(noise, args.torch_dtype).to(pipeline.device)

    def reference(pipeline: Any) -> torch.Tensor:
        return last((pipeline(PROMPT, latents=at, **settings).images * 255).round().byte().cpu())

    compiled = compiled_pipeline(pipeline, args.compile) if args.compile else None
    return Pair(ours, lambda: reference(pipeline), (lambda: reference(compiled)) if compiled else None)


def compiled_pipeline(pipeline: Any, mode: str) -> Any:
    """The same with its UNet and its decoder compiled."""
    vae = copy.copy(pipeline.vae)
    vae.decode = torch.compile(vae.decode, mode=mode)
    parts = {"unet": torch.compile(pipeline.unet, mode=mode), "vae": vae}
    other = type(pipeline)(**{**pipeline.components, **parts})
    other.set_progress_bar_config(disable=True)
    return other


PAUSE = 1.0
"""Seconds between two runs: the threads of the side that has just worked go on waiting for more on their cores."""

CASES = {"unet": unet, "controlnet": controlnet, "decode": decode, "generate": generate, "emoji": emoji}


def compare(pair: Pair, runs: int) -> dict[str, Any]:
    """Medians in seconds, the spread, the ratio, and how far the results are apart."""
    sides = {name: call for name, call in dc.asdict(pair).items() if call is not None}
    with torch.inference_mode():
        results, begun = {}, {}
        for name, call in sides.items():
            begun[name] = timed(lambda: results.update({name: np.asarray(call(), np.float32)}))[1]  # noqa: B023
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(runs):
            for name, call in sides.items():
                time.sleep(PAUSE)
                times[name].append(timed(call)[1])
    medians = {name: statistics.median(each) for name, each in times.items()}
    best = min(seconds for name, seconds in medians.items() if name != "ours")
    off = np.abs(results["ours"] - results["theirs"]).max() / results["theirs"].std()
    return {
        "ratio": medians["ours"] / best, "off": float(off), **{f"{name}, s": each for name, each in medians.items()},
        "spread": {name: [min(each), max(each)] for name, each in times.items()}, "first": begun,
    }  # fmt: skip


def peak(pair: Pair, side: str) -> dict[str, int]:
    """Bytes of this process with the weights of one side, the other's given back; after its first call, which compiles;
    and at most while it works then."""
    call = getattr(pair, side)
    del pair
    found = {"weights": memory("VmRSS")}
    with torch.inference_mode():
        jax.block_until_ready(call())
        found["compiled"] = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        jax.block_until_ready(call())
    return found | {"peak": memory("VmHWM")}


def peaks() -> dict[str, dict[str, int]]:
    """`peak` of each side, in a process of its own: this command again."""
    found = {}
    for side in ("ours", "theirs"):
        words = [sys.executable, *sys.argv, "--side", side]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--family", choices=UNETS, default="sd15")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--torch-dtype", choices=("float32", "bfloat16"), help="torch's, if not the same")
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compile", nargs="?", const="default", help="torch.compile, too, in this mode")
    parser.add_argument("--prepare", action="store_true", help="sfumato's kernels by sfumato.prepare")
    parser.add_argument("--peak", action="store_true", help="the peak of memory instead of seconds")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.torch_dtype = args.torch_dtype or args.dtype
    if args.side:
        print(json.dumps(peak(CASES[args.case](args), args.side)))
        return
    if args.peak:
        found = peaks()
        ratio = found["ours"]["peak"] / found["theirs"]["peak"]
        print(f"{args.case} {args.dtype}: {ratio:.2f} x torch's peak of memory")
        print(json.dumps({**vars(args), **found}))
        return
    found = compare(CASES[args.case](args), args.runs)
    types = args.dtype if args.dtype == args.torch_dtype else f"{args.dtype} (torch {args.torch_dtype})"
    what = f"{args.case} {args.family if args.case != 'emoji' else ''} {types}"
    print(f"{what:32} {found['ratio']:.2f} x torch: {found['ours, s']:.2f} s; results {found['off']:.1e} apart")
    print(json.dumps({**vars(args), "cores": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
