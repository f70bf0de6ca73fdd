"""The samplers against diffusers' schedulers: the same output of a network, the same noise, the same step.

Both take every step from the same images (diffusers'), so that a difference is that of one step and does not grow with
the chain. diffusers works its tables out in float32, where 1 - alphas_bar is off by 1.7e-4 of itself at t = 0; it is
handed alphas_bar in float64 instead. What is left is its float32 arithmetic: 1e-5 of the largest pixel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.reverse import DynamicThreshold
from ddpm_jax.samplers.ancestral import ancestral
from ddpm_jax.samplers.ddim import ddim
from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m, dpm_solver_pp_2m_sde
from ddpm_jax.samplers.respacing import evenly_spaced, leading, respace, trailing
from ddpm_jax.samplers.unipc import unipc
from ddpm_jax.schedules import make_betas, zero_terminal_snr

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T, STEPS = 1000, 20
BETAS = make_betas("linear", T)
IMAGES = (3, 4, 6, 2)
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def to_torch(images):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()


def from_torch(images):
    return images.permute(0, 2, 3, 1).float().numpy()


def predict(x_t, t):
    """A network of no closed form: nonlinear in x_t and t, about as large as noise."""
    return jnp.sin(2 * x_t + t.astype(jnp.float32)[:, None, None, None] / 200) + 0.3 * x_t


def predict_with_variance(x_t, t):
    return jnp.concatenate([predict(x_t, t), jnp.sin(3 * x_t)], axis=-1)


@pytest.fixture
def noise(monkeypatch):
    """(STEPS + 1, B, H, W, C): x_T, and what both sides draw at step 0, 1, .. from the noise."""
    noise = np.random.default_rng(0).normal(size=(STEPS + 1, *IMAGES)).astype(np.float32)
    for module in ("samplers.ancestral", "samplers.ddim", "samplers.multistep"):
        monkeypatch.setattr(f"ddpm_jax.{module}.step_noise", lambda keys, time, shape: jnp.asarray(noise)[STEPS - time])
    return noise


def in_float64(scheduler, times):
    """Hands a scheduler the exact alphas_bar, and checks that it would visit the given times."""
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - BETAS))
    scheduler.set_timesteps(len(times))
    assert scheduler.timesteps.tolist() == times[::-1].tolist()
    return scheduler


def clipping(clip_x0):
    """Options of a scheduler, whose dynamic thresholding is capped at 1 if nothing else is said."""
    if not isinstance(clip_x0, DynamicThreshold):
        return dict(clip_sample=clip_x0)
    return dict(thresholding=True, dynamic_thresholding_ratio=clip_x0.quantile, sample_max_value=1e6)


def assert_same_steps(sampler, network, scheduler, noise, step):
    """`step(k, output, t, x)` is diffusers'."""
    keys = jax.random.split(jax.random.key(0), IMAGES[0])
    ours = jax.jit(sampler.step)
    state = sampler.init(jnp.asarray(noise[0]))
    assert sampler.num_steps == len(scheduler.timesteps)
    for k, t in enumerate(scheduler.timesteps):
        output = network(state.x, jnp.full(IMAGES[0], int(t)))
        expected = from_torch(step(k, to_torch(output), t, to_torch(state.x)))
        state, _ = ours(keys, state, jnp.int32(k))
        scale = max(1, np.abs(expected).max())
        np.testing.assert_allclose(state.x, expected, rtol=0, atol=1e-5 * scale, err_msg=f"step {k}")
        state = state._replace(x=jnp.asarray(expected))
    assert 0.1 < np.abs(expected).max() < 100


