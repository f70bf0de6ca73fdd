"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in JAX and Flax.

The modules read in the order of the paper: `keys`, `schedules`, `forward`, `reverse`, `bound`, `times`, `losses`,
`samplers`, then the network in `unet`, and what runs it.
"""

__version__ = "0.1.0"
