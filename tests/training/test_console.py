"""What a terminal shows of a run: the step and the loss on any width, and what else has room."""

import io
import re

import pytest
import rich.console

from jaxsft.hosts.logs import Log
from jaxsft.training.console import BAR_WIDTH, Console, fitting

LINE = {"loss": 1.2345, "accuracy": 0.5, "tokens_per_second": 1234567.0, "learning_rate": 2e-5, "mfu": 0.412,
        "objective": 1.3, "skipped_steps": 0.0, "seconds": 10.0, "steps": 10.0}  # fmt: skip


def shown(width, step=123_456, num_steps=200_000, **line):
    """The last state of the bar on a terminal of so many columns, and whether any line had more."""
    out = io.StringIO()
    console = Console(Log(0))
    console._console = rich.console.Console(file=out, force_terminal=True, width=width, color_system=None)
    console.step(step, num_steps, LINE | line)
    console.close()
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", each) for each in re.split(r"[\r\n]+|\x1b\[2K", out.getvalue())]
    assert all(len(each) <= width for each in lines), lines
    return next(each.rstrip() for each in reversed(lines) if each.strip())


@pytest.mark.parametrize("width", [40, 60, 72, 80, 81, 99, 100, 120, 132, 180, 250])
def test_every_width_shows_the_step_and_the_loss_whole(width):
    text = shown(width)
    assert text.startswith("step 123456/200000 ") and "loss 1.2345" in text and "…" not in text


def test_80_columns_show_the_speed_and_what_is_left_too():
    text = shown(80)
    assert "1,234,567 tokens/s" in text and re.search(r"left \d+:\d\d", text)
    assert "2 STEPS SKIPPED (not finite)" in shown(80, skipped_steps=2.0)


def test_a_wide_terminal_shows_all_of_it_beside_a_bar():
    text = shown(250)
    for part in ("objective 1.3000", "accuracy 50.0%", "MFU 41.2%", "learning rate 2.00e-05"):
        assert part in text
    assert "━" * 10 in text or "━" * 10 in text.replace("╸", "━")


def test_a_bar_goes_first_and_figures_by_their_weight():
    parts = {"loss": "l" * 10, "speed": "s" * 10, "rate": "r" * 10}
    assert fitting(parts, 100) == (BAR_WIDTH, "  ".join(parts.values()))
    assert fitting(parts, 34 + 1 + 8) == (8, "  ".join(parts.values()))
    assert fitting(parts, 34 + 8) == (0, "  ".join(parts.values()))
    assert fitting(parts, 33) == (0, "l" * 10 + "  " + "s" * 10)
    assert fitting(parts, 5) == (0, "l" * 10)
