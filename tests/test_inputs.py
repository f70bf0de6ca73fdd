"""What the mathematics takes, and what it refuses in one line: the same rule in every function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddpm_jax import editing, forward, guidance, likelihood, losses, pixels, reverse, time_sampling
from ddpm_jax import keys as per_image_keys
from ddpm_jax.samplers.by_name import SAMPLERS, make_sampler
from ddpm_jax.samplers.chain import run_chain, sample, sample_trajectory
from ddpm_jax.samplers.ddim import ddim, ddim_inversion
from ddpm_jax.samplers.respacing import choose_timesteps, respace
from ddpm_jax.schedules import make_betas, make_schedule, schedule_from_betas
from ddpm_jax.unet import UNet

T, B = 8, 4
SCHEDULE = make_schedule("linear", T, beta_start=0.02, beta_end=0.5)
ENDS_IN_0 = schedule_from_betas([0.1, 0.3, 0.6, 1.0])
KEY = jax.random.key(3)
IMAGES = jax.random.normal(jax.random.key(4), (B, 4, 4, 2))
TIMES = jnp.arange(B) * 2
CHAINS = {**SAMPLERS, "inversion": ddim_inversion}
UNET = UNet(
    width=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_groups=4,
    out_channels=2,
    num_classes=3,
)


def tanh(x_t, t):
    return jnp.tanh(x_t)


@functools.cache
def params():
    params = UNET.init(jax.random.key(0), IMAGES, TIMES)
    return jax.tree.map(lambda leaf: leaf + 0.05, params)


# Functions of (images, t), each of one image at a time: everything that takes both.
ELEMENTWISE = {
    "q_step": lambda x, t: forward.q_step(SCHEDULE, x, t, 2 * x),
    "q_sample": lambda x, t: forward.q_sample(SCHEDULE, x, t, 2 * x),
    "q_marginal": lambda x, t: forward.q_marginal(SCHEDULE, x, t).mean,
    "q_posterior": lambda x, t: forward.q_posterior(SCHEDULE, x, 2 * x, t).mean,
    "predict_x0": lambda x, t: reverse.predict_x0(SCHEDULE, x, 2 * x, t, prediction="eps"),
    "from_x0": lambda x, t: reverse.from_x0(SCHEDULE, x, 2 * x, t, target="v"),
    "p_mean_variance": lambda x, t: reverse.p_mean_variance(SCHEDULE, x, 2 * x, t).mean,
    "regression_target": lambda x, t: losses.regression_target(SCHEDULE, x, t, 2 * x, prediction="v"),
    "diffuse": lambda x, t: editing.diffuse(KEY, SCHEDULE, x, t),
}
LOSSES = {
    "l_simple": lambda x, t: losses.l_simple(KEY, SCHEDULE, tanh, x, t)[0],
    "l_vlb": lambda x, t: losses.l_vlb(KEY, SCHEDULE, tanh, x, t)[0],
    "bound_at": lambda x, t: likelihood.bound_at(KEY, SCHEDULE, tanh, x, t[None]).terms[0],
}


@pytest.mark.parametrize("name", [*ELEMENTWISE, *LOSSES])
def test_pixels_that_are_not_floats(name):
    function = (ELEMENTWISE | LOSSES)[name]
    with pytest.raises(TypeError, match=r"is uint8, not floats: ddpm_jax.to_float converts uint8 pixels to \[-1, 1\]$"):
        function(np.full(IMAGES.shape, 200, np.uint8), TIMES)


def test_pixels_that_are_not_floats_in_the_network_and_in_chains():
    uint8 = np.zeros(IMAGES.shape, np.uint8)
    start = lambda make: run_chain(KEY, (chain := make(SCHEDULE, tanh)), chain.init(jnp.asarray(uint8)), 0, num_steps=T)
    for function in (
        lambda: UNET.apply(params(), uint8, TIMES),
        lambda: editing.mix(KEY, SCHEDULE, uint8, uint8, jnp.ones(1), TIMES),
        lambda: editing.repaint(SCHEDULE, ddim(SCHEDULE, tanh), uint8, uint8[..., :1]),
        *(functools.partial(start, make) for make in CHAINS.values()),
        lambda: pixels.to_uint8(uint8),
    ):
        with pytest.raises(TypeError, match="is uint8, not floats"):
            function()
    with pytest.raises(TypeError, match="to_float converts uint8 pixels, not float32"):
        pixels.to_float(IMAGES)


@pytest.mark.parametrize("name", [name for name in (*ELEMENTWISE, *LOSSES) if name != "diffuse"])
def test_timesteps_out_of_range(name):
    function = (ELEMENTWISE | LOSSES)[name]
    for t in (T, -1):
        with pytest.raises(ValueError, match=rf"^timestep {t} is outside \[0, {T}\): t counts from 0$"):
            function(IMAGES, jnp.array([0, 1, t, 2]))
    with pytest.raises(TypeError, match="^timesteps are integers"):
        function(IMAGES, jnp.ones(B))


def test_other_indices_out_of_range():
    with pytest.raises(ValueError, match=rf"level=.*{T + 1}.* is outside \[0, {T}\]"):
        ELEMENTWISE["diffuse"](IMAGES, TIMES.at[1].set(T + 1))
    chain = ddim(SCHEDULE, tanh)
    with pytest.raises(ValueError, match=f"steps 3 to {T + 3} are not within a chain of {T} steps"):
        run_chain(KEY, chain, chain.init(IMAGES), 3, num_steps=T)
    with pytest.raises(ValueError, match="the index of an image is at least 0, not -2"):
        per_image_keys.image_keys(KEY, jnp.array([0, -2]))
    for labels in ([0, 1, 2, 4], [0, 1, -1, 2]):
        for function in (
            lambda labels: UNET.apply(params(), IMAGES, TIMES, labels),
            lambda labels: guidance.guided(lambda x, t, labels: x, labels, null_label=3, guidance_scale=2.0),
        ):
            with pytest.raises(ValueError, match=r"^label (4|-1) is outside \[0, 3\]: there are 3 classes"):
                function(jnp.array(labels))
            with pytest.raises(TypeError, match="^labels are integers"):
                function(jnp.ones(B))


@given(shape=st.lists(st.integers(1, 3), max_size=4), t=st.integers(0, T - 1))
@settings(max_examples=10)
def test_any_rank(shape, t):
    """A batch of images of any shape, and one image without a batch: as the same numbers in rows of pixels."""
    size = 2 * int(np.prod(shape))
    rows = jax.random.normal(KEY, (3, 1, 1, size))
    t = jnp.array([t, 0, T - 1])
    for name, function in (ELEMENTWISE | LOSSES).items():
        expected = function(rows, t)
        actual = function(rows.reshape(3, *shape, 2), t)
        if name in LOSSES:  # sums in another order
            np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)
            continue
        np.testing.assert_array_equal(actual.reshape(rows.shape), expected, err_msg=name)
        if name != "diffuse":  # which draws
            one = jax.vmap(function)(rows.reshape(3, *shape, 2), t)
            np.testing.assert_allclose(one.reshape(rows.shape), expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("shape", [(B, 6, 2), (B, 2, 3, 2, 1)])
def test_chains_of_any_rank(shape):
    size = int(np.prod(shape[1:]))
    for make in SAMPLERS.values():
        rows = sample(KEY, make(SCHEDULE, tanh), (B, 1, 1, size))
        np.testing.assert_array_equal(sample(KEY, make(SCHEDULE, tanh), shape).reshape(rows.shape), rows)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_keeps_half_precision(name, dtype):
    seen = []

    def predict(x_t, t):
        seen.append(x_t.dtype)
        return jnp.tanh(x_t)

    def run(x):
        chain = CHAINS[name](SCHEDULE, predict)
        return run_chain(KEY, chain, chain.init(x), 0, num_steps=chain.num_steps).x

    half = run(IMAGES.astype(dtype))
    assert {half.dtype, *seen} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(half.astype(jnp.float32), run(IMAGES), atol=0.1)


def test_editing_keeps_half_precision():
    half = IMAGES.astype(jnp.bfloat16)
    chain = SAMPLERS["ancestral"](SCHEDULE, tanh)
    fill = editing.repaint(SCHEDULE, chain, half, half[..., :1] > 0, jump=2, resamples=2)
    each = editing.between(chain, jnp.array([1, 2, 3, 8]), jnp.array([0, 1, 0, 4]))
    for sampler in (fill, each):
        assert run_chain(KEY, sampler, sampler.init(half), 0, num_steps=sampler.num_steps).x.dtype == jnp.bfloat16
    for name, function in ELEMENTWISE.items():
        assert function(half, TIMES).dtype == jnp.float32, name


def test_both_forms_of_keys_and_one_for_a_batch():
    old, typed = jax.random.PRNGKey(3), KEY
    keys = per_image_keys.image_keys(typed, jnp.arange(B))
    chain = ddim(SCHEDULE, tanh, eta=1.0)
    dropout = lambda keys: UNET.apply(params(), IMAGES, TIMES, dropout_keys=keys)
    for function in (
        lambda key: sample(key, chain, IMAGES.shape),
        lambda key: editing.encode_decode(key, SCHEDULE, chain, IMAGES, level=3, draws=2),
        lambda key: editing.share_latents(key, chain, IMAGES.shape, level=3, draws=2)[1],
    ):
        np.testing.assert_array_equal(function(old), function(typed))
    for function in (
        lambda keys: losses.l_simple(keys, SCHEDULE, tanh, IMAGES, TIMES)[0],
        lambda keys: likelihood.bound_terms(keys, SCHEDULE, tanh, IMAGES).terms,
        lambda keys: run_chain(keys, chain, chain.init(IMAGES), 0, num_steps=T).x,
        lambda keys: pixels.flip(keys, IMAGES),
        dropout,
    ):
        for given_keys in (jax.random.key_data(keys), typed, old):
            np.testing.assert_array_equal(function(given_keys), function(keys))
        with pytest.raises(ValueError, match="^a batch of 4 needs one key or 4 keys, not keys of shape"):
            function(keys[:3])
    draw = lambda keys: time_sampling.uniform_times(keys, T)
    np.testing.assert_array_equal(draw(jax.random.key_data(keys)), draw(keys))
    with pytest.raises(ValueError, match="^one key per image is needed"):
        draw(typed)
    for wrong in (0, jnp.ones(2), jnp.ones(3, jnp.uint32)):
        with pytest.raises(TypeError, match="random key") as error:
            sample(wrong, chain, IMAGES.shape)
        assert "\n" not in str(error.value)


def test_linen_s_own_stream_of_dropout():
    plain = UNET.apply(params(), IMAGES, TIMES)
    dropped = UNET.apply(params(), IMAGES, TIMES, rngs={"dropout": KEY})
    assert not np.array_equal(plain, dropped)
    np.testing.assert_array_equal(dropped, UNET.apply(params(), IMAGES, TIMES, rngs={"dropout": KEY}))
    with pytest.raises(ValueError, match="dropout keys were given twice"):
        UNET.apply(params(), IMAGES, TIMES, dropout_keys=KEY, rngs={"dropout": KEY})


@pytest.mark.parametrize("name", CHAINS)
def test_eps_where_nothing_of_x0_is_left(name):
    line = "^prediction 'eps' cannot tell x_0 at the last step of this schedule, where alphas_bar is 0: use 'v' or 'x0'"
    with pytest.raises(ValueError, match=line):
        CHAINS[name](ENDS_IN_0, tanh)
    chain = CHAINS[name](ENDS_IN_0, tanh, prediction="v")
    assert np.isfinite(run_chain(KEY, chain, chain.init(IMAGES), 0, num_steps=4).x).all()


def test_eps_where_nothing_of_x0_is_left_in_losses():
    t = jnp.array([0, 1, 2, 3])
    two = lambda x_t, t: jnp.concatenate([x_t, x_t], axis=-1)
    for function in (
        lambda t: losses.l_vlb(KEY, ENDS_IN_0, tanh, IMAGES, t)[0],
        lambda t: losses.l_hybrid(KEY, ENDS_IN_0, two, IMAGES, t)[0],
        lambda t: likelihood.bound_at(KEY, ENDS_IN_0, tanh, IMAGES, t[None]).terms,
        lambda t: losses.snr_weights(ENDS_IN_0, t, weighting="min_snr", prediction="eps"),
    ):
        for run in (function, jax.jit(function)):
            with pytest.raises(ValueError, match="cannot tell x_0 at the last step"):
                run(t)
    # What does not divide by it.
    assert np.isfinite(losses.l_simple(KEY, ENDS_IN_0, tanh, IMAGES, t)[0]).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_schedule_that_is_made_inside_jit(name):
    expected = sample(KEY, SAMPLERS[name](SCHEDULE, tanh), IMAGES.shape)

    @jax.jit
    def draw(key):
        schedule = make_schedule("linear", T, beta_start=0.02, beta_end=0.5)
        return sample(key, SAMPLERS[name](schedule, tanh), IMAGES.shape)

    np.testing.assert_allclose(draw(KEY), expected, rtol=1e-6, atol=1e-6)


def test_a_traced_schedule_is_refused_where_its_numbers_are_needed():
    by_hand = lambda make: lambda schedule: sample(KEY, make(schedule, tanh), IMAGES.shape)
    solvers = [by_hand(make) for name, make in SAMPLERS.items() if name not in ("ancestral", "ddim")]
    for function in (
        *solvers,
        by_hand(lambda schedule, predict: make_sampler("ddim", schedule, predict, num_steps=3)),
        by_hand(lambda schedule, predict: ddim(schedule, predict, num_steps=3)),
        lambda schedule: respace(schedule.betas, [1, 2]).betas,
        lambda schedule: schedule_from_betas(schedule.betas).betas,
    ):
        with pytest.raises(
            TypeError, match="^the schedule is traced .*: make the sampler outside of the traced function"
        ):
            jax.jit(function)(SCHEDULE)


@pytest.mark.parametrize("options", [dict(eta=0.0), dict(eta=0.5), dict(eta=1.0), None])
@pytest.mark.parametrize("clip_x0", [True, False])
def test_gradients_with_respect_to_the_tables_are_finite(options, clip_x0):
    def total(schedule):
        make = SAMPLERS["ancestral" if options is None else "ddim"]
        images = sample(KEY, make(schedule, tanh, prediction="v", clip_x0=clip_x0, **options or {}), IMAGES.shape)
        bits = losses.l_vlb(KEY, schedule, tanh, IMAGES, TIMES % schedule.num_steps, prediction="v")[0]
        steps = forward.q_step(schedule, IMAGES, jnp.full(B, schedule.num_steps - 1), IMAGES)
        variances = likelihood.optimal_log_variances(schedule, jnp.zeros(schedule.num_steps))
        return images.sum() + bits.sum() + steps.sum() + variances.sum()

    for schedule in (SCHEDULE, ENDS_IN_0):
        gradient = jax.grad(total, allow_int=True)(schedule)
        for name, leaf in vars(gradient).items():
            infinite = name.startswith("sqrt_recip") and schedule is ENDS_IN_0  # infinite themselves, and not used
            assert leaf.dtype == jax.dtypes.float0 or infinite or np.isfinite(leaf).all(), name


def test_a_traced_guidance_scale_and_eta():
    labels = jnp.array([0, 1, 2, 0])

    def predict(x_t, t, labels):
        return 0.5 * jnp.tanh(x_t) + forward.per_image(0.1 * labels.astype(jnp.float32), x_t)

    def draw(scale, eta):
        network = guidance.guided(predict, labels, null_label=3, guidance_scale=scale)
        return sample(KEY, ddim(SCHEDULE, network, eta=eta), IMAGES.shape)

    for scale, eta in ((0.0, 0.0), (1.0, 0.5), (3.0, 1.0)):
        np.testing.assert_allclose(jax.jit(draw)(scale, eta), draw(scale, eta), rtol=1e-5, atol=1e-5)
    scales = jnp.array([0.0, 1.0, 3.0, 1.5])
    each = jax.jit(draw)(scales, 0.5)
    for i, scale in enumerate(scales.tolist()):
        np.testing.assert_allclose(each[i], draw(scale, 0.5)[i], rtol=1e-5, atol=1e-5)
    assert np.isfinite(jax.grad(lambda eta: draw(2.0, eta).sum())(0.5))
    with pytest.raises(ValueError, match="guidance_scale=-1.0 must be at least 0"):
        draw(-1.0, 0.0)
    with pytest.raises(ValueError, match="eta=1.5 is outside"):
        draw(1.0, jnp.float32(1.5))


@pytest.mark.parametrize("name", SAMPLERS)
def test_num_steps_and_a_schedule_where_betas_were(name):
    betas = make_betas("linear", 50, beta_start=0.002, beta_end=0.3)
    schedule = schedule_from_betas(betas)
    by_betas = sample(KEY, make_sampler(name, betas, tanh, num_steps=5), IMAGES.shape)
    for sampler in (make_sampler(name, schedule, tanh, num_steps=5), SAMPLERS[name](schedule, tanh, num_steps=5)):
        assert sampler.num_steps == 5
        np.testing.assert_allclose(sample(KEY, sampler, IMAGES.shape), by_betas, rtol=1e-4, atol=1e-4)
    whole = sample(KEY, SAMPLERS[name](schedule, tanh), IMAGES.shape)
    np.testing.assert_array_equal(sample(KEY, make_sampler(name, schedule, tanh), IMAGES.shape), whole)
    with pytest.raises(ValueError, match="1 to 50 steps, not in 51"):
        SAMPLERS[name](schedule, tanh, num_steps=51)


def test_a_shorter_chain_of_a_shorter_chain():
    whole = make_schedule("linear", 100)
    short = respace(whole, choose_timesteps(whole, num_steps=10))
    shorter = respace(short, [0, 4, 9])
    assert shorter.timesteps.tolist() == np.asarray(short.timesteps)[[0, 4, 9]].tolist()
    np.testing.assert_allclose(shorter.alphas_bar, np.asarray(short.alphas_bar)[[0, 4, 9]], rtol=1e-5)
    assert respace(short, np.arange(10)) is short


def test_a_mesh_with_explicit_axes():
    """What `jax.make_mesh` makes by default in newer JAX: the same noise, and the same numbers up to their sums."""
    shape, indices = (16, 4, 4, 2), jnp.arange(16)
    x0 = jax.random.normal(KEY, shape)
    values = (x0, indices % T, indices, indices % 4)

    @jax.jit
    def compute(params, x0, t, indices, labels):
        keys = per_image_keys.image_keys(KEY, indices)

        def loss(params):
            predict = lambda x_t, t: UNET.apply(params, x_t, t, labels, dropout_keys=keys)
            return losses.l_simple(keys, SCHEDULE, predict, x0, t)[0].mean()

        network = guidance.guided(functools.partial(UNET.apply, params), labels, null_label=3, guidance_scale=2.0)
        draw = lambda make, network: sample(KEY, make(SCHEDULE, network), shape, indices=indices)
        return dict(
            x_t=forward.q_sample(SCHEDULE, x0, t, per_image_keys.normal(keys, shape[1:])),
            loss=jax.value_and_grad(loss)(params),
            one_key=losses.l_simple(KEY, SCHEDULE, tanh, x0, t)[0],
            images=[draw(make, tanh) for make in SAMPLERS.values()],
            guided=draw(ddim, network),
            frames=sample_trajectory(KEY, ddim(SCHEDULE, tanh), shape, indices=indices, at=[5, 1])[1].x_t,
            bits=likelihood.bound_terms(keys, SCHEDULE, tanh, x0).terms,
            decoded=editing.encode_decode(KEY, SCHEDULE, ddim(SCHEDULE, tanh), x0, level=3, draws=2, indices=indices),
            noise=editing.invert(ddim_inversion(SCHEDULE, tanh), x0),
        )

    expected = compute(params(), *values)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        by_image = NamedSharding(mesh, PartitionSpec("data"))
        actual = compute(params(), *jax.device_put(values, by_image))
        assert len(actual["guided"].sharding.device_set) == 8
        eager = forward.q_sample(SCHEDULE, jax.device_put(x0, by_image), jax.device_put(values[1], by_image), x0)
    np.testing.assert_array_equal(eager, forward.q_sample(SCHEDULE, x0, values[1], x0))
    for (path, one), (_, eight) in zip(*map(jax.tree.leaves_with_path, (expected, actual)), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-4, err_msg=jax.tree_util.keystr(path))
