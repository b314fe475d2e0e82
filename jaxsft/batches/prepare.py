"""A source of rows becomes examples on disk: tokenised once, memory-mapped, under a key of all that determines them.

In: one source of the config, and the encoder. Out: `Prepared`, from the cache where an equal one is there and whole.

Rows are never all in memory: they go through in chunks, on several processes where there are many. Where the files
stand is `cache.py`'s.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from jaxsft.batch import Example
from jaxsft.batches import bucket_cache, cache
from jaxsft.batches.portions import Portion, Recipe, Tally, convert_row, nothing_left, percentiles
from jaxsft.batches.workers import CHUNK, Workers, seldom_collected
from jaxsft.chat.encoder import ChatEncoder
from jaxsft.chat.named_templates import NAMED_TEMPLATES
from jaxsft.config import DataConfig, SourceConfig
from jaxsft.disk.writing import writing
from jaxsft.rows.detection import SAMPLE, choose_format
from jaxsft.rows.items import Item
from jaxsft.rows.messages import Spelling
from jaxsft.rows.sources import DataError, Problem, Row, bad_rows, choose_files, is_hub, read_rows, source_digest

SAY_EVERY = 10.0
"""Seconds between two words on how far the work is."""


class Prepared(NamedTuple):
    """All examples of a source: example i is `tokens[offsets[i]:offsets[i + 1]]`, and the same of the others."""

    key: str
    """Changes when anything changes that determines the examples; hex."""
    tokens: np.ndarray
    """int32 [num_tokens]"""
    loss_weights: np.ndarray
    """float32 [num_tokens]"""
    writers: np.ndarray
    """uint8 [num_tokens]: who wrote each token, see `WRITERS` of `chat/weighing.py`."""
    offsets: np.ndarray
    """int64 [num_examples + 1]"""
    origins: np.ndarray
    """int64 [num_examples, 3]: file (an index into the report's `files`), line, and the number of the conversation.
    Examples of one conversation (unrolled, or split) stand together."""
    report: dict[str, Any]
    """What was read, kept and dropped, and the `fingerprint` by field that a continued run compares; plain JSON."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_examples]: tokens of each example."""
        return np.diff(self.offsets)

    def example(self, index: int) -> Example:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.tokens[span], self.loss_weights[span])

    def origin(self, index: int) -> str:
        """`file:line` of the row that an example was made from."""
        file, line, _ = self.origins[index]
        name = self.report["files"][file]
        return f"{name}:{line}" if line >= 0 else name

    def siblings(self, index: int) -> range:
        """The examples that were made from the same conversation as this one."""
        items = self.origins[:, 2]
        return range(*(int(np.searchsorted(items, items[index], side)) for side in ("left", "right")))


