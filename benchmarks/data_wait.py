"""How long training waits for data: 50,000 images of CIFAR-10's shape, from each place a data set can be stored.

    python benchmarks/data_wait.py [STEPS]                # 30 steps from each place, minutes on two CPU cores

The images are random noise. Each input pipeline is measured twice: alone, as fast as it can go, and feeding real
training steps of a small U-Net, as in the training loop. The fraction of time spent waiting is defined as in
`timing.jsonl`: seconds the loop waited for a batch, divided by all seconds. On CPUs, the reading threads and the
network share the cores, so the overall images per second are printed as well.
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
    """Writes the images and returns, by name, a config for each place where they can be stored."""
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
        "streamed array": dataclasses.replace(array, **on_disk),
        "streamed PNG files": dataclasses.replace(files, **on_disk),
    }


def pipeline_of(config: Config, source: Source, parts: Setup) -> InputPipeline:
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


def alone(pipeline: InputPipeline, seconds: float = 4.0) -> float:
    """Returns the images per second of the pipeline when nothing else runs."""
    with pipeline.open(0, 10**9) as opened:
        jax.block_until_ready(next(opened).data)
        began, taken = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            jax.block_until_ready(next(opened).data)
            taken += BATCH
        return taken / (time.perf_counter() - began)


def trained(pipeline: InputPipeline, parts: Setup, steps: int) -> tuple[float, float]:
    """Returns training's fraction of time spent waiting and images per second, after compilation and warmup."""
    step = parts.layout.lift(with_inputs(parts.make_step, pipeline))
    state = parts.layout.init(parts.init, parts.keys.init)
    in_flight: collections.deque[jax.Array] = collections.deque()
    with pipeline.open(0, steps + 3) as opened:
        for steps_of_call, data in opened:
            state, infos = step(parts.keys.run, state, data)
            in_flight.append(infos.loss)
            if len(in_flight) > 2:
                jax.block_until_ready(in_flight.popleft())
            if steps_of_call.stop == 3:
                jax.block_until_ready(state)
                began, waited = time.perf_counter(), opened.seconds_waited
        jax.block_until_ready(state)
        elapsed = time.perf_counter() - began
        return (opened.seconds_waited - waited) / elapsed, steps * BATCH / elapsed


def main(steps: int) -> None:
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, batch {BATCH}, {steps} steps")
    print(f"{'data set':<20} {'data alone, images/s':>21} {'training, images/s':>19} {'waiting':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, data in places(Path(folder)).items():
            config = config_of(data)
            source = load_source(data)
            parts = make_setup(config)
            pipeline = pipeline_of(config, source, parts)
            rate = alone(pipeline)
            waiting, images = trained(pipeline, parts, steps)
            print(f"{name:<20} {rate:>21,.0f} {images:>19,.1f} {waiting:>8.3%}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
