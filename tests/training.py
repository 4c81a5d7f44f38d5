"""A step of training in torch, with diffusers' networks and scheduler, beside ours: the same data, noise and times."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sfumato.io.fill import fill
from sfumato.models.layers import abstract
from sfumato.train.objective import Draws, Objective
from sfumato.train.task import Task

from oracle import lazy, to_torch

TEXTS = ("a red fox in the snow", "a boat", "two green apples on a table")
TIMES = (40, 401, 957)


def batch(seed: int = 0, rows: int = 3) -> dict[str, Any]:
    """What the data gives: pictures of 16 x 16 pixels, captions, control pictures, sizes."""
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.uniform(-1, 1, (rows, 16, 16, 3)).astype(np.float32), "text": list(TEXTS[:rows]),
        "conditioning": rng.uniform(0, 1, (rows, 16, 16, 3)).astype(np.float32),
        "sizes": np.array([[16, 20, 0, 4, 16, 16], [32, 32, 0, 0, 16, 16], [16, 16, 3, 0, 16, 16]], np.float32)[:rows],
    }  # fmt: skip


def draws(steps: int = 1, shape: tuple[int, ...] = (3, 8, 8, 4), **dropped: tuple[bool, ...]) -> list[Draws]:
    """What is random in so many steps; the first has the times `TIMES`."""
    rng = np.random.default_rng(1)
    rows = {name: jnp.array(dropped.get(name, (False,) * shape[0])) for name in ("dropped", "dropped_image")}
    return [
        Draws(
            jnp.asarray(rng.standard_normal(shape), jnp.float32), jnp.array(np.roll(TIMES[: shape[0]], step) + step),
            jnp.asarray(rng.standard_normal(shape), jnp.float32), **rows,
        )
        for step in range(steps)
    ]  # fmt: skip


@dc.dataclass
class Reference:
    """The training step of a torch pipeline; what it trains is a copy of its own."""

    pipeline: Any
    trained: Mapping[str, Any]
    """Torch modules by component name, of which the gradients are wanted."""
    blank: str | None = ""
    """The caption of rows that go without one; None for features of zeros."""
    min_snr: float | None = None
    extend: Callable[..., dict[str, Any]] = lambda *args: {}
    """(modules, batch, draws, noisy, t, arguments) -> further arguments of the UNet."""
    settings: Mapping[str, Any] = dc.field(default_factory=dict)
    further: Callable[..., Any] | None = None
    """(this, scheduler, batch, draws, noisy, output, latents) -> what is added."""

    def __post_init__(self) -> None:
        self.trained = {name: copy.deepcopy(module).train() for name, module in self.trained.items()}

    def part(self, name: str) -> Any:
        return self.trained.get(name) or getattr(self.pipeline, name)

    def loss(self, batch: Mapping[str, Any], draws: Draws) -> Any:
        """As in diffusers' training scripts."""
        import diffusers
        import torch
        from diffusers.training_utils import compute_snr

        scheduler = diffusers.DDPMScheduler.from_config(self.pipeline.scheduler.config, **self.settings)
        noise, t = to_torch(draws.noise), torch.tensor(np.array(draws.t)).long()
        latents = self.latents(batch["pixels"], draws.posterior)
        noisy = scheduler.add_noise(latents, noise, t)
        output = self.predict(batch, draws, noisy, t)
        v = scheduler.config.prediction_type == "v_prediction"
        off = (output - (scheduler.get_velocity(latents, noise, t) if v else noise)) ** 2
        if self.min_snr is None:
            seen = (scheduler, batch, draws, noisy, output, latents)
            return off.mean() + (0 if self.further is None else self.further(self, *seen))
        snr = compute_snr(scheduler, t)
        weights = torch.clamp(snr, max=self.min_snr) / (snr + 1 if v else snr)
        return (off.mean((1, 2, 3)) * weights).mean()

    def predict(self, batch: Mapping[str, Any], draws: Draws, noisy: Any, t: Any) -> Any:
        """What the UNet says."""
        import torch

        seen = self.texts(batch, draws)
        seen |= self.extend(self, batch, draws, noisy, t, seen)
        return self.part("unet")(torch.cat([noisy, *seen.pop("channels", [])], 1), t, **seen).sample

    def latents(self, pixels: Any, posterior: Any) -> Any:
        vae = self.part("vae")
        found = vae.encode(to_torch(pixels)).latent_dist
        return (found.mean + found.std * to_torch(posterior)) * vae.config.scaling_factor

    def texts(self, batch: Mapping[str, Any], draws: Draws) -> dict[str, Any]:
        """The arguments of the UNet that captions and sizes make."""
        import torch

        absent = [bool(one) for one in draws.dropped]
        texts = [text if self.blank is None or not gone else self.blank
                 for text, gone in zip(batch["text"], absent, strict=True)]  # fmt: skip

        def run(name: str) -> Any:
            tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"))
            ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            return self.part(name)(ids, output_hidden_states=True)

        if not hasattr(self.pipeline, "text_encoder_2"):
            return {"encoder_hidden_states": run("text_encoder")[0]}
        first, second = run("text_encoder"), run("text_encoder_2")
        context, pooled = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]
        if self.blank is None:
            kept = torch.tensor([not gone for gone in absent]).float()
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
        added = {"text_embeds": pooled, "time_ids": torch.from_numpy(batch["sizes"])}
        return {"encoder_hidden_states": context, "added_cond_kwargs": added}

    def as_ours(self, like: Any, gradients: bool = False) -> dict[str, Any]:
        """The trained weights, or their gradients, as networks of ours."""
        found = {}
        for name, module in self.trained.items():
            own = dict(module.named_parameters())
            values = {key: (p.grad if p.grad is not None else p.detach() * 0) if gradients else p
                      for key, p in own.items()}  # fmt: skip
            network = abstract(type(like[name]), like[name].config)
            if hasattr(network, "text_model"):  # which transformers adds only when it saves
                values = {key if key.startswith("text_") else f"text_model.{key}": v for key, v in values.items()}
            found[name] = fill(network, lazy(values))
        return found


