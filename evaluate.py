"""Evaluates a trained run: `python evaluate.py likelihood runs/digits`, `python evaluate.py quality runs/digits`."""

from ddpm_jax.system import interrupts
from ddpm_jax.system.huge_pages import use_huge_pages

if __name__ == "__main__":
    interrupts.end_at_once()
    use_huge_pages()

import dataclasses
import typing
from pathlib import Path

import tyro

from ddpm_jax.generation.sampler_config import SamplerConfig
from ddpm_jax.names import Cdf, DrawReverse, Form, Program, Sigma
from ddpm_jax.run.command import Command, run_command
from ddpm_jax.run.image_options import Images
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.exits import run_script
from ddpm_jax.system.host_options import Hosts
from ddpm_jax.system.progress import report, say

if typing.TYPE_CHECKING:
    from ddpm_jax.evaluation.widths import Scorer
    from ddpm_jax.generation.job import SamplingJob

# What a command needs is imported once its options are parsed: it takes a second, and --help needs none of it.


@dataclasses.dataclass(frozen=True)
class LikelihoodOptions:
    """What to evaluate."""

    run: tyro.conf.Positional[str]
    """Folder of a run, as written by train.py, or of another program's model."""
    split: str = "test"
    """Split of the run's data set: test, train or all; for TFDS, any of its splits."""
    num: int = 0
    """Number of images, evenly spaced over the split; 0: all."""
    batch_size: int = 64
    """Batch size. It does not change the numbers."""
    seed: int = 0
    """Random seed. The noise of an image depends only on the seed, its index and the timestep."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    sigma: Sigma = "model"
    """Variance of the reverse steps: the run's own, fixed_small, fixed_large, or the optimal one, which minimizes the
    bound; it is estimated from 512 training images, which are then left out."""
    cdf: Cdf = "tanh"
    """Normal CDF in the decoder: the original code's tanh approximation, or the exact erf."""
    num_strata: int = 0
    """Evaluate only this many of the T timesteps, sampled per image in log-spaced strata: an unbiased estimate at a
    fraction of the cost, with its standard error (optimal variances are estimated from as many); at least 5 of 1000,
    since the standard error of fewer misleads; 0: all T."""
    out: str | None = None
    """Folder of the job (default: a folder in RUN/likelihood)."""
    exact: bool = False
    """Refuse to resume on other devices, cores, instructions or versions, where numbers agree to rounding only."""
    aot: str = ""
    """Compile the bound for accelerators that need not be there, such as v5e:2x4 or h100:8, report whether a batch
    fits and what a timestep costs, and exit."""
    data: Images = Images()
    hosts: Hosts = Hosts()


