"""LSUN Bedroom, 256x256: the paper's model with 113.7M parameters.

    python train.py configs/lsun_bedroom256.py

The data set must be prepared once with TensorFlow Datasets (the error line says how). The paper trained for 2,400,000
steps at 2.2 steps/s on a TPU v3-8 (303 hours at that speed) and reports FID 6.36 (50,000 samples). This is the paper's
only data set without random flips. None of this has been measured here.
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    name="lsun_bedroom256",
    data=DataConfig(source="tfds:lsun/bedroom", height=256, width=256, channels=3, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_small"),
    model=ModelConfig(
        width=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(16,), dropout=0.0
    ),
    train=TrainConfig(
        steps=2_400_000, batch_size=64, learning_rate=2e-5, warmup_steps=5000, grad_clip=1.0, ema_decay=0.9999
    ),
)
