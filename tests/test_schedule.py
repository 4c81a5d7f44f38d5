"""The schedule: its laws in float64, and the tables and timesteps of the torch reference."""

from __future__ import annotations

import dataclasses as dc
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.schedule import PREDICTIONS, SPACINGS, Schedule, to_eps, to_output, to_v, to_x0

SCHEDULES = [
    Schedule(beta_schedule=name, rescale_betas_zero_snr=zero)
    for name, zero in itertools.product(("scaled_linear", "linear", "squaredcos_cap_v2"), (False, True))
] + [Schedule(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3))]


def name_of(schedule: Schedule) -> str:
    return schedule.beta_schedule + "-zero" * schedule.rescale_betas_zero_snr


CONVERT = {"epsilon": to_eps, "v_prediction": to_v, "sample": to_x0}
SD1 = json.loads("""{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
    "set_alpha_to_one": false, "skip_prk_steps": true, "steps_offset": 1, "trained_betas": null,
    "clip_sample": false}""")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name_of)
def test_tables_are_a_noising(schedule):
    alphas, sigmas, betas = schedule.alphas, schedule.sigmas, schedule.betas
    np.testing.assert_allclose(alphas**2 + sigmas**2, 1, rtol=1e-15)
    assert (np.diff(alphas) < 0).all()
    assert (np.diff(sigmas) > 0).all()
    assert ((betas > 0) & (betas <= 1)).all()
    np.testing.assert_allclose(np.sqrt(np.cumprod(1 - betas)), alphas, rtol=1e-9, atol=1e-15)
    if schedule.rescale_betas_zero_snr:
        plain = Schedule(beta_schedule=schedule.beta_schedule)
        assert (alphas[-1], sigmas[-1]) == (0, 1)
        assert alphas[0] == pytest.approx(plain.alphas[0], rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES[:6], ids=name_of)
def test_between_timesteps(schedule):
    """At whole timesteps the table itself; between them sigma / alpha is linear."""
    whole = np.arange(1000.0)
    for ours, table in zip(schedule.at(whole), (schedule.alphas, schedule.sigmas), strict=True):
        np.testing.assert_allclose(ours, table, rtol=1e-14)
    alpha, sigma = schedule.at(np.linspace(0, 998, 777))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
    ratios = np.interp(np.linspace(0, 998, 777), whole[:999], schedule.sigmas[:999] / schedule.alphas[:999])
    np.testing.assert_allclose(sigma / alpha, ratios, rtol=1e-9)
    assert schedule.at(np.array([999.0]), floor=2**-24)[0] >= 2**-12


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_conversions_agree_with_what_they_name(source, target):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x0, eps = (jnp.asarray(rng.standard_normal((5, 4, 4, 3))) for _ in range(2))
        angle = jnp.asarray([0.1, 0.5, 0.8, 1.2, 1.5])[:, None, None, None]
        alpha, sigma = jnp.cos(angle), jnp.sin(angle)
        x = alpha * x0 + sigma * eps
        true = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
        ours = CONVERT[target](true[source], x, alpha, sigma, source)
        np.testing.assert_allclose(ours, true[target], atol=1e-13)
        np.testing.assert_allclose(to_output(x0, eps, alpha, sigma, target), true[target], atol=1e-15)
        back = CONVERT[source](CONVERT[target](x0, x, alpha, sigma, source), x, alpha, sigma, target)
        np.testing.assert_allclose(back, x0, atol=1e-12)


def test_conversions_at_zero_snr():
    """With alpha = 0 the picture is all noise: v still tells x0, eps cannot, and nothing is infinite."""
    x, out = jnp.full((2, 3), 0.5), jnp.full((2, 3), 2.0)
    assert (to_eps(out, x, 0.0, 1.0, "v_prediction") == x).all()
    assert (to_x0(out, x, 0.0, 1.0, "v_prediction") == -out).all()
    assert (to_eps(out, x, 0.0, 1.0, "sample") == x).all()
    assert (to_v(out, x, 0.0, 1.0, "sample") == -out).all()
    assert (to_x0(out, x, 0.0, 1.0, "epsilon") == 0).all()
    slope = jax.grad(lambda out: to_x0(out, x, jnp.zeros(()), jnp.ones(()), "epsilon").sum())(out)
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_conversions_trace_and_keep_the_type(dtype):
    x = jnp.ones((2, 3, 3, 4), dtype)
    for convert, prediction in itertools.product(CONVERT.values(), PREDICTIONS):
        assert jax.jit(lambda x, p=prediction, f=convert: f(x, x, 0.6, 0.8, p))(x).dtype == dtype


