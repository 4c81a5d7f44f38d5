"""Semantic guidance against the torch pipeline, against the paper's equations, and on models that the former lacks."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, SEGA, Edit
from sfumato.controls.sega import Directions
from sfumato.types import Conditioning, Prediction

from oracle import assert_close, to_torch
from runs import NEGATIVE, PROMPT, SIZE, TOLERANCE, noise, picture

STEPS = 6
KINDS = ["sd1", "sd2", "sdxl"]


@pytest.fixture
def edited(pair):
    """edited(kind, control, ...): our final latents, with plain guidance beside the control."""

    def run(kind: str, *controls, **settings) -> np.ndarray:
        return pair(kind, small=True).ours(**{"steps": STEPS, "controls": [CFG(5.0), *controls]} | settings)

    return run


@pytest.fixture
def reference(pair):
    """reference(kind, edits, ...): the torch pipeline's final latents."""

    def run(kind: str, edits: list[Edit], weights=None, **settings) -> np.ndarray:
        return pair(kind, small=True).through("SemanticStableDiffusionPipeline").theirs(
            steps=STEPS, editing_prompt=[edit.text for edit in edits],
            reverse_editing_direction=[edit.remove for edit in edits],
            edit_guidance_scale=[edit.scale for edit in edits],
            edit_warmup_steps=[edit.warmup for edit in edits],
            edit_cooldown_steps=[STEPS if edit.cooldown is None else edit.cooldown for edit in edits],
            edit_threshold=[edit.threshold for edit in edits],
            edit_weights=weights or [edit.weight for edit in edits], **settings,
        )  # fmt: skip

    return run


# ---- The torch pipeline

SMILING = Edit("smiling", 30.0, warmup=0)
START = noise(seed=3)
"""From other tests' noise, two numbers at a quantile are so alike that rounding says which of them is left out."""
CASES = {
    "one": [SMILING],
    "one that begins later and ends": [Edit("smiling", 80.0, threshold=0.7, warmup=1, cooldown=4)],
    "all of the latents": [Edit("smiling", 80.0, threshold=0.0, warmup=1)],
    "one number of each channel": [Edit("smiling", 50.0, threshold=1.0, warmup=0)],
    "added and removed": [SMILING, Edit("snow", 20.0, threshold=0.8, warmup=0, remove=True)],
    "weights": [dc.replace(SMILING, weight=0.4), Edit("a hat", 20.0, warmup=0, weight=2.0)],
    "one after the other": [SMILING, Edit("snow", 40.0, threshold=0.6, warmup=3, weight=0.5, remove=True)],
    "ends while another one goes on": [dc.replace(SMILING, cooldown=2), Edit("a hat", 20.0, warmup=1)],
    "all end": [dc.replace(SMILING, cooldown=2), Edit("a hat", 40.0, warmup=0, cooldown=3)],
}


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("edits", CASES.values(), ids=CASES)
def test_as_the_reference(edits, reference, edited):
    settings = {"edit_momentum_scale": 0.4, "edit_mom_beta": 0.6}
    want = reference("sd1", edits, latents=to_torch(START), **settings)
    got = edited("sd1", SEGA(edits, momentum_scale=0.4, momentum_beta=0.6), latents=START)
    assert_close(got, want, TOLERANCE)
    assert np.abs(want - edited("sd1", latents=START)).max() > 0.05 * np.ptp(want), "the edits did next to nothing"


@pytest.mark.parity
@pytest.mark.slow
def test_with_velocities_as_the_reference(reference, edited):
    edits = CASES["one after the other"]
    assert_close(edited("sd2", SEGA(edits)), reference("sd2", edits), TOLERANCE)


@pytest.mark.parity
@pytest.mark.slow
def test_several_pictures_as_the_reference(reference, edited):
    prompts, edits, start = [PROMPT, "a blue bird"], CASES["added and removed"], noise((2, 8, 8, 4))
    want = reference("sd1", edits, prompt=prompts, latents=to_torch(start), negative_prompt=[NEGATIVE, NEGATIVE])
    assert_close(edited("sd1", SEGA(edits), prompt=prompts, latents=start), want, TOLERANCE)
    each = [dc.replace(edits[0], text=["smiling", "smiling"]), edits[1]]
    assert_close(edited("sd1", SEGA(each), prompt=prompts, latents=start), want, TOLERANCE)


@pytest.mark.parity
@pytest.mark.slow
def test_while_some_warm_up_the_reference_divides_weights_by_their_sum(reference, edited):
    """Its weights 1 and 3 are our 1/4 and 3/4 as long as a third edit, of whatever weight, has not begun."""
    late = Edit("a hat", warmup=STEPS)
    edits = [SMILING, Edit("snow", 6.0, warmup=0, remove=True), late]
    shares = [dc.replace(edit, weight=weight) for edit, weight in zip(edits, (0.25, 0.75, 1.0), strict=True)]
    want = reference("sd1", edits, weights=[1.0, 3.0, 1.0])
    assert_close(edited("sd1", SEGA(shares)), want, TOLERANCE)


