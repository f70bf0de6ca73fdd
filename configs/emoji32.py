"""Emoji, 32x32, RGB, in nine classes, on two CPU cores in about 40 minutes: 1,683 color images from a Debian package.

    apt-get install fonts-noto-color-emoji unicode-data
    python examples/emoji/draw.py data/emoji
    python train.py configs/emoji32.py

Not from the paper: a small U-Net with class labels, the paper's diffusion. examples/emoji/results.py draws samples by
class, measures guidance and scores, and looks for what the network has memorized (docs/results/emoji.md). Nothing is
flipped: many emoji hold text or point somewhere.
"""

from ddpm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EmaConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)

config = Config(
    name="emoji32",
    data=DataConfig(source="folder", path="data/emoji", height=32, width=32, channels=3, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(
        width=48,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        num_groups=16,
        dropout=0.1,
        num_classes=9,
    ),
    train=TrainConfig(steps=6000, batch_size=32, learning_rate=6e-4, warmup_steps=500, ema_decay=0.999),
    ema=EmaConfig(snapshots_every=500),
    eval=EvalConfig(every=500, num=187),
    checkpoints=CheckpointConfig(every=500),
    log=LogConfig(every=100, samples_every=1000, num_samples=63, sample_steps=50),
)
