# %% [markdown]
# # DDPM, from one noisy digit to guided samples
#
# Denoising diffusion (Ho, Jain & Abbeel 2020) on scikit-learn's 8x8 handwritten digits: the forward process, the loss,
# a network, Algorithms 1 and 2, fast samplers, guidance, and bits/dim of held-out digits. Everything runs on a CPU in
# about a quarter of an hour. Each cell uses the public functions of `ddpm_jax`; the training loop is written out here.
#
# In Colab, install the package first: put this repository's address into
# `%pip install "ddpm_jax[run] @ git+https://.."` and run it.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import ddpm_jax as ddpm


def show(images, columns=10, title=""):
    """Shows (N, 8, 8, 1) images in [-1, 1] as a grid."""
    pixels = np.pad(ddpm.to_uint8(jnp.asarray(images))[..., 0], [(0, 0), (1, 1), (1, 1)])
    rows = len(pixels) // columns
    grid = pixels.reshape(rows, columns, 10, 10).swapaxes(1, 2).reshape(10 * rows, 10 * columns)
    plt.figure(figsize=(0.6 * columns, 0.6 * rows + 0.3))
    plt.imshow(grid, cmap="gray", vmin=0, vmax=255)
    plt.axis("off")
    plt.title(title, fontsize=9)
    plt.show()


# %% [markdown]
# ## The data
#
# 1,797 scans with 17 gray levels, in [-1, 1] as all images here. Every fifth is held out.

# %%
digits = load_digits()
held_out = np.arange(len(digits.images)) % 5 == 4
pixels = jnp.asarray(digits.images[..., None] / 8 - 1, jnp.float32)
train_images, train_labels = pixels[~held_out], jnp.asarray(digits.target[~held_out])
test_images = pixels[held_out]
show(train_images[:20], title=f"{len(train_images)} digits to train on, {len(test_images)} held out")

# %% [markdown]
# ## The forward process
#
# q adds noise in T = 1000 small steps (eq. 2), and any of them can be reached in one jump (eq. 4):
#
# $$x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$$
#
# `Schedule` holds the tables of the paper's linear schedule. Timesteps count from 0, so t = 999 is the paper's 1000.

# %%
schedule = ddpm.make_schedule("linear", 1000)
t = jnp.array([0, 50, 100, 200, 300, 400, 500, 600, 800, 999])
eps = jax.random.normal(jax.random.key(0), (10, 8, 8, 1))
x0 = jnp.repeat(train_images[3:4], 10, axis=0)
show(ddpm.q_sample(schedule, x0, t, eps), title="one digit at t = 0, 50, 100, 200, .., 999")

# %%
plt.figure(figsize=(6, 2.2))
plt.plot(schedule.sqrt_alphas_bar, label=r"signal $\sqrt{\bar\alpha_t}$")
plt.plot(schedule.sqrt_one_minus_alphas_bar, label=r"noise $\sqrt{1 - \bar\alpha_t}$")
plt.xlabel("t")
plt.legend()
plt.show()

# %% [markdown]
# ## The network and the loss
#
# The network sees x_t and t and predicts the noise; its loss is the mean squared error (eq. 14, `l_simple`). It is the
# paper's U-Net, much smaller. It is class-conditional: in one image of ten the label is replaced by "no label" (class
# 10), so that the same network also learns the digits without one. Guidance will need both.

# %%
CLASSES, NO_LABEL = 10, 10
unet = ddpm.UNet(
    width=32, channel_mult=(1, 2), num_res_blocks=1, num_groups=8, out_channels=1, dropout=0.0, num_classes=CLASSES
)
params = unet.init(jax.random.key(0), train_images[:1], jnp.zeros(1, jnp.int32))["params"]
print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters")


def network(params, labels):
    """Returns the network as the mathematics takes it: a function of x_t and t."""
    return lambda x_t, t: unet.apply({"params": params}, x_t, t, labels)


# %% [markdown]
# ## Algorithm 1: training
#
# Random images, timesteps and noise; one step of Adam; and an exponential moving average (EMA) of the weights, from
# which samples are drawn. Each image of a batch has a random key of its own, so its numbers do not depend on the batch
# or on the devices that share it.

# %%
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0, 2e-3, 100)))
BATCH = 64


@jax.jit
def train_step(params, ema, opt_state, key):
    image_key, t_key, eps_key, drop_key = jax.random.split(key, 4)
    index = jnp.arange(BATCH)
    chosen = jax.random.randint(image_key, (BATCH,), 0, len(train_images))
    labels = jnp.where(jax.random.uniform(drop_key, (BATCH,)) < 0.1, NO_LABEL, train_labels[chosen])
    t = ddpm.uniform_times(ddpm.image_keys(t_key, index), schedule.num_steps)

    def loss_fn(params):
        predict = network(params, labels)
        losses, _ = ddpm.l_simple(ddpm.image_keys(eps_key, index), schedule, predict, train_images[chosen], t)
        return losses.mean()

    loss, gradient = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, ema, 0.003), opt_state, loss


