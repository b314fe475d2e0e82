"""Rows per second and core from a JSONL file to examples with masks: ours against TRL's with `assistant_only_loss`.

Run as `python benchmarks/preparation.py [--tokenizer FOLDER] [--rows N] [--rounds N]`; needs `pip install trl`. Both
prepare the same conversations, made up here, with the same tokenizer and a ChatML template that has the
`{% generation %}` tags which TRL needs. Each measurement is a process of its own on one core, ours and TRL's in turns,
in seconds of processor time, which a busy machine changes less; imports are not counted. Both begin at the file and end
with what training reads from disk, and must agree on the numbers of tokens and of trained ones.
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
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SEQ_LEN = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--tokenizer", default=str(REPO / "configs" / "quickstart"), help="Hugging Face folder")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
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
    with tempfile.TemporaryDirectory() as folder:
        write_rows(pathlib.Path(folder) / "rows.jsonl", args.rows)
        rates: dict[str, list[float]] = {name: [] for name in MEASURES}
        for _ in range(args.rounds):
            found = {name: measure(name, args, folder) for name in MEASURES}
            assert found["jaxsft"]["tokens"] == found["trl"]["tokens"], found
            assert found["jaxsft"]["trained"] == found["trl"]["trained"], found
            for name, each in found.items():
                rates[name].append(args.rows / each["seconds"])
        tokens = found["jaxsft"]["tokens"]
    print(f"{args.rows:,} conversations, {tokens:,} tokens, {args.tokenizer}")
    for name, each in rates.items():
        print(f"  {name:<8}{statistics.median(each):>8,.0f} rows/s  ({min(each):,.0f} to {max(each):,.0f})")
    ratios = [ours / theirs for ours, theirs in zip(rates["jaxsft"], rates["trl"], strict=True)]
    print(f"  ratio   {statistics.median(ratios):>8.2f}         ({min(ratios):.2f} to {max(ratios):.2f})")


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


MEASURES = {"jaxsft": measure_ours, "trl": measure_trl}


def load_tokenizer(folder: str):
    """The tokenizer with the template, in which ChatML's marks are tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


if __name__ == "__main__":
    main()
