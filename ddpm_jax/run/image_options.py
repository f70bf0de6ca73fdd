"""Options of commands that read a run's images. Parsed before JAX is imported."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Images:
    """Where the images of a run are."""

    path: str | None = None
    """Where the run's images are, if they have moved since it was trained; or the images to use with another program's
    model: a folder, unless --data.config says otherwise."""
    config: str | None = None
    """For a model of another program: the config file, or the run, whose data section describes the images."""
