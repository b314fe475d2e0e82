"""Our preparation against TRL's: each class of difference on a case made for it, and real rows, of which every token
that differs must be explained. The oracle is TRL itself."""

import importlib
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from jaxsft.compare import tokens
from jaxsft.compare.tokens import Habits, Piece, Row, align, compare, count_by_kind, shown
from jaxsft.compare.trl import compare_trl
from jaxsft.compare.trl_rows import completion_start, trl_arguments, trl_rows
from jaxsft.config import Config, ConfigError
from jaxsft.report.records import Report
from jaxsft.rows.items import Conversation, Document, Tokenised

# Each letter is a token: B begins a text, E stops, C is a control token, the blank is whitespace.
LETTERS = {" ": 32, **{letter: ord(letter) for letter in "BCDEHUXYabcdefgh"}}
WRITERS = {"B": "template", "E": "template", "H": "template", " ": "template", "D": "template", "U": "user"}


def ids(text: str) -> np.ndarray:
    return np.array([LETTERS[letter] for letter in text], np.int32)


def decode(ids: Any) -> str:
    """A control token reads as the letters `cd`."""
    return "".join("cd" if id == LETTERS["C"] else chr(id) for id in ids)


def habits(masks: str = "assistant", max_length: int = 20) -> Habits:
    letters = {name: LETTERS[name] for name in "EBC"}
    return Habits(max_length, frozenset({letters["E"]}), frozenset(letters.values()), letters["B"], masks, decode)


def piece(text: str, trained: str) -> Piece:
    """`trained` has a digit, the weight, under each letter."""
    weights = np.array([float(each) for each in trained], np.float32)
    return Piece(ids(text), weights, tuple(WRITERS.get(letter, "assistant") for letter in text))


def row(*pieces: Piece, theirs: str | None, trained: str = "", **others: Any) -> Row:
    given = None if theirs is None else ids(theirs)
    return Row("rows:1", pieces, given, np.array([each == "1" for each in trained], bool), **others)


def kinds(found: tokens.Found) -> dict[str, tuple[int, int]]:
    """Kind -> tokens without a partner, partners trained otherwise; which must add up to the plain counts."""
    counts = {kind: each[1:] for kind, each in count_by_kind([found]).items()}
    assert sum(each[0] for each in counts.values()) == found.differing_tokens
    assert sum(each[1] for each in counts.values()) == found.differing_weights
    assert all(kind in tokens.EXPLANATIONS for kind in counts)
    return counts


