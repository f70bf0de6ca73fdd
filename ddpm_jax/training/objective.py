"""The loss that a configuration asks for, as one function of images and times."""

from collections.abc import Callable

from jax import Array

from ddpm_jax.config import LossConfig
from ddpm_jax.losses import l_hybrid, l_simple, l_vlb, snr_weights
from ddpm_jax.names import Prediction, Variance
from ddpm_jax.reverse import Predict
from ddpm_jax.schedules import Schedule

Objective = Callable[[Array, Predict, Array, Array], Array]
"""(keys, predict, x0, t) to the loss of each image, (B,): its mean over uniform times is what is to be small."""


def make_objective(config: LossConfig, schedule: Schedule, *, prediction: Prediction, variance: Variance) -> Objective:
    """Makes the loss of a run.

    Args:
      config: which loss, with which weights.
      schedule: tables of T steps.
      prediction: what the network's output means.
      variance: the variance of the reverse steps.

    Returns:
      the function.
    """

    def weights(t: Array) -> Array:
        return snr_weights(
            schedule, t, weighting=config.weighting, prediction=prediction, min_snr_gamma=config.min_snr_gamma
        )

    def simple(keys: Array, predict: Predict, x0: Array, t: Array) -> Array:
        losses, _ = l_simple(keys, schedule, predict, x0, t, prediction=prediction, variance=variance)
        return weights(t) * losses

    def vlb(keys: Array, predict: Predict, x0: Array, t: Array) -> Array:
        losses, _ = l_vlb(keys, schedule, predict, x0, t, prediction=prediction, variance=variance, cdf=config.cdf)
        return losses

    def hybrid(keys: Array, predict: Predict, x0: Array, t: Array) -> Array:
        losses, _ = l_hybrid(
            keys,
            schedule,
            predict,
            x0,
            t,
            prediction=prediction,
            variance=variance,
            vlb_weight=config.vlb_weight,
            weights=weights(t),
            cdf=config.cdf,
        )
        return losses

    return {"simple": simple, "vlb": vlb, "hybrid": hybrid}[config.kind]
