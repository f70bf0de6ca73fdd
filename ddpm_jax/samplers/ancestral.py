"""Ancestral sampling: Algorithm 2 of Ho et al. 2020."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from ddpm_jax.names import Prediction, Variance
from ddpm_jax.reverse import Clip, Predict, Reverse, p_mean_variance, p_sample
from ddpm_jax.samplers.chain import Chain, ChainInfo, Sampler, step_noise
from ddpm_jax.samplers.respacing import check_prediction, shorten, skips_timesteps
from ddpm_jax.schedules import Schedule


def ancestral(
    schedule: Schedule,
    predict: Predict,
    *,
    num_steps: int | None = None,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
) -> Sampler:
    r"""Makes the paper's sampler: each step samples p(x_{t-1} | x_t), the last without noise.

    .. math:: x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z

    Args:
      schedule: tables of T steps.
      predict: the network.
      num_steps: N, in [1, T], for a chain of N of the timesteps, spaced as `make_sampler` does; all if None.
      prediction: what the network predicts.
      variance: the variance of p(x_{t-1} | x_t); the paper's CIFAR-10 model uses "fixed_large".
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.

    Returns:
      a `Sampler` with one step per timestep.

    Raises:
      ValueError: the prediction is "mean" or the variance "learned" and the schedule skips timesteps, or
        as `check_end`.

    Ho et al. 2020, Algorithm 2.
    """
    schedule = shorten(schedule, num_steps, sampler="ancestral")
    check_prediction(schedule, prediction)
    if variance == "learned" and skips_timesteps(schedule):
        raise ValueError("a 'learned' variance belongs to single steps: use all timesteps, or another sampler")

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        time = schedule.num_steps - 1 - k
        t = jnp.full(state.x.shape[:1], time, jnp.int32)
        output = predict(state.x, schedule.timesteps[t])
        reverse: Reverse = p_mean_variance(
            schedule, output, state.x, t, prediction=prediction, variance=variance, clip_x0=clip_x0
        )
        x = p_sample(reverse, t, step_noise(keys, time, state.x.shape[1:]))
        return Chain(x.astype(state.x.dtype)), ChainInfo(time, state.x, reverse.x0)

    return Sampler(schedule.num_steps, np.arange(schedule.num_steps)[::-1], Chain, step)
