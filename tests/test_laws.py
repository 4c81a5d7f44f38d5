"""What every control keeps to: a table of controls, and the laws. A new control is a new row."""

from __future__ import annotations

import dataclasses as dc
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, ControlNet, Inpaint, Window, generate, noise, run
from sfumato.controls import Control, Request
from sfumato.plan import make_plan
from sfumato.sample import sample, sample_rows
from sfumato.samplers import DDIM, Euler

from oracle import assert_close
from pictures import drawing
from pipelines import small, small_net

ALL = range(8)
"""The pictures of every run here, so that all laws share their compiled programs."""
ROWS = 4
PROMPTS = [f"a {colour} fox" for colour in ("red", "blue", "green", "white", "black", "pink", "grey", "brown")]
CLOSED, OPEN = Window(1.0, 1.0), Window(0.0, 1.0)
Controls = tuple[Control, ...]


@dc.dataclass(frozen=True)
class Row:
    """A control, and what the laws need to know of it."""

    name: str
    kinds: tuple[str, ...]
    """The kinds of tiny model that it runs on (tests/pipelines.py)."""
    make: Callable[..., Controls]
    """(kind, variant, pictures, **changes) -> controls. Variants 0 and 1 differ in all that is data, and in nothing
    else; `pictures` are the numbers of those to be made."""
    beside: Callable[..., Controls]
    """As `make`: the controls that it runs beside, and that are left when it is taken away."""
    neutral: Mapping[str, Any] | None = None
    """Changes that make it do nothing; None if there are none."""
    windowed: bool = False
    """Whether it takes the change `window`."""

    def both(self, kind: str, variant: int = 0, pictures: Sequence[int] = ALL, **changes: Any) -> Controls:
        return (*self.beside(kind, variant, pictures), *self.make(kind, variant, pictures, **changes))


def nothing(kind, variant, pictures) -> Controls:
    return ()


def cfg(kind, variant=0, pictures=ALL, scale=None, rescale=None) -> Controls:
    return (CFG((5.0, 3.0)[variant] if scale is None else scale, (0.0, 0.2)[variant] if rescale is None else rescale),)


def rescaled(kind, variant=0, pictures=ALL, scale=None, rescale=None) -> Controls:
    return cfg(kind, variant, pictures, scale, (0.7, 0.5)[variant] if rescale is None else rescale)


def drawings(first: int, pictures: Sequence[int]) -> list[Any]:
    """A picture of its own for each that is made."""
    return [drawing(40 + first + 2 * number, 32) for number in pictures]


def controlnet(kind, variant=0, pictures=ALL, scale=None, window=None, guess=False, seed=0) -> Controls:
    scale = (0.8, 0.5)[variant] if scale is None else scale
    window = (OPEN, Window(0.2, 0.9))[variant] if window is None else window
    return (ControlNet(small_net(kind, seed + 2 * variant), drawings(seed + variant, pictures), scale, window, guess),)


def two_controlnets(kind, variant=0, pictures=ALL, **changes) -> Controls:
    return controlnet(kind, variant, pictures, **changes) + controlnet(kind, variant, pictures, seed=1, **changes)


def inpaint(kind, variant=0, pictures=ALL, white=False) -> Controls:
    mask = np.zeros((32, 40), np.uint8)
    mask[:, 20 - 6 * variant :] = 255
    images = [drawing(40, 32).rotate(10 * number + variant) for number in pictures]
    return (Inpaint(images, np.full_like(mask, 255) if white else mask),)


TABLE = [
    Row("CFG", ("sd1", "sdxl"), cfg, nothing, neutral={"scale": 1.0}),
    Row("CFG, rescaled", ("sd1",), rescaled, nothing, neutral={"scale": 1.0, "rescale": 0.0}),
    Row("ControlNet", ("sd1", "sdxl"), controlnet, cfg, neutral={"scale": 0.0}, windowed=True),
    Row("ControlNet, guess", ("sd1",), functools.partial(controlnet, guess=True), cfg, {"scale": 0.0}, True),
    Row("two ControlNets", ("sd1",), two_controlnets, cfg, neutral={"scale": 0.0}, windowed=True),
    Row("Inpaint", ("sd1",), inpaint, cfg, neutral={"white": True}),
    Row("Inpaint, 9 channels", ("sd1-inpaint",), inpaint, cfg),
]


