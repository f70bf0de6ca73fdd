import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from ddpm_jax.evaluation.plots import plot_rate_distortion, plot_terms
from ddpm_jax.system.errors import UserError
from ddpm_jax.system.files import write_whole
from ddpm_jax.system.pictures import enlarge, grid, save_gif, save_png
from ddpm_jax.training.plots import plot_loss, smooth


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_grid_is_laid_out_row_by_row():
    one, two, three = (np.full((1, 2, 1), value, np.uint8) for value in (1, 2, 3))
    laid_out = grid(np.stack([one, two, three]), columns=2, padding=1, background=9)
    assert laid_out[..., 0].tolist() == [
        [9, 9, 9, 9, 9, 9, 9],
        [9, 1, 1, 9, 2, 2, 9],
        [9, 9, 9, 9, 9, 9, 9],
        [9, 3, 3, 9, 9, 9, 9],
        [9, 9, 9, 9, 9, 9, 9],
    ]


@given(
    number=st.integers(1, 12),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.integers(1, 5),
    columns=st.none() | st.integers(1, 14),
    padding=st.integers(0, 3),
)
def test_every_image_can_be_cut_out_of_the_grid(number, height, width, channels, columns, padding):
    images = random_images(number, height, width, channels)
    laid_out = grid(images, columns=columns, padding=padding)
    columns = int(np.ceil(np.sqrt(number))) if columns is None else columns
    rows = -(-number // columns)
    assert laid_out.shape == (
        rows * (height + padding) + padding,
        columns * (width + padding) + padding,
        channels,
    )
    rest = laid_out.astype(int)
    for i, image in enumerate(images):
        top, left = padding + i // columns * (height + padding), padding + i % columns * (width + padding)
        cell = (slice(top, top + height), slice(left, left + width))
        np.testing.assert_array_equal(laid_out[cell], image)
        rest[cell] = 255
    assert (rest == 255).all()


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        (np.zeros((0, 2, 2, 1), np.uint8), {}),
        (np.zeros((2, 2, 1), np.uint8), {}),
        (np.zeros((1, 2, 2, 1), np.float32), {}),
        (np.zeros((1, 2, 2, 1), np.uint8), {"columns": 0}),
        (np.zeros((1, 2, 2, 1), np.uint8), {"padding": -1}),
    ],
)
def test_grid_refuses_what_is_no_grid(images, settings):
    with pytest.raises(ValueError, match="a grid needs"):
        grid(images, **settings)


def test_enlarge_repeats_whole_pixels():
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3, 1)
    assert enlarge(image, side=7)[0, ..., 0].tolist() == [
        [0, 0, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2],
        [3, 3, 4, 4, 5, 5],
        [3, 3, 4, 4, 5, 5],
    ]
    np.testing.assert_array_equal(enlarge(image, side=2), image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_is_read_back_exactly(tmp_path, channels, mode):
    image = random_images(5, 7, channels)
    save_png(tmp_path / "new" / "image.png", image)
    with Image.open(tmp_path / "new" / "image.png") as read:
        assert read.mode == mode
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["image.png"]


@pytest.mark.parametrize("channels", [2, 5])
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, channels):
    for save in (
        lambda: save_png(tmp_path / "a", random_images(4, 4, channels)),
        lambda: save_gif(tmp_path / "a", random_images(2, 4, 4, channels), 0.1),
    ):
        with pytest.raises(UserError, match=f"^images of {channels} channels cannot .* npz instead$"):
            save()
    assert not list(tmp_path.iterdir())


def frames_of(path):
    with Image.open(path) as gif:
        for index in range(gif.n_frames):
            gif.seek(index)
            yield gif.info["duration"], np.asarray(gif.convert("RGB"))


def test_gif_of_grey_frames_is_read_back_exactly(tmp_path):
    frames = random_images(6, 9, 11, 1)
    seconds = [0.05] * 5 + [2.0]
    save_gif(tmp_path / "a.gif", frames, seconds, comment="six frames")
    read = list(frames_of(tmp_path / "a.gif"))
    assert [duration for duration, _ in read] == [50] * 5 + [2000]
    for frame, (_, shown) in zip(frames, read, strict=True):
        np.testing.assert_array_equal(shown, np.broadcast_to(frame, shown.shape))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        assert gif.info["comment"] == b"six frames"


def test_gif_of_color_keeps_the_colors(tmp_path):
    # 256 colors for 9 x 11 pixels: nothing is lost.
    frames = random_images(3, 9, 11, 3)
    save_gif(tmp_path / "a.gif", frames, 0.1)
    for frame, (duration, shown) in zip(frames, frames_of(tmp_path / "a.gif"), strict=True):
        assert duration == 100
        np.testing.assert_array_equal(shown, frame)


