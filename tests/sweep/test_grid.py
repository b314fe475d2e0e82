"""From `key=a,b` to runs: which values there are, what the runs are called, and what is said of mistakes."""

import itertools

import pytest
import yaml

from jaxsft.cli import main
from jaxsft.config import ConfigError
from jaxsft.config_files import load_config
from jaxsft.sweep.grid import make_trials, split_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-5", ["1e-5"]),
        ("1e-5,2e-5, 5e-5", ["1e-5", "2e-5", "5e-5"]),
        ("[a,b],[c]", ["[a,b]", "[c]"]),
        ("[a,b]", ["[a,b]"]),
        ("[[a,b],c],{x: [1,2]}", ["[[a,b],c]", "{x: [1,2]}"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("'it''s, so',b", ["'it''s, so'", "b"]),
        ('"a\\",b",c', ['"a\\",b"', "c"]),
        ("it's,that's", ["it's", "that's"]),
        ("['a]',b],c", ["['a]',b]", "c"]),
        ("{k: 'a},b'},c", ["{k: 'a},b'}", "c"]),
        ("null,1.0", ["null", "1.0"]),
        (r"layers\.[0-9]\.mlp,norm", [r"layers\.[0-9]\.mlp", "norm"]),
        ("layers.[0", ["layers.[0"]),  # one value, whatever is in it
    ],
)
def test_commas_outside_of_brackets_and_quotes_separate_values(text, values):
    assert split_values(text) == values


@pytest.mark.parametrize(
    "values",
    list(itertools.combinations(["1e-5", "[a, b]", "{k: 'x,y'}", "'a,b'", '"a]"', "it's", "null", "a b"], 3)),
)
def test_each_value_means_to_yaml_what_it_means_alone(values):
    assert [yaml.safe_load(each) for each in split_values(",".join(values))] == list(map(yaml.safe_load, values))


@pytest.mark.parametrize("text", ["1,,2", "1,", ",1", "[1,2", "1],2", "[1,2},3", "'a,b", "a,[b,'c]"])
def test_a_value_that_is_empty_or_not_closed_is_an_error(text):
    with pytest.raises(ValueError, match="empty|not closed|not opened"):
        split_values(text)


def test_every_combination_is_a_run_in_a_folder_of_its_own(tiny_config, tmp_path):
    given = ["optim.learning_rate=1e-2,2e-2", "train.batch_size=8,16", "train.steps=3", f"run_dir={tmp_path}/s"]
    trials = make_trials(str(tiny_config), given)
    assert [trial.name for trial in trials] == [
        f"learning_rate={rate},batch_size={size}" for rate in ("1e-2", "2e-2") for size in (8, 16)
    ]
    for trial in trials:  # what is said to `train` makes that very config
        assert load_config(tiny_config, trial.overrides) == trial.config
        assert trial.config.run_dir == f"{tmp_path}/s/{trial.name}" and trial.config.train.steps == 3
    found = {(trial.config.optim.learning_rate, trial.config.train.batch_size) for trial in trials}
    assert found == {(0.01, 8), (0.01, 16), (0.02, 8), (0.02, 16)}


def test_names_are_fit_for_folders_and_differ_where_values_do(tiny_config):
    given = ["data.chat_template=chatml,a b/c.jinja,a b:c.jinja", "optim.groups.0.match=[norm],[a,norm]"]
    given += ["optim.groups.0.weight_decay=0.0"]
    trials = make_trials(str(tiny_config), given)
    names = [trial.name for trial in trials]
    assert len(set(names)) == 6 and names[0].startswith("chat_template=chatml,match=norm-")
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-=,.") for name in names)
    for trial in trials:
        assert load_config(tiny_config, trial.overrides) == trial.config
    (long, _) = make_trials(str(tiny_config), [f"lora={{rank: 4, targets: [{'x' * 900}]}},{{rank: 8}}"])
    assert len(long.name) < 200


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.learning_rte=1,2"], ["optim.learning_rte: unknown key; did you mean optim.learning_rate"]),
        (["train.steps=5"], ["no key has several values"]),
        (["optim.learning_rate=[1e-5,2e-5]"], ["no key has several values"]),
        (["train.steps=5,6,5"], ["train.steps: 5 is given twice"]),
        (["train.steps=5,6", "train.steps=7"], ["train.steps: given twice"]),
        (["run_dir=a,b"], ["run_dir: several values given"]),
        (["train.steps=5,,6"], ["a value between commas is empty"]),
        (["train.steps"], ["expected key=value"]),
        # All mistakes in one, each once, however many combinations have it.
        (
            ["train.batch_size=8,-1", "optim.learning_rate=1,x", "trian.steps=4"],
            ["3 mistakes", "train.batch_size: -1 given", "optim.learning_rate: 'x' given", "trian"],
        ),
        (["optim.learning_rate=0.01,1e-2"], ["learning_rate=0.01 and learning_rate=1e-2: both are the same run"]),
        (["data.chat_template=chatml,ChatML"], ["both would be called chat_template=chatml"]),
    ],
)
def test_a_mistake_is_one_error_before_anything_is_trained(tiny_config, tmp_path, capsys, overrides, said):
    with pytest.raises(ConfigError) as error:
        make_trials(str(tiny_config), [f"run_dir={tmp_path}/s", *overrides] if "run_dir" not in said[0] else overrides)
    for part in said:
        assert str(error.value).count(part) == 1, error.value
    assert not (tmp_path / "s").exists()


def test_print_gives_a_command_for_each_run(tiny_config, tmp_path, capsys):
    given = ["optim.learning_rate=1e-2,2e-2", f"run_dir={tmp_path}/s s"]
    assert main(["sweep", str(tiny_config), *given, "--print"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"python run.py train {tiny_config} optim.learning_rate=1e-2 ")
    assert "learning_rate=2e-2" in second and "data.template_date=" in second
    assert not (tmp_path / "s s").exists()