@pytest.mark.parametrize("clip_x0", [True, False, DynamicThreshold(0.9)])
@pytest.mark.parametrize(("eta", "prediction"), [(0.0, "eps"), (1.0, "eps"), (0.4, "eps"), (0.4, "x0"), (0.4, "v")])
def test_ddim(noise, eta, prediction, clip_x0):
    for eps_after_clipping in ("recompute", "network") if clip_x0 else ("recompute",):
        times = leading(T, STEPS)
        scheduler = diffusers.DDIMScheduler(T, prediction_type=PREDICTIONS[prediction], **clipping(clip_x0))
        in_float64(scheduler, times)
        sampler = ddim(
            respace(BETAS, times),
            predict,
            eta=eta,
            prediction=prediction,
            clip_x0=clip_x0,
            eps_after_clipping=eps_after_clipping,
        )

        def step(k, output, t, x, *, scheduler=scheduler, eps_after_clipping=eps_after_clipping):
            drawn = dict(eta=eta, variance_noise=to_torch(noise[1 + k])) if eta else {}
            return scheduler.step(
                output, t, x, use_clipped_model_output=eps_after_clipping == "recompute", **drawn
            ).prev_sample

        assert_same_steps(sampler, predict, scheduler, noise, step)


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_strided_ancestral(noise, monkeypatch, variance, clip_x0):
    times = evenly_spaced(T, STEPS)
    scheduler = diffusers.DDPMScheduler(T, variance_type=variance, clip_sample=clip_x0, timestep_spacing="linspace")
    in_float64(scheduler, times)
    # Its own rule for the step before does not hold for rounded times, unless they are given one by one.
    scheduler.set_timesteps(timesteps=times[::-1].tolist())
    network = predict_with_variance if variance == "learned_range" else predict
    sampler = ancestral(respace(BETAS, times), network, variance=variance, clip_x0=clip_x0)

    def step(k, output, t, x):
        drawn = lambda *_, **__: to_torch(noise[1 + k])
        monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", drawn)
        return scheduler.step(output, t, x).prev_sample

    assert_same_steps(sampler, network, scheduler, noise, step)


def solver_times(spacing):
    # diffusers' solvers leave the first time out of their "linspace".
    return evenly_spaced(T, STEPS + 1)[1:] if spacing == "linspace" else trailing(T, STEPS)


@pytest.mark.parametrize(
    ("spacing", "prediction"), [("linspace", "eps"), ("trailing", "eps"), ("trailing", "x0"), ("trailing", "v")]
)
@pytest.mark.parametrize(
    ("make", "algorithm"), [(dpm_solver_pp_2m, "dpmsolver++"), (dpm_solver_pp_2m_sde, "sde-dpmsolver++")]
)
def test_dpm_solver_pp(noise, make, algorithm, prediction, spacing):
    times = solver_times(spacing)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        T,
        beta_schedule="linear",
        algorithm_type=algorithm,
        prediction_type=PREDICTIONS[prediction],
        timestep_spacing=spacing,
    )
    in_float64(scheduler, times)
    sampler = make(respace(BETAS, times), predict, prediction=prediction, clip_x0=False)

    def step(k, output, t, x):
        drawn = dict(variance_noise=to_torch(noise[1 + k])) if "sde" in algorithm else {}
        return scheduler.step(output, t, x, **drawn).prev_sample

    assert_same_steps(sampler, predict, scheduler, noise, step)


@pytest.mark.parametrize(
    ("order", "spacing", "prediction"),
    [
        (1, "linspace", "eps"),
        (2, "linspace", "eps"),
        (3, "linspace", "eps"),
        (3, "trailing", "eps"),
        (3, "trailing", "x0"),
        (3, "trailing", "v"),
    ],
)
def test_unipc(noise, order, prediction, spacing):
    times = solver_times(spacing)
    scheduler = diffusers.UniPCMultistepScheduler(
        T, solver_order=order, prediction_type=PREDICTIONS[prediction], timestep_spacing=spacing
    )
    in_float64(scheduler, times)
    sampler = unipc(respace(BETAS, times), predict, order=order, prediction=prediction, clip_x0=False)
    step = lambda k, output, t, x: scheduler.step(output, t, x).prev_sample
    assert_same_steps(sampler, predict, scheduler, noise, step)


def test_zero_terminal_snr():
    theirs = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(torch.from_numpy(BETAS)).numpy()
    np.testing.assert_allclose(zero_terminal_snr(BETAS), theirs, rtol=0, atol=1e-14)
