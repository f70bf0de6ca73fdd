"""Shorter chains: the published lists of times, and betas that keep alphas_bar."""

import itertools
import typing

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_jax.samplers.respacing import (
    Spacing,
    check_prediction,
    choose_timesteps,
    evenly_spaced,
    evenly_spaced_in_log_snr,
    evenly_spaced_in_sigma,
    leading,
    quadratic,
    respace,
    respaced_betas,
    section_steps,
    trailing,
)
from ddpm_jax.schedules import make_betas, make_schedule, schedule_from_betas

BETAS = make_betas("linear", 1000)
SPACINGS = typing.get_args(Spacing)
SCHEDULES = ("linear", "quad", "const", "warmup10", "warmup50", "jsd", "sigmoid", "cosine")
some_steps = st.integers(1, 300).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


class TestBetas:
    def test_fact_15(self):
        of_250 = respaced_betas(BETAS, section_steps(1000, "250"))
        np.testing.assert_allclose(of_250[[0, 1, -1]], [1e-4, 5.9906556e-04, 0.077519345], rtol=1e-7)
        posterior_variance = respace(BETAS, section_steps(1000, "250")).posterior_variance[-1]
        np.testing.assert_allclose(posterior_variance, 0.077519082, rtol=1e-6)

        ddim50 = respaced_betas(BETAS, section_steps(1000, "ddim50"))
        np.testing.assert_allclose(ddim50[[1, -1]], [0.0061651879, 0.32461445], rtol=1e-7)
        np.testing.assert_allclose(np.prod(1 - ddim50), 5.9037514e-05, rtol=1e-7)

        of_50 = respaced_betas(BETAS, section_steps(1000, "50"))
        np.testing.assert_allclose(of_50[-1], 0.32980907, rtol=1e-7)
        np.testing.assert_allclose(np.prod(1 - of_50), 4.0358298e-05, rtol=1e-7)

    @given(
        betas=st.lists(st.floats(1e-5, 0.5), min_size=1, max_size=60),
        chosen=st.sets(st.integers(0, 59), min_size=1),
    )
    def test_keep_alphas_bar(self, betas, chosen):
        times = sorted({time % len(betas) for time in chosen})
        alphas_bar = np.cumprod(1 - np.array(betas))
        respaced = respaced_betas(betas, times)
        np.testing.assert_allclose(np.cumprod(1 - respaced), alphas_bar[times], rtol=1e-12)
        np.testing.assert_allclose(respaced, 1 - alphas_bar[times] / np.append(1, alphas_bar[times[:-1]]), rtol=1e-9)

    def test_of_all_times_are_the_schedule_itself(self):
        expected, actual = make_schedule("cosine", 1000), respace(make_betas("cosine", 1000), np.arange(1000))
        for field, table in vars(expected).items():
            np.testing.assert_array_equal(vars(actual)[field], table, err_msg=field)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_every_schedule_can_be_respaced(self, name):
        betas = make_betas(name, 1000)
        for spacing, num_steps in itertools.product(SPACINGS, (1, 3, 50, 999)):
            schedule = respace(betas, choose_timesteps(betas, num_steps=num_steps, spacing=spacing))
            assert schedule.num_steps == num_steps
            assert np.isfinite(schedule.posterior_log_variance_clipped).all()

    def test_are_data_inside_a_traced_function(self):
        @jax.jit
        def last_time(x):
            return x + float(np.asarray(respace(BETAS, [3, 7]).timesteps)[-1])

        assert last_time(1.0) == 8

    @pytest.mark.parametrize(
        "times", [[], [[1, 2]], [0.5], [3, 3], [5, 4], [-1, 4], [4, 1000]], ids=lambda times: str(times)
    )
    def test_refuse_other_timesteps(self, times):
        with pytest.raises(ValueError, match="timesteps must"):
            respaced_betas(BETAS, times)


