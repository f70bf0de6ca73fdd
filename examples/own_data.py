"""Your own images, from arrays in memory or read one by one:

    python train.py --data.source examples/own_data.py:make_source --data.height 16 --data.width 16 --data.channels 3 \
        --model.num-classes 2 --workdir runs/shapes

The function gets the data section of the run's configuration and returns a `Source` of uint8 images (N, H, W, C), of
exactly that height, width and number of channels; None for a split that does not exist. The run's folder keeps a copy
of this file.
"""

import numpy as np

from ddpm_jax import Source, in_memory

SIZES = {"train": 2000, "test": 400}


def draw(index, config):
    """Draws a disc (even index) or a square (odd index) of random color, size and place: index i is always the same."""
    random = np.random.default_rng([SIZES[config.split], index])
    rows, columns = np.mgrid[: config.height, : config.width]
    side = min(config.height, config.width)
    row, column, radius = random.uniform([0.3, 0.3, 0.15], [0.7, 0.7, 0.3]) * side
    distances = np.abs(rows - row), np.abs(columns - column)
    inside = np.maximum(*distances) < radius if index % 2 else np.hypot(*distances) < radius
    color = random.integers(64, 256, config.channels)
    return np.where(inside[..., None], color, 0).astype(np.uint8)


def make_source(config):
    """Returns images and labels that fit into memory."""
    if config.split not in SIZES:
        return None
    indices = np.arange(SIZES[config.split])
    images = np.stack([draw(i, config) for i in indices])
    return in_memory(images, labels=indices % 2, class_names=["disc", "square"])


def make_stream(config):
    """Returns images that are made, or read from wherever you keep them, when a batch needs them."""
    if config.split not in SIZES:
        return None
    return Source(
        num_examples=SIZES[config.split],
        image_shape=(config.height, config.width, config.channels),
        read_images=lambda indices: np.stack([draw(i, config) for i in indices]),
        read_labels=lambda indices: (indices % 2).astype(np.int32),
        class_names=("disc", "square"),
    )
