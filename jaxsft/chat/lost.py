"""What of a conversation its renders leave out: nobody could learn from it, and nobody would notice.

In: a conversation, and the layouts of its renders. Out: nothing, or a `MaskError` that names the part that is missing.
"""

import re
from collections.abc import Sequence

from jaxsft.chat.layout import SPEECH, Layout
from jaxsft.chat.named_templates import listed, that_show
from jaxsft.chat.starts import MaskError
from jaxsft.chat.template import REASONING, TOOLS, Source, Traceable
from jaxsft.chat.thinking import ReasoningError
from jaxsft.rows.items import Conversation


def check_shown(conversation: Conversation, traceable: Traceable, layouts: Sequence[Layout], *, name: str) -> None:
    """Refuses a conversation of which the template `name` drops what others than the assistant say, or a tool.

    Answers are checked where they are trained; later they may be shown in part.
    """
    for number, source in enumerate(traceable.sources, start=1):
        if source.message >= 0 and source.field == "content":
            role = conversation.messages[source.message]["role"]
            # Nearly everything is shown by the first layout, that of the whole conversation.
            if role != "assistant" and layouts[0].missing(number):
                missing = min((layout.missing(number) for layout in layouts), key=len)
                if missing:
                    raise _dropped(f"message {source.message + 1} ({role})", role, "content", missing, name)
    wanted = [str((tool.get("function") or tool).get("name") or "") for tool in conversation.tools or []]
    shown = {number for layout in layouts for number in layout.shown}
    names = {source.text for n, source in enumerate(traceable.sources, 1) if source.message == TOOLS and n in shown}
    for tool in wanted:
        if tool and tool not in names:
            raise _dropped("tools", "", "function", tool, name)


def check_answer(traceable: Traceable, index: int, shown: Layout, *, with_reasoning: bool, name: str) -> None:
    """Refuses a trained turn of which the render drops a part."""
    for number, source in enumerate(traceable.sources, start=1):
        if source.message != index or source.field not in SPEECH:
            continue
        if source.field == REASONING and not with_reasoning:
            continue
        if (missing := shown.missing(number)) and not _is_in_id(source, traceable, shown):
            error = _dropped(f"message {index + 1} (assistant)", "assistant", source.field, missing, name)
            raise ReasoningError(str(error), error.code) if source.field == REASONING else error


def _is_in_id(source: Source, traceable: Traceable, shown: Layout) -> bool:
    """Whether the id of a call, which is shown, holds its name: `functions.get_weather:0` stands for both."""
    return source.call >= 0 and any(
        other.message == source.message
        and (other.field, other.call) == ("tool call id", source.call)
        and re.search(rf"(?<![\w-]){re.escape(source.text)}(?![\w-])", other.text)
        and number in shown.shown
        and not shown.missing(number)
        for number, other in enumerate(traceable.sources, start=1)
    )


def _dropped(where: str, role: str, field: str, missing: str, name: str) -> MaskError:
    ours = listed(that_show(role, field))
    return MaskError(
        f"{where}: {name} does not show its {field} ({missing[:60]!r} is not in the text); give a template "
        f"that does as data.chat_template, such as {ours} of ours, or rows without it",
        "field-absent",
    )
