"""What the tests of runs share: a small configuration, and how to change a field of one."""

import dataclasses

import pytest

from ddpm_jax.config import Config, ModelConfig, TrainConfig


@pytest.fixture(scope="session")
def small():
    return Config(
        model=ModelConfig(width=8, channel_mult=(1, 2), attention_resolutions=(4,), num_groups=4),
        train=TrainConfig(steps=1000, warmup_steps=10, ema_decay=0.9),
    )


@pytest.fixture(scope="session")
def with_value():
    """Replaces the field with a dotted name."""

    def with_value(config, name, value):
        section, _, last = name.rpartition(".")
        if not section:
            return dataclasses.replace(config, **{last: value})
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{last: value})})

    return with_value
