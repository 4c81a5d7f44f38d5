"""The parts of the straight line: conditioning, where to start, the loop, decoding. Each is one compiled program."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from sfumato.controls.base import COND, UNCOND
from sfumato.division import BATCH
from sfumato.errors import SfumatoError
from sfumato.io.family import Family
from sfumato.kept import Kept
from sfumato.model import Model
from sfumato.models.clip import TextFeatures
from sfumato.models.tiling import sliced, tiled_decode, tiled_encode
from sfumato.models.vae import AutoencoderKL
from sfumato.plan import Plan
from sfumato.samplers.base import Sampler, Table
from sfumato.text.prompt import encode_prompt, tokenize_prompt
from sfumato.types import Conditioning

AESTHETIC = {COND: 6.0, UNCOND: 2.5}
"""The aesthetic scores that SDXL's refiner is told (arXiv:2307.01952, appendix; the values of the reference)."""

TILED_FROM = 96 * 96
"""Pictures of more latents than this pass the autoencoder tile by tile on a processor, and on a device with memory of
its own if a `SHARE` of that is not enough for the whole."""

LATENT = 2**18
"""Bytes that the autoencoder needs for each latent of a whole picture, in float32 (benchmarks/vae_memory.py)."""

SHARE = 1 / 4


@dc.dataclass(frozen=True)
class Reader:
    """Reads the texts of a run, all of them in equally many chunks."""

    model: Model
    size: tuple[int, int]
    """Width and height in pixels."""
    weights: bool
    clip_skip: int
    chunks: int

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """The text features of each text."""
        tokens = tokenize_prompt(self.model, texts, weights=self.weights, chunks=self.chunks)
        return encode_prompt(self.model, tokens, clip_skip=self.clip_skip)

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """What the network sees of each text."""
        return _conditioning(self.model, self.size, self.features(texts))


def reader(model: Model, plan: Plan, further: Sequence[str], *, weights: bool, clip_skip: int) -> Reader:
    """The reader of the plan's prompts and of `further` texts. Raises SfumatoError for what cannot be read."""
    texts = [*plan.prompts, *(text or "" for text in plan.negatives), *further]
    tokens = tokenize_prompt(model, list(dict.fromkeys(texts)), weights=weights)
    return Reader(model, plan.size, weights, clip_skip, max(each.ids.shape[1] for each in tokens.values()))


def conditionings(plan: Plan, read: Reader) -> dict[str, Conditioning]:
    """What the network sees of the prompts ("cond") and of the negative ones ("uncond"), one row a picture."""
    model = read.model
    negative = read.features([text or "" for text in plan.negatives])
    if model.options.get("force_zeros_for_empty_prompt"):
        absent = jnp.array([text is None for text in plan.negatives])
        negative = jax.tree.map(lambda a: jnp.where(absent.reshape(-1, *[1] * (a.ndim - 1)), 0, a), negative)
    return {COND: read(plan.prompts), UNCOND: _conditioning(model, plan.size, negative, AESTHETIC[UNCOND])}


def _conditioning(
    model: Model, size: tuple[int, int], features: TextFeatures, aesthetic: float = AESTHETIC[COND]
) -> Conditioning:  # fmt: skip
    hidden = features.hidden.astype(jnp.float32)
    config = model.unet.config
    if config.addition_embed_type != "text_time":
        return Conditioning(hidden)
    if features.pooled is None:
        raise SfumatoError(f"{model.name or 'The model'} needs pooled text features, and its text encoder has none.")
    width, height = size
    ids = [height, width, 0, 0]
    ids += [aesthetic] if model.family == Family.SDXL_REFINER else [height, width]
    wanted = ((config.projection_class_embeddings_input_dim or 0) - features.pooled.shape[-1]) // (
        config.addition_time_embed_dim or 1
    )
    if wanted != len(ids):
        raise SfumatoError(f"{model.name or 'The model'} takes {wanted} size numbers, but its family has {len(ids)}.")
    return Conditioning(
        hidden, features.pooled.astype(jnp.float32), jnp.tile(jnp.array([ids], jnp.float32), (len(hidden), 1))
    )


