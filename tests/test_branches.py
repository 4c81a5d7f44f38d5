"""Which controls may run together, and which rows the network gets."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import run
from sfumato.branches import all_branches, asleep_rows, check_together, stretches
from sfumato.controls import CFG, PAG, Control
from sfumato.errors import SfumatoError
from sfumato.samplers import DDIM
from sfumato.schedule import Schedule
from sfumato.types import Conditioning, Step, Window, pytree

BASE = {name: Conditioning(jnp.full((1, 2, 3), value)) for name, value in (("cond", 1.0), ("uncond", 0.0))}


@pytree
class Edit(Control):
    """A branch of its own."""

    text: float = 2.0

    def branches(self, base):
        return {"edit": Conditioning(jnp.full((1, 2, 3), self.text))}


@pytree
class Taker(Control):
    """Another prompt."""

    text: float = 2.0

    def branches(self, base):
        return {"cond": Conditioning(jnp.full((1, 2, 3), self.text))}


@pytree
class Depth(Control):
    sets_channels = True


@pytree
class Masked(Control):
    sets_channels = True


def test_the_prompt_is_always_the_first_branch():
    assert all_branches((), BASE) == {"cond": BASE["cond"]}
    assert list(all_branches((Edit(), CFG()), BASE)) == ["cond", "edit", "uncond"]


def test_a_branch_of_the_run_may_be_shared():
    assert list(all_branches((CFG(2.0), CFG(3.0)), BASE)) == ["cond", "uncond"]


def test_one_control_may_take_the_place_of_the_prompt():
    branches = all_branches((CFG(), Taker()), BASE)
    assert list(branches) == ["cond", "uncond"]
    assert branches["cond"].context[0, 0, 0] == 2.0


@pytest.mark.parametrize(
    ("controls", "sentence"),
    [
        ((Edit(), Edit(3.0)), r"Edit and Edit both have a branch 'edit'\."),
        ((type("Other", (Edit,), {})(), CFG(), Edit()), r"Edit and Other both have a branch 'edit'\."),
        ((Taker(), Taker(3.0)),
         r"Taker and Taker both have a branch 'cond'\."),
    ],
)  # fmt: skip
def test_two_branches_of_one_name(controls, sentence):
    with pytest.raises(SfumatoError, match=sentence):
        all_branches(controls, BASE)


@pytree
class Looker(Control):
    """Looks at predictions."""

    def guide(self, env, preds, xs, step, state):
        return 0.0, state


def columns(first: int = 0) -> Step:
    return run.columns(DDIM().table(Schedule(), 8, first), None)


def rows(controls, first: int = 0) -> list[tuple[set[str], list[int]]]:
    """What is asleep, and in which rows, for each stretch."""
    found = stretches(controls, BASE, columns(first))
    return [({*asleep}, np.flatnonzero(active).tolist()) for asleep, active in found]


def test_the_unconditional_branch_sleeps_where_there_is_no_guidance():
    every = [*range(8)]
    assert rows(()) == [(set(), every)]
    assert rows((CFG(),)) == [(set(), every)]
    assert rows((CFG(1.0),)) == [({"uncond"}, every)]
    assert rows((CFG(5.0, window=Window(0.25, 0.5)),)) == [({"uncond"}, [0, 1]), (set(), [2, 3]),
                                                           ({"uncond"}, [4, 5, 6, 7])]  # fmt: skip
    assert rows((CFG(5.0, window=Window(0.0, 0.5)),), first=5) == [(set(), [5, 6]), ({"uncond"}, [7])]


def test_or_it_sleeps_through_all_rows_or_none():
    def once(*controls, first=0):
        return [(index, {*asleep}) for index, asleep in asleep_rows(controls, BASE, columns(first), once=True)]

    assert once(CFG(5.0, window=Window(0.25, 0.5))) == [(index, set()) for index in range(8)]
    assert once(CFG(5.0, window=Window(0.0, 0.5)), first=5) == [(index, set()) for index in (5, 6, 7)]
    assert once(CFG(1.0)) == [(index, {"uncond"}) for index in range(8)]


def test_a_branch_is_awake_as_long_as_one_control_wants_it():
    early, late = (CFG(5.0, window=Window(*ends)) for ends in ((0.0, 0.5), (0.25, 0.75)))
    assert rows((early, late)) == [(set(), [*range(6)]), ({"uncond"}, [6, 7])]
    assert rows((CFG(1.0), Looker())) == [(set(), [*range(8)])]
    assert rows((CFG(1.0), Edit(), Depth())) == [({"uncond", "edit"}, [*range(8)])]
    assert rows((CFG(1.0), PAG())) == [({"uncond"}, [*range(8)])]


def test_two_setters_of_the_input_channels():
    check_together(*[(CFG(), Depth(), Edit())] * 2)
    with pytest.raises(SfumatoError, match=r"Depth and Masked both set the extra input channels of the network\."):
        check_together(*[(Depth(), CFG(), Masked())] * 2)
