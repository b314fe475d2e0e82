"""The config: one report for all mistakes, YAML as people write it, and a resolved config that says the same."""

import pathlib

import pytest

from jaxsft.config import KEYS_OF, Config, ConfigError
from jaxsft.config_files import config_keys, dump_config, load_config

REPO = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
SMALLEST = "model: {path: m}\ndata: {train: d.jsonl}\n"


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def report(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), overrides)
    return str(error.value)


def test_all_mistakes_come_in_one_report_with_suggestions(tmp_path):
    text = report(
        tmp_path,
        "model: {path: m}\ndata: {train: d, seqlen: 3}\noptim: {schedule: cosin, beta1: 2}\nlearning_rate: 1\n",
        ["optim.learning_rate=fast", "nonsense"],
    )
    assert "6 mistakes" in text
    assert "data.seqlen: unknown key; did you mean data.seq_len" in text
    assert (
        "optim.schedule: 'cosin' given, expected 'constant', 'linear', 'cosine' or 'wsd' (did you mean cosine?)" in text
    )
    assert "optim.beta1: 2 given; input should be less than 1" in text
    assert "learning_rate: unknown key; did you mean optim.learning_rate?" in text
    assert "optim.learning_rate: 'fast' given; input should be a valid number" in text
    assert "'nonsense': an override is written key=value" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {}\ndata: {train: d}", "model.path: required, not given"),
        ("- a list", "a config is a mapping of keys, but this file holds a list"),
        ("seed: 1\nseed: 2\n" + SMALLEST, "key 'seed' is given twice"),
        ("a: [", "not readable as YAML"),
        (
            SMALLEST + "train: {batch_size: 8, microbatch_size: 3}",
            "train: microbatch_size 3 does not divide batch_size 8",
        ),
        (SMALLEST + "train: {steps: 8, epochs: 3}", "train: give `steps` or `epochs`, not both"),
        (SMALLEST + "optim: {warmup_steps: 8, warmup_ratio: 0.1}", "optim: give `warmup_steps` or `warmup_ratio`"),
        (SMALLEST + "optim: {schedule: constant, final_ratio: 0.5}", "`final_ratio` has no effect"),
        (SMALLEST + "train: {epochs: .inf}", "train.epochs: inf given"),
        ("seed: 2024-13-45\n" + SMALLEST, "not readable as YAML"),
        ("{{a}}: 3\n" + SMALLEST, "not readable as YAML"),
        (SMALLEST + "optim: {decay_ratio: 0.5}", "`decay_ratio` has no effect with schedule 'cosine'"),
        (SMALLEST + "eval: {samples: 3}", "eval.samples: no effect without held-out rows; give data.eval"),
        (
            "model: {path: m}\ndata: {train: d, chat_template_kwargs: {tokenize: true}}",
            "data: chat_template_kwargs: tokenize cannot be set",
        ),
        ("model: {path: m}\ndata: {train: d, chat_template_kwargs: {x: 2024-01-01}}", "only what JSON can hold"),
        (
            "model: {path: m}\ndata: {train: d, train_on: []}",
            "data: train_on: an empty list given, which trains nothing; expected assistant, last_turn, last_exchange, ",
        ),
        ("model: {path: m}\ndata: {train: [{path: d, weight: 2}]}", "train.0.weight has no effect"),
        ("model: {path: m}\ndata: {train: d, template_date: 2024-13-01}", "not readable as YAML"),
        ("model: {path: m}\ndata: {train: d, template_date: soon}", "'soon' given, expected YYYY-MM-DD"),
        ("model: {path: m}\ndata: {train: [{path: d, weight: 1, count: 3}]}", "give only one of `weight` and `count`"),
        ("model: {path: m}\ndata: {train: d, stream: true}", "the length of a stream is not known; give train.steps"),
        (SMALLEST + "train: {log_every: 5}", "train.log_every: unknown key; it is called log.every now"),
        (SMALLEST + "log: {project: p, to: tensorboard}", "`project` has no effect without wandb or trackio"),
        (SMALLEST + "log: {to: [wandb, wandb]}", "to: wandb given twice"),
        (SMALLEST + "optim: {name: sgd, beta2: 0.9}", "optim: `beta2` has no effect with optimizer 'sgd'"),
        (SMALLEST + "optim: {momentum: 0.9}", "optim: `momentum` has no effect with optimizer 'adamw'"),
        (
            SMALLEST + "optim: {name: adafactor, beta1: 0.9, epsilon: 1e-6}",
            "optim: `beta1` and `epsilon` have no effect with optimizer 'adafactor'",
        ),
        (SMALLEST + "optim: {name: adamw8bit, moment_dtype: bfloat16}", "`moment_dtype` has no effect"),
        (SMALLEST + "optim: {name: muno}", "optim.name: 'muno' given"),
        (SMALLEST + "optim: {name: schedule_free_adamw, beta1: 0}", "beta1: 0 given, but schedule_free_adamw"),
        (SMALLEST + "optim: {groups: [{match: norm}]}", "no effect without `learning_rate_factor` or `weight_decay`"),
        (SMALLEST + "optim: {groups: {match: '(', weight_decay: 0}}", "'(' is no regular expression"),
        (SMALLEST + "optim: {stochastic_rounding: true}", "no effect with model.param_dtype float32"),
        (SMALLEST + "train: {batch_size: true}", "train.batch_size: True given"),
        (SMALLEST + "train: {batch_size: 0}", "train.batch_size: 0 given; input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_names_key_value_and_what_was_expected(tmp_path, text, expected):
    assert expected in report(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such config file"):
        load_config(tmp_path / "nowhere.yaml")


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = write(tmp_path, SMALLEST + "optim: {learning_rate: 1e-3, weight_decay: 0, epsilon: 1.0e-6}")
    config = load_config(path, ["optim.learning_rate=2e-4"])
    assert (config.optim.learning_rate, config.optim.weight_decay, config.optim.epsilon) == (2e-4, 0.0, 1e-6)


def test_what_is_left_out_is_what_is_usual_with_the_optimizer(tmp_path):
    path = write(tmp_path, SMALLEST)
    assert load_config(path).optim.beta2 == 0.999
    assert load_config(path, ["optim.name=lion"]).optim.beta2 == 0.99
    assert load_config(path, ["optim.name=lion", "optim.beta2=0.9"]).optim.beta2 == 0.9
    assert [load_config(path, [f"optim.name={name}"]).optim.momentum for name in ("muon", "sgd")] == [0.95, 0.9]
    assert load_config(path, ["optim.name=schedule_free_adamw"]).optim.schedule == "constant"


def test_groups_are_overridden_by_number(tmp_path):
    path = write(
        tmp_path, SMALLEST + "optim: {groups: [{match: norm, weight_decay: 0}, {match: [a, b], weight_decay: 1}]}"
    )
    groups = load_config(path, ["optim.groups.1.weight_decay=0.5"]).optim.groups
    assert [(group.match, group.weight_decay) for group in groups] == [(["norm"], 0.0), (["a", "b"], 0.5)]


def test_sources_are_given_as_paths_or_in_full_and_overridden_by_number(tmp_path):
    path = write(tmp_path, "model: {path: m}\ndata: {train: [a, {path: b}], eval: c, template_date: 2024-07-26}")
    config = load_config(path, ["data.train.1.path=d", "data.train.1.columns={prompt: 1}", "data.train.2.path=e"])
    assert [source.path for source in config.data.train] == ["a", "d", "e"]
    assert config.data.train[1].columns == {"prompt": "1"} and config.data.eval["eval"].path == "c"
    assert config.data.template_date == "2024-07-26"
    config = load_config(write(tmp_path, SMALLEST), ["data.train.0.path=x", "data.eval.one=y", "data.eval.two.path=z"])
    assert [source.path for source in config.data.train] == ["x"]
    assert {name: source.path for name, source in config.data.eval.items()} == {"one": "y", "two": "z"}


def test_an_override_can_clear_a_value(tmp_path):
    assert load_config(write(tmp_path, SMALLEST), ["optim.clip_norm=null"]).optim.clip_norm is None


def test_the_run_folder_is_named_after_the_config(tmp_path):
    assert load_config(write(tmp_path, SMALLEST)).run_dir == "runs/run"


@pytest.mark.parametrize(
    "text",
    [
        SMALLEST,
        SMALLEST + "train: {steps: 7}\noptim: {warmup_steps: 3, schedule: wsd, decay_ratio: 0.5}",
        "model: {path: m}\ndata: {train: d, eval: e}\neval: {every: 5}",
        SMALLEST + "log: {to: [tensorboard, trackio], project: p, profile_steps: 3}",
        *(SMALLEST + f"optim: {{name: {name}, weight_decay: 0.1}}" for name in KEYS_OF),
        SMALLEST + "optim: {name: lion, beta2: 0.98, groups: [{match: [norm, bias], weight_decay: 0}]}",
    ],
)
def test_the_resolved_config_says_the_same(tmp_path, text):
    config = load_config(write(tmp_path, text), ["seed=3"])
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml").model_dump() == config.model_dump()


def test_every_key_is_explained():
    keys = config_keys()
    assert all(meaning for _, _, _, meaning in keys)
    assert len({key for key, *_ in keys}) == len(keys) >= 40


def test_every_key_has_an_effect():
    """Each leaf key is read somewhere in the package, outside of the config's own two modules."""
    own = {REPO / "jaxsft/config.py", REPO / "jaxsft/config_files.py"}
    sources = "".join(path.read_text() for path in (REPO / "jaxsft").rglob("*.py") if path not in own)
    unread = [key for key, *_ in config_keys() if f".{key.rsplit('.', 1)[-1]}" not in sources]
    # The mesh reads its sizes in a loop over the axes.
    assert set(unread) <= {f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "context", "tensor")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_loads_and_says_what_to_expect(path):
    assert isinstance(load_config(path), Config)
    header = path.read_text().split("\n\n")[0]
    assert header.startswith("#")
    is_measured = "never run" not in header
    for word in ("command", "hardware", *(("time", "loss") if is_measured else ("memory", "bound"))):
        assert f"# {word}" in header, f"{path.name}: the header lacks `# {word}`"
    assert f"run.py train configs/{path.name}" in header


def test_an_override_of_nothing_to_train_gets_the_same_sentence(tmp_path):
    with pytest.raises(ConfigError, match="train_on: an empty list given, which trains nothing; expected assistant"):
        load_config(write(tmp_path, SMALLEST), ["data.train_on=[]"])


FULL = """
model: {path: m, param_dtype: bfloat16}
data: {train: [{path: a, count: 3}, {path: b, weight: 2}], eval: {one: e, two: f}}
train: {epochs: 2, only: norms}
optim: {name: adamw, beta2: 0.95, schedule: wsd, decay_ratio: 0.1, warmup_ratio: 0.1, stochastic_rounding: true}
loss: {label_smoothing: 0.1}
eval: {every: 5, patience: 2}
checkpoint: {every: 50, local_every: 10, local_dir: copies, export: best}
log: {to: wandb, project: p}
"""


@pytest.mark.parametrize(
    ("overrides", "left_out"),
    [
        (["train.steps=8"], ["train.epochs: 2 (train.steps is given)"]),
        (["train={steps: 8}"], []),
        (["train.steps=8", "train.epochs=null"], []),
        (["optim.warmup_steps=0"], ["optim.warmup_ratio: 0.1 (optim.warmup_steps is given)"]),
        (["loss.dft=true"], ["loss.label_smoothing: 0.1 (loss.dft is given)"]),
        (["loss.dft=false"], []),
        (["lora={rank: 4}"], ["train.only: norms (lora is given)"]),
        (["optim={warmup_steps: 3}"], []),
        (["lora.rank=4"], ["train.only: norms (lora.rank is given)"]),
        (["data.train.0.epochs=2"], ["data.train.0.count: 3 (data.train.0.epochs is given)"]),
        (["optim.schedule=linear"], ["optim.decay_ratio: 0.1 (no effect now)"]),
        (["optim.name=sgd"], ["optim.beta2: 0.95 (no effect now)"]),
        (
            ["optim.name=schedule_free_adamw", "optim.schedule=null"],
            ["optim.decay_ratio: 0.1 (no effect now)"],
        ),
        (["data.eval=null"], ["eval (no effect now)", "checkpoint.export: best (no effect now)"]),
        (
            ["eval.every=null"],
            ["eval.patience: 2 (no effect now)", "checkpoint.export: best (no effect now)"],
        ),
        (["model.param_dtype=null"], ["optim.stochastic_rounding: True (no effect now)"]),
        (["checkpoint.local_every=null"], ["checkpoint.local_dir: copies (no effect now)"]),
        (["log.to=tensorboard"], ["log.project: p (no effect now)"]),
        (["data.stream=true", "train.steps=3"], ["train.epochs: 2 (train.steps is given)"]),
    ],
)
def test_an_override_takes_away_what_it_excludes_and_says_so(tmp_path, overrides, left_out):
    said = []
    path = write(tmp_path, FULL)
    load_config(path, overrides, say=said.append)
    assert said == ([f"{path}: left out because of the command line: {', '.join(left_out)}"] if left_out else [])


def test_a_section_that_is_given_as_a_whole_excludes_what_its_keys_exclude(tmp_path):
    said = []
    path = write(tmp_path, SMALLEST + "lora: {rank: 4}\nloss: {label_smoothing: 0.0}")
    load_config(path, ["train={only: norms}", "loss.dft=true"], say=said.append)
    assert said == [f"{path}: left out because of the command line: lora (train.only is given)"]


def test_what_is_left_out_is_as_if_the_file_did_not_have_it(tmp_path):
    config = load_config(write(tmp_path, SMALLEST + "train: {epochs: 2}"), ["train.steps=8"])
    assert config == load_config(write(tmp_path, SMALLEST + "train: {steps: 8}"))


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (SMALLEST, ["train.steps=8", "train.epochs=2"], "give `steps` or `epochs`, not both"),
        (SMALLEST + "optim: {decay_ratio: 0.5}", ["seed=3"], "`decay_ratio` has no effect"),
        (SMALLEST + "lora: {rank: 4}", ["lora.rank=8", "train.only=norms"], "leave one of the two out"),
        (SMALLEST, ["loss.dft=true", "loss.label_smoothing=0.1"], "give one of them"),
        ("data: {train: d}", ["model=null"], "model: required, not given"),
        (SMALLEST, ["model.path=null"], "model.path: required, not given"),
        (SMALLEST + "log: {to: 5}", ["seed=1"], "log.to: 5 given"),
        (SMALLEST + "optim: {name: [a]}", ["seed=1"], "optim.name: ['a'] given"),
        (
            "model: {path: m}\ndata: {train: d, eval: e}\neval: {patience: 3}",
            [],
            "`patience` has no effect without",
        ),
        (SMALLEST + "checkpoint: {export: best}", [], "checkpoint.export: best: nothing is measured without"),
    ],
)
def test_what_is_said_twice_or_must_be_said_is_still_a_mistake(tmp_path, text, overrides, expected):
    assert expected in report(tmp_path, text, overrides)


