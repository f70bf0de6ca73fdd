"""How long training waits for data: 50,000 images of CIFAR-10's shape, from each place where a set may be kept.

    python benchmarks/data_wait.py [STEPS]                # 30 steps from each place, minutes on two CPU cores

The images are noise, made for the purpose. Each feed is measured twice: alone, as fast as it can be taken from, and
before a real training step of a small U-Net, as the loop has it. The share of time waited is that of `timing.jsonl`:
seconds in which the loop had to wait for a batch, over all seconds. On CPUs the threads that read and the network share
the cores, so the images a second of the whole are told as well.
"""

import collections
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ddpm_jax.config import Config, DataConfig, ModelConfig, TrainConfig
from ddpm_jax.data.source import Source
from ddpm_jax.data.sources import load_source
from ddpm_jax.run.validation import validate
from ddpm_jax.training.input_pipeline import InputPipeline, make_input_pipeline, with_inputs
from ddpm_jax.training.setup import Setup, make_setup

NUMBER, FILES, BATCH = 50_000, 5_000, 128
SHAPE = {"height": 32, "width": 32, "channels": 3}


def config_of(data: DataConfig) -> Config:
    config = Config(
        data=data,
        model=ModelConfig(width=16, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=8),
        train=TrainConfig(batch_size=BATCH, warmup_steps=1, ema_decay=0.9),
    )
    validate(config)
    return config


def places(folder: Path) -> dict[str, DataConfig]:
    """Writes the images, and names the configurations that keep them in each place."""
    images = np.random.default_rng(0).integers(0, 256, (NUMBER, 32, 32, 3), np.uint8)
    np.save(folder / "images.npy", images)
    (folder / "png").mkdir()
    for i, image in enumerate(images[:FILES]):
        Image.fromarray(image).save(folder / "png" / f"{i:05d}.png", compress_level=1)
    array = DataConfig(source="npy", path=str(folder / "images.npy"), flip=True, **SHAPE)
    files = DataConfig(source="folder", path=str(folder / "png"), flip=True, **SHAPE)
    on_disk = {"device_gib": 0.0, "memory_gib": 0.0}
    return {
        "on the device": array,
        "in memory": dataclasses.replace(array, device_gib=0.0),
        "streamed, an array": dataclasses.replace(array, **on_disk),
        "streamed, PNG files": dataclasses.replace(files, **on_disk),
    }


def feed_of(config: Config, source: Source, parts: Setup) -> InputPipeline:
    data = config.data
    return make_input_pipeline(
        source,
        parts.layout,
        seed=0,
        batch_size=BATCH,
        labeled=False,
        device_gib=data.device_gib,
        workers=data.workers,
    )


def alone(feed: InputPipeline, seconds: float = 4.0) -> float:
    """Images a second that the feed gives when nothing else is done."""
    with feed.open(0, 10**9) as opened:
        jax.block_until_ready(next(opened).data)
        begun, taken = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            jax.block_until_ready(next(opened).data)
            taken += BATCH
        return taken / (time.perf_counter() - begun)


def trained(feed: InputPipeline, parts: Setup, steps: int) -> tuple[float, float]:
    """The share of time waited, and images a second, of training; compiling and the first steps are left out."""
    step = parts.layout.lift(with_inputs(parts.make_step, feed))
    state = parts.layout.init(parts.init, parts.keys.init)
    in_flight: collections.deque[jax.Array] = collections.deque()
    with feed.open(0, steps + 3) as opened:
        for number, data in opened:
            state, info = step(parts.keys.run, state, data)
            in_flight.append(info.loss)
            if len(in_flight) > 2:
                jax.block_until_ready(in_flight.popleft())
            if number == 2:
                jax.block_until_ready(state)
                begun, waited = time.perf_counter(), opened.seconds_waited
        jax.block_until_ready(state)
        busy = time.perf_counter() - begun
        return (opened.seconds_waited - waited) / busy, steps * BATCH / busy


def main(steps: int) -> None:
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, batch {BATCH}, {steps} steps")
    print(f"{'set':<20} {'feed alone, images/s':>21} {'training, images/s':>19} {'waited':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in places(Path(folder)).items():
            config = config_of(data)
            source = load_source(data)
            parts = make_setup(config, source.image_shape)
            feed = feed_of(config, source, parts)
            rate = alone(feed)
            share, images = trained(feed, parts, steps)
            print(f"{name:<20} {rate:>21,.0f} {images:>19,.1f} {share:>8.3%}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
