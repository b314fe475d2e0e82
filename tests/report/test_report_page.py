"""The page in a real browser: whole without its script, nothing from elsewhere, readable in light and in dark."""

import html
import json
import math
import re

import numpy as np
import pytest
from phones import PHONE, in_frame, widths

from jaxsft.report.page import make_html, write_report
from jaxsft.report.records import Check, Report, Run, TokenDifference, as_json, from_json
from jaxsft.rows.strict import DataError

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e\"'&"


def make_run(name, kind, *, factor=1.0, caveats=(), settings=None, tokens=True):
    lines = []
    for step in range(1, 201):
        line = {"step": step, "loss": factor * (1 + 2 * math.exp(-step / 40)) + 0.1 * (step % 3), "grad_norm": 0.5,
                "learning_rate": 2e-5, "tokens_per_second": 900.0 * factor, "memory_gib": 2.0}  # fmt: skip
        lines.append(line | ({"total_trained_tokens": 64.0 * step} if tokens else {}))
    lines.append({"step": 200, "eval_loss": 1.25 * factor})
    figures = {"tokens_per_second": 900.0 * factor, "memory_gib": 2.0, "startup_seconds": 4.0 / factor}
    return Run(name, kind, f"runs/{name}", tuple(lines), figures, settings or {}, caveats)


@pytest.fixture(scope="module")
def report():
    ours = make_run("ours", "jaxsft", factor=1.5, settings={"attention": "xla", "seed": 0, "only.here": [1, 2]})
    theirs = make_run("theirs", "trl", settings={"attention": "sdpa", "seed": 0.0}, caveats=("a mean of means",))
    checks = (
        Check("tokens", True, 0.0, 0.0, "", "each batch"),
        Check("gradients", False, 0.0231, 1e-4, "model.layers.11.q_proj", "relative, by tensor"),
        Check("parameters", None, None, 1e-4, "", "not made: the gradients differ"),
    )
    differences = (TokenDifference("rows.jsonl:7", "stop token", 21, "so [[be it]][[<end>]]\n", "so [[be it]]<end>\n"),)
    return Report("one & <other>", "run.py compare a.yaml --baseline trl", "The gradients differ.", False, checks,
                  (ours, theirs), differences, {"stop token": 1200}, {"stop token": "TRL leaves it out."},
                  {"torch": "2.13", "machine": "2 cores"})  # fmt: skip


