"""From a configuration and a choice of sampler to a chain: labels, guidance, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.generation import sampler_config
from ddpm_jax.generation.sampler_config import SamplerConfig, labels_of, make_chain
from ddpm_jax.networks import parameter_shapes, predict_with
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
UNCONDITIONAL = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, num_classes=0))


def test_labels_go_round():
    indices = jnp.arange(2, 7)
    np.testing.assert_array_equal(labels_of(CONFIG, SamplerConfig(), indices), [2, 0, 1, 2, 0])
    np.testing.assert_array_equal(labels_of(CONFIG, SamplerConfig(labels=(2, 0)), indices), [2, 0, 2, 0, 2])
    assert labels_of(UNCONDITIONAL, SamplerConfig(), indices) is None


@pytest.mark.parametrize(
    ("config", "choice", "line"),
    [
        (UNCONDITIONAL, SamplerConfig(labels=(1,)), "--labels: this run is unconditional"),
        (UNCONDITIONAL, SamplerConfig(guidance_scale=2.0), "--guidance-scale: this run is unconditional"),
        (CONFIG, SamplerConfig(labels=(0, 3)), "--labels 3: the run's classes are 0 to 2"),
        (CONFIG, SamplerConfig(guidance_scale=-0.5), "--guidance-scale -0.5 must be at least 0"),
        (CONFIG, SamplerConfig(guidance_scale=float("nan")), "--guidance-scale nan must be at least 0"),
        (CONFIG, SamplerConfig(steps=21), "can be run in 1 to 20 steps, not in 21"),
        (CONFIG, SamplerConfig(eta=0.5), "eta=0.5 is of the sampler 'ddim'"),
        (
            CONFIG,
            SamplerConfig(sampler="unipc", eps_after_clipping="network"),
            "eps_after_clipping=network is of the sampler 'ddim'",
        ),
        (CONFIG, SamplerConfig(sampler="ddim", eta=1.5), "eta=1.5 is outside"),
    ],
)
def test_what_cannot_be_is_one_line(config, choice, line):
    with pytest.raises(UserError, match=line) as error:
        make_chain(config, choice)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("choice", "steps"), [(SamplerConfig(), 20), (SamplerConfig(sampler="unipc", steps=7), 7)])
def test_a_chain_is_as_long_as_asked(choice, steps):
    assert make_chain(CONFIG, choice)(None, jnp.zeros(1, jnp.int32)).num_steps == steps


def test_clipping_is_a_choice(monkeypatch):
    """A network that sees no noise predicts images beyond [-1, 1]."""
    monkeypatch.setattr(sampler_config, "predict_with", lambda *arguments, **choice: lambda x_t, t: 0.5 * jnp.tanh(x_t))

    def drawn(**choice):
        make = make_chain(UNCONDITIONAL, SamplerConfig(sampler="ddim", steps=5, **choice))
        return sample(jax.random.key(0), make(None, None), (8, 4, 4, 1))

    as_the_run, on, off = drawn(), drawn(clip="on"), drawn(clip="off")
    network_s, anew = drawn(clip="on", eps_after_clipping="network"), drawn(clip="on", eps_after_clipping="recompute")
    np.testing.assert_array_equal(as_the_run, on)
    np.testing.assert_array_equal(anew, on)
    assert abs(on).max() <= 1 < abs(off).max()
    assert abs(network_s - anew).max() > 0.01
    np.testing.assert_array_equal(drawn(clip="off", eps_after_clipping="network"), off)


def test_the_network_is_told_its_labels_and_guidance_pushes():
    network = build_network(CONFIG)
    x_t, t, labels = jax.random.normal(jax.random.key(0), (3, 4, 4, 1)), jnp.array([1, 5, 19]), jnp.array([0, 1, 2])
    shapes = parameter_shapes(network)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), jnp.float32), shapes)
    told = predict_with(network, params, labels)(x_t, t)
    not_told = predict_with(network, params, None)(x_t, t)
    np.testing.assert_allclose(network.apply(params, x_t, t, jnp.full(3, 3)), not_told, atol=1e-6)
    assert np.abs(told - not_told).max() > 1e-3
    pushed = predict_with(network, params, labels, guidance_scale=3.0)(x_t, t)
    np.testing.assert_allclose(pushed, 3 * told - 2 * not_told, atol=1e-4)


def test_labels_for_an_unconditional_network_are_refused():
    network = build_network(UNCONDITIONAL)
    with pytest.raises(ValueError, match="unconditional network"):
        network.apply({}, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
