"""What a model's files hold, compared with what the model needs, before anything is read from them.

In: a `Stored` (`stored.py`), and the abstract state of a `Decoder`. Out: nothing, or one `ConfigError` that lists every
tensor that is missing, extra or misshapen. Reading the weights is `load.py`.
"""

import fnmatch
from collections.abc import Sequence
from types import ModuleType

import numpy as np
from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.folders.weights.copying import as_bits
from jaxsft.folders.weights.layout import base_prefix, join
from jaxsft.folders.weights.stored import BLOCK_BYTES, DTYPES, SafeTensor, Stored, StoredTensor, as_matrix


def check_weights(
    stored: Stored,
    family: ModuleType,
    abstract: nnx.State,
    *,
    vocab_size: int,
    untied: bool = False,
) -> None:
    """Compares the tensors that are stored with the weights of a model.

    Args:
        stored: what the model's folder holds.
        family: the module of its family; tensors that match its IGNORED are passed over.
        abstract: the model's state; only shapes and axes are looked at.
        vocab_size: rows of the vocabulary in the files.
        untied: the model's own output projection is read from the embedding where the files have none.

    Raises:
        ConfigError: every unreadable file and every missing, extra or misshapen tensor, and those of other dtypes, in
            one report.
    """
    problems = list(stored.problems)
    extra = dict(stored.tensors)
    for weight, _ in join(abstract, family, vocab_size=vocab_size, stored=extra, untied=untied).values():
        for name in map(weight.name, weight.indices()):
            tensor = stored.tensors.get(name)
            # With a file unreadable, its tensors would all be reported missing, which they may not be.
            if tensor is None and not stored.problems:
                problems.append(f"{stored.path}: {name} is missing, expected with shape {list(weight.file_shape)}")
            if tensor is None or name not in extra:
                continue
            del extra[name]
            if tensor.shape != weight.file_shape:
                expected = list(weight.file_shape)
                shape = list(tensor.shape)
                problems.append(f"{tensor.file}: {name} has shape {shape}, but config.json asks for {expected}")
            if tensor.dtype is None:
                given = tensor.word if isinstance(tensor, SafeTensor) else "unknown"
                problems.append(f"{tensor.file}: {name} has dtype {given}; read are {', '.join(DTYPES)}")
    if "lm_head" not in abstract:
        problems += _check_tied(stored, family, extra)
    patterns = getattr(family, "IGNORED", ())
    for name, tensor in extra.items():
        full = base_prefix(family) + name
        if not any(fnmatch.fnmatch(each, pattern) for each in (name, full) for pattern in patterns):
            problems.append(f"{tensor.file}: {name} {list(tensor.shape)} is extra, no weight that config.json asks for")
    if problems:
        raise ConfigError(report("the model's weights do not fit its config.json:", list(dict.fromkeys(problems))))


def _check_tied(stored: Stored, family: ModuleType, extra: dict[str, StoredTensor]) -> list[str]:
    """Takes an output projection out of `extra` where the model uses its embedding as one; tells if the two differ."""
    name = family.WEIGHTS["lm_head.weight"][0]
    embedding = family.WEIGHTS["embed_tokens.weight"][0]
    table = stored.tensors.get(embedding) or stored.tensors.get(embedding.removeprefix(base_prefix(family)))
    if table is None or name not in extra:
        return []
    head = extra.pop(name)
    if (head.shape, head.dtype) == (table.shape, table.dtype) and _are_equal(head, table):
        return []
    return [
        f"{head.file}: {name} differs from the embedding, but config.json says that they are one (tie_word_embeddings);"
        " set model.tie_embeddings: false to train them apart"
    ]


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    num_rows, num_columns = as_matrix(one.shape)
    step, columns = max(1, BLOCK_BYTES // (4 * max(1, num_columns))), slice(0, num_columns)
    blocks = (slice(at, min(at + step, num_rows)) for at in range(0, num_rows, step))
    return one.dtype is None or all(
        np.array_equal(as_bits(one.read(rows, columns)), as_bits(other.read(rows, columns))) for rows in blocks
    )


def vocabulary_tables(stored: Stored, family: ModuleType, abstract: nnx.State) -> dict[str, StoredTensor]:
    """The embedding and, if it is another tensor, the unembedding [V, D], by tensor name."""
    weights = [weight for weight, _ in join(abstract, family, vocab_size=1, stored=stored.tensors).values()]
    names = [weight.name(()) for weight in weights if weight.axes == ("v", "d")]
    return {name: stored.tensors[name] for name in names if name in stored.tensors}


def read_rows(table: StoredTensor, ids: Sequence[int]) -> np.ndarray:
    """Some rows of a table."""
    columns = slice(0, table.shape[-1])
    return np.concatenate([table.read(slice(id, id + 1), columns) for id in ids])


def report(title: str, problems: list[str], shown: int = 30) -> str:
    more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n  ".join([title, *problems[:shown], *more])
