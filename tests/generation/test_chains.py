"""From a run's configuration and a sampler's to a chain: labels, guidance, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.generation.chains import labels_of, make_chain
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.networks import Network
from ddpm_jax.run.build import build_network
from ddpm_jax.samplers.chain import sample
from ddpm_jax.system.errors import UserError

CONFIG = Config(
    data=DataConfig(height=4, width=4, channels=1),
    diffusion=DiffusionConfig(num_steps=20, beta_start=0.01, beta_end=0.5),
    model=ModelConfig(
        width=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, num_classes=3
    ),
)
UNDROPPED = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, label_dropout=0.0))
UNCONDITIONAL = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=0))


def test_labels_go_round():
    indices = jnp.arange(2, 7)
    np.testing.assert_array_equal(labels_of(CONFIG, SamplerConfig(), indices), [2, 0, 1, 2, 0])
    np.testing.assert_array_equal(labels_of(CONFIG, SamplerConfig(labels=(2, 0)), indices), [2, 0, 2, 0, 2])
    assert labels_of(UNCONDITIONAL, SamplerConfig(), indices) is None


@pytest.mark.parametrize(
    ("config", "sampler", "line"),
    [
        (
            UNCONDITIONAL,
            SamplerConfig(labels=(1,)),
            "--labels needs a class-conditional run; this one is unconditional",
        ),
        (UNCONDITIONAL, SamplerConfig(guidance_scale=2.0), "--guidance-scale needs a class-conditional run"),
        (CONFIG, SamplerConfig(labels=(0, 3)), "--labels 3: the run's classes are 0 to 2"),
        (UNDROPPED, SamplerConfig(guidance_scale=2.0), "--guidance-scale 2.0 needs a run trained with label dropout"),
        (CONFIG, SamplerConfig(clip="dynamic", dynamic_quantile=1.5), "--dynamic-quantile 1.5 must be above 0"),
        (CONFIG, SamplerConfig(clip="on", dynamic_quantile=0.9), "--dynamic-quantile 0.9 needs --clip dynamic"),
        (CONFIG, SamplerConfig(guidance_interval=(0.1, 1)), "--guidance-interval needs --guidance-scale"),
        (CONFIG, SamplerConfig(guidance_scale=2.0, guidance_interval=(3, 2)), "--guidance-interval: no timestep has"),
        (CONFIG, SamplerConfig(guidance_scale=-0.5), "--guidance-scale -0.5 must be at least 0"),
        (CONFIG, SamplerConfig(guidance_scale=float("nan")), "--guidance-scale nan must be at least 0"),
        (CONFIG, SamplerConfig(steps=21), "can be run in 1 to 20 steps, not in 21"),
        (CONFIG, SamplerConfig(eta=0.5), "eta=0.5 applies only to the sampler 'ddim', not to 'ancestral'"),
        (
            CONFIG,
            SamplerConfig(sampler="unipc", eps_after_clipping="network"),
            "eps_after_clipping=network applies only to the sampler 'ddim'",
        ),
        (CONFIG, SamplerConfig(sampler="ddim", eta=1.5), "eta=1.5 is outside"),
    ],
)
def test_invalid_options_are_one_line(config, sampler, line):
    with pytest.raises(UserError, match=line) as error:
        make_chain(config, build_network(config), sampler)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("sampler", "steps"), [(SamplerConfig(), 20), (SamplerConfig(sampler="unipc", steps=7), 7)])
def test_a_chain_has_the_requested_steps(sampler, steps):
    assert make_chain(CONFIG, build_network(CONFIG), sampler)(None, jnp.zeros(1, jnp.int32)).num_steps == steps


def test_clipping_is_an_option():
    # A network that predicts little noise predicts images beyond [-1, 1].
    network = Network(lambda key: {}, lambda params, x_t, t, labels: 0.5 * jnp.tanh(x_t))

    def drawn(**options):
        make = make_chain(UNCONDITIONAL, network, SamplerConfig(sampler="ddim", steps=5, **options))
        return sample(jax.random.key(0), make({}, None), (8, 4, 4, 1))

    default, on, off = drawn(), drawn(clip="on"), drawn(clip="off")
    own_eps, recomputed = (
        drawn(clip="on", eps_after_clipping="network"),
        drawn(clip="on", eps_after_clipping="recompute"),
    )
    np.testing.assert_array_equal(default, on)
    np.testing.assert_array_equal(recomputed, on)
    assert abs(on).max() <= 1 < abs(off).max()
    assert abs(own_eps - recomputed).max() > 0.01
    np.testing.assert_array_equal(drawn(clip="off", eps_after_clipping="network"), off)
