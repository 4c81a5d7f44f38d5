"""Configurations of the networks, with the field names of the diffusers format's `config.json`.

A configuration class says three things beside its fields: `neutral`, the options of the format that sfumato has only
at their usual value; `ignored`, keys that say nothing about the network; and what must hold between fields.
"""

from __future__ import annotations

import dataclasses as dc
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from sfumato.errors import SfumatoError

C = TypeVar("C")
PerLevel = int | tuple[int, ...]


def from_dict(cls: type[C], raw: Mapping[str, Any], where: str = "configuration") -> C:
    """Builds configuration `cls` from the keys of a JSON file; `where` names that file in messages.

    Raises SfumatoError for an option with a value that sfumato does not have; warns of an unknown option.
    """
    names = {field.name for field in dc.fields(cls)}  # type: ignore[arg-type]
    neutral: Mapping[str, Any] = getattr(cls, "neutral", {})
    ignored: frozenset[str] = getattr(cls, "ignored", frozenset())
    values = {}
    for key, value in raw.items():
        if key in names:
            values[key] = _frozen(value)
        elif key in neutral:
            if value is not None and value != neutral[key]:
                raise SfumatoError(f"{where}: {key}={value!r} is not supported, only {neutral[key]!r} is.")
        elif not key.startswith("_") and key not in ignored:
            warnings.warn(f"{where}: the unknown option {key}={value!r} is not used.", stacklevel=2)
    try:
        return cls(**values)
    except SfumatoError as error:
        raise SfumatoError(f"{where}: {error}") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise SfumatoError(f"{where}: a value has the wrong type ({error}).") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a configuration, without options that only repeat their default None."""
    return {
        field.name: _thawed(getattr(config, field.name))
        for field in dc.fields(config)
        if getattr(config, field.name) is not None or field.default is not None
    }


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    return [_thawed(v) for v in value] if isinstance(value, tuple) else value


@dc.dataclass(frozen=True)
class EncoderConfig:
    """What the UNet and the ControlNet have in common: everything down to the middle block."""

    in_channels: int = 4
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D",
    )  # fmt: skip
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerLevel = 2
    transformer_layers_per_block: PerLevel = 1
    attention_head_dim: PerLevel = 8
    """The *number* of heads of each level; the format's name for it is a historical mistake."""
    num_attention_heads: PerLevel | None = None
    cross_attention_dim: PerLevel = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    upcast_attention: bool = False
    """Kept for the files: attention logits are float32 here in any case."""
    addition_embed_type: str | None = None
    """What is added to the time: None, "text_time" (SDXL) or "text" (the pooled context)."""
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    addition_embed_type_num_heads: int = 64

    neutral: ClassVar[Mapping[str, Any]] = {
        "center_input_sample": False, "mid_block_scale_factor": 1, "only_cross_attention": False,
        "encoder_hid_dim": None, "encoder_hid_dim_type": None, "class_embed_type": None,
        "num_class_embeds": None, "resnet_time_scale_shift": "default", "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional", "time_embedding_dim": None,
        "time_embedding_act_fn": None, "timestep_post_act": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
        "attention_type": "default", "class_embeddings_concat": False, "dual_cross_attention": False,
        "mid_block_only_cross_attention": False, "cross_attention_norm": None,
        "reverse_transformer_layers_per_block": None,
    }  # fmt: skip
    ignored: ClassVar[frozenset[str]] = frozenset({"dropout"})

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types", "layers_per_block", "transformer_layers_per_block", "attention_head_dim",
            "num_attention_heads", "cross_attention_dim",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise SfumatoError(f"{name} has {len(value)} entries for {levels} levels (block_out_channels).")
        for kind in self.down_block_types:
            _one_of("down_block_types", kind, ("DownBlock2D", "CrossAttnDownBlock2D"))
        _one_of("mid_block_type", self.mid_block_type, ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None))
        _one_of("addition_embed_type", self.addition_embed_type, (None, "text_time", "text"))
        if self.addition_embed_type == "text_time" and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise SfumatoError(
                "addition_embed_type 'text_time' needs addition_time_embed_dim and "
                "projection_class_embeddings_input_dim."
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise SfumatoError(
                    f"norm_num_groups={self.norm_num_groups} does not divide the {channels} channels of "
                    "block_out_channels."
                )

    def layers(self, level: int) -> int:
        """Residual blocks of a level on the way down."""
        return _at(self.layers_per_block, level)

    def depth(self, level: int) -> int:
        """Transformer blocks in each attention of a level."""
        return _at(self.transformer_layers_per_block, level)

    def heads(self, level: int) -> int:
        """Attention heads of a level."""
        return _at(self.num_attention_heads or self.attention_head_dim, level)

    def context_dim(self, level: int) -> int:
        """Width of the text features that a level attends to."""
        return _at(self.cross_attention_dim, level)

    @property
    def time_dim(self) -> int:
        """Width of the time embedding."""
        return 4 * self.block_out_channels[0]


@dc.dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """A denoising UNet ("UNet2DConditionModel")."""

    sample_size: int | tuple[int, int] | None = None
    """Latent height and width that the network was trained at."""
    out_channels: int = 4
    up_block_types: tuple[str, ...] = (
        "UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
    )  # fmt: skip
    time_cond_proj_dim: int | None = None
    """Width of a guidance-scale embedding that is added to the time (distilled models such as LCM)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.up_block_types) != len(self.down_block_types):
            raise SfumatoError(
                f"up_block_types has {len(self.up_block_types)} entries, down_block_types {len(self.down_block_types)}."
            )
        for kind in self.up_block_types:
            _one_of("up_block_types", kind, ("UpBlock2D", "CrossAttnUpBlock2D"))


@dc.dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """A ControlNet ("ControlNetModel")."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False
    """Average each residual over the picture (the "shuffle" net)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        order = self.controlnet_conditioning_channel_order
        _one_of("controlnet_conditioning_channel_order", order, ("rgb", "bgr"))


def _at(value: PerLevel, level: int) -> int:
    return value[level] if isinstance(value, tuple) else value


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise SfumatoError(f"{name} {value!r} is not supported, only {', '.join(map(repr, allowed))}.")
