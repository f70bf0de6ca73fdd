"""Every loss that a configuration can ask for trains: it ends better than it began."""

import jax
import numpy as np
import pytest

from ddpm_jax.config import DataConfig, LossConfig
from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.sources import load_source
from ddpm_jax.schedules import make_schedule
from ddpm_jax.time_sampling import make_time_sampler
from ddpm_jax.training.objective import make_objective
from ddpm_jax.training.step import Batch, make_training_step
from ddpm_jax.unet import UNet

T, BATCH, STEPS = 20, 32, 120
LOSSES = {
    "simple": (LossConfig(), "fixed_large", "eps"),
    "min-SNR on v, antithetic": (LossConfig(weighting="min_snr", time_sampling="antithetic"), "fixed_small", "v"),
    "truncated SNR on x0": (LossConfig(weighting="truncated_snr"), "fixed_small", "x0"),
    "hybrid": (LossConfig(kind="hybrid", vlb_weight=0.01), "learned_range", "eps"),
    "bound, loss-aware": (LossConfig(kind="vlb", time_sampling="loss_aware"), "learned_range", "eps"),
    "bound of a fixed variance, exact decoder": (LossConfig(kind="vlb", cdf="erf"), "fixed_small", "eps"),
}


@pytest.fixture(scope="module")
def source():
    return load_source(DataConfig())


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_ends_better_than_it_began(name, source, training):
    loss, variance, prediction = LOSSES[name]
    channels = 2 if variance == "learned_range" else 1
    unet = UNet(
        width=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_groups=4,
        dropout=0.0,
        out_channels=channels,
        num_classes=10,
    )
    schedule = make_schedule("linear", T, beta_start=5e-3, beta_end=0.5)
    optimizer, times = training.adam(3e-3), make_time_sampler(loss.time_sampling, T)
    objective = make_objective(loss, schedule, prediction=prediction, variance=variance)
    step = jax.jit(
        make_training_step(
            training.as_network(unet),
            optimizer,
            objective,
            times,
            num_steps=schedule.num_steps,
            ema_decay=0.9,
            label_dropout=0.1,
        ),
        donate_argnums=1,
    )
    state = training.state_of(jax.random.key(0), unet, optimizer, time_sampler=times)
    losses = []
    for number in range(STEPS):
        indices = batch_indices(0, number, batch_size=BATCH, num_examples=source.num_examples)
        batch = Batch(source.read(indices), np.arange(BATCH, dtype=np.int32), source.labels[indices])
        state, info = step(jax.random.key(1), state, batch)
        losses.append(float(info.loss))
    assert np.isfinite(losses).all()
    # The first steps see an untrained network. A tenth is far more than the losses of two windows differ by chance.
    assert np.mean(losses[-30:]) < 0.9 * np.mean(losses[:10])
    if loss.time_sampling == "loss_aware":
        assert int(state.time_sampling.counts.sum()) == STEPS * BATCH
        assert int(state.time_sampling.counts.min()) >= 10  # so that the last steps drew times by their losses
