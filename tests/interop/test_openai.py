"""The networks of improved-diffusion, guided-diffusion and pesser: the same output as their own code, in our U-Net."""

import json
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from ddpm_jax.interop import openai, original
from ddpm_jax.interop.checkpoints import RELEASED, read_checkpoint
from ddpm_jax.interop.flags import parse_flags
from ddpm_jax.run.build import build_network, build_schedule
from ddpm_jax.run.validation import validate
from ddpm_jax.system.errors import UserError

HERE = Path(__file__).parent
STORE = runpy.run_path(str(HERE / "store_values.py"), run_name="store_values")
FLAGS = {
    "scale_shift_4_heads": "--image_size 32 --diffusion_steps 4000 --noise_schedule cosine",
    "classes_learned_variance": "--image_size 16 --num_heads 1 --rescale_timesteps False --class_cond True",
    "new_attention_order": "--image_size 16 --num_head_channels 16 --use_new_attention_order True --channel_mult 1,2",
    "resampling_blocks": "--image_size 16 --num_head_channels 32 --noise_schedule cosine",
    "pesser": "--model_var_type fixedsmall",
}


@pytest.fixture(scope="module")
def stored():
    with np.load(HERE / "values.npz") as values:
        shapes = json.loads(str(values["shapes"]))
        return {name: (shapes[name], values[name]) for name in shapes}


def read(name, shapes, flags=None):
    arrays = {each: STORE["draw"](each, tuple(shape)) for each, shape in shapes.items()}
    flags = FLAGS[name] if flags is None else flags
    if name == "pesser":
        return original.read_pesser(arrays, parse_flags(flags, original.FLAGS, original.IGNORED), name=name)
    guided = name in ("new_attention_order", "resampling_blocks")
    known = openai.GUIDED if guided else openai.IMPROVED
    return openai.read_openai(arrays, parse_flags(flags, known, openai.IGNORED), name=name, guided=guided)


@pytest.mark.parametrize("name", FLAGS)
def test_the_output_is_that_of_their_own_code(name, stored):
    shapes, expected = stored[name]
    found = read(name, shapes)
    validate(found.config)
    network = build_network(found.config)
    x, t = STORE["inputs"](found.config.data.height, found.config.diffusion.num_steps)
    labels = np.array(STORE["LABELS"], np.int32) if network.num_classes else None
    actual = jax.jit(network.apply)(found.params, x, t, labels)
    error = np.abs(actual - expected).max() / expected.std()
    assert expected.std() > 0.1
    assert error < 1e-4, error
    # Not by chance: another order of the heads is another network.
    if name == "new_attention_order":
        other = read(name, shapes, FLAGS[name].replace("order True", "order False"))
        assert np.abs(jax.jit(network.apply)(other.params, x, t, labels) - expected).max() > 0.01 * expected.std()


def test_the_variance_and_the_timesteps_are_theirs(stored):
    improved = read("scale_shift_4_heads", stored["scale_shift_4_heads"][0]).config
    assert (improved.diffusion.variance, improved.model.timestep_scale) == ("fixed_large", 0.25)
    learned = read("classes_learned_variance", stored["classes_learned_variance"][0])
    assert (learned.config.diffusion.variance, learned.config.loss.kind) == ("learned_range", "hybrid")
    assert (learned.config.model.num_classes, learned.config.train.label_dropout) == (1000, 0)
    assert build_schedule(learned.config).betas[-1] == pytest.approx(0.02)
    shorter = read("scale_shift_4_heads", stored["scale_shift_4_heads"][0], "--image_size 32 --diffusion_steps 500")
    assert (shorter.config.diffusion.beta_start, shorter.config.diffusion.beta_end) == pytest.approx((2e-4, 0.04))


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("scale_shift_4_heads", "--num_channels 64", "--num_channels is 64, but the weights have 32"),
        ("scale_shift_4_heads", "--attention_resolutions 16", "attention_resolutions is 16, but the weights have 16,8"),
        ("scale_shift_4_heads", "--num_heads 3", "not divisible into 3 attention heads"),
        ("new_attention_order", "--image_size 16 --num_head_channels -3", "not divisible into 0 attention heads"),
        ("scale_shift_4_heads", "--num_heads_upsample 1", "num_heads_upsample"),
        ("scale_shift_4_heads", "--noise_schedule sqrt", "linear or cosine, not sqrt"),
        ("scale_shift_4_heads", "--diffusion_steps 0", "at least 1, not 0"),
        ("scale_shift_4_heads", "--image_sizes 64", "did you mean --image_size?"),
        ("scale_shift_4_heads", "--learn_sigma maybe", "must be true or false, not 'maybe'"),
        ("scale_shift_4_heads", "--image_size", "has no value"),
        ("scale_shift_4_heads", "--lr 'x", "No closing quotation"),
        ("classes_learned_variance", "", "--image_size is needed"),
        ("new_attention_order", "--channel_mult 1,2,3 --image_size 16", "channel_mult is 1,2,3, but the weights have"),
        ("pesser", "--model_var_type other", "must be one of fixedlarge, fixedsmall, learned, not other"),
    ],
)
def test_flags_that_do_not_fit_are_named(name, flags, words, stored):
    with pytest.raises(UserError) as raised:
        read(name, stored[name][0], flags)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("scale_shift_4_heads", {"out.2.bias": None}, "lack the array out.2.bias"),
        ("scale_shift_4_heads", {"mystery.weight": (3,)}, "have the array mystery.weight"),
        ("scale_shift_4_heads", {"output_blocks.99999.0.x": (3,)}, "output_blocks in a row"),
        ("scale_shift_4_heads", {"input_blocks.0.0.weight": (32, 6, 3, 3)}, "6 input and 3 output channels"),
        ("scale_shift_4_heads", {"input_blocks.0.0.weight": (0, 3, 3, 3)}, "not multiples"),
        ("resampling_blocks", {"out.2.weight": None}, "classifier"),
        ("pesser", {"conv_in.weight": None}, "have the array conv_in.bias, which"),
        ("pesser", {"down.0.block.0.conv1.weight": (33, 32, 3, 3)}, "not those of the paper's network"),
    ],
)
def test_other_networks_are_refused(name, change, words, stored):
    shapes = {**stored[name][0], **{each: shape for each, shape in change.items() if shape is not None}}
    with pytest.raises(UserError, match=words):
        read(name, {each: shape for each, shape in shapes.items() if change.get(each, ()) is not None})


