"""The fields of diffusers' `UNet2DModel` and schedulers, and ours that mean the same.

What cannot be expressed on the other side is refused by name, in both directions; nothing is left out in silence.
"""

import typing
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, LossConfig, ModelConfig, TrainConfig
from ddpm_jax.names import Prediction, ScheduleName, Spacing, Variance
from ddpm_jax.reverse import LEARNED_VARIANCES
from ddpm_jax.schedules import make_betas
from ddpm_jax.system.errors import UserError

_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_SCHEDULES: dict[str, ScheduleName] = {
    "linear": "linear",
    "scaled_linear": "quad",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
# The two forms of a fixed variance store the same numbers, or their logarithms.
_VARIANCES: dict[str | None, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
    None: "fixed_small",
}
_SPACINGS: dict[str, Spacing] = {"linspace": "linspace", "leading": "leading", "trailing": "trailing"}

# Defaults of the class that differ from DDPMScheduler's.
_SOLVER = {"clip_sample": False, "timestep_spacing": "linspace", "variance_type": None}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDIMScheduler": {"variance_type": None},
    "DPMSolverMultistepScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
}
"""The schedulers that can be read. They differ in how images are drawn from a diffusion, which the command chooses."""

# Settings of one sampler, or fields without a meaning of their own: the command line has its own.
_OF_A_SAMPLER = {
    *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "euler_at_final", "predict_x0"),
    *("disable_corrector", "solver_p", "lambda_min_clipped", "time_shift_type", "flow_shift", "tensor_format"),
    *("dynamic_thresholding_ratio", "sample_max_value", "skip_prk_steps"),
}


# More than any network has: lists and tables of a hostile file's 10^12 would fill the memory.
_MOST_STEPS, _MOST_BLOCKS = 1_000_000, 100


