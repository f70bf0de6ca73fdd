"""A folder of pictures, with the classes that its sub-folders name."""

import dataclasses
import os
import pathlib
import typing
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decode import Unreadable, channels_of, decode, look_over, to_array
from ddpm_jax.data.source import Source, fits_memory, in_memory, in_threads, no_split, shape_of
from ddpm_jax.system.errors import NoSuchSplit, UserError
from ddpm_jax.system.progress import say

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class _Files:
    paths: list[pathlib.Path]
    labels: np.ndarray | None
    class_names: tuple[str, ...]


def _list_folder(config: DataConfig) -> _Files:
    """Lists the pictures of a folder's split in the order of their paths, with the classes that sub-folders name."""
    if not config.path:
        raise UserError("data.path: name the folder of images, as in --data.path=/home/me/flowers")
    folder = pathlib.Path(config.path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"data.path: {config.path} {what}; name the folder that holds the images")
    if config.split not in ("train", "test", "all"):
        raise no_split(config, ("train", "test", "all"))
    parts = {name: folder / name for name in ("train", "test") if (folder / name).is_dir()}
    if config.split == "test" and not parts.get("test"):
        raise NoSuchSplit(
            f"data.split: {config.path} has no test part: that would be a sub-folder 'test' beside one 'train'"
        )
    if config.split == "train" and list(parts) == ["test"]:
        raise UserError(
            f"data.split: {config.path} has a sub-folder 'test' but none 'train': move the other images into one"
        )
    listed = {name: _walk(part) for name, part in (parts or {"all": folder}).items()}
    chosen = [name for name in listed if name == config.split or config.split == "all" or not parts]
    roots = [parts.get(name, folder) for name in chosen for _ in listed[name]]
    files = [path for name in chosen for path in listed[name]]
    if not files:
        where = roots[0] if roots else parts.get(config.split, folder)
        raise UserError(f"data.path: no PNG, JPEG or WebP file in {where} or in the folders below it")
    everything = [path for paths in listed.values() for path in paths]
    paths = [root / path for root, path in zip(roots, files, strict=True)]
    if any(len(path.parts) == 1 for path in everything):
        return _Files(paths, None, ())
    number = {name: i for i, name in enumerate(sorted({path.parts[0] for path in everything}))}
    return _Files(paths, np.array([number[path.parts[0]] for path in files], np.int32), tuple(number))


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the pictures below a folder, by relative path, sorted; follows links, passes by what is hidden."""
    found, entered = [], set()
    for where, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(where)
        if here in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            pathlib.Path(where, name).relative_to(folder)
            for name in files
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.as_posix())


def probe(config: DataConfig) -> int:
    """Finds the number of channels in the heads of the files, which must agree."""

    def header(path: pathlib.Path) -> int | None:
        try:
            with Image.open(path) as image:
                return channels_of(image)
        except Exception:
            return None  # named when the files are loaded

    paths = _list_folder(config).paths
    seen: dict[int, pathlib.Path] = {}
    for path, channels in zip(paths, in_threads(header, paths, label="looking at the files"), strict=True):
        if channels is not None:
            seen.setdefault(channels, path)
    if not seen:
        raise UserError(f"data.path: none of the {len(paths)} files in {config.path} can be read as an image")
    if len(seen) > 1:
        kinds = ", ".join(f"{path} has {channels}" for channels, path in sorted(seen.items()))
        raise UserError(f"data.channels: the images do not agree ({kinds}); set it to 1, 3 or 4 to convert them")
    return next(iter(seen))


def load(config: DataConfig) -> Source:
    """Lists a folder, and checks that every file can be read; a set that fits the memory is decoded into it.

    Args:
      config: which images; its `channels` is known.

    Returns:
      the source.

    Raises:
      UserError: the folder is no set of images, or has unreadable files that are not to be skipped.
    """
    files, shape = _list_folder(config), shape_of(config)
    if shape[2] not in (1, 3, 4):
        raise UserError(f"data.channels: must be 1, 3 or 4 for a folder of images, not {shape[2]}")
    fits = fits_memory(config, len(files.paths))
    images = np.empty((len(files.paths), *shape), np.uint8) if fits else None

    def look(path: pathlib.Path) -> np.ndarray | int | str:
        try:
            return look_over(path) if images is None else to_array(decode(path), shape)
        except Unreadable as error:
            return str(error)

    readable: list[int] = []
    checksums: list[int] = []
    unreadable: dict[str, str] = {}
    results = in_threads(look, files.paths, label="reading images" if fits else "checking images")
    for i, result in enumerate(results):
        if isinstance(result, str):
            unreadable[str(files.paths[i])] = result
            continue
        if images is None:
            checksums.append(typing.cast(int, result))
        else:
            images[len(readable)] = result
        readable.append(i)
    if unreadable:
        _report_unreadable(config, unreadable, len(files.paths))
    labels = None if files.labels is None else files.labels[readable]
    name = f"folder {config.path}, {config.split}"
    if images is not None:
        return in_memory(images[: len(readable)], labels, files.class_names, name=name, unreadable=unreadable)
    paths = [files.paths[i] for i in readable]

    def read_one(path: pathlib.Path) -> np.ndarray:
        try:
            return to_array(decode(path), shape)
        except Unreadable as error:
            raise UserError(f"data.path: {path} can no longer be read ({error}); it could when the run began") from None

    def read_images(indices: np.ndarray) -> np.ndarray:
        return np.stack(list(in_threads(read_one, [paths[i] for i in indices])))

    return Source(
        len(paths),
        shape,
        read_images,
        read_labels=None if labels is None else lambda indices: labels[indices],
        class_names=files.class_names,
        name=name,
        unreadable=unreadable,
        files_crc32=zlib.crc32(np.array(checksums, "<u4").tobytes()),
    )


class UnreadableFiles(UserError):
    """Files that are no readable image, with what is wrong with each."""

    def __init__(self, message: str, files: Mapping[str, str]):
        super().__init__(message)
        self.files = files


def _report_unreadable(config: DataConfig, unreadable: Mapping[str, str], num_files: int) -> None:
    named = [f"{path} ({reason})" for path, reason in list(unreadable.items())[:_NAMES_SHOWN]]
    if len(unreadable) > _NAMES_SHOWN:
        named.append(f"and {len(unreadable) - _NAMES_SHOWN} more")
    count = f"{len(unreadable)} of {num_files} files in {config.path} cannot be read as images: {', '.join(named)}"
    if len(unreadable) == num_files:
        raise UnreadableFiles(f"data.path: {count}", unreadable)
    if config.on_unreadable == "refuse":
        raise UnreadableFiles(f"data.path: {count}; mend or remove them, or set data.on_unreadable=skip", unreadable)
    say(f"skipped: {count}")
