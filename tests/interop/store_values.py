"""Stores what the networks of other programs compute, of weights that can be drawn again from their names and shapes.

    python tests/interop/store_values.py IMPROVED_DIFFUSION GUIDED_DIFFUSION PYTORCH_DIFFUSION

takes the folders of copies of openai/improved-diffusion, openai/guided-diffusion and pesser/pytorch_diffusion, needs
PyTorch, and writes values.npz beside this file: for each case the names and shapes of the arrays, and the output.
"""

import importlib
import json
import sys
import zlib
from pathlib import Path

import numpy as np

IMAGES = 2


def draw(name, shape):
    """Weights of the size that keeps the signal's; those of norms lie around 1, and no bias is 0."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) == 1:
        return (0.1 * normal + (name.endswith("weight"))).astype(np.float32)
    return (normal / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def inputs(size, steps):
    """x_t, (N, H, W, 3), and timesteps."""
    x = np.random.default_rng(size).normal(size=(IMAGES, size, size, 3)).astype(np.float32)
    return x, np.array([3, steps - 2], np.int32)


def openai(package, options, *, size, steps, rescale, labels=None):
    """The output of a U-Net of improved-diffusion or guided-diffusion, as its wrapped model is called."""
    import torch

    network = importlib.import_module(f"{package}.unet").UNetModel(in_channels=3, **options)
    return run(network, size=size, steps=steps, scale=1000 / steps if rescale else 1, labels=labels, torch=torch)


def run(network, *, size, steps, scale, labels, torch):
    drawn = {name: draw(name, tuple(array.shape)) for name, array in network.state_dict().items()}
    network.load_state_dict({name: torch.from_numpy(array) for name, array in drawn.items()})
    network.eval()
    x, t = inputs(size, steps)
    rest = () if labels is None else (torch.tensor(labels),)
    with torch.no_grad():
        output = network(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t).float() * scale, *rest)
    shapes = {name: list(array.shape) for name, array in drawn.items()}
    return shapes, output.numpy().transpose(0, 2, 3, 1)


SMALL = dict(model_channels=32, num_res_blocks=1)
LABELS = [7, 999]


def main(improved, guided, pesser):
    import torch

    sys.path[:0] = [improved, guided, pesser]
    cases = {
        "scale_shift_4_heads": openai(
            "improved_diffusion",
            {
                **SMALL,
                "out_channels": 3,
                "channel_mult": (1, 2, 2, 2),
                "attention_resolutions": (2, 4),
                "num_heads": 4,
                "use_scale_shift_norm": True,
            },
            size=32,
            steps=4000,
            rescale=True,
        ),
        "classes_learned_variance": openai(
            "improved_diffusion",
            {
                **SMALL,
                "out_channels": 6,
                "num_res_blocks": 2,
                "channel_mult": (1, 2),
                "attention_resolutions": (2,),
                "num_heads": 1,
                "num_classes": 1000,
            },
            size=16,
            steps=1000,
            rescale=False,
            labels=LABELS,
        ),
        "new_attention_order": openai(
            "guided_diffusion",
            {
                **SMALL,
                "image_size": 16,
                "out_channels": 3,
                "channel_mult": (1, 2),
                "attention_resolutions": (1, 2),
                "num_head_channels": 16,
                "use_scale_shift_norm": True,
                "use_new_attention_order": True,
            },
            size=16,
            steps=1000,
            rescale=False,
        ),
        "resampling_blocks": openai(
            "guided_diffusion",
            {
                "image_size": 16,
                "model_channels": 64,
                "num_res_blocks": 1,
                "out_channels": 6,
                "channel_mult": (0.5, 1, 1),
                "attention_resolutions": (2, 4),
                "num_head_channels": 32,
                "num_classes": 1000,
                "use_scale_shift_norm": True,
                "resblock_updown": True,
            },
            size=16,
            steps=1000,
            rescale=False,
            labels=LABELS,
        ),
    }
    network = importlib.import_module("pytorch_diffusion.model").Model(
        ch=32, out_ch=3, ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(16,), in_channels=3, resolution=32
    )
    cases["pesser"] = run(network, size=32, steps=1000, scale=1, labels=None, torch=torch)
    stored = {name: output.astype(np.float32) for name, (_, output) in cases.items()}
    shapes = json.dumps({name: shapes for name, (shapes, _) in cases.items()})
    np.savez_compressed(Path(__file__).with_name("values.npz"), shapes=np.array(shapes), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
