"""Opens jaxsft's exports in the programs that people use next, and writes the table of docs/clients.md.

    python tests/clients/run.py [--work FOLDER] [--kinds NAME ...] [--programs NAME ...] [--reuse]

Not part of the test suite: it installs pinned versions of those programs from PyPI, each group in an environment of its
own in FOLDER, and llama.cpp is compiled (needs a C++ compiler; half an hour on two busy cores). A second run finds all
of that again. Run it with the Python that has jaxsft; models and tokenizers come from the material folder of the tests
(JAXSFT_MATERIAL). Ends with 1 if anything fails that is not known to be another's fault. The table is only written
when every kind and every program was asked for.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from typing import Any, NamedTuple

import exports
from exports import KINDS, REPO, SMOLLM2, Kind

HERE = pathlib.Path(__file__).resolve().parent
MATERIAL = pathlib.Path(os.environ.get("JAXSFT_MATERIAL", REPO.parent / "shared" / "material"))
TABLE = REPO / "docs" / "clients.md"

TORCH = "torch==2.13.0"
LLAMA_CPP = "llama_cpp_python==0.3.36"
"""Carries the source of llama.cpp, with the converter."""
ENVIRONMENTS = {
    "llama": ["transformers==4.57.6", TORCH, "sentencepiece==0.2.0", "protobuf==4.25.8"],
    "transformers4": ["transformers==4.57.1", TORCH],
    "trainers": ["transformers==5.24.0", TORCH, "trl==1.16.0", "peft==0.21.2", "accelerate==1.15.0", "lm_eval==0.4.13"],
}


class Program(NamedTuple):
    name: str
    title: str
    environment: str
    seconds: int
    """How long it may take with one export."""


PROGRAMS = [
    Program("llama_cpp", "llama.cpp, converter and library (llama-cpp-python {llama_cpp_python})", "llama", 600),
    Program("transformers", "transformers {transformers}", "transformers4", 300),
    Program("trl", "TRL {trl}", "trainers", 600),
    Program("peft", "peft {peft}", "trainers", 300),
    Program("lm_eval", "lm-eval {lm_eval}", "trainers", 300),
]


NO_SCORES = (
    "without a `tokenizer.model` llama.cpp's converter gives every token of a tokenizer with byte fallback the score "
    "-1000, so that llama.cpp joins pieces from left to right: some texts become other tokens than in transformers "
    "(findings/llama_cpp_scores.sh). With a `tokenizer.model` in the folder, as Llama 2 and Mistral have it, they are "
    "the same"
)
KNOWN = {
    ("llama_cpp", check, kind): NO_SCORES
    for check in ("tokens", "plain text")
    for kind in ("llama", "llama_grown", "llama_2", "mixtral_grown")
}
"""What may fail through no fault of the export: (program, check, kind) and why."""


# Environments.


def environment(name: str, work: pathlib.Path) -> pathlib.Path:
    """The Python of an environment, installed once."""
    folder = work / "venvs" / name
    python = folder / "bin" / "python"
    wanted = "\n".join([*ENVIRONMENTS[name], LLAMA_CPP if name == "llama" else ""])
    done = folder / "installed.txt"
    if done.is_file() and done.read_text() == wanted:
        return python
    say(f"installing {name} in {folder}")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *ENVIRONMENTS[name]], check=True)
    if name == "llama":
        subprocess.run([*pip, str(llama_cpp_source(work))], check=True, env=os.environ | {"CMAKE_ARGS": BUILD})
    done.write_text(wanted)
    return python


BUILD = "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"


def llama_cpp_source(work: pathlib.Path) -> pathlib.Path:
    """The unpacked source distribution of llama-cpp-python."""
    folder = work / LLAMA_CPP.replace("==", "-")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as aside:
            source_only = ["--no-deps", "--no-binary", "llama_cpp_python", LLAMA_CPP]
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", aside, *source_only], check=True)
            (archive,) = pathlib.Path(aside).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(aside, filter="data")
            (pathlib.Path(aside) / folder.name).rename(folder)
    return folder


# Asking.


def ask(script: str, *arguments: pathlib.Path, python: pathlib.Path, work: pathlib.Path, seconds: int) -> str | None:
    """Runs a client; what went wrong with it, or None. What it printed is beside the last argument."""
    converter = llama_cpp_source(work) / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "LLAMA_CPP_CONVERTER": str(converter)}
    command = [str(python), str(HERE / script), *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = arguments[-1].with_suffix(".log")
    with log.open("w") as said:
        try:
            code = subprocess.run(command, stdout=said, stderr=said, timeout=seconds, env=clean | offline).returncode
        except subprocess.TimeoutExpired:
            return f"took more than {seconds} s"
    if code:
        return f"ended with {code}: {(log.read_text().strip().splitlines() or [''])[-1][:200]}"
    return None


def results(kind: Kind, programs: list[Program], work: pathlib.Path, *, reuse: bool) -> dict[str, Any]:
    """What each program says of a kind's export: `{program: {"versions": ..., "checks": ...}}`."""
    out = work / "said" / kind.name
    if not reuse:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        given = made_for(kind, work)
        export = exports.make_export(kind, MATERIAL, work / "exports", given=given, reuse=reuse)
    except RuntimeError as error:
        return {program.name: _failed("export", str(error)) for program in programs}
    reference = out / "reference.json"
    trainers = environment("trainers", work)
    problem = None
    if not reference.is_file():
        problem = ask("with_transformers.py", export, reference, python=trainers, work=work, seconds=300)
    if problem:
        return {program.name: _failed("transformers 5", problem) for program in programs}
    found = {}
    for program in programs:
        answer = out / f"{program.name}.json"
        problem = None
        if not answer.is_file():
            python = environment(program.environment, work)
            script = f"with_{program.name}.py"
            problem = ask(script, export, reference, answer, python=python, work=work, seconds=program.seconds)
        found[program.name] = _failed("runs", problem) if problem else json.loads(answer.read_text())
        checks = found[program.name]["checks"].items()
        bad = {name: check["note"] for name, check in checks if not check["holds"]}
        say(f"{kind.name:18} {program.name:13} {bad or 'all hold'}")
    return found