@pytest.mark.parametrize("name", RELEASED)
def test_the_flags_of_published_files_are_known(name):
    known = openai.GUIDED if RELEASED[name].program == "guided-diffusion" else openai.IMPROVED
    assert parse_flags(RELEASED[name].flags, known, openai.IGNORED)["learn_sigma"] is True


class TestFiles:
    """Whole files: whose they are, and what their names tell."""

    @pytest.fixture
    def save(self, stored, tmp_path):
        from safetensors.numpy import save_file

        def save(name, file):
            file = tmp_path / file
            file.parent.mkdir(exist_ok=True)
            arrays = {each: STORE["draw"](each, tuple(shape)) for each, shape in stored[name][0].items()}
            save_file(arrays, file)
            return file

        return save

    def test_step_and_averages_are_in_the_name(self, save):
        for name, step, averaged in (("ema_0.9999_020000.pt", 20_000, True), ("model020000.pt", 20_000, False)):
            file = save("scale_shift_4_heads", f"logs/{name}")
            found = read_checkpoint(file, program="improved-diffusion", flags="--image_size 32")
            assert (found.step, found.averaged, found.config.name) == (step, averaged, "logs")
        found = read_checkpoint(save("pesser", "ema_diffusion_cifar10_model/model-790000.ckpt"))
        assert (found.step, found.averaged, found.config.name) == (790_000, True, "ema_diffusion_cifar10_model")
        assert found.config.diffusion.variance == "fixed_large"
        for folder, averaged in (("diffusion_cifar10_model", False), ("downloads", None)):
            found = read_checkpoint(save("pesser", f"{folder}/model-790000.ckpt"))
            assert (found.step, found.averaged) == (790_000, averaged)

    def test_the_published_name_gives_the_flags_which_must_fit(self, save):
        with pytest.raises(UserError, match="cifar10_uncond_50M_500K.pt: --flags: --num_channels is 128, but"):
            read_checkpoint(save("scale_shift_4_heads", "cifar10_uncond_50M_500K.pt"))

    def test_flags_are_added_to_those_of_a_published_file(self, save):
        file = save("scale_shift_4_heads", "cifar10_uncond_50M_500K.pt")
        known = "--num_channels 32 --num_res_blocks 1 --learn_sigma False"
        found = read_checkpoint(file, flags=f"{known} --dropout 0.25")
        assert (found.config.diffusion.schedule, found.config.diffusion.num_steps) == ("cosine", 4000)
        assert (found.config.model.dropout, found.step) == (0.25, 500_000)
        with pytest.raises(UserError, match="add --program"):
            read_checkpoint(file, program="guided-diffusion")

    def test_what_is_not_known_must_be_given(self, save):
        file = save("scale_shift_4_heads", "mine.pt")
        for options in ({}, {"flags": ""}, {"program": "guided-diffusion"}):
            with pytest.raises(UserError, match="add --program improved-diffusion or guided-diffusion, and --flags"):
                read_checkpoint(file, **options)
        with pytest.raises(UserError, match="not of guided-diffusion: its arrays have the names of the original"):
            read_checkpoint(save("pesser", "mine.ckpt"), program="guided-diffusion")
