"""The losses of an autoencoder in torch, and the discriminator."""

from __future__ import annotations

from typing import Any

from sfumato.train.consistency import Consistency
from sfumato.train.discriminator import DiscriminatorConfig
from sfumato.train.reconstruction import COLOURS, Reconstruction

from oracle import seeded

TINY = DiscriminatorConfig(width=8, layers=2, norm_num_groups=4)


def torch_judge(config: DiscriminatorConfig = TINY) -> Any:
    """A random PatchGAN discriminator with group normalization."""
    from torch import nn

    widths, groups = config.widths, config.norm_num_groups

    def block(inputs: int, outputs: int, stride: int) -> Any:
        return nn.ModuleDict({"conv": nn.Conv2d(inputs, outputs, 4, stride, 1), "norm": nn.GroupNorm(groups, outputs)})

    strides = [2] * (config.layers - 1) + [1]
    return seeded(lambda: nn.ModuleDict({
        "conv_in": nn.Conv2d(3, widths[0], 4, 2, 1),
        "blocks": nn.ModuleList(map(block, widths, widths[1:], strides)),
        "conv_out": nn.Conv2d(widths[-1], 1, 4, 1, 1),
    }), 5)  # fmt: skip


def verdicts(judge: Any, pixels: Any) -> Any:
    """What it says of pictures [B 3 H W]."""
    from torch.nn.functional import leaky_relu

    x = leaky_relu(judge["conv_in"](pixels), 0.2)
    for block in judge["blocks"]:
        x = leaky_relu(block["norm"](block["conv"](x)), 0.2)
    return judge["conv_out"](x)


def sides(judge: Any, rebuilt: Any, pixels: Any) -> tuple[Any, Any]:
    """The losses of the generator and of the discriminator."""
    from torch.nn.functional import relu

    real, fake = verdicts(judge, pixels), verdicts(judge, rebuilt.detach())
    return -verdicts(judge, rebuilt).mean(), 0.5 * (relu(1 - real).mean() + relu(1 + fake).mean())


def torch_loss(off: Any, weights: Reconstruction) -> Any:
    """That of differences [B 3 H W], without the divergence."""
    from torch.nn.functional import avg_pool2d

    edges = (off[:, :, 1:] - off[:, :, :-1]).abs().mean() + (off[..., 1:] - off[..., :-1]).abs().mean()
    scales = sum(avg_pool2d(off, size).abs().mean() for size in (2, 4, 8)) / 3
    return weights.l1 * off.abs().mean() + weights.scales * scales + weights.edges * edges / 2


def torch_consistency(made: Any, real: Any, weights: Consistency) -> Any:
    """The term of a ControlNet's loss that compares pictures [B 3 H W]."""
    import torch
    from torch.nn.functional import avg_pool2d

    made, real = (torch.einsum("bchw,dc->bdhw", each, torch.tensor(COLOURS)) for each in (made, real))

    def strength(pictures: Any, size: int) -> Any:
        x = avg_pool2d(pictures, size)
        down, right = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
        return ((down**2 + right**2).sum(1) + 1e-4).sqrt()

    missing = [strength(real, size) - strength(made, size) for size in (1, 2, 4)]
    edges = sum((1.5 * each.clamp(min=0) + 0.5 * (-each).clamp(min=0)).mean() for each in missing) / 3
    return weights.edges * edges + weights.colours * (made - real).abs().mean()
