"""A folder of your own images, 64x64: PNG, JPEG, TIFF and more, of any size, grayscale, color or with alpha.

    python train.py configs/image_folder.py --data.path my_images

Images are center-cropped and resized; for other sizes: `--data.height 128 --data.width 96` (each divisible by 16). For
one GPU with 16 GB or more, a day or two; with few images, train for fewer steps (`--train.steps 100000`) and watch the
samples. The network (78.7M parameters) and the learning rate are those of DDIM (Song et al. 2021) for CelebA 64x64,
which reports FID 3.51 there with 1000-step sampling. None of this has been measured here.
"""

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig

config = Config(
    name="image_folder",
    data=DataConfig(source="folder", height=64, width=64, channels=None, flip=True),
    diffusion=DiffusionConfig(schedule="linear", num_steps=1000, variance="fixed_large"),
    model=ModelConfig(
        width=128, channel_mult=(1, 2, 2, 2, 4), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1
    ),
    train=TrainConfig(steps=500_000, batch_size=128, learning_rate=2e-4, warmup_steps=5000, ema_decay=0.9999),
)
