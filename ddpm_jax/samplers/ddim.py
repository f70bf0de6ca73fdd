r"""DDIM: chains with any subset of the timesteps and any amount of noise (Song et al. 2021).

At eta = 1 it is the ancestral chain; at eta = 0 only x_T is random, and the chain is a map between noise and images
that can be run in both directions.

>>> schedule = make_schedule("linear", 1000)
>>> nothing = lambda x_t, t: jnp.zeros_like(x_t)                         # a network that always predicts 0
>>> sample(jax.random.key(0), ddim(schedule, nothing, num_steps=10), (2, 4, 4, 1)).shape
(2, 4, 4, 1)
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from ddpm_jax.forward import as_floats, at, per_image, where_positive
from ddpm_jax.names import EpsAfterClipping, Prediction, Variance
from ddpm_jax.reverse import Clip, Predict, clip, from_x0, predict_eps, predict_x0, split_output
from ddpm_jax.samplers.chain import Chain, ChainInfo, Sampler, step_noise
from ddpm_jax.samplers.respacing import check_prediction, shorten
from ddpm_jax.schedules import Schedule, concrete


def ddim(
    schedule: Schedule,
    predict: Predict,
    *,
    num_steps: int | None = None,
    eta: ArrayLike = 0.0,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip_x0: Clip = True,
    eps_after_clipping: EpsAfterClipping = "recompute",
) -> Sampler:
    r"""Makes the DDIM sampler.

    .. math::
      x_{t-1} &= \sqrt{\bar\alpha_{t-1}}\, \hat x_0 + \sqrt{1 - \bar\alpha_{t-1} - \sigma_t^2}\, \hat\epsilon
                 + \sigma_t z \\
      \sigma_t &= \eta \sqrt{\tilde\beta_t}

    The last step returns :math:`\hat x_0`, without noise.

    Args:
      schedule: tables of the chain's steps, possibly respaced (see `respacing.respace`).
      predict: the network.
      num_steps: N, in [1, T], for a chain of N of the timesteps, spaced as `make_sampler` does; all if None.
      eta: the amount of noise, a scalar in [0, 1], possibly traced: 0 is deterministic; 1 is `ancestral` with
        variance "fixed_small".
      prediction: what the network predicts; "mean" only on a schedule that skips no timesteps.
      variance: the kind of variance; the half of the output for a learned one is ignored.
      clip_x0: whether and how the predicted clean image is clipped at each step, see `reverse.clip`.
      eps_after_clipping: "recompute" derives eps from the clipped x0, as improved-diffusion does (diffusers'
        `use_clipped_model_output=True`); "network" keeps the network's eps, as diffusers does by default. Without
        clipping they are the same.

    Returns:
      a `Sampler` with one step per timestep of the schedule.

    Raises:
      ValueError: `eta` is outside [0, 1], the prediction is "mean" and the schedule skips timesteps, or
        as `check_end`.

    Song et al. 2021, eqs. 12 and 16.
    """
    known = concrete(eta)
    if jnp.ndim(eta) or (known is not None and not 0 <= known <= 1):
        raise ValueError(f"eta={eta} is outside [0, 1]: 0 is deterministic, 1 adds the noise of the ancestral chain")
    schedule = shorten(schedule, num_steps, sampler="ddim")
    check_prediction(schedule, prediction)
    noisy = known is None or known > 0

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        time = schedule.num_steps - 1 - k
        t = jnp.full(state.x.shape[:1], time, jnp.int32)
        output, _ = split_output(predict(state.x, schedule.timesteps[t]), variance=variance)
        x0 = predict_x0(schedule, output, state.x, t, prediction=prediction)
        eps = predict_eps(schedule, output, state.x, t, prediction=prediction)
        if clip_x0:
            x0 = clip(x0, clip_x0)
            if eps_after_clipping == "recompute":
                eps = from_x0(schedule, x0, state.x, t, target="eps")
        one_minus_alphas_bar_prev = jnp.where(
            t > 0, schedule.one_minus_alphas_bar[t - 1], jnp.zeros_like(schedule.one_minus_alphas_bar[t])
        )
        # 1 - alphas_bar_prev - sigma^2, as a product: the difference of two close numbers would lose digits.
        sqrt_alphas = where_positive(lambda alpha: alpha**0.5, schedule.alphas[t])
        left = (1 - eta**2) + eta**2 * schedule.posterior_mean_coef_x_t[t] * sqrt_alphas
        direction = where_positive(jnp.sqrt, one_minus_alphas_bar_prev * left)
        x = per_image(jnp.sqrt(schedule.alphas_bar_prev[t]), x0) * x0 + per_image(direction, eps) * eps
        if noisy:
            sigma = eta * per_image(where_positive(jnp.sqrt, schedule.posterior_variance[t]), x)
            x = x + sigma * step_noise(keys, time, state.x.shape[1:])
        return Chain(x.astype(state.x.dtype)), ChainInfo(time, state.x, x0)

    return Sampler(schedule.num_steps, np.arange(schedule.num_steps)[::-1], Chain, step)


def ddim_inversion(
    schedule: Schedule,
    predict: Predict,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
) -> Sampler:
    r"""Makes the DDIM inversion: the chain from images to the noise from which `ddim` with eta = 0 recovers them.

    .. math:: x_{t+1} = \sqrt{\bar\alpha_{t+1}}\, \hat x_0 + \sqrt{1 - \bar\alpha_{t+1}}\, \hat\epsilon

    Start it at `init(images)`. It ends at the schedule's last timestep, where `ddim` begins; improved-diffusion takes
    one step more, to noise without signal, which `ddim` does not invert. The two invert each other up to an error
    that falls with the number of steps, if x0 is not clipped. The network's input at the first step, which starts
    from clean images, is the schedule's first timestep.

    Args:
      schedule: the schedule of the `ddim` that is to be inverted.
      predict: the network.
      prediction: what the network predicts; "mean" only on a schedule that skips no timesteps.
      variance: the kind of variance; the half of the output for a learned one is ignored.

    Returns:
      a `Sampler` with one step per timestep of the schedule, in increasing order.

    Raises:
      ValueError: the prediction is "mean" and the schedule skips timesteps.

    Song et al. 2021, sec. 4.3 and eq. 14.
    """
    check_prediction(schedule, prediction)

    def step(keys: Array, state: Chain, k: Array) -> tuple[Chain, ChainInfo]:
        del keys  # nothing is drawn
        t_next = jnp.full(state.x.shape[:1], k, jnp.int32)
        t = jnp.maximum(t_next - 1, 0)
        x_t = as_floats(state.x, "x0")
        output, _ = split_output(predict(state.x, schedule.timesteps[t]), variance=variance)
        eps = predict_eps(schedule, output, x_t, t, prediction=prediction)
        # The images that the chain starts from have no noise: they are their own x0.
        x0 = jnp.where(per_image(t_next, x_t) > 0, predict_x0(schedule, output, x_t, t, prediction=prediction), x_t)
        x = at(schedule.sqrt_alphas_bar, t_next, x0) * x0 + at(schedule.sqrt_one_minus_alphas_bar, t_next, x0) * eps
        return Chain(x.astype(state.x.dtype)), ChainInfo(t[0], state.x, x0)

    timesteps = np.maximum(np.arange(schedule.num_steps) - 1, 0)
    return Sampler(schedule.num_steps, timesteps, Chain, step)
