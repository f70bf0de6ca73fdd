"""Checkpoints of other programs, one file each, told apart by the names of their arrays."""

import re
import typing
from collections.abc import Callable
from pathlib import Path

from ddpm_jax.interop import openai, original
from ddpm_jax.interop.files import Arrays, read_arrays, read_npz
from ddpm_jax.interop.flags import parse_flags
from ddpm_jax.interop.pretrained import Pretrained
from ddpm_jax.names import Program
from ddpm_jax.system.errors import UserError, printable


class Released(typing.NamedTuple):
    """Published weights: what their README says of them, in the flags of the program."""

    program: Program
    flags: str
    step: int = 0


_COSINE = "--learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_CIFAR10 = f"--image_size 32 --num_channels 128 --num_res_blocks 3 --dropout 0.3 {_COSINE}"
_IMAGENET = f"--image_size 64 --num_channels 128 --num_res_blocks 3 {_COSINE}"
_VLB = "--use_kl True --schedule_sampler loss-second-moment"
_NOT_RESCALED = "--rescale_learned_sigmas False --rescale_timesteps False"
_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
    f"{_NOT_RESCALED}"
)
_GUIDED = (
    "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --resblock_updown True "
    "--use_scale_shift_norm True"
)
_GUIDED_LINEAR = f"{_GUIDED} --noise_schedule linear --num_channels 256 --num_res_blocks 2"
_GUIDED_256 = f"{_GUIDED_LINEAR} --image_size 256 --num_head_channels 64"

RELEASED: dict[str, Released] = {
    "cifar10_uncond_50M_500K.pt": Released("improved-diffusion", _CIFAR10, 500_000),
    "cifar10_uncond_vlb_50M_500K.pt": Released("improved-diffusion", f"{_CIFAR10} {_VLB}", 500_000),
    "imagenet64_uncond_100M_1500K.pt": Released("improved-diffusion", _IMAGENET, 1_500_000),
    "imagenet64_uncond_vlb_100M_1500K.pt": Released("improved-diffusion", f"{_IMAGENET} {_VLB}", 1_500_000),
    "imagenet64_cond_270M_250K.pt": Released(
        "improved-diffusion",
        f"--image_size 64 --num_channels 192 --num_res_blocks 3 --class_cond True {_COSINE} {_NOT_RESCALED}",
        250_000,
    ),
    "lsun_uncond_100M_1200K_bs128.pt": Released("improved-diffusion", _LSUN, 1_200_000),
    "lsun_uncond_100M_2400K_bs64.pt": Released("improved-diffusion", _LSUN, 2_400_000),
    "64x64_diffusion.pt": Released(
        "guided-diffusion",
        f"{_GUIDED} --image_size 64 --class_cond True --dropout 0.1 --noise_schedule cosine --num_channels 192 "
        "--num_head_channels 64 --num_res_blocks 3 --use_new_attention_order True",
    ),
    "128x128_diffusion.pt": Released(
        "guided-diffusion", f"{_GUIDED_LINEAR} --image_size 128 --class_cond True --num_heads 4"
    ),
    "256x256_diffusion.pt": Released("guided-diffusion", f"{_GUIDED_256} --class_cond True"),
    "256x256_diffusion_uncond.pt": Released("guided-diffusion", f"{_GUIDED_256} --class_cond False"),
    "512x512_diffusion.pt": Released(
        "guided-diffusion", f"{_GUIDED_LINEAR} --image_size 512 --num_head_channels 64 --class_cond True"
    ),
    **{
        f"lsun_{name}.pt": Released("guided-diffusion", f"{_GUIDED_256} --class_cond False --dropout {dropout}")
        for name, dropout in (("bedroom", 0.1), ("cat", 0.1), ("horse", 0.1), ("horse_nodropout", 0.0))
    },
}
"""Published files by name, with the flags of improved-diffusion's and guided-diffusion's READMEs."""


