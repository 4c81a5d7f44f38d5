"""The embedded model before its training: configurations, a vocabulary, random weights.

    python -m tools.embedded.start ART OUT [--scale small|large]

ART is a folder of `tools.art`, whose captions the vocabulary is made from. OUT becomes a folder in the diffusers
layout, which `sfumato train` starts from. `small` is for hours of a laptop's processor, `large` for a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import nnx
from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers
from tokenizers.pre_tokenizers import ByteLevel

import sfumato
from sfumato.io.family import Family
from sfumato.model import GUIDANCE, GUIDED, STEPS
from sfumato.models.clip import ClipTextConfig, ClipTextEncoder
from sfumato.models.config import UNetConfig
from sfumato.models.unet import UNet
from sfumato.models.vae import AutoencoderKL, VAEConfig
from sfumato.text.tokenizer import END, ROLES, START, WORD_END, Tokenizer, added_token, assemble, clip_tokenizer

WORDS = 4096
"""Tokens at most. Nearly every word of the captions is one of them; others are spelt in pieces."""
LENGTH = 32
"""Tokens of a prompt, its start and end included; the longest caption has about 20."""
SIZE = 128
"""Pixels of a picture's side."""
LATENTS = 8
"""Channels of latents."""
SCALE = 3
"""Of guidance: a model that has seen little needs little, and more roughens its white grounds."""
STOP = 0.3
"""Where guidance ends, as a share of the steps: what is drawn is decided by then, and in what is left it only blurs the
lines that a ControlNet follows."""
EVALUATIONS = 20
"""Steps of a picture, as its figures are measured."""
BETA_END = 0.02
"""With Stable Diffusion's 0.012, what is left of the picture at the last time is still enough to tell one of a few
hundred apart (2048 numbers at a signal-to-noise ratio of 0.0047), so the text would not be needed anywhere. With 0.02
it is 0.0002: the noisiest steps, the first ones of sampling, hang on the text alone."""

SCALES: dict[str, dict[str, Any]] = {
    "small": {"channels": (64, 128, 192), "layers": 1, "heads": 4, "width": 192, "depth": 2, "groups": 16},
    "large": {"channels": (128, 256, 384), "layers": 2, "heads": 8, "width": 384, "depth": 4, "groups": 32},
}


def unet(channels: tuple[int, ...], layers: int, heads: int, width: int, groups: int, **_: Any) -> UNetConfig:
    """The denoiser. Pooled text is added to the time: with cross-attention alone captions are ignored for long."""
    return UNetConfig(
        in_channels=LATENTS, out_channels=LATENTS, sample_size=SIZE // 8, block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=layers,
        attention_head_dim=heads, cross_attention_dim=width, norm_num_groups=groups,
        addition_embed_type="text", addition_embed_type_num_heads=heads,
    )  # fmt: skip


def autoencoder() -> VAEConfig:
    """Between 128 x 128 pixels and 16 x 16 latents."""
    return VAEConfig(
        block_out_channels=(16, 32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=LATENTS, norm_num_groups=8, sample_size=SIZE,
        scaling_factor=1.0,
    )  # fmt: skip


def text_encoder(words: Tokenizer, width: int, depth: int, heads: int, **_: Any) -> ClipTextConfig:
    """A text encoder of CLIP's architecture for this vocabulary."""
    return ClipTextConfig(
        vocab_size=words.size, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=depth,
        num_attention_heads=heads, max_position_embeddings=LENGTH, projection_dim=width, bos_token_id=words.bos,
        eos_token_id=words.eos, pad_token_id=words.pad,
    )  # fmt: skip


def vocabulary(texts: Iterable[str], words: int = WORDS) -> Tokenizer:
    """A tokenizer as CLIP's, whose merges are learnt from these texts (byte pairs, arXiv:1508.07909)."""
    clip = clip_tokenizer().backend
    backend = Backend(models.BPE(unk_token=END, end_of_word_suffix=WORD_END))
    backend.normalizer, backend.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=words, initial_alphabet=sorted(ByteLevel.alphabet()), end_of_word_suffix=WORD_END, min_frequency=2,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    signs = sorted(ByteLevel.alphabet())
    tokens = [*signs, *(sign + WORD_END for sign in signs), *("".join(pair) for pair in merges), START, END]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    roles = {role: added_token(value) for role, value in ROLES.items()}
    return assemble(vocab, merges, roles, {}, LENGTH, "the new vocabulary")


def captions(art: Path) -> list[str]:
    """All captions of a folder of art."""
    lines = (art / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["text"] for line in lines]
    return [text for texts in found for text in ([texts] if isinstance(texts, str) else texts)]


def start(texts: Iterable[str], scale: str = "small", seed: int = 0) -> sfumato.Model:
    """The model before its training."""
    numbers, words = SCALES[scale], vocabulary(texts)
    schedule = sfumato.Schedule(
        prediction_type="v_prediction", beta_schedule="scaled_linear", beta_end=BETA_END, timestep_spacing="trailing",
        steps_offset=1, clip_sample=False, set_alpha_to_one=False, class_name="DPMSolverMultistepScheduler",
        options={"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    )  # fmt: skip
    return sfumato.Model(
        UNet(unet(**numbers), rngs=nnx.Rngs(seed)),
        AutoencoderKL(autoencoder(), rngs=nnx.Rngs(seed + 1)),
        {"text_encoder": ClipTextEncoder(text_encoder(words, **numbers), rngs=nnx.Rngs(seed + 2))},
        {"tokenizer": words},
        schedule,
        Family.SD1,
        options={GUIDANCE: SCALE, GUIDED: STOP, STEPS: EVALUATIONS},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = start(captions(args.art), args.scale, args.seed)
    print(sfumato.save(model, args.out), f"{model.tokenizers['tokenizer'].size} tokens")


if __name__ == "__main__":
    main()
