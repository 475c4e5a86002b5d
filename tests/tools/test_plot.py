"""Pixels of the kept patches and values of the positional-bias plot; what the demo draws is tested with the demo."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from v2drop_kernels import plot
from v2drop_kernels.models import Ilvas


def _saved(figure):
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return np.asarray(Image.open(data).convert("RGB")).astype(int)


def test_kept_patches_are_coloured_in_the_saved_file():
    """Red, green, blue and yellow quarters: in panel s only the patches that stage s keeps have colour."""
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    image[:20, :20] = 255, 0, 0
    image[:20, 20:] = 0, 255, 0
    image[20:, :20] = 0, 0, 255
    image[20:, 20:] = 255, 255, 0
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    stages = [[0, 1, 2, 3], [1, 2], [2], []]
    figure = plot.kept(image, stages, grid=(2, 2))
    pixels = _saved(figure)
    assert len(figure.axes) == 4
    for axis, stage in zip(figure.axes, stages, strict=True):
        box = axis.get_window_extent()
        for patch, colour in enumerate(colours):
            x = int(box.x0 + box.width * (0.25 + 0.5 * (patch % 2)))
            y = int(pixels.shape[0] - box.y1 + box.height * (0.25 + 0.5 * (patch // 2)))
            red, green, blue = pixels[y, x]
            if patch in stage:
                assert (red, green, blue) == colour
            else:
                assert red == green == blue
                assert 0.5 * 255 < red < 0.8 * 255  # pale: neither black nor background


@pytest.mark.parametrize("side", [24, 100, 337])
def test_patches_of_a_side_that_is_no_multiple_of_the_grid(side):
    """Every patch is drawn, and as many pixels are coloured as lie in its cell."""
    image = np.zeros((side, side, 3), dtype=np.uint8)
    image[..., 2] = 200
    cells = np.arange(side) * 24 // side
    for patch in (0, 23, 300, 575):
        shown = plot.kept(image, [patch], grid=(24, 24)).axes[0].images[0].get_array()
        coloured = shown[..., 2] > shown[..., 0] + 0.2
        wanted = (cells[:, None] == patch // 24) & (cells[None] == patch % 24)
        assert np.array_equal(coloured, wanted)


def test_retention():
    assert plot.retention([0, 1, 2, 5], 8, intervals=2).tolist() == [0.75, 0.25]
    assert plot.retention([[0, 1], [0, 1, 2, 3]], [4, 8], intervals=2).tolist() == [1.0, 0.0]
    # Seven tokens in three intervals: 3, 2 and 2 of them.
    assert plot.retention(range(7), 7, intervals=3).tolist() == [1.0, 1.0, 1.0]
    assert plot.retention([2, 3, -1], 7, intervals=3).tolist() == [1 / 3, 1 / 2, 0.0]
    assert plot.retention(torch.tensor([[9, -1], [8, 9]]), 10).tolist() == [0.0] * 8 + [0.5, 1.0]
    assert np.array_equal(plot.retention([[], [0]], [0, 1], intervals=2), [1.0, np.nan], equal_nan=True)


def test_retention_of_many_is_their_mean_where_all_have_the_same_size():
    rng = np.random.default_rng(0)
    kept = [rng.permutation(576)[:288] for _ in range(50)]
    together = plot.retention(kept, 576)
    np.testing.assert_allclose(together, np.mean([plot.retention(k, 576) for k in kept], axis=0))
    # 50 x 57 or 58 draws of probability 1/2: the standard deviation is 0.0093 at most, so five of them are 0.047.
    assert np.abs(together - 0.5).max() < 0.047


def _lines(figure):
    return {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}


def test_positional_bias_draws_the_values():
    kept = {"late": [range(50, 100), range(50, 100)], "even": [range(0, 100, 2), range(1, 100, 2)]}
    figure = plot.positional_bias(kept, 100, title="here", caption="there")
    lines = _lines(figure)
    assert list(lines["late"]) == [0.0] * 5 + [1.0] * 5
    assert list(lines["even"]) == [0.5] * 10
    assert set(lines["no bias"]) == {0.5}
    axis = figure.axes[0]
    assert axis.get_title() == "here"
    assert axis.get_xlabel().endswith("\nthere")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["late", "even", "no bias"]


def test_positional_bias_shows_in_the_pixels():
    """The line of what keeps the end rises: it is low at the left of the plot and high at the right."""
    figure = plot.positional_bias({"late": [range(50, 100)]}, 100)
    pixels = _saved(figure)
    colour = 255 * np.array(to_rgb(figure.axes[0].get_lines()[0].get_color()))
    ys, xs = np.nonzero((np.abs(pixels - colour) < 8).all(-1))
    width = pixels.shape[1]
    left, right = np.median(ys[xs < 0.3 * width]), np.median(ys[xs > 0.8 * width])
    assert left > 0.7 * pixels.shape[0]
    assert right < 0.2 * pixels.shape[0]


def test_no_common_line_for_different_budgets():
    lines = _lines(plot.positional_bias({"half": [range(5)], "all": [range(10)]}, 10, intervals=5))
    assert list(lines) == ["half", "all"]
    assert list(lines["half"]) == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("kept", "n", "options", "message"),
    [
        ({}, 10, {}, "kept must map at least one"),
        ([[1]], 10, {}, "kept must map at least one"),
        ({"a": [[1], [2]]}, [10], {}, "n must be an int or one per prompt"),
        ({"a": [[10]]}, 10, {}, "kept must name tokens, 0 to 9, got 10"),
        ({"a": [[1]]}, 10, {"intervals": 0}, "intervals must be at least 1"),
    ],
)
def test_wrong_positional_bias(kept, n, options, message):
    with pytest.raises(ValueError, match=message):
        plot.positional_bias(kept, n, **options)


def test_ilvas_draws_curves_and_filters():
    nan = float("nan")
    near, far = Ilvas((nan, 0.5, 0.75, 0.25, 0.5, 0.25, nan), n=1, top=5), (nan, 0.5, 0.25, 0.5, nan, nan, nan)
    figure = plot.ilvas({"n = 1": near, "n = 2": far}, filters=near.filters(), title="here")
    drawn = figure.axes[0].get_lines()
    np.testing.assert_array_equal(drawn[0].get_ydata(), near.values)
    np.testing.assert_array_equal(drawn[1].get_ydata(), far)
    assert [line.get_xdata()[0] for line in drawn[2:]] == [2, 4]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["n = 1", "n = 2", "filter layers"]
    assert figure.axes[0].get_title() == "here"
    with pytest.raises(ValueError, match="curves must be at least one, all of them over the same layers"):
        plot.ilvas({"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match="filters must name layers, 0 to 6, got 7"):
        plot.ilvas({"a": near}, filters=[7])


def test_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'v2drop-kernels\[plot\]'"):
        plot.positional_bias({"a": [[1]]}, 10)


def test_pictures_need_no_display():
    """pyplot, which chooses a window system, is never imported."""
    assert "pyplot" not in Path(plot.__file__).read_text()


def test_pictures_of_16_bits_are_not_white():
    from v2drop_kernels.plot import _pixels

    assert _pixels(np.full((1, 1, 3), 32768, np.uint16)).max() == 32768 / 65535
    assert _pixels(np.full((1, 1, 3), 128, np.uint8)).max() == 128 / 255
