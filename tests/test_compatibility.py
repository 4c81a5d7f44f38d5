"""Every cell of docs/compatibility.md is run.

One program for each kind of model has all of its techniques in it. What is not looked at is neutral, which is data; so
a cell costs a run and no compilation, and shows that either technique still does its work beside the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sfumato
from sfumato import Embedding, Lora, Model, generate
from sfumato.adapters.delta import LowRank
from sfumato.image import read, resize
from sfumato.samplers import DDIM

from compatibility import FAMILIES, INSTRUCT, KINDS, NINE, PAGE, PAIRS, PLAIN, REFUSED, TECHNIQUES, kinds_of, page
from loras import draw
from pictures import drawing
from table import PROMPTS, TABLE, Controls

pytestmark = pytest.mark.slow
ROWS = {row.name: row for row in TABLE}
EVERYTHING = frozenset(technique.name for technique in TECHNIQUES)
NOTHING: frozenset[str] = frozenset()
SIZE = (16, 16)
WORD = "<stripes>"
Run = Callable[..., Any]


def controls(kind: str, on: frozenset[str], picked: frozenset[str] = EVERYTHING) -> Controls:
    """The controls of all `picked` techniques; those that are not `on` are neutral."""
    found: list[Any] = []
    for technique in TECHNIQUES:
        if technique.row is None or technique.name not in picked or kind not in technique.kinds:
            continue
        # One ControlNet takes half as long to compile as two, which the plain kinds have.
        row = ROWS[technique.row if kind in PLAIN or technique.row != "two ControlNets" else "ControlNet"]
        family = next(kinds[0] for kinds in FAMILIES.values() if kind in kinds)
        neutral = {} if technique.needed or technique.name in on else dict(row.neutral or {})
        found += row.make(family, 0, [0], **neutral)
    return tuple(found)


def settings(on: frozenset[str]) -> dict[str, Any]:
    prompt = PROMPTS[0] + (f" with {WORD}" if "Textual Inversion" in on else "")
    given = {"image": drawing(30, 32), "strength": 0.7} if "image-to-image" in on else {}
    return {"prompt": prompt, "negative": "blurry", "steps": 3, "size": SIZE, "sampler": DDIM(), "seed": 7, **given}


def adapters(model: Model) -> tuple[Lora, Embedding]:
    layers: dict[str, dict[str, Any]] = {}
    for layer in draw(model):
        low = LowRank(layer.down, layer.up)
        layers.setdefault(layer.component, {})[layer.path] = low
    rng = np.random.default_rng(0)
    widths = {name: encoder.config.hidden_size for name, encoder in model.text_encoders.items()}
    vectors = {name: rng.standard_normal((2, width)).astype(np.float32) for name, width in widths.items()}
    return Lora(layers), Embedding(WORD, vectors)


@pytest.fixture(scope="module")
def runs(models) -> Callable[[str], Run]:
    """runs(kind)(on): the latents that the techniques `on` make together, each made once."""

    @functools.cache
    def of(kind: str) -> Run:
        model = models(kind)
        lora, embedding = adapters(model)

        @functools.cache
        def with_lora(strength: float) -> Model:
            return embedding.apply(lora.apply(model, strength, live=True))

        @functools.cache
        def run(on: frozenset[str], output: str = "latents") -> Any:
            changed = with_lora(float("LoRA" in on))
            return generate(changed, controls=controls(kind, on), output=output, **settings(on))

        return run

    return of


def everything_at_once(kind, run):
    """CFG, two ControlNets, SEGA, SAG, PAG, Attend-and-Excite, Pix2Pix-Zero, inpainting, image-to-image, a LoRA and a
    learned word in one call; and each of them can be told."""
    names = {technique.name for technique in TECHNIQUES if kind in technique.kinds}
    everything = run(EVERYTHING)
    assert np.isfinite(everything).all()
    for technique in TECHNIQUES:
        if technique.name in names and not technique.needed:
            without = run(EVERYTHING - {technique.name})
            assert np.abs(everything - without).max() > 1e-5, f"{technique.name} does nothing beside all others"


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell(kind, runs):
    """And everything at once, in the same test because it is the same program."""
    everything_at_once(kind, runs(kind))
    run, names = runs(kind), [technique.name for technique in TECHNIQUES if kind in technique.kinds]
    needed = {technique.name for technique in TECHNIQUES if technique.needed}
    for one, other in PAIRS:
        if one.name not in names or other.name not in names:
            continue
        if kind not in PLAIN and not (one.needed or other.needed):
            continue  # the plain kind of the family has these
        both = run(frozenset({one.name, other.name}))
        assert np.isfinite(both).all(), (one.name, other.name)
        for here, beside in ((one, other), (other, one)):
            # What a model cannot do without is never off, so nothing shows that it does its work; tests/controls do.
            if here.name not in needed:
                without = run(frozenset({beside.name}) - needed)
                assert np.abs(both - without).max() > 1e-4, f"{here.name} does nothing beside {beside.name}"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_is_outside_of_the_mask_comes_back_beside_everything(kind, runs):
    (inpaint,) = (each for each in controls(kind, EVERYTHING) if isinstance(each, sfumato.Inpaint))
    made = runs(kind)(EVERYTHING, "images")[0].array
    known = np.asarray(resize(read(inpaint.image[0]), SIZE))
    np.testing.assert_array_equal(made[:, :8], known[:, :8])
    assert np.any(made[:, 8:] != known[:, 8:])


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " and ".join(sorted(pair)))
def test_pairs_that_make_no_sense_are_refused_with_both_names(pair, models):
    kind, named, _ = REFUSED[pair]
    picked = [technique for technique in TECHNIQUES if technique.name in pair]
    rows = [ROWS[technique.row] for technique in picked if technique.row]
    both = [each for row in rows for each in row.make("sd1", 0, [0])]
    words = f"InstructPix2Pix and {named} cannot run together|{named} and InstructPix2Pix cannot run together"
    for order in (both, both[::-1]):
        with pytest.raises(sfumato.SfumatoError, match=words):
            generate(models(kind), controls=order, **settings(NOTHING))


def test_pairs_without_a_network_are_refused(models):
    """What the page calls "·": at most one of the two fits any network."""
    for one, other in PAIRS:
        if kinds_of(one, other) or frozenset({one.name, other.name}) in REFUSED or not (one.row and other.row):
            continue
        if ROWS[one.row].make is ROWS[other.row].make:
            continue  # one control, which is the one or the other by what the model is
        for kind in (*one.kinds[:1], *other.kinds[:1]):
            if "Inpaint, 9 channels" in (one.name, other.name) and kind not in NINE:
                continue  # there the same control inpaints without channels
            family = next(kinds[0] for kinds in FAMILIES.values() if kind in kinds)
            both = [each for row in (one.row, other.row) for each in ROWS[row].make(family, 0, [0])]
            with pytest.raises(sfumato.SfumatoError):
                generate(models(kind), controls=both, **settings(NOTHING))


def test_the_page_is_what_is_tested():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python tests/compatibility.py"
    assert {row.name for row in TABLE} >= {technique.row for technique in TECHNIQUES if technique.row}
    assert set(PLAIN) | set(INSTRUCT) <= set(KINDS)
