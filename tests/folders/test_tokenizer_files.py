"""The files of a tokenizer in an export: what was added is in every list, and all else as it came."""

import json

import pytest

from jaxsft.chat.named_templates import NAMED_TEMPLATES, template_text
from jaxsft.config import ModelConfig
from jaxsft.folders import hf
from jaxsft.folders.pretrained import open_tokenizer
from jaxsft.folders.tokenizer_files import (
    NEW_CLASSES,
    ONE_CLASS,
    describe_known_words,
    settle_tokenizer,
    with_known_words,
)

TEXTS = ["w1 w2<|im_start|>w3", "w1", "w2w3 <|im_end|> w4", ""]
OWN = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def make_source(folder, kind, *, config=None, files=()):
    """A folder with a tokenizer of some kind, and a config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir(parents=True)
    models = tokenizers.models
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "words":
        words = [*specials, *(f"w{at}" for at in range(20))]
        tokenizer = tokenizers.Tokenizer(models.WordLevel({w: at for at, w in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    elif kind == "unigram":
        pieces = [*((token, 0.0) for token in specials), ("▁", -2.0), *((letter, -3.0) for letter in "w1234567890")]
        tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    elif kind == "bpe with bytes":  # as of Llama 2
        pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "w", "1", "2", "w1", "▁w1"]
        merges = [("w", "1"), ("▁", "w1")]
        vocab = {piece: at for at, piece in enumerate(pieces)}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    else:  # bytes, as of GPT-2
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {piece: at for at, piece in enumerate([*specials, *alphabet])}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**names, "tokenizer_class": ONE_CLASS, "zeta": [1, {"a": None}], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | (config or {}), indent=4))
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    for name, content in dict(files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


KINDS = ("words", "unigram", "bpe with bytes", "bytes")


def settled(source, out, tokenizer):
    """As an export writes it."""
    tokenizer.save_pretrained(out)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    settle_tokenizer(out, tokenizer, source)
    return out


def opened(source, template=None, **options):
    return open_tokenizer(ModelConfig(path=str(source)), template, **options)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_added_tokens_are_special_in_every_list_and_all_else_is_as_it_came(kind, template, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_source(tmp_path / "source", kind)
    tokenizer = opened(source, template)
    out = settled(source, tmp_path / "out", tokenizer.tokenizer)
    tokens = list(NAMED_TEMPLATES[template].tokens)
    assert list(tokenizer.added_tokens) == tokens

    config, before = read(out / "tokenizer_config.json"), read(source / "tokenizer_config.json")
    assert config["additional_special_tokens"] == tokens
    assert read(out / "special_tokens_map.json")["additional_special_tokens"] == tokens
    assert {key: config[key] for key in before} == before
    decoder = config["added_tokens_decoder"]
    assert {each["content"] for each in decoder.values()} == {"<unk>", "<s>", "</s>", *tokens}
    assert all(each["special"] for each in decoder.values())
    content, was = read(out / "tokenizer.json"), read(source / "tokenizer.json")
    new = [each for each in content["added_tokens"] if each["content"] in tokens]
    assert all(each["special"] and not each["normalized"] for each in new) and len(new) == len(tokens)
    assert {each["content"]: str(each["id"]) for each in new}.items() <= {
        each["content"]: id for id, each in decoder.items()
    }.items()
    content["added_tokens"] = [each for each in content["added_tokens"] if each not in new]
    assert content == was

    again = transformers.AutoTokenizer.from_pretrained(out)
    assert set(again.all_special_ids) >= set(map(again.convert_tokens_to_ids, tokens))
    for text in (*TEXTS, "".join(tokens)):
        assert again(text)["input_ids"] == tokenizer.tokenizer(text)["input_ids"]
    assert hf.tokenizer_key(again) == tokenizer.key
    # What is exported again is the same to the byte.
    once_more = settled(out, tmp_path / "again", opened(out).tokenizer)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (once_more / file).read_bytes() == (out / file).read_bytes()


def test_tokens_are_added_to_lists_that_the_source_has_and_none_is_lost(tmp_path):
    source = make_source(
        tmp_path / "source",
        "words",
        config={
            "additional_special_tokens": [{"__type": "AddedToken", "content": "w1"}, "w2"],
            "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        },
        files={
            "special_tokens_map.json": b'{"additional_special_tokens": ["w1", "w2"], "eos_token": {"content": "</s>"}}',
            "added_tokens.json": b'{"w1": 3}',
            "tokenizer.model": b"of SentencePiece",
        },
    )
    tokenizer = opened(source, "chatml")
    assert any("tokenizer.model stays as it came, without the 2 added tokens" in note for note in tokenizer.notes)
    out = settled(source, tmp_path / "out", tokenizer.tokenizer)
    config = read(out / "tokenizer_config.json")
    names = [token["content"] if isinstance(token, dict) else token for token in config["additional_special_tokens"]]
    assert names == ["w1", "w2", "<|im_start|>", "<|im_end|>"]
    special = read(out / "special_tokens_map.json")
    assert special["additional_special_tokens"] == names and special["eos_token"] == {"content": "</s>"}
    assert read(out / "added_tokens.json").keys() == {"w1", "<|im_start|>", "<|im_end|>"}
    assert (out / "tokenizer.model").read_bytes() == b"of SentencePiece"


@pytest.mark.parametrize("name", ["TokenizersBackend", "Qwen3_5Tokenizer"])
def test_a_class_that_only_transformers_5_has_is_not_written_though_nothing_changed(name, tmp_path):
    extra = {"tokenizer_class": name, "backend": "tokenizers", "is_local": True, "local_files_only": False}
    source = make_source(tmp_path / "source", "words", config=extra | {"extra_special_tokens": ["w3", "w4"]})
    tokenizer = hf.load_tokenizer(str(source))
    out = settled(source, tmp_path / "out", tokenizer)
    config, before = read(out / "tokenizer_config.json"), read(source / "tokenizer_config.json")
    assert config["tokenizer_class"] == ONE_CLASS not in NEW_CLASSES
    assert config["additional_special_tokens"] == ["w3", "w4"] and not {*extra} & {*config} - {"tokenizer_class"}
    rest = {key: value for key, value in before.items() if key not in extra and key != "extra_special_tokens"}
    assert {key: config[key] for key in rest} == rest
    if name == "TokenizersBackend":
        # The other reads these words in a way of its own, with names of its own, which its files then say.
        assert b'\n    "zeta"' in (out / "tokenizer_config.json").read_bytes()
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    (note,) = describe_known_words(source)
    assert all(word in note for word in (name, ONE_CLASS, "is_local", "additional_special_tokens"))
    assert hf.tokenizer_key(hf.load_tokenizer(str(out))) == hf.tokenizer_key(tokenizer)


def test_words_that_both_versions_know_are_left_as_they_are():
    for config in (
        {
            "tokenizer_class": "LlamaTokenizer",
            "additional_special_tokens": ["<a>"],
            "extra_special_tokens": {"b": "<b>"},
        },
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": None},
        {},
    ):
        assert list(with_known_words(config).items()) == list(config.items())
    both = {"extra_special_tokens": ["<a>", "<b>"], "additional_special_tokens": ["<b>", "<c>"]}
    assert with_known_words(both) == {"additional_special_tokens": ["<b>", "<c>", "<a>"]}
    named = {"model_specific_special_tokens": {"image_token": "<i>"}}
    assert with_known_words(named) == {"extra_special_tokens": {"image_token": "<i>"}}


# Chat templates.

SEVERAL = [{"name": "default", "template": OWN}, {"name": "tool_use", "template": OWN + " "}]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"chat_template": SEVERAL}, {}),
        ({"chat_template": OWN}, {}),
        ({}, {"chat_template.jinja": OWN.encode() + b"\r\n\r\n"}),
        ({}, {"chat_template.jinja": OWN.encode(), "additional_chat_templates/tool_use.jinja": b"{{ 1 }}\r\n\n"}),
    ],
)
def test_templates_go_out_as_they_came_one_or_several_with_names(config, files, tmp_path):
    source = make_source(tmp_path / "source", "words", config=config, files=files)
    out = settled(source, tmp_path / "out", hf.load_tokenizer(str(source)))
    for path in sorted(source.rglob("*")):
        if path.is_file():
            assert (out / path.relative_to(source)).read_bytes() == path.read_bytes(), path
    assert sorted(path.name for path in out.rglob("*.jinja")) == sorted(path.name for path in source.rglob("*.jinja"))


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_template_of_ours_goes_out_as_its_file_is(name, tmp_path):
    source = make_source(tmp_path / "source", "words", config={"chat_template": SEVERAL})
    out = settled(source, tmp_path / "out", opened(source, name).tokenizer)
    assert (out / "chat_template.jinja").read_bytes() == template_text(name).encode()
    assert "chat_template" not in read(out / "tokenizer_config.json")
    assert not (out / "additional_chat_templates").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"{#- A comment -#}\r\n" + OWN.encode() + b"\r\n\r\n",
        b"  \n" + OWN.encode(),
        OWN.encode() + "\n\té  \n\n".encode(),
    ],
)
def test_a_user_s_template_goes_out_to_the_byte(content, tmp_path):
    source = make_source(tmp_path / "source", "words")
    (tmp_path / "mine.jinja").write_bytes(content)
    out = settled(source, tmp_path / "out", opened(source, str(tmp_path / "mine.jinja")).tokenizer)
    assert (out / "chat_template.jinja").read_bytes() == content


def test_an_eos_token_that_is_set_is_said_in_both_files_and_nothing_else_changes(tmp_path):
    source = make_source(tmp_path / "source", "bytes", config={"added_tokens_decoder": {}})
    tokenizer = opened(source, "chatml", set_eos=True)
    out = settled(source, tmp_path / "out", tokenizer.tokenizer)
    config, special = read(out / "tokenizer_config.json"), read(out / "special_tokens_map.json")
    assert config["eos_token"] == special["eos_token"] == "<|im_end|>"
    assert config["bos_token"] == special["bos_token"] == "<s>"
    # The one that was it stays a control token.
    listed = ["<|im_start|>", "<|im_end|>", "</s>"]
    assert config["additional_special_tokens"] == special["additional_special_tokens"] == listed
    assert {2, *tokenizer.stops} <= {*hf.load_tokenizer(str(out)).all_special_ids}
    assert {2, *tokenizer.stops} <= {*tokenizer.tokenizer.all_special_ids}
    assert hf.load_tokenizer(str(out)).eos_token_id == tokenizer.stops[0]