def test_config_round_trip():
    schedule = Schedule.from_config(SD1)
    assert schedule.options == {"_diffusers_version": "0.6.0", "skip_prk_steps": True}
    assert (schedule.class_name, schedule.timestep_spacing) == ("PNDMScheduler", None)
    for one in (*SCHEDULES, schedule):
        assert Schedule.from_config(json.loads(json.dumps(one.to_config()))) == one
    assert jax.tree.leaves(schedule) == []
    assert hash(schedule) == hash(Schedule.from_config(SD1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(beta_schedule="sigmoid"), "beta schedule 'sigmoid'"),
        (lambda: Schedule(prediction_type="flow_prediction"), "prediction type 'flow_prediction'"),
        (lambda: Schedule(timestep_spacing="even"), "timestep spacing 'even'"),
        (lambda: Schedule(final_sigmas_type="one"), "final sigma type 'one'"),
        (lambda: Schedule(trained_betas=(0.1,)), "from 1 trained betas"),
        (lambda: Schedule(num_train_timesteps=0), "0 timesteps"),
        (lambda: Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}), "not made of betas"),
        (lambda: Schedule().timesteps(0), "at least 1 step"),
        (lambda: Schedule().timesteps(1001), "too few for 1001 steps"),
        (lambda: Schedule(steps_offset=1).timesteps(1000), "would start at 1000"),
        (lambda: Schedule().timesteps(10, default="even"), "timestep spacing 'even'"),
        (lambda: to_eps(jnp.ones(2), jnp.ones(2), 0.6, 0.8, "noise"), "prediction type 'noise'"),
    ],
)
def test_wrong_input_is_one_sentence(make, message):
    with pytest.raises(SfumatoError, match=message) as caught:
        make()
    assert str(caught.value).count(". ") == 0


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("endpoint", [True, False])
def test_timesteps_descend_within_the_trained_ones(spacing, endpoint):
    for steps in range(1, 1000):
        times = Schedule(timestep_spacing=spacing).timesteps(steps, endpoint=endpoint)
        assert times.shape == (steps,)
        assert (np.diff(times) < 0).all()
        assert 0 <= times[-1] <= times[0] <= 999


BETAS = [
    {"beta_schedule": name, "beta_start": 0.00085, "beta_end": 0.012}
    for name in ("scaled_linear", "linear", "squaredcos_cap_v2")
] + [{"trained_betas": list(np.linspace(0.001, 0.02, 1000))}]


@pytest.mark.parity
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("config", BETAS, ids=["scaled_linear", "linear", "squaredcos", "trained"])
def test_tables_of_the_reference(config, zero):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**config, rescale_betas_zero_snr=zero)
    ours = Schedule.from_config(dict(theirs.config) | {"_class_name": "DDIMScheduler"})
    plain = DDIMScheduler(**config).betas.double().numpy()
    np.testing.assert_allclose(ours.raw_betas(), plain, rtol=1e-6)
    if not zero:  # the reference multiplies in float32; with its betas and exact products the tables agree
        cosine = config.get("beta_schedule") == "squaredcos_cap_v2"  # 1 - beta is crude where beta is near 1
        np.testing.assert_allclose(ours.alphas**2, np.cumprod(1 - plain), rtol=1e-4 if cosine else 1e-6)
    np.testing.assert_allclose(ours.alphas**2, theirs.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-6)


def reference(name: str, **config):
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, name)(**betas, **config)


STYLES = {
    "DDIMScheduler": {},
    "PNDMScheduler": {},
    "DDPMScheduler": {},
    "EulerDiscreteScheduler": {"rounded": False},
    "EulerAncestralDiscreteScheduler": {"rounded": False},
    "HeunDiscreteScheduler": {"rounded": False},
    "DPMSolverMultistepScheduler": {"endpoint": False},
    "UniPCMultistepScheduler": {"endpoint": False},
}


@pytest.mark.parity
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", STYLES)
def test_timesteps_of_the_reference(name, spacing):
    theirs = reference(
        name, timestep_spacing=spacing, steps_offset=1, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})
    )
    ours = Schedule.from_config(dict(theirs.config) | {"_class_name": name})
    for steps in (1, 2, 3, 4, 7, 10, 20, 25, 30, 33, 50, 61, 100, 250, 333, 500, 998):
        theirs.set_timesteps(steps)
        expected = theirs.timesteps.double().numpy()
        if name == "PNDMScheduler":  # its multistep method visits the second timestep twice
            expected = expected[np.insert(np.diff(expected) != 0, 0, True)]
        if name == "HeunDiscreteScheduler":  # two evaluations a step
            expected = np.concatenate([expected[:1], expected[1::2]])
        # Where rounding lengthens its `arange` (61 steps, trailing) the reference goes on to a timestep -1.
        expected = expected[expected >= 0]
        got = ours.timesteps(steps, **STYLES[name])
        np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=f"{steps}")


@pytest.mark.parity
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_sigmas_of_the_reference(spacing, zero):
    theirs = reference("EulerDiscreteScheduler", timestep_spacing=spacing, rescale_betas_zero_snr=zero)
    ours = Schedule.from_config(dict(theirs.config) | {"_class_name": "EulerDiscreteScheduler"})
    theirs.set_timesteps(30)
    alpha, sigma = ours.at(ours.timesteps(30, rounded=False), floor=2**-24)
    np.testing.assert_allclose(sigma / alpha, theirs.sigmas[:-1], rtol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        *STYLES,
        "DDIMInverseScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "LMSDiscreteScheduler",
        "DEISMultistepScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSinglestepScheduler",
    ],
)
def test_a_silent_config_means_what_it_means_to_the_reference(name):
    import diffusers

    theirs, ours = getattr(diffusers, name)().config, Schedule.from_config({"_class_name": name})
    shared = {field.name for field in dc.fields(ours)} & theirs.keys() - {"timestep_spacing"}
    assert len(shared) >= 6
    for key in shared:
        assert theirs[key] == getattr(ours, key), key
    assert getattr(diffusers, name).from_config(Schedule.from_config(SD1).to_config() | {"_class_name": name})
