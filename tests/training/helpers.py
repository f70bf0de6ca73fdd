"""What the tests of training share: small networks, and the one place where steps and states are made."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddpm_jax import keys as per_image_keys
from ddpm_jax.config import LossConfig, TrainConfig
from ddpm_jax.convolution import conv_general_dilated
from ddpm_jax.networks import from_linen
from ddpm_jax.run.build import image_shape
from ddpm_jax.schedules import make_schedule
from ddpm_jax.time_sampling import uniform
from ddpm_jax.training.objective import make_objective
from ddpm_jax.training.state import init_state, make_optimizer
from ddpm_jax.training.step import make_training_step
from ddpm_jax.unet import AttentionBlock, ResnetBlock, UNet, dropout, time_embedding

IMAGE = (8, 8, 1)
T = 100


class Linear(nn.Module):
    """eps = scale x_t + offset, each pixel with its own scale: its gradient can be worked out by hand."""

    num_classes: int = 0

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        scale = self.param("scale", nn.initializers.constant(0.3), x.shape[1:])
        offset = self.param("offset", nn.initializers.constant(-0.1), (1,))
        return scale[None] * x + offset[None, None, None]


class OneOfEach(nn.Module):
    """A block of each kind that the U-Net is made of, so that its step compiles in a fraction of the time."""

    num_classes: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, t, labels=None, *, dropout_keys=None):
        convolve = lambda channels, name, **more: nn.Conv(
            channels, (3, 3), dtype=self.dtype, conv_general_dilated=conv_general_dilated, name=name, **more
        )
        embedding = nn.Dense(16, dtype=self.dtype, name="embedding")(time_embedding(t, 8))
        h = convolve(8, "conv_in")(x)
        h = ResnetBlock(8, 4, 0.1, self.dtype, name="block")(h, embedding, dropout_keys)
        h = convolve(8, "downsample", strides=2)(h)
        h = AttentionBlock(1, 4, self.dtype, name="attention")(h)
        h = convolve(1, "conv_out")(jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2))
        return h.astype(jnp.float32)


def as_network(network, image_shape=IMAGE):
    """Makes a network of a Linen module; a network stays what it is."""
    return from_linen(network, image_shape) if isinstance(network, nn.Module) else network


def linear_network(config):
    """Stands in for `build_network`: the linear network for the images of a configuration."""
    return from_linen(Linear(), image_shape(config))


class Probe:
    """The linear network, which writes down what it is given: one row per image, whatever the layout."""

    def __init__(self):
        self.linear, self.rows = as_network(Linear()), []
        self.network = self.linear._replace(apply=self._apply)

    def _apply(self, params, x_t, times, labels=None, *, dropout_keys):
        mask = dropout(jnp.ones_like(x_t), per_image_keys.fold(dropout_keys, 3), 0.5)
        jax.debug.callback(self._note, jax.random.key_data(dropout_keys), x_t, times, mask)
        return self.linear.apply(params, x_t, times)

    def _note(self, *columns):
        self.rows += zip(*(np.asarray(column) for column in columns), strict=True)

    def take(self):
        """Gives (keys, x_t, times, masks) of all images seen since the last call, in the order of their keys."""
        jax.effects_barrier()
        rows, self.rows = sorted(self.rows, key=lambda row: tuple(row[0])), []
        return tuple(np.stack(column) for column in zip(*rows, strict=True))


def tiny_unet():
    return UNet(
        width=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_groups=4,
        dropout=0.1,
        out_channels=1,
    )


def step_of(network, optimizer, *, schedule=None, times=None, ema_decay=0.9, random_flip=True, **rest):
    """Makes a training step with the paper's choices but for what is said."""
    schedule = make_schedule("linear", T) if schedule is None else schedule
    objective = make_objective(LossConfig(), schedule, prediction="eps", variance="fixed_large")
    times = uniform(schedule.num_steps) if times is None else times
    return make_training_step(
        as_network(network),
        optimizer,
        objective,
        times,
        num_steps=schedule.num_steps,
        ema_decay=ema_decay,
        random_flip=random_flip,
        **rest,
    )


def state_of(key, network, optimizer, **rest):
    return init_state(key, as_network(network), optimizer, **rest)


def drawn_state(network, optimizer, seed=0):
    """A first state whose weights are all far from 0: the paper's hide what passes through its near-zero layers."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1], initial=1.0) if leaf.ndim > 1 else 10.0
        return (random.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    state = jax.eval_shape(lambda key: init_state(key, as_network(network), optimizer), jax.random.key(0))
    params = jax.tree.map(draw, state.params)
    return dataclasses.replace(
        state, step=np.int32(0), params=params, ema=params, opt_state=jax.device_get(optimizer.init(params))
    )


def lenient(optimizer):
    """An optimizer allowed to mix types, which optax's Adam does."""

    def update(gradient, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(gradient, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def adam(rate=1e-2):
    return lenient(optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8))


def paper_optimizer(**choices):
    return lenient(make_optimizer(TrainConfig(**choices)))


def sgd_or_adam(adam):
    """SGD and Adam in one program, for a network that takes long to compile; keeps the gradient that it was given."""

    def init(params):
        gradient = jax.tree.map(jnp.zeros_like, params)
        return {"gradient": gradient, "adam": adam.init(params), "use_adam": jnp.array(False)}

    def update(gradient, state, params=None):
        by_adam, adam_state = adam.update(gradient, state["adam"], params)
        choose = lambda step, slope: jnp.where(state["use_adam"], step, -0.02 * slope)
        return jax.tree.map(choose, by_adam, gradient), {**state, "gradient": gradient, "adam": adam_state}

    return optax.GradientTransformation(init, update)


def images_of(step, number=16, image_shape=IMAGE):
    """Pictures for one step, no two steps alike."""
    return np.random.default_rng(step).integers(0, 256, (number, *image_shape)).astype(np.uint8)
