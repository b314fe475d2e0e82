"""Writes the quickstart: a tokenizer, a model config and instruction data small enough to learn in two minutes.

    python configs/quickstart/make_data.py [FOLDER]

Everything follows from the seed below, so that a second run writes the same bytes; nothing but the standard library is
needed. The files go next to this script unless FOLDER is given:

    train.jsonl, eval.jsonl     {"messages": [{"role": ..., "content": ...}, ...]}, one conversation per line
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    config.json, generation_config.json

The conversations ask for something to be done with a word: spell it, put it in capitals, say it twice. Each request has
exactly one right answer, so a model can be judged by exact match of its last answer. Most words are made up, and those
of eval.jsonl never occur in train.jsonl: what is measured is the skill, not the memory. A system prompt, where there is
one, changes what every answer looks like; a second request leans on the first ("Write it in capitals.").
"""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SEED = 17
NUM_TRAIN = 12_000
NUM_EVAL = 256


# ---------------------------------------------------------------------------------------------- what can be asked for


class Task(NamedTuple):
    """One kind of instruction: ways to ask for it, ways to ask for it of the word just talked about, the answer."""

    requests: tuple[str, ...]
    follow_ups: tuple[str, ...]
    answer: Callable[[str], str]


TASKS = {
    "spell": Task(
        ("{word}: please spell it.", "{word}: how is it spelled?"),
        ("Please spell it.", "How is it spelled?"),
        lambda word: "-".join(word),
    ),
    "capitals": Task(
        ("{word} in capitals?", "{word}: write it in capitals."),
        ("In capitals?", "Write it in capitals."),
        str.upper,
    ),
    "first": Task(
        ("{word}: what is the first letter?", "{word}: what does it begin with?"),
        ("What is the first letter?", "What does it begin with?"),
        lambda word: word[0],
    ),
    "last": Task(
        ("{word}: what is the last letter?", "{word}: what does it end with?"),
        ("What is the last letter?", "What does it end with?"),
        lambda word: word[-1],
    ),
    "repeat": Task(
        ("{word}: please repeat it.", "{word}: say it again."),
        ("Please repeat it.", "Say it again."),
        lambda word: word,
    ),
    "twice": Task(
        ("{word} twice, please.", "{word}: say it two times."),
        ("Twice, please.", "Say it two times."),
        lambda word: f"{word} {word}",
    ),
    "plural": Task(
        ("{word}: what are two of them?", "{word}: what is the plural?"),
        ("What are two of them?", "What is the plural?"),
        lambda word: f"{word}s",
    ),
    "backwards": Task(
        ("{word} backwards?", "{word}: please reverse it."),
        ("Backwards?", "Please reverse it."),
        lambda word: word[::-1],
    ),
    "greet": Task(
        ("{name} is my name.", "{name} is what they call me."),
        ("It is my name.", "Say hello to it."),
        lambda word: f"Hello {word.title()}!",
    ),
}


class Manner(NamedTuple):
    """What a system prompt asks of every answer: ways to say it, what it does to an answer."""

    prompts: tuple[str, ...]
    apply: Callable[[str], str]


MANNERS = {
    "in capitals": Manner(("Answer in capitals.", "Use capital letters."), str.upper),
    "with a dot": Manner(("End with a dot.", "Put a dot at the end."), lambda answer: f"{answer}."),
    "with Sure": Manner(("Start with Sure.", "Always say Sure first."), lambda answer: f"Sure: {answer}"),
}


# ------------------------------------------------------------------------------------------------------------- words

ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "y",
    "z",
    "qu",
    "bl",
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "fr",
    "gl",
    "gr",
    "pl",
    "pr",
    "sh",
    "sl",
    "sp",
    "st",
    "th",
    "tr",
]
VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou", "y"]
CODAS = [
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "x",
    "ck",
    "ff",
    "ll",
    "mp",
    "nd",
    "nk",
    "ng",
    "nt",
    "rd",
    "rm",
    "rn",
    "sh",
    "ss",
    "st",
    "tt",
]
ENDINGS = ["er", "le", "ing", "y", "en", "et", "ow", "in", "a", "o"]
FAMILIAR_WORDS = [
    "apple",
    "banana",
    "bottle",
    "bread",
    "bridge",
    "butter",
    "candle",
    "carrot",
    "castle",
    "cherry",
    "coffee",
    "cookie",
    "dragon",
    "flower",
    "forest",
    "garden",
    "guitar",
    "hammer",
    "island",
    "jacket",
    "kitten",
    "lemon",
    "lantern",
    "market",
    "mirror",
    "monkey",
    "orange",
    "pencil",
    "pepper",
    "pillow",
    "planet",
    "potato",
    "puzzle",
    "rabbit",
    "river",
    "rocket",
    "saddle",
    "school",
    "silver",
    "spoon",
    "summer",
    "sunset",
    "teapot",
    "ticket",
    "tiger",
    "tomato",
    "train",
    "tulip",
    "turtle",
    "violin",
    "walnut",
    "water",
    "window",
    "winter",
    "wizard",
    "yellow",
    "zebra",
]
"""Ordinary words, kept for eval.jsonl alone; none that a request is phrased with, such as letter."""
RUDE = [
    "anal",
    "anus",
    "arse",
    "ass",
    "bitch",
    "bum",
    "cock",
    "cok",
    "cum",
    "cun",
    "dick",
    "dik",
    "fag",
    "fart",
    "fuc",
    "fuk",
    "homo",
    "kil",
    "nazi",
    "nig",
    "penis",
    "piss",
    "poo",
    "porn",
]
RUDE += [
    "pric",
    "prik",
    "pus",
    "rape",
    "sex",
    "shag",
    "shit",
    "slut",
    "sperm",
    "suck",
    "tit",
    "turd",
    "twat",
    "vag",
    "wank",
    "whor",
]
"""What no word may contain."""


