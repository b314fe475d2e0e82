"""Talking to a model folder in the terminal.

In: a model folder, and lines that the user types. Out: the model's answers, token by token.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from jaxsft.answers.generate import Generator, Sampling
from jaxsft.chat.encoder import asking_encoder
from jaxsft.config import MeshConfig, ModelConfig
from jaxsft.folders.pretrained import load_weights, open_model, open_tokenizer
from jaxsft.mesh import make_mesh
from jaxsft.rows.messages import Message
from jaxsft.rows.sources import DataError


def converse(model_dir: str, *, system: str | None, sampling: Sampling, max_new_tokens: int) -> None:
    """Reads what the user says line by line, and shows each answer as it is made; the conversation is kept.

    `/new` begins a new conversation; an empty line, `/quit` or the end of the input ends it.

    Raises:
        ConfigError: no usable model in the folder.
    """
    config = ModelConfig(path=model_dir, remat="none")
    tokenizer = open_tokenizer(config)
    pretrained = open_model(config, tokenizer)
    mesh = make_mesh(MeshConfig())
    weights = load_weights(pretrained, mesh, seed=0)
    encoder = asking_encoder(tokenizer.tokenizer)
    generator = Generator(pretrained.model, mesh, stop_ids=tokenizer.stops)
    beginning: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    print(f"{model_dir}: {len(pretrained.decoder_config.layers)} layers; /new begins anew, an empty line ends")
    for line in _lines():
        if line == "/new":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": line})
        try:
            prompt = encoder.prompt(messages)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        answer = ""
        tokens = generator.stream(weights, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
        for piece in _pieces(tokens, tokenizer.tokenizer, generator.stop_ids):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer.strip()})


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("", "/quit"):
            return
        yield line


def _pieces(tokens: Iterable[int], tokenizer: Any, stop_ids: frozenset[int]) -> Iterator[str]:
    """The text that each token adds; bytes of an unfinished character wait for the rest of it."""
    answer: list[int] = []
    shown = ""
    for token in tokens:
        if token in stop_ids:
            break
        answer.append(token)
        text = tokenizer.decode(answer)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(answer)[len(shown) :]
