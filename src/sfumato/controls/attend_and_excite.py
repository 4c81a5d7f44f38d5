"""Attend-and-Excite."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sfumato.controls.base import COND, Control, Env, Latents, Request, State
from sfumato.controls.blur import blurred
from sfumato.controls.check import finite, number, whole
from sfumato.errors import SfumatoError
from sfumato.io.family import Family
from sfumato.models.unet import UNet
from sfumato.text.prompt import lay_out, read
from sfumato.text.words import find_word
from sfumato.types import Step, pytree, static

LEVEL = 2
"""The level of the network whose maps count: that of a quarter of the latents' size, 16 x 16 for 512 pixels."""

SHARPNESS = 100
"""What maps are multiplied by before the softmax over tokens."""

RADIUS, DEVIATION = 1, math.sqrt(0.5)
"""The Gaussian that maps are smoothed by."""


@dc.dataclass(frozen=True)
class AttendAndExcite(Control):
    """Moves the latents until every one of `words` is attended to somewhere (arXiv:2301.13826, algorithm 1).

    In each of the first `steps` rows, before the network is evaluated:

        A = softmax(100 mean attention map), over the text's tokens    A_s = Gaussian(A[:, :, s])
        L = max over s of (1 - max A_s)                                x' = x - alpha grad L

    where s goes over all tokens of the words, each on its own, also where a word has several or occurs more than once
    (as if a user of the reference had given all of their indices). The mean is over all heads of all cross-attention
    layers at a quarter of the latents' size (in a network without any there, at the level nearest to it). alpha is
    `scale` times a factor whose square falls linearly from 1 in the first row of a run to 1/2 in its last.

    `thresholds` are {row: T}: in these rows the move is repeated until L <= 1 - T, at most `max_iterations` times.
    Rows are evaluations of the network that the sampler asks for, counted from where the run begins: one a step, or
    two for samplers such as Heun. After `steps` of them it costs nothing. Before that, each move costs an evaluation
    and its gradient for the prompt's branch, with the ControlNets that run beside it; all branches are moved alike.
    The gradient ends with the last of the layers that are looked at; with `remat` set on the network it takes about
    as much memory as an evaluation, at the cost of computing twice.

    `words` is one list for all pictures, or a list of lists with one for each, empty to leave a picture alone.

    The authors' code, which diffusers' StableDiffusionAttendAndExcitePipeline follows, departs from the paper, and
    this does as they do: a picture that is moved again moves twice more after it has reached the threshold (in the
    paper once), and the Gaussian, called one of deviation 0.5, has that of sqrt(0.5). Otherwise than in diffusers:

    - Models with OpenCLIP's text encoder (SD 2, SDXL) take the softmax over the prompt's own tokens, as the authors do
      for SD 2.1; diffusers always takes all of its chunk but the first and the last, as is done here for SD 1.
    - Pictures need not be square; there, their maps are read with height and width interchanged.
    - Thresholds of rows after `steps` are passed over; there, they still hold.
    - The gradient is right for every sampler; there, only for those that do not scale their latents (DDIM).
    """

    words: Sequence[str] | Sequence[Sequence[str]]
    steps: int = 25
    thresholds: Mapping[int, float] = dc.field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    scale: float = 20.0
    max_iterations: int = 20

    def prepare(self, request: Request) -> Control:
        tokenizer = next(iter(request.model.tokenizers.values()))
        length = jax.eval_shape(lambda: request.encode_text(request.prompts).context).shape[1]
        lists = self._lists(request.batch)
        words, text = np.zeros((2, request.batch, length), bool)
        for picture, prompt in enumerate(request.prompts):
            for word in lists[picture]:
                words[picture, find_word(tokenizer, prompt, word, weights=request.weights)] = True
            places = lay_out(tokenizer, [word for word, _ in read(tokenizer, prompt, weights=request.weights)])
            text[picture, [at for positions in places for at in positions]] = True
        if request.model.family == Family.SD1:
            text[:] = ~np.isin(np.arange(length) % tokenizer.max_length, (0, tokenizer.max_length - 1))
        level, layers = layers_near(request.model.unet, LEVEL)
        rows, thresholds = self._thresholds()
        return Excitement(
            jnp.asarray(words), jnp.asarray(text), jnp.asarray(rows), jnp.asarray(thresholds),
            jnp.asarray(whole("AttendAndExcite's steps", self.steps)), number("AttendAndExcite's scale", self.scale),
            jnp.asarray(whole("AttendAndExcite's max_iterations", self.max_iterations)), layers, level,
        )  # fmt: skip

    def _lists(self, pictures: int) -> list[Sequence[str]]:
        """The words of each picture."""
        given: Any = self.words
        lists = [given] if _are(given, str) else given
        if not _are(lists, (list, tuple)) or not all(_are(each, str) or each in ([], ()) for each in lists):
            raise SfumatoError(
                f"AttendAndExcite takes a list of words, such as ['cat', 'frog'], or such a list for each picture, "
                f"not {given!r}."
            )
        if len(lists) not in (1, pictures):
            raise SfumatoError(
                f"AttendAndExcite has {len(lists)} lists of words for {pictures} pictures; give one, or {pictures}."
            )
        return list(lists) * (pictures // len(lists))

    def _thresholds(self) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """The rows that have one, and what it is."""
        if not isinstance(self.thresholds, Mapping):
            kind = type(self.thresholds).__name__
            raise SfumatoError(f"AttendAndExcite's thresholds are {{row: share}}, such as {{10: 0.5}}, not a {kind}.")
        rows = [whole("A row of AttendAndExcite's thresholds", row) for row in self.thresholds]
        values = [finite(f"AttendAndExcite's threshold of row {row}", T, 0, 1) for row, T in self.thresholds.items()]
        return np.array(rows, np.int32), np.array(values, np.float32)


@pytree
class Excitement(Control):
    """What `AttendAndExcite` is in the loop. Axes: L positions in the text features, K thresholds."""

    words: Bool[Array, "B L"]
    """Where the words are."""
    text: Bool[Array, "B L"]
    """What the softmax is taken over."""
    rows: Int[Array, " K"]
    thresholds: Float[Array, " K"]
    steps: Int[Array, ""]
    scale: Float[Array, ""]
    max_iterations: Int[Array, ""]
    layers: tuple[str, ...] = static()
    """The checkpoint paths of the layers that are looked at."""
    level: int = static()
    """How many times the latents are halved there."""

    per_picture = frozenset({"words", "text"})

    def init(self, x: Latents, memory: State) -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    def steer(
        self, env: Env, xs: dict[str, Latents], step: Step, state: Int[Array, ""]
    ) -> tuple[dict[str, Latents], Int[Array, ""]]:
        """Algorithm 1; `state` counts the rows."""
        x = xs[COND]
        # progress is row / rows, and the factor's square ends in the last row: 1 - row / (rows - 1) / 2.
        share = step.progress * state / (jnp.maximum(state, 1) - step.progress)
        alpha = self.scale * jnp.sqrt(1 - share / 2)
        goal = jnp.min(jnp.where(self.rows == state, 1 - self.thresholds, jnp.inf), initial=jnp.inf)

        def loss(shift: Latents) -> tuple[Float[Array, ""], Float[Array, " B"]]:
            maps = env.evaluate({COND: x + shift}, self.layers)[COND].taps
            each = self.losses(maps, (x.shape[1], x.shape[2]))
            return each.sum(), each

        def move(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            moves, moving, before, shift = carry
            slope, losses = jax.grad(loss, has_aux=True)(shift)
            shift = shift - jnp.where(moving[:, None, None, None], alpha * slope, 0)
            above = losses > goal
            # From the second move on, what counts is the loss one move ago: as in the authors' code.
            again = jnp.where(moves == 0, above, before) & (moves < self.max_iterations)
            return moves + 1, moving & again, above, shift

        everyone = jnp.full(x.shape[0], state < self.steps)
        start = (jnp.zeros((), jnp.int32), everyone, everyone, jnp.zeros_like(x))
        shift = jax.lax.while_loop(lambda carry: carry[1].any(), move, start)[-1]
        return {name: latents + shift for name, latents in xs.items()}, state + 1

    def losses(self, maps: Mapping[str, Float[Array, "B N Q L"]], size: tuple[int, int]) -> Float[Array, " B"]:
        """L of each picture, whose latents have this height and width; 0 for a picture without words."""
        for _ in range(self.level):
            size = -(-size[0] // 2), -(-size[1] // 2)
        mean = jnp.stack([each.mean(1) for each in maps.values()]).mean(0)
        lowest = jnp.finfo(mean.dtype).min
        shares = jax.nn.softmax(jnp.where(self.text[:, None], SHARPNESS * mean, lowest), axis=-1)
        peaks = blurred(shares.reshape(-1, *size, shares.shape[-1]), RADIUS, DEVIATION).max((1, 2))
        return jnp.where(self.words, 1 - peaks, 0).max(1)


def layers_near(unet: UNet, level: int) -> tuple[int, tuple[str, ...]]:
    """The level nearest to `level` that has cross-attention, and its layers, down, middle and up.

    Raises SfumatoError if there is none at all.
    """
    found = {}
    for path in unet.attention_paths():
        if path.endswith(".attn2"):
            found.setdefault(unet.level(path), []).append(path)
    if not found:
        raise SfumatoError("AttendAndExcite looks at the attention to the text, and this network has none.")
    nearest = min(found, key=lambda own: abs(own - level))
    return nearest, tuple(found[nearest])


def _are(value: Any, kind: Any) -> bool:
    """Whether it is a list of at least one, all of this kind."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, kind) for each in value)
