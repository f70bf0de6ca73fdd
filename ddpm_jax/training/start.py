"""How a run starts: from its own newest checkpoint, from other weights, or from scratch."""

import dataclasses
from pathlib import Path
from typing import Any

from ddpm_jax.run.checkpoints import Checkpoints
from ddpm_jax.run.init_from import start_from
from ddpm_jax.training.setup import Setup
from ddpm_jax.training.state import TrainState, from_items, to_items


def first_state(parts: Setup, checkpoints: Checkpoints, run: Path) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state that a run trains on from, on the devices, and the notes saved with it.

    Args:
      parts: of the run.
      checkpoints: of the run.
      run: its folder.

    Returns:
      the state, and the notes; {} if no checkpoint was saved yet.

    Raises:
      UserError: as `Checkpoints.restore` and `start_from`.
    """
    layout, key = parts.layout, parts.keys.init
    abstract = layout.abstract_state(parts.init, key)
    restored = checkpoints.restore(to_items(abstract))
    if restored is not None:
        return layout.place_state(from_items(restored.step, restored.items, abstract.step.sharding)), restored.notes
    state = layout.init(parts.init, key)
    if parts.config.train.init_from:
        drawn = layout.saved_state(state)
        params, ema = start_from(
            Path(parts.config.train.init_from), drawn.params, drawn.ema, run=run, config=parts.config
        )
        state = layout.place_state(dataclasses.replace(drawn, params=params, ema=ema))
    return state, {}