def over_table(wanted: Callable[[Row], Any] = lambda row: True) -> Any:
    """A law of all rows of the table that are `wanted`, on each of their kinds."""
    return pytest.mark.parametrize(("row", "kind"), [
        pytest.param(row, kind, id=f"{row.name}-{kind}")
        for row in TABLE if wanted(row) for kind in row.kinds
    ])  # fmt: skip


def pictures(model, controls: Controls, chosen: Sequence[int] = ALL, **changes: Any) -> np.ndarray:
    """Latents (or pixels, for output="images") of the chosen pictures; each has its own prompt and seed."""
    settings = {
        "prompt": [PROMPTS[number] for number in chosen], "negative": "blurry", "seed": [7 + n for n in chosen],
        "steps": ROWS, "size": (16, 16), "sampler": DDIM(), "output": "latents",
    } | changes  # fmt: skip
    made = generate(model, controls=controls, **settings)
    return np.asarray(made) if settings["output"] == "latents" else np.stack([picture.array for picture in made])


@pytest.fixture(scope="module")
def models(loaded):
    """models(kind): a model that compiles quickly."""
    return functools.cache(lambda kind: small(kind, loaded(kind)))


# ---- A control that does nothing


@over_table(lambda row: row.neutral is not None)
def test_neutral_is_absent(row, kind, models):
    model = models(kind)
    without = pictures(model, row.beside(kind, 0, ALL))
    got = pictures(model, row.both(kind, **row.neutral))
    # Without its rows of the network's batch, sums may be taken in another order.
    assert_close(got, without, 1e-6 if row.beside is nothing else 0)
    assert np.abs(pictures(model, row.both(kind)) - without).max() > 1e-3, "the control does nothing at all"


@over_table(lambda row: row.windowed)
def test_outside_of_its_window_is_absent(row, kind, models):
    model = models(kind)
    without = pictures(model, row.beside(kind, 0, ALL))
    np.testing.assert_array_equal(pictures(model, row.both(kind, window=CLOSED)), without)


@over_table(lambda row: row.windowed)
def test_outside_of_its_window_it_costs_nothing(row, kind, models):
    """Every execution of a network is counted: the UNet's, and those of the control's own."""
    model = dc.replace(models(kind), unet=counted(models(kind).unet))

    def executions(controls: Controls) -> int:
        EXECUTIONS[0] = 0
        pictures(model, changed_nets(counted, controls))
        jax.effects_barrier()
        return EXECUTIONS[0]

    without = executions(row.beside(kind, 0, ALL))
    always = executions(row.both(kind, window=OPEN))
    assert without == ROWS
    assert always > without
    assert executions(row.both(kind, window=CLOSED)) == without
    assert executions(row.both(kind, window=Window(0.25, 0.5))) == without + (always - without) / ROWS


def changed_nets(change: Callable[[Any], Any], controls: Controls) -> Controls:
    """The controls, those that have a network of their own with a changed one."""
    return tuple(dc.replace(each, net=change(each.net)) if hasattr(each, "net") else each for each in controls)


EXECUTIONS = [0]


@functools.cache
def counted(network: Any) -> Any:
    """The network, which adds one to `EXECUTIONS` whenever it runs."""

    def count() -> None:
        EXECUTIONS[0] += 1

    def call(self, *args, **kwargs):
        jax.debug.callback(count)
        return type(network).__call__(self, *args, **kwargs)

    copy = jax.tree.map(lambda a: a, network)
    object.__setattr__(copy, "__class__", type("Counted", (type(network),), {"__call__": call}))
    return copy