def test_gif_shows_alpha_over_white(tmp_path):
    frames = np.zeros((2, 4, 4, 4), np.uint8)
    frames[1, ..., 3] = 255
    save_gif(tmp_path / "a.gif", frames, 0.1)
    (_, clear), (_, black) = frames_of(tmp_path / "a.gif")
    assert (clear == 255).all()
    assert (black == 0).all()


def test_gif_refuses_another_number_of_durations(tmp_path):
    with pytest.raises(ValueError, match="2 frames need as many durations, not 3"):
        save_gif(tmp_path / "a.gif", random_images(2, 4, 4, 1), [0.1, 0.1, 0.1])


def test_smooth_is_the_weighted_mean_that_it_says():
    values = np.random.default_rng(0).normal(size=200)
    decay = 1 - 1 / (0.1 * 200)
    for k in (0, 1, 17, 199):
        weights = decay ** np.arange(k, -1, -1)
        np.testing.assert_allclose(smooth(values, share=0.1)[k], weights @ values[: k + 1] / weights.sum())


@pytest.mark.parametrize("losses", [[], [0.5], [1.0, 0.5, 0.25, 0.2], [1.0, float("nan"), 0.0, float("inf")]], ids=len)
def test_plot_of_any_losses_is_a_picture(tmp_path, losses):
    plot_loss(tmp_path / "loss.png", list(range(len(losses))), losses)
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (960, 540)
        assert np.asarray(picture.convert("L")).std() > 1


def test_plot_shows_the_losses(tmp_path):
    for name, loss in (("a", 0.1), ("b", 0.2)):
        plot_loss(tmp_path / name, [0, 1, 2], [1.0, loss, loss])
    a, b = (np.asarray(Image.open(tmp_path / name)) for name in "ab")
    assert (a != b).any()


# matplotlib's first colors, C0 to C4.
C0, C1, C2, C3, C4 = (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)


def shows(path, color):
    """Whether a line of this color is in a plot; thin ones are a little paler."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return bool((abs(pixels - color).sum(axis=-1) < 60).any())


def test_plot_shows_the_quarters_of_the_chain_that_were_seen(tmp_path):
    quartiles = np.tile([0.9, 0.5, np.nan, 0.1], (3, 1))
    plot_loss(tmp_path / "loss.png", [0, 1, 2], [1.0, 0.5, 0.4], quartiles)
    assert [shows(tmp_path / "loss.png", color) for color in (C0, C1, C2, C3, C4)] == [True, True, True, False, True]
    plot_loss(tmp_path / "plain.png", [0, 1, 2], [1.0, 0.5, 0.4])
    assert [shows(tmp_path / "plain.png", color) for color in (C0, C1, C2, C3, C4)] == [True] + 4 * [False]


def test_plot_of_terms_leaves_out_what_a_logarithm_cannot_show(tmp_path):
    terms = np.array([2.0, 0.5, 0.0, -1.0, np.nan, 0.01])
    plot_terms(tmp_path / "terms.png", terms, np.full(6, 0.1))
    assert shows(tmp_path / "terms.png", C0)
    plot_terms(tmp_path / "alone.png", terms, np.full(6, np.nan))  # a single image has no standard errors
    assert shows(tmp_path / "alone.png", C0)


def test_plot_of_rate_and_distortion_is_three_curves(tmp_path):
    plot_rate_distortion(tmp_path / "curve.png", np.arange(1, 21), np.linspace(0, 2, 20), np.linspace(80, 1, 20))
    with Image.open(tmp_path / "curve.png") as picture:
        thirds = np.split(np.asarray(picture.convert("RGB")), 3, axis=1)
    assert all((third == C0).all(axis=-1).sum() > 100 for third in thirds)


def test_plot_refuses_unequal_lengths(tmp_path):
    with pytest.raises(ValueError, match="3 steps need as many losses, not 2"):
        plot_loss(tmp_path / "loss.png", [1, 2, 3], [0.1, 0.2])


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "image.png"
    save_png(path, random_images(4, 4, 1))
    before = path.read_bytes()

    def fill_the_disk(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"^cannot write .*image.png: No space left on device$"):
        write_whole(path, fill_the_disk)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_device_is_one_line(tmp_path):
    def write(file):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(file.name.encode())

    with pytest.raises(UserError, match="No space left on device"):
        write_whole(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write .*: (Not a directory|File exists)$"):
        save_png(tmp_path / "file" / "image.png", random_images(4, 4, 1))
