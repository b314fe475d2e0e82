"""How far two texts say the same, in whole words and marks: `<|im_start|>` and `<|im_end|>` have nothing in common.

In: texts that a template wrote around messages. Out: places in them, such as where two headers part. Nothing here knows
a conversation.
"""

import re


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def whole_length(one: str, other: str) -> int:
    """The same, up to the end of a word or of a mark in both, or of all of the first text.

    whole_length("<|end|>\\n<|user|>", "<|end|>\\n<|model|>") is 8
    whole_length("Yes, no one", "Yes, not one")             is 5
    whole_length("Yes, no", "Yes, not")                     is 7
    """
    same = common_length(one, other)
    if same == len(one):
        return same
    while same and not (is_border(one, same) and is_border(other, same)):
        same -= 1
    return same


def is_border(text: str, at: int) -> bool:
    """Whether a word or a mark ends before a character."""
    if at in (0, len(text)):
        return True
    return text[at].isspace() or text[at] in "<[" or text[at - 1].isspace() or text[at - 1] in ">]"


def header_end(header: str, text: str, at: int) -> int:
    """The end of a header that begins at a place of a text; of the blanks at its end, as many as the text has."""
    words = len(header.strip())
    blanks = header.lstrip()[words:]
    return at + words + common_length(blanks, text[at + words : at + words + len(blanks)])


def parting(tail: str, gap: str) -> int:
    """How far `gap` says the same as the end of a prompt, blanks aside, up to the end of a word or of a mark.

    parting("<turn>model\\n<think>", "<turn>model\\nYes")  is 12: the newline is in both
    parting("\\nAssistant:", "\\n\\nAssistant: Yes")      is 12: one newline more changes nothing
    parting("<|a|><|think|>", "<|a|><|text|>")          is 5: `<|t` is no common beginning
    """
    at = here = same = 0
    while True:
        if at < len(tail) and here < len(gap) and tail[at] == gap[here]:
            at, here = at + 1, here + 1
            is_end = at == len(tail) or tail[at].isspace() or tail[at] in "<["
            if is_end or tail[at - 1].isspace() or tail[at - 1] in ">]":
                same = here
        elif at < len(tail) and tail[at].isspace():
            at += 1
        elif here < len(gap) and gap[here].isspace():
            here += 1
        else:
            return same


def held(header: str, gap: str) -> str:
    """As much of a header as stands in a text.

    held("<|a|>model\\n<think>", "<|e|><|a|>model\\nYes") is "<|a|>model\\n"
    """
    begins = [at for at in range(len(gap)) if gap[at] == header[:1]]
    found = max(begins, key=lambda at: parting(header, gap[at:]), default=0)
    return gap[found : found + parting(header, gap[found:])]


def similar_end(header: str, gap: str) -> int | None:
    """Where in a text a header ends that is made like another one, with the same marks and any role's word.

    As much of the other one as possible, a mark at least; None where there is none.

    similar_end("<|a|>model\\n<think>", "<|e|><|a|>tool\\n{}") is 15
    similar_end("model<|a|>", "<|e|>tool<|a|>{}")            is 14
    """
    pieces = [match.group() for match in _HEADER_PIECE.finditer(header)]
    for size in range(len(pieces), 0, -1):
        some = pieces[:size]
        is_word = [piece[0] not in "<[" and not piece.isspace() for piece in some]
        if not any(piece[0] in "<[" for piece in some):
            break
        # A word that no mark and no blank ends goes on to wherever the next mark is.
        if all(is_word) or (is_word[-1] and size < len(pieces)) or (size < len(pieces) and not any(is_word)):
            continue
        pattern = "".join(_ANY_WORD if word else re.escape(piece) for piece, word in zip(some, is_word, strict=True))
        if found := [match.end() for match in re.finditer(pattern, gap)]:
            return found[-1]
    return None


_HEADER_PIECE = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\s+|[^\s<>\[\]](?:[^<>\[\]\n]*[^\s<>\[\]])?|.", re.DOTALL)
_ANY_WORD = r"[^<>\[\]\n]+"
