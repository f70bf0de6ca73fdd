"""The page of runs in headless Chromium, wide and narrow, light and dark; skipped where there is none."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.evaluation.report.page import write_report
from ddpm_jax.run.record import save_config
from ddpm_jax.system import pictures
from ddpm_jax.training.metrics import append_line

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def page_file(runs, tmp_path_factory):
    """A page of two runs, with long words in it."""
    folder, random = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for name, classes in (("one", 0), ("a_run_with_a_name_that_is_" + 8 * "long_", 10)):
        run = folder / name
        save_config(runs.make_config(num_classes=classes), run / "config.json")
        for step in range(1, 6):
            loss = 1 / step
            line = {"step": step, "loss": loss, "loss_quartiles": 4 * [loss], "eval_loss": 2 * loss}
            append_line(run / "metrics.jsonl", line | {"learning_rate": 1e-3})
            append_line(run / "timing.jsonl", {"step": step, "images_per_second": 64.0 * step})
            images = random.integers(0, 256, (4, 8, 8, 1), np.uint8)
            pictures.save_png(run / "samples" / f"step_{step:07d}.png", pictures.grid(images))
        frames = random.integers(0, 256, (12, 8, 8, 1), np.uint8)
        pictures.save_gif(run / "samples" / "job" / "reverse.gif", frames, 0.1)
    return write_report([*folder.iterdir()], folder / "report.html", drawing="never")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # The sandbox of Chromium does not work for root, as in a container.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_the_page_works_in_a_browser(browser, page_file: Path, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("data:") else None)
    page.goto(page_file.as_uri())
    assert wrong == [page_file.as_uri()]  # nothing else is asked for

    assert page.evaluate("document.documentElement.scrollWidth") == width
    for part in ("overview", "curves", "samples", "reverse", "scores", "config", "files"):
        assert page.locator(f"#{part} h2").is_visible()
        assert page.locator(f"#{part} :is(.card, .empty)").first.is_visible()
    # Loss, its four quarters, learning rate and images/s: every curve is drawn.
    assert [each.locator(".scatterlayer .js-line").count() for each in page.locator(".chart").all()] == [4, *6 * [2]]

    def level():
        color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))

    bright = 3 * 128
    assert (level() > bright) == (scheme == "light")
    text = page.locator(".chart .xtick text").first
    before = text.evaluate("node => getComputedStyle(node).fill")
    page.locator("#theme").click()  # light
    if scheme == "light":
        page.locator("#theme").click()
    assert (level() > bright) == (scheme == "dark")
    assert text.evaluate("node => getComputedStyle(node).fill") != before

    chart = page.locator(".chart").first
    chart.scroll_into_view_if_needed()
    chart.hover(position={"x": width / 4, "y": 150})
    chart.locator(".hoverlayer .legend").wait_for(timeout=10_000)
    shown = chart.locator(".hoverlayer .legend text").all_text_contents()
    step = int(shown[0])
    assert f"one : {1 / step:.4g}" in shown
    assert f"one: eval loss : {2 / step:.4g}" in shown

    for kind, last in (("grids", "step 5"), ("reverse", "frame 12 of 12")):
        player = page.locator(f".player[data-kind={kind}]").first
        picture, slider = player.locator("img"), player.locator("input")
        slider.focus()
        slider.press("End")
        assert player.locator("output").inner_text() == last
        before = picture.get_attribute("src")
        slider.press("ArrowLeft")
        assert picture.get_attribute("src") != before
        assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 1
        assert player.locator("output").inner_text() != last

    only = page.locator("#only")
    assert only.is_checked()
    assert page.locator("#config tr.same").first.is_hidden()
    only.uncheck()
    assert page.locator("#config tr.same").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert wrong[1:] == []
    context.close()
