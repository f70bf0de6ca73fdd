"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in JAX and Flax.

The names below are the public API: `docs/api.md` lists them with their signatures. Each is imported on first use, so
that `import ddpm_jax` costs nothing and the mathematics needs only JAX, Flax, Optax, Chex and NumPy.

>>> import ddpm_jax
>>> ddpm_jax.make_schedule("linear", 1000).num_steps
1000
"""

import importlib
import typing

__version__ = "0.1.0"

_MODULES = {
    "keys": ("make_key", "image_keys"),
    "schedules": ("make_schedule", "make_betas", "schedule_from_betas", "zero_terminal_snr", "Schedule"),
    "forward": ("q_sample", "q_posterior"),
    "reverse": ("p_mean_variance", "predict_x0"),
    "losses": ("l_simple", "l_vlb", "l_hybrid"),
    "time_sampling": ("uniform_times",),
    "likelihood": ("bound_terms", "total_bits"),
    "pixels": ("to_float", "to_uint8"),
    "guidance": ("guided",),
    "convolution": ("conv_general_dilated",),
    "unet": ("UNet", "time_embedding"),
    "networks": ("Network", "from_linen", "from_nnx", "predict_with"),
    "samplers.chain": ("sample", "sample_trajectory", "Sampler"),
    "samplers.ancestral": ("ancestral",),
    "samplers.ddim": ("ddim",),
    "samplers.dpm_solver": ("dpm_solver_pp_2m", "dpm_solver_pp_2m_sde"),
    "samplers.unipc": ("unipc",),
    "samplers.by_name": ("make_sampler",),
    "config": ("Config",),
    "system.errors": ("UserError",),
    "run.experiments": ("load_config",),
    "data.source": ("Source", "in_memory"),
    "run.trained": ("load_run", "TrainedRun"),
    "training.loop": ("train",),
}

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)

if typing.TYPE_CHECKING:
    from ddpm_jax.config import Config as Config
    from ddpm_jax.convolution import conv_general_dilated as conv_general_dilated
    from ddpm_jax.data.source import Source as Source
    from ddpm_jax.data.source import in_memory as in_memory
    from ddpm_jax.forward import q_posterior as q_posterior
    from ddpm_jax.forward import q_sample as q_sample
    from ddpm_jax.guidance import guided as guided
    from ddpm_jax.keys import image_keys as image_keys
    from ddpm_jax.keys import make_key as make_key
    from ddpm_jax.likelihood import bound_terms as bound_terms
    from ddpm_jax.likelihood import total_bits as total_bits
    from ddpm_jax.losses import l_hybrid as l_hybrid
    from ddpm_jax.losses import l_simple as l_simple
    from ddpm_jax.losses import l_vlb as l_vlb
    from ddpm_jax.networks import Network as Network
    from ddpm_jax.networks import from_linen as from_linen
    from ddpm_jax.networks import from_nnx as from_nnx
    from ddpm_jax.networks import predict_with as predict_with
    from ddpm_jax.pixels import to_float as to_float
    from ddpm_jax.pixels import to_uint8 as to_uint8
    from ddpm_jax.reverse import p_mean_variance as p_mean_variance
    from ddpm_jax.reverse import predict_x0 as predict_x0
    from ddpm_jax.run.experiments import load_config as load_config
    from ddpm_jax.run.trained import TrainedRun as TrainedRun
    from ddpm_jax.run.trained import load_run as load_run
    from ddpm_jax.samplers.ancestral import ancestral as ancestral
    from ddpm_jax.samplers.by_name import make_sampler as make_sampler
    from ddpm_jax.samplers.chain import Sampler as Sampler
    from ddpm_jax.samplers.chain import sample as sample
    from ddpm_jax.samplers.chain import sample_trajectory as sample_trajectory
    from ddpm_jax.samplers.ddim import ddim as ddim
    from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m as dpm_solver_pp_2m
    from ddpm_jax.samplers.dpm_solver import dpm_solver_pp_2m_sde as dpm_solver_pp_2m_sde
    from ddpm_jax.samplers.unipc import unipc as unipc
    from ddpm_jax.schedules import Schedule as Schedule
    from ddpm_jax.schedules import make_betas as make_betas
    from ddpm_jax.schedules import make_schedule as make_schedule
    from ddpm_jax.schedules import schedule_from_betas as schedule_from_betas
    from ddpm_jax.schedules import zero_terminal_snr as zero_terminal_snr
    from ddpm_jax.system.errors import UserError as UserError
    from ddpm_jax.time_sampling import uniform_times as uniform_times
    from ddpm_jax.training.loop import train as train
    from ddpm_jax.unet import UNet as UNet
    from ddpm_jax.unet import time_embedding as time_embedding


def __getattr__(name: str) -> typing.Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        raise ImportError(f'{__name__}.{name} needs {error.name}: pip install "{__name__}[run]"') from error
    globals()[name] = value = getattr(module, name)  # found at once from here on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