CASES: list[tuple[str, Row, Habits, dict[str, tuple[int, int]]]] = [
    ("equal", row(piece("UHabE", "00111"), theirs="UHabE", trained="00111"), habits(), {}),
    (
        "the first token is nobody's target",
        row(piece("UHabE", "00111"), theirs="UHabE", trained="10111"),
        habits("all"),
        {},
    ),
    (
        "no mask",
        row(piece("BUHabE", "000111"), theirs="BUHabE", trained="111111"),
        habits("all"),
        {"every token trained": (0, 2)},
    ),
    (
        "header and line break",
        row(piece("UHHabE UHcE", "00011100011"), theirs="UHHabE UHcE", trained="00111110111"),
        habits(),
        {"header trained": (0, 2), "after the stop token": (0, 1)},
    ),
    (
        "line break at the end",
        row(piece("UHabE ", "001110"), theirs="UHabE ", trained="001111"),
        habits("completion"),
        {"after the stop token": (0, 1)},
    ),
    (
        "stop token",
        row(piece("UHabE ", "001110"), theirs="UHabE ", trained="001100"),
        habits(),
        {"stop token not trained": (0, 1)},
    ),
    (
        "stop appended",
        row(piece("UHabE", "00111"), theirs="UHab", trained="0011", rendered=ids("UHab")),
        habits(),
        {"stop token appended": (1, 0)},
    ),
    (
        "end twice",
        row(piece("abE", "111"), theirs="abEE", trained="1111", rendered=ids("abEE")),
        habits("all"),
        {"end of text": (1, 0)},
    ),
    (
        "begin twice",
        row(piece("BabE", "1111"), theirs="BBabE", trained="11111", rendered=ids("BBabE")),
        habits("all"),
        {"begin of text": (1, 0)},
    ),
    (
        "control token",
        row(piece("UacdHbE", "0000011"), theirs="UaCHbE", trained="000011", rendered=ids("UaCHbE")),
        habits(),
        {"control tokens": (3, 0)},
    ),
    (
        "earlier answer",
        row(piece("UHaEUHbE", "00110011"), theirs="UHaEUHbE", trained="00000011"),
        habits("completion"),
        {"answer not trained": (0, 2)},
    ),
    (
        "answer left out",
        row(piece("UHaEUHbE", "00000011"), theirs="UHaEUHbE", trained="00110011"),
        habits(),
        {"left out by the config": (0, 2)},
    ),
    (
        "weight",
        row(piece("UHabE", "00222"), theirs="UHabE", trained="00111"),
        habits(),
        {"weight": (0, 3)},
    ),
    (
        "nothing trained",
        row(piece("UHabE", "00111"), theirs="UHabE", trained="00000"),
        habits(),
        {"empty mask": (0, 3)},
    ),
    (
        "cut by TRL, dropped by ours",
        row(theirs="UHab", trained="0011", is_cut=True),
        habits(max_length=4),
        {"length": (4, 0)},
    ),
    (
        "cut by TRL, whole in ours",
        row(piece("UHabE", "00111"), theirs="UHab", trained="0011", rendered=ids("UHabE")),
        habits(max_length=4),
        {"length": (1, 0)},
    ),
    (
        "left out by TRL",
        row(piece("UUUUHabE", "00000111"), theirs=None),
        habits(max_length=4),
        {"length": (8, 0)},
    ),
    (
        "split in ours",
        row(piece("abcd", "1111"), piece("efE", "111"), theirs="abcd", trained="1111", is_cut=True),
        habits("all", max_length=4),
        {"length": (3, 0)},
    ),
    (
        "missing",
        row(piece("UHabE", "00111"), theirs=None),
        habits(),
        {"missing": (5, 0)},
    ),
    (
        "refused",
        row(theirs="UHabE", trained="00111", is_refused=True),
        habits(),
        {"refused": (5, 0)},
    ),
    (
        "unrolled",
        row(
            piece("UHXaE", "00111"),
            piece("UHaEUHXbE", "000000111"),
            theirs="UHaEUHXbE",
            trained="001100111",
            is_unrolled=True,
        ),
        habits(),
        {"unrolled": (5, 2)},
    ),
    (
        "patched",
        row(
            piece("UHaEUHbE", "00110011"),
            theirs="UHXXaEUHXXbE",
            trained="001111001111",
            rendered=ids("UHaEUHbE"),
            patched=ids("UHXXaEUHXXbE"),
        ),
        habits(),
        {"template patched": (4, 0)},
    ),
    (
        "changed on the way",
        row(piece("UHabE", "00111"), theirs="UYHabE", trained="000111", rendered=ids("UHabE"), is_changed=True),
        habits(),
        {"row changed": (1, 0)},
    ),
    (
        "unexplained tokens",
        row(piece("UHabE", "00111"), theirs="UYHabE", trained="000111", rendered=ids("UHabE")),
        habits(),
        {"other": (1, 0)},
    ),
    (
        "unexplained mask",
        row(piece("UUUHabE", "0000111"), theirs="UUUHabE", trained="0100111"),
        habits(),
        {"other": (0, 1)},
    ),
]


@pytest.mark.parametrize(("row", "habits", "expected"), [each[1:] for each in CASES], ids=[each[0] for each in CASES])
def test_each_difference_gets_its_cause_and_is_counted_once(row, habits, expected):
    assert kinds(compare(row, habits)) == expected


def test_every_cause_is_found_on_a_case_of_its_own():
    found = {kind for _, _, _, expected in CASES for kind in expected}
    assert {*tokens.EXPLANATIONS} - found == {"boundary token", "tokenised otherwise", "other text"}


def test_an_alignment_pairs_equal_tokens_in_order_and_leaves_no_token_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ours, theirs = (rng.integers(0, 4, rng.integers(0, 12)) for _ in range(2))
        codes = align(ours, theirs)
        assert [index for _, a, b, _, _ in codes for index in range(a, b)] == [*range(len(ours))]
        assert [index for _, _, _, c, d in codes for index in range(c, d)] == [*range(len(theirs))]
        for tag, a, b, c, d in codes:
            assert (tag == "equal") == (b - a == d - c and np.array_equal(ours[a:b], theirs[c:d]))


