"""What is built from a configuration is what it says; a user's own network that does not fit is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.run.build import build_network, build_schedule, build_unet
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import UserError


def test_the_schedule_is_the_one_configured(small):
    schedule = build_schedule(dataclasses.replace(small, diffusion=DiffusionConfig(num_steps=5, beta_end=0.3)))
    assert schedule.num_steps == 5
    assert float(schedule.betas[0]) == pytest.approx(1e-4)
    assert float(schedule.betas[-1]) == pytest.approx(0.3)


def test_the_unet_is_the_one_configured(small, with_value):
    model = dataclasses.replace(
        small.model,
        mid_attention=False,
        num_head_channels=4,
        norm_eps=1e-5,
        symmetric_downsampling=True,
        freq_shift=0,
        cos_first=True,
        timestep_scale=0.25,
        embed_channels=16,
        scale_shift_norm=True,
        resblock_updown=True,
    )
    unet = build_unet(with_value(dataclasses.replace(small, model=model), "data.channels", 3))
    for field in dataclasses.fields(ModelConfig):
        assert field.name == "network" or getattr(unet, field.name) == getattr(model, field.name)
    assert (unet.out_channels, unet.dtype, unet.remat) == (3, jnp.float32, False)
    assert build_unet(with_value(small, "diffusion.variance", "learned_range")).out_channels == 2
    assert build_unet(with_value(small, "train.remat", True)).remat
    assert build_unet(with_value(small, "train.precision", "bfloat16")).dtype == jnp.bfloat16


def test_channels_that_are_not_known_yet_are_refused():
    with pytest.raises(ValueError, match="channels is None"):
        build_unet(Config(data=DataConfig(channels=None)))


FILE = """
import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from ddpm_jax.networks import Network

class Dense(nn.Module):
    channels: int = 1
    @nn.compact
    def __call__(self, x_t, t):
        return nn.Dense(self.channels)(x_t)

params = lambda key: {"w": jnp.ones(())}
module = lambda config: Dense(config.data.channels)
functions = lambda config: Network(params, lambda params, x_t, t, labels=None, *, dropout_keys=None: params["w"] * x_t)
wrong_shape = lambda config: Dense(3)
half = lambda config: Network(params, lambda params, x_t, t, labels: x_t.astype(jnp.bfloat16))
a_list = lambda config: Network(lambda key: [jnp.ones(())], lambda params, x_t, t, labels: x_t)
dots = lambda config: Network(lambda key: {"a.b": jnp.ones(())}, lambda params, x_t, t, labels: x_t)
nothing = lambda config: Network(lambda key: {}, lambda params, x_t, t, labels: x_t)
no_network = lambda config: "unet"
fails = lambda config: 1 / 0
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "my.py"
    file.write_text(FILE)

    def make(function, **model):
        # 6 x 10 pixels, which no U-Net of four levels takes: its rules are not those of another network.
        data = DataConfig(height=6, width=10, channels=1)
        return Config(data=data, model=ModelConfig(network=f"{file}:{function}", **model))

    return make


@pytest.mark.parametrize("function", ["module", "functions"])
def test_a_module_and_plain_functions_are_networks(own, function):
    chosen = own(function)
    validate(chosen)
    network = build_network(chosen)
    x_t, t = jnp.ones((3, 6, 10, 1)), jnp.arange(3)
    assert network.apply(network.init(jax.random.key(0)), x_t, t).shape == x_t.shape
    assert build_network(chosen) is network


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "wrong_shape",
            r"ValueError: the output of x_t \[2, 6, 10, 1\] must be .*\], not float32\[2, 6, 10, 3\]",
        ),
        ("half", r"must be float32\[2, 6, 10, 1\], not bfloat16"),
        ("a_list", r"nested dict of arrays under string names without dots, not \[0\]"),
        ("dots", r"under string names without dots, not \['a.b'\]"),
        ("nothing", "the network has no parameters"),
        ("no_network", "must return a flax.linen.Module or a ddpm_jax.Network, not str"),
        ("fails", "line 22: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_fitting_network_is_one_line(own, function, message):
    with pytest.raises(UserError, match=message) as error:
        build_network(own(function))
    assert str(error.value).startswith("model.network: ")
    assert f"my.py:{function}" in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_must_be_those_of_the_configuration(own):
    with pytest.raises(UserError, match=r"a network of 0 classes, but model.num_classes=10"):
        build_network(own("functions", num_classes=10))
    with pytest.raises(UserError, match="10 classes for a network whose __call__ takes no `labels`"):
        build_network(own("module", num_classes=10))


def test_a_learned_variance_needs_twice_the_channels(own):
    chosen = own("functions")
    chosen = dataclasses.replace(chosen, diffusion=dataclasses.replace(chosen.diffusion, variance="learned_range"))
    with pytest.raises(UserError, match=r"must be float32\[2, 6, 10, 2\], not float32\[2, 6, 10, 1\]"):
        build_network(chosen)
