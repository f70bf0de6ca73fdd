"""Power-function averages: their profiles as mathematics, the averaging step, and the reconstruction of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.averages import Profiles, gamma_of, inner_products, reconstruct, sigma_rel_of, update_power_average

WIDTHS = st.floats(0.005, 0.28)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)


def density(gamma, time, tau):
    return np.where(tau <= time, (gamma + 1) / time * (tau / time) ** gamma, 0)


def profiles(widths, times):
    """Every width at every time."""
    gammas = np.array([gamma_of(width) for width in widths])
    return Profiles(np.tile(gammas, len(times)), np.repeat(np.asarray(times, float), len(gammas)))


def discrete(gamma, steps):
    """The weight of the parameters after each of `steps` updates: their share of the profile."""
    return np.diff((np.arange(steps + 1) / steps) ** (gamma + 1))


@given(WIDTHS)
def test_the_width_is_the_standard_deviation_of_the_profile(width):
    gamma = gamma_of(width)
    assert sigma_rel_of(gamma) == pytest.approx(width, rel=1e-9)
    edges = np.linspace(0, 1, 20_001)
    middle, mass = (edges[1:] + edges[:-1]) / 2, np.diff(edges ** (gamma + 1))
    mean = mass @ middle
    assert np.sqrt(mass @ (middle - mean) ** 2) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.281, 1.0, float("nan")])
def test_widths_that_no_profile_has_are_refused(width):
    with pytest.raises(ValueError, match=r"^sigma_rel must be above 0 and at most 0\.28, not "):
        gamma_of(width)


@given(WIDTHS, WIDTHS, st.floats(0.3, 1.0))
def test_inner_products_are_those_of_numerical_integration(width, other, time):
    one, two = profiles([width], [1.0]), profiles([other], [time])
    tau = time * (NODES + 1) / 2
    product = density(*one, tau) * density(*two, tau)
    expected = time / 2 * (WEIGHTS @ product)
    np.testing.assert_allclose(inner_products(one, two)[0, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(inner_products(two, one)[0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("width", [0.05, 0.15, 0.28])
def test_step_by_step_it_is_the_average_of_the_profile(width):
    """Also where float32 has few digits for 1 - beta: the profile is that of the continuous average to 1e-5."""
    steps, gamma = 3000, gamma_of(width)
    params = np.random.default_rng(0).normal(size=(steps, 5)).astype(np.float32)

    def step(average, update):
        number, new = update
        return update_power_average(average, {"w": new}, number, gamma=gamma), None

    start = {"w": jnp.full(5, jnp.nan)}  # the first update copies, whatever was there
    average, _ = jax.lax.scan(step, start, (jnp.arange(steps), jnp.asarray(params)))
    np.testing.assert_allclose(average["w"], discrete(gamma, steps) @ params, atol=1e-5)

    late = jnp.int32(1_000_000 - 1)
    moved = update_power_average(jnp.zeros(1), jnp.ones(1), late, gamma=gamma)
    np.testing.assert_allclose(moved, -np.expm1((gamma + 1) * np.log1p(-1e-6)), rtol=1e-5)


class TestReconstruction:
    def test_of_a_given_profile_is_that_profile(self):
        found = reconstruct(profiles([0.05, 0.1], [10, 20, 30, 40]), gamma=gamma_of(0.1), time=30)
        np.testing.assert_allclose(found.weights, np.arange(8) == 5, atol=1e-9)
        assert found.error < 1e-6

    @pytest.mark.parametrize(("width", "error"), [(0.03, 8e-3), (0.07, 1e-3), (0.15, 2e-3), (0.25, 3e-2)])
    def test_is_near_what_was_asked_for_and_states_how_near(self, width, error):
        given, gamma, steps = profiles([0.05, 0.1], np.arange(1, 41) * 50), gamma_of(width), 2000
        found = reconstruct(given, gamma=gamma, time=steps)
        assert found.weights.sum() == pytest.approx(1, abs=1e-12)
        kept = np.zeros(steps)
        for weight, own, time in zip(found.weights, *given, strict=True):
            kept[: int(time)] += weight * discrete(own, int(time))
        wanted = discrete(gamma, steps)
        distance = np.linalg.norm(kept - wanted) / np.linalg.norm(wanted)
        assert found.error == pytest.approx(distance, rel=0.1)
        assert found.error < error

    def test_no_other_weights_of_sum_1_are_nearer(self):
        given, gamma = profiles([0.05, 0.1], [25, 50, 75, 100]), gamma_of(0.07)
        found = reconstruct(given, gamma=gamma, time=100)
        tau = (np.arange(20_000) + 0.5) / 200
        matrix, wanted = np.stack([density(*each, tau) for each in zip(*given, strict=True)]), density(gamma, 100, tau)
        least = np.linalg.norm(found.weights @ matrix - wanted)
        for change in np.random.default_rng(0).normal(size=(20, 8)) * 1e-3:
            assert np.linalg.norm((found.weights + change - change.mean()) @ matrix - wanted) > least

    def test_what_snapshots_cannot_resolve_has_a_large_error(self):
        given = profiles([0.05, 0.1], [250, 500, 750, 1000])
        assert reconstruct(given, gamma=gamma_of(0.01), time=1000).error > 0.5
        assert reconstruct(given, gamma=gamma_of(0.1), time=900).error > 0.2  # between two snapshots