@pytest.mark.parity
@pytest.mark.slow
def test_where_the_reference_is_not_a_number(reference, edited):
    """Those that have begun have ended, and another one has not begun."""
    edits = [dc.replace(SMILING, cooldown=2), Edit("a hat", warmup=4)]
    assert np.isnan(reference("sd1", edits)).all()
    assert np.isfinite(edited("sd1", SEGA(edits))).all()


# ---- The equations


def row(seed: int, edits: int) -> dict[str, Prediction]:
    """Random outputs of every branch."""
    rng = np.random.default_rng(seed)
    names = ["cond", "uncond", *(f"edit {i + 1}" for i in range(edits))]
    return {name: Prediction(jnp.asarray(rng.standard_normal((2, 5, 7, 3))), {}) for name in names}


@pytest.mark.usefixtures("unchecked")  # an environment and a step, which the equations do not need
def test_the_equations_in_float64():
    scales, weights = np.array([5.0, 3.0, 7.0]), np.array([1.0, 0.5, 2.0])
    signs, thresholds = np.array([1, -1, 1]), np.array([0.9, 0.35, 0.6])
    warmups, cooldowns = np.array([0, 2, 3]), np.array([np.inf, 5, 6])
    with jax.enable_x64(True):
        control = Directions(
            (Conditioning(jnp.zeros((2, 4, 6))),) * 3,
            *map(jnp.asarray, (scales * weights * signs, thresholds, warmups * 1.0, cooldowns)),
            jnp.asarray(0.3), jnp.asarray(0.6),
        )  # fmt: skip
        state, nu = control.init(jnp.zeros((2, 5, 7, 3), jnp.float64), None), np.zeros((2, 5, 7, 3))
        for t in range(8):
            preds = row(t, 3)
            got, state = control.guide(None, preds, {}, None, state)
            gammas = []
            for i in range(3):
                psi = signs[i] * (np.asarray(preds[f"edit {i + 1}"].eps) - np.asarray(preds["uncond"].eps))
                limit = np.quantile(abs(psi), thresholds[i], axis=(1, 2), keepdims=True)  # eq. 7
                gammas.append((t < cooldowns[i]) * scales[i] * np.where(abs(psi) >= limit, psi, 0))  # eq. 5, 6
            every = sum(g * gamma for g, gamma in zip(weights, gammas, strict=True)) + 0.3 * nu  # eq. 8
            begun = sum(g * gamma * (t >= warmups[i]) for i, (g, gamma) in enumerate(zip(weights, gammas, strict=True)))
            nu = 0.6 * nu + 0.4 * every  # eq. 9
            assert got.dtype == jnp.float64
            assert_close(got, every if t >= 3 else begun, 1e-14)
            assert (np.asarray(got) != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_is_the_prompt_is_plain_guidance(kind, edited):
    """Everything that a network sees of a text, of an edit's too: where nothing is left out, both are s (e - u)."""
    edit = Edit(PROMPT, scale=4.0, threshold=0.0, warmup=0)
    got = edited(kind, controls=[SEGA([edit], momentum_scale=0.0)])
    assert_close(got, edited(kind), 1e-5)
    less = SEGA([dc.replace(edit, scale=2.0, weight=0.5, remove=True)], momentum_scale=0.0)
    assert_close(edited(kind, less), edited(kind, controls=[CFG(4.0)]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_is_the_negative_prompt_is_nothing(kind, edited):
    assert_close(edited(kind, SEGA([Edit(NEGATIVE, warmup=0)])), edited(kind), 1e-5)


@pytest.mark.slow
def test_every_number_counts(edited):
    """For SDXL, which the reference does not do, and pictures that are not square."""
    settings = {"size": (20, 12), "latents": noise((1, 6, 10, 4))}
    edit, other = Edit("smiling", 9.0, warmup=1), Edit("snow", warmup=2, remove=True)
    want = edited("sdxl", SEGA([edit, other]), **settings)
    changed = {
        "text": "sad", "scale": 3.0, "threshold": 0.5, "warmup": 0, "cooldown": 2, "weight": 0.5, "remove": True,
    }  # fmt: skip
    for field, value in changed.items():
        got = edited("sdxl", SEGA([dc.replace(edit, **{field: value}), other]), **settings)
        assert np.abs(got - want).max() > 1e-3, field
    for field in ("momentum_scale", "momentum_beta"):
        got = edited("sdxl", SEGA([edit, other], **{field: 0.9}), **settings)
        assert np.abs(got - want).max() > 1e-3, field


# ---- What is absent


@pytest.mark.slow
@pytest.mark.parametrize("nothing", [{"scale": 0.0}, {"weight": 0.0}])
def test_an_edit_without_strength_leaves_the_others_alone(nothing, edited):
    """Although it begins only after the end, and so would hold back their momentum."""
    late = Edit("snow", warmup=STEPS)
    want = edited("sd1", SEGA([SMILING]))
    assert_close(edited("sd1", SEGA([SMILING, dc.replace(late, **nothing)])), want, 1e-5)
    assert np.abs(edited("sd1", SEGA([SMILING, late])) - want).max() > 1e-3


@pytest.mark.slow
def test_before_they_begin_edits_are_absent(edited):
    got = edited("sd1", SEGA([Edit("smiling", 50.0, warmup=STEPS)]))
    assert_close(got, edited("sd1"), 1e-5)


@pytest.mark.slow
def test_steps_are_counted_from_where_the_run_begins(edited):
    """An edit that begins after 3 of 6 steps is absent from the last half of them."""

    def half(*controls):
        return edited("sd1", *controls, image=picture(), strength=0.5)

    assert_close(half(SEGA([Edit("smiling", 50.0, warmup=3)])), half(), 1e-5)
    assert np.abs(half(SEGA([Edit("smiling", 50.0, warmup=2)])) - half()).max() > 0.01


@pytest.mark.slow
def test_long_texts_of_edits(edited):
    """Every text of a run is made as long as the longest."""
    assert np.isfinite(edited("sd1", SEGA([Edit("smiling, " * 60, warmup=0), SMILING]))).all()


# ---- What does not fit


def test_two_are_refused_with_both_names(edited):
    with pytest.raises(sfumato.SfumatoError, match="SEGA and SEGA cannot run together: one SEGA takes all the edits"):
        edited("sd1", SEGA([SMILING]), SEGA([SMILING]))


def second(**changes) -> SEGA:
    """An edit that is good, and one that is changed."""
    return SEGA([SMILING, dc.replace(SMILING, **changes)])


BAD = {
    "no edits": (lambda: SEGA([]), "SEGA has no edits; give it some, such as [Edit('smiling')]."),
    "a text": (lambda: SEGA("smiling"), "SEGA takes a list of edits, such as [Edit('smiling')], not a str."),
    "an edit, no list": (lambda: SEGA(SMILING), "SEGA takes a list of edits, such as [Edit('smiling')], not a Edit."),
    "a text among the edits": (
        lambda: SEGA([SMILING, "hat"]), "SEGA's edits hold a str, which is no edit; see sfumato.Edit."),
    "no text": (lambda: second(text=" "), "SEGA's edit 2 has no text; say what to add or to remove"),
    "no texts": (lambda: second(text=[]), "SEGA's edit 2 has no text"),
    "one without text": (lambda: second(text=["a hat", ""]), "SEGA's edit 2 has no text"),
    "a number as text": (lambda: second(text=5), "The text of SEGA's edit 2 must be a text or a list of texts, not 5."),
    "more texts": (lambda: second(text=["a", "b"]), "SEGA's edit 2 has 2 texts for 1 pictures; give one, or 1."),
    "no strength": (lambda: second(scale=None), "SEGA's edit 2 has no strength; give it a scale, such as"),
    "scale NaN": (lambda: second(scale=np.nan), "The scale of SEGA's edit 2 must be a finite number, not nan."),
    "scale of text": (lambda: second(scale="x"), "The scale of SEGA's edit 2 must be a number, not 'x'."),
    "weight below 0": (lambda: second(weight=-1), "The weight of SEGA's edit 2 must lie in [0, inf], not be -1."),
    "threshold above 1": (
        lambda: second(threshold=1.5), "The threshold of SEGA's edit 2 must lie in [0, 1], not be 1.5."),
    "warmup below 0": (lambda: second(warmup=-1), "The warmup of SEGA's edit 2 must lie in [0, inf], not be -1."),
    "warmup None": (lambda: second(warmup=None), "The warmup of SEGA's edit 2 must be a number, not None."),
    "ends first": (
        lambda: second(warmup=10, cooldown=5), "SEGA's edit 2 would end after 5 steps and begin only after 10."),
    "remove of text": (lambda: second(remove="no"), "The remove of SEGA's edit 2 must be True or False, not 'no'."),
    "momentum above 1": (
        lambda: SEGA([SMILING], momentum_scale=2), "SEGA's momentum_scale must lie in [0, 1], not be 2."),
    "momentum NaN": (
        lambda: SEGA([SMILING], momentum_beta=np.nan), "SEGA's momentum_beta must be a finite number, not nan."),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(make, message, loaded):
    with pytest.raises(sfumato.SfumatoError) as raised:
        sfumato.generate(loaded("sd1"), PROMPT, size=SIZE, controls=[make()])
    assert message in str(raised.value)
    assert str(raised.value).endswith(".")