def test_a_difference_is_shown_with_what_is_trained_in_brackets():
    assert shown(ids("UHabEUH"), np.array([0, 0, 1, 1, 1, 0, 0], bool), (2, 3), decode, around=2) == "UH[[abE]]..."


# What TRL is given.


def conversation(*roles: str, **others: Any) -> Conversation:
    return Conversation([{"role": role, "content": role, "weight": 1.0} for role in roles], **others)


def config_of(path: pathlib.Path, **data: Any) -> Config:
    return Config.model_validate({"model": {"path": str(path)}, "data": {"train": "-"} | data})


def test_one_answer_to_one_question_is_a_prompt_with_its_completion(tmp_path):
    config = config_of(tmp_path)
    rows = trl_rows([conversation("system", "user", "assistant")], config)
    assert rows.shape == "prompt_completion"
    assert rows.lines == [
        {
            "prompt": [{"role": "system", "content": "system"}, {"role": "user", "content": "user"}],
            "completion": [{"role": "assistant", "content": "assistant"}],
        }
    ]
    several = [conversation("user", "assistant"), conversation("user", "assistant", "user", "assistant")]
    assert trl_rows(several, config).shape == "messages"
    assert trl_rows(several, config_of(tmp_path, train_on="last_turn")).shape == "prompt_completion"
    assert completion_start(several[1], "last_turn") == 3
    assert trl_rows([Document("text")], config).lines == [{"text": "text"}]


def test_rows_that_trl_has_no_shape_for_are_refused(tmp_path):
    for other in (Document("text"), Tokenised([1], [1.0])):
        with pytest.raises(ConfigError, match="not both, nor rows of tokens"):
            trl_rows([conversation("user", "assistant"), other], config_of(tmp_path))


def test_the_settings_of_trl_are_those_of_the_config(tmp_path):
    config = config_of(tmp_path, seq_len=64).model_copy(
        update={"train": config_of(tmp_path).train.model_copy(update={"batch_size": 8, "microbatch_size": 2})}
    )
    found = trl_arguments(config, "messages", schedule_steps=100)
    assert found["assistant_only_loss"] and found["max_length"] == 64
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (2, 4)
    assert (found["warmup_steps"], found["lr_scheduler_type"]) == (3, "cosine")


# TRL itself.


def tokenizer_folder(material: pathlib.Path, name: str, folder: pathlib.Path) -> pathlib.Path:
    """A tiny model folder, without weights, with a real tokenizer."""
    import transformers

    shutil.copytree(material / "tokenizers" / name, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def compared(folder: pathlib.Path, path: pathlib.Path, rows: list[Any], *, steps: int = 0, **keys: Any) -> Report:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(path), "weights": "random", "remat": "none"} | keys.pop("model", {}),
        "data": {"train": str(data), "cache": str(folder / "cache")} | keys.pop("data", {}),
        "train": {"batch_size": 8, "steps": 2},
        "mesh": {"data": 8, "fsdp": 1},
        **keys,
    }
    return compare_trl(Config.model_validate(tree), out=folder / "out", num_steps=steps, say=lambda text: None)


@pytest.fixture
def in_this_process(monkeypatch):
    """What comparing runs in processes of their own runs here, where everything is imported already."""
    monkeypatch.setattr("jaxsft.compare.trl.call_apart", lambda function, *args: function(*args))
    monkeypatch.setattr(
        "jaxsft.compare.trl.run_child", lambda module, folder, say: importlib.import_module(module).main(folder)
    )


def check_of(report: Report, name: str) -> Any:
    return next(check for check in report.checks if check.name == name)


