"""Checkpoints restore exactly what was saved, or report why not."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import types
import zlib

import absl.logging
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddpm_jax.run.checkpoints import Checkpoints, load_ema, silence_orbax, verify
from ddpm_jax.system.errors import UserError

# Threads that Orbax leaves behind where it found damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ITEMS = ("params", "ema", "optimizer", "time_sampling")


def state_at(step, size=2048):
    """A state of bits that no compression shortens, so that they can be found in the files."""
    random = np.random.default_rng(step)
    # Of all floats but infinities and NaN.
    bits = lambda *shape: (random.integers(0, 2**32, shape, np.uint32) & np.uint32(0xBFFFFFFF)).view(np.float32)
    return {
        "params": {"conv": {"kernel": jnp.array(bits(size)), "bias": jnp.array(bits(2, 3))}},
        "ema": {"conv": {"kernel": jnp.array(bits(size)), "bias": jnp.array(bits(2, 3))}},
        "optimizer": ({"mu": jnp.array(bits(size)), "count": jnp.int32(step)},),
        "time_sampling": {"losses": jnp.array(bits(size))},
    }


def abstract_of(state, sharding=None):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if sharding is None else sharding
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state)


def save(run, *steps, keep=5, notes=None, losses=None, **rules):
    with Checkpoints(run, keep=keep, warn=pytest.fail, **rules) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), notes=notes or {"at": step}, loss=losses and losses[step])
        checkpoints.wait()
        return checkpoints.steps()


def restore(run, abstract=None):
    """What is restored, and the warnings."""
    warnings = []
    with Checkpoints(run, keep=5, warn=warnings.append) as checkpoints:
        return checkpoints.restore(abstract_of(state_at(0)) if abstract is None else abstract), warnings


# Names of meshes: devices along "data" and "fsdp".
PLACES = {"one": None, "eight": (8, 1), "fsdp 4": (2, 4), "fsdp 2": (1, 2)}


def shardings(state, place):
    """The kernels, of 2048, cut over "fsdp"; the rest everywhere."""
    if PLACES[place] is None:
        return jax.tree.map(lambda leaf: jax.sharding.SingleDeviceSharding(jax.devices()[0]), state)
    shape = PLACES[place]
    mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), ("data", "fsdp"))
    spec = lambda leaf: PartitionSpec("fsdp") if leaf.shape == (2048,) else PartitionSpec()
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), state)


def notes_of(run, step):
    return json.loads((run / "checkpoints" / str(step) / "notes" / "metadata").read_text())


def same_bits(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for here, there in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(here).tobytes() == np.asarray(there).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = tmp_path_factory.mktemp("saved")
    save(run, 10, 20)
    return run


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files_of(run, step, item):
    return sorted(path for path in (run / "checkpoints" / str(step) / item).rglob("*") if path.is_file())


def flip_a_bit_of(array, files):
    """Flips one bit of an array where it lies in its file."""
    words = np.asarray(array).tobytes()[1000:1032]
    for file in files:
        content = bytearray(file.read_bytes())
        at = content.find(words)
        if at >= 0:
            content[at] ^= 4
            file.write_bytes(content)
            return
    pytest.fail(f"the array is not found as it is in {files}")


class TestSaved:
    def test_comes_back_bit_by_bit(self, saved):
        assert restore(saved)[1] == []
        step, state, notes = restore(saved)[0]
        same_bits(state, state_at(20))
        assert (step, notes) == (20, {"at": 20})

    def test_nothing_saved_is_nothing_restored(self, tmp_path):
        assert restore(tmp_path) == (None, [])

    def test_only_the_newest_are_kept(self, tmp_path):
        assert save(tmp_path, 1, 2, 3, 4, keep=2) == [3, 4]
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]

    def test_notes_keep_every_digit(self, tmp_path):
        numbers = [math.pi, 0.1, 5e-324, 1.7976931348623157e308, float(np.float32(0.1)), -0.0]
        save(tmp_path, 1, notes={"window": [numbers, []]})
        (_, _, notes), _ = restore(tmp_path)
        assert [number.hex() for number in notes["window"][0]] == [number.hex() for number in numbers]
        assert list(notes) == ["window"]

    def test_a_step_that_is_there_is_not_saved_again(self, run):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with Checkpoints(run, keep=5, warn=pytest.fail) as checkpoints:
            checkpoints.save(20, state_at(3), notes={})
        same_bits(restore(run)[0].items, state_at(20))
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    @pytest.mark.parametrize("there", PLACES)
    def test_moves_to_another_number_of_devices_and_another_mesh(self, tmp_path, there):
        with Checkpoints(tmp_path, keep=2, warn=pytest.fail) as checkpoints:
            checkpoints.save(7, jax.device_put(state_at(7), shardings(state_at(7), there)), notes={})
        kernel = np.asarray(state_at(7)["ema"]["conv"]["kernel"])
        assert notes_of(tmp_path, 7)["leaves"]["ema['conv']['kernel']"]["crc32"] == zlib.crc32(kernel.tobytes())
        for here in PLACES:
            wanted = shardings(state_at(7), here)
            shapes = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                state_at(7),
                wanted,
            )
            (_, state, _), warnings = restore(tmp_path, shapes)
            assert not warnings
            same_bits(state, state_at(7))
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted

    def test_the_memory_of_what_is_saved_may_be_given_away_at_once(self, tmp_path):
        def large(step):
            random = np.random.default_rng(step)
            return {f"w{each}": jnp.array(random.standard_normal(300_000, np.float32)) for each in range(4)}

        overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
        items = lambda step: {name: large(step + 10 * part) for part, name in enumerate(ITEMS)}
        jax.block_until_ready(overwrite(items(0)))
        with Checkpoints(tmp_path, keep=3, warn=pytest.fail) as checkpoints:
            for step in (1, 2, 3):
                state = items(step)
                checkpoints.save(step, state, notes={})
                jax.block_until_ready(overwrite(state))
        state = items(3)
        (_, restored, _), warnings = restore(tmp_path, abstract_of(state))
        assert not warnings
        same_bits(restored, state)

    def test_notes_are_as_they_were_when_it_was_saved(self, tmp_path):
        window = [[1.0, 2.0]]
        with Checkpoints(tmp_path, keep=1, warn=pytest.fail) as checkpoints:
            checkpoints.save(7, state_at(7, size=2_000_000), notes={"window": window})
            window[0][0] = 9.0
            window.append([3.0, 4.0])
        (_, _, notes), _ = restore(tmp_path, abstract_of(state_at(7, size=2_000_000)))
        assert notes == {"window": [[1.0, 2.0]]}


class TestKept:
    def test_on_disk_also_over_a_restart(self, tmp_path):
        losses = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.4, 5: 0.3, 6: 0.2, 7: 0.6}
        rules = {"keep": 1, "keep_every": 4, "keep_best": 1}
        assert save(tmp_path, 1, 2, 3, losses=losses, **rules) == [2, 3]
        assert save(tmp_path, 4, 5, 6, 7, losses=losses, **rules) == [2, 4, 7]
        names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert names == {"2", "4", "7"}  # what was moved away to be deleted is gone

    def test_saves_of_unknown_loss_and_damaged_notes_are_none_of_the_best(self, run):
        # Saved without a loss, and before there were any.
        (run / "checkpoints" / "20" / "notes" / "metadata").write_text("{")
        assert save(run, 30, losses={30: 0.5}, keep=1, keep_best=1) == [30]

    def test_what_a_kill_left_of_a_step_being_deleted_is_no_checkpoint(self, run):
        (run / "checkpoints" / "deleted").mkdir()
        os.rename(run / "checkpoints" / "10", run / "checkpoints" / "deleted" / "10")
        shutil.rmtree(run / "checkpoints" / "deleted" / "10" / "ema")
        assert load_ema(run, warn=pytest.fail)[0] == 20
        assert save(run, 30) == [20, 30]
        assert not (run / "checkpoints" / "deleted").exists()


class TestDamaged:
    @pytest.mark.parametrize("name", ["ema['conv']['kernel']", "optimizer[0]['mu']"])
    def test_one_flipped_bit_is_found_and_named(self, run, name):
        item = name.partition("[")[0]
        leaf = {"ema": state_at(20)["ema"]["conv"]["kernel"], "optimizer": state_at(20)["optimizer"][0]["mu"]}[item]
        flip_a_bit_of(leaf, files_of(run, 20, item))
        (_, state, notes), warnings = restore(run)
        same_bits(state, state_at(10))
        assert notes == {"at": 10}
        (warning,) = warnings
        assert f"checkpoint 20 is damaged (the checksum of {name} differs)" in warning
        assert "damaged_20_0" in warning
        # It is out of the way: the step can be trained and saved again.
        assert save(run, 20) == [10, 20]
        same_bits(restore(run)[0].items, state_at(20))
        flip_a_bit_of(leaf, files_of(run, 20, item))
        restore(run)
        assert sorted(path.name for path in (run / "checkpoints").glob("damaged*")) == ["damaged_20_0", "damaged_20_1"]

    @pytest.mark.parametrize("item", ["optimizer", "notes"])
    @pytest.mark.parametrize("how", ["cut off", "deleted"])
    def test_cut_off_and_deleted_files_are_passed_over(self, run, item, how):
        for file in files_of(run, 20, item):
            if how == "deleted":
                file.unlink()
            else:
                os.truncate(file, file.stat().st_size // 2)
        (_, state, _), warnings = restore(run)
        same_bits(state, state_at(10))
        (warning,) = warnings
        assert warning.startswith("checkpoint 20 is damaged (")
        assert len(warning.splitlines()) == 1

    def test_no_flipped_bit_anywhere_gives_other_numbers(self, saved, tmp_path):
        """Whichever byte of whichever file it is in, what is restored is a step that was saved, whole."""
        random = np.random.default_rng(0)
        files = [file for item in (*ITEMS, "notes") for file in files_of(saved, 20, item)]
        found = []
        for number in range(20):
            run = tmp_path / str(number)
            shutil.copytree(saved, run)
            file = run / files[random.integers(len(files))].relative_to(saved)
            content = bytearray(file.read_bytes())
            content[random.integers(len(content))] ^= 1 << random.integers(8)
            file.write_bytes(content)
            (step, state, _), warnings = restore(run)
            found.append(step)
            same_bits(state, state_at(found[-1]))
            assert len(warnings) == (found[-1] == 10)
            shutil.rmtree(run)
        assert set(found) <= {10, 20}
        assert 10 in found

    def test_all_damaged_is_one_line_and_changes_nothing(self, run):
        for step in (10, 20):
            flip_a_bit_of(state_at(step)["ema"]["conv"]["kernel"], files_of(run, step, "ema"))
        before = sorted(path.name for path in (run / "checkpoints").iterdir())
        message = (
            r"no checkpoint in .* is intact \(2 damaged; 20: the checksum of ema.* differs\): restore .* --workdir$"
        )
        for _ in range(2):  # a second start must not begin anew
            with Checkpoints(run, keep=5, warn=pytest.fail) as checkpoints, pytest.raises(UserError, match=message):
                checkpoints.restore(abstract_of(state_at(0)))
            assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before

    def test_where_all_was_set_aside_a_run_does_not_begin_anew(self, run):
        for step in (10, 20):
            (run / "checkpoints" / str(step)).rename(run / "checkpoints" / f"damaged_{step}_0")
        with (
            Checkpoints(run, keep=5, warn=pytest.fail) as checkpoints,
            pytest.raises(UserError, match=r"is intact \(2 damaged\)"),
        ):
            checkpoints.restore(abstract_of(state_at(0)))

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
            (ValueError("Error opening \"zarr\" driver: [os_error_code='13']"), "Permission denied"),
            (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
            (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes"), "RESOURCE_EXHAUSTED: Out of memory"),
        ],
        ids=["rights", "rights, as TensorStore says it", "files", "memory"],
    )
    def test_what_the_machine_cannot_do_is_no_damage(self, run, monkeypatch, error, said):
        def fail(*arguments, **choices):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(ocp.StandardCheckpointHandler, "restore", fail)
            with (
                Checkpoints(run, keep=5, warn=pytest.fail) as checkpoints,
                pytest.raises(UserError, match=rf"^cannot read checkpoint 20 in .*: {said}.*; fix that"),
            ):
                checkpoints.restore(abstract_of(state_at(0)))
            with pytest.raises(UserError, match=rf"cannot read checkpoint 20 in .*: {said}"):
                load_ema(run, warn=pytest.fail)
        (_, state, _), warnings = restore(run)
        assert not warnings
        same_bits(state, state_at(20))

    def test_a_folder_that_was_renamed_is_named_and_not_restored(self, run):
        (run / "checkpoints" / "20").rename(run / "checkpoints" / "23")
        reason = "it was saved at step 20, and its folder was renamed"
        assert [(found.step, found.damage) for found in verify(run)] == [(10, None), (23, reason)]
        with pytest.raises(UserError, match=rf"checkpoint 23 of .* is damaged \({reason}\): other checkpoints: 10$"):
            load_ema(run, step=23, warn=pytest.fail)
        (_, state, _), (warning,) = restore(run)
        same_bits(state, state_at(10))
        assert f"checkpoint 23 is damaged ({reason}): set aside as " in warning


def test_late_errors_of_orbax_are_silenced_and_no_others(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(absl.logging, "set_verbosity", lambda level: None)
    silence_orbax()
    names = {}
    exec(compile("async def read(): pass", "site-packages/orbax/serialization.py", "exec"), names)
    left_over = names["read"]()
    left_over.close()
    unraisable = lambda error, of: types.SimpleNamespace(exc_value=error, object=of)
    sys.unraisablehook(unraisable(Exception("Encountered error while reading array index"), left_over))
    sys.unraisablehook(unraisable(RuntimeError("Event loop is closed"), None))
    other = unraisable(ValueError("of our own"), None)
    sys.unraisablehook(other)
    assert told == [other]


class TestVerified:
    def test_every_array_of_every_step_is_looked_at(self, run):
        found = list(verify(run))
        arrays = jax.tree.leaves(state_at(0))
        size = sum(leaf.nbytes for leaf in arrays)
        assert found == [(step, len(arrays), size, None) for step in (10, 20)]

    def test_damage_is_named_and_nothing_is_changed(self, run):
        flip_a_bit_of(state_at(10)["optimizer"][0]["mu"], files_of(run, 10, "optimizer"))
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        assert [(found.step, found.damage) for found in verify(run)] == [
            (10, "the checksum of optimizer[0]['mu'] differs"),
            (20, None),
        ]
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    @pytest.mark.parametrize("item", ["optimizer", "notes"])
    def test_what_is_deleted_is_missed(self, run, item):
        shutil.rmtree(run / "checkpoints" / "20" / item)
        whole, damaged = verify(run)
        assert whole.damage is None
        assert damaged.damage
        assert len(damaged.damage.splitlines()) == 1

    def test_an_array_that_is_not_given_back_is_named(self, run, monkeypatch):
        whole = ocp.CheckpointManager.restore

        def without_bias(manager, step, args):
            restored = whole(manager, step, args=args)
            if "ema" in restored.keys():  # noqa: SIM118
                del restored["ema"]["conv"]["bias"]
            return restored

        monkeypatch.setattr(ocp.CheckpointManager, "restore", without_bias)
        assert [found.damage for found in verify(run)] == ["ema['conv']['bias'] is missing"] * 2

    def test_the_optimizers_own_tuples_are_found_again(self, tmp_path):
        params = {"a": {"k": jnp.arange(3.0)}}
        opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
        with Checkpoints(tmp_path, keep=1, warn=pytest.fail) as checkpoints:
            checkpoints.save(1, {"params": params, "ema": params, "optimizer": opt_state}, notes={})
        (verdict,) = verify(tmp_path)
        assert verdict == (1, 5, 12 * 4 + 4, None)


class TestOfAnotherConfiguration:
    def refused(self, run, abstract):
        with pytest.raises(UserError) as error:
            restore(run, abstract)
        assert not list((run / "checkpoints").glob("damaged*"))  # nothing is wrong with it
        return str(error.value)

    def test_other_shapes_are_named(self, run):
        line = self.refused(run, abstract_of(state_at(0, size=99)))
        assert "checkpoint 20 does not fit this configuration" in line
        assert "ema['conv']['kernel'] is (2048,) float32 in the checkpoint, (99,) float32 here" in line

    def test_other_types_are_refused_not_cast(self, run):
        state = state_at(0)
        state = {**state, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state["params"])}
        line = self.refused(run, abstract_of(state))
        assert "params['conv']['bias'] is (2, 3) float32 in the checkpoint, (2, 3) bfloat16 here" in line

    def test_missing_and_needless_arrays_are_named(self, run):
        state = state_at(0)
        more = {**state, "ema": {**state["ema"], "more": jnp.zeros(3)}}
        assert "ema['more'] is absent in the checkpoint, (3,) float32 here" in self.refused(run, abstract_of(more))
        fewer = {**state, "optimizer": ({"count": jnp.int32(0)},)}
        line = self.refused(run, abstract_of(fewer))
        assert "optimizer[0]['mu'] is (2048,) float32 in the checkpoint, absent here" in line

    @pytest.mark.parametrize("here", ["with", "without"])
    def test_a_memory_of_times_must_be_on_both_sides(self, tmp_path, here):
        state = {"with": state_at(1), "without": {**state_at(1), "time_sampling": ()}}
        there = "without" if here == "with" else "with"
        with Checkpoints(tmp_path, keep=2, warn=pytest.fail) as checkpoints:
            checkpoints.save(1, state[there], notes={})
        line = self.refused(tmp_path, abstract_of(state[here]))
        assert "time_sampling['losses']" in line
        assert "absent" in line


class TestAverage:
    def test_is_loaded_alone_onto_one_device(self, run):
        for item in ("params", "optimizer", "time_sampling"):
            shutil.rmtree(run / "checkpoints" / "20" / item)
        step, ema = load_ema(run, warn=pytest.fail)
        assert step == 20
        same_bits(ema, state_at(20)["ema"])
        assert {leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(ema)} == {True}

    def test_of_a_step_asked_for(self, saved):
        step, ema = load_ema(saved, step=10, warn=pytest.fail)
        assert step == 10
        same_bits(ema, state_at(10)["ema"])
        with pytest.raises(UserError, match="has no checkpoint of step 15: there are 10, 20"):
            load_ema(saved, step=15, warn=pytest.fail)

    def test_of_a_damaged_checkpoint(self, run):
        flip_a_bit_of(state_at(20)["ema"]["conv"]["kernel"], files_of(run, 20, "ema"))
        warnings = []
        step, ema = load_ema(run, warn=warnings.append)
        assert (step, len(warnings)) == (10, 1)
        same_bits(ema, state_at(10)["ema"])
        with pytest.raises(UserError, match=r"checkpoint 20 of .* is damaged \(.*\): other checkpoints: 10"):
            load_ema(run, step=20, warn=warnings.append)
        assert (run / "checkpoints" / "20").is_dir()  # it only reads

    def test_of_no_run_and_of_one_that_has_not_saved(self, tmp_path):
        with pytest.raises(UserError, match="it is not the folder of a run"):
            load_ema(tmp_path, warn=pytest.fail)
        (tmp_path / "checkpoints").mkdir()
        with pytest.raises(UserError, match="the run has not saved yet"):
            load_ema(tmp_path, warn=pytest.fail)


class TestFailingDisk:
    # In a process of its own: the limit cannot be taken back.
    FULL = """
        import json, resource, signal, sys
        from pathlib import Path
        import jax.numpy as jnp
        from ddpm_jax.system.errors import UserError
        from ddpm_jax.run.checkpoints import Checkpoints, load_ema


        def state(value, size):
            tree = {"w": jnp.arange(size, dtype=jnp.float32) * value}
            return {"params": tree, "ema": tree, "optimizer": tree}

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with Checkpoints(Path(sys.argv[1]), keep=2, warn=print) as checkpoints:
                checkpoints.save(1, state(1, 100), notes={})
                checkpoints.wait()
                _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
                checkpoints.save(2, state(2, 300_000), notes={})
                checkpoints.wait()
        except UserError as error:
            print(json.dumps(str(error)))
    """

    def test_a_full_disk_keeps_the_last_good_checkpoint(self, tmp_path):
        environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(self.FULL), tmp_path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        line = json.loads(done.stdout.splitlines()[-1])
        assert f"cannot save step 2 to {tmp_path / 'checkpoints'}: " in line
        assert "step 1 is the last good checkpoint" in line
        assert len(line.splitlines()) == 1
        step, ema = load_ema(tmp_path, warn=pytest.fail)
        assert step == 1
        np.testing.assert_array_equal(ema["w"], np.arange(100, dtype=np.float32))

    def test_a_folder_that_cannot_be_made_is_one_line(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write to"):
            Checkpoints(tmp_path / "file", keep=1, warn=pytest.fail)

    def test_a_failure_under_way_is_not_hidden_by_that_of_the_disk(self, tmp_path):
        with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, keep=1, warn=pytest.fail) as checkpoints:  # noqa: PT012
            checkpoints.save(1, state_at(1), notes={})
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
            raise ZeroDivisionError


def test_a_checkpoint_that_training_replaces_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    """As `checkpoints.keep` 1 does: the next one is read."""
    restore, left = ocp.CheckpointManager.restore, [2, 3]

    def replaced_meanwhile(manager, step, **rest):
        if left:
            save(tmp_path, left.pop(0), keep=1)
        return restore(manager, step, **rest)

    save(tmp_path, 1)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", replaced_meanwhile)
    step, ema = load_ema(tmp_path, warn=pytest.fail)
    assert step == 3
    chex.assert_trees_all_equal(ema, state_at(3)["ema"])
    left.append(4)
    assert [(verdict.step, verdict.damage) for verdict in verify(tmp_path)] == [(4, None)]
    left.append(5)
    with pytest.raises(UserError, match="has no checkpoint of step 4: there are 5"):
        load_ema(tmp_path, step=4, warn=pytest.fail)
