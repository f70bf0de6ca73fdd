"""Snapshots: what is read is what was saved of this run at this step, and a resumed run begins after its checkpoint."""

import numpy as np
import pytest

from ddpm_jax.run.record import read_config, save_config
from ddpm_jax.run.snapshots import (
    average_files,
    identity,
    read_snapshot,
    rewind_snapshots,
    save_snapshot,
    snapshot_file,
    snapshot_steps,
)
from ddpm_jax.system.errors import Damage

AVERAGES = [
    {"layer": {"kernel": np.float32([[1, 2]]), "bias": np.float32(3)}},
    {"layer": {"kernel": np.float32([[4, 5]]), "bias": np.float32(6)}},
]


def test_what_was_saved_is_read(small, tmp_path):
    save_snapshot(tmp_path, 20, AVERAGES, config=small)
    first, second = read_snapshot(tmp_path, 20, config=small)
    np.testing.assert_array_equal(first["layer.kernel"], [[1, 2]])
    np.testing.assert_array_equal(second["layer.bias"], 6)
    content = snapshot_file(tmp_path, 20).read_bytes()
    save_snapshot(tmp_path, 20, AVERAGES, config=small)
    assert snapshot_file(tmp_path, 20).read_bytes() == content


def test_damage_other_steps_and_other_runs_are_named(small, with_value, tmp_path):
    save_snapshot(tmp_path, 20, AVERAGES, config=small)
    file = snapshot_file(tmp_path, 20)
    content = file.read_bytes()
    with pytest.raises(Damage, match=r"^it is of run \w+, not \w+$"):
        read_snapshot(tmp_path, 20, config=with_value(small, "train.seed", 1))
    read_snapshot(tmp_path, 20, config=with_value(small, "train.steps", 2000))
    file.rename(snapshot_file(tmp_path, 30))
    with pytest.raises(Damage, match=r"^it is of step 20, not 30$"):
        read_snapshot(tmp_path, 30, config=small)
    file.write_bytes(bytes([*content[:99], content[99] ^ 1, *content[100:]]))
    with pytest.raises(Damage, match="checksum differs"):
        read_snapshot(tmp_path, 20, config=small)


def test_the_identity_does_not_depend_on_places_nor_on_what_is_free(small, with_value):
    same = {"model.network": "other.py:net", "data.path": "images", "train.learning_rate": 1.0, "train.fsdp": 2}
    assert {identity(with_value(small, name, value)) for name, value in same.items()} == {identity(small)}
    other = {"train.seed": 1, "train.init_from": "runs/other", "ema.sigma_rels": (0.05, 0.2), "data.flip": True}
    found = {identity(with_value(small, name, value)) for name, value in other.items()}
    assert len(found | {identity(small)}) == 5


def test_the_identity_is_that_of_the_configuration_as_it_is_read_back(small, with_value, tmp_path):
    given = with_value(with_value(small, "loss.min_snr_gamma", 7), "model.channel_mult", [1, 2, 4])
    save_config(given, tmp_path / "config.json")
    assert identity(read_config(tmp_path / "config.json")) == identity(given)


@pytest.mark.parametrize(
    ("step", "ends", "left"),
    [(20, False, [10, 20]), (25, False, [10, 20]), (25, True, [10, 20, 25]), (9, True, []), (40, False, [10, 20, 30])],
)
def test_what_is_written_again_is_deleted(small, tmp_path, step, ends, left):
    for each in (10, 20, 25, 30):  # a run of 25 steps, extended
        save_snapshot(tmp_path, each, AVERAGES, config=small)
        (tmp_path / "averages" / f"step_{each:07d}_sigma_rel_0.1.safetensors").touch()
    rewind_snapshots(tmp_path, step, every=10, ends=ends)
    assert snapshot_steps(tmp_path) == left
    assert [*average_files(tmp_path).values()] == [each for each in (10, 20, 25, 30) if each <= step]
