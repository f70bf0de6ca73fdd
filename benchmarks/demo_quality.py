"""How good the images of `make demo` are, by a judge that had no part in choosing its settings.

    python benchmarks/demo_quality.py run runs/digits
    python benchmarks/demo_quality.py flax

`run` draws 512 images from a run of the digits by Algorithm 2. `flax` trains the digits example of Flax's documentation
(see flax_example.py) on all ten digits, and draws as many from it. Both are judged by a classifier of
one hidden layer, fitted to all 1,797 digits: its mean confidence, the images of each class, and the Frechet distance in
its 64 hidden features to the real images, which is also given between two halves of the real images.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import tyro
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from ddpm_jax.evaluation.frechet import frechet_distance

IMAGES, HALVINGS = 512, 20


def judge(images: np.ndarray) -> str:
    """Returns the verdict on (N, 64) images in [0, 1]."""
    real, labels = load_digits(return_X_y=True)
    real = real / 16
    with threadpoolctl.threadpool_limits(1):
        network = MLPClassifier((64,), max_iter=1000, random_state=0).fit(real, labels)
    features = lambda images: np.maximum(images @ network.coefs_[0] + network.intercepts_[0], 0)
    confidence = network.predict_proba(images).max(axis=1).mean()
    counts = np.bincount(network.predict(images), minlength=10)
    of_real = []
    for seed in range(HALVINGS):
        a, b = np.array_split(np.random.default_rng(seed).permutation(len(real)), 2)
        of_real.append(frechet_distance(features(real[a]), features(real[b])))
    distance = frechet_distance(features(images), features(real))
    return (
        f"{len(images)} images: confidence {confidence:.3f}, smallest class {counts.min()}, Frechet distance "
        f"{distance:.3f}; between halves of the real images {np.mean(of_real):.3f}; ratio "
        f"{distance / np.mean(of_real):.2f}"
    )


def run(folder: tyro.conf.Positional[Path], seed: int = 0) -> None:
    """Judges a run of the digits.

    Args:
      folder: of the run.
      seed: of the images.
    """
    from ddpm_jax.generation.job import load_job, run_job
    from ddpm_jax.generation.sampler_config import SamplerConfig

    job = load_job(folder, seed=seed, step=None, sampler=SamplerConfig())
    out = folder / "samples" / f"judged_seed_{seed}"
    run_job(job, out, number=IMAGES, batch_size=IMAGES, format="npz")
    images = np.load(out / "samples.npz")["arr_0"]
    print(judge(images.reshape(len(images), -1) / 255))


def flax(steps: int = 2000, features: int = 64, batch_size: int = 177, seed: int = 0) -> None:
    """Trains the example of Flax's documentation, and judges it. The defaults are the example's.

    Args:
      steps: of training, the first half of them warmup.
      features: channels of the first level.
      batch_size: images a step.
      seed: of weights, noise and images.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from flax_example import Network, flow_matching_loss
    from jax.experimental.ode import odeint

    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-4, steps // 2, steps, end_value=5e-6)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, weight_decay=2e-5))
    real = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)
    graph, params = nnx.split(Network(features, rngs=nnx.Rngs(seed)))

    @jax.jit
    def step(params: Any, state: optax.OptState, key: jax.Array) -> tuple[Any, optax.OptState, jax.Array]:
        of_images, of_times, of_noise = jax.random.split(key, 3)
        x1 = jax.random.choice(of_images, real, (batch_size,))
        t = nnx.sigmoid(jax.random.normal(of_times, (batch_size,)))
        x0 = jax.random.normal(of_noise, x1.shape)
        loss_of = lambda params: flow_matching_loss(nnx.merge(graph, params), x1, t, x0)
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def draw(params: Any, x0: jax.Array) -> jax.Array:
        network = nnx.merge(graph, params)
        velocity = lambda x, t: network(x, jnp.full(len(x), t))
        return odeint(velocity, x0, jnp.array([0.0, 1.0]), rtol=1e-3, atol=1e-3)[-1]

    key, state = jax.random.key(seed), optimizer.init(params)
    size, begun = sum(leaf.size for leaf in jax.tree.leaves(params)), 0.0
    for number in range(steps):
        params, state, loss = step(params, state, jax.random.fold_in(key, number))
        if number == 0 or number % 100 == 99:
            loss.block_until_ready()
            begun = begun or time.perf_counter()  # without the compilation
            print(f"step {number + 1}, loss {loss:.4f}, {time.perf_counter() - begun:.0f} s", flush=True)
    images = draw(params, jax.random.normal(jax.random.fold_in(key, steps), (IMAGES, 8, 8, 1)))
    print(f"{size:,} parameters, {steps} steps of {batch_size} images")
    print(judge(np.asarray(jnp.clip(images, -1, 1), np.float64).reshape(IMAGES, -1) / 2 + 0.5))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "flax": flax})
