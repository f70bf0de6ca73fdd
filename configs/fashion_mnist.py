"""Fashion-MNIST, 28x28 padded to 32x32, gray: clothes, 60,000 real images that Debian packages.

    apt-get install dataset-fashion-mnist
    python train.py configs/fashion_mnist.py

Meant for one GPU, or for CPU cores overnight. Not of the paper: a smaller U-Net (6M parameters) with the paper's
diffusion and a faster learning rate. Neither its hours nor its number is measured yet. Not mirrored: the shoes of this
set all point to the left.
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    name="fashion_mnist",
    data=DataConfig(source="idx", height=32, width=32, channels=1, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(width=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1),
    train=TrainConfig(steps=50_000, batch_size=128, learning_rate=5e-4, warmup_steps=1000, ema_decay=0.9995),
)