# %%
STEPS = 3000
ema, opt_state, history = params, optimizer.init(params), []
for key in jax.random.split(jax.random.key(1), STEPS):
    params, ema, opt_state, loss = train_step(params, ema, opt_state, key)
    history.append(loss)
losses = np.asarray(jnp.stack(history))
print(f"mean loss of the last 500 steps: {losses[-500:].mean():.4f}")

# %%
plt.figure(figsize=(6, 2.2))
plt.semilogy(losses.reshape(-1, 50).mean(axis=1))
plt.xlabel("step / 50")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Algorithm 2: sampling
#
# The reverse process starts from noise and takes 1000 steps. `ancestral` is Algorithm 2; `sample` runs it as one
# `lax.scan`, so the whole chain is one compiled program.

# %%
labels = jnp.arange(40) % CLASSES


@jax.jit
def draw(params, key):
    return ddpm.sample(key, ddpm.ancestral(schedule, network(params, labels)), (40, 8, 8, 1))


show(draw(ema, jax.random.key(2)), title="1000 steps of Algorithm 2; column k was asked for digit k")

# %% [markdown]
# The chain at a few of its timesteps, above; below, the network's prediction of x_0 from each.

# %%
shown = [999, 800, 600, 400, 300, 200, 150, 100, 50, 0]


@jax.jit
def draw_trajectory(params, key):
    sampler = ddpm.ancestral(schedule, network(params, jnp.array([5])))
    return ddpm.sample_trajectory(key, sampler, (1, 8, 8, 1), at=shown)[1]


frames = draw_trajectory(ema, jax.random.key(3))
show(jnp.concatenate([frames.x_t[:, 0], frames.x0[:, 0]]), title="x_t and the predicted x_0 at t = 999, 800, .., 0")

# %% [markdown]
# ## Fewer steps
#
# The same weights, other samplers: DDIM (Song et al. 2021) and the solvers DPM-Solver++ and UniPC. Each starts from
# the same noise, so each row shows the same digits.


# %%
def draw_with(name, num_steps):
    @jax.jit
    def draw(params, key):
        sampler = ddpm.make_sampler(name, schedule, network(params, labels[:10]), num_steps=num_steps)
        return ddpm.sample(key, sampler, (10, 8, 8, 1))

    return draw(ema, jax.random.key(4))


rows = [draw_with(*row) for row in [("ddim", 1000), ("ddim", 10), ("dpm++2m", 10), ("unipc", 10)]]
show(jnp.concatenate(rows), title="DDIM in 1000 steps; DDIM, DPM-Solver++, UniPC in 10")

# %% [markdown]
# ## Guidance
#
# Classifier-free guidance (Ho & Salimans 2022) extrapolates from the prediction without a label to the one with it:
#
# $$\tilde\epsilon = s\, \epsilon_\theta(x_t, c) - (s - 1)\, \epsilon_\theta(x_t)$$
#
# Scale s = 1 is no guidance; larger scales trade variety for digits that are typical of their class.


# %%
def draw_guided(scale):
    @jax.jit
    def draw(params, key):
        with_labels = lambda x_t, t, labels: network(params, labels)(x_t, t)
        predict = ddpm.guided(with_labels, labels[:20], null_label=NO_LABEL, guidance_scale=scale)
        return ddpm.sample(key, ddpm.make_sampler("dpm++2m", schedule, predict, num_steps=20), (20, 8, 8, 1))

    return draw(ema, jax.random.key(5))


show(jnp.concatenate([draw_guided(1.0), draw_guided(4.0)]), title="scale 1 (two rows) and scale 4 (two rows)")

# %% [markdown]
# ## Bits/dim
#
# The variational bound (eq. 5) is a sum of one term per timestep and says how many bits a held-out image costs. Here it
# is computed without labels, for 64 held-out digits. Their pixels have 17 levels but pay for 256, as any 8-bit image,
# so the number compares only with others of this data set.


# %%
@jax.jit
def bound(params, x0):
    predict = network(params, jnp.full(len(x0), NO_LABEL))
    return ddpm.bound_terms(ddpm.image_keys(jax.random.key(6), jnp.arange(len(x0))), schedule, predict, x0)


result = bound(ema, ddpm.to_float(ddpm.to_uint8(test_images[:64])))
bits = ddpm.total_bits(result)
print(f"{bits.mean():.2f} bits/dim (standard error {bits.std() / np.sqrt(len(bits)):.2f})")
plt.figure(figsize=(6, 2.2))
plt.loglog(1 + np.arange(1000), result.terms.mean(axis=1))
plt.xlabel("t + 1")
plt.ylabel("bits/dim of the term")
plt.show()

# %% [markdown]
# Most of the bits are spent at the first timesteps, on details that nobody sees: that is why the paper trains on
# L_simple, which weighs the others up.
#
# ## Where to go from here
#
# `python train.py` does all of this for any images, on any number of devices, and resumes exactly where it was stopped;
# `sample.py` and `evaluate.py` work from the folder that it writes. Beside the paper, read `ddpm_jax/forward.py`,
# `reverse.py`, `losses.py` and `samplers/ancestral.py`: each is a page or two.
