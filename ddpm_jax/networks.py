"""What a network is to everything around it: a function of its parameters, and how to draw the first of them."""

import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array

from ddpm_jax.guidance import guided
from ddpm_jax.keys import make_key
from ddpm_jax.names import Variance
from ddpm_jax.reverse import Predict

if typing.TYPE_CHECKING:
    from flax import nnx

Params = Any
"""A nested dict of arrays, each under a name: the parameters of a network."""


class Network(typing.NamedTuple):
    """A network as pure functions; from a Linen module by `from_linen`, from an NNX model by `from_nnx`.

    Two plain functions are a network too: `Network(init, apply)`.
    """

    init: Callable[[Array], Params]
    """Draws the first parameters from a typed key: a nested dict of arrays under string names."""
    apply: Callable[..., Array]
    """`apply(params, x_t, t, labels=None, *, dropout_keys=None) -> output`.

    x_t is (B, H, W, C) float32 and t is (B,) int32, 0-based. labels is (B,) int32 in [0, num_classes], where
    num_classes stands for "no label"; None if all images have none. dropout_keys is (B,) typed keys, one per image,
    while training; None otherwise. The output is (B, H, W, C) float32, or (B, H, W, 2 C) for a learned variance.
    """
    num_classes: int = 0
    """Number of classes of a class-conditional network; 0: unconditional."""
    module: nn.Module | None = None
    """The Linen module behind it, if there is one: its layers are listed by `--summary`."""


def from_linen(module: nn.Module, image_shape: Sequence[int], *, num_classes: int | None = None) -> Network:
    """Makes a network of a Linen module.

    Args:
      module: called as `module(x_t, t)`, with `labels` and `dropout_keys` by keyword where its `__call__` takes them.
      image_shape: (H, W, C).
      num_classes: number of classes; `module.num_classes`, or 0 if there is no such field, if not given.

    Returns:
      the network; its parameters are the collection "params".

    Raises:
      ValueError: classes for a module that takes no labels, or (from `init`) a module with state beside its parameters.
    """
    num_classes = getattr(module, "num_classes", 0) if num_classes is None else num_classes
    accepted = _accepted(type(module).__call__, num_classes)

    def init(key: Array) -> Params:
        labels = jnp.zeros((1,), jnp.int32) if num_classes else None
        variables = module.init(key, *_example(image_shape), **accepted(labels, None))
        state = sorted(variables.keys() - {"params"})
        if state:
            raise ValueError(f"the module keeps state beside its parameters ({', '.join(state)}): remove those layers")
        return variables["params"]

    def apply(
        params: Params, x_t: Array, t: Array, labels: Array | None = None, *, dropout_keys: Array | None = None
    ) -> Array:
        return typing.cast(Array, module.apply({"params": params}, x_t, t, **accepted(labels, dropout_keys)))

    return Network(init, apply, num_classes, module)


def from_nnx(make: Callable[["nnx.Rngs"], "nnx.Module"], *, num_classes: int = 0) -> Network:
    """Makes a network of an NNX model.

    Args:
      make: makes the model from its random streams; it is called as `model(x_t, t)`, with `labels` and `dropout_keys`
        by keyword where its `__call__` takes them.
      num_classes: number of classes; 0: unconditional.

    Returns:
      the network; its parameters are the model's `nnx.Param` variables, as a nested dict.

    Raises:
      ValueError: classes for a model that takes no labels, or a model with variables other than `nnx.Param`.
    """
    from flax import nnx  # takes a while to import, and Linen needs none of it

    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, shapes, *rest = nnx.split(abstract, nnx.Param, ...)
    others = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest[0])})
    if others:
        raise ValueError(
            f"the model has variables that are not nnx.Param ({', '.join(others)}): remove those layers (for dropout, "
            "take `dropout_keys` and use ddpm_jax.unet.dropout)"
        )
    accepted = _accepted(type(abstract).__call__, num_classes)
    # Names of layers in lists are integers in NNX; files name arrays by strings.
    paths = {tuple(map(str, path)): path for path, _ in nnx.to_flat_state(shapes)}

    def init(key: Array) -> Params:
        flat = nnx.to_flat_state(nnx.state(make(nnx.Rngs(key)), nnx.Param))
        return traverse_util.unflatten_dict({tuple(map(str, path)): variable[...] for path, variable in flat})

    def apply(
        params: Params, x_t: Array, t: Array, labels: Array | None = None, *, dropout_keys: Array | None = None
    ) -> Array:
        flat = traverse_util.flatten_dict(params)
        state = nnx.from_flat_state([(path, nnx.Param(flat[names])) for names, path in paths.items()])
        model: Any = nnx.merge(graph, state)
        return typing.cast(Array, model(x_t, t, **accepted(labels, dropout_keys)))

    return Network(init, apply, num_classes)


