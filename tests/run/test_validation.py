"""What cannot be trained is refused, and what is rarely intended is warned about."""

import dataclasses
import re

import pytest

from ddpm_jax.config import Config, DiffusionConfig
from ddpm_jax.run.fields import leaves
from ddpm_jax.run.validation import most_steps, validate, warnings_of
from ddpm_jax.system.errors import UserError


def refused(config, match):
    with pytest.raises(UserError, match=match) as error:
        validate(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_good_configuration_passes(small):
    validate(small)
    validate(Config())
    assert warnings_of(small) == []


def test_every_field_is_held_to_its_range(small, with_value):
    for name, leaf in leaves(Config).items():
        if leaf.range is None:
            continue
        for bound, step in (
            *((leaf.range.at_least, -1), (leaf.range.above, 0)),
            *((leaf.range.below, 0), (leaf.range.at_most, 1)),
        ):
            if abs(bound) == float("inf"):
                continue
            value = float(bound + step) if leaf.kind is float else int(bound + step)
            value = (0.1, float(bound + step)) if leaf.kind == tuple[float, ...] else value
            value = (1, value) if leaf.kind == tuple[int, ...] else value
            line = refused(with_value(small, name, value), f"must be {leaf.range}")
            assert line.startswith(f"{name}={value}")
        if leaf.kind is float:
            refused(with_value(small, name, float("nan")), f"{name}=nan must be {leaf.range}")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"name": ""}, "must be the name of a folder"),
        ({"name": "a/b"}, "must be the name of a folder"),
        ({"name": ".."}, "must be the name of a folder"),
        ({"data.height": 9}, "image height 9 is not divisible by 2"),
        ({"data.channels": 0}, "must be at least 1 and below 65536 or None"),
        ({"model.channel_mult": ()}, "give one number per level"),
        ({"model.channel_mult": (1, 0)}, r"=\(1, 0\): each entry must be at least 1"),
        ({"model.width": 10}, "10 channels .* are not divisible by 4 groups"),
        ({"model.num_heads": 3}, "8 channels .* are not divisible by 3 heads"),
        ({"diffusion.variance": "learned_range"}, "is not trained by L_simple"),
        ({"loss.kind": "hybrid"}, "trains a learned variance, and diffusion.variance=fixed_large is fixed"),
        ({"loss.kind": "vlb", "loss.weighting": "min_snr"}, "applies to L_simple, not to loss.kind=vlb"),
        ({"ema.sigma_rels": (0.1,)}, r"ema.sigma_rels=\(0.1,\) must be two or more different widths"),
        ({"ema.sigma_rels": (0.1, 0.1)}, "must be two or more different widths"),
        ({"train.weight_decay": 0.1}, "weight_decay=0.1 needs --train.optimizer adamw or muon"),
        ({"train.lr_decay": "cosine"}, "decay_steps=0 does not fit train.lr_decay=cosine"),
        ({"train.decay_steps": 5}, "decay_steps=5 does not fit train.lr_decay=constant"),
        (
            {"train.lr_decay": "cosine", "train.decay_steps": 5, "train.warmup_steps": 5},
            "decay_steps=5 must be larger than train.warmup_steps=5",
        ),
        ({"checkpoints.best_by": "eval_loss"}, "eval.every=0 does not divide checkpoints.every=5000"),
        ({"train.steps": "many"}, "needs an integer, not 'many'"),
        ({"train.parallel": "pmap", "train.fsdp": 4}, "train.fsdp=4 shards it: use --train.parallel jit"),
    ],
)
def test_what_cannot_be_trained_is_one_line(small, with_value, changes, line):
    for name, value in changes.items():
        small = with_value(small, name, value)
    refused(small, line)


@pytest.mark.parametrize(
    ("diffusion", "passes"),
    [
        (DiffusionConfig(schedule="jsd"), False),
        *((DiffusionConfig(schedule="jsd", prediction=prediction), True) for prediction in ("x0", "v", "mean")),
        (DiffusionConfig(schedule="const", beta_end=0.9), False),
        (DiffusionConfig(schedule="const", beta_end=0.9, prediction="mean"), False),
        (DiffusionConfig(schedule="linear", zero_terminal_snr=True, prediction="v"), True),
        (DiffusionConfig(schedule="linear", zero_terminal_snr=True), False),
    ],
)
def test_a_prediction_must_determine_x0_at_the_last_step(small, diffusion, passes):
    config = dataclasses.replace(small, diffusion=diffusion)
    if passes:
        validate(config)
    else:
        schedule = "zero-terminal-SNR" if diffusion.zero_terminal_snr else diffusion.schedule
        refused(config, f"does not determine x_0 at the last step of the {schedule} schedule")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"diffusion.num_steps": 100}, r"at T=100\).*--diffusion\.beta-start 0\.001 --diffusion\.beta-end 0\.2"),
        ({"diffusion.num_steps": 10}, "use --diffusion.schedule cosine"),
        ({"diffusion.beta_end": 1e-3}, "use --diffusion.schedule cosine"),
        (
            {"model.attention_resolutions": (4, 16)},
            r"attention_resolutions 16: no level has this height \(they have 8, 4\)",
        ),
        ({"train.warmup_steps": 1000}, "warmup_steps=1000 does not end within train.steps=1000"),
        ({"train.ema_decay": 0.9999}, "90% of the untrained network"),
        ({"train.steps_per_call": 1000}, r"(log\.\w+)=(\d+) steps, so --train.steps-per-call \2 does the same"),
        ({"model.network": "own.py:make", "train.grad_accum_steps": 2}, "=ddpm_jax.conv_general_dilated$"),
    ],
)
def test_what_is_rarely_intended_is_warned_about(small, with_value, changes, line):
    for name, value in changes.items():
        small = with_value(small, name, value)
    validate(small)
    (warning,) = warnings_of(small)
    assert "\n" not in warning
    assert re.search(line, warning)


def test_a_call_has_no_more_steps_than_come_before_something_is_due(small, with_value):
    several = with_value(small, "train.steps_per_call", 10**6)
    assert most_steps(with_value(several, "log.every", 30)) == 30
    assert most_steps(with_value(several, "train.steps", 20)) == 20
    assert most_steps(several, [7, 0]) == 7
    assert most_steps(several, [1]) == 2  # still the program of several steps
    assert most_steps(small, [7]) == 1


@pytest.mark.parametrize("num_steps", [25, 400])
def test_the_betas_that_the_warning_suggests_pass(small, with_value, num_steps):
    (warning,) = warnings_of(with_value(small, "diffusion.num_steps", num_steps))
    words = warning.split()
    start, end = (float(words[words.index(f"--diffusion.beta-{which}") + 1]) for which in ("start", "end"))
    diffusion = DiffusionConfig(num_steps=num_steps, beta_start=start, beta_end=end)
    mended = dataclasses.replace(small, diffusion=diffusion)
    validate(mended)
    assert warnings_of(mended) == []
