"""The names by which configurations and commands choose, and a limit. Without JAX, so that options are parsed early."""

import typing

Cdf = typing.Literal["tanh", "erf"]
"""The CDF of the normal distribution: the original code's tanh approximation, or the exact one."""

Weighting = typing.Literal["none", "min_snr", "truncated_snr"]
"""How the losses at different timesteps are weighted."""

Prediction = typing.Literal["eps", "x0", "v", "mean"]
"""What the network predicts: the noise, the clean image, v, or the mean of x_{t-1}."""

Variance = typing.Literal["fixed_small", "fixed_large", "learned", "learned_range"]
r"""The variance of p(x_{t-1} | x_t): :math:`\tilde\beta_t`, :math:`\beta_t`, or predicted by the network."""

ScheduleName = typing.Literal["linear", "quad", "const", "warmup10", "warmup50", "jsd", "sigmoid", "cosine"]
"""The schedules of `make_betas`."""

TimeSamplingName = typing.Literal["uniform", "antithetic", "loss_aware"]
"""How the timesteps of a training batch are drawn."""

SamplerName = typing.Literal["ancestral", "ddim", "dpm++2m", "dpm++2m_sde", "unipc"]
"""The samplers of `make_sampler`."""

SingleStepSampler = typing.Literal["ancestral", "ddim"]
"""The samplers whose chains can start in the middle: those of single steps."""

Spacing = typing.Literal["linspace", "leading", "trailing", "quadratic", "cubic", "log_snr", "karras"]
"""How the timesteps of a shorter chain are chosen."""

EpsAfterClipping = typing.Literal["recompute", "network"]
"""How DDIM gets eps after x0 is clipped: recomputed from the clipped x0, or the network's own."""

Format = typing.Literal["grid", "png", "npz", "gif"]
"""How images are shown: one picture of all, one picture each, not at all, or the reverse process of all."""

Sigma = typing.Literal["model", "fixed_small", "fixed_large", "optimal"]
"""Variance of the reverse steps: the model's own, a fixed one, or the one that minimizes the bound."""

Form = typing.Literal["pytorch-fid", "adm", "clean-fid", "edm2"]
"""Whose evaluator reads a file of statistics."""

Program = typing.Literal["improved-diffusion", "guided-diffusion"]
"""Programs whose checkpoints have the same names, and different defaults."""

DrawReverse = typing.Literal["auto", "always", "never"]
"""Whether a report draws the reverse process: if it takes at most about two minutes, in any case, or not at all."""

WIDEST = 0.28
"""Largest sigma_rel of `averages`: beyond 0.289 no gamma >= 0 has it, and the first steps would count most."""