# ---- Order, drivers, precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint", "sdxl"])
def test_the_order_of_controls_does_not_matter(kind, models):
    """All of the table at once, and backwards, so that every two of them change places."""
    rows = [row for row in TABLE if kind in row.kinds]
    controls = {repr(row.make): row.make(kind, 0, ALL) for row in rows if row.beside is nothing}
    controls |= {row.name: row.make(kind, 0, ALL) for row in rows if row.beside is not nothing}
    controls = [each for group in controls.values() for each in group] + list(cfg(kind, 1))
    forth, back = (in_float64(models(kind), tuple(order)) for order in (controls, controls[::-1]))
    assert forth.dtype == np.float64
    assert_close(forth, back, 1e-11)


def in_float64(model, controls: Controls) -> np.ndarray:
    """The loop in double precision; four networks are more than it takes."""
    arguments = prepared(model, controls)
    with jax.enable_x64(True):
        wide = [jax.tree.map(widened, argument) for argument in arguments]
        return np.asarray(sample(*wide[:1], DDIM(), *wide[1:], model.schedule.prediction_type))


def widened(a: Any) -> Any:
    return jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def prepared(model, controls: Controls) -> list[Any]:
    """What the loop is called with: network, rows, controls, latents, conditioning."""
    plan = make_plan(model, PROMPTS, "blurry", 1, 7, (16, 16))
    start = noise.starting(plan.seeds, plan.latent_shape)
    read = run.reader(model, plan, [text for each in controls for text in each.texts()], weights=True, clip_skip=0)
    request = Request(
        model, plan.prompts, ["blurry"] * 8, plan.size, start, True, read,
        lambda pixels: run.encode_image(model.vae, pixels, False),
    )  # fmt: skip
    steps = run.on_device(DDIM().table(model.schedule, ROWS), noise.per_step(plan.seeds, ROWS, plan.latent_shape))
    base = run.conditionings(plan, read)
    return [model.unet, steps, tuple(control.prepare(request) for control in controls), start, base]


@over_table()
def test_row_by_row_is_the_same(row, kind, models):
    seen = []

    def progress(done, total, preview):
        seen.append((done, total, np.asarray(preview)))

    at_once = pictures(models(kind), row.both(kind))
    step_by_step = pictures(models(kind), row.both(kind), progress=progress)
    assert_close(step_by_step, at_once, 1e-6)
    assert [each[:2] for each in seen] == [(done + 1, ROWS) for done in range(ROWS)]
    np.testing.assert_array_equal(seen[-1][2], step_by_step)


def test_progress_cancels(models):
    seen = []
    with pytest.raises(sfumato.Cancelled, match=r"Cancelled after row 2 of 4\."):
        pictures(models("sd1"), cfg("sd1"), progress=lambda done, *_: seen.append(done) or done < 2)
    assert seen == [1, 2]


@over_table()
def test_bfloat16_is_finite(row, kind, models):
    def half(network: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), network)

    model = dc.replace(models(kind), unet=half(models(kind).unet))
    got = pictures(model, changed_nets(half, row.both(kind)))
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert_close(got, pictures(models(kind), row.both(kind)), 0.2)


def test_rows_that_are_not_active_change_nothing(models):
    """Not even if they hold what is no number."""
    model = models("sd1")
    unet, steps, controls, x, base = prepared(model, TABLE[2].both("sd1"))

    def padded(column):
        empty = jnp.full((1, *column.shape[1:]), jnp.nan).astype(column.dtype)
        return jnp.concatenate([empty, column[:2], empty, column[2:], empty])

    more = jax.tree.map(padded, steps)
    more = dc.replace(more, active=jnp.array([False, True, True, False, True, True, False]))

    def run(drive: Any, steps: Any) -> Any:
        return drive(unet, DDIM(), steps, controls, jnp.array(x), base, model.schedule.prediction_type)

    want = np.asarray(run(sample, steps))
    np.testing.assert_array_equal(np.asarray(run(sample, more)), want)
    by_row = [np.asarray(each) for each in run(sample_rows, more)]
    assert len(by_row) == ROWS
    assert_close(by_row[-1], want, 1e-6)