def test_every_key_that_is_null_is_left_out(tmp_path):
    """All keys and sections, but those that are required, and the clip of which null says that there is none."""
    plain = load_config(write(tmp_path, SMALLEST))
    for key, _, default, _ in config_keys():
        if default == "required" or ".N" in key or key == "optim.clip_norm" or key.startswith(("lora.", "data.eval.")):
            continue
        assert load_config(write(tmp_path, SMALLEST), [f"{key}=null"]) == plain, key
    for section in ("train", "optim", "loss", "lora", "mesh", "eval", "log", "checkpoint", "run_dir"):
        assert load_config(write(tmp_path, SMALLEST), [f"{section}=null"]) == plain, section
    assert load_config(write(tmp_path, SMALLEST), ["optim.name=lion", "optim.beta2=null"]).optim.beta2 == 0.99
    full = "model: {path: m}\ndata: {train: [a, b], eval: {one: e, two: f}, chat_template_kwargs: {x: 1}}\n"
    config = load_config(
        write(tmp_path, full),
        ["data.eval.one=null", "data.train.1=null", "data.train.0.format=null", "data.chat_template_kwargs.x=null"],
    )
    assert list(config.data.eval) == ["two"] and [each.path for each in config.data.train] == ["a"]
    assert config.data.chat_template_kwargs == {"x": None}  # a template may tell null from nothing


@pytest.mark.parametrize(
    ("train", "override", "expected"),
    [
        ("{path: a, count: 3}", "data.train.0.weight=0.5", "no number"),
        ("a", "data.train.1.path=b", None),
        ("[a, b]", "data.train.5.path=x", "no number 5 of train: there are 2, from 0 on"),
        ("[a, b]", "data.train.00.path=x", "no number 00 of train"),
    ],
)
def test_sources_have_numbers_from_0_on(tmp_path, train, override, expected):
    path = write(tmp_path, f"model: {{path: m}}\ndata: {{train: {train}}}\n")
    if train.startswith("{"):
        config = load_config(path, ["data.train.0.epochs=2", "data.train.0.count=null"])
        assert (config.data.train[0].path, config.data.train[0].epochs) == ("a", 2)
    elif expected is None:
        assert [source.path for source in load_config(path, [override]).data.train] == ["a", "b"]
    else:
        with pytest.raises(ConfigError, match=expected):
            load_config(path, [override])
