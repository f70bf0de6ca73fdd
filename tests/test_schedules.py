"""The tables of the paper, against float64 formulas written another way, and against numbers computed elsewhere."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.schedules import Schedule, make_betas, make_schedule, schedule_from_betas, zero_terminal_snr

NAMES = ("linear", "quad", "const", "warmup10", "warmup50", "jsd", "sigmoid", "cosine")
ROUNDING = 1.2e-7  # of a number stored as float32
any_betas = st.sampled_from([1, 2, 7, 20]).flatmap(
    lambda num_steps: st.lists(st.floats(1e-7, 0.999), min_size=num_steps, max_size=num_steps)
)


def reference(betas):
    """Every table in float64, by sums of logarithms: no product and no difference of nearly equal numbers."""
    betas = np.asarray(betas, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_alphas_bar = np.cumsum(np.log1p(-betas))
        log_alphas_bar_prev = np.append(0.0, log_alphas_bar[:-1])
        one_minus, one_minus_prev = -np.expm1(log_alphas_bar), -np.expm1(log_alphas_bar_prev)
        log_posterior_variance = np.log(betas) + np.log(one_minus_prev) - np.log(one_minus)
        first = log_posterior_variance[1] if len(betas) > 1 else np.log(betas[0])
        return dict(
            betas=betas,
            alphas=1 - betas,
            alphas_bar=np.exp(log_alphas_bar),
            alphas_bar_prev=np.exp(log_alphas_bar_prev),
            one_minus_alphas_bar=one_minus,
            sqrt_alphas_bar=np.exp(0.5 * log_alphas_bar),
            sqrt_one_minus_alphas_bar=np.sqrt(one_minus),
            log_one_minus_alphas_bar=np.log(one_minus),
            sqrt_recip_alphas_bar=np.exp(-0.5 * log_alphas_bar),
            sqrt_recip_alphas_bar_minus_one=np.sqrt(np.expm1(-log_alphas_bar)),
            posterior_mean_coef_x0=np.exp(0.5 * log_alphas_bar_prev) * betas / one_minus,
            posterior_mean_coef_x_t=np.exp(0.5 * np.log1p(-betas)) * one_minus_prev / one_minus,
            posterior_variance=np.exp(log_posterior_variance),
            posterior_log_variance_clipped=np.append(first, log_posterior_variance[1:]),
            log_betas=np.log(betas),
            fixed_large_log_variance=np.append(first, np.log(betas[1:])),
        )


def assert_tables_equal_reference(schedule, betas):
    for name, expected in reference(betas).items():
        table = np.asarray(getattr(schedule, name), np.float64)
        # Below 1e-37 float32 has no digits to give.
        np.testing.assert_allclose(table, expected, rtol=ROUNDING, atol=1e-37, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 1000])
def test_tables_equal_formulas(name, num_steps):
    if name == "cosine" and num_steps == 1:
        assert make_betas(name, 1)[0] == 0.999
    schedule = make_schedule(name, num_steps)
    assert schedule.num_steps == num_steps
    assert_tables_equal_reference(schedule, make_betas(name, num_steps))
    np.testing.assert_array_equal(schedule.timesteps, np.arange(num_steps))


@given(betas=any_betas)
def test_tables_of_any_betas_equal_formulas_and_are_finite(betas):
    schedule = schedule_from_betas(betas)
    chex.assert_tree_all_finite(schedule)
    assert_tables_equal_reference(schedule, betas)


@given(betas=st.lists(st.floats(1e-30, 1e-12), min_size=5, max_size=5))
def test_betas_too_small_for_one_minus_beta_still_give_finite_tables(betas):
    schedule = schedule_from_betas(betas)
    chex.assert_tree_all_finite(schedule)
    np.testing.assert_allclose(schedule.sqrt_one_minus_alphas_bar, np.sqrt(np.cumsum(betas)), rtol=1e-6)


@given(betas=any_betas)
def test_signal_to_noise_ratio_falls(betas):
    schedule = schedule_from_betas(betas)
    alphas_bar = np.asarray(schedule.alphas_bar, np.float64)
    ratio = alphas_bar / np.asarray(schedule.one_minus_alphas_bar, np.float64)
    # A beta below float32's resolution may leave it where it was.
    assert (np.diff(ratio) <= 0).all()
    large = np.asarray(betas[1:]) > 1e-6
    assert (np.diff(ratio)[large] < 0).all()


def test_schedule_is_a_pytree_of_float32_vectors():
    schedule = make_schedule("linear", 12)
    for field in dataclasses.fields(Schedule):
        table = getattr(schedule, field.name)
        chex.assert_shape(table, (12,))
        chex.assert_type(table, jnp.int32 if field.name == "timesteps" else jnp.float32)
    doubled = jax.jit(lambda schedule: jax.tree.map(lambda table: table + table, schedule))(schedule)
    assert isinstance(doubled, Schedule)
    np.testing.assert_array_equal(doubled.betas, 2 * np.asarray(schedule.betas))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = schedule.alphas


def test_alphas_bar_prev_is_one_at_first_step_and_does_not_wrap():
    schedule = make_schedule("linear", 1000)
    assert schedule.alphas_bar_prev[0] == 1
    np.testing.assert_array_equal(schedule.alphas_bar_prev[1:], schedule.alphas_bar[:-1])


def test_respaced_times_are_kept():
    schedule = schedule_from_betas([0.1, 0.2, 0.3], timesteps=[0, 500, 999])
    np.testing.assert_array_equal(schedule.timesteps, [0, 500, 999])
    chex.assert_type(schedule.timesteps, jnp.int32)


class TestRefusals:
    @pytest.mark.parametrize("num_steps", [0, -1])
    def test_no_steps(self, num_steps):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
            make_schedule("linear", num_steps)

    def test_zero_terminal_snr_in_one_step(self):
        with pytest.raises(ValueError, match="at least 2 steps"):
            zero_terminal_snr([0.5])

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="unknown schedule 'linaer': choose one of linear, quad"):
            make_schedule("linaer", 10)

    @pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, float("nan"), float("inf")])
    def test_beta_outside_its_range(self, wrong):
        with pytest.raises(ValueError, match="beta_end"):
            make_schedule("linear", 10, beta_end=wrong)
        with pytest.raises(ValueError, match="beta_start"):
            make_schedule("linear", 10, beta_start=wrong)
        with pytest.raises(ValueError, match=r"beta\[1\]"):
            schedule_from_betas([0.1, wrong, 0.2])

    def test_beta_of_one_before_the_last_step(self):
        with pytest.raises(ValueError, match=r"beta\[1\]=1.0"):
            schedule_from_betas([0.1, 1.0, 0.2])
        with pytest.raises(ValueError, match=r"beta\[0\]=1.0"):
            make_schedule("const", 10, beta_end=1.0)
        chex.assert_tree_all_finite(schedule_from_betas([0.1, 1.0]).posterior_variance)

    @pytest.mark.parametrize("betas", [[], 0.1, [[0.1, 0.2]]])
    def test_not_a_vector(self, betas):
        with pytest.raises(ValueError, match="vector"):
            schedule_from_betas(betas)

    @pytest.mark.parametrize("timesteps", [[0, 1], [[0, 1, 2]]])
    def test_times_of_another_length(self, timesteps):
        with pytest.raises(ValueError, match="timesteps of shape"):
            schedule_from_betas([0.1, 0.2, 0.3], timesteps=timesteps)


@pytest.fixture(scope="module")
def linear():
    return make_schedule("linear", 1000)


class TestNumbersOfThePaper:
    """Computed once, elsewhere, in float64; given to eight digits."""

    @staticmethod
    def close(actual, expected):
        np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2e-7)

    def test_alphas_bar(self, linear):
        at = np.array([0, 1, 249, 499, 749, 999])
        self.close(linear.alphas_bar[at], [0.9999, 0.99978009, 0.52408537, 0.078587243, 0.0033505504, 4.0358298e-05])
        self.close(make_betas("linear", 1000).sum(), 10.05)
        below_half = np.flatnonzero(np.asarray(linear.alphas_bar) < 0.5)[0]
        assert below_half == 259
        self.close(linear.alphas_bar[259], 0.49761381)
        self.close(np.asarray(linear.alphas_bar, np.float64).mean(), 0.27551323)

    def test_signal_to_noise_ratio(self, linear):
        ratio = np.asarray(linear.alphas_bar, np.float64) / np.asarray(linear.one_minus_alphas_bar, np.float64)
        self.close(ratio[[0, 1, 249, 499, 999]], [9999, 4546.3577, 1.1012172, 0.085289944, 4.0359927e-05])
        self.close(np.log(ratio[999]), -10.117673)

    def test_prediction_coefficients(self, linear):
        self.close(linear.sqrt_recip_alphas_bar[np.array([499, 999])], [3.5671714, 157.41046])
        self.close(linear.sqrt_recip_alphas_bar_minus_one[np.array([499, 999])], [3.4241366, 157.40728])
        self.close(linear.sqrt_one_minus_alphas_bar[np.array([499, 999])], [0.95990247, 0.99997982])

    def test_posterior_variance(self, linear):
        self.close(
            linear.posterior_variance[np.array([0, 1, 99, 499, 999])],
            [0, 5.4531877e-05, 0.0020345963, 0.010031355, 0.019999984],
        )
        for table in (linear.posterior_log_variance_clipped, linear.fixed_large_log_variance):
            self.close(table[0], -9.8167251)
            self.close(np.exp(0.5 * float(table[0])), 0.0073845702)
        self.close(linear.log_betas[0], 2 * np.log(0.01))

    def test_posterior_mean_coefficients(self, linear):
        at = np.array([1, 99, 499, 999])
        self.close(linear.posterior_mean_coef_x0[at], [0.5452915, 0.019076345, 0.0030700711, 0.00012835149])
        self.close(linear.posterior_mean_coef_x_t[at], [0.4547085, 0.98089602, 0.99410667, 0.98994868])
        assert linear.posterior_mean_coef_x0[0] == 1
        assert linear.posterior_mean_coef_x_t[0] == 0

    @pytest.mark.parametrize(
        ("name", "x0_squared", "bits"),
        [
            ("linear", 0, 5.8747839e-10),
            ("linear", 1, 2.9112945e-05),
            ("linear", 0.25598515, 7.4529187e-06),
            ("quad", 1, 5.2923936e-04),
            ("const", 1, 1.2140043e-09),
            ("warmup10", 1, 3.3280714e-09),
            ("warmup50", 1, 1.8799294e-07),
        ],
    )
    def test_prior_divergence_in_bits_a_dimension(self, name, x0_squared, bits):
        # KL(N(sqrt(a) x0, (1 - a) I) || N(0, I)) a dimension: (a x0^2 - a - log(1 - a)) / 2.
        alphas_bar = np.prod(1 - make_betas(name, 1000))
        exact = 0.5 * (alphas_bar * x0_squared - alphas_bar - np.log1p(-alphas_bar)) / np.log(2)
        np.testing.assert_allclose(exact, bits, rtol=2e-7, atol=1e-16)
        schedule = make_schedule(name, 1000)
        alphas_bar = float(schedule.alphas_bar[-1])
        table = 0.5 * (alphas_bar * (x0_squared - 1) - float(schedule.log_one_minus_alphas_bar[-1])) / np.log(2)
        # -a - log(1 - a) is a^2 / 2, of two numbers that are each rounded to float32.
        np.testing.assert_allclose(table, bits, atol=ROUNDING * alphas_bar)

    @pytest.mark.parametrize(
        ("name", "last", "middle"),
        [
            ("quad", 7.3341246e-04, 0.33318777),
            ("const", 1.6829674e-09, 4.1023985e-05),
            ("warmup10", 4.6136867e-09, 1.1246315e-04),
            ("warmup50", 2.6061351e-07, 0.0063527108),
            ("sigmoid", 3.9681820e-05, None),
            ("jsd", 0.0, 0.5),
        ],
    )
    def test_other_schedules(self, name, last, middle):
        schedule = make_schedule(name, 1000)
        self.close(schedule.alphas_bar[999], last)
        if middle is not None:
            self.close(schedule.alphas_bar[499], middle)

    def test_jsd_falls_evenly(self):
        self.close(make_schedule("jsd", 1000).alphas_bar[:999], 1 - np.arange(1, 1000) / 1000)

    def test_warmup_reaches_the_end_at_the_last_rising_step(self):
        betas = make_betas("warmup10", 1000)
        assert betas[98] < betas[99] == betas[100] == 0.02

    def test_cosine(self):
        schedule = make_schedule("cosine", 1000)
        self.close(schedule.betas[np.array([0, 998, 999])], [4.1284225e-05, 0.74999939, 0.999])
        assert (make_betas("cosine", 1000) == 0.999).sum() == 1
        self.close(schedule.sqrt_one_minus_alphas_bar[0], 0.0064252801)
        self.close(schedule.alphas_bar[np.array([499, 998, 999])], [0.49384359, 2.4287669e-06, 2.4287669e-09])
        self.close(schedule.posterior_variance[1], 2.1789496e-05)
        longer = make_schedule("cosine", 4000)
        self.close(longer.betas[0], 9.8658188e-06)
        self.close(longer.alphas_bar[np.array([1999, 3999])], [0.49384359, 1.5179805e-10])
        self.close(longer.posterior_variance[1], 5.0076834e-06)

    @pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
    def test_zero_terminal_snr_moves_only_what_is_left_at_the_end(self, name):
        betas = make_betas(name, 1000)
        root, rescaled = (np.sqrt(np.cumprod(1 - values)) for values in (betas, zero_terminal_snr(betas)))
        assert rescaled[-1] == 0
        np.testing.assert_allclose(rescaled, (root - root[-1]) * root[0] / (root[0] - root[-1]), rtol=1e-9, atol=1e-15)

    def test_linear_rescaled_to_4000_steps(self):
        schedule = make_schedule("linear", 4000, beta_start=2.5e-5, beta_end=0.005)
        self.close(schedule.betas[np.array([0, 3999])], [2.5e-05, 0.005])
        self.close(schedule.alphas_bar[3999], 4.2466523e-05)
        self.close(schedule.posterior_variance[1], 1.2803629e-05)

    @pytest.mark.parametrize(
        ("table", "weights"),
        [
            (
                "fixed_large_log_variance",
                {1: 0.27269208, 9: 0.073717016, 99: 0.010081264, 499: 0.0055034319, 999: 0.010204493},
            ),
            ("posterior_log_variance_clipped", {1: 0.59967151, 499: 0.0055081965}),
        ],
    )
    def test_weight_of_the_noise_error_in_the_bound(self, linear, table, weights):
        # Eq. 12: beta^2 / (2 sigma^2 alpha (1 - alphas_bar)).
        tables = {name: np.asarray(getattr(linear, name), np.float64) for name in reference(np.full(2, 0.1))}
        weight = tables["betas"] ** 2 / (2 * np.exp(tables[table]) * tables["alphas"] * tables["one_minus_alphas_bar"])
        # A log-variance of 9 is rounded to 5e-7, and so is what is made of it.
        np.testing.assert_allclose(weight[list(weights)], list(weights.values()), rtol=1e-6)