def text_of(dom):
    """What is written in the page, but for its scripts and titles of lines."""
    dom = re.sub(r"<(script|style|title).*?</\1>", "", dom, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", dom))


def test_the_page_says_what_the_report_does(browse, report):
    dom, said = browse(make_html(report, smooth=4))
    text = " ".join(text_of(dom).split())
    assert "CONSOLE" not in said, said
    assert text.index("Differs The gradients differ.") < text.index("Checks, in the order")
    for part in (
        "tokens each batch ✓ passed 0 0 –",
        "gradients relative, by tensor ✗ differs 0.0231 0.0001 model.layers.11.q_proj",
        "parameters not made: the gradients differ not made – 0.0001 –",
        "last loss 1.7202 1.2135", "best held-out loss 1.8750 1.2500",
        "tokens per second 1,350 900 1.50 ×", "peak memory, GiB 2.00 2.00 1.00 ×",
        "attention xla sdpa", "1 setting the same", "1 setting that only one run has",
        "stop token 1,200 examples", "TRL leaves it out.", "rows.jsonl:7 from token 21",
        "theirs a mean of means", "run.py compare a.yaml --baseline trl", "theirs, read from runs/theirs",
    ):  # fmt: skip
        assert part in text, (part, text)


def test_trained_tokens_are_marked(report):
    page = make_html(report)
    ours, theirs = re.findall("<pre>(.*?)</pre>", page, re.S)
    mark = '<span class="t trained">{}</span>'.format
    assert ours == f"so {mark('be it')}{mark('&lt;end&gt;')}\n" and theirs == f"so {mark('be it')}&lt;end&gt;\n"


SHOWN = """
  const shown = () => [...document.querySelectorAll(".view")].filter((view) => view.offsetHeight > 0)
    .map((view) => view.className.replace("panels view ", ""));
  const pressed = () => [...document.querySelectorAll("[aria-pressed=true]")].map((button) => button.textContent);
  const press = (text) => [...document.querySelectorAll("button")].find((each) => each.textContent === text).click();
  const seen = [[shown(), pressed()]];
  for (const text of %s) { press(text); seen.push([shown(), pressed()]); }
  document.body.append(`SEEN${JSON.stringify(seen)}END`);
"""


def test_buttons_switch_between_steps_and_tokens_and_raw_and_smoothed(browse, report):
    script = SHOWN % '["by trained tokens", "raw", "by step", "smoothed"]'
    dom, said = browse(make_html(report, smooth=4), script=script)
    seen = json.loads(re.search("SEEN(.*)END", text_of(dom))[1])
    assert [views for views, _ in seen] == [
        ["step smoothed"], ["tokens smoothed"], ["tokens raw"], ["step raw"], ["step smoothed"],
    ]  # fmt: skip
    assert seen[2][1] == ["by trained tokens", "raw"]
    assert "CONSOLE" not in said, said
    dom, _ = browse(make_html(report, by="tokens"), script=SHOWN % "[]")
    assert json.loads(re.search("SEEN(.*)END", text_of(dom))[1]) == [[["tokens raw"], ["by trained tokens"]]]


def test_it_is_whole_without_its_script(browse, report):
    page = make_html(report, smooth=4)
    blocked = re.sub(r"script-src '[^']*'", "script-src 'none'", page)
    dom, _ = browse(blocked)
    assert re.search(r'<div class="controls" hidden', dom), "no button that does nothing"
    assert " ".join(text_of(dom).split()) == " ".join(text_of(browse(page)[0]).split())


def test_a_run_that_counts_no_trained_tokens_is_named(report):
    other = make_run("trainer", "transformers", tokens=False)
    page = make_html(report._replace(runs=(*report.runs, other)), smooth=4)
    assert "trainer counts no trained tokens, so cannot be aligned so" in page
    tokens = re.search(r'<div class="panels view tokens smoothed">.*?<div class="panels', page, re.S)[0]
    assert "<title>ours</title>" in tokens and "<title>trainer</title>" not in tokens
    alone = make_html(report._replace(runs=(other,)), smooth=4)
    assert "no run counts trained tokens" in alone and "by trained tokens</button>" not in alone


def test_no_text_acts(browse, report):
    def spoil(value):
        if isinstance(value, str):
            return value + HOSTILE
        if isinstance(value, dict):
            return {key + HOSTILE: spoil(each) for key, each in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_replace"):
            kept = {"figures", "lines"}
            return value._replace(**{
                key: each if key in kept else spoil(each) for key, each in value._asdict().items()
            })  # fmt: skip
        return tuple(map(spoil, value)) if isinstance(value, tuple) else value

    page = make_html(spoil(report), smooth=4)
    assert page.count("<script") == 1 and "<img" not in page and "\x1b" not in page and "\u202e" not in page
    dom, said = browse(page)
    assert "CONSOLE" not in said, said
    assert text_of(dom).count("<U+001B>[31m<U+202E>") > 20


def test_nothing_is_loaded_and_nothing_may_be(browse, report):
    page = make_html(report, smooth=4)
    assert "default-src 'none'" in page
    assert not re.search(r"\b(src|srcset|action|href)=|url\(|@import|https?://|style=", page)
    script = """document.body.append(`LOADED${performance.getEntriesByType("resource").length}END`);"""
    assert "LOADED0END" in text_of(browse(page, script=script)[0])
    dom, said = browse(page.replace("</body>", "<script>document.body.textContent = 'broken in'</script></body>"))
    assert "broken in" not in text_of(dom) and "CONSOLE" in said


CONTRAST = """
  const channels = (text) => text.match(/[\\d.]+/g).map(Number).concat(1).slice(0, 4);
  const over = (top, below) => [0, 1, 2].map((at) => top[at] * top[3] + below[at] * (1 - top[3])).concat(1);
  const background = (element) => {
    const own = channels(getComputedStyle(element).backgroundColor);
    if (own[3] === 1) return own;
    return over(own, element.parentElement ? background(element.parentElement) : [255, 255, 255, 1]);
  };
  const luminance = (color) => [0.2126, 0.7152, 0.0722].reduce((sum, share, at) => {
    const value = color[at] / 255;
    return sum + share * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ratio = (color, behind) => {
    const [one, other] = [luminance(over(channels(color), behind)), luminance(behind)];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  };
  const texts = [], lines = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, style, title")) continue;
    const style = getComputedStyle(element);
    texts.push([ratio(element.closest("svg") ? style.fill : style.color, background(element)),
      String(element.getAttribute("class")), walker.currentNode.data.slice(0, 20)]);
  }
  for (let run = 0; run < 6; run++) {
    const line = document.querySelector(`.run-${run} .line`);
    if (line) lines.push(ratio(getComputedStyle(line).stroke, background(line.closest(".card"))));
  }
  const dark = getComputedStyle(document.body).backgroundColor;
  const faint = [...document.querySelectorAll("*:not(path)")].find((each) => getComputedStyle(each).opacity !== "1");
  if (faint) texts.push([0, String(faint.getAttribute("class")), "faint"]);
  texts.sort((a, b) => a[0] - b[0]);
  document.body.append(`FOUND${JSON.stringify([dark, texts.length, texts.slice(0, 5), lines])}END`);
"""


@pytest.mark.parametrize("is_dark", [False, True])
def test_all_text_and_all_lines_have_contrast_in_light_and_in_dark(browse, report, is_dark):
    runs = tuple(make_run(f"run {number}", "csv", factor=1 + number) for number in range(6))
    for shown in (report, report._replace(runs=runs, passed=True)):
        dom, _ = browse(make_html(shown, smooth=4), script=CONTRAST, is_dark=is_dark)
        page, count, worst, lines = json.loads(re.search("FOUND(.*)END", text_of(dom))[1])
        assert count > 150
        assert (sum(map(int, re.findall(r"\d+", page)[:3])) < 200) == is_dark
        assert worst[0][0] >= 4.5, worst
        assert len(lines) == len(shown.runs) and min(lines) >= 3, lines


@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [1280, 480])
def test_a_screenshot_shows_the_curves_in_its_scheme(browse, report, tmp_path, is_dark, width):
    from matplotlib import image

    path = tmp_path / "page.png"
    browse(make_html(report, smooth=4), is_dark=is_dark, width=width, screenshot=path)
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[1] == width
    assert (np.median(pixels) < 0.5) == is_dark
    bluish = (pixels[..., 2] > pixels[..., 0] + 0.3) & (pixels[..., 2] > pixels[..., 1] + 0.1)
    orange = (pixels[..., 0] > pixels[..., 2] + 0.4) & (pixels[..., 1] < pixels[..., 0] - 0.2)
    assert bluish.sum() > 500 and orange.sum() > 500, "both runs are seen"


@pytest.mark.parametrize("width", [1280, 480])
def test_nothing_is_wider_than_the_page(browse, report, width):
    long = Check("c" * 300, False, 1.0, 1.0, "w" * 300, "d" * 300)
    runs = tuple(make_run("n" * 80 + str(number), "csv", settings={"s" * 90: "v" * 300}) for number in range(8))
    script = """document.body.append(`WIDTH${document.documentElement.scrollWidth}/${innerWidth}END`);"""
    for shown in (report, report._replace(title="t" * 300, verdict="v" * 300, checks=(long,), runs=runs)):
        dom, _ = browse(make_html(shown, smooth=4), script=script, width=width)
        scroll, inner = map(int, re.search(r"WIDTH(\d+)/(\d+)END", dom).groups())
        assert scroll <= inner


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browse, report):
    runs = tuple(make_run("n" * 80 + str(number), "csv", settings={"s" * 90: "v" * 300}) for number in range(8))
    for shown in (report, report._replace(title="t" * 300, verdict="v" * 300, runs=runs)):
        page = make_html(shown, smooth=4)
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
        scroll, inner = widths(browse(in_frame(page))[0])
        assert scroll <= inner == PHONE


def test_the_json_twin_is_the_report_again(report, tmp_path):
    lines = (*report.runs[0].lines, {"step": 201, "loss": float("nan")})
    report = report._replace(runs=(report.runs[0]._replace(lines=lines), report.runs[1]))
    page = write_report(report, tmp_path / "made")
    assert sorted(path.name for path in page.parent.iterdir()) == ["curves.png", "report.html", "report.json"]
    text = (tmp_path / "made" / "report.json").read_text()
    assert "NaN" not in text and json.loads(text) == as_json(report)
    assert repr(from_json(json.loads(text))) == repr(report)
    with pytest.raises(DataError, match="version 1 expected, 2 found"):
        from_json(json.loads(text) | {"version": 2})


def test_a_report_without_runs_or_checks_is_a_page(browse, tmp_path):
    empty = Report("nothing", "run.py", "Nothing.", None, (), (), (), {}, {}, {})
    page = write_report(empty, tmp_path / "made").read_text()
    dom, said = browse(page)
    assert "Nothing." in text_of(dom) and "CONSOLE" not in said
    # As of a comparison of 0 steps: no card is empty.
    assert "Curves" not in page and "Loss, speed and memory" not in page
