"""Exchanges of a conversation: a question, or several in a row, and all that follows up to the next one.

In: a conversation. Out: where its last exchange begins, or the conversation without its oldest one.
"""

from collections.abc import Sequence

from jaxsft.rows.items import Conversation
from jaxsft.rows.messages import Message

STAYS = ("system", "developer")
"""Roles whose text holds for the whole conversation."""


def last_exchange(messages: Sequence[Message]) -> int:
    """Index of the first message after the last that a user says; 0 where none does."""
    return max((index + 1 for index, message in enumerate(messages) if message["role"] == "user"), default=0)


def without_oldest(conversation: Conversation) -> Conversation | None:
    """The conversation without its first exchange, system texts aside; None where it has but one.

    system, user 1, assistant 1, user 2, assistant 2  becomes  system, user 2, assistant 2. What an assistant says
    before the first question goes first, as an exchange of its own.
    """
    roles = [message["role"] for message in conversation.messages]
    begins = [
        index
        for index, role in enumerate(roles)
        if role == "user" and not (index and [r for r in roles[:index] if r not in STAYS][-1:] == ["user"])
    ]
    spoken = next((index for index, role in enumerate(roles) if role not in STAYS), len(roles))
    later = [index for index in begins if index > spoken]
    if not later:
        return None
    kept = [index for index, role in enumerate(roles) if index >= later[0] or role in STAYS]
    num_gone = sum(index < conversation.trained_from for index in set(range(len(roles))) - set(kept))
    return conversation._replace(
        messages=[conversation.messages[index] for index in kept],
        trained_from=max(0, conversation.trained_from - num_gone),
    )
