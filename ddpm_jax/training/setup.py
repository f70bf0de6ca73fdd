"""From a configuration to what trains: network, optimizer, objective and where they run."""

import typing
from collections.abc import Sequence

import jax
import optax
from jax import Array

from ddpm_jax.averages import gamma_of
from ddpm_jax.config import Config
from ddpm_jax.keys import make_key
from ddpm_jax.networks import Network
from ddpm_jax.run.build import build_network, build_schedule
from ddpm_jax.run.record import LearningRates, rates_from
from ddpm_jax.schedules import Schedule
from ddpm_jax.system.errors import UserError
from ddpm_jax.time_sampling import TimeSampler, make_time_sampler
from ddpm_jax.training.objective import Objective, make_objective
from ddpm_jax.training.parallel import Layout, make_layout
from ddpm_jax.training.state import TrainState, init_state, make_optimizer
from ddpm_jax.training.step import TrainingStep, make_training_step

# The uses of the run's seed.
_INIT, _STEPS, _SAMPLES, _HELD_OUT = range(4)


class Keys(typing.NamedTuple):
    """The keys of a run, from its seed."""

    init: Array
    """Of the first parameters."""
    run: Array
    """Of all steps."""
    samples: Array
    """Of the grids that are drawn on the way."""
    held_out: Array
    """Of the evaluations on held-out images."""


class Setup(typing.NamedTuple):
    """What a run is made of."""

    config: Config
    keys: Keys
    network: Network
    schedule: Schedule
    optimizer: optax.GradientTransformation
    objective: Objective
    time_sampler: TimeSampler
    layout: Layout
    rates: LearningRates = ()

    def resumed(self, so_far: LearningRates, step: int) -> "Setup":
        """Returns the parts of the run resumed from a step, whose learning rate may be another from there on.

        Args:
          so_far: the learning rates that it had.
          step: number of steps done.
        """
        rates = rates_from(so_far, self.config, step)
        return self._replace(rates=rates, optimizer=make_optimizer(self.config.train, rates))

    @property
    def gammas(self) -> tuple[float, ...]:
        """Exponents of the power-function averages; () if no snapshots of them are saved."""
        return tuple(map(gamma_of, self.config.ema.sigma_rels)) if self.config.ema.snapshots_every else ()

    def init(self, key: Array) -> TrainState:
        """Makes the first state."""
        return init_state(
            key,
            self.network,
            self.optimizer,
            time_sampler=self.time_sampler,
            power_averages=len(self.gammas),
        )

    def make_step(self, **over_devices: typing.Any) -> TrainingStep:
        """Makes the pure step; `Layout.lift` says over which devices."""
        return make_training_step(
            self.network,
            self.optimizer,
            self.objective,
            self.time_sampler,
            num_steps=self.schedule.num_steps,
            ema_decay=self.config.train.ema_decay,
            gammas=self.gammas,
            random_flip=self.config.data.flip,
            label_dropout=self.config.train.label_dropout,
            **over_devices,
        )


def make_setup(config: Config, *, network: Network | None = None, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Makes the parts of a run.

    Args:
      config: the whole configuration, valid.
      network: the network; the one that the configuration describes if not given.
      devices: those that `train.devices` chooses from; all there are if not given.

    Raises:
      UserError: the batch cannot be shared out evenly over the devices, or there are fewer than requested.
    """
    seed_key = make_key(config.train.seed)
    schedule = build_schedule(config)
    return Setup(
        config,
        Keys(*(jax.random.fold_in(seed_key, use) for use in (_INIT, _STEPS, _SAMPLES, _HELD_OUT))),
        build_network(config) if network is None else network,
        schedule,
        make_optimizer(config.train),
        make_objective(
            config.loss, schedule, prediction=config.diffusion.prediction, variance=config.diffusion.variance
        ),
        make_time_sampler(config.loss.time_sampling, schedule.num_steps),
        make_layout(
            config.train.parallel,
            batch_size=config.train.batch_size,
            parts=config.train.grad_accum_steps,
            fsdp=config.train.fsdp,
            devices=_devices(config.train.devices, jax.devices() if devices is None else devices),
        ),
    )


def _devices(number: int, devices: Sequence[jax.Device]) -> Sequence[jax.Device]:
    if number > len(devices):
        raise UserError(
            f"train.devices={number}, but JAX sees {len(devices)}: use --train.devices {len(devices)}, or 0"
        )
    if number and jax.process_count() > 1:
        raise UserError("train.devices chooses devices of one host: leave it out where several hosts train together")
    return devices[: number or None]
