"""Folders of diffusers as a user meets them: written, read, sampled from, damaged."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from ddpm_jax.config import TrainConfig
from ddpm_jax.interop.diffusers import is_diffusers_folder, read_folder, read_folder_config, write_folder
from ddpm_jax.run.command import parse_run
from ddpm_jax.run.init_from import start_from
from ddpm_jax.run.trained import Images, load_run, with_images
from ddpm_jax.run.weights import checksum
from ddpm_jax.system.errors import UserError

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Options:
    """No options."""


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """A class-conditional model of the digits' size, and its folder."""
    config = runs.make_config(num_classes=2)
    config = dataclasses.replace(config, train=TrainConfig(label_dropout=0.2, ema_decay=0.5), name="tiny")
    folder, params = tmp_path_factory.mktemp("models") / "tiny", runs.random_params(config)
    write_folder(folder, params, config=config, step=1234, class_names=["cat", "dog"], license="mit")
    return folder, config, params


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may damage."""
    return copy(written[0], tmp_path / "copy")


def copy(folder, to):
    for file in folder.rglob("*.*"):
        target = to / file.relative_to(folder)
        if file.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_it_comes_back_bit_by_bit(written):
    folder, config, params = written
    assert is_diffusers_folder(folder)
    trained = load_run(folder)
    assert checksum(trained.params) == checksum(params)
    assert (trained.step, trained.class_names) == (1234, ("cat", "dog"))
    for section in ("data", "model", "diffusion"):
        assert getattr(trained.config, section) == getattr(config, section)
    assert trained.config.train.label_dropout == 0.2


@pytest.mark.parametrize("spacing", [None, "linspace"])
def test_the_spacing_comes_back(spacing, written, folder):
    _, config, params = written
    diffusion = dataclasses.replace(config.diffusion, spacing=spacing)
    config = dataclasses.replace(config, diffusion=diffusion)
    write_folder(folder, params, config=config, step=1, overwrite=True)
    assert read_folder(folder).config.diffusion == diffusion
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # without our record
    assert read_folder(folder).config.diffusion.spacing == "linspace"


def test_two_exports_are_the_same_bytes(written, tmp_path):
    folder, config, params = written
    write_folder(tmp_path / "again", params, config=config, step=1234, class_names=["cat", "dog"], license="mit")
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert [str(file) for file in files] == [
        *("README.md", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS)
    ]
    assert all((folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_the_model_card_says_what_it_is_and_whose_average(written):
    card = (written[0] / "README.md").read_text()
    header = card.split("---")[1]
    for line in ("license: mit", "library_name: diffusers", "pipeline_tag: unconditional-image-generation"):
        assert f"\n{line}\n" in header
    assert "exponential moving average (EMA)" in card
    assert "decay 0.5" in card
    assert "1,234 of batch size 128" in card
    assert "Classes: 0 cat, 1 dog." in card
    assert "labels = torch.arange(16) % 2" in card


def test_the_card_of_weights_from_elsewhere_says_nothing_of_their_training(written, tmp_path):
    _, config, params = written
    write_folder(tmp_path / "model", params, config=config, step=5, trained_here=False)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "## Use" in card
    assert "Training" not in card
    assert "EMA" not in card


@pytest.mark.parametrize(("source", "path"), [("folder", "/home/me/photos"), ("/home/me/my_data.py:load", "")])
def test_nothing_of_the_machine_is_in_an_export(runs, tmp_path, source, path):
    config = runs.make_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, path=path))
    config = dataclasses.replace(config, train=TrainConfig(init_from="/home/me/models/cats"))
    write_folder(tmp_path / "model", runs.random_params(config), config=config, step=1)
    files = [file for file in (tmp_path / "model").rglob("*") if file.is_file()]
    assert len(files) == 5
    assert not any(b"/home/me" in file.read_bytes() for file in files)


def test_an_export_overwrites_knowingly(written, folder, tmp_path):
    _, config, params = written
    with pytest.raises(UserError, match="already contains an exported model: use --overwrite"):
        write_folder(folder, params, config=config, step=5)
    write_folder(folder, params, config=config, step=5, overwrite=True)
    assert read_folder(folder).step == 5
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not empty and contains no exported model"):
        write_folder(tmp_path / "other", params, config=config, step=5, overwrite=True)


def test_fields_that_were_changed_in_the_files_count(folder):
    change(folder / "scheduler" / "scheduler_config.json", clip_sample=False, timestep_spacing="trailing")
    diffusion = load_run(folder).config.diffusion
    assert not diffusion.clip_x0
    assert diffusion.spacing == "trailing"


def test_a_model_that_diffusers_saved_again_has_one_more_class(folder, written):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # without our record
    change(folder / "unet" / "config.json", id2label={"0": "cat", "1": "dog", "2": "none"})
    trained = load_run(folder)
    assert (trained.step, trained.config.model.num_classes) == (0, 3)
    assert trained.class_names == ("cat", "dog", "none")
    assert trained.config.train.label_dropout == 0
    table = trained.params["class_embedding"]["embedding"]
    np.testing.assert_array_equal(table[:3], written[2]["class_embedding"]["embedding"])
    assert not table[3].any()


@pytest.mark.parametrize("record", ["[]", "{", '{"step": "x"}', "[" * 10**5])
def test_a_record_that_is_not_ours_is_as_none(folder, record):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"ddpm_jax": record})
    assert read_folder(folder).config.model.num_classes == 3


def test_a_record_cannot_name_code(folder):
    record = json.dumps({"step": 1, "source": "evil.py:run", "label_dropout": 0.1, "class_names": []})
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"ddpm_jax": record})
    assert read_folder(folder).config.data.source == "folder"


def damage_arrays(folder, **arrays):
    whole = load_file(folder / WEIGHTS)
    for name, array in arrays.items():
        whole[name] = array
        if array is None:
            del whole[name]
    save_file(whole, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "cannot read .*scheduler_config.json"),
        (lambda f: (f / "unet" / "config.json").write_text("{"), r"unet.config.json is damaged"),
        (lambda f: (f / "unet" / "config.json").write_text("[]"), r"unet.config.json must be a JSON object"),
        (lambda f: (f / "unet" / "config.json").write_text("[" * 10**5), r"unet.config.json is damaged"),
        (lambda f: (f / WEIGHTS).unlink(), "has no weights: looked for diffusion_pytorch_model.safetensors, "),
        (lambda f: (f / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "cannot read .*safetensors"),
        (lambda f: change(f / "model_index.json", vqvae=["diffusers", "VQModel"]), "with vqvae is not supported"),
        (lambda f: change(f / "unet" / "config.json", sample_size=0), "data.height=0 must be at least 1"),
        (lambda f: change(f / "unet" / "config.json", norm_num_groups=3), "not divisible by 3 groups"),
        (lambda f: change(f / "unet" / "config.json", layers_per_block=2), "do not fit: .*is absent in the weights"),
        (lambda f: damage_arrays(f, extra=np.zeros(2, np.float32)), "has an array extra, which the network"),
        (lambda f: damage_arrays(f, **{"conv_in.bias": np.zeros(8, np.int32)}), "conv_in.bias is of int32"),
        (lambda f: damage_arrays(f, **{"conv_in.bias": np.zeros(7, np.float32)}), "do not fit: .*conv_in.*bias"),
        (lambda f: damage_arrays(f, **{"class_embedding.weight": None}), r"shape \(0, 0\), but num_class_embeds is 3"),
        (lambda f: damage_arrays(f, **{"conv_in.bias": None}), "do not fit: .*conv_in.*bias.* absent in the weights"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        load_run(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "", ".."])
def test_a_shard_outside_of_the_folder_is_refused(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"conv_in.bias": name}}))
    with pytest.raises(UserError, match="does not name files in the same folder"):
        read_folder(folder)


def test_shards_with_the_same_array_are_refused(folder):
    for name in ("a", "b"):
        save_file({"conv_in.bias": np.zeros(8, np.float32)}, folder / "unet" / f"{name}.safetensors")
    (folder / WEIGHTS).unlink()
    weight_map = {"conv_in.bias": "a.safetensors", "conv_in.weight": "b.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"b.safetensors has the array conv_in.bias, which another file of .* has too"):
        read_folder(folder)


def test_weights_that_would_fill_the_memory_are_not_read(folder):
    with (folder / WEIGHTS).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="too large for a file of weights: 1,099,511,627,776 bytes"):
        read_folder(folder)
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": "a.bin", "y": "b.bin"}}))
    for name in ("a", "b"):
        with (folder / "unet" / f"{name}.bin").open("wb") as file:
            file.truncate(2**34)
    with pytest.raises(UserError, match="index.json is too large for a file of weights"):
        read_folder(folder)


def test_a_folder_of_neither_kind_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"neither a run nor a model .*: looked for config.json of a run; model_index"):
        load_run(tmp_path)


def test_it_has_one_checkpoint(folder):
    with pytest.raises(UserError, match="--step needs a run with checkpoints"):
        load_run(folder, step=3)


def test_where_images_cannot_be_written_another_folder_is_asked_for(folder, run_script):
    (folder / "samples").touch()
    status, out, err = run_script("sample.py", folder, "--num", "1", "--sampler", "ddim", "--steps", "2")
    assert status == 2
    assert re.search(r"cannot write to .*samples.*; give another --out", err)


def test_its_images_are_named_on_the_command_line(folder, tmp_path):
    trained = load_run(folder)
    assert with_images(trained, Images()) is trained
    assert with_images(trained, Images(config="configs/digits.py")).config.data == trained.config.data
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "images" / "one.png")
    named = with_images(trained, Images(path=str(tmp_path / "images"), config="configs/image_folder.py"))
    data = named.config.data
    assert (data.source, data.height, data.width, data.channels) == ("folder", 8, 8, 1)


def test_a_run_starts_from_it(written, tmp_path, capsys):
    folder, config, params = written
    drawn = jax.tree.map(lambda array: array * 0, params)
    ours = dataclasses.replace(config, model=dataclasses.replace(config.model, cos_first=True))
    started, ema = start_from(folder, drawn, drawn, run=tmp_path / "run", config=ours)
    assert checksum(started) == checksum(ema) == checksum(params)
    shown = capsys.readouterr().err
    assert f"starting from the weights of {folder}, step 1234:" in shown
    assert "warning: these weights were trained with model.cos_first=False (True here)" in shown


def test_train_takes_it_as_a_configuration(written):
    folder, config, _ = written
    read = parse_run(Options, [str(folder), "--train.steps", "9", "--data.path", "images"])
    assert read.folder is None
    assert read.config.train.init_from == str(folder)
    assert (read.config.train.steps, read.config.data.path) == (9, "images")
    assert read.config.model == config.model


def test_its_configuration_is_read_without_the_weights(folder):
    wanted = read_folder(folder).config
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert read_folder_config(folder) == wanted
    damage_arrays(folder)  # as diffusers saves them, without our record
    assert read_folder_config(folder) == read_folder(folder).config
    weights.unlink()  # a run that has a checkpoint needs no others
    assert parse_run(Options, [str(folder)]).config.model == read_folder_config(folder).model


def test_sampling_from_it_is_sampling_from_the_run(written, runs, tmp_path, run_script):
    folder, config, params = written
    trained = runs.make_trained(config, folder=tmp_path / "run")._replace(params=params, step=1234)
    run = runs.save_runs(trained, folder=tmp_path / "run")
    images = []
    for each in (folder, run):
        out = tmp_path / f"{each.name}.npz"
        status, *_ = run_script("sample.py", each, "--num", "2", "--sampler", "ddim", "--steps", "4", "--out", out)
        assert status in (None, 0)
        images.append(np.load(out)["arr_0"])
    np.testing.assert_array_equal(*images)
    assert len({image.tobytes() for image in images[0]}) == 2