def clean(scheduler: Any, noise: Any, noisy: Any, t: Any) -> Any:
    """The latents that are left of the noisy ones without the noise."""
    share = scheduler.alphas_cumprod[t][:, None, None, None]
    return (noisy - (1 - share) ** 0.5 * noise) / share**0.5


def our_step(task: Task, drawn: list[Draws], gradients: bool = True) -> Callable[..., Any]:
    """(trainable, batch, number of the step) -> ((loss, figures), gradients), with these draws; or just the loss."""

    def draw(objective: Objective, key: Any, shape: Any) -> Draws:
        columns = zip(*map(jax.tree.leaves, drawn), strict=True)
        return jax.tree.unflatten(jax.tree.structure(drawn[0]), [jnp.stack(column)[key] for column in columns])

    compiled = jax.jit(jax.value_and_grad(task.loss, has_aux=True) if gradients else lambda *args: task.loss(*args)[0])

    def run(trainable: Any, batch: Any, number: int = 0) -> Any:
        with mock.patch.object(Objective, "draw", draw):
            return compiled(trainable, task.frozen, task.collate(batch), jnp.array(number))

    return run


def step(task: Task, trainable: Any, data: Mapping[str, Any], draws: Draws) -> tuple[float, Any]:
    """The loss of a batch of the data, and its gradient."""
    (loss, _), gradient = our_step(task, [draws])(trainable, data)
    return float(loss), jax.tree.map(np.asarray, gradient)


def assert_same(ours: Any, theirs: Any, tol: float = 1e-4) -> None:
    """All parameters of networks by component name are the same, see `assert_near`."""
    assert_near(leaves(ours), leaves(theirs), tol)


def assert_near(ours: Mapping[Any, Any], theirs: Mapping[Any, Any], tol: float = 1e-4, floor: float = 1e-3) -> None:
    """Every array differs by at most `tol` of its largest number; arrays whose numbers are below `floor` of the
    largest of all (gradients that are zero but for rounding) by as much of that."""
    ours, theirs = ({name: np.asarray(value) for name, value in each.items()} for each in (ours, theirs))
    assert ours.keys() == theirs.keys()
    most = max(np.abs(a).max() for a in theirs.values())
    assert most > 0
    for name, a in theirs.items():
        worst = np.abs(ours[name] - a).max() / max(np.abs(a).max(), floor * most)
        assert worst <= tol, f"{name} differs by {worst:.2e}"


def leaves(nets: Mapping[str, nnx.Module]) -> dict[tuple[Any, ...], Any]:
    """All parameters by component and path."""
    return {
        (name, *path): leaf[...]
        for name, net in nets.items()
        for path, leaf in nnx.to_flat_state(nnx.state(net, nnx.Param))
    }


def beside(
    task: Task, drawn: list[Draws], data: list[dict[str, Any]], parameters: Iterable[Any], loss: Callable[..., Any]
) -> Iterator[tuple[Any, Any]]:
    """Trains a step for each of `drawn`, beside torch's `parameters`, whose loss is `loss(batch, draws)`: yields our
    weights after each step, and the gradients that led there, while torch's lie in the parameters. The losses are the
    same in every step.

    The optimizer is AdamW, with a larger epsilon than usual: gradients that are zero but for rounding would otherwise
    decide on full steps.
    """
    import torch

    parameters = list(parameters)
    theirs = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, weight_decay=0.01)
    ours = optax.adamw(1e-3, eps=1e-4, weight_decay=0.01)
    run, trained, state = our_step(task, drawn), task.trainable, ours.init(task.trainable)
    update = jax.jit(ours.update)
    for number, (rows, draws) in enumerate(zip(data, drawn, strict=True)):
        theirs.zero_grad()
        wanted = loss(rows, draws)
        wanted.backward()
        theirs.step()
        (value, _), gradients = run(trained, rows, number)
        wanted = float(wanted.detach())
        assert abs(float(value) - wanted) <= 1e-4 * abs(wanted), f"step {number}: {value}, not {wanted}"
        updates, state = update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
        yield trained, gradients


def assert_parity(
    task: Task, reference: Reference, drawn: list[Draws], data: list[dict[str, Any]] | None = None,
    loss: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """The loss is that of the reference in every step, the gradients in the first, and the weights after the last."""
    data = [batch(number) for number in range(len(drawn))] if data is None else data
    parameters = [one for module in reference.trained.values() for one in module.parameters()]
    for number, (trained, gradients) in enumerate(beside(task, drawn, data, parameters, loss or reference.loss), 1):
        if number == 1:
            assert_same(gradients, reference.as_ours(task.trainable, gradients=True))
        if number == len(drawn):
            assert_same(trained, reference.as_ours(task.trainable))
