"""Equality with an independent implementation, diffusers on PyTorch; skipped where they are not installed."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from ddpm_jax.reverse import p_mean_variance, p_sample  # noqa: E402
from ddpm_jax.schedules import make_schedule  # noqa: E402


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_reverse_step_equals_that_of_diffusers(monkeypatch, prediction, variance, clip_x0):
    random = np.random.default_rng(1)
    shape = (2, 4, 2, 3)
    schedule = make_schedule("linear", 1000)
    scheduler = diffusers.DDPMScheduler(
        variance_type=variance,
        clip_sample=clip_x0,
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
    )
    # Theirs takes 1 - alphas_bar of float32 numbers, which loses four digits at time 1: here it is given float64.
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    for time in (0, 1, 2, 100, 499, 998, 999):
        x_t, z, v = random.normal(size=(3, *shape)).astype(np.float32)
        output = random.normal(size=shape).astype(np.float32)
        if variance == "learned_range":
            output = np.concatenate([output, np.tanh(v)], axis=-1)
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: torch.from_numpy(z.transpose(0, 3, 1, 2))
        )
        expected = scheduler.step(
            torch.from_numpy(output.transpose(0, 3, 1, 2)), time, torch.from_numpy(x_t.transpose(0, 3, 1, 2))
        )
        t = jnp.full(2, time)
        reverse = p_mean_variance(
            schedule,
            jnp.asarray(output),
            jnp.asarray(x_t),
            t,
            prediction=prediction,
            variance=variance,
            clip_x0=clip_x0,
        )
        actual = p_sample(reverse, t, jnp.asarray(z))
        expected_x0 = expected.pred_original_sample.numpy().transpose(0, 2, 3, 1)
        expected_x = expected.prev_sample.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(reverse.x0, expected_x0, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actual, expected_x, rtol=1e-5, atol=1e-5)
