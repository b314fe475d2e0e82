"""Which turns of a row are trained, and which parts of a turn, in the words of the trainers that people come from.

In: the keys of a turn, or of a block of its content. Out: `weight` (a float) and `train` (true: trained whatever its
role); and for parts, the weights of ranges of characters. A key that nobody knows and that could say "not this one" is
refused until the config says what it means.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxsft.rows.strict import BadRow, inner_json, kind_of, short

MAX_WEIGHT = 1e6
"""Largest weight of a turn or a row: more than anybody can mean, and small enough for exact sums in float32."""


class Sense(NamedTuple):
    """What a key says."""

    values: str
    """What it takes: "flag" (true or false), "number", or "either"."""
    is_inverted: bool = False
    """True says that it is not trained."""
    any_role: bool = False
    """Where it says yes, the turn is trained whatever its role; else only turns of the roles of `data.train_on` are."""


SENSES = {
    "train": Sense("flag", any_role=True),
    "training": Sense("flag", any_role=True),
    "trainable": Sense("flag", any_role=True),
    "weight": Sense("number"),
    "loss": Sense("either"),
    "loss_scale": Sense("either"),
    "step_loss_mask": Sense("either"),
    "loss_mask": Sense("either", any_role=True),
    "loss_weight": Sense("either", any_role=True),
    "masked": Sense("flag", is_inverted=True),
}
"""Key of a turn or a block -> what it says. Where there are several, their weights are multiplied."""

DETAILS = ("train_detail", "training_detail")
"""Axolotl's ranges of characters of a turn's content."""

CONTENT_WEIGHTS, REASONING_WEIGHTS = "content_weights", "reasoning_weights"
"""Keys of a message: the weights of parts of its content or reasoning, beside that of the turn."""

OURS = ("weight", "train", CONTENT_WEIGHTS, REASONING_WEIGHTS)
"""Keys of a message that say how it is trained, and that no template sees."""

COUNTERS = {
    "id", "index", "idx", "turn", "turn_id", "turn_index", "message_id", "message_index", "position", "round", "step",
    "eot", "ipython", "contains_media",
}  # fmt: skip
"""Keys whose 0 and 1 are known to be no flags."""

Ranges = list[tuple[int, int, float]]
"""(first character, end, weight): those of another weight than 1, in order."""


def read_flags(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """Takes the flags out of a turn or a block, and gives them as `weight` and `train`; {} where there are none.

    Raises:
        BadRow: a value that is no flag or no weight.
    """
    if SENSES.keys().isdisjoint(turn):
        return {}
    given = [name for name in SENSES if name in turn]
    weight, says_yes = 1.0, False
    for name in given:
        sense, value = SENSES[name], turn.pop(name)
        at = f"{where}: {name}"
        if sense.values == "flag" or (sense.values == "either" and isinstance(value, bool)):
            factor = float(read_flag(value, at) != sense.is_inverted)
        else:
            factor = read_weight(value, f"{where}: ", name)
        weight *= factor
        says_yes |= sense.any_role and factor > 0
    return {"weight": weight, "train": True} if says_yes and weight else {"weight": weight}


def read_weight(value: Any, where: str, name: str = "weight") -> float:
    """A weight: a number from 0 that float32 can hold and sum."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("bad-weight", f"{where}{name} must be a number, got {short(value)}")
    if not 0 <= value <= MAX_WEIGHT:
        raise BadRow("bad-weight", f"{where}{name} must be from 0 to {MAX_WEIGHT:g}, got {short(value)}")
    return float(value)


