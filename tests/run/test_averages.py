"""Averages reconstructed from the snapshots of a run: held against ones that were kept, and found by width or file."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.averages import gamma_of
from ddpm_jax.config import Config, EmaConfig
from ddpm_jax.run.averages import (
    average_file,
    choose_step,
    load_average,
    read_average,
    reconstruct_averages,
)
from ddpm_jax.run.snapshots import average_files, save_snapshot, snapshot_file
from ddpm_jax.run.weights import save_weights
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import dump_checked

EVERY, STEPS = 25, 400
CONFIG = Config(ema=EmaConfig(snapshots_every=EVERY))
# A path of weights that settles, with noise: what averages of different widths differ by.
_TIME = np.arange(1, STEPS + 1)[:, None] / STEPS
PATH = (np.exp(-5 * _TIME) + 0.3 * np.random.default_rng(0).normal(size=(STEPS, 50))).astype(np.float32)


def kept(sigma_rel, step):
    """The average that training keeps, exactly."""
    return np.diff((np.arange(step + 1) / step) ** (gamma_of(sigma_rel) + 1)) @ PATH[:step].astype(np.float64)


def nested(array):
    return {"layer": {"kernel": array.astype(np.float32).reshape(5, 10), "scale": np.float32(array[0])}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages") / "run"
    for step in range(EVERY, STEPS + 1, EVERY):
        save_snapshot(folder, step, [nested(kept(width, step)) for width in (0.05, 0.1)], config=CONFIG)
    return folder


def reconstructed(run, *widths, step=STEPS, config=CONFIG, warn=pytest.fail):
    return reconstruct_averages(run, widths, step=step, config=config, warn=warn)


@pytest.mark.parametrize(
    ("width", "error"), [(0.03, 0.07), (0.05, 1e-6), (0.07, 0.01), (0.1, 1e-6), (0.15, 0.02), (0.2, 0.04)]
)
@pytest.mark.parametrize("step", [STEPS, 300])
def test_are_those_that_would_have_been_kept(run, width, error, step):
    (average,) = reconstructed(run, width, step=step)
    wanted = kept(width, step)
    # Noise that is independent from step to step is averaged like the profile itself: the errors are the same.
    distance = np.std(average.params["layer"]["kernel"].ravel() - wanted) / np.std(wanted)
    assert distance == pytest.approx(average.error, rel=0.5, abs=1e-6)
    assert average.params["layer"]["scale"].dtype == np.float32
    assert average.error < error
    assert (average.sigma_rel, average.step) == (width, step)


def test_are_found_by_width_or_file(run, tmp_path):
    later, earlier = reconstructed(run, 0.07, 0.12)[0], reconstructed(run, 0.07, step=300)[0]
    assert len(average_files(run)) >= 3
    for step, ema, wanted in ((None, "0.07", later), (300, "0.070", earlier), (None, "7e-2", later)):
        found = load_average(run, ema, step=step, config=CONFIG)
        np.testing.assert_array_equal(found.params["layer"]["kernel"], wanted.params["layer"]["kernel"])
        assert found[:3] == wanted[:3]
    renamed = tmp_path / "mine.safetensors"
    renamed.write_bytes(average_file(run, 300, 0.07).read_bytes())
    assert load_average(run, str(renamed), step=None, config=CONFIG).step == 300
    lines = {
        ("0.25", None): r"no average of sigma_rel 0\.25 \(there are: step_.*_sigma_rel_0\.07, .*evaluate\.py ema ",
        ("0.12", 300): r"no average of sigma_rel 0\.12 of step 300 .* --sigma-rel 0\.12 --step 300$",
        (str(renamed), 400): r"--step 400 does not fit --ema .*, an average of step 300$",
        (str(tmp_path / "none.safetensors"), None): "there is no file",
    }
    for (ema, step), line in lines.items():
        with pytest.raises(UserError, match=line):
            load_average(run, ema, step=step, config=CONFIG)


def test_other_weights_and_damage_are_refused(run, tmp_path):
    (average,) = reconstructed(run, 0.07)
    content = average_file(run, STEPS, 0.07).read_bytes()
    file = tmp_path / "file.safetensors"
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="checksum of layer"):
        read_average(file, config=CONFIG)
    file.write_bytes(content.replace(b'\\"step\\": 400', b'\\"step\\": 300'))
    with pytest.raises(UserError, match=r"damaged \(its checksum differs\): write it again with evaluate.py ema"):
        read_average(file, config=CONFIG)
    for about, line in (({}, "needs a number, not None"), ({"sigma_rel": 0.1, "step": "7"}, "needs an integer")):
        more = {"average": dump_checked(about).decode()}
        save_weights(file, average.params, config=CONFIG, step=STEPS, more=more)
        with pytest.raises(UserError, match=rf"damaged \({line}"):
            read_average(file, config=CONFIG)
    save_weights(file, average.params, config=CONFIG, step=STEPS)
    with pytest.raises(UserError, match="is not an average that evaluate.py ema wrote"):
        read_average(file, config=CONFIG)
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, seed=1))
    with pytest.raises(UserError, match="is an average of another run"):
        read_average(average_file(run, STEPS, 0.07), config=other)


def test_damaged_and_foreign_snapshots_are_left_out_by_name(run, tmp_path):
    (whole,) = reconstructed(run, 0.07)
    for step in (100, 200, 300, STEPS):
        content = snapshot_file(run, step).read_bytes()
        copy = snapshot_file(tmp_path, step if step != 200 else 250)  # and one under another name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:] if step == 300 else content)
    lines = []
    (average,) = reconstructed(tmp_path, 0.07, warn=lines.append)
    assert [line.split(" in ")[0] for line in lines] == ["the snapshot of step 250", "the snapshot of step 300"]
    assert "it is of step 200, not 250" in lines[0]
    assert "its checksum differs" in lines[1]
    assert whole.error < average.error < 0.1
    snapshot_file(tmp_path, STEPS).write_bytes(b"PK")
    with pytest.raises(UserError, match=r"the snapshot of step 400 in .* is damaged \(.*\): choose another --step$"):
        reconstructed(tmp_path, 0.07, warn=lines.append)


def test_what_cannot_be_reconstructed_is_one_line(run, tmp_path):
    for width in (0, -0.1, 0.29, float("nan")):
        with pytest.raises(UserError, match=r"^--sigma-rel must be above 0 and at most 0\.28, not "):
            reconstructed(run, 0.1, width)
    with pytest.raises(
        UserError,
        match=r"^--sigma-rel 0\.01 cannot be reconstructed from the 16 snapshots of .* up to step 400 \(error of the "
        r"profile 3\d\.\d%, at most 10%\): choose a width from 0\.02\d* to 0\.2\d*, or train with a smaller --ema\.sn",
    ):
        reconstructed(run, 0.01)
    with pytest.raises(UserError, match=r"0\.2 cannot be reconstructed from the only snapshot of .* up to step 25 "):
        reconstructed(run, 0.2, step=25)
    with pytest.raises(UserError, match=r"has no snapshot of step 30: there are 25, 50, .*, 400$"):
        choose_step(run, 30, config=CONFIG)
    with pytest.raises(UserError, match=r"^no snapshots in .*: the run has saved none yet"):
        choose_step(tmp_path, None, config=CONFIG)
    with pytest.raises(UserError, match=r"has no snapshots of averages: a run saves them with --ema\.snapshots-every$"):
        choose_step(run, None, config=Config())
    assert choose_step(run, None, config=CONFIG) == STEPS
