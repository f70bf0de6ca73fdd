"""Fashion-MNIST, 28x28 padded to 32x32, grayscale: 60,000 real images of clothes, available as a Debian package.

    apt-get install dataset-fashion-mnist
    python train.py configs/fashion_mnist.py

For one GPU, or CPU cores overnight. Not from the paper: a smaller U-Net (6M parameters) with the paper's diffusion and
a higher learning rate. Neither training time nor final quality has been measured yet. No flips: the shoes in this set
all point left.
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    name="fashion_mnist",
    data=DataConfig(source="idx", height=32, width=32, channels=1, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(width=64, channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1),
    train=TrainConfig(steps=50_000, batch_size=128, learning_rate=5e-4, warmup_steps=1000, ema_decay=0.9995),
)
