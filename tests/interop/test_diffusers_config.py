"""The fields of diffusers' configurations: what they mean here, and by what name the others are refused."""

import dataclasses
import json

import numpy as np
import pytest

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig
from ddpm_jax.interop.diffusers_config import read_config, write_scheduler, write_unet
from ddpm_jax.run.build import build_betas
from ddpm_jax.run.validation import validate
from ddpm_jax.schedules import make_betas
from ddpm_jax.system.errors import UserError

# google/ddpm-cifar10-32, written by version 0.0.4.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_small",
}


def read(unet=CIFAR10, scheduler=SCHEDULER):
    return read_config(unet, scheduler, name="model", shown=("unet/config.json", "scheduler_config.json"))


def through_files(config):
    """The configuration as it comes back from the JSON files."""
    unet, scheduler = (json.loads(json.dumps(each)) for each in (write_unet(config), write_scheduler(config)))
    return read(unet, scheduler)


def test_the_published_cifar10_is_the_paper_s():
    config = read()
    assert config.model == ModelConfig(dropout=0.0)  # sampling needs none, and the file has no such field
    assert config.diffusion == DiffusionConfig(variance="fixed_small", spacing="leading")
    assert (config.data.height, config.data.width, config.data.channels) == (32, 32, 3)
    validate(config)


def test_absent_fields_have_the_defaults_of_the_class():
    config = read({"sample_size": 64}, {})
    model = ModelConfig(
        width=224,
        channel_mult=(1, 2, 3, 4),
        attention_resolutions=(32, 16, 8),
        num_head_channels=8,
        norm_eps=1e-5,
        symmetric_downsampling=True,
        freq_shift=0,
        cos_first=True,
        dropout=0.0,
    )
    assert config.model == model
    assert config.diffusion == DiffusionConfig(variance="fixed_small", spacing="leading")
    validate(config)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"_class_name": "DDIMScheduler"}, {"variance": "fixed_small"}),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 3}, {"clip_x0": False, "spacing": None}),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, {"clip_x0": False}),
        (
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            dict(prediction="v", zero_terminal_snr=True),
        ),
        ({"predict_epsilon": False}, {"prediction": "x0"}),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, dict(schedule="cosine", num_steps=50)),
        ({"beta_schedule": "scaled_linear", "beta_start": 1e-3}, dict(schedule="quad", beta_start=1e-3)),
        ({"beta_schedule": "sigmoid", "timestep_spacing": "trailing"}, dict(schedule="sigmoid", spacing="trailing")),
        ({"variance_type": "fixed_large_log", "clip_sample": False}, dict(variance="fixed_large", clip_x0=False)),
        ({"timestep_spacing": "linspace", "steps_offset": 1}, {"spacing": "linspace"}),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"}, {"spacing": "linspace"}),
        ({"_class_name": "UniPCMultistepScheduler", "timestep_spacing": "trailing"}, {"spacing": "trailing"}),
        ({"_class_name": "UniPCMultistepScheduler", "clip_sample": True, "clip_sample_range": 2.0}, {"clip_x0": False}),
        ({"thresholding": True, "clip_sample": False, "clip_sample_range": 2.0}, {"clip_x0": True}),
        ({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, {"clip_x0": True}),
        ({"a_field_of_the_future": None}, {}),
    ],
)
def test_schedulers(fields, expected):
    diffusion = read(scheduler={"beta_start": 1e-4, **fields}).diffusion
    for name, value in expected.items():
        assert getattr(diffusion, name) == value, name


