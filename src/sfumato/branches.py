"""Which controls may run together, and which rows of the network's batch are evaluated in which part of a run."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Bool

from sfumato.controls.base import COND, Control
from sfumato.errors import SfumatoError
from sfumato.models.unet import UNet
from sfumato.types import Conditioning, Step

Asleep = frozenset[str]
"""The branches that no control wants."""
AWAKE: Asleep = frozenset()
SMALL = 100_000_000
"""Parameters of a network up to which a second program takes longer to be made ready than it saves one picture: where a
run is watched, as by the command line, which draws once, a branch sleeps through all rows there or through none."""


def all_branches(controls: Sequence[Control], base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
    """Every row of the network's batch, by name: "cond", and what the controls ask for.

    Two controls may share a branch of `base`. Raises SfumatoError for two different branches of one name.
    """
    branches, owners = {COND: base[COND]}, {}
    for control in controls:
        for name, cond in control.branches(base).items():
            if name in owners and branches[name] is not cond:
                raise SfumatoError(f"{type(control).__name__} and {owners[name]} both have a branch {name!r}.")
            branches[name] = cond
            owners.setdefault(name, type(control).__name__)
    return branches


def check_together(controls: Sequence[Control], prepared: Sequence[Control]) -> None:
    """Raises SfumatoError, with both names, for two controls that make no sense beside each other.

    `controls` are those that the user gave, and `prepared` what became of each.
    """
    names = [type(control).__name__ for control in controls]
    for i, (control, name) in enumerate(zip(controls, names, strict=True)):
        for other in control.excludes.keys() & {*names[:i], *names[i + 1 :]}:
            raise SfumatoError(f"{name} and {other} cannot run together: {control.excludes[other]}.")
    setters = [name for control, name in zip(prepared, names, strict=True) if control.sets_channels]
    if len(setters) > 1:
        raise SfumatoError(f"{setters[0]} and {setters[1]} both set the extra input channels of the network.")


def is_small(unet: UNet) -> bool:
    """Whether a network is one of those of `SMALL`."""
    return sum(leaf.size for leaf in jax.tree.leaves(unet)) < SMALL


def stretches(
    controls: Sequence[Control], base: Mapping[str, Conditioning], steps: Step
) -> list[tuple[Asleep, Bool[np.ndarray, " R"]]]:
    """The branches that are asleep and the rows that are active, for each stretch of rows that want the same ones."""
    columns = _on_host(steps)
    found: list[tuple[Asleep, Bool[np.ndarray, " R"]]] = []
    for index, asleep in asleep_rows(controls, base, columns):
        if not found or found[-1][0] != asleep:
            found.append((asleep, np.zeros_like(columns.active)))
        found[-1][1][index] = True
    return found or [(AWAKE, columns.active)]


def asleep_rows(
    controls: Sequence[Control], base: Mapping[str, Conditioning], columns: Step, once: bool = False
) -> Iterator[tuple[int, Asleep]]:  # fmt: skip
    """The numbers of the active rows, and the branches that no control wants in each, or `once` in all of them."""
    names = [name for name in all_branches(controls, base) if name != COND]
    wanted = {name: [np.asarray(control.wants(name, columns)) for control in controls] for name in names}
    for index in np.flatnonzero(columns.active):
        looked = columns.active if once else [index]
        yield int(index), frozenset(name for name in names if not any(rows[looked].any() for rows in wanted[name]))


def _on_host(steps: Step) -> Step:
    """The columns of a table, all but the noise, as numpy arrays."""
    return jax.tree.map(np.asarray, dc.replace(steps, noise=None))