def read(path: pathlib.Path, count: int) -> list[Any]:
    if path.suffix == ".json":
        return json.loads(path.read_text())[:count]
    return [json.loads(line) for line in path.read_text().split("\n")[:count] if line]


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="the oracle is TRL")


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_two_steps_of_trl_beside_two_of_ours(trl, tiny_model, material, tmp_path):
    """gsm8k on stories260K: the preparation, the loss of the same tokens, and runs with our metrics."""
    report = compared(
        tmp_path,
        tiny_model,
        read(material / "data" / "gsm8k_train.jsonl", 24),
        steps=2,
        model={"weights": "pretrained"},
        data={"seq_len": 320, "chat_template": str(tiny_model.parent / "template.jinja")},
    )
    assert report.passed and tokens.OTHER not in report.difference_counts
    assert {"after the stop token", "length"} == {*report.difference_counts}
    assert check_of(report, "loss of the same tokens").measured < 1e-5
    assert [run.name for run in report.runs] == ["jaxsft", "TRL", "TRL, unpacked"]
    for run in report.runs:
        assert [line["step"] for line in run.lines] == [1, 2]
        assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in run.lines)
        assert run.lines[-1]["total_trained_tokens"] == sum(line["trained_tokens"] for line in run.lines)
        assert run.figures["memory_gib"] > 0 and run.figures["trained_tokens_per_second"] > 0
    assert report.runs[0].settings["seq_len"] == report.runs[1].settings["max_length"] == 320
    assert not report.runs[2].settings["padding_free"] and report.runs[1].settings["padding_free"]


@pytest.fixture(scope="module")
def tiny_model(material, tmp_path_factory) -> pathlib.Path:
    """stories260K with a template that is not known to TRL; its rows are one answer to one question."""
    model = shutil.copytree(material / "models" / "stories260K", tmp_path_factory.mktemp("stories") / "model")
    (model.parent / "template.jinja").write_text(TEMPLATE)
    return model


LORA = {"rank": 4, "alpha": 16, "dropout": 0.1, "rank_pattern": {r"layers\.1\..*q_proj": 2}, "dora": True}


def test_trl_with_a_peft_config_has_our_adapters(trl, in_this_process, tiny_model, material, tmp_path):
    """The gradient of B, which begins as 0, has the scale and A in it; of quantised weights TRL gets the values."""
    pytest.importorskip("peft")
    report = compared(
        tmp_path,
        tiny_model,
        read(material / "data" / "gsm8k_train.jsonl", 16),
        model={"weights": "pretrained", "quantize": "nf4"},
        lora=LORA,
        data={"seq_len": 320, "chat_template": str(tiny_model.parent / "template.jinja")},
    )
    assert report.passed, report.verdict
    assert check_of(report, "gradient norm of the same tokens").measured < 1e-5


def test_another_scale_of_trls_adapters_is_found(trl, in_this_process, tiny_model, material, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    read_config = peft.PeftConfig.from_pretrained

    def doubled(*given):
        config = read_config(*given)
        config.lora_alpha *= 2
        return config

    monkeypatch.setattr(peft.PeftConfig, "from_pretrained", doubled)
    report = compared(
        tmp_path,
        tiny_model,
        read(material / "data" / "gsm8k_train.jsonl", 8),
        model={"weights": "pretrained"},
        lora={"rank": 4},
        data={"seq_len": 320, "chat_template": str(tiny_model.parent / "template.jinja")},
    )
    assert not report.passed and "gradient norm of the same tokens differs" in report.verdict
    assert check_of(report, "loss of the same tokens").passed


def test_a_template_that_trl_does_not_know_is_trained_without_a_mask(
    trl, in_this_process, material, tmp_path, monkeypatch
):
    """And of a source of many rows the first are compared, which is said."""
    monkeypatch.setattr("jaxsft.compare.trl.MOST_ROWS", 15)
    model = tokenizer_folder(material, "llama-3-tiny", tmp_path / "model")
    report = compared(tmp_path, model, read(material / "data" / "sharegpt_dummy.json", 20), data={"seq_len": 1024})
    mask = check_of(report, "TRL's mask")
    assert mask.passed is False and "not training-compatible" in mask.detail
    assert report.passed and {*report.difference_counts} == {"every token trained"}
    assert report.facts["rows compared"] == "15 of 20: the first 15 of each source"


def test_every_differing_token_of_tool_calls_is_explained_with_a_patched_template(
    trl, in_this_process, material, tmp_path
):
    """TRL's training template for Qwen3 keeps the empty reasoning of earlier turns."""
    model = tokenizer_folder(material, "qwen3", tmp_path / "model")
    template = pathlib.Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    rows = read(material / "data" / "glaive_toolcall_en.json", 40)
    report = compared(tmp_path, model, rows, data={"chat_template": str(template), "seq_len": 2048})
    assert report.passed and check_of(report, "counts add up").passed
    assert check_of(report, "every difference explained").measured == 0
    assert report.difference_counts["template patched"] > 20 and tokens.OTHER not in report.difference_counts