def make_word(rng: random.Random) -> str:
    """Returns a made-up word that one can pronounce."""
    word = rng.choice(ONSETS) if rng.random() < 0.85 else ""
    word += rng.choice(VOWELS)
    shape = rng.random()
    if shape < 0.35:
        word += rng.choice(CODAS)
    elif shape < 0.7:
        word += rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.4 else "")
    else:
        word += rng.choice("bdgklmnprst") * rng.choice((1, 2)) + rng.choice(ENDINGS)
    return word


def make_words(rng: random.Random, count: int) -> list[str]:
    """Makes `count` different made-up words of 3 to 7 letters, none of them among the familiar ones."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = make_word(rng)
        if 3 <= len(word) <= 7 and word not in FAMILIAR_WORDS and not any(rude in word for rude in RUDE):
            words[word] = None
    return list(words)


# ----------------------------------------------------------------------------------------------------- conversations


class Conversation(NamedTuple):
    """A conversation, its kind: (task of the last turn, manner or "plain", number of answers), and its word."""

    messages: list[dict[str, str]]
    kind: tuple[str, str, int]
    word: str


def make_conversation(rng: random.Random, word: str, *, task: str) -> Conversation:
    """Makes one conversation about `word` whose last answer does `task`; earlier answers, if any, do other tasks.

    Three of ten have a system prompt; half of them ask once, the others twice or, without system prompt, three times.
    """
    manner = rng.choice(list(MANNERS)) if rng.random() < 0.3 else None
    num_answers = rng.choice((1, 1, 2, 2, 2 if manner else 3))
    others = [name for name in TASKS if name != task]
    rng.shuffle(others)
    messages = []
    if manner:
        messages.append({"role": "system", "content": rng.choice(MANNERS[manner].prompts)})
    for turn, name in enumerate([*others[: num_answers - 1], task]):
        request = rng.choice(TASKS[name].follow_ups if turn else TASKS[name].requests)
        answer = TASKS[name].answer(word)
        messages.append({"role": "user", "content": request.format(word=word, name=word.title())})
        messages.append({"role": "assistant", "content": MANNERS[manner].apply(answer) if manner else answer})
    return Conversation(messages, (task, manner or "plain", num_answers), word)


def make_conversations(rng: random.Random, words: list[str]) -> list[Conversation]:
    """Makes a conversation about each word, the tasks in turn."""
    order = [*TASKS, "backwards"]  # It is the hardest.
    return [make_conversation(rng, word, task=order[index % len(order)]) for index, word in enumerate(words)]


def make_splits(seed: int = SEED) -> tuple[list[Conversation], list[Conversation]]:
    """Makes the conversations for training and for evaluation; they share no word and no prompt."""
    rng = random.Random(seed)
    words = make_words(rng, NUM_TRAIN + NUM_EVAL - len(FAMILIAR_WORDS))
    eval_words = [*words[NUM_TRAIN:], *FAMILIAR_WORDS]
    rng.shuffle(eval_words)
    train, evaluation = make_conversations(rng, words[:NUM_TRAIN]), make_conversations(rng, eval_words)

    def prompts(conversations: list[Conversation]) -> set[str]:
        return {json.dumps(conversation.messages[:-1]) for conversation in conversations}

    asked = " ".join(message["content"] for one in train for message in one.messages if message["role"] == "user")
    read = set(re.findall("[a-z]+", asked.lower()))
    assert not read & {one.word for one in evaluation}, "a word of eval occurs in train"
    assert not prompts(train) & prompts(evaluation), "a prompt of eval occurs in train"
    return train, evaluation


# ------------------------------------------------------------------------------------------------ tokenizer and model

SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SPECIAL_IDS = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('This chat template knows the roles system, user and assistant, not ' + message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def byte_characters() -> list[str]:
    """Returns the printable character that stands for each byte in a byte-level tokenizer.json (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def make_tokenizer() -> dict:
    """Returns tokenizer.json: one token per byte of UTF-8, whose id is the byte, then the special tokens."""
    added = [
        {"id": token_id, "content": token, "special": True}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for token, token_id in SPECIAL_IDS.items()
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_characters())},
            "merges": [],
        },
    }


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 512,
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "clean_up_tokenization_spaces": False,
}

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.03,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_IDS["<|end|>"],
    "pad_token_id": SPECIAL_IDS["<|pad|>"],
    "dtype": "float32",
    "transformers_version": "5.23.0",
}

GENERATION_CONFIG = {
    "do_sample": False,
    "eos_token_id": SPECIAL_IDS["<|end|>"],
    "pad_token_id": SPECIAL_IDS["<|pad|>"],
    "transformers_version": "5.23.0",
}


def main(folder: Path):
    """Writes the files of the quickstart into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, conversations in zip(("train.jsonl", "eval.jsonl"), make_splits(), strict=True):
        lines = [json.dumps({"messages": conversation.messages}) + "\n" for conversation in conversations]
        (folder / name).write_text("".join(lines), encoding="utf-8", newline="\n")
    for name, content in {
        "tokenizer.json": make_tokenizer(),
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "config.json": MODEL_CONFIG,
        "generation_config.json": GENERATION_CONFIG,
    }.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
