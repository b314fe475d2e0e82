"""What transformers renders of a conversation: every text of ours is compared with it.

In: messages. Out: the text of `apply_chat_template`. Transformers renders without any limit, so only what was rendered
here before.
"""

import functools
from collections.abc import Sequence
from typing import Any

from jaxsft.chat.control import Tokenizer
from jaxsft.rows.messages import Message


class Theirs:
    """Renders as transformers does, for one tokenizer and the config's variables; picklable."""

    def __init__(self, tokenizer: Tokenizer, variables: dict[str, Any]) -> None:
        self._tokenizer, self._variables = tokenizer, variables
        self._source = tokenizer.get_chat_template() if _has_one(tokenizer) else None
        fixed = {"tools": None, "documents": None, "add_generation_prompt": False}
        self._given = {**tokenizer.special_tokens_map, **variables, **fixed}

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, kwargs: dict[str, Any], prompt: bool = False
    ) -> str:
        """The text; may raise anything, as a template does."""
        return self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **self._variables | kwargs
        )

    def render_plain(self, messages: Sequence[Message]) -> str:
        """The same of messages that hold strings and lists of strings by name, by the very template that transformers
        has compiled.

        What `apply_chat_template` does besides is to copy the messages without what is None or no plain data, of which
        there is none, to give reasoning its other names, and to look up the template and the special tokens.
        """
        template = _template(self._source) if self._source is not None else None
        if template is None:
            return self.render(messages, kwargs={})
        return template.render(self._given | {"messages": messages})


def _has_one(tokenizer: Tokenizer) -> bool:
    template = tokenizer.chat_template
    return "default" in template if isinstance(template, dict) else bool(template)


@functools.lru_cache(maxsize=16)
def _template(source: str) -> Any:
    """The program that transformers has compiled; None where a version of it has another way."""
    from transformers.utils import chat_template_utils

    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled is None:
        return None
    found = compiled(source)
    code = {"name": found.name, "__file__": found.filename, "blocks": found.blocks, "root": found.root_render_func}
    lines = "&".join(f"{line}={place}" for line, place in found.debug_info)
    # The same with the functions that it may call in one dict: all of them are gone through in every render, which a
    # chain of maps makes slow.
    return type(found).from_module_dict(found.environment, code | {"debug_info": lines}, dict(found.globals))
