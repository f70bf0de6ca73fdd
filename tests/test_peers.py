"""Equality with an independent implementation, diffusers on PyTorch; skipped where they are not installed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from ddpm_jax.reverse import p_mean_variance, p_sample  # noqa: E402
from ddpm_jax.schedules import make_schedule  # noqa: E402
from ddpm_jax.unet import UNet  # noqa: E402

LEVELS = 3

# diffusers' names of the parts, as regular expressions, and ours. Its up blocks count from the lowest resolution.
NAMES = [
    (r"time_embedding\.linear_(\d)", lambda n: f"temb_dense{int(n) - 1}"),
    (r"conv_in", lambda: "conv_in"),
    (r"conv_norm_out", lambda: "norm_out"),
    (r"conv_out", lambda: "conv_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", lambda level, block: f"down_{level}_block_{block}"),
    (r"down_blocks\.(\d)\.attentions\.(\d)", lambda level, block: f"down_{level}_attn_{block}"),
    (r"down_blocks\.(\d)\.downsamplers\.0\.conv", lambda level: f"down_{level}_downsample"),
    (r"mid_block\.resnets\.(\d)", lambda block: f"mid_block_{int(block) + 1}"),
    (r"mid_block\.attentions\.0", lambda: "mid_attn_1"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda up, block: f"up_{LEVELS - 1 - int(up)}_block_{block}"),
    (r"up_blocks\.(\d)\.attentions\.(\d)", lambda up, block: f"up_{LEVELS - 1 - int(up)}_attn_{block}"),
    (r"up_blocks\.(\d)\.upsamplers\.0\.conv", lambda up: f"up_{LEVELS - 1 - int(up)}_upsample"),
]
LAYERS = {
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def place(name):
    """Where a parameter of diffusers lies in ours: (part, layer or None, kernel, scale or bias)."""
    path, kind = name.rsplit(".", 1)
    for pattern, ours in NAMES:
        if match := re.match(pattern + r"(?:\.|$)", path):
            layer = path[match.end() :]
            norm = "norm" in (layer or path)
            leaf = "bias" if kind == "bias" else "scale" if norm else "kernel"
            return ours(*match.groups()), LAYERS.get(layer, layer), leaf
    raise AssertionError(f"no place for {name}")


def to_flax(name, value):
    """Turns a weight around: (out, in, kh, kw) to (kh, kw, in, out), (out, in) to (in, out), 1x1 to a matrix."""
    if value.ndim == 4 and "conv_shortcut" in name:
        value = value[:, :, 0, 0]
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


@pytest.mark.parametrize(("blocks", "head_channels", "groups", "image"), [(2, None, 32, (16, 16)), (1, 16, 8, (16, 8))])
def test_unet_equals_that_of_diffusers(blocks, head_channels, groups, image):
    theirs = diffusers.UNet2DModel(
        in_channels=3,
        out_channels=3,
        layers_per_block=blocks,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=head_channels,
        norm_num_groups=groups,
        norm_eps=1e-6,
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
    ).eval()
    unet = UNet(
        width=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=blocks,
        attention_resolutions=(image[0] // 2,),
        num_heads=1 if head_channels is None else 64 // head_channels,
        num_groups=groups,
    )
    random = np.random.default_rng(0)
    x, t = random.normal(size=(4, *image, 3)).astype(np.float32), np.array([0, 1, 437, 999], np.int32)

    shapes = jax.eval_shape(unet.init, jax.random.key(0), jnp.asarray(x), jnp.asarray(t))["params"]
    params = jax.tree.map(lambda leaf: None, shapes)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            # The initial weights of several layers are nearly zero and would hide errors: all are drawn anew.
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            value = random.normal(size=tuple(tensor.shape)) * scale
            value = (value + (name.endswith("weight") and tensor.ndim == 1)).astype(np.float32)
            tensor.copy_(torch.from_numpy(value))
            part, layer, leaf = place(name)
            inside = params[part][layer] if layer else params[part]
            inside[leaf] = jnp.asarray(to_flax(name, value))
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)

    apply = jax.jit(unet.apply)
    actual = apply({"params": params}, jnp.asarray(x), jnp.asarray(t))
    assert expected.std() > 0.1
    assert abs(np.asarray(actual) - expected).max() < 1e-4 * expected.std()
    # The times are seen: images of another time come out otherwise.
    other = apply({"params": params}, jnp.asarray(x), jnp.asarray(t[::-1].copy()))
    assert abs(np.asarray(other) - expected).max() > 1e-2


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_reverse_step_equals_that_of_diffusers(monkeypatch, prediction, variance, clip_x0):
    random = np.random.default_rng(1)
    shape = (2, 4, 2, 3)
    schedule = make_schedule("linear", 1000)
    scheduler = diffusers.DDPMScheduler(
        variance_type=variance,
        clip_sample=clip_x0,
        prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[prediction],
    )
    # Theirs takes 1 - alphas_bar of float32 numbers, which loses four digits at time 1: here it is given float64.
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    for time in (0, 1, 2, 100, 499, 998, 999):
        x_t, z, v = random.normal(size=(3, *shape)).astype(np.float32)
        output = random.normal(size=shape).astype(np.float32)
        if variance == "learned_range":
            output = np.concatenate([output, np.tanh(v)], axis=-1)
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: torch.from_numpy(z.transpose(0, 3, 1, 2))
        )
        expected = scheduler.step(
            torch.from_numpy(output.transpose(0, 3, 1, 2)), time, torch.from_numpy(x_t.transpose(0, 3, 1, 2))
        )
        t = jnp.full(2, time)
        reverse = p_mean_variance(
            schedule,
            jnp.asarray(output),
            jnp.asarray(x_t),
            t,
            prediction=prediction,
            variance=variance,
            clip_x0=clip_x0,
        )
        actual = p_sample(reverse, t, jnp.asarray(z))
        expected_x0 = expected.pred_original_sample.numpy().transpose(0, 2, 3, 1)
        expected_x = expected.prev_sample.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(reverse.x0, expected_x0, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actual, expected_x, rtol=1e-5, atol=1e-5)
