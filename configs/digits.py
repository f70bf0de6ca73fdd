"""Handwritten digits, 8x8: scikit-learn's 1,797 real scans. Nothing is downloaded; `make demo` trains this.

    python train.py                      (or: python train.py configs/digits.py)

Hardware: two CPU cores, about 3 minutes for the 2,000 steps. Expect a loss near 0.1 and digits that can be read.
"""

from ddpm_jax.config import CheckpointConfig, Config, DataConfig, DiffusionConfig, LogConfig, ModelConfig, TrainConfig

config = Config(
    name="digits",
    data=DataConfig(source="digits", height=8, width=8, channels=1, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(width=32, multipliers=(1, 2), blocks=2, attention_resolutions=(4,), groups=8, dropout=0.0),
    train=TrainConfig(steps=2000, batch_size=64, learning_rate=2e-3, warmup=100, ema_decay=0.995),
    checkpoints=CheckpointConfig(every=500),
    log=LogConfig(every=50, samples_every=500, num_samples=64),
)
