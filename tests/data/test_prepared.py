import dataclasses
import functools
import io
import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddpm_jax.data import prefetch, shared, sources

# Pillow would start Ghostscript for it.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(6, 8, 3), encoding_format="png")
        label = tfds.features.ClassLabel(names=["cat", "dog"])
        mask = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        features = {"image": image, "label": label, "mask": mask}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "image": png(np.full((6, 8, 3), 10 * count + i, np.uint8)),
                    "label": i % 2,
                    "mask": io.BytesIO(POSTSCRIPT),
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_a_prepared_set_is_read(sets, prepared):
    source = sources.load_source(sets.config("tfds:tiny_pictures", prepared, (6, 8)))
    assert source.num_examples == 5
    assert source.image_shape == (6, 8, 3)
    assert source.class_names == ("cat", "dog")
    values = sets.everything(source)[:, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(np.sort(values), 50 + np.arange(5))
    np.testing.assert_array_equal(source.labels, (values - 50) % 2)
    assert sources.probe_channels(sets.config("tfds:tiny_pictures", prepared)) == 3
    whole = sources.load_source(sets.config("tfds:tiny_pictures", prepared, (6, 8), split="all"))
    assert whole.num_examples == 8
    part = sources.load_source(sets.config("tfds:tiny_pictures", prepared, (6, 8), split="train[:2]"))
    np.testing.assert_array_equal(sets.everything(part), sets.everything(source)[:2])


@pytest.mark.parametrize("memory_gib", [1.0, 0.0])
def test_images_that_splits_share_are_counted(sets, prepared, memory_gib):
    split = lambda name: sources.load_source(
        sets.config("tfds:tiny_pictures", prepared, (6, 8), 3, split=name, memory_gib=memory_gib)
    )
    count = functools.partial(shared.count_shared, most_read=0)
    assert count(split("train"), split("train[:60%]")) == 3
    assert count(split("train[1:]"), split("train[:2]")) == 1
    assert count(split("train[3:]"), split("train[:3]")) == 0
    assert count(split("test"), split("train+test")) == 3
    assert count(split("test"), split("train")) == 0


def test_a_prepared_set_is_read_from_disk_resized_and_converted(sets, prepared):
    held, read = (
        sources.load_source(sets.config("tfds:tiny_pictures", prepared, (3, 3), 1, memory_gib=gib))
        for gib in (1.0, 0.0)
    )
    assert held.images is not None
    assert read.images is None
    assert read.image_shape == (3, 3, 1)
    indices = np.array([4, 1, 1])
    np.testing.assert_array_equal(held.read(indices), read.read(indices))
    np.testing.assert_array_equal(read.read_labels(indices), held.labels[indices])
    with (
        prefetch.batches(held, 3, 2, 6, batch_size=2) as wanted,
        prefetch.batches(read, 3, 2, 6, batch_size=2) as found,
    ):
        for there, here in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(here.images, there.images)
            np.testing.assert_array_equal(here.labels, there.labels)
    np.testing.assert_array_equal(held.labels, read.labels)


@pytest.mark.parametrize(
    ("name", "others", "said"),
    [
        ("tfds:tiny_pictures", {"split": "val"}, "no split 'val'; it has train, test"),
        ("tfds:tiny_pictures", {"channels": 2}, "must be 1, 3 or 4"),
        ("tfds:cifar10", {}, "`pip install -r requirements-tfds.txt`"),
        ("tfds:cifar10", {}, "`tfds build cifar10 --file_format=array_record --data_dir="),
        ("tfds:celeb_a_hq/256", {}, "files are to be downloaded by hand, into "),
        ("tfds:celeb_a_hq/256", {}, "downloads/manual: manual_dir should contain"),
        ("tfds:cifer10", {}, "did you mean cifar10"),
        ("tfds:lsun/bedrom", {}, "no configuration 'bedrom'; it has bedroom"),
        ("tfds:cifar10:9.9.9", {}, "cannot be loaded at version 9.9.9"),
        ("tfds:imdb_reviews", {}, "no feature 'image' that is one picture; it has label, text"),
    ],
)
def test_a_set_that_tfds_cannot_give_is_refused_without_a_look_at_the_network(
    sets, prepared, monkeypatch, name, others, said
):
    def no_network(*arguments, **named):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert said in sets.refused(sets.config(name, prepared, **others))


def test_a_set_without_a_test_part_holds_out_itself(sets, prepared, tmp_path):
    config = sets.config("tfds:tiny_pictures", prepared, (6, 8), 3)
    assert sources.load_held_out(config).num_examples == 3
    shutil.copytree(prepared, tmp_path / "copy")
    (info,) = (tmp_path / "copy").rglob("dataset_info.json")
    described = json.loads(info.read_text())
    described["splits"] = [split for split in described["splits"] if split["name"] == "train"]
    info.write_text(json.dumps(described))
    assert sources.load_held_out(dataclasses.replace(config, path=str(tmp_path / "copy"))).num_examples == 5


def test_a_package_that_is_missing_is_named(sets, prepared, monkeypatch):
    def missing(*arguments, **named):
        raise ModuleNotFoundError("No module named 'importlib_resources'", name="importlib_resources")

    monkeypatch.setattr(tfds, "builder", missing)
    message = sets.refused(sets.config("tfds:tiny_pictures", prepared, (6, 8), 3))
    assert "needs the package importlib_resources: `pip install -r requirements.txt`" in message


def test_a_set_without_random_access_is_refused(sets, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    (info,) = (tmp_path / "copy").rglob("dataset_info.json")
    described = json.loads(info.read_text()) | {"fileFormat": "tfrecord"}
    info.write_text(json.dumps(described))
    for old in info.parent.glob("*.array_record-*"):
        old.rename(old.with_name(old.name.replace("array_record", "tfrecord")))
    message = sets.refused(sets.config("tfds:tiny_pictures", tmp_path / "copy", (6, 8), 3))
    assert "prepared as tfrecord" in message


def test_tfds_is_read_without_tensorflow_and_imported_only_when_asked_for(prepared):
    program = f"""
import sys
from ddpm_jax.config import DataConfig
from ddpm_jax.data.sources import load_source
load_source(DataConfig())
assert "tensorflow_datasets" not in sys.modules
config = DataConfig(source="tfds:tiny_pictures", path={str(prepared)!r}, height=6, width=8, channels=None)
assert load_source(config).read([0]).shape == (1, 6, 8, 3)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def copy_of(prepared, folder, name, change):
    """Copies a set, with one of its files of JSON changed, under a name of which TFDS has no program."""
    shutil.copytree(prepared / "tiny_pictures", folder / "found_pictures")
    for old in list(folder.rglob("tiny_pictures-*")):
        old.rename(old.with_name(old.name.replace("tiny_pictures", "found_pictures")))
    (info,) = folder.rglob("dataset_info.json")
    info.write_text(info.read_text().replace("tiny_pictures", "found_pictures"))
    (file,) = folder.rglob(name)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return file


@pytest.mark.parametrize("how", ["proto", "legacy", "in a text"])
def test_features_that_are_not_of_tfds_are_named_and_not_imported(sets, prepared, tmp_path, monkeypatch, how):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    evil = {"pythonClassName": "evil.Feature", "tensor": {"shape": {}, "dtype": "uint8"}}
    if how == "legacy":
        evil = {"type": "evil.Feature", "content": {}}
    elif how == "in a text":
        inner = json.dumps({"feature": {"type": "evil.Feature", "content": {}}, "length": None})
        evil = {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "jsonFeature": {"json": inner},
        }

    def add(features):
        if how == "legacy":
            return evil
        features["featuresDict"]["features"]["other"] = evil
        return features

    wanted = sets.config("tfds:found_pictures", tmp_path / "copy", (6, 8), 3)
    file = copy_of(prepared, tmp_path / "copy", "features.json", lambda features: features)
    assert sources.load_source(wanted).num_examples == 5
    file.write_text(json.dumps(add(json.loads(file.read_text()))))
    message = sets.refused(wanted)
    assert "asks for the module evil, which would be run" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features.json", lambda features: {}),
        ("features.json", lambda features: [[[1]]]),
        ("features.json", lambda features: {"pythonClassName": "x"}),
        ("dataset_info.json", lambda info: info | {"splits": []}),
        ("dataset_info.json", lambda info: info | {"splits": [{"name": "train", "shardLengths": ["-5"]}]}),
        ("dataset_info.json", lambda info: 3),
    ],
)
def test_damaged_descriptions_are_one_line(sets, prepared, tmp_path, name, change):
    copy_of(prepared, tmp_path / "copy", name, change)
    sets.refused(sets.config("tfds:found_pictures", tmp_path / "copy", (6, 8), 3))


def test_what_is_no_file_of_tfds_is_not_opened(sets, prepared, tmp_path):
    file = copy_of(prepared, tmp_path / "copy", "features.json", lambda features: features)
    file.unlink()
    os.mkfifo(file)
    message = sets.refused(sets.config("tfds:found_pictures", tmp_path / "copy", (6, 8), 3))
    assert "is no file that TFDS wrote" in message


def test_a_dangling_link_in_a_good_set_is_passed_over(sets, prepared, tmp_path):
    file = copy_of(prepared, tmp_path / "copy", "features.json", lambda features: features)
    (file.parent.parent / "0.9.0").symlink_to(tmp_path / "gone")
    assert sources.load_source(sets.config("tfds:found_pictures", tmp_path / "copy", (6, 8), 3)).num_examples == 5


def test_a_program_of_a_community_is_not_downloaded(sets):
    assert "would be downloaded and run" in sets.refused(sets.config("tfds:kaggle:cats"))
    assert "would be downloaded and run" in sets.refused(sets.config("tfds:huggingface:mnist/plain:1.0.0"))
