"""Handwritten digits, 8x8: scikit-learn's real scans, 1,438 for training. Nothing is downloaded; `make demo` runs this.

    python train.py                      (or: python train.py configs/digits.py)

Hardware: two CPU cores, about 3 minutes for the 1,600 steps. Expect a loss near 0.09 and legible digits.
"""

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, LogConfig, ModelConfig, TrainConfig

config = Config(
    name="digits",
    data=DataConfig(source="digits", height=8, width=8, channels=1, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(
        width=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=8, dropout=0.0
    ),
    train=TrainConfig(steps=1600, batch_size=32, learning_rate=2e-3, warmup_steps=100, ema_decay=0.997),
    checkpoints=CheckpointConfig(every=500),
    log=LogConfig(every=50, samples_every=500, num_samples=64, sample_steps=50),
)
