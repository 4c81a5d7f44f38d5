"""Run by test_laws.py with eight virtual devices: the same pictures as on one, and nobody waits for anybody.

    python tests/devices.py SD1_FOLDER SDXL_FOLDER REFINER_FOLDER

prints what was found, as JSON.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sfumato
from sfumato import run
from sfumato import sample as loop
from sfumato.samplers import DDIM

from drive import pictures, prepared
from pipelines import small
from table import PROMPTS, cfg, controlnet, deepcache, inpaint, token_merging

COLLECTIVES = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"


def controls(chosen: Any) -> Any:
    per_picture = (*controlnet("sd1", pictures=chosen), *inpaint("sd1", pictures=chosen))
    return (*cfg("sd1"), *per_picture, *deepcache("sd1"), *token_merging("sd1"))


def differences(model: sfumato.Model) -> dict[str, float]:
    """The largest of each run on all devices from the same pictures on one, as share of the range."""
    eight = range(8)
    want = pictures(model, controls(eight), devices=jax.devices()[:1])
    extent = want.max() - want.min()

    def apart(got: np.ndarray, want: np.ndarray) -> float:
        return float(np.abs(got - want).max() / extent)

    def everywhere(chosen: Any, **changes: Any) -> np.ndarray:
        return pictures(model, controls(chosen), chosen, devices=None, **changes)

    more = [0, 1, 2, 3, 4, 5, 6, 7, 2, 0, 5]
    return {
        "8": apart(everywhere(eight), want),
        "3": apart(everywhere([1, 4, 6]), want[[1, 4, 6]]),
        "11 in rounds of 8": apart(everywhere(more, batch=8), want[more]),
        "8 row by row": apart(everywhere(eight, progress=lambda *_: True), want),
    }


def handed_over(base: sfumato.Model, refiner: sfumato.Model) -> dict[str, float]:
    """As `differences`, of runs that a base model begins on all devices and that its refiner ends on fewer."""

    def run(model: sfumato.Model, chosen: Any, devices: Any, **part: Any) -> Any:
        return sfumato.generate(
            model, [PROMPTS[number] for number in chosen], seed=[7 + number for number in chosen], steps=4,
            size=(16, 16), sampler=DDIM(), controls=cfg("sdxl"), output="latents", devices=devices, **part,
        )  # fmt: skip

    def refined(chosen: Any, devices: Any, middle: Any) -> np.ndarray:
        return np.asarray(run(refiner, chosen, devices, start=0.5, latents=middle))

    eight, one = range(8), jax.devices()[:1]
    want = refined(eight, one, run(base, eight, one, stop=0.5))
    middle = run(base, eight, None, stop=0.5)
    assert len(middle.devices()) == 8
    some = np.array([1, 4, 6])
    found = {
        "8, then 2": (refined(eight, jax.devices()[:2], middle), want),
        "8, then 3 of them": (refined(some, None, middle[some]), want[some]),
    }
    return {what: float(np.abs(got - want).max() / np.ptp(want)) for what, (got, want) in found.items()}


def program(model: sfumato.Model) -> str:
    """The compiled loop for eight devices."""
    unet, steps, ready, x, base = prepared(model, controls(range(8)))
    mesh = run.mesh_of(None, 8)
    arguments = (
        run.spread(mesh, unet, None), DDIM(), steps, ready,
        run.spread(mesh, x), run.spread(mesh, base), model.schedule.prediction_type, mesh,
    )  # fmt: skip
    return loop._whole.lower(*arguments, loop.AWAKE).compile().as_text()


def main(*folders: str) -> None:
    model, base, refiner = (
        small(kind, sfumato.load(folder)) for kind, folder in zip(("sd1", "sdxl", "sdxl-refiner"), folders, strict=True)
    )
    text = program(model)
    third = sfumato.generate(
        model, PROMPTS[0], steps=2, size=(16, 16), output="latents", devices=jax.devices()[3:4], controls=()
    )
    print(json.dumps({
        "devices": len(jax.devices()),
        "collectives": sorted(set(re.findall(COLLECTIVES, text))),
        "loop": bool(re.search(r"\bwhile\b", text)),
        "lies_on": [device.id for device in jnp.asarray(third).devices()],
        "differences": differences(model) | handed_over(base, refiner),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
