"""The text encoders of CLIP (arXiv:2103.00020, section 2.4): causal transformers over byte-pair tokens.

Every Stable Diffusion reads its prompt through one or two of them; which layer it reads differs:

| family        | encoder                           | `skip` | `normalize` | pooled    |
|---------------|-----------------------------------|--------|-------------|-----------|
| SD 1.x        | `VIT_L_14`                        | 0      | True        | not used  |
| SD 2.x        | `OPEN_CLIP_H`                     | 0      | True        | not used  |
| SDXL base     | `VIT_L_14` and `OPEN_CLIP_BIG_G`  | 1      | False       | of bigG   |
| SDXL refiner  | `OPEN_CLIP_BIG_G`                 | 1      | False       | of bigG   |

A user's "clip skip" adds to `skip`.
"""

from __future__ import annotations

import dataclasses as dc
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sfumato.errors import SfumatoError
from sfumato.models import kernels
from sfumato.models.attention import maybe_remat
from sfumato.models.layers import ACTIVATIONS, embed, layer_norm, linear
from sfumato.types import pytree

PROJECTED = "CLIPTextModelWithProjection"


@dc.dataclass(frozen=True)
class ClipTextConfig:
    """A CLIP text encoder, with the field names and defaults of the Hugging Face `config.json`.

    Raises SfumatoError if the fields contradict each other or ask for what does not exist here.
    """

    architectures: tuple[str, ...] | None = ("CLIPTextModel",)
    """Tells whether the pooled features are projected (`PROJECTED`) or not used at all."""
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    """The end-of-text token; 2, a mistake of old files, stands for the last token of the vocabulary."""
    pad_token_id: int | None = 1
    """Kept for the files; the tokenizer knows the token that really pads."""

    ignored: ClassVar[frozenset[str]] = frozenset({
        "attention_dropout", "dropout", "dtype", "initializer_factor", "initializer_range", "model_type",
        "torch_dtype", "transformers_version", "chunk_size_feed_forward", "gradient_checkpointing",
        "id2label", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states",
        "problem_type", "return_dict", "tie_word_embeddings", "use_cache",
    })  # fmt: skip

    def __post_init__(self) -> None:
        act, width, heads = self.hidden_act, self.hidden_size, self.num_attention_heads
        if act not in ACTIVATIONS:
            raise SfumatoError(f"hidden_act {act!r} is not supported, only {', '.join(ACTIVATIONS)}.")
        if width % heads:
            raise SfumatoError(f"num_attention_heads={heads} does not divide hidden_size={width}.")
        if not isinstance(self.eos_token_id, int):
            raise SfumatoError(f"eos_token_id must be one number, not {self.eos_token_id!r}.")
        if self.projects and not self.projection_dim:
            raise SfumatoError(f"{PROJECTED} needs projection_dim.")

    @property
    def projects(self) -> bool:
        """Whether there is a `text_projection` that makes pooled features."""
        return PROJECTED in (self.architectures or ())


VIT_L_14 = ClipTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
)  # fmt: skip
"""OpenAI's CLIP ViT-L/14: SD 1.x and the first encoder of SDXL."""

OPEN_CLIP_H = ClipTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu",
)  # fmt: skip
"""OpenCLIP ViT-H/14 without its 24th layer, which SD 2.x leaves out."""

OPEN_CLIP_BIG_G = ClipTextConfig(
    architectures=(PROJECTED,), hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
    num_attention_heads=20, hidden_act="gelu", projection_dim=1280,
)  # fmt: skip
"""OpenCLIP ViT-bigG/14: the second encoder of SDXL and the only one of its refiner."""


@pytree
class TextFeatures:
    """What a text encoder returns."""

    hidden: Float[Array, "B L D"]
    """The features of every token, for cross-attention."""
    pooled: Float[Array, "B P"] | None
    """The projected features of the end-of-text token; None without a projection."""


class TextEmbeddings(nnx.Module):
    """Token features plus learned position features. The table of tokens may be exchanged for a longer one; a token
    beyond it gives NaN."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return self.token_embedding(ids) + self.position_embedding.embedding[: ids.shape[1]]


class SelfAttention(nnx.Module):
    """Multi-head self-attention (arXiv:1706.03762, section 3.2.2) with biases throughout."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = linear(width, width, rngs=rngs)
        self.k_proj = linear(width, width, rngs=rngs)
        self.v_proj = linear(width, width, rngs=rngs)
        self.out_proj = linear(width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], mask: Float[Array, "1 1 L L"]) -> Float[Array, "B L D"]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in projections)
        return self.out_proj(kernels.attention(q, k, v, mask).reshape(x.shape))


class MLP(nnx.Module):
    """Two dense layers."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Self-attention and a perceptron, each normalized first and added."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.layer_norm1 = layer_norm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], mask: Float[Array, "1 1 L L"]) -> Float[Array, "B L D"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Float[Array, "B L D"], remat: bool = False) -> list[Float[Array, "B L D"]]:
        """The input and then the output of every layer; `remat` recomputes layers in the backward pass."""
        length = x.shape[1]
        mask = jnp.where(jnp.tri(length, dtype=bool), 0.0, -jnp.inf)[None, None]
        call = maybe_remat(remat, lambda layer, x: layer(x, mask))
        states = [x]
        for layer in self.layers:
            states.append(call(layer, states[-1]))
        return states


class TextTransformer(nnx.Module):
    """Holds the parts under the checkpoint's name `text_model`."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class ClipTextEncoder(nnx.Module):
    """A CLIP text encoder; with `remat` set the backward pass recomputes layers (gradient checkpointing)."""

    remat: bool = False

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.text_model = TextTransformer(config, rngs=rngs)
        if config.projects and config.projection_dim is not None:
            self.text_projection = linear(config.hidden_size, config.projection_dim, bias=False, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"], skip: int = 0, normalize: bool = True) -> TextFeatures:
        """Encodes tokens.

        `skip` is how many of the last layers `hidden` goes without, `normalize` whether it then passes the
        final layer norm; the pooled features always come from the last layer, normalized. Raises SfumatoError
        for more tokens than the encoder has positions, or a `skip` beyond its layers.
        """
        model, layers = self.text_model, len(self.text_model.encoder.layers)
        length, positions = ids.shape[1], len(model.embeddings.position_embedding.embedding[...])
        if length > positions:
            raise SfumatoError(f"{length} tokens are more than the {positions} that the text encoder takes.")
        if not 0 <= skip <= layers:
            raise SfumatoError(f"The text encoder has {layers} layers, so it cannot skip {skip}.")
        states = model.encoder(model.embeddings(ids), self.remat)
        hidden = states[-1 - skip]
        pooled = None
        if self.config.projects:
            last = model.final_layer_norm(states[-1])
            pooled = self.text_projection(last[jnp.arange(len(ids)), self._end_of_text(ids)])
        return TextFeatures(model.final_layer_norm(hidden) if normalize else hidden, pooled)

    def _end_of_text(self, ids: Int[Array, "B L"]) -> Int[Array, " B"]:
        """The position of the first end-of-text token, 0 where there is none.

        With the eos_token_id 2 of old files it is the highest token, as in transformers; but tokens that were
        added to the vocabulary do not count, which transformers takes for the end.
        """
        config = self.config
        if config.eos_token_id == 2:
            return jnp.argmax(jnp.where(ids < config.vocab_size, ids, -1), axis=-1)
        return jnp.argmax(ids == config.eos_token_id, axis=-1)