class TestTimes:
    @given(some_steps)
    def test_rise_within_the_schedule_and_are_as_many_as_asked_for(self, counts):
        num_times, num_steps = counts
        betas = make_betas("linear", num_times)
        for spacing in SPACINGS:
            times = choose_timesteps(betas, num_steps=num_steps, spacing=spacing)
            assert len(times) == num_steps, spacing
            assert times[0] >= 0, spacing
            assert times[-1] < num_times, spacing
            assert (np.diff(times) > 0).all(), spacing
            if spacing not in ("leading", "quadratic") or num_steps == 1:
                assert times[-1] == num_times - 1, spacing

    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_are_all_where_all_are_asked_for(self, spacing):
        assert choose_timesteps(BETAS, spacing=spacing).tolist() == list(range(1000))

    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_are_visited_besides_where_that_is_asked_for(self, spacing):
        few = choose_timesteps(BETAS, num_steps=7, spacing=spacing)
        longer = choose_timesteps(BETAS, num_steps=7, spacing=spacing, extra_timesteps=[few[2], 123, 999])
        assert longer.tolist() == sorted({*few.tolist(), 123, 999})

    def test_of_published_lists(self):
        of_50 = section_steps(1000, "50").tolist()
        assert of_50[:9] == [0, 20, 41, 61, 82, 102, 122, 143, 163]
        assert of_50[-3:] == [958, 979, 999]
        assert section_steps(1000, "ddim50").tolist() == list(range(0, 1000, 20))
        of_250 = section_steps(1000, "250").tolist()
        assert of_250[:3] + of_250[-3:] == [0, 4, 8, 991, 995, 999]
        assert section_steps(4000, "100").tolist()[:4] == [0, 40, 81, 121]
        assert section_steps(4000, "ddim100").tolist() == list(range(0, 4000, 40))
        assert quadratic(1000, 10).tolist() == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]

    def test_of_sections(self):
        times = section_steps(300, [10, 15, 20])
        assert len(times) == 45
        assert times[[0, 9, 10, 24, 25, 44]].tolist() == [0, 99, 100, 199, 200, 299]
        assert section_steps(300, "10,15,20").tolist() == times.tolist()
        # 10 times in three sections: of 4, 3 and 3; one time of a section is its first.
        assert section_steps(10, "4,1,2").tolist() == [0, 1, 2, 3, 4, 7, 9]

    def test_a_whole_stride_is_found_or_refused(self):
        def has_stride(number):
            try:
                times = section_steps(1000, f"ddim{number}")
            except ValueError as error:
                assert "leading" in str(error)  # noqa: PT017
                return False
            assert len(times) == number
            assert len(set(np.diff(times))) <= 1
            return True

        possible = [number for number in range(1, 1001) if has_stride(number)]
        assert len(possible) == 62
        assert not {1, 37, 41, 43, 45, 47, 49, 51, 52} & set(possible)
        assert len(leading(1000, 37)) == 37

    @given(some_steps)
    def test_leading_is_ddim_where_that_divides(self, counts):
        stride, num_steps = counts
        if stride > 1 and num_steps > 1:
            num_times = stride * num_steps
            assert leading(num_times, num_steps).tolist() == list(range(0, num_times, stride))

    @given(some_steps)
    def test_leading_is_even_where_that_does_not_divide(self, counts):
        num_times, num_steps = counts
        times = leading(num_times, num_steps)
        if num_steps > 1:
            assert times.tolist() == [k * num_times // num_steps for k in range(num_steps)]
        # The jump from pure noise to the last time is no longer than the others.
        assert max(np.diff(np.append(times, num_times))) <= -(-num_times // num_steps)

    @given(some_steps)
    def test_linspace_has_steps_of_two_lengths(self, counts):
        lengths = set(np.diff(evenly_spaced(*counts)).tolist())
        assert len(lengths) <= 2
        assert max(lengths, default=0) - min(lengths, default=0) <= 1

    def test_trailing(self):
        assert trailing(1000, 3).tolist() == [332, 666, 999]
        assert trailing(1000, 1).tolist() == [999]

    def test_log_snr_is_even_where_the_schedule_is_fine(self):
        alphas_bar = 1 / (1 + np.exp(-np.linspace(8, -8, 2001)))
        betas = 1 - alphas_bar / np.append(1.0, alphas_bar[:-1])
        assert evenly_spaced_in_log_snr(betas, 21).tolist() == list(range(0, 2001, 100))

    def test_karras_is_of_the_paper(self):
        # Eq. 5 for 18 steps from 80 to 0.002, on a schedule fine enough to hold these noise levels.
        sigma = np.geomspace(0.002, 80, 20_000)
        alphas_bar = 1 / (1 + sigma**2)
        times = evenly_spaced_in_sigma(1 - alphas_bar / np.append(1.0, alphas_bar[:-1]), 18)
        expected = (80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        np.testing.assert_allclose(sigma[times[::-1]], expected, rtol=1e-3)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_of_noise_levels_visit_both_ends(self, name):
        for num_steps, choose in itertools.product((2, 9, 40), (evenly_spaced_in_log_snr, evenly_spaced_in_sigma)):
            times = choose(make_betas(name, 1000), num_steps)
            assert (times[0], times[-1]) == (0, 999)

    @pytest.mark.parametrize("name", ["linear", "cosine"])
    def test_are_the_same_of_a_schedule_and_of_its_betas(self, name):
        betas = make_betas(name, 1000)
        for spacing, num_steps in itertools.product(SPACINGS, (3, 10, 50)):
            of_schedule, of_betas = (
                choose_timesteps(given, num_steps=num_steps, spacing=spacing)
                for given in (schedule_from_betas(betas), betas)
            )
            np.testing.assert_array_equal(of_schedule, of_betas)


class TestRefusals:
    @pytest.mark.parametrize(
        ("spacing", "num_steps"),
        [("linspace", 0), ("leading", -3), ("trailing", 1001), ("quadratic", 0), ("log_snr", 1001)],
    )
    def test_more_steps_than_times_or_none(self, spacing, num_steps):
        with pytest.raises(ValueError, match=f"1 to 1000 steps, not in {num_steps}"):
            choose_timesteps(BETAS, num_steps=num_steps, spacing=spacing)

    @pytest.mark.parametrize(
        ("spacing", "num_steps", "line"),
        [
            ("even", None, "unknown spacing 'even'"),
            ("", None, "unknown spacing ''"),
            ("10,x", None, "'10,x' is neither"),
            ("ddim", None, "'ddim' is neither"),
            ("ddim5,6", None, "'ddim5,6' is neither"),
            ("ddim37", None, "no integer stride gives 37"),
            ("10,600", None, "a section of 500 times"),
            ("10,0", None, "not in 0"),
            ("10,15", 30, "has 25 steps, not 30"),
        ],
    )
    def test_rules_that_cannot_be_read(self, spacing, num_steps, line):
        with pytest.raises(ValueError, match=line):
            choose_timesteps(BETAS, num_steps=num_steps, spacing=spacing)

    def test_a_mean_of_single_steps_where_steps_are_skipped(self):
        check_prediction(schedule_from_betas(BETAS), "mean")
        for prediction in ("eps", "x0", "v"):
            check_prediction(respace(BETAS, [0, 500]), prediction)
        with pytest.raises(ValueError, match="single steps"):
            check_prediction(respace(BETAS, [0, 500]), "mean")
