"""A folder of pictures, with the splits and classes that its subfolders name.

The rule, for names in any case:

- A subfolder `train` or `training` is the training split; then `test` or `testing` is the test split, and `val`,
  `valid`, `validation` or `dev` is the validation split, which is the test split where there is no other. Without a
  `train`, everything is for training.
- The subfolders of the training split are the classes, if every image is in one. Another split has the labels of these
  classes if each of its images is in a folder of such a name, and else none.
- Hidden files and folders, and those of file systems and viewers of pictures, are passed over.
"""

import collections
import dataclasses
import os
import pathlib
import re
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from ddpm_jax.config import DataConfig
from ddpm_jax.data.decode import Facts, Unreadable, header, is_picture, look_over, read_picture
from ddpm_jax.data.source import Source, fits_memory, in_memory, in_threads, no_split, shape_of
from ddpm_jax.system.errors import NoSuchSplit, UserError, few, printable
from ddpm_jax.system.progress import say

_ENDINGS = frozenset(
    (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".webp", ".tif")
    + (".tiff", ".gif", ".bmp", ".dib", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".ppm", ".pgm")
    + (".pbm", ".pnm", ".qoi", ".tga", ".pcx")
)
_SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev"),
}
_NEVER_A_CLASS = ("test", "testing", "val", "validation")
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found")
    + ("__macosx", "__pycache__")
)
_SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_NAMES_SHOWN = 3
_DEEPEST = 100  # folders in folders: they are entered by recursion