def likelihood(options: LikelihoodOptions) -> None:
    """Computes bits/dim of a data set under the EMA weights: the bound, its terms, rate and distortion.

    Run the same command again to resume. Pixels are bins of 1/255 as for any 8-bit image, even if a data set has fewer
    levels (the digits have 17): its numbers compare only with others of the same data set.
    """
    from ddpm_jax.evaluation import bits_per_dim
    from ddpm_jax.generation.output import read_out
    from ddpm_jax.run.process import choose_devices
    from ddpm_jax.run.trained import load_run, with_images

    if options.aot:
        from ddpm_jax.aot.chains import likelihood_program
        from ddpm_jax.aot.report import compile_for

        compile_for(
            options.aot,
            lambda topology: likelihood_program(
                load_run(Path(options.run), step=options.step),
                topology,
                batch_size=options.batch_size,
                num_strata=options.num_strata,
                cdf=options.cdf,
                given_variances=options.sigma != "model",
            ),
        )
        return
    choose_devices(options.hosts)
    folder = read_out(options.out).folder
    trained = with_images(load_run(Path(options.run), step=options.step, ema=options.ema), options.data)
    request = bits_per_dim.Request(
        options.split, options.num, options.sigma, options.cdf, options.num_strata, options.seed
    )
    out = folder or bits_per_dim.default_folder(trained, request)
    found = bits_per_dim.run_job(trained, out, request, batch_size=options.batch_size, exact=options.exact)
    report(bits_per_dim.summary(found))
    report(bits_per_dim.describe_images(trained.config, options.split, found))
    report(f"{out}: likelihood.json, terms.csv, rate_distortion.csv and their plots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityOptions(SamplerConfig):
    """What to evaluate."""

    run: tyro.conf.Positional[str]
    """Folder of a run to sample from, or an .npz file of images (arr_0, uint8, (N, H, W, C))."""
    num: int = 512
    """Number of images."""
    batch_size: int = 64
    """Batch size of sampling. It does not change the images."""
    seed: int = 0
    """Random seed. Image i depends only on the seed and on i."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    config: str | None = None
    """For an .npz file outside a run: the config file that names the real images."""
    aot: str = ""
    """Compile the chain for accelerators that need not be there, such as v5e:2x4 or h100:8, report whether a batch
    fits and what a step costs, and exit."""
    data: Images = Images()


def quality(options: QualityOptions) -> None:
    """Compares samples with a small labeled data set, by a classifier trained on it; writes quality.json."""
    from ddpm_jax.data.sources import load_source
    from ddpm_jax.evaluation.quality import check_real, config_of, judge_file, summary
    from ddpm_jax.generation.job import default_folder, load_job, run_job
    from ddpm_jax.run.process import choose_devices
    from ddpm_jax.run.trained import with_images

    if options.aot:
        _compile_chain(options, number=options.num)
        return
    choose_devices(Hosts(count=1))
    given = Path(options.run)
    if options.num < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {options.num}")
    if given.suffix == ".npz":
        if options.alone() != SamplerConfig() or options.ema is not None:
            raise UserError(f"{given} already contains the images: --ema and sampler options need the folder of a run")
        file, config = given, config_of(given, options.config)
        if options.data.path is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=options.data.path))
    else:
        job = load_job(given, seed=options.seed, step=options.step, ema=options.ema, sampler=options.alone())
        job = job._replace(trained=with_images(job.trained, options.data))
        config = job.trained.config
        check_real(load_source(config.data))  # before anything is drawn
        file = run_job(job, default_folder(job), number=options.num, batch_size=options.batch_size, format="npz")
    report(summary(judge_file(file, config, number=options.num)))
    report(file.with_name("quality.json"))


def _compile_chain(options: "QualityOptions | FidOptions", *, number: int) -> None:
    """Compiles the chain of the images that are to be scored, and prints a report."""
    from ddpm_jax.aot.chains import chain_program
    from ddpm_jax.aot.report import compile_for
    from ddpm_jax.generation.job import load_job

    compile_for(
        options.aot,
        lambda topology: chain_program(
            load_job(Path(options.run), seed=options.seed, step=options.step, sampler=options.alone()),
            topology,
            batch_size=min(options.batch_size, number),
        ),
    )


@dataclasses.dataclass(frozen=True)
class FiguresOptions:
    """What to draw."""

    run: tyro.conf.Positional[str]
    """Folder of a run, as written by train.py, or of another program's model."""
    out: str | None = None
    """Folder of the figures (default: RUN/figures)."""
    overwrite: bool = False
    """Replace figures of other settings in that folder."""
    num: int = 8
    """Images or pairs per figure, 1 to 32; the sample grid has num x num images."""
    steps: int | None = None
    """Number of steps of sampling, DDIM encoding and RePaint (default: all T for sampling, 250 for the others)."""
    seed: int = 0
    """Random seed of the samples and of the choice of real images."""
    batch_size: int = 64
    """Batch size. It does not change the images."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    data: Images = Images()


def figures(options: FiguresOptions) -> None:
    """Draws the paper's figures for a run into one folder, with a description of each in figures.md."""
    from ddpm_jax.evaluation.figures import draw_figures
    from ddpm_jax.generation.job import load_job
    from ddpm_jax.generation.output import read_out
    from ddpm_jax.run.process import choose_devices
    from ddpm_jax.run.trained import with_images

    choose_devices(Hosts(count=1))
    run, folder = Path(options.run), read_out(options.out).folder
    sampler = SamplerConfig(steps=options.steps)
    job = load_job(run, seed=options.seed, step=options.step, ema=options.ema, sampler=sampler)
    job = job._replace(trained=with_images(job.trained, options.data))
    out = folder or run / "figures"
    report(draw_figures(job, out, num=options.num, batch_size=options.batch_size, overwrite=options.overwrite))


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What to show."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of one or more runs, as written by train.py; several are compared."""
    out: str | None = None
    """File to write, .html (default: RUN/report.html, which is replaced; of several runs ./report.html)."""
    overwrite: bool = False
    """Replace the file that --out names, or ./report.html, if it exists."""
    reverse: DrawReverse = "auto"
    """Draw the reverse process from the newest EMA weights: auto (if it takes at most about two minutes), always, or
    never. If it is not drawn, the newest GIF in the run's folder is shown."""
    seed: int = 0
    """Random seed of its images."""


def report_page(options: ReportOptions) -> None:
    """Writes one HTML file about one or more runs: configuration, curves, samples, reverse process, scores, files."""
    from ddpm_jax.evaluation.report.page import write_report
    from ddpm_jax.generation.output import Output, read_out
    from ddpm_jax.run.process import choose_devices

    choose_devices(Hosts(count=1))
    runs = [Path(run) for run in options.runs]
    out = read_out(options.out, files=[".html"], overwrite=options.overwrite)
    in_run = out == Output(None, None) and len(runs) == 1
    file = out.file or (out.folder or (runs[0] if in_run else Path())) / "report.html"
    if runs and file.exists() and not in_run and not options.overwrite:
        raise UserError(f"{file} exists: name another file with --out, or replace it with --overwrite")
    report(write_report(runs, file, seed=options.seed, drawing=options.reverse))


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """What to verify."""

    run: tyro.conf.Positional[str]
    """Folder of the run, as written by train.py."""


def verify(options: VerifyOptions) -> None:
    """Checks every file that a command reads back against its checksum: config, metrics, checkpoints, jobs, scores.

    Prints a line per file and per checkpoint, and exits with status 2 if one is damaged. It changes nothing, and can
    run during training.
    """
    from ddpm_jax.evaluation.verification import verify_run

    found = []
    for verdict in verify_run(Path(options.run)):
        state = "ok" if verdict.damage is None else f"damaged: {verdict.damage}"
        report(f"{verdict.name}: {', '.join(filter(None, (verdict.content, state)))}")
        found.append(verdict)
    damaged = [verdict for verdict in found if verdict.damage is not None]
    if not damaged:
        return
    steps = [verdict.step for verdict in found if verdict.step is not None and verdict.damage is None]
    use = f"step {max(steps)} is the newest intact checkpoint" if steps else "restore the checkpoints from a backup"
    names = ", ".join(verdict.name for verdict in damaged[:5]) + (", .." if len(damaged) > 5 else "")
    raise UserError(f"{options.run}: {len(damaged)} of {len(found)} are damaged ({names}); {use}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaOptions(SamplerConfig):
    """What to reconstruct, and how to score it."""

    run: tyro.conf.Positional[str]
    """Folder of a run that was trained with --ema.snapshots-every."""
    sigma_rel: tuple[float, ...]
    """Widths of the averages, as fractions of the training: 0.05 0.1 0.15, for example."""
    step: int | None = None
    """Number of training steps to average over, of a snapshot (default: the newest)."""
    score: typing.Literal["loss", "bound", "own", "fid", "none"] = "loss"
    """loss (L_simple) or bound (bits/dim) of held-out images; own: FD-own of quality; fid: FID, or the Frechet distance
    in other --features; none: write the weights only."""
    num: int | None = None
    """Number of images (default: for loss and bound the whole split, for own 512, for fid 50000)."""
    split: str = "test"
    """Split of the images of loss and bound."""
    num_strata: int = 20
    """Timesteps per image for loss and bound, as likelihood --num-strata; 0: all T."""
    batch_size: int = 64
    """Batch size. It does not change the scores."""
    seed: int = 0
    """Random seed of noises or images, the same for all averages."""
    features: str = "inception"
    """Features of fid: inception, efficientnet-lite0, or your own file.py:function."""
    weights: str | None = None
    """File of the weights of these features."""
    reference: str | None = None
    """Real images for fid (default: the training images)."""
    data: Images = Images()


def ema(options: EmaOptions) -> None:
    """Reconstructs averages of chosen widths from a run's snapshots, and plots a score against the width.

    Writes them into RUN/averages, where --ema WIDTH of the other commands finds them. The table and the plot of a score
    are beside them.
    """
    run, for_fid = Path(options.run), (options.features, options.weights, options.reference)
    if options.score not in ("own", "fid") and options.alone() != SamplerConfig():
        raise UserError(f"--score {options.score} draws no images: options of the sampler apply to own and fid")
    if options.score != "fid" and for_fid != ("inception", None, None):
        raise UserError("--features, --weights and --reference apply only to --score fid")
    if options.score in ("own", "fid") and options.num is not None and options.num < 2:
        raise UserError(f"--num must be at least 2 to compare with real images, not {options.num}")

    from ddpm_jax.evaluation.widths import save_scores, score_widths, summary
    from ddpm_jax.generation.job import load_job
    from ddpm_jax.run.averages import average_file, choose_step, reconstruct_averages
    from ddpm_jax.run.process import choose_devices
    from ddpm_jax.run.record import is_run, read_run
    from ddpm_jax.run.trained import with_images

    choose_devices(Hosts(count=1))
    if not is_run(run):
        raise UserError(f"{run} is not the folder of a run: give one, such as runs/digits")
    config = read_run(run)
    step = choose_step(run, options.step, config=config)
    averages = reconstruct_averages(run, options.sigma_rel, step=step, config=config, warn=say)
    files = [average_file(run, step, average.sigma_rel) for average in averages]
    for file, average in zip(files, averages, strict=True):
        report(f"{file}: sigma_rel {average.sigma_rel:g}, error of the profile {average.error:.2%}")
    if options.score == "none":
        return
    job = load_job(run, seed=options.seed, ema=str(files[0]), sampler=options.alone())
    job = job._replace(trained=with_images(job.trained, options.data))
    found = score_widths(job.trained, averages, _scorer(options, job))
    report(summary(found))
    report(save_scores(run, step, found, title=f"{config.name}, step {step}"))


def _scorer(options: EmaOptions, job: "SamplingJob") -> "Scorer":
    from ddpm_jax.data.sources import load_source
    from ddpm_jax.evaluation import bits_per_dim, scoring, widths
    from ddpm_jax.evaluation.features import Extractor
    from ddpm_jax.evaluation.quality import check_real

    config, choices = job.trained.config, {"batch_size": options.batch_size, "seed": options.seed}
    match options.score:
        case "own":
            check_real(load_source(config.data))  # before anything is drawn
            return widths.quality_scorer(job.sampler, number=options.num or 512, **choices)
        case "fid":
            features = scoring.load_features(options.features, options.weights)
            reference = scoring.open_reference(
                options.reference, features=features, config=config, evaluated=job.trained.folder
            )
            extractor, number = Extractor(features, batch_size=options.batch_size), options.num or scoring.NUMBER
            return widths.features_scorer(job.sampler, reference, extractor, number=number, **choices)
    num_strata = min(options.num_strata, config.diffusion.num_steps)
    request = bits_per_dim.Request(options.split, options.num or 0, "model", "tanh", num_strata, options.seed)
    first = "l_simple" if options.score == "loss" else "bits_per_dim"
    return widths.likelihood_scorer(request, first=first, batch_size=options.batch_size)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export."""

    run: tyro.conf.Positional[str]
    """Folder of the run, as written by train.py."""
    format: typing.Literal["safetensors", "diffusers", "original"] = "safetensors"
    """safetensors: one file of weights; diffusers: the folder of a DDPMPipeline with a model card, ready to upload;
    original: an .npz file of the original code's TensorFlow variables, for networks that are the paper's."""
    out: str | None = None
    """The file or folder to write (default: RUN/weights_STEP.safetensors, RUN/diffusers_STEP or
    RUN/original_STEP.npz)."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    license: str | None = None
    """License of the weights for the model card of diffusers, such as mit or cc-by-4.0 (default: unknown)."""
    overwrite: bool = False
    """Replace a diffusers model that was exported to the same folder."""


def export(options: ExportOptions) -> None:
    """Exports the EMA weights, for other programs or --train.init-from."""
    import numpy as np

    from ddpm_jax.interop import diffusers, original
    from ddpm_jax.run.pretrained import is_pretrained
    from ddpm_jax.run.trained import load_run
    from ddpm_jax.run.weights import save_weights
    from ddpm_jax.system.files import write_whole

    if options.format != "diffusers" and (options.license or options.overwrite):
        raise UserError(f"--{'license' if options.license else 'overwrite'} applies only to --format diffusers")
    trained = load_run(Path(options.run), step=options.step, ema=options.ema)
    names = {
        "safetensors": f"weights_{trained.weights_name}.safetensors",
        "diffusers": f"diffusers_{trained.weights_name}",
        "original": f"original_{trained.weights_name}.npz",
    }
    out = trained.folder / names[options.format] if options.out is None else Path(options.out)
    if options.format == "safetensors":
        save_weights(out, trained.params, config=trained.config, step=trained.step)
    elif options.format == "original":
        variables = original.write_original(trained.params, trained.config, step=trained.step)
        write_whole(out, lambda file: np.savez(file, **variables))  # type: ignore[arg-type]
    else:
        diffusers.write_folder(
            out,
            trained.params,
            config=trained.config,
            step=trained.step,
            class_names=trained.class_names,
            license=options.license or "unknown",
            trained_here=not is_pretrained(trained.folder),
            overwrite=options.overwrite,
        )
    report(out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidOptions(SamplerConfig):
    """What to score."""

    run: tyro.conf.Positional[str]
    """Folder of a run to sample from, a folder of images, an .npz file of images (arr_0, uint8, (N, H, W, C)), or the
    name of a config, whose training images are meant."""
    reference: str | None = None
    """The real images: the name of a config such as cifar10, a folder of images, or an .npz or .pkl file of images or
    statistics (default: the training images of the run)."""
    features: str = "inception"
    """inception (FID), efficientnet-lite0, or your own file.py:function, which maps uint8 images to (B, D) features."""
    weights: str | None = None
    """File of the network's weights (default: where they are looked for, see docs/evaluation.md)."""
    num: int | None = None
    """Number of images (default: 50000 of a run, otherwise all)."""
    reference_num: int = 0
    """Number of reference images, evenly spaced; 0: all, as papers do."""
    batch_size: int = 64
    """Batch size of sampling and of features. It does not change the images."""
    seed: int = 0
    """Random seed. Image i depends only on the seed and on i."""
    step: int | None = None
    """Training step of the checkpoint (default: the newest)."""
    ema: str | None = None
    """Width (sigma_rel) or file of an average that evaluate.py ema has reconstructed (default: the EMA weights of the
    checkpoint)."""
    save_statistics: str | None = None
    """File to which the statistics of the images are written, to be another evaluation's --reference."""
    statistics_form: Form = "pytorch-fid"
    """Whose evaluator reads that file: pytorch-fid (or EDM), adm, clean-fid (all .npz), or edm2 (.pkl)."""
    out: str | None = None
    """Folder of the scores (default: one for these settings in RUN/fid, or beside the images)."""
    aot: str = ""
    """Compile the chain for accelerators that need not be there, such as v5e:2x4 or h100:8, report whether a batch
    fits and what a step costs, and exit."""
    data: Images = Images()
    hosts: Hosts = Hosts()


def fid(options: FidOptions) -> None:
    """Computes FID, sFID, Inception Score, KID, precision and recall; writes scores.json.

    Run the same command again to resume.
    """
    import numpy as np

    from ddpm_jax.evaluation import scoring
    from ddpm_jax.evaluation.features import Extractor
    from ddpm_jax.evaluation.image_sets import open_npz
    from ddpm_jax.evaluation.statistics import check_form
    from ddpm_jax.generation.job import default_folder, load_job, run_job
    from ddpm_jax.generation.output import read_out
    from ddpm_jax.generation.store import per_host
    from ddpm_jax.run.build import image_shape
    from ddpm_jax.run.pretrained import is_pretrained
    from ddpm_jax.run.process import choose_devices
    from ddpm_jax.run.record import is_run
    from ddpm_jax.run.trained import with_images

    if options.aot:
        _compile_chain(options, number=options.num or scoring.NUMBER)
        return
    choose_devices(options.hosts)
    out, given = read_out(options.out).folder, Path(options.run).expanduser()
    if options.num is not None and options.num < 2:
        raise UserError(f"--num must be at least 2, not {options.num}")
    if options.reference_num < 0 or options.reference_num == 1:
        raise UserError(f"--reference-num must be at least 2, or 0 for all, not {options.reference_num}")
    if options.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, not {options.batch_size}")
    features = scoring.load_features(options.features, options.weights)
    job, config = None, scoring.run_around(given)
    if is_run(given) or is_pretrained(given):
        job = load_job(given, seed=options.seed, step=options.step, ema=options.ema, sampler=options.alone())
        if options.reference is None:
            job = job._replace(trained=with_images(job.trained, options.data))
        has_images = is_run(given) or options.data != Images()
        config = job.trained.config if has_images else None
    elif options.alone() != SamplerConfig() or {options.step, options.ema} != {None} or options.seed:
        raise UserError(
            f"{options.run} is not a run: --seed, --step, --ema and options of the sampler do not apply to its images"
        )
    else:
        images = scoring.open_images(options.run, path=options.data.path)
    reference = None
    if options.reference is not None or options.save_statistics is None:
        reference = scoring.open_reference(
            options.reference,
            features=features,
            config=config,
            evaluated=given,
            number=options.reference_num,
            path=options.data.path,
        )
    extractor = Extractor(features, batch_size=per_host(options.batch_size))
    statistics = (Path(options.save_statistics), options.statistics_form) if options.save_statistics else None
    if statistics is not None:  # before anything is drawn
        shape = images.shape if job is None else image_shape(job.trained.config)
        has_spatial = "spatial" in extractor(np.zeros((1, *shape), np.uint8))
        check_form(*statistics, has_spatial=has_spatial, features=features.name)
    if job is not None:
        number = options.num or scoring.NUMBER
        if reference is not None:
            scoring.check_comparable(image_shape(job.trained.config), reference, extractor)
        file = run_job(job, default_folder(job), number=number, batch_size=options.batch_size, format="npz")
        images = open_npz(file)._replace(name=f"{options.run}, {job.trained.title}")
    elif options.num is not None and options.num > images.number:
        raise UserError(f"{options.run} contains {images.number} images: use --num {images.number} or less")
    images = images.first(options.num or (scoring.NUMBER if job else images.number))
    if job is not None:
        images = images.by_content()  # the file changes as the job is extended
    name = reference.name if reference else "statistics"
    out = out or scoring.folder_of_scores(job, options.run, name, images.number, features)
    result = scoring.score(
        images,
        reference,
        extractor,
        out,
        drawn=scoring.describe_drawn(job) if job else None,
        statistics=statistics,
    )
    if result is not None:
        report(scoring.summary(result))
        report(out / "scores.json")


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What to import."""

    file: tyro.conf.Positional[str]
    """A checkpoint of improved-diffusion, guided-diffusion or pesser's pytorch_diffusion (.pt, .ckpt, .pth or
    .safetensors), or the variables of the original code's checkpoint (.npz)."""
    flags: str | None = None
    """In quotes, the flags that it was trained with, in that program's own words: MODEL_FLAGS and DIFFUSION_FLAGS. What
    the weights show may be left out; the flags of OpenAI's published files are known by their names; those given
    here are added to them."""
    program: Program | None = None
    """Which of OpenAI's programs wrote it, if it is none of their published files: their defaults differ."""
    out: str | None = None
    """Folder to write (default: runs/NAME, after the file)."""
    overwrite: bool = False
    """Replace a network that was imported to the same folder."""


def import_checkpoint(options: ImportOptions) -> None:
    """Imports another program's checkpoint into a folder that sample.py and the other commands take like a run's."""
    from ddpm_jax.interop.checkpoints import read_checkpoint
    from ddpm_jax.run.imported import imported_summary, save_imported

    file = Path(options.file)
    found = read_checkpoint(file, flags=options.flags, program=options.program)
    out = Path("runs", found.config.name) if options.out is None else Path(options.out)
    save_imported(out, found, file=file, flags=options.flags, overwrite=options.overwrite)
    report(imported_summary(found))
    report(out)


COMMANDS: dict[str, Command] = {
    "likelihood": likelihood,
    "quality": quality,
    "fid": fid,
    "figures": figures,
    "report": report_page,
    "ema": ema,
    "verify": verify,
    "export": export,
    "import": import_checkpoint,
}


def prepare_to_evaluate() -> None:
    with interrupts.ending_at_once():
        from ddpm_jax.run.process import prepare
    prepare("sampling")


def main() -> None:
    """Runs the command that the first word names."""
    run_command(COMMANDS, before=prepare_to_evaluate)


if __name__ == "__main__":
    run_script(main)
