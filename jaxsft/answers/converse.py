"""Talking to a model folder in the terminal.

In: a model folder or a run, and lines that the user types. Out: the model's answers, token by token, and its calls of
the tools that it was offered, whose results the user types as well.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxsft.answers.calls import show_call, take_apart
from jaxsft.answers.generate import Generator, Sampling
from jaxsft.chat.encoder import ChatEncoder, asking_encoder
from jaxsft.config import ConfigError, MeshConfig, ModelConfig
from jaxsft.disk.writing import place, read_file
from jaxsft.folders.pretrained import load_weights, open_model, open_tokenizer
from jaxsft.mesh import make_mesh
from jaxsft.rows.calls import read_tools
from jaxsft.rows.messages import Message
from jaxsft.rows.sources import DataError
from jaxsft.rows.strict import BadRow
from jaxsft.training.checkpoint import sealed_steps


def model_of(path: str) -> str:
    """A model as it is, and of a run the folder of its export.

    Raises:
        ConfigError: the run has no export yet; says what makes one.
    """
    folder = place(path)
    if not folder.is_dir() or _is_model(folder) or not (folder / "config.yaml").exists():
        return path
    if _is_model(folder / "export"):
        return str(folder / "export")
    if sealed_steps(folder / "checkpoints"):
        raise ConfigError(f"{path}: this run has no export yet; `python run.py export {path}` writes one")
    raise ConfigError(f"{path}: this run has no checkpoint yet, of which an export could be made; train on first")


def _is_model(folder: Any) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json"))


def load_tools(path: str) -> list[dict[str, Any]]:
    """Tools from a JSON file: a list of functions, with or without the wrapping of OpenAI's API.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    text = load_text(path, "--tools")
    try:
        tools = read_tools(json.loads(text))
    except BadRow as error:
        raise ConfigError(f"--tools {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--tools {path}: no JSON: {error}") from None
    if not tools:
        raise ConfigError(f"--tools {path}: no tool in it; expected a list of functions with name and parameters")
    return tools


def load_text(path: str, option: str) -> str:
    """A text file that an option names, without blanks around it.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_file(place(path)).decode("utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {path}: not readable: {getattr(error, 'strerror', None) or error}") from None


def converse(
    model_dir: str,
    *,
    system: str | None,
    sampling: Sampling,
    max_new_tokens: int,
    tools: Sequence[dict[str, Any]] = (),
) -> None:
    """Reads what the user says line by line, and shows each answer as it is made; the conversation is kept.

    `/new` begins a new conversation; an empty line, `/quit` or the end of the input ends it. Where the model calls a
    tool, the next line is its result.

    Raises:
        ConfigError: no usable model in the folder, or its chat template does not show tools.
    """
    model_dir = model_of(model_dir)
    config = ModelConfig(path=model_dir, remat="none")
    tokenizer = open_tokenizer(config)
    encoder = asking_encoder(tokenizer.tokenizer)
    offered = list(tools) or None
    if offered:
        _check_shown(encoder, offered, model_dir)
    pretrained = open_model(config, tokenizer)
    mesh = make_mesh(MeshConfig())
    weights = load_weights(pretrained, mesh, seed=0)
    generator = Generator(pretrained.model, mesh, stop_ids=tokenizer.stops)
    beginning: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)

    def answer() -> str:
        prompt = encoder.prompt(messages, tools=offered)
        found = ""
        tokens = generator.stream(weights, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
        for piece in _pieces(tokens, tokenizer.tokenizer, generator.stop_ids):
            print(piece, end="", flush=True)
            found += piece
        print()
        return found.strip()

    print(f"{model_dir}: {len(pretrained.decoder_config.layers)} layers; /new begins anew, an empty line ends")
    num_calls = 0
    while (line := _line("> ")) is not None:
        if line == "/new":
            messages = list(beginning)
            continue
        before = len(messages)
        messages.append({"role": "user", "content": line})
        while messages[-1]["role"] != "assistant":
            try:
                said = take_apart(answer(), tools, first_id=num_calls + 1)
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
                del messages[before:]
                break
            num_calls += len(said.calls)
            messages.append({"role": "assistant", "content": said.content})
            if said.calls:
                messages[-1]["tool_calls"] = said.calls
            for call in said.calls:
                name = call["function"]["name"]
                print(f"calls {show_call(call)}; the next line is its result")
                if (result := _line(f"{name}> ")) is None:
                    return
                messages.append({"role": "tool", "name": name, "tool_call_id": call["id"], "content": result})


def _check_shown(encoder: ChatEncoder, tools: list[dict[str, Any]], model_dir: str) -> None:
    """Refuses tools that the model would never see.

    Raises:
        ConfigError: the template renders the same without them.
    """
    asked: list[Message] = [{"role": "user", "content": "hi"}]
    try:
        is_shown = encoder.prompt(asked, tools=tools) != encoder.prompt(asked)
    except DataError as error:
        raise ConfigError(f"{model_dir}: --tools: the chat template refuses them: {error}") from None
    if not is_shown:
        raise ConfigError(f"{model_dir}: --tools: its chat template shows no tools to the model; leave them out")


def _line(prompt: str) -> str | None:
    """What the user types; None at the end."""
    try:
        line = input(prompt if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if line in ("", "/quit") else line


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