def prepare(
    config: DataConfig,
    source: SourceConfig,
    encoder: ChatEncoder,
    *,
    tokenizer_files_key: str,
    limit: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Reads, converts, tokenises and weighs every row of a source, or finds that in the cache.

    Args:
        config: the data section.
        source: one of `config.train` or `config.eval`.
        encoder: made from this config.
        tokenizer_files_key: changes when any file of the tokenizer changes.
        limit: only the first so many rows.
        say: is told how far a long preparation is.

    Raises:
        DataError: anything wrong with the rows, or none is left.
        ConfigError: what stands where the prepared data belong is somebody else's.
        WriteError: they cannot be written.
    """
    # These know jax, which the workers that import this module do not need.
    from jaxsft.hosts.agreement import agree
    from jaxsft.hosts.disks import once_per_disk
    from jaxsft.hosts.table import process_number

    described = {
        "source": source_digest(source.path, held_out=is_held_out(config, source)),
        "format": source.format,
        "columns": source.columns,
        "roles": source.roles,
        "tokenizer": tokenizer_files_key,
        "seq_len": config.seq_len,
        "limit": limit,
    } | encoder.settings
    # Not there where they say nothing, so that runs of before can be continued.
    described |= {"keys": source.keys} if source.keys else {}
    described |= {"ignore_keys": sorted(config.ignore_keys)} if config.ignore_keys else {}
    described |= {"input_heading": heading} if (heading := input_heading(config)) else {}
    # What a continued run must find unchanged: by content, so that a newer jaxsft may prepare it anew.
    fingerprint = {name: digest(value) for name, value in described.items()}
    described |= {
        "path": source.path,  # stands in the origins
        "overlong": config.overlong,
        "on_bad_row": config.on_bad_row,
        "code": code_key(),
        "versions": {package: metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")},
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    # Before anybody works for an hour on rows that another process does not have.
    agree(f"data of {source.path}", {name: digest(value) for name, value in described.items()}, error=DataError)
    folder = cache.folder(config.cache, say) / key
    there = bucket_cache.remote(config.cache)

    def find() -> cache.Found | None:
        found = cache.load(folder)
        return bucket_cache.fetch(there / key, folder, say) if found is None and there is not None else found

    def make() -> cache.Found:
        cache.check_replaceable(folder, say)
        with cache.building(folder) as building, seldom_collected():
            _build(building, config, source, encoder, limit, fingerprint, say)
            found = cache.load(building)
            assert found is not None, "whole, for it was just written"
            cache.put_in_place(building, folder)
        # Whoever comes second uses the first one's. Mapped files outlive their names, should those be gone by now.
        return cache.load(folder) or found

    found = once_per_disk(
        folder.parent,
        f"preparing {source.path}",
        find=find,
        claim=lambda: cache.claim(folder.parent),
        make=make,
        say=say,
    )
    if there is not None and process_number() == 0:  # whose disk has the same as all others
        bucket_cache.send(folder, there / key, say)
    return Prepared(key, **found.arrays, report=found.report)


class Opened(NamedTuple):
    """A source whose first rows were looked at."""

    recipe: Recipe
    rows: Iterator[Row | Problem]
    described: dict[str, Any]
    """What the report says of its format; plain JSON."""


def open_source(
    config: DataConfig,
    source: SourceConfig,
    encoder: ChatEncoder,
    *,
    limit: int | None = None,
    stream: bool = False,
) -> Opened:
    """Finds out the format of a source: the one given, or the one that fits the columns of its first rows.

    Raises:
        DataError: a source that cannot be read, no good row, or columns of no known format.
    """
    held_out = is_held_out(config, source)
    rows = read_rows(source.path, limit=limit, stream=stream, held_out=held_out)
    seen = list(islice(rows, SAMPLE))
    good = [row for row in seen if isinstance(row, Row)]
    if not good:
        raise bad_rows([row for row in seen if isinstance(row, Problem)], "bad") if seen else no_rows(source.path)
    chosen = choose_format(good, source)
    described = {
        "path": source.path,
        "format": chosen.format,
        "format_reason": chosen.reason,
        "columns_ignored": sorted(chosen.ignored),
        "notes": [*encoder.notes, *_split_notes(source.path, held_out=held_out)],
    }
    one_role = None if config.train_on == "all" else ("assistant",)
    trained_roles = config.train_on if isinstance(config.train_on, list) else one_role
    declared = {role: role for role in trained_roles or ()} | source.roles
    heading = input_heading(config)
    spelling = Spelling(declared, source.keys, tuple(config.ignore_keys), encoder.template_keys, heading)
    refused = chosen.refused.difference(config.ignore_keys)
    recipe = Recipe(
        encoder, chosen.format, chosen.columns, spelling, trained_roles, config.seq_len, config.overlong, refused
    )
    return Opened(recipe, chain(seen, rows), described)


def input_heading(config: DataConfig) -> str:
    """What the template asks to stand before the `input` of Alpaca's rows."""
    template = NAMED_TEMPLATES.get(config.chat_template or "")
    return template.input_heading if template else ""


def is_held_out(config: DataConfig, source: SourceConfig) -> bool:
    """Whether a source of the config is examined and not trained."""
    return any(source is each for each in config.eval.values())


def _split_notes(path: str, *, held_out: bool) -> list[str]:
    """What of a folder is not read, in a sentence."""
    if is_hub(path):
        return []
    chosen = choose_files(path, held_out=held_out)
    if not chosen.left_out:
        return []
    left_out = ", ".join(f"{count:,} of {split}" for split, count in sorted(chosen.left_out.items()))
    use = "examination" if held_out else "training"
    return [
        f"{path} has splits: {len(chosen.files):,} files are read for {use} ({chosen.files[0].name}, ...), and not "
        f"{left_out}; to read others, name them"
    ]


def read_items(
    config: DataConfig, source: SourceConfig, encoder: ChatEncoder, *, limit: int | None = None
) -> Iterator[Item]:
    """What the good rows of a source say, before it becomes tokens."""
    opened = open_source(config, source, encoder, limit=limit)
    for row in opened.rows:
        found = convert_row(row, opened.recipe)
        if not isinstance(found, Problem):
            yield from found


def no_rows(path: str) -> DataError:
    return DataError(f"{path}: no rows")


def code_key() -> str:
    """Changes when the code changes that makes examples of rows: all of `rows/` and `chat/`, and what is done here."""
    package = pathlib.Path(__file__).parents[1]
    own = ("cache.py", "lengths.py", "portions.py", "prepare.py")
    files = [*package.glob("rows/*.py"), *package.glob("chat/*.py"), *(package / "batches" / name for name in own)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def digest(value: Any) -> str:
    """A value in a few characters, to be compared and shown: itself where it is short."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:16]


def chunks(rows: Iterator[Row | Problem], size: int = CHUNK) -> Iterator[list[Row | Problem]]:
    while chunk := list(islice(rows, size)):
        yield chunk


class Origins:
    """Origins of examples as whole numbers, and the names of the files that they are of."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def rows(self, portion: Portion, first_item: int) -> np.ndarray:
        """int64 [num_examples, 3] of a portion, see `Prepared.origins`."""
        rows = []
        for origin, item in zip(portion.origins, portion.items, strict=True):
            match = _ORIGIN.fullmatch(origin)
            name, line = (match[1], int(match[2])) if match else (origin, -1)
            rows.append((self.files.setdefault(name, len(self.files)), line, first_item + int(item)))
        return np.array(rows, np.int64).reshape(-1, 3)


_ORIGIN = re.compile(r"(.*):(\d{1,18})", re.DOTALL)


def _build(
    folder: pathlib.Path,
    config: DataConfig,
    source: SourceConfig,
    encoder: ChatEncoder,
    limit: int | None,
    fingerprint: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """Writes the arrays, the report, and last the seal, whose presence says that the rest is there."""
    opened = open_source(config, source, encoder, limit=limit)
    workers = Workers([opened.recipe])
    tally, origins = Tally(), Origins()
    lengths, encoded_lengths, origin_rows = [], [], []
    crc = 0
    begin = said = time.perf_counter()
    with contextlib.closing(workers), contextlib.ExitStack() as stack:
        with writing(folder):
            # Without buffers, which would be written once more when they are closed.
            files = {name: stack.enter_context((folder / f"{name}.bin").open("wb", buffering=0)) for name in _FLAT}
        for portion in workers.map((0, chunk) for chunk in chunks(opened.rows)):
            origin_rows.append(origins.rows(portion, tally.items))
            tally.add(portion)
            lengths.append(portion.lengths)
            encoded_lengths.append(portion.encoded_lengths)
            flat = {name: getattr(portion, name).tobytes() for name in _FLAT}
            with writing(folder, sum(map(len, flat.values()))):
                for name, file in files.items():
                    _write_all(file, flat[name])
            # Example by example, so that it does not depend on how rows are cut into portions.
            for tokens, weights in _examples(portion):
                crc = zlib.crc32(weights, zlib.crc32(tokens, crc))
            if (now := time.perf_counter()) - said > SAY_EVERY:
                said = now
                say(f"preparing {source.path}: {tally.rows:,} rows, {tally.rows / (now - begin):,.0f} rows/s")
    tally.check(config.on_bad_row, config.seq_len)
    all_lengths = np.concatenate(encoded_lengths)
    report = opened.described | tally.report()
    if not tally.examples:
        raise nothing_left(source.path, report, config.seq_len, int(all_lengths.min()) if len(all_lengths) else 0)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    report |= {
        "files": list(origins.files),
        "length_percentiles": percentiles(all_lengths),
        "fingerprint": fingerprint | {"examples": f"{crc:08x}"},
    }
    cache.finish(folder, offsets, np.concatenate(origin_rows), report)


_FLAT = ("tokens", "loss_weights", "writers")


def _write_all(file: io.FileIO, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def _examples(portion: Portion) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    ends = np.cumsum(portion.lengths)
    for start, end in zip(ends - portion.lengths, ends, strict=True):
        yield portion.tokens[start:end], portion.loss_weights[start:end]


def prepared_in_memory(portions: Sequence[Portion], report: dict[str, Any]) -> Prepared:
    """Portions as prepared data that has no place on disk."""
    origins = Origins()
    items = np.cumsum([0, *(portion.num_items for portion in portions)])
    rows = [origins.rows(portion, int(first)) for portion, first in zip(portions, items, strict=False)]
    lengths = np.concatenate([portion.lengths for portion in portions])
    return Prepared(
        "",
        tokens=np.concatenate([portion.tokens for portion in portions]),
        loss_weights=np.concatenate([portion.loss_weights for portion in portions]),
        writers=np.concatenate([portion.writers for portion in portions]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        origins=np.concatenate(rows),
        report=report | {"files": list(origins.files)},
    )
