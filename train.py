"""Trains a run: python train.py [CONFIG] [--workdir DIR] [--section.field VALUE ..].

Run the same command again to resume, or: python train.py RUN [--train.steps N ..], with the folder of the run.
"""

from ddpm_jax.system import interrupts
from ddpm_jax.system.huge_pages import use_huge_pages

if __name__ == "__main__":
    interrupts.end_at_once()
    use_huge_pages()

import dataclasses
from pathlib import Path

from ddpm_jax.run.command import parse_run
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.exits import exit_at_once, run_script
from ddpm_jax.system.host_options import Hosts
from ddpm_jax.system.progress import report, say

# What training needs is imported once the options are parsed: it takes a second, and --help needs none of it.


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the script."""

    workdir: str = ""
    """The run's folder; empty: runs/NAME."""
    summary: bool = False
    """Print the network's blocks, shapes, parameters and FLOPs, and exit."""
    aot: str = ""
    """Compile the training step for accelerators that need not be there, such as v5e:2x4 or h100:8, report whether it
    fits, what it costs and what it sends, and exit."""
    debug_nans: bool = False
    """Resume from the newest checkpoint until a step is not finite, print the first layer that is not, and exit."""
    check_data: bool = False
    """Read every image, print a summary, draw 64 of them to data.png in the run's folder, and exit."""
    exact: bool = False
    """Refuse to resume on other devices, cores, instructions or versions, where numbers agree to rounding only."""
    hosts: Hosts = Hosts()


def main() -> None:
    options, config, folder = parse_run(Options, description=__doc__)
    asked = {"summary": options.summary, "aot": options.aot, "debug-nans": options.debug_nans}
    instead = [f"--{name}" for name, given in {**asked, "check-data": options.check_data}.items() if given]
    if len(instead) > 1:
        raise UserError(f"{' and '.join(instead)}: each prints something and exits; give one of them")
    with interrupts.ending_at_once():
        from ddpm_jax.data.check import check_data
        from ddpm_jax.data.sources import resolve
        from ddpm_jax.evaluation.during_training import scoring_during_training
        from ddpm_jax.run.build import build_network, image_shape
        from ddpm_jax.run.process import choose_devices, prepare
        from ddpm_jax.run.validation import validate, warnings_of
        from ddpm_jax.training.diagnosis import find_not_finite
        from ddpm_jax.training.loop import train
        from ddpm_jax.training.summary import summary
    prepare("training")
    validate(config)
    config = dataclasses.replace(config, data=resolve(config.data))
    if options.summary:
        print(summary(build_network(config), image_shape(config)))
        return
    if options.aot:
        from ddpm_jax.aot.report import compile_for
        from ddpm_jax.aot.training import training_program

        compile_for(options.aot, lambda topology: training_program(config, topology))
        return
    if folder is not None and Path(options.workdir or folder).resolve() != folder.resolve():
        raise UserError(
            f"{folder} is resumed in its own folder, not in --workdir {options.workdir}: leave --workdir out, or give "
            "a config file to start another run"
        )
    run = folder or Path(options.workdir or Path("runs") / config.name)
    if options.check_data:
        for line in check_data(config, run / "data.png"):
            report(line)
        return
    choose_devices(options.hosts, config)
    for warning in warnings_of(config):
        say(f"warning: {warning}")
    if options.debug_nans:
        print(find_not_finite(config, run))
        return
    score = scoring_during_training(config, run) if config.eval.fid_every else None
    train(config, run, exact=options.exact, score=score)
    say(f"now: python sample.py {run}")


if __name__ == "__main__":
    run_script(main, give_up=exit_at_once)
