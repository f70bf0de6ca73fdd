"""DDPM on handwritten digits in one page: `python examples/minimal.py` draws minimal.png in about two minutes.

The diffusion comes from the public API; the network, the optimizer and the loop are yours to change.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from sklearn.datasets import load_digits

import ddpm_jax

train_steps, sample_steps = map(int, sys.argv[1:] or (1500, 1000))
images = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # (1797, 8, 8, 1) in [-1, 1]

schedule = ddpm_jax.make_schedule("linear", 1000)
unet = ddpm_jax.UNet(width=32, channel_mult=(1, 2), num_res_blocks=1, num_groups=8, out_channels=1, dropout=0.0)
params = unet.init(jax.random.key(0), images[:1], jnp.zeros(1, jnp.int32))["params"]
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))


def network(params):
    """Returns the network as the mathematics takes it: a function of x_t and t."""
    return lambda x_t, t: unet.apply({"params": params}, x_t, t)


@jax.jit
def train_step(params, ema, opt_state, key, batch_size=32):
    """Takes one step of Algorithm 1: random images, timesteps and noise, each image from a key of its own."""
    image_key, t_key, eps_key = jax.random.split(key, 3)
    index = jnp.arange(batch_size)
    x0 = jax.random.choice(image_key, images, (batch_size,))
    t = ddpm_jax.uniform_times(ddpm_jax.image_keys(t_key, index), schedule.num_steps)

    def loss_fn(params):
        losses, _ = ddpm_jax.l_simple(ddpm_jax.image_keys(eps_key, index), schedule, network(params), x0, t)
        return losses.mean()

    loss, gradient = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, ema, 0.005), opt_state, loss


@jax.jit
def draw(params, key):
    """Runs Algorithm 2, from noise to 64 images; "dpm++2m" needs only 20 steps."""
    sampler = ddpm_jax.make_sampler("ancestral", schedule, network(params), num_steps=sample_steps)
    return ddpm_jax.sample(key, sampler, (64, 8, 8, 1))


ema, opt_state = params, optimizer.init(params)
for step, key in enumerate(jax.random.split(jax.random.key(1), train_steps)):
    params, ema, opt_state, loss = train_step(params, ema, opt_state, key)
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.3f}", flush=True)

digits = np.pad(ddpm_jax.to_uint8(draw(ema, jax.random.key(2)))[..., 0], [(0, 0), (1, 1), (1, 1)])
grid = digits.reshape(8, 8, 10, 10).swapaxes(1, 2).reshape(80, 80)
Image.fromarray(grid).resize((640, 640), Image.Resampling.NEAREST).save("minimal.png")
