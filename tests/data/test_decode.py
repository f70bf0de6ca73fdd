import struct
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from ddpm_jax.data import decode
from ddpm_jax.system.errors import UserError

few = hypothesis.settings(max_examples=25, deadline=None)


@few
@hypothesis.given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20))
def test_pictures_of_any_size_keep_their_middle(height, width, new_height, new_width):
    # A picture whose value is its distance from the middle stays symmetric.
    rows, columns = np.abs(np.arange(height) - (height - 1) / 2), np.abs(np.arange(width) - (width - 1) / 2)
    pixels = (4 * (rows[:, None] + columns[None, :])).astype(np.uint8)
    found = decode.to_array(Image.fromarray(pixels), (new_height, new_width, 1))
    assert found.shape == (new_height, new_width, 1)
    np.testing.assert_allclose(found.astype(int), found[::-1].astype(int), atol=2)
    np.testing.assert_allclose(found.astype(int), found[:, ::-1].astype(int), atol=2)


def test_a_small_file_that_claims_to_be_huge_is_not_decoded(tmp_path):
    chunk = lambda kind, content: (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    )
    header = struct.pack(">2I5B", 60_000, 50_000, 8, 2, 0, 0, 0)
    file = tmp_path / "huge.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))))
    with pytest.raises(UserError, match=r"huge.png is 60000x50000, more than the 179 megapixels of data.max_megapix"):
        decode.open_picture(str(file))
    Image.new("L", (30, 20)).save(tmp_path / "small.png")
    assert decode.open_picture(str(tmp_path / "small.png")).size == (30, 20)
    with pytest.raises(UserError, match="small.png is 30x20, more than the 0.0005 megapixels"):
        decode.open_picture(str(tmp_path / "small.png"), max_megapixels=0.0005)
