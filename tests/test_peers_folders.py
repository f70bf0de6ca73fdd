"""Folders of diffusers, read and written: the same weights give the same output there and here.

Skipped where diffusers and PyTorch are not installed.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.generation.chains import make_chain
from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.interop.diffusers import read_folder, write_folder
from ddpm_jax.run.trained import load_run
from ddpm_jax.run.weights import checksum
from ddpm_jax.samplers.chain import run_chain

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PAPER = dict(
    norm_eps=1e-6, freq_shift=1, flip_sin_to_cos=False, downsample_padding=0, attention_head_dim=None
)  # as the first published folders


def blocks(attention):
    """The types of the blocks on the way down and up, from which levels have attention."""
    down = tuple(f"{'Attn' if has else ''}DownBlock2D" for has in attention)
    return dict(down_block_types=down, up_block_types=tuple(name.replace("Down", "Up") for name in down[::-1]))


CIFAR10 = dict(sample_size=32, block_out_channels=(128, 256, 256, 256), **PAPER, **blocks([0, 1, 0, 0]))
CELEBAHQ256 = dict(sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512), **PAPER)
CELEBAHQ256 |= blocks([0, 0, 0, 0, 1, 0])
# The defaults of diffusers' example train_unconditional.py: heads of 8 channels, symmetric padding, cosines first.
TRAIN_UNCONDITIONAL = dict(sample_size=128, block_out_channels=(128, 128, 256, 256, 512, 512))
TRAIN_UNCONDITIONAL |= blocks([0, 0, 0, 0, 1, 0])


def narrow(options, width, size=None):
    """The same levels and blocks in another width, and images of another size."""
    channels = options["block_out_channels"]
    return options | dict(
        block_out_channels=tuple(each * width // channels[0] for each in channels),
        sample_size=size or options["sample_size"],
        norm_num_groups=min(32, width),
    )


def draw(unet, seed=0):
    """Draws all weights anew: the initial ones of several layers are nearly zero and would hide errors."""
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in unet.named_parameters():
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            value = random.normal(size=tuple(tensor.shape)) * scale
            tensor.copy_(torch.from_numpy(value + (name.endswith("weight") and tensor.ndim == 1)))
    return unet.eval()


def save(folder, scheduler=None, **options):
    """Writes the folder of a pipeline with random weights, as diffusers does, and returns its network."""
    unet = draw(diffusers.UNet2DModel(layers_per_block=2, **options))
    diffusers.DDPMPipeline(unet, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return unet


def error_of(trained, unet, *, batch=2):
    """The largest difference between the outputs, relative to the scale of theirs; checks that t and labels matter."""
    data, classes = trained.config.data, trained.config.model.num_classes
    random = np.random.default_rng(1)
    x = random.normal(size=(batch, data.height, data.width, data.channels)).astype(np.float32)
    t = np.array([0, 1, 437, 999], np.int32)[-batch:]
    labels = np.arange(batch, dtype=np.int32)[::-1].copy() if classes else None
    with torch.no_grad():
        theirs = unet(
            torch.from_numpy(x.transpose(0, 3, 1, 2)),
            torch.from_numpy(t),
            *map(torch.from_numpy, [labels] * bool(classes)),
        )
    expected = theirs.sample.numpy().transpose(0, 2, 3, 1)
    assert expected.std() > 0.1
    apply = jax.jit(trained.network.apply)
    given = () if labels is None else (jnp.asarray(labels),)
    actual = np.asarray(apply(trained.params, jnp.asarray(x), jnp.asarray(t), *given))
    assert (
        abs(np.asarray(apply(trained.params, jnp.asarray(x), jnp.asarray(t[::-1].copy()), *given)) - expected).max()
        > 1e-2
    )
    if classes:
        other = apply(trained.params, jnp.asarray(x), jnp.asarray(t), jnp.asarray(labels[::-1].copy()))
        assert abs(np.asarray(other) - expected).max() > 1e-2
    return abs(actual - expected).max() / expected.std()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(narrow(CIFAR10, 32), id="cifar10"),
        pytest.param(narrow(CELEBAHQ256, 8, 64), id="celebahq256"),
        pytest.param(narrow(TRAIN_UNCONDITIONAL, 16, 32), id="train_unconditional"),
        pytest.param(
            narrow(CIFAR10, 16) | dict(num_class_embeds=10, add_attention=False), id="classes_without_mid_attention"
        ),
        pytest.param(CIFAR10, id="cifar10_itself", marks=pytest.mark.slow),
        pytest.param(CELEBAHQ256, id="celebahq256_itself", marks=pytest.mark.slow),
        pytest.param(TRAIN_UNCONDITIONAL, id="train_unconditional_itself", marks=pytest.mark.slow),
    ],
)
def test_equals_the_network_of_diffusers(tmp_path, options, record_property):
    unet = save(tmp_path, **options)
    error = error_of(load_run(tmp_path), unet)
    record_property("error", float(error))
    print(f"largest error: {error:.1e} of the output's scale")
    assert error < 1e-4


SMALL = narrow(CIFAR10, 16, 16) | dict(block_out_channels=(16, 32), **blocks([0, 1]))


def teach(unet):
    """Fits the last layer to predict noise: in the chain of a random network, any rounding ends in another image."""
    generator = torch.Generator().manual_seed(0)
    alphas_bar = diffusers.DDPMScheduler().alphas_cumprod
    features = []
    hook = unet.conv_out.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    t = torch.randint(0, 1000, (256,), generator=generator)
    eps = torch.randn(256, 3, 16, 16, generator=generator)
    x0 = torch.nn.functional.interpolate(
        torch.rand(256, 3, 2, 2, generator=generator) * 2 - 1, (16, 16), mode="bilinear"
    )
    scale = alphas_bar[t][:, None, None, None]
    with torch.no_grad():
        unet(scale.sqrt() * x0 + (1 - scale).sqrt() * eps, t)
        hook.remove()
        inputs = torch.nn.functional.unfold(features[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        outputs = eps.permute(0, 2, 3, 1).flatten(0, 2)
        fitted = torch.linalg.lstsq(inputs, outputs).solution
        assert ((inputs @ fitted - outputs) ** 2).mean() < 0.5
        unet.conv_out.weight.copy_(fitted[:-1].T.reshape(unet.conv_out.weight.shape))
        unet.conv_out.bias.copy_(fitted[-1])
    return unet


# With "linspace", diffusers takes t - T // N for the step before, which is not among the timesteps.
@pytest.mark.parametrize(
    "scheduler",
    [diffusers.DDPMScheduler(), diffusers.DDIMScheduler(timestep_spacing="trailing")],
    ids=["leading", "trailing"],
)
def test_ddim_draws_the_images_of_diffusers(tmp_path, scheduler):
    unet = teach(save(tmp_path, **SMALL))
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    trained = load_run(tmp_path)
    x = np.random.default_rng(2).normal(size=(4, 16, 16, 3)).astype(np.float32)

    scheduler = diffusers.DDIMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(50)
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(unet(theirs, t).sample, t, theirs).prev_sample
    expected = theirs.numpy().transpose(0, 2, 3, 1)

    sampler = make_chain(
        trained.config,
        trained.network,
        SamplerConfig("ddim", steps=50, eps_after_clipping="network"),  # as diffusers does by default
    )(trained.params, None)
    state = sampler.init(jnp.asarray(x))
    draw = jax.jit(lambda state: run_chain(jax.random.key(0), sampler, state, 0, num_steps=50))
    error = abs(np.asarray(draw(state).x) - expected).max()
    print(f"largest difference of a pixel: {error * 127.5:.2e} of 255 levels")
    assert expected.std() > 0.1
    assert error < 2 / 255  # pixels span 2 in [-1, 1]: 1/255 of the range


@pytest.mark.parametrize("weights", ["safetensors", "sharded", "bin", "fp16.safetensors"])
def test_flat_folder_of_the_first_versions_is_read_equal(tmp_path, weights):
    nested, flat = tmp_path / "nested", tmp_path / "flat"
    unet = save(nested, **SMALL)
    flat.mkdir()
    config = json.loads((nested / "unet" / "config.json").read_text())
    # Of version 0.0.4, which had no other fields.
    old = (
        *("_class_name", "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample", "freq_shift"),
        *("down_block_types", "downsample_padding", "flip_sin_to_cos", "in_channels", "layers_per_block", "norm_eps"),
        *("mid_block_scale_factor", "norm_num_groups", "out_channels", "sample_size", "time_embedding_type"),
        "up_block_types",
    )
    (flat / "config.json").write_text(json.dumps({name: config[name] for name in old}))
    (flat / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler", "clip_sample": true}')
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in unet.state_dict().items():
        for new, old_name in names.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old_name}.")
                if name.endswith("weight") and "mid_block" in name:
                    tensor = tensor[:, :, None, None]  # some were 1x1 convolutions
        state[name] = tensor
    if weights == "bin":
        torch.save(state, flat / "diffusion_pytorch_model.bin")
    elif weights == "sharded":
        unet.save_pretrained(flat, max_shard_size="100KB")
        assert len([*flat.glob("*.safetensors")]) > 1
    else:
        half = torch.float16 if "fp16" in weights else torch.float32
        from safetensors.torch import save_file

        save_file(
            {name: tensor.to(half).contiguous() for name, tensor in state.items()},
            flat / f"diffusion_pytorch_model.{weights}",
        )
    expected, read = read_folder(nested), read_folder(flat)
    assert read.config.model == expected.config.model
    assert read.config.diffusion == expected.config.diffusion
    if "fp16" in weights:
        rounded = jax.tree.map(lambda array: array.astype(np.float16).astype(np.float32), expected.params)
        assert checksum(read.params) == checksum(rounded)
    else:
        assert checksum(read.params) == checksum(expected.params)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_what_is_written_is_read_by_diffusers_and_comes_back_bit_by_bit(tmp_path, runs, num_classes):
    config = runs.make_config(num_classes=num_classes, schedule="jsd", prediction="v", variance="learned_range")
    params = runs.random_params(config)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_folder(ours, params, config=config, step=7, class_names=["a", "b", "c"][:num_classes], license="mit")
    pipeline = diffusers.DDPMPipeline.from_pretrained(ours)
    assert pipeline.unet.config.num_class_embeds == (num_classes + 1 if num_classes else None)
    np.testing.assert_allclose(pipeline.scheduler.betas.numpy(), 1 / np.arange(runs.T, 0, -1), rtol=1e-6)
    assert error_of(load_run(ours), pipeline.unet) < 1e-4
    if not num_classes:
        images = pipeline(batch_size=2, num_inference_steps=runs.T, output_type="np").images
        assert images.shape == (2, 8, 8, 1)
        assert np.isfinite(images).all()
    pipeline.save_pretrained(theirs)
    back = read_folder(theirs)
    whole = back.params
    if num_classes:  # diffusers knows no "no label": its row is that of one more class, and one of zeros follows
        assert back.config.model.num_classes == num_classes + 1
        table = whole["class_embedding"]["embedding"]
        assert not table[-1].any()
        whole["class_embedding"] = {"embedding": table[:-1]}
    assert checksum(whole) == checksum(params)