def rows(
    model: Model, sampler: Sampler, steps: int, *, strength: float | None = None, start: float = 0.0, stop: float = 1.0
) -> Table:
    """The sampler's table for a whole run, for one that starts from a picture with `strength`, or for the part of one
    from `start` to `stop`, in shares of the training time. Raises SfumatoError if no row is left."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SfumatoError(f"steps must be a whole number from 1 on, not {steps!r}.")
    schedule, first = model.schedule, 0
    if strength is not None:
        first = steps - min(int(steps * strength), steps)
    elif start > 0:
        times = sampler.table(schedule, steps).steps
        # As the reference has it: a step belongs to the part in which its time lies.
        cutoff = round(schedule.num_train_timesteps * (1 - start))
        per_step = len(times.t) / steps
        first = int(np.ceil(np.argmax(times.t < cutoff) / per_step)) if (times.t < cutoff).any() else steps
    if first >= steps:
        what = f"strength {strength:g}" if strength is not None else f"start {start:g}"
        raise SfumatoError(f"With {what} and {steps} steps nothing is left to do; take more of either.")
    table = sampler.table(schedule, steps, first)
    if stop < 1:
        cutoff = round(schedule.num_train_timesteps * (1 - stop))
        active = np.asarray(table.steps.active) & (np.asarray(table.steps.t) >= cutoff)
        if not active.any():
            raise SfumatoError(f"With start {start:g} and stop {stop:g} none of {steps} steps is left.")
        table = dc.replace(table, steps=dc.replace(table.steps, active=active))
    return table


def mesh_of(devices: Sequence[Any] | None, pictures: int) -> Mesh | None:
    """The devices that share a run, at most one a picture; None for the only one there is."""
    chosen = list(devices) if devices is not None else jax.devices()
    chosen = chosen[: max(1, min(len(chosen), pictures))]
    return Mesh(np.array(chosen), (BATCH,)) if devices is not None or len(chosen) > 1 else None


def spread(mesh: Mesh | None, tree: Any, axis: int | None = 0) -> Any:
    """The arrays of `tree` divided by pictures over the devices; copied to each for axis None."""
    if mesh is None:
        return tree
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, BATCH)
    return jax.device_put(tree, NamedSharding(mesh, spec))


def encode_image(vae: AutoencoderKL, pixels: Any, tiled: bool) -> Float[Array, "B h w C"]:
    """Latents of pictures in [-1, 1], one after another: the mean of the posterior."""
    return _encode(vae, jnp.asarray(pixels), tiled)


@functools.partial(Kept, static_argnames="tiled")
def _encode(vae: AutoencoderKL, pixels: Float[Array, "B H W 3"], tiled: bool) -> Float[Array, "B h w C"]:
    return sliced(functools.partial(tiled_encode, vae) if tiled else vae.encode, pixels)


@functools.partial(Kept, top=True, static_argnames=("tiled", "mesh"))
def decode(
    vae: AutoencoderKL, latents: Float[Array, "B h w C"], tiled: bool, mesh: Mesh | None = None
) -> UInt8[Array, "B H W 3"]:
    """Pictures of latents, one after another on each device."""

    def run(vae: AutoencoderKL, latents: Float[Array, "B h w C"]) -> UInt8[Array, "B H W 3"]:
        pixels = sliced(functools.partial(tiled_decode, vae) if tiled else vae.decode, latents)
        return jnp.round((pixels.clip(-1, 1) + 1) * 127.5).astype(jnp.uint8)

    if mesh is None:
        return run(vae, latents)
    # Flat, because the specification of a network's place is a specification of its arrays.
    leaves, tree = jax.tree.flatten(vae)
    specs = ([PartitionSpec()] * len(leaves), PartitionSpec(BATCH))
    flat = jax.shard_map(
        lambda leaves, x: run(jax.tree.unflatten(tree, leaves), x), mesh=mesh, in_specs=specs,
        out_specs=PartitionSpec(BATCH), check_vma=False,
    )  # fmt: skip
    return flat(leaves, latents)


def tiling(shape: tuple[int, int, int], wish: bool | None) -> bool:
    """Whether to pass the autoencoder tile by tile."""
    if wish is not None:
        return bool(wish)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return shape[0] * shape[1] > max(TILED_FROM, SHARE * memory / LATENT)


def columns(table: Table, noise: Any) -> Any:
    """The rows of a table with their noise. Numbers stay on the host, as float32, int32 and bool: they go to the device
    with a call, where each made or cut out there by itself would be a program of its own."""

    def narrowed(column: np.ndarray) -> np.ndarray:
        kinds = {"f": np.float32, "i": np.int32}
        return np.asarray(column, kinds.get(column.dtype.kind))

    return dc.replace(jax.tree.map(narrowed, table.steps), noise=noise)
