import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from ddpm_jax.data import decode

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
