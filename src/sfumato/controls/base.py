"""What a control is: ten hooks of the loop, each pure and the identity unless a technique says otherwise."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from sfumato.gate import gate as gate  # for controls, beside what else they are made of
from sfumato.types import Conditioning, Prediction, Step

if TYPE_CHECKING:
    from sfumato.model import Model

Latents = Float[Array, "B H W C"]
State = Any
"""What a control carries from row to row: a pytree."""

COND, UNCOND = "cond", "uncond"
"""The branches that every run has at hand: the prompt, and the negative prompt."""


@dc.dataclass(frozen=True)
class Request:
    """What a control may know of a run when it is prepared, on the host."""

    model: Model
    prompts: Sequence[str]
    """One for each picture."""
    negatives: Sequence[str]
    size: tuple[int, int]
    """Width and height in pixels."""
    noise: Float[Array, "B h w C"]
    """The standard normal noise that each picture starts from."""
    weights: bool
    """Whether brackets in prompts weigh words."""
    encode_text: Callable[[Sequence[str]], Conditioning]
    """Texts to what the network sees of them, a row a text, as long as that of the prompts: see `Control.texts`."""
    encode_image: Callable[[Float[np.ndarray, "B H W 3"]], Float[Array, "B h w C"]]
    """Pixels in [-1, 1] to latents."""

    @property
    def batch(self) -> int:
        """How many pictures there are."""
        return len(self.prompts)


@dc.dataclass(frozen=True)
class Env:
    """What a hook may call. It lives only while the loop is traced."""

    evaluate: Callable[..., dict[str, Prediction]]
    """({branch: latents}, taps) -> {branch: prediction}: one call of the network over the rows of these branches.

    `taps` are paths of attention layers whose maps are wanted, or {path: function that changes the map}."""
    guided: Callable[[Mapping[str, Prediction], Mapping[str, Latents]], Latents]
    """(predictions, latents) -> the output with the guidance of `plain` controls, as a run without this one has it."""
    x0: Callable[[Latents, Latents], Latents]
    """(output, latents) -> the clean latents that the network's output stands for."""
    eps: Callable[[Latents, Latents], Latents]
    """(output, latents) -> the noise that it stands for."""
    output: Callable[[Latents, Latents], Latents]
    """(clean latents, noise) -> the output that stands for them.

    Outputs for the same latents may be subtracted as they are; those for different latents mean differences of noise
    only where the network predicts noise."""
    advance: Callable[[Latents, Latents, State], tuple[Latents, State]]
    """(latents, output, sampler state) -> the sampler's own step."""


class Control:
    """A technique inside the loop. Subclasses are frozen dataclasses and pytrees (`sfumato.types.pytree`).

    What differs between runs (numbers, arrays, windows, networks) is a leaf: changing it compiles nothing anew.
    """

    taps: frozenset[str] = frozenset()
    """Attention layers whose maps the hooks want, by checkpoint path."""
    per_picture: ClassVar[frozenset[str]] = frozenset()
    """Fields whose arrays have the pictures as first axis: these are divided among devices, all others copied."""
    sets_channels: ClassVar[bool] = False
    """Whether `condition` sets the network's extra input channels; only one control of a run can."""
    plain: ClassVar[bool] = False
    """Whether `guide` needs no more than the branches "cond" and "uncond" and carries nothing: `Env.guided` has it."""
    excludes: ClassVar[Mapping[str, str]] = {}
    """Controls that it cannot run beside, by class name, with the reason: the end of a sentence."""

    def texts(self) -> Sequence[str]:
        """All that it will ask `Request.encode_text` for, so that every text of a run gets the same length."""
        return ()

    def prepare(self, request: Request) -> Control:
        """On the host, before anything is compiled: checks, and makes arrays of strings and pictures. What comes out
        goes into the loop. Raises SfumatoError for what does not fit the model or the run.

        It is called once on shapes alone, where everything that can be refused is refused, and once for real: it
        must not look at the numbers of `request.noise` and of encoded pictures, only compute with them.
        """
        return self

    def part(self, picked: Sequence[int]) -> Control:
        """A prepared control for some of the pictures."""
        if not self.per_picture:
            return self
        chosen = np.array(picked)
        fields = {name: jax.tree.map(lambda a: a[chosen], getattr(self, name)) for name in self.per_picture}
        return dc.replace(cast(Any, self), **fields)

    def finish(self, pictures: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        """On the host, after decoding. Called on the control that the user gave, not on the prepared one."""
        return pictures

    def init(self, x: Latents, memory: State) -> State:
        """Its slot in what the loop carries; `memory` is what the sampler begins with.

        None if its form is known only after a row: it begins with zeros of what `guide` makes of None.
        """
        return ()

    def ready(self, conds: Mapping[str, Conditioning]) -> dict[str, Any]:
        """In a compiled program, once before all rows: what no row changes, such as what a network makes of a control
        picture or of the texts of all branches, as the values that fields have from then on. All hooks after it are
        called with them, `branches` without; those of `per_picture` have the pictures as first axis still."""
        return {}

    def branches(self, base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        """Further rows of the network's batch that it needs, by name; `base` has "cond" and "uncond".

        One control of a run may put another "cond" in the place of the prompt's.
        """
        return {}

    def wants(self, name: str, steps: Step) -> Bool[np.ndarray, " R"]:
        """In which rows of the table `steps`, on the host, it makes a difference to this control whether the branch
        `name` is evaluated. A branch that no control wants is left out of a row.

        Usually in all, for those that look at latents or predictions, and in none for all others.
        """
        looks = type(self).steer is not Control.steer or type(self).guide is not Control.guide
        return np.full(np.shape(steps.t), looks)

    def recall(self, conds: dict[str, Conditioning], step: Step, state: State) -> dict[str, Conditioning]:
        """Adds to what the network sees in the evaluation of the row itself, not in those of `Env`, what the control
        has kept of earlier rows. Comes before `condition`."""
        return conds

    def condition(
        self, conds: dict[str, Conditioning], xs: Mapping[str, Latents], step: Step
    ) -> dict[str, Conditioning]:  # fmt: skip
        """Adds to what the network sees, all branches at once: residuals are summed, channels set once."""
        return conds

    def steer(
        self, env: Env, xs: dict[str, Latents], step: Step, state: State
    ) -> tuple[dict[str, Latents], State]:  # fmt: skip
        """Moves the latents of the branches before the network is evaluated; gradients live here.

        A branch that it leaves out is not evaluated in this row. The sampler goes on from those of "uncond" if there
        are some, otherwise from those of "cond".
        """
        return xs, state

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step, state: State
    ) -> tuple[Latents | float, State]:
        """A difference that is added to the output of branch "cond", in the network's own terms."""
        return 0.0, state

    def project(self, x: Latents, step: Step, state: State) -> tuple[Latents, State]:
        """Changes the latents after the sampler's step."""
        return x, state


def batched(call: Callable[..., Any], *branches: Mapping[str, Any]) -> dict[str, Any]:
    """One call over the rows of every branch: {name: rows} -> {name: results}.

    The rows of a picture lie next to each other, so that a batch divided among devices stays where it is. A scalar is
    one for all branches.
    """
    names = list(branches[0])

    def join(*rows: Array) -> Array:
        if not rows[0].ndim:
            return rows[0]
        return jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])

    def part(index: int) -> Callable[[Array], Array]:
        return lambda rows: rows.reshape(-1, len(names), *rows.shape[1:])[:, index]

    out = call(*(jax.tree.map(join, *(branch[name] for name in names)) for branch in branches))
    return {name: jax.tree.map(part(i), out) for i, name in enumerate(names)}
