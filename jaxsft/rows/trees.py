"""Message trees (OpenAssistant's export): one row holds a prompt, its replies, their replies, and so on.

In: the `prompt` node of a tree. Out: paths through it, each the turns of one conversation that ends with an answer.
Deleted messages, and those that a review turned down, are left out with all that follows them.
"""

from typing import Any

from jaxsft.rows.strict import BadRow, check_text, inner_json, kind_of

Node = dict[str, Any]


def all_paths(root: Any) -> list[list[Node]]:
    """Every path from the root to an answer after which no other answer comes, in the order of the file.

    What several paths share (a first question and its answer, say) stands in each of them.
    """
    paths: list[list[Node]] = []
    _walk(_checked(root, "prompt"), [], "prompt", paths)
    return paths


def best_path(root: Any) -> list[list[Node]]:
    """The path that takes the best answer each time (rank 0 is best), and the first question after it that has one."""
    path, replies = [], [_checked(root, "prompt")]
    length = 0
    while replies:
        node = replies[0]
        path.append(node)
        if node["role"] == "assistant":
            length = len(path)
        replies = _replies(node, f"prompt, turn {len(path)}")
        if all(reply["role"] == "assistant" for reply in replies):
            replies = sorted(replies, key=_rank)
        else:
            # Questions are not ranked; one that nobody answered leads nowhere.
            replies = [reply for reply in replies if _replies(reply, "prompt")] or replies
    return [path[:length]] if length else []


def _walk(node: Node, before: list[Node], where: str, paths: list[list[Node]]) -> None:
    path, found = [*before, node], len(paths)
    for index, reply in enumerate(_replies(node, where)):
        _walk(reply, path, f"{where}.replies[{index}]", paths)
    if node["role"] == "assistant" and len(paths) == found:
        paths.append(path)


def _replies(node: Node, where: str) -> list[Node]:
    replies = node.get("replies") or []
    if isinstance(replies, str) and replies.lstrip().startswith("["):
        replies = inner_json(replies, "bad-tree", f"{where}: replies: ")
    if not isinstance(replies, list):
        raise BadRow("bad-tree", f"{where}: replies must be a list of messages, got {kind_of(replies)}")
    read = [_checked(reply, f"{where}.replies[{index}]") for index, reply in enumerate(replies)]
    return [reply for reply in read if not reply.get("deleted") and reply.get("review_result") is not False]


def _checked(node: Any, where: str) -> Node:
    if isinstance(node, str) and node.lstrip().startswith("{"):
        node = inner_json(node, "bad-tree", f"{where}: ")
    if not isinstance(node, dict) or not isinstance(node.get("role"), str):
        raise BadRow("bad-tree", f"{where}: expected a message with role, text and replies, got {kind_of(node)}")
    if not isinstance(node.get("text"), str):
        raise BadRow("bad-tree", f"{where}: a message without text")
    check_text(node["text"], f"{where}: text")
    return {**node, "role": "user" if node["role"] == "prompter" else node["role"]}


def _rank(node: Node) -> float:
    rank = node.get("rank")
    return rank if isinstance(rank, int | float) else float("inf")
