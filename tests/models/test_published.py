"""The published models: every key and shape of the reference, without a number allocated."""

from __future__ import annotations

import pytest

from sfumato.io.fill import slots
from sfumato.models.clip import OPEN_CLIP_BIG_G, OPEN_CLIP_H, VIT_L_14, ClipTextEncoder
from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.models.vae import AutoencoderKL, VAEConfig

import published

NETWORKS = {
    **{("unet", name): (UNet, from_dict(UNetConfig, config)) for name, config in published.UNETS.items()},
    **{
        ("controlnet", name): (ControlNet, from_dict(ControlNetConfig, config))
        for name, config in published.CONTROLNETS.items()
    },
    ("vae", "sd"): (AutoencoderKL, from_dict(VAEConfig, published.VAE)),
    ("text", "CLIP_L"): (ClipTextEncoder, VIT_L_14),
    ("text", "OPEN_CLIP_H"): (ClipTextEncoder, OPEN_CLIP_H),
    ("text", "OPEN_CLIP_G"): (ClipTextEncoder, OPEN_CLIP_BIG_G),
}


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "name"), NETWORKS)
def test_every_key_and_shape_is_that_of_the_reference(kind, name):
    network, config = NETWORKS[kind, name]
    ours = {key: slot.stored for key, slot in slots(abstract(network, config)).items()}
    assert ours == {key: tensor.shape for key, tensor in published.state(kind, name).items()}