def read_checkpoint(file: Path, *, flags: str | None = None, program: Program | None = None) -> Pretrained:
    """Reads a checkpoint of the original code, pesser's conversion of it, improved-diffusion or guided-diffusion.

    The shapes of the weights show most of the configuration. What they do not show are the flags of the program that
    wrote them; those of the published files are known by the files' names.

    Args:
      file: an .npz file of the original's TensorFlow variables; a `state_dict` as PyTorch or safetensors save it.
      flags: as on the command line of the program; those of a published file come first, so that these win. If not
        given, the file must be a published one or the paper's network, whose defaults are the paper's.
      program: which program wrote it; required for improved-diffusion and guided-diffusion, unless the file is a
        published one.

    Returns:
      the network, named after the file.

    Raises:
      UserError: the file cannot be read, is of none of these programs, or its flags are missing or contradict it.
    """
    shown = printable(file)
    arrays, metadata = (read_npz(file), {}) if file.suffix == ".npz" else read_arrays(file)
    # Networks that were trained on several GPUs.
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    paper = _read_paper(arrays, shown)
    released = RELEASED.get(file.name) if paper is None else None
    whose = program or (released.program if released else None)
    if released is not None and whose != released.program:
        released = None
    if paper is not None and program is not None:
        raise UserError(f"{shown} is not of {program}: its arrays have the names of the original code's")
    if paper is None and (whose is None or (released is None and flags is None)):
        raise UserError(
            f"{shown} is not one of the published files by its name, and its weights do not show everything: add "
            "--program improved-diffusion or guided-diffusion, and --flags with the MODEL_FLAGS and DIFFUSION_FLAGS "
            'that it was trained with (--flags "" if all are defaults)'
        )
    text = f"{released.flags if released else ''} {flags or ''}"
    name = re.sub(r"[^\w.-]+", "-", _name(file)).strip(".-") or "imported"
    try:
        if paper is not None:
            network = paper(arrays, parse_flags(text, original.FLAGS, original.IGNORED), name=name)
        else:
            guided = whose == "guided-diffusion"
            parsed = parse_flags(text, openai.GUIDED if guided else openai.IMPROVED, openai.IGNORED)
            network = openai.read_openai(arrays, parsed, name=name, guided=guided)
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None
    except (LookupError, TypeError, ValueError, OverflowError) as error:  # arrays of shapes that no network has
        raise UserError(f"{shown}: its arrays are not those of such a network ({str(error):.100})") from error
    step, averaged = _from_name(file)
    averaged = True if metadata.get("entry") == "ema" else averaged
    return network._replace(
        step=network.step or (released.step if released else 0) or step,
        averaged=averaged if network.averaged is None else network.averaged,
    )


def _read_paper(arrays: Arrays, shown: str) -> Callable[..., Pretrained] | None:
    """Returns the reader of checkpoints of the paper's network; None for those of OpenAI's."""
    if openai.is_openai(arrays):
        return None
    if original.is_pesser(arrays):
        return original.read_pesser
    if original.is_original(arrays):
        return original.read_original
    first = printable(next(iter(arrays), "none"))[:80]
    raise UserError(
        f"{shown} is not a checkpoint of the original code (as .npz), pesser's, improved-diffusion or "
        f"guided-diffusion: its arrays have names such as {first}"
    )


def _name(file: Path) -> str:
    """Returns the name of a file, or for one that is named after its step, that of its folder."""
    numbered = re.fullmatch(r"(model|ema|ckpt|checkpoint)?[-_.\d]*", file.stem)
    return file.resolve().parent.name if numbered else file.stem


def _from_name(file: Path) -> tuple[int, bool | None]:
    """Returns the step in the name that a program gave a file, and whether it says that these are averages.

    >>> _from_name(Path("logs/ema_0.9999_200000.pt")), _from_name(Path("ema_diffusion_cifar10_model/model-790000.ckpt"))
    ((200000, True), (790000, True))
    """
    if found := re.fullmatch(r"ema_[\d.]+_(\d{1,9})", file.stem):
        return int(found[1]), True
    if found := re.fullmatch(r"model(\d{6,9})", file.stem):
        return int(found[1]), False
    if found := re.fullmatch(r"model-(\d{1,9})", file.stem):  # pesser's, in a folder that has the rest of its name
        folder = re.match("(ema_)?diffusion_", file.resolve().parent.name)
        return int(found[1]), bool(folder[1]) if folder else None
    return 0, None
