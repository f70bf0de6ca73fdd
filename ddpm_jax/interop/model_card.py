"""The model card of an exported network: what it is, how it was trained, and how to use it."""

from collections.abc import Sequence
from pathlib import PurePath

import ddpm_jax
from ddpm_jax.config import FROM_PYTHON, Config
from ddpm_jax.system import user_code

_HEADER = """---
license: {license}
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusers
- ddpm
- jax
- unconditional-image-generation
---

# {name}

A denoising diffusion model ([DDPM](https://arxiv.org/abs/2006.11239)) of {shape} images, in the format of
[diffusers](https://github.com/huggingface/diffusers), written by ddpm_jax {version}.

## Use

`FOLDER` is the name of this model on the Hub, or a folder with its files.

```python
{use}
```

ddpm_jax draws from the folder as from a run of its own: `python sample.py FOLDER`.
"""

_UNCONDITIONAL = """from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("FOLDER")
images = pipeline(batch_size=16, num_inference_steps={num_steps}).images"""

_CONDITIONAL = """import torch
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("FOLDER")
unet, scheduler = pipeline.unet, pipeline.scheduler
labels = torch.arange(16) % {num_classes}  # {num_classes} itself stands for "no label"
x = torch.randn(16, {channels}, {height}, {width})
scheduler.set_timesteps({num_steps})
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, labels).sample, t, x).prev_sample
images = (x / 2 + 0.5).clamp(0, 1)"""

_TRAINING = """
## Training

The weights are the exponential moving average (EMA) of those that were trained, with decay {decay:g} per step.

| | |
|---|---|
{rows}
"""


def model_card(config: Config, *, step: int | None, class_names: Sequence[str] = (), license: str = "unknown") -> str:
    """Returns the README.md of a model on the Hugging Face Hub: its header, how to use it, and how it was trained.

    Args:
      config: the configuration of the run.
      step: its number of training steps; None if another program trained it, whose training the configuration does not
        describe.
      class_names: names of its classes, if they are known.
      license: of the weights, an identifier of the Hub.

    Returns:
      Markdown with a YAML header.
    """
    data, model, diffusion = config.data, config.model, config.diffusion
    shape = f"{data.height}x{data.width}x{data.channels}"
    use = (_CONDITIONAL if model.num_classes else _UNCONDITIONAL).format(
        num_steps=diffusion.num_steps,
        num_classes=model.num_classes,
        channels=data.channels,
        height=data.height,
        width=data.width,
    )
    card = _HEADER.format(license=license, name=config.name, shape=shape, version=ddpm_jax.__version__, use=use)
    if class_names:
        listed = ", ".join(f"{number} {name}" for number, name in enumerate(class_names))
        card += f"\nClasses: {listed}.\n"
    if step is None:
        return card
    rows = "\n".join(f"| {name} | {value} |" for name, value in _training(config, step).items())
    return card + _TRAINING.format(decay=config.train.ema_decay, rows=rows)


def _training(config: Config, step: int) -> dict[str, str]:
    data, model, diffusion, train = config.data, config.model, config.diffusion, config.train
    own = data.source == FROM_PYTHON or user_code.is_named(data.source)
    return {
        "images": f"{'own' if own else data.source}{', flipped at random' if data.flip else ''}",
        "steps": f"{step:,} of batch size {train.batch_size}",
        "start": f"the weights of {PurePath(train.init_from).name}" if train.init_from else "random weights",
        "optimizer": f"{train.optimizer}, learning rate {train.learning_rate:g} ({train.lr_decay} after a warmup of "
        f"{train.warmup_steps:,} steps)"
        + (f", gradient clipped to norm {train.grad_clip:g}" if train.grad_clip else ""),
        "loss": config.loss.kind + ("" if config.loss.weighting == "none" else f", weighting {config.loss.weighting}"),
        "diffusion": f"T = {diffusion.num_steps}, {diffusion.schedule} schedule, prediction {diffusion.prediction}, "
        f"variance {diffusion.variance}",
        "network": f"U-Net of width {model.width} x ({', '.join(map(str, model.channel_mult))}), "
        f"{model.num_res_blocks} residual blocks per level, dropout {model.dropout:g}",
        "precision": train.precision,
        "seed": str(train.seed),
    }
