"""What int8 kernels save and what they cost, at SD 1.5's size and in the embedded model.

    python benchmarks/int8_memory.py memory [--dtypes float32 bfloat16] [--size 64]
    python benchmarks/int8_memory.py time [--dtypes float32 bfloat16] [--size 64] [--runs 5]
    python benchmarks/int8_memory.py error

`memory` has the bytes of the UNet's parameters and, by what the compiler reports, the working memory of a run of
several steps with guidance, with the kernels as they are and as int8; nothing is allocated. `time` has the ratio of the
medians of one such step with random weights, turn by turn. `error` rounds parts of the embedded model's UNet and says
how far its predictions move, as a share of their length, at four times; bfloat16 stands beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from train_memory import networks

from sfumato import compiler
from sfumato.bench import timed
from sfumato.quantize import KEPT, quantized
from sfumato.types import Conditioning

TIMES = (20, 300, 600, 980)
PARTS: dict[str, Callable[[tuple[Any, ...]], bool]] = {
    "all": lambda path: True,
    "what quantize takes": lambda path: path[0] not in KEPT,
    **{name: lambda path, name=name: path[0] == name for name in ("conv_in", "conv_out", "time_embedding")},
    "attention": lambda path: "attentions" in path,
    "residual blocks": lambda path: "resnets" in path,
}


def step(unet: Any, x: Any, t: Any, context: Any) -> Any:
    """One evaluation."""
    return unet(x, t, Conditioning(context)).eps


def run(unet: Any, x: Any, context: Any, times: Any) -> Any:
    """Several, in the loop of the compiler that sampling has."""
    return jax.lax.scan(lambda x, t: (x - 0.1 * step(unet, x, t, context), None), x, times)[0]


def sizes(dtype: str, size: int) -> dict[str, tuple[float, float]]:
    """GiB of the parameters and of the temporaries of a run, with the kernels as they are and as int8."""
    unet = jax.eval_shape(lambda net: jax.tree.map(lambda a: a.astype(dtype), net), networks(small=False)["unet"])
    at = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, size, size, 4), (2, 77, 768), (4,))]
    found = {}
    for name, net in (("floats", unet), ("int8", jax.eval_shape(quantized, unet))):
        analysis = jax.jit(run, compiler_options=compiler.options()).lower(net, *at).compile().memory_analysis()
        assert analysis is not None, "this backend does not tell"
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(net))
        found[name] = held / 2**30, analysis.temp_size_in_bytes / 2**30
    return found


def seconds(dtype: str, size: int, runs: int) -> dict[str, float]:
    """The medians of a step with random weights."""
    rng = np.random.default_rng(0)

    def draw(shape: Any) -> jax.Array:
        scale = np.prod(shape.shape[:-1]) ** -0.5 if len(shape.shape) > 1 else 1
        return jnp.asarray(scale * rng.standard_normal(shape.shape, np.float32), dtype)

    unet = jax.tree.map(draw, networks(small=False)["unet"])
    nets, call = {"floats": unet, "int8": quantized(unet)}, jax.jit(step, compiler_options=compiler.options())
    at = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, size, size, 4), (2, 77, 768))]
    times: dict[str, list[float]] = {name: [] for name in nets}
    for turn in range(runs + 1):
        for name, net in nets.items():
            taken = timed(lambda net=net: call(net, at[0], jnp.float32(500), at[1]))[1]
            times[name] += [taken] if turn else []  # the first compiles
    return {name: statistics.median(each) for name, each in times.items()}


def rounded_in(network: Any, chosen: Callable[[tuple[Any, ...]], bool]) -> Any:
    """The network with the chosen layers' kernels rounded as int8 would be, as floats."""
    from sfumato.adapters.live import replaced
    from sfumato.models.int8 import Int8

    layers = {
        ".".join(map(str, path)): Int8(layer).restored(jnp.zeros((1, 1))) for path, layer in nnx.iter_modules(network)
        if isinstance(layer, nnx.Linear | nnx.Conv) and chosen(path)
    }  # fmt: skip
    return replaced(network, layers)


def errors() -> dict[str, list[float]]:
    """How far predictions of the embedded model move, at each of `TIMES`."""
    import sfumato
    from sfumato.text.prompt import encode_prompt, tokenize_prompt

    model = sfumato.load("emoji", dtype="float32")
    texts = ["red apple, noto", "a pink tropical fish, fluent 3d style", "a panda, noto style", "a blue car"]
    context = encode_prompt(model, tokenize_prompt(model, texts)).hidden
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 16, model.unet.config.in_channels)), jnp.float32)
    call = jax.jit(step, compiler_options=compiler.options())

    def predicted(unet: Any) -> list[Any]:
        return [call(unet, x, jnp.float32(t), context) for t in TIMES]

    others = {name: rounded_in(model.unet, chosen) for name, chosen in PARTS.items()}
    others["bfloat16"] = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.unet)
    wanted = predicted(model.unet)
    return {
        name: [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(predicted(net), wanted, strict=True)]
        for name, net in others.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "time", "error"))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.what == "error":
        for name, each in errors().items():
            print(f"{name:20} " + " ".join(f"{value:.4f}" for value in each), flush=True)
        return
    for dtype in args.dtypes:
        if args.what == "time":
            found = seconds(dtype, args.size, args.runs)
            print(f"{dtype}: a step with int8 takes {found['int8'] / found['floats']:.2f} of one without", flush=True)
            continue
        for name, (held, work) in sizes(dtype, args.size).items():
            print(f"{dtype:9} {name:7} parameters {held:.2f} GiB, temporaries {work:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
