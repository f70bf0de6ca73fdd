"""Fashion-MNIST, 28x28, grayscale, on two CPU cores in about two hours: 60,000 real images from a Debian package.

    apt-get install dataset-fashion-mnist
    python train.py configs/fashion_mnist_cpu.py

Not from the paper: a U-Net with 1.1M parameters, the paper's diffusion, and a higher learning rate. The final loss is
0.040; docs/results/fashion_mnist.md has bits/dim, samples and the loss curve. No flips: the shoes in this set all point
left.
"""

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, LogConfig, ModelConfig, TrainConfig

config = Config(
    name="fashion_mnist_cpu",
    data=DataConfig(source="idx", height=28, width=28, channels=1, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(
        width=32, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(7,), num_groups=8, dropout=0.0
    ),
    train=TrainConfig(steps=10_000, batch_size=32, learning_rate=1e-3, warmup_steps=500, ema_decay=0.999),
    checkpoints=CheckpointConfig(every=500),
    log=LogConfig(every=100, samples_every=2000, num_samples=64, sample_steps=50),
)
