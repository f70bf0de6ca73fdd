"""LSUN Bedroom, 256x256: the paper's large model, 255.7M parameters.

    python train.py configs/lsun_bedroom256_large.py

The data set must be prepared once with TensorFlow Datasets (the error line says how). The paper trained for 1,150,000
steps on a TPU v3-8, at a speed it does not state, and reports FID 4.90 (50,000 samples). It says only "approximately
256 million parameters by increasing filter count"; width 192 is the only simple choice that gives this. None of this
has been measured here.
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    name="lsun_bedroom256_large",
    data=DataConfig(source="tfds:lsun/bedroom", height=256, width=256, channels=3, flip=False),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_small"),
    model=ModelConfig(
        width=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, attention_resolutions=(16,), dropout=0.0
    ),
    train=TrainConfig(
        steps=1_150_000, batch_size=64, learning_rate=2e-5, warmup_steps=5000, grad_clip=1.0, ema_decay=0.9999
    ),
)