def predict_with(
    network: Network,
    params: Params,
    labels: Array | None,
    *,
    guidance_scale: float = 1.0,
    guided_timesteps: tuple[int, int] | None = None,
    variance: Variance = "fixed_large",
) -> Predict:
    """Returns a network with given parameters as the samplers and losses call it.

    Args:
      network: the network.
      params: its parameters.
      labels: (B,) int32, each in [0, num_classes]; None for an unconditional network.
      guidance_scale: scale of classifier-free guidance; 1: none.
      guided_timesteps: the first and last timestep at which to guide; all if None.
      variance: the variance of the reverse steps, which says what the output's channels are.

    Returns:
      `predict(x_t, t) -> output`.
    """

    def predict(x_t: Array, t: Array, labels: Array | None = None) -> Array:
        return network.apply(params, x_t, t, labels)

    if labels is None:
        return predict
    return guided(
        predict,
        labels,
        null_label=network.num_classes,
        guidance_scale=guidance_scale,
        timesteps=guided_timesteps,
        variance=variance,
    )


def parameter_shapes(network: Network) -> Params:
    """Returns the shapes and types of a network's parameters, without computing any."""
    return jax.eval_shape(network.init, make_key(0))


def check_network(network: Network, output_shape: Sequence[int], *, in_channels: int) -> None:
    """Checks that a network maps images to outputs of the right shape, on shapes alone.

    Args:
      network: the network.
      output_shape: (H, W, C) of the output.
      in_channels: channels of the images, which have the same height and width.

    Raises:
      ValueError: its parameters are not a nested dict of named arrays, or its output has another shape or type; also
        whatever the network itself raises.
    """
    params = parameter_shapes(network)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, _ in leaves:
        named = all(isinstance(key, jax.tree_util.DictKey) and isinstance(key.key, str) for key in path)
        if not path or not named or any("." in key.key for key in path):
            raise ValueError(
                "the parameters must be a nested dict of arrays under string names without dots, not "
                f"{jax.tree_util.keystr(path) or type(params).__name__}"
            )
    if not leaves:
        raise ValueError("the network has no parameters")
    batch = 2
    x_t = jax.ShapeDtypeStruct((batch, *output_shape[:2], in_channels), jnp.float32)
    t = jax.ShapeDtypeStruct((batch,), jnp.int32)
    output = jax.eval_shape(network.apply, params, x_t, t, t if network.num_classes else None)
    if not isinstance(output, jax.ShapeDtypeStruct) or (output.shape, output.dtype) != (
        (batch, *output_shape),
        jnp.float32,
    ):
        found = f"{output.dtype}{list(output.shape)}" if hasattr(output, "shape") else type(output).__name__
        raise ValueError(f"the output of x_t {list(x_t.shape)} must be float32{[batch, *output_shape]}, not {found}")


def _example(image_shape: Sequence[int]) -> tuple[Array, Array]:
    return jnp.zeros((1, *image_shape)), jnp.zeros((1,), jnp.int32)


def _accepted(call: Callable[..., Any], num_classes: int) -> Callable[[Array | None, Array | None], dict[str, Any]]:
    """Returns a function from labels and dropout keys to those keywords that `call` has parameters for."""
    parameters = inspect.signature(call).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name in ("labels", "dropout_keys") if takes_all or name in parameters]
    if num_classes and "labels" not in names:
        raise ValueError(f"{num_classes} classes for a network whose __call__ takes no `labels`")

    def accepted(labels: Array | None, dropout_keys: Array | None) -> dict[str, Any]:
        if labels is not None and not num_classes:
            raise ValueError("labels were given to an unconditional network (num_classes is 0)")
        given = {"labels": labels, "dropout_keys": dropout_keys}
        return {name: given[name] for name in names}

    return accepted
