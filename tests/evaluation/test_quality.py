import dataclasses
import re

import numpy as np
import pytest
import threadpoolctl

from ddpm_jax.config import Config, DataConfig
from ddpm_jax.data.sources import load_source
from ddpm_jax.evaluation.quality import config_of, judge, judge_file, own_frechet_distances, summary
from ddpm_jax.run.record import save_config
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import read_json

DATA = DataConfig()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def train():
    return load_source(DATA)


@pytest.fixture(scope="module")
def test():
    return load_source(dataclasses.replace(DATA, split="test"))


@pytest.fixture(scope="module")
def shuffled(train):
    """Half of the digits, mixed: the writers follow each other in the set."""
    return train.images[np.random.default_rng(1).permutation(train.num_examples)[:600]]


@pytest.fixture(scope="module")
def of_real(train, test, shuffled):
    return judge(shuffled, train, test)


def test_real_images_pass_as_real(of_real):
    assert of_real.ratio < 1.2
    assert of_real.confidence > 0.95
    assert of_real.accuracy > 0.95
    assert min(of_real.counts.values()) >= 40
    assert sum(of_real.counts.values()) == of_real.images == 600
    assert of_real.images_compared == 600
    assert of_real.fd_own == pytest.approx(of_real.ratio * of_real.fd_own_of_real)


def test_the_more_noise_the_further_from_real(train, shuffled, of_real):
    noise = np.random.default_rng(0).normal(size=shuffled.shape)
    ratios = [judge(np.clip(shuffled + level * noise, 0, 255).astype(np.uint8), train).ratio for level in (20, 60)]
    assert of_real.ratio < ratios[0] < ratios[1]
    assert ratios[1] > 3


def test_one_class_alone_is_seen_in_the_counts_and_the_distance(train, of_real):
    threes = train.images[train.labels == 3]
    quality = judge(threes, train)
    assert quality.counts["3"] > 0.97 * len(threes)
    assert quality.ratio > 10 * of_real.ratio
    assert quality.accuracy is None
    assert quality.confidence_of_real is None


def test_the_same_images_are_judged_the_same(train, test, shuffled, of_real):
    again = judge(shuffled, train, test)
    assert again.counts == of_real.counts
    assert again.fd_own == pytest.approx(of_real.fd_own, rel=1e-4)


def test_sets_from_one_distribution_have_ratio_one():
    random = np.random.default_rng(0)
    of_generated, of_real, size = own_frechet_distances(random.normal(size=(3000, 5)), random.normal(size=(1000, 5)))
    assert size == 500
    # Each distance of 20 is about chi-squared with 5 + 15 degrees of freedom, and they share images.
    assert of_generated / of_real == pytest.approx(1, abs=0.25)


def test_a_file_is_judged_and_the_result_written_beside_it(shuffled, tmp_path):
    save_config(Config(data=DATA), tmp_path / "config.json")
    file = tmp_path / "samples" / "any" / "samples.npz"
    file.parent.mkdir(parents=True)
    np.savez(file, arr_0=shuffled[:100])
    quality = judge_file(file, config_of(file, None), number=80)
    assert quality.images == 80
    assert quality.accuracy > 0.95
    assert read_json(file.parent / "quality.json") == dataclasses.asdict(quality)
    confidence, _, distance, images = summary(quality).splitlines()
    assert images == "real images: digits, train (1438 images); held out: digits, test (359 images)"
    assert re.search(r"\(held-out real images: 0\.\d{3}, accuracy \d\d\.\d%\)$", confidence)
    assert re.fullmatch(r"FD-own [\d.]+; real vs real [\d.]+; ratio [\d.]+ \(80 images per side\)", distance)


def test_slips_are_one_line_each(train, shuffled, tmp_path):
    unlabeled = dataclasses.replace(train, read_labels=None)
    with pytest.raises(UserError, match="no labels"):
        judge(shuffled, unlabeled)
    with pytest.raises(UserError, match=r"too large.*64x64x3"):
        judge(shuffled, dataclasses.replace(train, image_shape=(256, 256, 3)))
    with pytest.raises(UserError, match="both must be the same"):
        judge(shuffled[:, :4], train)
    with pytest.raises(UserError, match="at least 2"):
        judge(shuffled[:1], train)
    np.savez(tmp_path / "few.npz", arr_0=shuffled[:10])
    with pytest.raises(UserError, match="contains 10 images: use --num 10"):
        judge_file(tmp_path / "few.npz", Config(data=DATA), number=512)
    with pytest.raises(UserError, match="not in the folder of a run"):
        config_of(tmp_path / "few.npz", None)
    assert config_of(tmp_path / "few.npz", "digits").data.source == "digits"


def test_a_damaged_test_split_is_not_taken_for_none(train, tmp_path):
    np.save(tmp_path / "train.npy", train.images)
    (tmp_path / "test.npy").write_bytes((tmp_path / "train.npy").read_bytes()[:-1])
    np.savez(tmp_path / "drawn.npz", train.images[:4])
    config = Config(data=dataclasses.replace(DATA, source="npy", path=str(tmp_path)))
    with pytest.raises(UserError, match="test.npy is not a readable"):
        judge_file(tmp_path / "drawn.npz", config, number=4)


def test_held_out_images_that_the_classifier_saw_are_counted(train, test, shuffled, of_real):
    assert of_real.held_out_shared == 0
    assert "warning" not in summary(of_real)
    seen = judge(shuffled[:50], train, dataclasses.replace(train, name="again"))
    assert seen.held_out_shared == train.num_examples
    assert f"warning: {train.num_examples} of the held-out images are also among the real images" in summary(seen)
