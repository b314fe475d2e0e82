"""Rows that are tokens already: `input_ids` with labels or masks become tokens and loss weights.

In: the columns of one row. Out: token ids, and the weight of each token as a target. Whether the ids are those of the
model's tokenizer cannot be seen here.

    input_ids [5, 6, 7, 2], labels [-100, -100, 7, 2]   ->   tokens [5, 6, 7, 2], loss_weights [0, 0, 1, 1]

Labels are unshifted, as in transformers: labels[t] is input_ids[t], or -100 where token t is not trained. The first
token is nobody's target, so its weight is 0. Several of labels and masks multiply; with none, all is trained.
"""

from typing import Any

from jaxsft.rows.flags import MAX_WEIGHT
from jaxsft.rows.strict import BadRow, inner_json, kind_of

MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
UNTRAINED = -100


def read_tokens(fields: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens and loss weights of one row.

    Raises:
        BadRow: ids that are no ids; labels or masks that do not fit them; padding; several examples in the row.
    """
    tokens = _listed(fields["input_ids"], "input_ids")
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise BadRow("bad-token-ids", "input_ids: expected a list of whole numbers from 0, one per token")
    if len(tokens) < 2:
        raise BadRow("bad-token-ids", f"input_ids: at least 2 tokens are needed, got {len(tokens)}")
    weights = [0.0] + [1.0] * (len(tokens) - 1)
    _check_whole(fields, tokens)
    if "labels" in fields:
        labels = _column(fields, "labels", len(tokens))
        _check_labels(labels, tokens)
        weights = [0.0 if label == UNTRAINED else weight for label, weight in zip(labels, weights, strict=True)]
    for name in MASKS:
        if name in fields:
            mask = _column(fields, name, len(tokens))
            if not all(_is_weight(value) and (name == "loss_mask" or value in (0, 1)) for value in mask):
                kinds = f"numbers from 0 to {MAX_WEIGHT:g}" if name == "loss_mask" else "0 and 1"
                raise BadRow("bad-mask", f"{name}: expected only {kinds}")
            weights = [weight * float(value) for weight, value in zip(weights, mask, strict=True)]
    if not any(weights):
        raise BadRow("nothing-trained", "no token after the first is trained: labels are all -100, or masks all 0")
    return tokens, weights


def _check_whole(fields: dict[str, Any], tokens: list[int]) -> None:
    """The row is one example: not padded, and not several packed together."""
    if "attention_mask" in fields:
        mask = _column(fields, "attention_mask", len(tokens))
        if any(value != 1 for value in mask):
            reason = "attention_mask: expected only 1; leave padding out of the rows, packing and padding are done here"
            raise BadRow("padded-row", reason)
    if "position_ids" in fields and _column(fields, "position_ids", len(tokens)) != list(range(len(tokens))):
        reason = "position_ids: expected 0, 1, 2, ...; a row is one example, packing is done here"
        raise BadRow("packed-row", reason)


def _check_labels(labels: list[Any], tokens: list[int]) -> None:
    if not all(type(label) is int for label in labels):
        raise BadRow("bad-labels", "labels: expected whole numbers, the token's own id or -100")
    wrong = [at for at, label in enumerate(labels) if label not in (UNTRAINED, tokens[at])]
    if not wrong:
        return
    reason = f"labels[{wrong[0]}] is {labels[wrong[0]]}, input_ids[{wrong[0]}] is {tokens[wrong[0]]}"
    if all(label in (UNTRAINED, following) for label, following in zip(labels, tokens[1:], strict=False)):
        reason += "; they look shifted by one: labels[t] must be token t itself, not the next"
    raise BadRow("labels-contradict", f"{reason}; expected the same id, or -100 where it is not trained")


def _column(fields: dict[str, Any], name: str, length: int) -> list[Any]:
    column = _listed(fields[name], name)
    if not isinstance(column, list):
        raise BadRow("wrong-type", f"{name}: expected a list, got {kind_of(column)}")
    if len(column) != length:
        raise BadRow("length-mismatch", f"{name} has {len(column)} values, input_ids {length}")
    return column


def _listed(value: Any, name: str) -> Any:
    """A list; files that know none, such as CSV, have its JSON."""
    is_text = isinstance(value, str) and value.lstrip().startswith("[")
    return inner_json(value, "wrong-type", f"{name}: ") if is_text else value


def _is_weight(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= MAX_WEIGHT
