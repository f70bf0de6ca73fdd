"""Handwritten digits, 8x8: scikit-learn's real scans, 1,438 for training. Nothing is downloaded; `make demo` runs this.

    python train.py                      (or: python train.py configs/digits.py)

Hardware: two CPU cores, about 2 minutes for the 5,000 steps. Expect a loss near 0.08 and legible digits.
"""

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, LogConfig, ModelConfig, TrainConfig

config = Config(
    name="digits",
    data=DataConfig(source="digits", height=8, width=8, channels=1, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(
        width=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=8, dropout=0.0
    ),
    train=TrainConfig(steps=5000, batch_size=32, learning_rate=1e-3, warmup_steps=100, ema_decay=0.999),
    checkpoints=CheckpointConfig(every=1000),
    log=LogConfig(every=100, samples_every=1000, num_samples=64, sample_steps=50),
)