def read_flag(value: Any, where: str) -> bool:
    """true or false, also as 1 or 0."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise BadRow("bad-flag", f"{where} must be true or false, got {short(value)}")
    return bool(value)


def read_details(details: Any, length: int, where: str) -> list[tuple[int, int, dict[str, Any]]]:
    """Axolotl's ranges of a content of so many characters as (first character, end, flags), in order and without gaps.

    Both offsets are of characters that belong to the range. What no range names is not trained, as in Axolotl, unless
    all ranges say what is not to be trained.

        [{"begin_offset": 0, "end_offset": 3, "train": False}], 6  ->  [(0, 4, {"weight": 0.0}), (4, 6, {})]
    """
    if isinstance(details, str):
        details = inner_json(details, "train-detail", f"{where}: ")
    if not isinstance(details, list):
        raise BadRow("train-detail", f"{where}: expected a list of ranges, got {kind_of(details)}")
    ranges = []
    for index, detail in enumerate(details):
        at = f"{where}[{index}]"
        if not isinstance(detail, dict):
            raise BadRow("train-detail", f"{at}: expected an object, got {kind_of(detail)}")
        detail = {key: value for key, value in detail.items() if value is not None}
        begin, end = detail.pop("begin_offset", None), detail.pop("end_offset", None)
        flags = read_flags(detail, at)
        if type(begin) is not int or type(end) is not int or not flags or detail:
            reason = f"{at}: expected whole begin_offset and end_offset, and train, got {short(details[index])}"
            raise BadRow("train-detail", reason)
        if not 0 <= begin <= end < length:
            reason = f"{at}: {begin} to {end} (both inside the range) is no range of a content of {length} characters"
            raise BadRow("train-detail", reason)
        ranges.append((begin, end + 1, flags))
    ranges.sort(key=lambda each: each[:2])
    rest: dict[str, Any] = {"weight": 0.0} if any(flags["weight"] for _, _, flags in ranges) else {}
    whole, at_char = [], 0
    for begin, end_char, flags in ranges:
        if begin < at_char:
            raise BadRow("train-detail", f"{where}: ranges overlap at character {begin}")
        whole += [(at_char, begin, rest)] * (at_char < begin) + [(begin, end_char, flags)]
        at_char = end_char
    return whole + [(at_char, length, rest)] * (at_char < length)


def weigh_parts(
    parts: Sequence[tuple[int, int, dict[str, Any]]], role: str, flags: dict[str, Any]
) -> tuple[Ranges, dict[str, Any]]:
    """The weights of parts of a text, given as (first character, end, flags of its own), and the flags of the turn.

    A part without flags has those of its turn. If a part is to be trained whatever its role (`train`), its turn counts
    as trained; if that turn is not the assistant's, its other parts then have weight 0.
    """
    if not any(own for _, _, own in parts):
        return [], flags
    rest = 1.0
    if any(own.get("train") for _, _, own in parts) and flags.get("weight", 1.0) and not flags.get("train"):
        flags = {"weight": flags.get("weight", 1.0), "train": True}
        rest = float(role == "assistant")
    weighed: Ranges = []
    for start, end, own in parts:
        weight = own.get("weight", rest)
        if start == end or weight == 1:
            continue
        if weighed and weighed[-1][1:] == (start, weight):
            weighed[-1] = (weighed[-1][0], end, weight)
        else:
            weighed.append((start, end, weight))
    return weighed, flags


def within(weights: Ranges, start: int, end: int) -> Ranges:
    """The weighted ranges that fall into a part of a text, counted from the first character of the part.

    within([(0, 4, 0.0)], 2, 9) == [(0, 2, 0.0)]
    """
    cut = [(max(a, start) - start, min(b, end) - start, weight) for a, b, weight in weights]
    return [(a, b, weight) for a, b, weight in cut if a < b]


def is_untrained(text: str, weights: Ranges) -> bool:
    """Whether every character of a text has weight 0, blanks aside."""
    trained, at = "", 0
    for start, end, weight in weights:
        trained += text[at:start] + (text[start:end] if weight else "")
        at = end
    return not (trained + text[at:]).strip()


def refuse_flags(unknown: Mapping[str, Sequence[Any]], where: str, ignored: Collection[str]) -> None:
    """Refuses keys that nobody knows and that could say which turns are trained.

    Args:
        unknown: key -> the values that the turns of a row have under it.
        where: of the turns.
        ignored: keys that the config takes for harmless.

    Raises:
        BadRow: the first such key.
    """
    for name, values in unknown.items():
        if name not in ignored and name.lower() not in COUNTERS and could_be_flag(values):
            shown = ", ".join(dict.fromkeys(short(value) for value in values))
            raise BadRow(
                "unknown-flag",
                f"{where}: the key {name!r} ({shown}) could say which turns are trained, and is not known; name it in "
                f"data.ignore_keys, or say what it means by `keys` (theirs: ours), such as {{{name}: train}}, or "
                f"{{{name}: masked}} where true says that a turn is not trained",
            )


def could_be_flag(values: Sequence[Any]) -> bool:
    """Whether the values may be flags: some are true or false, or some are 0 or 1 and no number is beyond these."""
    if any(isinstance(value, bool) for value in values):
        return True
    if any(isinstance(value, str) and value.strip().lower() in ("true", "false") for value in values):
        return True
    numbers = [value for value in values if isinstance(value, int | float)]
    return any(value in (0, 1) for value in numbers) and all(0 <= value <= 1 for value in numbers)
