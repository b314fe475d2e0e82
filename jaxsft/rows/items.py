"""What a row holds, whatever its format: a conversation, plain text, or tokens."""

from typing import Any, NamedTuple

from jaxsft.rows.messages import Message


class Conversation(NamedTuple):
    """Messages of one row, as chat templates take them."""

    messages: list[Message]
    """Dicts with role, content, reasoning_content, tool_calls, tool_call_id, name, and what says how they are trained
    (`flags.py`) where the data has it; other keys of the data stay as they are."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}
    """Further variables of the chat template."""
    trained_from: int = 0
    """Messages before this index are never trained: the prompt of a prompt/completion row."""
    origin: str = ""
    weight: float = 1.0
    """Multiplies the weight of everything that is trained in it."""
    train_on: str | None = None
    """"last_turn" where the row asks for it, whatever the config says."""
    unread_keys: dict[str, int] = {}
    """Keys of its messages that nobody reads, and how many messages have them."""


class Document(NamedTuple):
    """Plain text, all of it trained or, where `trained` is given, only those parts of it (first character, end)."""

    text: str
    origin: str = ""
    weight: float = 1.0
    trained: tuple[tuple[int, int], ...] | None = None


class Tokenised(NamedTuple):
    """Tokens, as the row has them."""

    tokens: list[int]
    loss_weights: list[float]
    """Weight of each token as a target."""
    origin: str = ""


Item = Conversation | Document | Tokenised