# ---- Compiling


@pytest.fixture
def compiled():
    """The names of the programs that were compiled meanwhile."""
    names: list[str] = []

    def listen(event: str, duration: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@over_table()
def test_nothing_is_compiled_when_data_changes(row, kind, models, compiled):
    model, other = models(kind), dc.replace(models(kind), unet=jax.tree.map(lambda a: a * 0.9, models(kind).unet))
    changed = row.both(kind, 1)
    first = pictures(model, row.both(kind), output="images")
    compiled.clear()
    again = pictures(model, row.both(kind), output="images")
    np.testing.assert_array_equal(again, first)
    assert np.any(pictures(model, changed, output="images") != first)
    assert np.any(pictures(other, row.both(kind), output="images") != first)
    changes = {
        "prompt": [prompt + " in the snow" for prompt in PROMPTS], "negative": "dark", "seed": 2**40,
        "sampler": DDIM(eta=0.7),
    }  # fmt: skip
    for name, value in changes.items():
        assert np.any(pictures(model, row.both(kind), output="images", **{name: value}) != first), name
    assert compiled == []


def test_nothing_is_compiled_when_image_to_image_changes(models, compiled):
    model, controls = models("sd1"), cfg("sd1")
    first = pictures(model, controls, image=drawing(), strength=0.5)
    compiled.clear()
    assert np.any(pictures(model, controls, image=drawing().rotate(90), strength=0.5) != first)
    assert np.any(pictures(model, controls, image=drawing(), strength=0.8) != first)
    assert compiled == []


def test_nothing_is_compiled_when_data_changes_row_by_row(models, compiled):
    model, row = models("sd1"), TABLE[2]
    for variant in (0, 1):
        compiled.clear()
        pictures(model, row.both("sd1", variant), progress=lambda *_: True, seed=variant)
    assert compiled == []


def test_another_set_of_controls_compiles_the_loop_alone(models, compiled):
    model = models("sd1")
    settings = {"sampler": Euler(), "output": "images"}  # which no other law runs
    for controls in (cfg("sd1"), (*cfg("sd1"), *cfg("sd1", 1))):
        compiled.clear()
        pictures(model, controls, **settings)
        pictures(model, controls, **settings)
    assert compiled == ["jit(sample)"]


# ---- Pictures do not know of each other


@over_table()
def test_a_picture_is_the_same_alone_and_in_any_order(row, kind, models):
    model = models(kind)
    together = pictures(model, row.both(kind))
    alone = [pictures(model, row.both(kind, pictures=[number]), [number]) for number in (0, 5)]
    assert_close(np.concatenate(alone), together[[0, 5]], 1e-5)
    order = [3, 7, 1, 0, 2, 6, 5, 4]
    assert_close(pictures(model, row.both(kind, pictures=order), order), together[order], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_picture_is_the_same_in_rounds(batch, models):
    """Also those that start from a picture each."""
    row, chosen = TABLE[5], [4, 1, 2, 0]
    settings = {"image": drawings(0, chosen), "strength": 0.8, "sampler": DDIM(eta=0.5)}
    want = pictures(models("sd1"), row.both("sd1", pictures=chosen), chosen, **settings)
    assert_close(pictures(models("sd1"), row.both("sd1", pictures=chosen), chosen, batch=batch, **settings), want, 1e-5)


@pytest.mark.slow
def test_devices(saved):
    """tests/devices.py, where the machine seems to have eight devices."""
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "src")]),
    }  # fmt: skip
    command = [sys.executable, str(here / "devices.py"), str(saved("sd1")[0])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 8
    assert facts["collectives"] == []
    assert facts["loop"], "no loop was found in the program, so that the search proves nothing"
    assert facts["lies_on"] == [3]
    for batch, difference in facts["differences"].items():
        assert difference <= 1e-5, f"{batch} differ by {difference:.1e} of the range"
