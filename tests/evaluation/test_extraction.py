import numpy as np
import pytest

from ddpm_jax.data.source import in_memory
from ddpm_jax.evaluation.extraction import extract
from ddpm_jax.evaluation.features import Extractor, Features, users_features
from ddpm_jax.evaluation.image_sets import of_source
from ddpm_jax.generation.store import Parts
from ddpm_jax.system.errors import UserError

IMAGES = of_source(in_memory(np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8), name="set"))
PIXELS = IMAGES.read(np.arange(50)).reshape(50, -1).astype(np.float32)


def own(apply):
    return Extractor(Features("own", apply, None, "1", "", on_host=True), batch_size=8)


@pytest.fixture
def few_per_part(monkeypatch):
    monkeypatch.setattr("ddpm_jax.evaluation.extraction._IMAGES_PER_PART", 16)


def test_what_is_interrupted_resumes_without_repeating(few_per_part, tmp_path):
    seen, stop_at = [], [5]

    def apply(params, images):
        if len(seen) == stop_at[0]:
            raise KeyboardInterrupt
        seen.append(len(images))
        rows = images.reshape(len(images), -1).astype(np.float32)
        return {"pool": rows, "logits": -rows[:, :3]}

    parts = Parts(tmp_path / "parts", {"set": "a"})
    with pytest.raises(KeyboardInterrupt):
        extract(IMAGES, own(apply), parts)
    assert parts.ranges() == [(0, 16), (16, 32)]
    stop_at[0] = None
    seen.clear()
    found = extract(IMAGES, own(apply), parts)
    assert sum(seen) == 18
    assert np.array_equal(found["pool"], PIXELS)
    assert np.array_equal(found["logits"], -PIXELS[:, :3])

    # A damaged part is computed again.
    damaged = next(parts.folder.glob("00000016-*"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    seen.clear()
    assert np.array_equal(extract(IMAGES, own(apply), parts)["pool"], PIXELS)
    assert sum(seen) == 16
    parts.remove()
    assert [path.name for path in parts.folder.iterdir()] == [f"{damaged.name}.damaged"]


def test_a_part_that_is_damaged_after_it_was_saved_is_not_scored(few_per_part, tmp_path):
    parts = Parts(tmp_path / "parts", {"set": "a"})

    def apply(params, images):
        for path in parts.folder.glob("00000000-*"):  # while the others are computed
            path.write_bytes(path.read_bytes()[:100])
        return {"pool": images.reshape(len(images), -1).astype(np.float32)}

    with pytest.raises(UserError, match="some features are missing in .*: run the same command again"):
        extract(IMAGES, own(apply), parts)


def test_batches_and_devices_do_not_change_features():
    network = Features("mean", lambda params, images: {"pool": images.mean(axis=(1, 2)) * params}, 2.0, "1", "")
    images = IMAGES.read(np.arange(11))
    expected = 2 * images.astype(np.float32).mean(axis=(1, 2))
    for batch_size in (1, 8, 24):
        assert np.allclose(Extractor(network, batch_size=batch_size)(images)["pool"], expected, rtol=1e-6)
    gray = images[..., :1]
    assert np.allclose(Extractor(network, batch_size=8)(gray)["pool"], expected[:, :1].repeat(3, axis=1), rtol=1e-6)
    with pytest.raises(UserError, match="1 or 3 channels, not 2"):
        Extractor(network, batch_size=8)(images[..., :2])


def test_a_users_function_and_its_faults(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "def rows(images): return images.reshape(len(images), -1)\n"
        "def flat(images): return images.ravel()\n"
        "def none(images): return images.reshape(len(images), -1)[:, :0]\n"
        "def divided(images): return images[:, 0, 0] * float('inf')\n"
        "def Inception(images): return images[:, 0, 0]\n"
        "def fails(images):\n    raise KeyError('weights')\n"
    )
    images = IMAGES.read(np.arange(5))
    features = users_features(f"{file}:rows")
    assert features.name == "rows"
    assert len(features.identity) == 64
    assert np.array_equal(Extractor(features, batch_size=2)(images)["pool"], PIXELS[:5])
    for name, words in {
        "flat": r"must return \(\d, D\) numbers .* not \(\d+,\)",
        "none": "at least one number per image",
        "divided": "must return finite float32 numbers, not NaN or infinity",
        "fails": r"line 7: KeyError: 'weights'",
    }.items():
        with pytest.raises(UserError, match=words):
            Extractor(users_features(f"{file}:{name}"), batch_size=2)(images)
    with pytest.raises(UserError, match="Inception is the name of built-in features"):
        users_features(f"{file}:Inception")
    with pytest.raises(UserError, match="has no function row; did you mean rows"):
        users_features(f"{file}:row")