class _Fields:
    """The fields of a JSON object, taken one by one; what is left over at the end must be neutral."""

    def __init__(self, given: Mapping[str, Any], shown: str):
        self._left = {name: value for name, value in given.items() if not name.startswith("_")}
        self._shown = shown

    def take(self, name: str, kind: Any, default: Any) -> Any:
        """Returns the value of a field of a type (a list of it: `[int]`), or its default if it is absent."""
        value = self._left.pop(name, default)
        entries, each = (value, kind[0]) if isinstance(kind, list) else ([value], kind)
        numeric = (int, float) if each is float else each
        if not isinstance(entries, list | tuple) or any(
            not isinstance(entry, numeric) or (isinstance(entry, bool) and each is not bool) for entry in entries
        ):
            raise self.refusal(name, value)
        if each is float:
            try:
                entries = [float(entry) for entry in entries]
            except OverflowError:  # an integer of 400 digits
                raise self.refusal(name, value) from None
        return tuple(entries) if isinstance(kind, list) else entries[0]

    def choose(self, name: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """Returns what the value of a field stands for."""
        value = self._left.pop(name, default)
        if not isinstance(value, str | None) or value not in choices:
            raise self.refusal(name, value, choices)
        return choices[value]

    def expect(self, name: str, *allowed: Any) -> None:
        """Checks that a field is absent or has one of the values that mean what this package does."""
        value = self._left.pop(name, allowed[0])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise self.refusal(name, value, allowed)

    def skip(self, names: Iterable[str]) -> None:
        """Drops fields that have no bearing here."""
        for name in names:
            self._left.pop(name, None)

    def finish(self) -> None:
        """Checks that nothing is left that could change the numbers: unknown fields must be null or false."""
        for name, value in self._left.items():
            if value is not None and value is not False:
                raise self.refusal(name, value, [None])

    def refusal(self, name: str, value: Any, choices: Iterable[Any] = ()) -> UserError:
        """Returns the error that a value is not supported."""
        known = ", ".join(_json(each) for each in choices)
        return UserError(
            f"{self._shown}: {name}={_json(value)[:80]} is not supported{f' (supported: {known})' if known else ''}"
        )


def _json(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def read_config(unet: Mapping[str, Any], scheduler: Mapping[str, Any], *, name: str, shown: tuple[str, str]) -> Config:
    """Returns the configuration that diffusers' files describe.

    Args:
      unet: the JSON object of a `UNet2DModel`'s config.json; absent fields have the defaults of the class.
      scheduler: that of its scheduler_config.json, likewise.
      name: of the configuration.
      shown: names of the two files, for messages.

    Returns:
      the `Config`; its images are those of a folder that is not known yet.

    Raises:
      UserError: a field has a value that is not supported; the message names both.
    """
    diffusion = _read_scheduler(scheduler, shown[1])
    model, data, out_channels = _read_unet(unet, shown[0])
    learned = diffusion.variance in LEARNED_VARIANCES
    expected = typing.cast(int, data.channels) * (2 if learned else 1)
    if out_channels != expected:
        raise UserError(
            f"{shown[0]}: out_channels={out_channels} does not fit in_channels={data.channels} with the "
            f"{'learned' if learned else 'fixed'} variance of {shown[1]}: it must be {expected}"
        )
    return Config(
        name=name,
        data=data,
        diffusion=diffusion,
        model=model,
        loss=LossConfig(kind="hybrid" if learned else "simple"),
        train=TrainConfig(label_dropout=0.0),
    )


def _read_unet(given: Mapping[str, Any], shown: str) -> tuple[ModelConfig, DataConfig, int]:
    if given.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UserError(f"{shown}: a {given['_class_name']!s:.80} is not supported, only a UNet2DModel")
    fields = _Fields(given, shown)
    size = given.get("sample_size")
    if size is None:
        raise UserError(f'{shown} does not name the size of the images: add "sample_size": 32, or whatever it is')
    size = (
        fields.take("sample_size", [int], None) if isinstance(size, list) else 2 * (fields.take("sample_size", int, 0),)
    )
    if len(size) != 2:
        raise fields.refusal("sample_size", size)
    height, width = size
    channels = fields.take("block_out_channels", [int], [224, 448, 672, 896])
    if not 1 <= len(channels) <= _MOST_BLOCKS or any(each < 1 or each % channels[0] for each in channels):
        listed = ", ".join(map(str, channels))[:80]
        raise UserError(f"{shown}: block_out_channels [{listed}] are not supported: all must be multiples of the first")
    blocks, groups = fields.take("layers_per_block", int, 2), fields.take("norm_num_groups", int, 32)
    if not 1 <= blocks <= _MOST_BLOCKS:
        raise fields.refusal("layers_per_block", blocks)
    fields.expect("attn_norm_num_groups", None, groups)
    fields.expect("time_embedding_dim", None, 4 * channels[0])
    fields.expect("time_embedding_type", "positional")
    fields.expect("center_input_sample", False)
    fields.expect("act_fn", "silu", "swish")
    fields.expect("resnet_time_scale_shift", "default")
    fields.expect("downsample_type", "conv")
    fields.expect("upsample_type", "conv")
    fields.expect("mid_block_type", "UNetMidBlock2D")
    fields.expect("mid_block_scale_factor", 1)
    fields.expect("class_embed_type", None)
    fields.expect("downsample_padding", 1, 0)
    fields.skip(("num_train_timesteps", "id2label", "label2id"))
    head_channels, classes = given.get("attention_head_dim", 8), 0
    if given.get("num_class_embeds") is not None:
        classes = fields.take("num_class_embeds", int, 0)
        if not 1 <= classes <= _MOST_STEPS:
            raise fields.refusal("num_class_embeds", classes)
    model = ModelConfig(
        width=channels[0],
        channel_mult=tuple(each // channels[0] for each in channels),
        num_res_blocks=blocks,
        attention_resolutions=_read_blocks(fields, len(channels), height, shown),
        mid_attention=fields.take("add_attention", bool, True),
        num_head_channels=fields.take("attention_head_dim", int, 8) if head_channels is not None else 0,
        num_groups=groups,
        norm_eps=fields.take("norm_eps", float, 1e-5),
        symmetric_downsampling=given.get("downsample_padding", 1) == 1,
        freq_shift=fields.take("freq_shift", int, 0),
        cos_first=fields.take("flip_sin_to_cos", bool, True),
        dropout=fields.take("dropout", float, 0.0),
        num_classes=classes,
    )
    data = DataConfig(
        source="folder", height=height, width=width, channels=fields.take("in_channels", int, 3)
    )  # which images it was trained on is not in the files
    out_channels = fields.take("out_channels", int, 3)
    fields.finish()
    return model, data, out_channels


def _read_blocks(fields: _Fields, levels: int, height: int, shown: str) -> tuple[int, ...]:
    """Returns the heights of the levels with attention, which must be the same on the way down and up."""
    attention = []
    for way, default in (("Down", [False, True, True, True]), ("Up", [True, True, True, False])):
        name, known = f"{way.lower()}_block_types", {f"{way}Block2D": False, f"Attn{way}Block2D": True}
        absent = [f"{'Attn' if has else ''}{way}Block2D" for has in default]
        blocks = [block.removeprefix("UNetRes") for block in fields.take(name, [str], absent)]  # the first versions'
        unknown = [block for block in blocks if block not in known]
        if unknown:
            raise fields.refusal(name, unknown[0], known)
        if len(blocks) != levels:
            raise UserError(f"{shown}: {name} lists {len(blocks)} blocks, but block_out_channels has {levels} levels")
        attention.append([known[block] for block in blocks])
    down, up = attention[0], attention[1][::-1]
    if down != up:
        raise UserError(
            f"{shown}: down_block_types and up_block_types are not supported: attention must be at the same levels on "
            "the way down and up"
        )
    return tuple(height >> level for level in range(levels) if down[level])


def _read_scheduler(given: Mapping[str, Any], shown: str) -> DiffusionConfig:
    kind = str(given.get("_class_name", "DDPMScheduler"))
    if kind not in SCHEDULERS:
        raise UserError(
            f"{shown}: a {kind:.80} is not supported, only {', '.join(SCHEDULERS)}; if its noise schedule is "
            "that of one of these, save it as such with from_config and save_pretrained"
        )
    fields, defaults = _Fields(given, shown), SCHEDULERS[kind]
    num_steps = fields.take("num_train_timesteps", int, 1000)
    if num_steps > _MOST_STEPS:
        raise fields.refusal("num_train_timesteps", num_steps)
    if defaults is _SOLVER:  # which never clip: the field is left over from the scheduler that they were made from
        fields.skip(["clip_sample"])
    clip = fields.take("clip_sample", bool, defaults.get("clip_sample", True))
    if fields.take("thresholding", bool, False):  # takes the place of clip_sample
        if fields.take("sample_max_value", float, 1.0) != 1:
            raise UserError(
                f"{shown}: thresholding=true with sample_max_value={given['sample_max_value']} is not supported: set "
                "thresholding to false, and draw with --clip dynamic --dynamic-quantile "
                f"{given.get('dynamic_thresholding_ratio', 0.995)!s:.20}"
            )
        clip = True  # the quantile is cut to [1, sample_max_value], so that x0 is clipped to [-1, 1]
    elif clip:
        fields.expect("clip_sample_range", 1.0)
    spacing: Spacing | None = fields.choose("timestep_spacing", _SPACINGS, defaults.get("timestep_spacing", "leading"))
    if spacing == "leading":
        fields.expect("steps_offset", 0)
    if defaults is _SOLVER and spacing == "linspace":  # their default: it leaves the choice to our samplers
        spacing = None
    predicts_eps = fields.take("predict_epsilon", bool, True)  # before there was a prediction_type
    prediction = fields.choose("prediction_type", _PREDICTIONS, "epsilon" if predicts_eps else "sample")
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        fields.expect(name, False)
    for name in ("use_flow_sigmas", "use_dynamic_shifting"):
        fields.expect(name, False)
    fields.expect("set_alpha_to_one", True)
    fields.expect("final_sigmas_type", "zero")
    variance = fields.choose("variance_type", _VARIANCES, defaults.get("variance_type", "fixed_small"))
    zero_snr = fields.take("rescale_betas_zero_snr", bool, False)
    start, end = fields.take("beta_start", float, 1e-4), fields.take("beta_end", float, 0.02)
    schedule: ScheduleName = fields.choose("beta_schedule", _SCHEDULES, "linear")
    if given.get("trained_betas") is not None:
        betas = np.asarray(fields.take("trained_betas", [float], None), np.float64)
        num_steps = len(betas)
        schedule, start, end = _named(betas, shown)
    fields.skip({"steps_offset", "clip_sample_range", "trained_betas", *_OF_A_SAMPLER})
    fields.finish()
    return DiffusionConfig(
        schedule=schedule,
        num_steps=num_steps,
        beta_start=start,
        beta_end=end,
        zero_terminal_snr=zero_snr,
        prediction=prediction,
        variance=variance,
        clip_x0=clip,
        spacing=spacing,
    )


def _named(betas: np.ndarray, shown: str) -> tuple[ScheduleName, float, float]:
    """Finds the schedule, with its ends, that betas are of."""
    default = DiffusionConfig()
    exact = (float(betas[0]), float(betas[-1])) if len(betas) else (0.0, 0.0)
    # Betas that went through float32 are near those of ends with fewer digits.
    with np.errstate(over="ignore"):
        rounded = tuple(float(str(np.float32(beta))) for beta in exact)
    for (start, end), tolerance in ((exact, 0.0), (rounded, 1e-6), (exact, 1e-6)):
        for name in typing.get_args(ScheduleName):
            ends = (start, end) if 0 < start < 1 and 0 < end < 1 else (default.beta_start, default.beta_end)
            if len(betas) and np.allclose(
                betas, make_betas(name, len(betas), beta_start=ends[0], beta_end=ends[1]), rtol=tolerance, atol=0
            ):
                free = name in ("jsd", "cosine")
                return name, *((default.beta_start, default.beta_end) if free else ends)
    raise UserError(
        f"{shown}: trained_betas are those of no known schedule ({', '.join(typing.get_args(ScheduleName))})"
    )


VERSION = "0.36.0"
"""The version of diffusers whose fields are written."""


def write_unet(config: Config) -> dict[str, Any]:
    """Returns the fields of the `UNet2DModel` that a configuration's network is.

    Raises:
      UserError: it is not one; the message names the field.
    """
    model, data = config.model, config.data
    if model.network:
        raise UserError(f"model.network={model.network} is not a UNet2DModel: only the paper's U-Net can be exported")
    default = ModelConfig(embed_channels=model.embed_channels if model.embed_channels == model.width else 0)
    for name in ("timestep_scale", "embed_channels", "scale_shift_norm", "resblock_updown"):
        if getattr(model, name) != getattr(default, name):
            raise UserError(f"model.{name}={getattr(model, name)} cannot be exported: a UNet2DModel has no such field")
    levels = range(len(model.channel_mult))
    channels = [model.width * multiplier for multiplier in model.channel_mult]
    attention = [data.height >> level in model.attention_resolutions for level in levels]
    head_channels = model.num_head_channels or None
    if model.num_heads > 1:
        attended = {channels[level] for level in levels if attention[level]}
        attended |= {channels[-1]} if model.mid_attention else set()
        widths = {each // model.num_heads for each in attended}
        if len(widths) > 1:
            raise UserError(
                f"model.num_heads={model.num_heads} at levels of {', '.join(map(str, sorted(attended)))} channels is "
                "not a UNet2DModel, whose heads are of one width: train with model.num_head_channels instead"
            )
        head_channels = next(iter(widths), None)
    block = lambda has, way: f"{'Attn' if has else ''}{way}Block2D"
    channels_in = typing.cast(int, data.channels)
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": data.height if data.height == data.width else [data.height, data.width],
        "in_channels": channels_in,
        "out_channels": channels_in * (2 if config.diffusion.variance in LEARNED_VARIANCES else 1),
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "freq_shift": model.freq_shift,
        "flip_sin_to_cos": model.cos_first,
        "down_block_types": [block(has, "Down") for has in attention],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": [block(has, "Up") for has in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": model.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": int(model.symmetric_downsampling),
        "downsample_type": "conv",
        "upsample_type": "conv",
        "dropout": model.dropout,
        "act_fn": "silu",
        "attention_head_dim": head_channels,
        "norm_num_groups": model.num_groups,
        "attn_norm_num_groups": None,
        "norm_eps": model.norm_eps,
        "resnet_time_scale_shift": "default",
        "add_attention": model.mid_attention,
        "class_embed_type": None,
        "num_class_embeds": model.num_classes + 1 if model.num_classes else None,
        "num_train_timesteps": None,
    }


def write_scheduler(config: Config) -> dict[str, Any]:
    """Returns the fields of the `DDPMScheduler` of a configuration's diffusion.

    Raises:
      UserError: there is none; the message names the field.
    """
    diffusion = config.diffusion
    ours = lambda names: {value: name for name, value in reversed(names.items())}
    predictions, schedules, variances = ours(_PREDICTIONS), ours(_SCHEDULES), ours(_VARIANCES)
    spacings = {None: "linspace", **ours(_SPACINGS)}
    for field, value, known in (
        ("prediction", diffusion.prediction, predictions),
        ("variance", diffusion.variance, variances),
        ("spacing", diffusion.spacing, spacings),
    ):
        if value not in known:
            raise UserError(
                f"diffusion.{field}={value} cannot be exported: diffusers' DDPMScheduler has no such {field}"
            )
    betas = None
    if diffusion.schedule not in schedules:
        name, start, end = diffusion.schedule, diffusion.beta_start, diffusion.beta_end
        betas = make_betas(name, diffusion.num_steps, beta_start=start, beta_end=end).tolist()
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": diffusion.num_steps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": schedules.get(diffusion.schedule, "linear"),
        "trained_betas": betas,
        "variance_type": variances[diffusion.variance],
        "clip_sample": diffusion.clip_x0,
        "clip_sample_range": 1.0,
        "prediction_type": predictions[diffusion.prediction],
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": spacings[diffusion.spacing],
        "steps_offset": 0,
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
    }