class _Walk:
    """The pictures below a folder, by relative path, sorted; and what else is there, counted by the reason."""

    def __init__(self, folder: pathlib.Path):
        self.images: list[pathlib.Path] = []
        self.passed: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._folder, self._entered = folder, set[str]()
        seen = [path.relative_to(folder) for path in self._enter(folder)]
        self.images.sort(key=lambda path: path.as_posix())
        used = {parent for path in self.images for parent in path.parents}
        for where in seen:
            if self.images and where not in used and where.parent in used:
                self.passed["folders without an image"][str(where)] += 1

    def _enter(self, where: pathlib.Path) -> Iterator[pathlib.Path]:
        """Looks into a folder and those below it, a link to one included; yields them."""
        name = str(where.relative_to(self._folder))
        here = os.path.realpath(where)
        if here in self._entered:
            self.passed["links to folders listed before"][name] += 1
            return
        self._entered.add(here)
        if len(pathlib.PurePath(name).parts) > _DEEPEST:
            raise UserError(f"data.path: folders below {printable(self._folder)} are nested more than {_DEEPEST} deep")
        yield where
        try:
            entries = sorted(os.scandir(where), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"data.path: the folder {printable(where)} cannot be listed ({str(error.strerror).lower()}): make it"
                " readable, or move it out of the set"
            ) from error
        for entry in entries:
            if _is_folder(entry):
                if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FOLDERS:
                    self.passed["in hidden or system folders"][entry.name] += _count_files(entry.path)
                else:
                    yield from self._enter(pathlib.Path(entry.path))
            elif entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FILES:
                self.passed["hidden or system files"][entry.name] += 1
            elif not _is_file(entry):
                self.passed["broken links or special files"][entry.name] += 1
            else:
                ending = _ending(entry.name)
                if ending in _ENDINGS or (not ending and is_picture(pathlib.Path(entry.path))):
                    self.images.append(pathlib.Path(entry.path).relative_to(self._folder))
                else:
                    self.passed["without an image ending"][ending or "none"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _ending(name: str) -> str:
    """Returns the ending in lower case; what follows the last dot of `m.0107 2` or `photo v1.2` is none."""
    suffix = pathlib.PurePath(name).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", suffix) else ""


def _count_files(folder: str | pathlib.Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


@dataclasses.dataclass(frozen=True)
class _Files:
    paths: list[pathlib.Path]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    label_fault: str
    passed: Mapping[str, Mapping[str, int]]
    """How many files, by the reason why they are not used and what they have in common."""


def _list_folder(config: DataConfig) -> _Files:
    """Lists the pictures of a folder's split in the order of their paths, with the classes that subfolders name."""
    folder = _folder(config)
    splits = _splits(config, folder)
    if config.split == "test" and "test" not in splits:
        raise NoSuchSplit(
            f"data.split: {printable(config.path)} has no test split: that would be a subfolder 'test' or 'val'"
            " beside one 'train'"
        )
    walks = {name: _Walk(where) for name, where in splits.items()} if splits else {"all": _Walk(folder)}
    chosen = [name for name in walks if name == config.split or config.split == "all" or not splits]
    files = [(splits.get(name, folder), path) for name in chosen for path in walks[name].images]
    passed = _passed(folder, splits, walks, chosen)
    if not files:
        where = printable(splits.get(config.split, folder))
        others = "; ".join(_counted(passed))
        raise UserError(f"data.path: no image file in {where} or the folders below it{others and f' ({others})'}")
    classes, fault = _classes(walks.get("train", walks[chosen[0]]).images, folder)
    stranger = next((path for _, path in files if not fault and classes and path.parts[0] not in classes), None)
    if stranger is not None:
        fault = f"{printable(stranger)} is in none of the class folders of the training split: {few(classes, 5)}"
    labeled = bool(classes) and not fault
    number = {name: i for i, name in enumerate(classes)}
    return _Files(
        [root / path for root, path in files],
        np.array([number[path.parts[0]] for _, path in files], np.int32) if labeled else None,
        tuple(map(printable, classes)) if labeled else (),
        fault,
        passed,
    )


def _folder(config: DataConfig) -> pathlib.Path:
    if not config.path:
        raise UserError("data.path: name the folder of images, as in --data.path=/home/me/flowers")
    folder = pathlib.Path(config.path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        hint = {".npz": "; it is read with --data.source npz", ".npy": "; it is read with --data.source npy"}
        archive = "; unpack it first" if folder.suffix in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar") else ""
        raise UserError(
            f"data.path: {printable(config.path)} {what}; name the folder that holds the images"
            + (hint.get(folder.suffix, archive) if folder.exists() else "")
        )
    if config.split not in ("train", "test", "all"):
        raise no_split(config, ("train", "test", "all"))
    return folder


def _splits(config: DataConfig, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Finds the folders of the splits, in the order train, test, validation; none where everything is for training."""
    found = _named_as_splits(folder)
    if "train" not in found:
        held_out = [where for where in found.values() if where.name.lower() in _NEVER_A_CLASS]
        if held_out and config.split != "test":
            raise UserError(
                f"data.split: {printable(config.path)} has a subfolder {printable(held_out[0].name)!r} but none"
                " 'train': move the other images into one, or name the folder to train on as data.path"
            )
        inside = _only_folder(folder)
        if inside is not None and "train" in _named_as_splits(inside):
            raise UserError(
                f"data.path: {printable(config.path)} holds one folder, whose subfolders are splits: use"
                f" --data.path {printable(inside)}"
            )
        found = {name: where for name, where in found.items() if where in held_out}
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    return found


def _named_as_splits(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    found: dict[str, pathlib.Path] = {}
    names = {name: split for split, names in _SPLITS.items() for name in names}
    for where in sorted(folder.iterdir()):
        split = names.get(where.name.lower())
        if split is None or not where.is_dir():
            continue
        if split in found:
            raise UserError(
                f"data.split: {printable(found[split])} and {printable(where.name)} both name the {split} split: move"
                " one of them out of the folder, or into the other"
            )
        found[split] = where
    return {split: found[split] for split in _SPLITS if split in found}


def _only_folder(folder: pathlib.Path) -> pathlib.Path | None:
    seen = [where for where in folder.iterdir() if not where.name.startswith(".")]
    seen = [where for where in seen if where.name.lower() not in _SYSTEM_FOLDERS]
    return seen[0] if len(seen) == 1 and seen[0].is_dir() else None


def _classes(images: Iterable[pathlib.Path], folder: pathlib.Path) -> tuple[list[str], str]:
    """Returns the classes of the training split, or why its folders are none."""
    images = list(images)
    loose = [path for path in images if len(path.parts) == 1]
    names = {path.parts[0] for path in images if len(path.parts) > 1}
    # 2 before 10: the label of a class that is a number may then be that number.
    names_in_order = sorted(names, key=int if all(name.isdecimal() for name in names) else None)
    if loose and names:
        more = f" and {len(loose) - 1} more files are" if len(loose) > 1 else " is"
        return [], (
            f"{printable(loose[0])}{more} beside the class folders {few(names_in_order, 5)} in {printable(folder)}:"
            " move it into one of them, or out"
        )
    return names_in_order, ""


def _passed(
    folder: pathlib.Path, splits: Mapping[str, pathlib.Path], walks: Mapping[str, _Walk], chosen: list[str]
) -> dict[str, collections.Counter[str]]:
    """Counts the files below a folder that are not used, by the reason."""
    passed: dict[str, collections.Counter[str]] = {}
    for name, walk in walks.items():
        if name not in chosen:
            passed[f"of the {name} split"] = collections.Counter({splits[name].name: len(walk.images)})
        for reason, counts in walk.passed.items():
            passed.setdefault(reason, collections.Counter()).update(counts)
    if splits:
        for where in sorted(folder.iterdir()):
            if where not in splits.values():
                number = _count_files(where) if where.is_dir() else 1
                passed.setdefault("beside the splits", collections.Counter())[where.name] += number
    return passed


_NO_FILES = ("folders without an image", "links to folders listed before")  # counted, but no files


def _counted(passed: Mapping[str, Mapping[str, int]]) -> list[str]:
    counted = []
    for reason, counts in passed.items():
        if sum(counts.values()):
            names = [name if number == 1 else f"{name} {number}" for name, number in counts.items()]
            counted.append(f"{sum(counts.values())} {reason} ({few(names, 5)})")
    return counted


def _note_of_files(config: DataConfig, files: _Files, unreadable: int) -> list[str]:
    """Returns the line that counts the files, used and not; none where all are used."""
    used = len(files.paths) - unreadable
    total = len(files.paths) + sum(
        sum(counts.values()) for reason, counts in files.passed.items() if reason not in _NO_FILES
    )
    reasons = ([f"{unreadable} unreadable"] if unreadable else []) + _counted(files.passed)
    if not reasons:
        return []
    return [f"{total} files in {printable(config.path)}: {used} used; passed over: {'; '.join(reasons)}"]


def _notes_of_pictures(facts: list[Facts], shape: tuple[int, int, int]) -> list[str]:
    """Returns lines about pictures that do not come as they are in their files."""
    notes = []
    sizes = sorted({one.size for one in facts}, key=lambda size: (size[0] * size[1], size))
    channels = sorted({one.channels for one in facts})
    if sizes != [shape[:2]] or channels != [shape[2]]:
        kinds = " to ".join(f"{height}x{width}" for height, width in dict.fromkeys((sizes[0], sizes[-1])))
        smaller = sum(one.size[0] < shape[0] or one.size[1] < shape[1] for one in facts)
        enlarged = f", {smaller} of them enlarged" if smaller else ""
        notes.append(
            f"the files are {kinds} with {' or '.join(map(str, channels))} channels, cropped and resized to"
            f" {shape[0]}x{shape[1]} with {shape[2]}{enlarged} (--data.height, --data.width, --data.channels)"
        )
    several = sum(one.several for one in facts)
    if several:
        notes.append(f"{several} files have several frames or pages, of which the first is used")
    return notes


def probe(config: DataConfig) -> int:
    """Finds the number of channels in the heads of the files, which must agree."""
    seen = _by_head(config, lambda facts: facts.channels)
    if len(seen) > 1:
        kinds = ", ".join(f"{printable(path)} has {channels}" for channels, path in sorted(seen.items()))
        raise UserError(f"data.channels: the images do not agree ({kinds}); set it to 1, 3 or 4 to convert them")
    return next(iter(seen))


def sizes(config: DataConfig) -> dict[tuple[int, int], pathlib.Path]:
    """Finds the sizes, (height, width), in the heads of the files, and the first file of each size."""
    return _by_head(config, lambda facts: facts.size)


T = typing.TypeVar("T")


def _by_head(config: DataConfig, fact: Callable[[Facts], T]) -> dict[T, pathlib.Path]:
    """Returns the values of a fact of the readable files, and the first file of each."""

    def of(path: pathlib.Path) -> T | None:
        try:
            return fact(header(path))
        except Unreadable:
            return None  # named when the files are loaded

    paths = _list_folder(config).paths
    seen: dict[T, pathlib.Path] = {}
    for path, found in zip(paths, in_threads(of, paths, label="looking at the files"), strict=True):
        if found is not None:
            seen.setdefault(found, path)
    if not seen:
        raise UserError(
            f"data.path: none of the {len(paths)} files in {printable(config.path)} can be read as an image"
        )
    return seen


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
    limit, white = config.max_megapixels, config.white

    def look(path: pathlib.Path) -> tuple[np.ndarray | int, Facts] | str:
        try:
            if images is None:
                return look_over(path, max_megapixels=limit)
            return read_picture(path, shape, max_megapixels=limit, white=white)
        except Unreadable as error:
            return str(error)

    readable: list[int] = []
    checksums: list[int] = []
    all_facts: list[Facts] = []
    unreadable: dict[str, str] = {}
    results = in_threads(look, files.paths, label="reading images" if fits else "checking images")
    for i, result in enumerate(results):
        if isinstance(result, str):
            unreadable[printable(files.paths[i])] = result
            continue
        content, facts = result
        if images is None:
            checksums.append(typing.cast(int, content))
        else:
            images[len(readable)] = content
        readable.append(i)
        all_facts.append(facts)
    if unreadable:
        _report_unreadable(config, unreadable, len(files.paths))
    labels = None if files.labels is None else files.labels[readable]
    name = f"folder {printable(config.path)}, {config.split}"
    others: dict[str, typing.Any] = dict(
        unreadable=unreadable,
        label_fault=files.label_fault,
        notes=(*_note_of_files(config, files, len(unreadable)), *_notes_of_pictures(all_facts, shape)),
        deep=max((facts.deep for facts in all_facts), default=0),
    )
    if images is not None:
        return in_memory(images[: len(readable)], labels, files.class_names, name=name, **others)
    paths = [files.paths[i] for i in readable]

    def read_one(path: pathlib.Path) -> np.ndarray:
        try:
            return read_picture(path, shape, max_megapixels=limit, white=white)[0]
        except Unreadable as error:
            raise UserError(
                f"data.path: {printable(path)} can no longer be read ({error}); it could when the run began"
            ) from None

    def read_images(indices: np.ndarray) -> np.ndarray:
        return np.stack(list(in_threads(read_one, [paths[i] for i in indices])))

    return Source(
        len(paths),
        shape,
        read_images,
        read_labels=None if labels is None else lambda indices: labels[indices],
        class_names=files.class_names,
        name=name,
        files_crc32=zlib.crc32(np.array(checksums, "<u4").tobytes()),
        **others,
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
    what = f"{len(unreadable)} of {num_files} files in {printable(config.path)}"
    count = f"{what} cannot be read as images: {', '.join(named)}"
    if len(unreadable) == num_files:
        raise UnreadableFiles(f"data.path: {count}", unreadable)
    if config.on_unreadable == "refuse":
        raise UnreadableFiles(f"data.path: {count}; mend or remove them, or set data.on_unreadable=skip", unreadable)
    say(f"skipped: {count}")
