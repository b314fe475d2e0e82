"""How runs end: early, with the best checkpoint, or stopped with their curve drawn."""

import json
import math
import shutil

import pytest

from jaxsft.cli import main
from jaxsft.config_files import load_config
from jaxsft.train import run, train
from jaxsft.training.events import Evaluated, Finished, Line
from jaxsft.training.patience import Patience

WORSENING = ("optim.learning_rate=0.3", "eval.every=1", "eval.patience=3", "checkpoint.every=4", "checkpoint.keep=9")
"""Steps so large that the held-out loss rises soon."""


def eval_losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ended_at(losses, patience):
    """The naive count: the first evaluation with `patience` of them in a row that are no new smallest loss."""
    in_vain, best = 0, losses[0]
    for step, loss in list(losses.items())[1:]:
        best, in_vain = (loss, 0) if loss < best else (best, in_vain + 1)
        if in_vain == patience:
            return step
    return None


@pytest.fixture(scope="module")
def ended(tiny_config, tmp_path_factory):
    """A run that patience ended, and that exported its best checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "ended"
    events = list(run(load_config(tiny_config, [*WORSENING, "checkpoint.export=best", f"run_dir={folder}"])))
    return folder, events


def test_patience_ends_a_run_with_its_schedule_untouched(ended, tiny_config, tmp_path):
    folder, events = ended
    losses = eval_losses(folder)
    last = ended_at(losses, 3)
    assert last is not None and last < 12 and max(losses) == last
    assert events[-1] == Finished(last, folder / "export") and events[-2].step == last
    assert (folder / "checkpoints" / str(last) / "seal.json").exists() and (folder / "loss.png").exists()
    rates = {event.step: event.metrics["learning_rate"] for event in events if isinstance(event, Line)}
    whole = run(load_config(tiny_config, [*WORSENING, "eval.patience=null", f"run_dir={tmp_path / 'whole'}"]))
    expected = {event.step: event.metrics["learning_rate"] for event in whole if isinstance(event, Line)}
    assert rates == {step: rate for step, rate in expected.items() if step <= last} != expected


def test_the_end_is_the_best_checkpoint_where_that_is_asked_for(ended, tmp_path, capsys):
    folder, _ = ended
    losses = {step: loss for step, loss in eval_losses(folder).items() if step}
    best, last = min(losses, key=losses.__getitem__), max(losses)
    weights = (folder / "export" / "model.safetensors").read_bytes()
    for step, is_same in (("best", True), (str(best), True), ("last", False), (str(last), False)):
        assert main(["export", str(folder), "--step", step, "--out", str(tmp_path / step)]) == 0
        assert ((tmp_path / step / "model.safetensors").read_bytes() == weights) == is_same
    capsys.readouterr()
    for step, expected in (("best", best), ("last", last), (str(best), best)):
        assert main(["evaluate", str(folder), "--step", step]) == 0
        said = capsys.readouterr().out
        assert f"evaluating checkpoint {expected}" in said and f"held-out loss {losses[expected]:.4f}" in said
    assert main(["evaluate", str(folder), "--step", "99"]) == 1
    assert "no finished checkpoint of step 99" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "not the folder of a run" in capsys.readouterr().err


def test_a_run_that_patience_ended_says_so_when_it_is_started_again(ended, tiny_config, capsys):
    folder, events = ended
    config = load_config(tiny_config, [*WORSENING, "checkpoint.export=best", f"run_dir={folder}"])
    assert list(run(config)) == [events[-1]]
    said = capsys.readouterr().out
    assert f"ended after step {events[-1].step} of 12: 3 evaluations in a row without a smaller" in said
    assert "this run is finished" in said


def test_patience_is_exact_when_a_run_goes_on(ended, tiny_config, tmp_path):
    """Left at the evaluation before the first step, and then at each of the others, and started again each time."""
    folder, events = ended
    parts = load_config(tiny_config, [*WORSENING, "checkpoint.export=best", f"run_dir={tmp_path / 'parts'}"])
    for step in range(events[-1].step + 3):
        for event in run(parts):
            if isinstance(event, Evaluated) and event.step == max(step - 1, 0):
                break
        else:
            break
    assert event == Finished(events[-1].step, tmp_path / "parts" / "export") and step == event.step + 2
    assert eval_losses(tmp_path / "parts") == eval_losses(folder)
    assert contents(tmp_path / "parts" / "export") == contents(folder / "export")


def test_more_patience_goes_on_from_where_it_ended(ended, tiny_config, tmp_path):
    shutil.copytree(ended[0], tmp_path / "more")
    overrides = [*WORSENING, "eval.patience=null", f"run_dir={tmp_path / 'more'}"]
    assert train(load_config(tiny_config, overrides)) == 0
    assert max(eval_losses(tmp_path / "more")) == 12


@pytest.mark.parametrize(
    ("losses", "state"),
    [
        ([5, 3, 4, 3], (3.0, 1, 2)),
        ([5, 6, 5, 4.9], (4.9, 3, 0)),
        ([float("nan"), float("nan"), 2, float("inf")], (2.0, 2, 1)),
        ([float("nan"), float("nan")], (None, None, 1)),
    ],
)
def test_patience_counts_evaluations_without_a_smaller_loss(losses, state):
    patience = Patience(2, {})
    for step, loss in enumerate(losses):
        patience.see(step, loss)
        patience.see(step, loss)  # of a run that was started again at this step
        assert patience.loss_at(step) == pytest.approx(loss if step else math.inf, nan_ok=True)
        assert patience.loss_at(step + 1) == math.inf
        patience = Patience(2, json.loads(json.dumps(patience.state())))
    found = patience.state()
    assert (found["best"], found["best_step"], found["in_vain"]) == state
    assert patience.is_over == (state[2] >= 2)


def test_a_run_that_is_left_has_its_curve_drawn(tiny_config, tmp_path):
    for event in run(load_config(tiny_config, [f"run_dir={tmp_path / 'left'}"])):
        if isinstance(event, Line) and event.step == 2:
            break
    assert b"jaxsft" in (tmp_path / "left" / "loss.png").read_bytes()[:4096]
    assert not (tmp_path / "left" / "export").exists()


def test_an_export_has_a_card_which_is_the_same_when_it_is_made_again(ended, tmp_path, capsys):
    folder, events = ended
    card = (folder / "export" / "README.md").read_text()
    losses = eval_losses(folder)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert f"held-out loss of this checkpoint ({best}) | {losses[best]:.4f}" in card
    assert "| training | train.jsonl | 120 | 120 | 7,156 | 1,526 |" in card and "optim.learning_rate: 0.3" in card
    assert main(["verify", str(folder / "export")]) == 0
    shutil.copytree(folder, tmp_path / "elsewhere")
    for place in (folder, tmp_path / "elsewhere"):
        assert main(["export", str(place), "--out", str(tmp_path / "again")]) == 0
        assert contents(tmp_path / "again") == contents(folder / "export")
    # Whoever has written on the card finds it beside the next export.
    (tmp_path / "again" / "README.md").write_text("mine")
    assert main(["export", str(folder), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again.before-1" / "README.md").read_text() == "mine"
    assert contents(tmp_path / "again") == contents(folder / "export")


def test_an_export_that_is_not_what_is_asked_for_is_made_anew(ended, tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(ended[0], folder)
    last, best = (folder / "export" / "model.safetensors").read_bytes(), None
    command = ["train", str(tiny_config), *WORSENING, f"run_dir={folder}"]
    assert main([*command, "checkpoint.export=last"]) == 0
    assert "exporting again" in capsys.readouterr().out
    last, best = (folder / "export" / "model.safetensors").read_bytes(), last
    assert last != best
    assert main([*command, "checkpoint.export=last"]) == 0
    assert "this run is finished" in capsys.readouterr().out
    # As after a kill between the last checkpoint and the export: what is there is of an earlier end.
    (folder / "progress.json").write_text(json.dumps({"sealed": max(eval_losses(folder))}))
    assert main([*command, "checkpoint.export=best"]) == 0
    assert (folder / "export" / "model.safetensors").read_bytes() == best


def test_a_card_may_be_written_on(ended, tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(ended[0], folder)
    (folder / "export" / "README.md").write_text("mine")
    assert main(["train", str(tiny_config), *WORSENING, "checkpoint.export=best", f"run_dir={folder}"]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert (folder / "export" / "README.md").read_text() == "mine"
    assert main(["verify", str(folder)]) == 0 == main(["verify", str(folder / "export")])


def test_a_run_is_named_once(ended, capsys):
    assert main(["evaluate", str(ended[0]), "run_dir=elsewhere"]) == 1
    assert "run_dir=elsewhere: the run is that of" in capsys.readouterr().err
