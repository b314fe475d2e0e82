"""The embedded quickstart data, tokenizer and template: reproducible, held out, lossless, and complete."""

import collections
import importlib.util
import json
import re
import string

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

FILES = (
    "train.jsonl",
    "eval.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
)


@pytest.fixture(scope="module")
def folder(repo):
    return repo / "configs" / "quickstart"


@pytest.fixture(scope="module")
def make_data(folder):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("quickstart_make_data", folder / "make_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def read(folder, split):
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def test_the_script_writes_the_committed_bytes_again(folder, make_data, tmp_path):
    make_data.main(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_no_word_of_eval_is_asked_about_in_train(folder, make_data):
    """Looked for in what the users of train.jsonl write, whatever the script says it did."""
    train, evaluation = make_data.make_splits()
    words = {conversation.word for conversation in evaluation}
    assert len(words) == len(evaluation)
    assert not words & {conversation.word for conversation in train}
    asked = [
        message["content"] for messages in read(folder, "train") for message in messages if message["role"] == "user"
    ]
    assert not words & set(re.findall(r"[a-z]+", " ".join(asked).lower()))


def test_no_prompt_of_eval_is_in_train(folder):
    train = {json.dumps(messages[:-1]) for messages in read(folder, "train")}
    assert not [messages for messages in read(folder, "eval") if json.dumps(messages[:-1]) in train]


def test_every_kind_is_in_both_files(folder, make_data):
    splits = make_data.make_splits()
    for split, conversations in zip(("train", "eval"), splits, strict=True):
        assert [conversation.messages for conversation in conversations] == read(folder, split)
        for part, expected in enumerate((set(make_data.TASKS), {*make_data.MANNERS, "plain"}, {1, 2, 3})):
            counts = collections.Counter(conversation.kind[part] for conversation in conversations)
            assert set(counts) == expected
            assert min(counts.values()) >= 10


def test_every_answer_follows_from_task_word_and_system_prompt(make_data):
    for conversation in sum(make_data.make_splits(), []):
        task, manner, num_answers = conversation.kind
        answer = make_data.TASKS[task].answer(conversation.word)
        expected = answer if manner == "plain" else make_data.MANNERS[manner].apply(answer)
        assert conversation.messages[-1] == {"role": "assistant", "content": expected}
        assert sum(message["role"] == "assistant" for message in conversation.messages) == num_answers


def test_examples_fit_the_rows_and_the_file_fits_git(repo, folder, tokenizer):
    from jaxsft.config_files import load_config

    seq_len = load_config(repo / "configs" / "quickstart.yaml").data.seq_len
    for split in ("train", "eval"):
        rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in read(folder, split)]
        assert max(len(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]) <= seq_len
    assert (folder / "train.jsonl").stat().st_size <= 3_000_000
    assert 200 <= len(read(folder, "eval")) <= 256


@pytest.mark.parametrize("text", [string.printable, "a  b\n\n c", "naïve, 中文, 😀", " 'tis <|foo|> . , !", ""])
def test_the_tokenizer_loses_nothing_and_an_ascii_character_is_one_token(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokens == list(text.encode("utf-8"))
    assert tokenizer.decode(tokens) == text


def test_special_tokens_are_single_distinct_and_within_the_vocabulary(folder, make_data, tokenizer):
    config = AutoConfig.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    for token, token_id in make_data.SPECIAL_IDS.items():
        assert tokenizer.encode(token, add_special_tokens=False) == [token_id]
    assert len(tokenizer) <= config.vocab_size and config.vocab_size % 8 == 0
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token != tokenizer.eos_token
    assert tokenizer.eos_token_id == config.eos_token_id == generation.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id == generation.pad_token_id


def test_the_generation_prompt_is_a_prefix_and_every_answer_is_stopped(folder, tokenizer):
    for messages in read(folder, "eval"):
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
                full = tokenizer.apply_chat_template(messages, tokenize=False)
                assert full.startswith(f"{prompt}{message['content']}<|end|>")


def test_the_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)
