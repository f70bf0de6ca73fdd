"""CIFAR-10, 32x32, unconditional: the paper's model with 35.7M parameters.

    python train.py configs/cifar10.py

Reads CIFAR-10's own archive from ./data (the error line says where to download it); with `--data.source tfds:cifar10`,
reads the copy prepared by tensorflow-datasets, which is in a different order. The paper trained for 800,000 steps in
10.6 hours (21 steps/s) on a TPU v3-8, which it calls similar to 8 V100 GPUs, and reports FID 3.17 (50,000 samples
against the training set), Inception Score 9.46, and at most 3.75 bits/dim on the test set. A third-party run (tqch)
reached FID 9.16 after 47,000 steps, 4.08 after 187,000, and 3.19, with a loss of 0.028, after 796,000. None of this has
been measured here.
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    name="cifar10",
    data=DataConfig(source="cifar10", height=32, width=32, channels=3, flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(width=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1),
    train=TrainConfig(
        steps=800_000, batch_size=128, learning_rate=2e-4, warmup_steps=5000, grad_clip=1.0, ema_decay=0.9999
    ),
)
