"""The objective: equal to diffusers' scheduler and weights, and true to what it says of its draws."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.schedule import Schedule, to_x0
from sfumato.train.objective import Draws, Objective

from oracle import from_torch, to_torch

SHAPE = (4, 3, 5, 2)


def some(seed: int = 0, t: tuple[int, ...] = (0, 20, 500, 999)) -> tuple[jax.Array, Draws]:
    rng = np.random.default_rng(seed)
    latents, noise, posterior = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(3))
    none = jnp.zeros(len(t), bool)
    return latents, Draws(noise, jnp.array(t), posterior, none, none)


@pytest.mark.parity
@pytest.mark.parametrize("zero", [False, True])
def test_noised_latents_and_velocity_are_the_references(zero):
    import diffusers
    import torch

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDPMScheduler(**settings, rescale_betas_zero_snr=zero)
    objective = Objective(Schedule(**settings, rescale_betas_zero_snr=zero, prediction_type="v_prediction"))
    latents, draws = some()
    x, noise, t = to_torch(latents), to_torch(draws.noise), torch.from_numpy(np.array(draws.t)).long()
    noisy, velocity = (from_torch(f(x, noise, t)) for f in (scheduler.add_noise, scheduler.get_velocity))
    np.testing.assert_allclose(objective.noised(latents, draws), noisy, atol=1e-4)
    np.testing.assert_allclose(objective.target(latents, draws), velocity, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_references(prediction):
    import diffusers
    import torch
    from diffusers.training_utils import compute_snr

    schedule = Schedule(prediction_type=prediction)
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    snr = compute_snr(diffusers.DDPMScheduler(**config), torch.arange(1000)).numpy()
    divisor = snr if prediction == "epsilon" else snr + 1
    np.testing.assert_allclose(Objective(schedule, min_snr=5).weights, np.minimum(snr, 5) / divisor, rtol=2e-4)


@pytest.mark.parametrize("zero", [False, True])
def test_min_snr_weighs_errors_of_the_clean_latents_alike_for_all_predictions(zero):
    """The same wrong guess of the clean latents costs the same, in whatever terms the network says it."""
    latents, draws = some(t=(1, 20, 500, 998))
    costs = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule = Schedule(prediction_type=prediction, rescale_betas_zero_snr=zero)
        objective = Objective(schedule, min_snr=5)
        noisy = objective.noised(latents, draws)
        alpha, sigma = (jnp.asarray(a, jnp.float32)[draws.t][:, None, None, None]
                        for a in (schedule.alphas, schedule.sigmas))  # fmt: skip
        guess = latents + 0.1
        output = {"sample": guess, "epsilon": (noisy - alpha * guess) / sigma,
                  "v_prediction": (alpha * noisy - guess) / sigma}[prediction]  # fmt: skip
        np.testing.assert_allclose(to_x0(output, noisy, alpha, sigma, prediction), guess, atol=1e-2)
        costs.append(float(objective.loss(output, latents, draws)[0]))
    np.testing.assert_allclose(costs, costs[0], rtol=1e-3)


def test_weights_are_finite_at_zero_terminal_snr():
    for prediction in ("epsilon", "v_prediction", "sample"):
        schedule = Schedule(prediction_type=prediction, rescale_betas_zero_snr=True)
        weights = Objective(schedule, min_snr=5).weights
        assert np.isfinite(weights).all()
        assert (weights >= 0).all()


def test_a_floor_gives_the_noisiest_times_of_a_velocity_full_weight():
    schedule = Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    plain, floored = (Objective(schedule, min_snr=5, snr_floor=floor).weights for floor in (0, 1))
    snr = np.divide(schedule.alphas**2, schedule.sigmas**2, where=schedule.sigmas > 0, out=np.zeros(1000))
    np.testing.assert_allclose(floored[snr < 4], 1)
    np.testing.assert_allclose(floored[snr > 5], plain[snr > 5])
    assert plain[-1] == 0


def test_the_perfect_answer_costs_nothing():
    latents, draws = some()
    for prediction in ("epsilon", "v_prediction", "sample"):
        objective = Objective(Schedule(prediction_type=prediction), min_snr=5)
        loss, figures = objective.loss(objective.target(latents, draws), latents, draws)
        assert float(loss) == float(figures["mse"]) == 0


def test_plain_loss_is_the_mean_square_and_weights_of_rows_multiply():
    latents, draws = some()
    objective = Objective(Schedule())
    loss, figures = objective.loss(draws.noise + 2, latents, draws)
    assert float(loss) == pytest.approx(4)
    assert float(figures["mse"]) == pytest.approx(4)
    loss, _ = objective.loss(draws.noise + 2, latents, draws, jnp.array([1.0, 0.0, 0.0, 2.0]))
    assert float(loss) == pytest.approx(3)


def test_draws_are_those_of_the_key():
    objective = Objective(Schedule(), dropout=0.5)
    one, same, other = (objective.draw(jax.random.key(seed), SHAPE) for seed in (1, 1, 2))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(same)))
    assert not np.array_equal(one.noise, other.noise)
    assert abs(np.corrcoef(one.noise.ravel(), one.posterior.ravel())[0, 1]) < 0.5


def test_times_are_uniform_and_stratified_ones_fill_every_part():
    schedule = Schedule()
    times = np.asarray(Objective(schedule).times(jax.random.key(0), 20_000))
    assert times.min() == 0
    assert times.max() == 999
    assert abs(times.mean() - 499.5) < 10
    for seed in range(5):
        times = np.asarray(Objective(schedule, stratified=True).times(jax.random.key(seed), 50))
        assert sorted(times // 20) == list(range(50))


def test_offset_noise_moves_whole_channels():
    shape = (2000, 4, 4, 2)
    noise = np.asarray(Objective(Schedule(), offset=0.5).draw(jax.random.key(0), shape).noise)
    plain = np.asarray(Objective(Schedule()).draw(jax.random.key(0), shape).noise)
    moved = noise - plain
    np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1, :1], shape), atol=1e-5)
    assert moved[:, 0, 0].std() == pytest.approx(0.5, rel=0.05)


def test_shares_of_dropped_rows():
    objective = Objective(Schedule(), dropout=0.1, image_dropout=0.2, joint_dropout=0.3)
    draws = objective.draw(jax.random.key(0), (20_000, 1, 1, 1))
    text, image = np.asarray(draws.dropped), np.asarray(draws.dropped_image)
    for rows, share in ((text & ~image, 0.1), (image & ~text, 0.2), (text & image, 0.3)):
        assert rows.mean() == pytest.approx(share, abs=0.02)
    none = Objective(Schedule()).draw(jax.random.key(0), SHAPE)
    assert not none.dropped.any()
    assert not none.dropped_image.any()
    assert Objective(Schedule(), dropout=1.0).draw(jax.random.key(0), SHAPE).dropped.all()


@pytest.mark.parametrize("wrong", [
    {"dropout": -0.1}, {"dropout": 0.6, "joint_dropout": 0.6}, {"min_snr": 0}, {"offset": -1}, {"offset": float("nan")},
    {"snr_floor": 1}, {"min_snr": 5, "snr_floor": -1}, {"min_snr": 1, "snr_floor": 1}, {"min_snr": 5, "snr_floor": 1},
])  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SfumatoError):
        dc.replace(Objective(Schedule()), **wrong)
