"""Writes the quickstart: a tokenizer, a model config and instruction data small enough to learn in two minutes.

    python configs/quickstart/make_data.py [FOLDER]

Everything follows from the seed below, so that a second run writes the same bytes; nothing but the standard library is
needed. The files go next to this script unless FOLDER is given:

    train.jsonl, eval.jsonl     {"messages": [{"role": ..., "content": ...}, ...]}, one conversation per line
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    config.json, generation_config.json

The conversations ask for something to be done with a word: spell it, put it in capitals, say it twice. Each request has
exactly one right answer, so a model can be judged by exact match of its last answer. Words are made up here and those of
eval.jsonl never occur in train.jsonl: what is measured is the skill, not the memory. A system prompt, where there is
one, changes what every answer looks like; a second request leans on the first ("Now in capitals.").
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
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
        ("Spell {word}.", "How do you spell {word}?", "Can you spell {word} for me?", "Please spell the word {word}."),
        ("Now spell it.", "And how is it spelled?"),
        lambda word: "-".join(word),
    ),
    "capitals": Task(
        ("Write {word} in capitals.", "Put {word} in capital letters.", "What is {word} in capitals?"),
        ("Now in capitals.", "And in capital letters?"),
        str.upper,
    ),
    "first": Task(
        ("What is the first letter of {word}?", "Which letter does {word} begin with?", "First letter of {word}?"),
        ("And the first letter?", "Which letter does it begin with?"),
        lambda word: word[0],
    ),
    "last": Task(
        ("What is the last letter of {word}?", "Which letter does {word} end with?", "Last letter of {word}?"),
        ("And the last letter?", "Which letter does it end with?"),
        lambda word: word[-1],
    ),
    "repeat": Task(
        ("Please repeat {word}.", "Repeat after me: {word}", "Just say {word}."),
        ("Now repeat it.", "Please say it once more."),
        lambda word: word,
    ),
    "twice": Task(
        ("Say {word} twice.", "Write {word} two times.", "Please say {word} two times."),
        ("Now say it twice.", "And two times?"),
        lambda word: f"{word} {word}",
    ),
    "plural": Task(
        ("One {word}, two what?", "What is the plural of {word}?", "I have one {word}. You have two what?"),
        ("And the plural?", "What are two of them called?"),
        lambda word: f"{word}s",
    ),
    "reverse": Task(
        ("Reverse {word}.", "Spell {word} backwards.", "What is {word} backwards?"),
        ("Now backwards.", "And the other way round?"),
        lambda word: word[::-1],
    ),
    "greet": Task(
        ("My name is {name}.", "Hello, I am {name}.", "Hi! They call me {name}."),
        ("Now say hello to it.", "It is a name. Say hello!"),
        lambda word: f"Hello {word.title()}!",
    ),
}

SAME_AGAIN = ("And {word}?", "Now the same with {word}.")
"""Second requests that ask for the first request's task with another word."""


class Manner(NamedTuple):
    """What a system prompt asks of every answer: ways to say it, what it does to an answer."""

    prompts: tuple[str, ...]
    apply: Callable[[str], str]


MANNERS = {
    "capitals": Manner(("Answer in capitals.", "Use capital letters only."), str.upper),
    "dot": Manner(("End every answer with a dot.", "Put a dot after each answer."), lambda answer: f"{answer}."),
    "sure": Manner(("Start every answer with Sure.", "Always say Sure first."), lambda answer: f"Sure: {answer}"),
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
    "letter",
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
"""Ordinary words, kept for eval.jsonl alone."""


def make_word(rng: random.Random) -> str:
    """Returns a made-up word of 3 to 8 letters that one can pronounce."""
    while True:
        word = rng.choice(ONSETS) if rng.random() < 0.85 else ""
        word += rng.choice(VOWELS)
        shape = rng.random()
        if shape < 0.35:
            word += rng.choice(CODAS)
        elif shape < 0.7:
            word += rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.4 else "")
        else:
            word += rng.choice("bdgklmnprst") * rng.choice((1, 2)) + rng.choice(ENDINGS)
        if 3 <= len(word) <= 8:
            return word


def make_words(rng: random.Random) -> Iterator[str]:
    """Yields made-up words, no word twice and none that is an ordinary one of ours."""
    seen = set(FAMILIAR_WORDS)
    while True:
        word = make_word(rng)
        if word not in seen:
            seen.add(word)
            yield word


# ----------------------------------------------------------------------------------------------------- conversations


class Conversation(NamedTuple):
    """A conversation, its kind ("spell", "spell, dot", "spell, then", ...) and the words that it is about."""

    kind: str
    messages: list[dict[str, str]]
    words: tuple[str, ...]


def make_conversation(
    rng: random.Random, words: Iterator[str], *, task: str, manner: str | None, turns: str
) -> Conversation:
    """Makes one conversation whose last answer does `task`.

    Args:
        words: where new words come from.
        manner: the system prompt, or None for none.
        turns: "one", "then" (another task first, then `task` with the same word) or "again" (`task` with two words).
    """
    shape = MANNERS[manner].apply if manner else lambda answer: answer
    messages, used = [], [next(words)]

    def say(request: str, done: str):
        messages.append({"role": "user", "content": request.format(word=used[-1], name=used[-1].title())})
        messages.append({"role": "assistant", "content": shape(TASKS[done].answer(used[-1]))})

    if manner:
        messages.append({"role": "system", "content": rng.choice(MANNERS[manner].prompts)})
    if turns == "then":
        before = rng.choice([name for name in TASKS if name != task])
        say(rng.choice(TASKS[before].requests), before)
        say(rng.choice(TASKS[task].follow_ups), task)
    else:
        say(rng.choice(TASKS[task].requests), task)
        if turns == "again":
            used.append(next(words))
            say(rng.choice(SAME_AGAIN), task)
    kind = task + (f", {manner}" if manner else "") + (f", {turns}" if turns != "one" else "")
    return Conversation(kind, messages, tuple(used))


def make_conversations(rng: random.Random, words: Iterator[str], *, count: int) -> list[Conversation]:
    """Makes `count` conversations: each task in turn; of ten, five plain, two with a system prompt, three of two turns."""
    conversations = []
    for index in range(count):
        task = list(TASKS)[index % len(TASKS)]
        manner = rng.choice(list(MANNERS)) if rng.random() < 0.3 else None
        turns = rng.choice(("one", "one", "one", "then", "again"))
        conversations.append(make_conversation(rng, words, task=task, manner=manner, turns=turns))
    rng.shuffle(conversations)
    return conversations


def make_splits(seed: int = SEED) -> tuple[list[Conversation], list[Conversation]]:
    """Makes the conversations for training and for evaluation; they share no word and no prompt."""
    rng = random.Random(seed)
    words = make_words(rng)
    train = make_conversations(rng, words, count=NUM_TRAIN)
    new = [word for word, _ in zip(words, range(NUM_EVAL), strict=False)] + FAMILIAR_WORDS
    rng.shuffle(new)
    evaluation = make_conversations(rng, iter(new * 2), count=NUM_EVAL)

    def prompts(conversations: list[Conversation]) -> set[str]:
        return {json.dumps(conversation.messages[:-1]) for conversation in conversations}

    def words_of(conversations: list[Conversation]) -> set[str]:
        return {word for conversation in conversations for word in conversation.words}

    assert not words_of(train) & words_of(evaluation), "a word of eval occurs in train"
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
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
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
