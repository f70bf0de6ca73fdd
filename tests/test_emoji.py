"""The emoji example: what it draws, which split it draws it for, and which samples it calls memorized."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.source import in_memory

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji"
DRAW = runpy.run_path(str(EXAMPLE / "draw.py"), run_name="draw")
RESULTS = runpy.run_path(str(EXAMPLE / "results.py"), run_name="results")

LIST = """
# group: Smileys & Emotion
1F600                                                  ; fully-qualified     # \N{GRINNING FACE} E1.0 grinning face
263A                                                   ; unqualified         # \u263a E0.6 smiling face
# group: People & Body
1F468 200D 1F680                                       ; fully-qualified     # \u25a1 E4.0 man astronaut
1F469 200D 1F680                                       ; fully-qualified     # \u25a1 E4.0 woman astronaut
1F469 1F3FD 200D 1F680 ; fully-qualified     # \u25a1 E4.0 woman astronaut: medium skin tone
# group: Flags
1F1EB 1F1F7                                            ; fully-qualified     # \u25a1 E2.0 flag: France
1F1E9 1F1EA                                            ; fully-qualified     # \u25a1 E2.0 flag: Germany
"""


def test_the_list_is_read_without_skin_tones():
    found = [(each.group, each.name, each.code_points) for each in DRAW["read_list"](LIST)]
    assert found == [
        ("Smileys & Emotion", "grinning face", (0x1F600,)),
        ("People & Body", "man astronaut", (0x1F468, 0x200D, 0x1F680)),
        ("People & Body", "woman astronaut", (0x1F469, 0x200D, 0x1F680)),
        ("Flags", "flag: France", (0x1F1EB, 0x1F1F7)),
        ("Flags", "flag: Germany", (0x1F1E9, 0x1F1EA)),
    ]


def test_genders_are_on_one_side_of_the_split_and_a_tenth_is_for_testing():
    emoji = DRAW["Emoji"]
    for job in ("astronaut", "farmer", "judge", "artist", "pilot", "singer"):
        assert len({emoji("", f"{who} {job}", ()).split for who in ("man", "woman", "person")}) == 1
    splits = [emoji("", f"number {number}", ()).split for number in range(2000)]
    assert 140 <= splits.count("test") <= 260  # 200 +- 4.5 standard deviations


@pytest.mark.skipif(not DRAW["FONT"].exists(), reason="needs the package fonts-noto-color-emoji")
def test_the_font_is_drawn(tmp_path, monkeypatch, capsys):
    file = tmp_path / "emoji-test.txt"
    file.write_text(LIST, encoding="utf-8")
    monkeypatch.setitem(DRAW["main"].__globals__, "LIST", file)
    DRAW["main"](tmp_path / "emoji")
    assert "0 not in the font" in capsys.readouterr().out
    pictures = {path.name: path for path in (tmp_path / "emoji").rglob("*.png")}
    assert len(pictures) == 5
    france = np.asarray(Image.open(pictures["1f1eb_1f1f7.png"])).astype(int)
    assert france.shape == (136, 136, 3)
    assert (france[0] == 255).all()  # over white
    left, right = france[68, 30], france[68, 106]
    assert left[2] > left[0] + 50  # blue
    assert right[0] > right[2] + 50  # red


def test_copies_of_training_images_are_found_and_new_images_are_not(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    source, held_out, new = images[:20], images[20:30], images[30:]
    copies = source[:5] ^ np.uint8(1)  # off by one
    assert np.allclose(RESULTS["distances"](copies, in_memory(source)), 1)
    row = RESULTS["memorized"](np.concatenate([copies, new]), in_memory(source), in_memory(held_out), tmp_path)
    assert row["samples nearer than that"] == pytest.approx(5 / 15, abs=2 / 15)  # and 1 in 20 new images by definition
    assert np.asarray(Image.open(tmp_path / "emoji_nearest.png")).std() > 0
