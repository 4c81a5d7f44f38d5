"""The loss of a latent diffusion model, which every recipe but the autoencoder's shares."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sfumato.errors import SfumatoError
from sfumato.io.family import Family
from sfumato.io.load import default_dtype, tokenizer_name
from sfumato.model import Model
from sfumato.models.clip import TextFeatures
from sfumato.text.prompt import READING
from sfumato.train.consistency import Consistency
from sfumato.train.objective import Draws, Objective
from sfumato.train.task import Batch, Metrics, cast, check_float, checkpointed
from sfumato.types import Conditioning

Nets = Mapping[str, Any]
"""Networks by component name ("unet", "vae", "text_encoder", "controlnet"), in the type that is computed in."""

Extend = Callable[[Nets, Batch, Draws, Float[Array, "B h w C"], Conditioning], Conditioning]
"""What a recipe adds to what the UNet sees: (networks, batch, draws, noised latents, conditioning) -> conditioning."""


def nothing(nets: Nets, batch: Batch, draws: Draws, noisy: Array, cond: Conditioning) -> Conditioning:
    """Adds nothing."""
    return cond


@dc.dataclass(frozen=True, eq=False)
class Denoising:
    """Encodes pictures and captions, noises, asks the UNet, compares."""

    objective: Objective
    family: Family
    blank: Mapping[str, Int32[np.ndarray, " L"]]
    """The tokens of the empty caption, by text encoder."""
    zeros: bool
    """Whether a dropped caption is all features zero, which is what such models (SDXL) are guided with, and not the
    features of the empty caption."""
    dtype: str = "float32"
    """What is computed in."""
    extend: Extend = nothing
    consistency: Consistency | None = None
    """A further term for pictures; the networks have the autoencoder then."""

    @classmethod
    def of(
        cls, model: Model, objective: Objective | None = None, *, dtype: str | None = None, extend: Extend = nothing,
        consistency: Consistency | None = None,
    ) -> Denoising:  # fmt: skip
        """That of a model, by default with plain weights. Raises SfumatoError for SDXL's refiner and int8 kernels."""
        if model.family == Family.SDXL_REFINER:
            raise SfumatoError("SDXL's refiner is not trained here: it takes aesthetic scores, which no data has.")
        check_float(model.unet, *model.text_encoders.values())
        blank = {name: row[0] for name, row in tokens(model, [""]).items()}
        zeros = bool(model.options.get("force_zeros_for_empty_prompt"))
        objective = objective or Objective(model.schedule)
        return cls(objective, Family(model.family), blank, zeros, dtype or default_dtype(), extend, consistency)

    def loss(self, trainable: Nets, frozen: Nets, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a task whose masters are whole networks by component name."""
        return self({**frozen, **cast(trainable, self.dtype)}, batch, key)

    def __call__(self, nets: Nets, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a collated batch, float32."""
        return self.at(nets, batch, self.draw(nets, batch, key))

    def at(self, nets: Nets, batch: Batch, draws: Draws) -> tuple[Float[Array, ""], Metrics]:
        """The same where all that is random is given."""
        batch = jax.tree.map(jnp.asarray, dict(batch))
        latents = batch["latents"] if "latents" in batch else nets["vae"].encode(batch["pixels"], draws.posterior)
        noisy = self.objective.noised(latents, draws)
        output = self.predict(nets, batch, draws, noisy)
        loss, metrics = self.objective.loss(output, latents, draws, batch.get("weights"))
        consistency = self.consistency
        if consistency is None:
            return loss, metrics
        some = (batch, draws, noisy, output, latents)
        batch, draws, noisy, output, latents = jax.tree.map(lambda a: a[:: consistency.every], some)
        if consistency.own:
            draws, noisy = self.objective.onward(output, noisy, draws)
            output = self.predict(nets, batch, draws, noisy)
        more, terms = consistency(nets["vae"].decode, self.objective.clean(output, noisy, draws), latents)
        return loss + more, metrics | terms

    def predict(
        self, nets: Nets, batch: Batch, draws: Draws, noisy: Float[Array, "B h w C"]
    ) -> Float[Array, "B h w C"]:
        """What the UNet says of noised latents."""
        cond = self.extend(nets, batch, draws, noisy, self.conditioning(nets, batch, draws))
        return nets["unet"](noisy, draws.t.astype(jnp.float32), cond).eps

    def draw(self, nets: Nets, batch: Batch, key: jax.Array) -> Draws:
        """What is random for this batch."""
        if "latents" in batch:
            return self.objective.draw(key, batch["latents"].shape)
        (rows, height, width, _), vae = batch["pixels"].shape, nets["vae"]
        return self.objective.draw(
            key, (rows, height // vae.factor, width // vae.factor, vae.config.latent_channels)
        )  # fmt: skip

    def conditioning(self, nets: Nets, batch: Batch, draws: Draws) -> Conditioning:
        """What the UNet sees of captions and sizes."""
        features = self.features(nets, batch, draws)
        if nets["unet"].config.addition_embed_type != "text_time":
            return Conditioning(features.hidden)
        return Conditioning(features.hidden, features.pooled, batch["sizes"])

    def features(self, nets: Nets, batch: Batch, draws: Draws) -> TextFeatures:
        """The text features of each row, of those that are dropped the blank ones."""
        if "context" in batch:
            found, blank = TextFeatures(batch["context"], batch.get("pooled")), TextFeatures(*nets["blank"])
        elif self.zeros:
            found = read(nets, batch["tokens"], self.family)
            blank = jax.tree.map(jnp.zeros_like, found)
        else:  # chosen as tokens, so that gradients reach the empty caption's features too
            rows = draws.dropped[:, None]
            ids = {name: jnp.where(rows, self.blank[name], ids) for name, ids in batch["tokens"].items()}
            return read(nets, ids, self.family)

        def drop(a: Array, instead: Array) -> Array:
            return jnp.where(draws.dropped.reshape(-1, *[1] * (a.ndim - 1)), instead.astype(a.dtype), a)

        return jax.tree.map(drop, found, blank)


def read(nets: Nets, ids: Mapping[str, Any], family: Family) -> TextFeatures:
    """The text features of tokens [B L], of two text encoders side by side; pooled ones from the last."""
    found = [nets[name](ids[name], *READING[family]) for name in sorted(ids)]
    return TextFeatures(jnp.concatenate([each.hidden for each in found], axis=-1), found[-1].pooled)


def tokens(model: Model, texts: Iterable[str]) -> dict[str, Int32[np.ndarray, "B L"]]:
    """Captions as one row of tokens each, for every text encoder; warns of those that are too long, and cuts them."""
    texts = list(texts)
    return {name: model.tokenizers[tokenizer_name(name)](texts) for name in model.text_encoders}


def collate(model: Model, batch: Batch, *further: str) -> dict[str, Any]:
    """A batch of the data as `Denoising` takes it. Raises SfumatoError if there is something missing.

    Takes "pixels" (or "latents", as the UNet sees them) and "text" (or "context" and, for SDXL, "pooled"); for SDXL
    "sizes"; "weights" where there are some; and `further` arrays, such as "conditioning".
    """
    xl, read_before = model.unet.config.addition_embed_type == "text_time", "context" in batch
    names = ["latents" if "latents" in batch else "pixels", *(["sizes"] if xl else [])]
    names += ["context", *(["pooled"] if xl else [])] if read_before else []
    names += [*further, *(["weights"] if "weights" in batch else [])]
    missing = [name for name in names if name not in batch]
    missing += [] if read_before or "text" in batch else ["text"]
    if missing:
        raise SfumatoError(f"This training needs {' and '.join(missing)} for every picture, and the data has none.")
    arrays: dict[str, Any] = {name: np.asarray(batch[name], np.float32) for name in names}
    return arrays if read_before else arrays | {"tokens": tokens(model, batch["text"])}


def networks(
    model: Model, *, without: Collection[str] = (), dtype: str | None = None, remat: bool = False, cached: bool = False,
    reads: bool = False, decodes: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The networks of a model by component name, in the type `dtype` (bfloat16 on accelerators, float32 on CPU).

    `without` names those that are not wanted, because they are trained. With `cached` the autoencoder and the text
    encoders are left out too, for batches hold what they would say (see `cache`); in their place is "blank", the
    features of the empty caption. One that `reads` has its text encoders nevertheless, because they are trained, and
    one that `decodes` its autoencoder, because pictures are looked at.
    `remat` is gradient checkpointing.
    """
    nets: dict[str, Any] = {"unet": model.unet} | ({} if cached and not decodes else {"vae": model.vae})
    nets |= model.text_encoders if reads or not cached else {}
    wanted = {name: checkpointed(net, remat) for name, net in nets.items() if name not in without}
    if cached and not reads:
        blank = _read(dict(model.text_encoders), tokens(model, [""]), Family(model.family))
        zeros = model.options.get("force_zeros_for_empty_prompt")
        blank = jax.tree.map(jnp.zeros_like, blank) if zeros else blank
        wanted["blank"] = (blank.hidden, blank.pooled)
    return cast(wanted, dtype or default_dtype())


def cache(model: Model, batch: Batch, *, reads: bool = False, edits: bool = False) -> dict[str, Any]:
    """A batch of the data with what its pictures and captions become ("latents", "context", "pooled") in their place:
    work that is then not done again in every epoch. The latents are the means of the autoencoder's distribution.

    For training that `reads`, captions stay. With `edits`, for InstructPix2Pix, the pictures before are replaced too,
    by "channels": see `before`.
    """
    found = {"latents": _encode(model.vae, batch["pixels"])}
    if not reads:
        features = _read(dict(model.text_encoders), tokens(model, batch["text"]), Family(model.family))
        found |= {"context": features.hidden, "pooled": features.pooled}
    if edits:
        found["channels"] = _before(model.vae, batch["conditioning"], scales_edits(model))
    replaced = ("pixels", *([] if reads else ["text"]), *(["conditioning"] if edits else []))
    kept = {name: value for name, value in batch.items() if name not in replaced}
    return kept | {name: np.asarray(a, np.float32) for name, a in found.items() if a is not None}


def before(vae: Any, pictures: Float[Array, "B H W 3"], scaled: bool) -> Float[Array, "B h w C"]:
    """What a UNet that edits sees of pictures in [0, 1]: the means of their latents, for most models unscaled."""
    latents = vae.posterior(2 * pictures - 1).mean
    return vae.scale(latents) if scaled else latents


def scales_edits(model: Model) -> bool:
    """Whether the model's UNet sees scaled latents of the picture before an edit, which CosXL alone does."""
    return bool(model.options.get("is_cosxl_edit"))


_read, _before = jax.jit(read, static_argnums=2), jax.jit(before, static_argnums=2)


@jax.jit
def _encode(vae: Any, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
    return vae.encode(pixels)


def with_networks(model: Model, nets: Nets) -> Model:
    """The model with other networks, by component name."""
    parts = {name: net for name, net in nets.items() if name in ("unet", "vae")}
    encoders = {name: nets.get(name, encoder) for name, encoder in model.text_encoders.items()}
    return dc.replace(model, text_encoders=encoders, **parts)


def check_channels(model: Model, recipe: str) -> None:
    """Raises SfumatoError if the UNet takes more than latents."""
    wanted, latents = model.unet.config.in_channels, model.vae.config.latent_channels
    if wanted != latents:
        raise SfumatoError(
            f"{recipe} trains models of {latents} input channels, and {model.name or 'this one'} has {wanted}."
        )