def test_betas_without_a_name_are_recognized():
    exact = make_betas("warmup10", 100, beta_start=2e-4, beta_end=0.03)
    expected = DiffusionConfig("warmup10", 100, 2e-4, 0.03, variance="fixed_small", spacing="leading")
    for betas in (exact.tolist(), exact.astype(np.float32).astype(float).tolist()):
        assert read(scheduler={**SCHEDULER, "trained_betas": betas}).diffusion == expected
    with pytest.raises(UserError, match="trained_betas are those of no known schedule"):
        read(scheduler={**SCHEDULER, "trained_betas": [0.1, 0.5, 0.2]})


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "a UNet2DConditionModel is not supported, only a UNet2DModel"),
        ({"sample_size": None}, 'does not name the size of the images: add "sample_size"'),
        ({"sample_size": [32]}, "sample_size="),
        ({"block_out_channels": [64, 96]}, "all must be multiples of the first"),
        ({"block_out_channels": []}, "all must be multiples of the first"),
        ({"block_out_channels": ["a"]}, "block_out_channels="),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 4}, "ResnetDownsampleBlock2D is not supported"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "attention must be at the same levels"),
        ({"down_block_types": ["DownBlock2D"] * 3}, "lists 3 blocks, but block_out_channels has 4 levels"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift=scale_shift is not supported"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type=fourier is not supported"),
        ({"downsample_padding": 2}, "downsample_padding=2 is not supported"),
        ({"class_embed_type": "timestep"}, "class_embed_type=timestep"),
        ({"center_input_sample": True}, "center_input_sample=true"),
        ({"mid_block_type": None}, "mid_block_type=null"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ({"norm_num_groups": "32"}, "norm_num_groups=32 is not supported"),
        ({"out_channels": 6}, "out_channels=6 does not fit in_channels=3"),
        ({"a_field_of_the_future": 0.5}, "a_field_of_the_future=0.5 is not supported"),
    ],
)
def test_networks_that_are_not_ours_are_refused_by_name(unet, message):
    with pytest.raises(UserError, match=message) as refused:
        read({**CIFAR10, **unet})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({"_class_name": ["DDPMScheduler"]}, "is not supported, only DDPMScheduler, "),
        ({"_class_name": "ScoreSdeVeScheduler"}, "a ScoreSdeVeScheduler is not supported, only DDPMScheduler, "),
        (
            {"thresholding": True, "sample_max_value": 1.5},
            "sample_max_value=1.5 is not supported: set thresholding to false, and draw with --clip dynamic "
            "--dynamic-quantile 0.995",
        ),
        ({"thresholding": True, "sample_max_value": None}, "sample_max_value=null is not supported"),
        ({"thresholding": 1}, "thresholding=1 is not supported"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0 is not supported"),
        ({"variance_type": "learned"}, "variance_type=learned is not supported"),
        ({"beta_schedule": "laplace"}, "beta_schedule=laplace is not supported"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction is not supported"),
        ({"steps_offset": 1}, "steps_offset=1 is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=true is not supported"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=false is not supported"),
        ({"timestep_spacing": ["leading"]}, "timestep_spacing="),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
    ],
)
def test_schedulers_that_are_not_ours_are_refused_by_name(scheduler, message):
    with pytest.raises(UserError, match=message) as refused:
        read(scheduler={**SCHEDULER, **scheduler})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(model=ModelConfig(num_head_channels=32, symmetric_downsampling=True, cos_first=True, freq_shift=0)),
        dict(model=ModelConfig(channel_mult=(1, 1, 2), attention_resolutions=(32, 8), mid_attention=False)),
        dict(data=DataConfig("folder", height=16, width=32, channels=1), model=ModelConfig(channel_mult=(1, 2))),
        dict(diffusion=DiffusionConfig("jsd", 20, prediction="v", variance="learned_range", spacing="trailing")),
        dict(diffusion=DiffusionConfig("cosine", 30, prediction="x0", clip_x0=False, zero_terminal_snr=True)),
        dict(diffusion=DiffusionConfig(spacing="linspace")),
    ],
)
def test_what_is_written_is_read_the_same(changes):
    config = Config(**{"data": DataConfig("folder", height=32, width=32, channels=3), **changes})
    back = through_files(config)
    assert back.model == config.model
    spacing = config.diffusion.spacing or "linspace"  # which of the two it is, is in our record alone
    assert back.diffusion == dataclasses.replace(config.diffusion, spacing=spacing)
    assert back.data == config.data


@pytest.mark.parametrize("schedule", ["linear", "quad", "const", "warmup10", "warmup50", "jsd", "sigmoid", "cosine"])
def test_every_schedule_comes_back_bit_by_bit(schedule):
    diffusion = DiffusionConfig(schedule, 37, 3e-4, 0.07, prediction="v")
    config = Config(data=DataConfig(height=32, width=32), diffusion=diffusion)
    np.testing.assert_array_equal(build_betas(through_files(config)), build_betas(config))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", dict(network="my_net.py:make"), "model.network=my_net.py:make is not a UNet2DModel"),
        ("model", dict(num_heads=4), "model.num_heads=4 at levels of 128, 256 channels is not a UNet2DModel"),
        ("model", dict(scale_shift_norm=True), "model.scale_shift_norm=True cannot be exported"),
        ("model", dict(embed_channels=64), "model.embed_channels=64 cannot be exported"),
        ("diffusion", dict(prediction="mean"), "diffusion.prediction=mean cannot be exported"),
        ("diffusion", dict(variance="learned"), "diffusion.variance=learned cannot be exported"),
        ("diffusion", dict(spacing="log_snr"), "diffusion.spacing=log_snr cannot be exported"),
    ],
)
def test_what_diffusers_lacks_is_refused_by_name(section, changes, message):
    config = Config(data=DataConfig(height=32, width=32, channels=3), model=ModelConfig(attention_resolutions=(32, 16)))
    config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})
    with pytest.raises(UserError, match=message):
        through_files(config)


def test_heads_of_one_width_are_written_as_their_width():
    config = Config(data=DataConfig(height=32, width=32, channels=3), model=ModelConfig(num_heads=4))
    assert write_unet(config)["attention_head_dim"] == 64
    assert through_files(config).model.num_head_channels == 64
