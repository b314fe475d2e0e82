"""Curves: the same smoothing at every cadence, alignment by trained tokens, nothing left out unsaid."""

import math
import random
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from etils import epath

from jaxsft.report.curves import COLOURS, default_window, make_panels, plot, smoothed, unaligned
from jaxsft.report.records import Run
from jaxsft.report.svg import MAX_POINTS, draw, tick_text, ticks


def run_of(lines, name="run", kind="jaxsft"):
    return Run(name, kind, "somewhere", tuple(lines), {}, {}, ())


def test_smoothing_is_the_weighted_mean_that_the_docstring_says():
    assert smoothed([1, 2], [4.0, 2.0], 1) == pytest.approx([4.0, 2.538], abs=5e-4)
    rng = random.Random(0)
    steps, values = [3, 5, 6, 10, 20, 21], [rng.random() for _ in range(6)]
    edges = [1, *steps]  # two steps lie between two points in the median
    for index, made in enumerate(smoothed(steps, values, 7.0)):
        # The naive integral: each step in turn, finely cut.
        grid = np.arange(edges[0], steps[index], 1e-3) + 5e-4
        owner = np.searchsorted(steps, grid)
        weights = np.exp(-(steps[index] - grid) / 7.0)
        assert made == pytest.approx(float((np.array(values)[owner] * weights).sum() / weights.sum()), rel=1e-5)


def test_runs_that_log_means_less_often_have_the_same_curve_and_constants_stay():
    rng = random.Random(1)
    each = [math.exp(-step / 300) + 0.05 * rng.gauss(0, 1) for step in range(1, 1001)]
    tens = [sum(each[at : at + 10]) / 10 for at in range(0, 1000, 10)]
    fine = smoothed(range(1, 1001), each, 50)[9::10]
    coarse = smoothed(range(10, 1001, 10), tens, 50)
    assert max(abs(one - two) for one, two in zip(fine, coarse, strict=True)) < 0.01
    assert max(abs(one - two) for one, two in zip(each[9::10], tens, strict=True)) > 0.1
    assert smoothed([1, 4, 5], [2.0, 2.0, 2.0], 3) == pytest.approx([2.0] * 3)
    assert smoothed([1, 2], [1.0, 5.0], 0) == [1.0, 5.0]


def test_the_window_is_chosen_by_the_length_and_short_runs_stay_raw():
    assert default_window([run_of({"step": step, "loss": 1.0} for step in range(1, 1001))]) == 20
    assert default_window([run_of({"step": step, "loss": 1.0} for step in range(10, 1001, 10))]) == 0


def test_by_tokens_a_point_stands_where_its_trained_tokens_are():
    lines = [{"step": 2, "loss": 3.0, "total_trained_tokens": 100}, {"step": 3, "eval_loss": 2.0},
             {"step": 4, "loss": 1.0, "total_trained_tokens": 300}]  # fmt: skip
    others = run_of([{"step": 1, "loss": 2.0, "total_tokens": 5}], "trainer", "transformers")
    panels = {panel.key: panel for panel in make_panels([run_of(lines), others], by="tokens", smooth=0)}
    assert [(curve.run, curve.x, curve.raw) for curve in panels["loss"].curves] == [(0, (100.0, 300.0), (3.0, 1.0))]
    assert panels["eval_loss"].curves[0].x == (200.0,), "held-out lines lie between those of training"
    assert unaligned([run_of(lines), others]) == ("trainer",)
    by_step = {panel.key: panel for panel in make_panels([run_of(lines), others], by="step", smooth=0)}
    assert [curve.x for curve in by_step["loss"].curves] == [(2, 4), (1,)]


def test_what_is_not_finite_is_left_out_and_counted():
    lines = [{"step": step, "loss": float("nan") if step == 3 else 1.0} for step in range(1, 6)]
    (panel,) = make_panels([run_of(lines)], by="step", smooth=2)
    assert panel.curves[0].x == (1, 2, 4, 5) and panel.notes == ("run: 1 points not finite",)
    assert make_panels([run_of([{"step": 1, "loss": float("inf")}])], by="step", smooth=0) == ()


def test_differences_of_loss_are_relative_to_the_first_run_at_the_same_step():
    one = run_of({"step": step, "loss": 2.0} for step in range(1, 5))
    two = run_of([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.002}, {"step": 9, "loss": 7.0}], "other")
    panels = make_panels([one, two], by="step", smooth=0, with_differences=True)
    (panel,) = [panel for panel in panels if panel.key == "difference"]
    assert panel.curves[0].x == (2,) and panel.curves[0].raw == pytest.approx((1e-3,))
    assert panel.notes == ("other: equal in 1 of 2 steps",)
    same = make_panels([one, one._replace(name="same")], by="step", smooth=0, with_differences=True)
    assert [(panel.key, panel.notes) for panel in same] == [("loss", ("same: equal in 4 of 4 steps",))]


