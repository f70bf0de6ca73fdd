"""Draws the emoji of a font to a folder of pictures, one subfolder per Unicode group: a small set of color images.

    apt-get install fonts-noto-color-emoji unicode-data
    python examples/emoji/draw.py data/emoji

The pictures are those of Noto Color Emoji (Google; SIL Open Font License 1.1), over white, 136 x 136 pixels. Skin tones
are left out: they are near copies, which a network would only memorize. A tenth becomes the test split; emoji that
differ only in gender are on the same side of it.
"""

import io
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fontTools.ttLib import TTFont
from PIL import Image

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
PACKAGES = "apt-get install fonts-noto-color-emoji unicode-data"
TEST_PART = 10


class Emoji(NamedTuple):
    """One line of Unicode's list."""

    group: str
    name: str
    code_points: tuple[int, ...]

    @property
    def split(self) -> str:
        """Which split it belongs to, the same for all genders."""
        kind = re.sub(r"\b(wo)?m[ae]n\b|\b(person|people)\b|\W+", " ", self.name)
        return "test" if zlib.crc32(" ".join(sorted(kind.split())).encode()) % TEST_PART == 0 else "train"


def read_list(text: str) -> Iterator[Emoji]:
    """Yields the emoji of emoji-test.txt in its order, without skin tones."""
    group = ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif found := re.fullmatch(r"([0-9A-F ]+); fully-qualified +# \S+ E[0-9.]+ (.+)", line):
            code_points = tuple(int(each, 16) for each in found[1].split())
            if not any(0x1F3FB <= each <= 0x1F3FF for each in code_points):
                yield Emoji(group, found[2], code_points)


def read_pictures(font: TTFont) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """Returns the bitmaps of a font by the glyph's name, and the glyphs that stand for sequences of others."""
    ligatures = {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        if lookup.LookupType == 4
        for table in lookup.SubTable
        for first, those in table.ligatures.items()
        for ligature in those
    }
    return font["CBDT"].strikeData[0], ligatures


def over_white(png: bytes) -> Image.Image:
    """Returns a picture in the middle of a white square."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    size = max(picture.size)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return square.convert("RGB")


def main(folder: Path) -> None:
    """Draws every emoji of Unicode's list that the font has."""
    for needed in (FONT, LIST):
        if not needed.exists():
            sys.exit(f"{needed} is missing: {PACKAGES}")
    font = TTFont(FONT)
    bitmaps, ligatures = read_pictures(font)
    names = font.getBestCmap()
    drawn, missing = {"train": 0, "test": 0}, 0
    for emoji in read_list(LIST.read_text(encoding="utf-8")):
        # The variation selector (FE0F) asks for color, which all glyphs here have.
        glyphs = tuple(names.get(each, "") for each in emoji.code_points if each != 0xFE0F)
        glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs, "")
        if glyph not in bitmaps:  # of a newer Unicode than the font
            missing += 1
            continue
        name = "_".join(f"{each:x}" for each in emoji.code_points)
        file = folder / emoji.split / emoji.group.replace(" & ", "_").lower() / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        over_white(bitmaps[glyph].imageData).save(file)
        drawn[emoji.split] += 1
    print(f"{folder}: {drawn['train']} images for training, {drawn['test']} for testing; {missing} not in the font")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/emoji/draw.py FOLDER")
    main(Path(sys.argv[1]))