def made_for(kind: Kind, work: pathlib.Path) -> pathlib.Path | None:
    """What a kind needs of another program, made; None for one that needs nothing.

    Raises:
        RuntimeError: it could not be made.
    """
    if kind.gguf_of:
        made = work / "said" / kind.gguf_of / "llama_cpp.gguf"
        if not made.is_file():
            raise RuntimeError(f"there is no GGUF of {kind.gguf_of}")
        return made
    if kind.makes_tokenizer:
        made = work / "exports" / kind.makes_tokenizer.removesuffix(".py")
        if not made.is_dir():
            python = environment("llama", work)
            problem = ask(kind.makes_tokenizer, exports.ROWS, made, python=python, work=work, seconds=300)
            if problem:
                raise RuntimeError(f"{kind.makes_tokenizer}: {problem}")
        return made
    return None


def _failed(check: str, note: str) -> dict[str, Any]:
    return {"versions": {}, "checks": {check: {"holds": False, "note": note}}}


def say(line: str) -> None:
    print(line, flush=True)


# The table.


def table(kinds: list[Kind], programs: list[Program], found: dict[str, dict[str, Any]], skipped: dict[str, str]) -> str:
    """Markdown: a line for each check of each program, a column for each kind, and below what does not hold."""
    numbers: dict[str, int] = {}
    lines = ["| | " + " | ".join(kind.title for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for program in programs:
        answers = [found[kind.name][program.name] for kind in kinds]
        versions = {name: version for answer in answers for name, version in answer["versions"].items()}
        names = list(dict.fromkeys(name for answer in answers for name in answer["checks"]))
        lines.append(f"| **{program.title.format_map(_Named(versions))}** |" + " |" * len(kinds))
        for name in names:
            cells = []
            for kind, answer in zip(kinds, answers, strict=True):
                check = answer["checks"].get(name, {"holds": None})
                if check["holds"] is False:
                    reason = KNOWN.get((program.name, name, kind.name))
                    text = reason or f"{program.name}, {name}: {check['note']}"
                    cells.append(f"{'known' if reason else 'no'} ({numbers.setdefault(text, len(numbers) + 1)})")
                else:
                    cells.append("yes" if check["holds"] else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [""] + [f"{number}. {text}" for text, number in numbers.items()]
    lines += ["", *(f"Left out: {title}, {reason}." for title, reason in skipped.items())] if skipped else []
    return "\n".join(lines)


class _Named(dict[str, str]):
    """A version that no answer named."""

    def __missing__(self, key: str) -> str:
        return "?"


MARKS = ("<!-- table: made by tests/clients/run.py -->", "<!-- end of table -->")


def write_table(text: str) -> None:
    before, _, rest = TABLE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    TABLE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "jaxsft-clients")
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in [*KINDS, SMOLLM2]])
    parser.add_argument("--programs", nargs="+", choices=[program.name for program in PROGRAMS])
    parser.add_argument("--reuse", action="store_true", help="take exports and answers that are there already")
    asked = parser.parse_args()
    work = asked.work.resolve()
    (work / "exports").mkdir(parents=True, exist_ok=True)
    programs = [program for program in PROGRAMS if not asked.programs or program.name in asked.programs]
    kinds, skipped = [], {}
    for kind in [*KINDS, SMOLLM2]:
        if asked.kinds and kind.name not in asked.kinds:
            continue
        if reason := exports.missing(kind, MATERIAL, work / "exports"):
            skipped[kind.title] = reason
            say(f"{kind.name:18} left out: {reason}")
        else:
            kinds.append(kind)
    found = {kind.name: results(kind, programs, work, reuse=asked.reuse) for kind in kinds}
    text = table(kinds, programs, found, skipped)
    print(text)
    if not asked.kinds and not asked.programs:
        write_table(text)
    failed = [
        f"{kind} {program} {name}"
        for kind, answers in found.items()
        for program, answer in answers.items()
        for name, check in answer["checks"].items()
        if not check["holds"] and (program, name, kind) not in KNOWN
    ]
    if failed:
        sys.exit(f"{len(failed)} fail: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
