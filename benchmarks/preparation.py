"""From a JSONL file to examples with masks: ours against TRL's with `assistant_only_loss`, and the tokenizer alone.

Run as `python benchmarks/preparation.py [--tokenizer FOLDER] [--rows N] [--rounds N] [--data FILE ...]`; TRL needs
`pip install trl`, and is left out by `--without-trl`. Each file of `--data` is measured by itself (rows of any format:
gsm8k, ShareGPT, tool calls, ...); without one, conversations are made up here.

All prepare the same conversations with the same tokenizer and a ChatML template that has the `{% generation %}` tags
which TRL needs. Each measurement is a process of its own on one core, in turns, in seconds of processor time, which a
busy machine changes less; imports are not counted. Ours and TRL's begin at the file and end with what training reads
from disk, and must agree on the numbers of tokens and of trained ones. The tokenizer alone is given the rendered texts,
all at once (`encode_batch`), and its ids are taken: nobody prepares tokens for less.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types

REPO = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' }}{{ call['function'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SEQ_LEN = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--tokenizer", default=str(REPO / "configs" / "quickstart"), help="Hugging Face folder")
    parser.add_argument("--data", nargs="+", default=[], help="files of rows; without any, rows are made up")
    parser.add_argument("--rows", type=int, default=4000, help="how many are made up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-trl", action="store_true")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        with contextlib.redirect_stdout(sys.stderr):
            found = MEASURES[args.measure](args)
        print(json.dumps(found))
        return
    for source in args.data or [None]:
        with tempfile.TemporaryDirectory() as folder:
            compare(source, args, pathlib.Path(folder))


def compare(source: str | None, args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Measures all on the rows of one file, in turns, and prints what was found."""
    if source is None:
        write_rows(folder / "rows.jsonl", args.rows)
    else:
        write_messages(folder / "rows.jsonl", source, args.tokenizer)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    # The columns of TRL's rows have one type each, so that each tool would get the keys of all others.
    is_plain = not any(row.get("tools") or any("tool_calls" in turn for turn in row["messages"]) for row in rows)
    names = [name for name in MEASURES if name != "trl" or (is_plain and not args.without_trl)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        found = {name: measure(name, args, str(folder)) for name in names}
        if "trl" in found:
            assert all(found["jaxsft"][count] == found["trl"][count] for count in ("tokens", "trained")), found
        for name, each in found.items():
            seconds[name].append(each["seconds"])
    print(f"{source or 'made up'}: {len(rows):,} conversations, {found['jaxsft']['tokens']:,} tokens, {args.tokenizer}")
    for name, each in seconds.items():
        rates = [len(rows) / taken for taken in each]
        ratios = [ours / theirs for ours, theirs in zip(seconds["jaxsft"], each, strict=True)]
        ratio = f"   ours takes {statistics.median(ratios):.2f} of its time ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"  {name:<10}{statistics.median(rates):>8,.0f} rows/s  ({min(rates):,.0f} to {max(rates):,.0f})"
            f"{ratio if name != 'jaxsft' else ''}"
        )


def measure(name: str, args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Seconds of the processor, tokens and trained tokens, from a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--folder", folder]
    command += ["--tokenizer", args.tokenizer, "--rows", str(args.rows)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(path: pathlib.Path, num_rows: int) -> None:
    """Conversations of one to three exchanges of made-up words; some begin with a system prompt."""
    chance = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(5000)]

    def text(longest: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(3, longest))) + "."

    with path.open("w") as file:
        for _ in range(num_rows):
            messages = [{"role": "system", "content": text(30)}] if chance.random() < 0.3 else []
            for _ in range(chance.randint(1, 3)):
                messages += [{"role": "user", "content": text(40)}, {"role": "assistant", "content": text(120)}]
            file.write(json.dumps({"messages": messages}) + "\n")


def write_messages(path: pathlib.Path, source: str, tokenizer: str) -> None:
    """The conversations of a file of any format, as messages."""
    from jaxsft.batches.prepare import read_items
    from jaxsft.chat.encoder import asking_encoder
    from jaxsft.config import DataConfig

    config = DataConfig(train=source)
    with path.open("w") as file:
        for item in read_items(config, config.train[0], asking_encoder(load_tokenizer(tokenizer))):
            row = {"messages": item.messages} | ({"tools": item.tools} if item.tools else {})
            file.write(json.dumps(row) + "\n")


def measure_tokenizer(args: argparse.Namespace) -> dict[str, float]:
    tokenizer = load_tokenizer(args.tokenizer)
    rows = [json.loads(line) for line in (args.folder / "rows.jsonl").read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False) for row in rows]
    start = time.process_time()
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        encoding.ids  # noqa: B018 - made when it is asked for
    return {"seconds": time.process_time() - start}


def measure_ours(args: argparse.Namespace) -> dict[str, float]:
    from jaxsft.batches.prepare import prepare
    from jaxsft.chat.encoder import ChatEncoder, stop_ids
    from jaxsft.config import DataConfig

    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        config = DataConfig(train=str(args.folder / "rows.jsonl"), seq_len=SEQ_LEN, overlong="truncate", cache=cache)
        start = time.process_time()
        encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))
        prepared = prepare(config, config.train[0], encoder, tokenizer_files_key="")
        seconds = time.process_time() - start
    return {"seconds": seconds, "tokens": prepared.report["tokens"], "trained": prepared.report["trained_tokens"]}


def measure_trl(args: argparse.Namespace) -> dict[str, float]:
    try:
        import datasets
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        sys.exit(f"{error}: pip install trl")

    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        config = SFTConfig(
            output_dir=cache, assistant_only_loss=True, max_length=SEQ_LEN, bf16=False, use_cpu=True, report_to=[]
        )
        # What SFTTrainer does with its dataset, without the model that its constructor asks for.
        trainer = types.SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
        start = time.process_time()
        rows = datasets.Dataset.from_json(str(args.folder / "rows.jsonl"), cache_dir=cache)
        found = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")
        seconds = time.process_time() - start
        labels = found["labels"]
        trained = sum(label != -100 for each in labels for label in each[1:])
        return {"seconds": seconds, "tokens": sum(map(len, labels)), "trained": trained}


MEASURES = {"jaxsft": measure_ours, "tokenizer": measure_tokenizer, "trl": measure_trl}


def load_tokenizer(folder: str):
    """The tokenizer with the template, in which ChatML's marks are tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


if __name__ == "__main__":
    main()