@pytest.mark.parametrize("most", [3, 6])
def test_ticks_are_round_and_no_two_read_the_same(most):
    rng = random.Random(2)
    for _ in range(2000):
        low = rng.choice([0.0, rng.uniform(0, 10) * 10 ** rng.randint(-6, 6)])
        high = low + rng.uniform(1, 10) * 10 ** rng.randint(-3, 0) * (low or 10 ** rng.randint(-6, 6))
        found = ticks(low, high, most)
        assert 1 <= len(found) <= most and low - 1e-9 * high <= found[0] and found[-1] <= high * (1 + 1e-9)
        if len(found) > 1:
            step = found[1] - found[0]
            assert f"{step:.4e}"[:6] in ("1.0000", "2.0000", "5.0000")
            texts = [tick_text(value, step) for value in found]
            assert len(set(texts)) == len(texts), texts
            for text, value in zip(texts, found, strict=True):
                said = float(text.replace(",", "").replace("k", "e3").replace("M", "e6").replace("G", "e9"))
                assert said == pytest.approx(value, rel=1e-6, abs=1e-6 * step), (text, value)


def test_ticks_as_examples():
    assert ticks(0, 23, 6) == [0, 5, 10, 15, 20]
    assert [tick_text(value, 5e5) for value in (0, 5e5, 1e6)] == ["0", "500k", "1M"]
    assert [tick_text(value, 20000) for value in (0, 20000, 40000)] == ["0", "20k", "40k"]
    assert [tick_text(value, 5e-6) for value in (5e-6, 1e-5, 1.5e-5)] == ["5e-6", "1e-5", "1.5e-5"]


def test_a_long_line_is_thinned_but_its_spikes_stay():
    lines = [{"step": step, "loss": 9.0 if step == 54321 else 1.0 + step % 2} for step in range(1, 100_001)]
    (panel,) = make_panels([run_of(lines)], by="step", smooth=0)
    root = xml.etree.ElementTree.fromstring(re.search("<svg.*</svg>", draw(panel))[0])
    (path,) = [each.get("d") for each in root.iter() if each.get("class") == "line broad"]
    places = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
    assert len(places) <= 2 * MAX_POINTS
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert min(y for _, y in places) < min(sorted(y for _, y in places)[1:]) - 50, "the spike is seen"


def test_rare_spikes_do_not_flatten_the_rest_and_are_counted():
    lines = [{"step": step, "grad_norm": 500.0 if step in (77, 78) else 1.0 + step % 2} for step in range(1, 1001)]
    (panel,) = make_panels([run_of(lines)], by="step", smooth=0)
    assert "2 points lie above" in draw(panel)


def test_every_point_of_a_curve_lies_in_the_picture_but_for_those():
    rng = random.Random(3)
    keys = {"loss": 2.3, "grad_norm": 0.4, "learning_rate": 3e-6, "memory_gib": 70.0, "eval_loss": 1e-9}
    lines = [{"step": step} | {key: size * (1 + 0.1 * rng.random()) for key, size in keys.items()}
             for step in range(500, 900, 10)]  # fmt: skip
    for panel in make_panels([run_of(lines)], by="step", smooth=30):
        drawn = draw(panel)
        root = xml.etree.ElementTree.fromstring(re.search("<svg.*</svg>", drawn)[0])
        width, height = map(float, root.get("viewBox").split()[2:])
        for path in (each.get("d") for each in root.iter() if each.get("d")):
            for point in re.split("[ML]", path)[1:]:
                x, y = map(float, point.split())
                assert 0 <= x <= width and 0 <= y <= height, panel.key


def test_a_single_point_and_a_flat_line_can_be_drawn():
    for values in ([3.0], [2.0, 2.0], [0.0, 0.0], [-1.0, -1.0]):
        lines = [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]
        (panel,) = make_panels([run_of(lines)], by="step", smooth=5)
        assert "nan" not in draw(panel)


def test_the_picture_is_a_png_with_the_colours_of_the_runs(tmp_path):
    from matplotlib import colors, image

    runs = [run_of(({"step": step, "loss": (1 + index) / step, "eval_loss": 1.0} for step in range(1, 30)),
                   name=f"_run $x^{index}$") for index in range(7)]  # fmt: skip
    plot(make_panels(runs, by="step", smooth=3), epath.Path(tmp_path / "curves.png"), title="some $title")
    pixels = image.imread(tmp_path / "curves.png")[..., :3]
    assert np.median(pixels) == 1.0, "light ground"
    for colour in COLOURS:
        assert (np.abs(pixels - np.array(colors.to_rgb(colour))).max(axis=-1) < 0.02).sum() > 20
