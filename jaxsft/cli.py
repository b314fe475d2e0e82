"""The command line: one short function per command, and what an error looks like.

Exit codes: 0 done, 1 error, 65 bad data, 74 a file could not be read or written, 75 start again to continue: stopped,
stalled, or one of several processes was lost.
"""

import argparse
import contextlib
import io
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from jaxsft.config import Config, ConfigError
from jaxsft.config_files import config_keys, keys_called, load_config, load_run_config
from jaxsft.foreign_keys import COMMANDS, OTHER_METHODS, of_others
from jaxsft.hosts.exits import BUG, exit_code, is_bug
from jaxsft.interrupts import INTERRUPTED

PARTED = 1
"""Exit code of a comparison in which the two runs part."""


def init_command(args: argparse.Namespace) -> int:
    """write a first config, from a model and a file of rows, or from the answers to four questions"""
    from jaxsft.init import init

    init(args.out, model=args.model, data=args.data, ask=input if sys.stdin.isatty() else None, say=print)
    name = shlex.quote(args.out)
    print(f"written: {args.out}; next: `python run.py preview {name}`, then `python run.py train {name}`")
    return 0


def train_command(args: argparse.Namespace) -> int:
    """train, or continue, the run of a config; ends with an exported model"""
    from jaxsft.hosts.agreement import together
    from jaxsft.train import train

    with together():
        config = _config(args)
    return train(config, restart=args.restart)


def quickstart_command(args: argparse.Namespace) -> int:
    """train a small model from random weights until it follows instructions; two to three minutes on two CPU cores"""
    from jaxsft.train import train

    configs = pathlib.Path(__file__).parent / "configs"
    folder = configs / "quickstart"
    places = {"model.path": folder, "data.train": folder / "train.jsonl", "data.eval": folder / "eval.jsonl"}
    overrides = [f"{key}={json.dumps(str(path))}" for key, path in places.items()]
    config = load_config(configs / "quickstart.yaml", [*overrides, *args.overrides], say=_say)
    return train(config, restart=args.restart)


def preview_command(args: argparse.Namespace) -> int:
    """show what will be trained, token by token; no weights are read"""
    from jaxsft.disk.pages import make_folder, refuse_other_pages
    from jaxsft.preview.page import write_html
    from jaxsft.preview.records import as_json
    from jaxsft.preview.terminal import print_preview
    from jaxsft.setup import Setup

    # The JSON stands alone on stdout; whatever else there is to say goes to stderr.
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        setup = Setup(_config(args), say=print)
        # Beside the run folder, which belongs to `train`.
        path = setup.folder.parent / f"{setup.folder.name}.preview.html"
        if not args.json:
            refuse_other_pages([path])
        with contextlib.closing(setup.loader):
            preview = setup.preview()
    if args.json:
        print(json.dumps(as_json(preview)))
        return 0
    print_preview(preview)
    make_folder(path.parent)
    write_html(preview, path)
    print(f"page: {path}")
    return 0


def plan_command(args: argparse.Namespace) -> int:
    """say what a run will need on chips that need not be there: memory, messages, hours; no weights are read"""
    from jaxsft.disk.pages import refuse_other_pages
    from jaxsft.plan.make import as_json, describe, make_plan
    from jaxsft.plan.page import write_html
    from jaxsft.plan.search import describe_suggestions, largest_microbatch, suggest
    from jaxsft.plan.topologies import read_topology

    topology = read_topology(args.topology, num_slices=args.slices)
    page = None if args.page is None else pathlib.Path(args.page)
    if page is not None:
        if page.suffix != ".html":
            raise ConfigError(f"--page: {page} given, expected a file whose name ends in .html")
        refuse_other_pages([page])
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        config = _config(args)
        if args.suggest:
            plans = suggest(config, topology)
        elif args.search:
            plans = [largest_microbatch(config, topology, compiles=not args.quick, say=print)]
        else:
            plans = [make_plan(config, topology, compiles=not args.quick)]
    if args.json:
        print(json.dumps([as_json(plan) for plan in plans] if args.suggest else as_json(plans[0])))
    else:
        print(describe_suggestions(plans) if args.suggest else describe(plans[0]))
    if page is not None:
        write_html(plans, page, command=shlex.join(["jaxsft", *sys.argv[1:]]))
        print(f"page: {page}", file=sys.stderr if args.json else sys.stdout)
    return 0


def evaluate_command(args: argparse.Namespace) -> int:
    """held-out loss and sample answers of a checkpoint of the run or, before there is one, of its first model"""
    from etils import epath

    from jaxsft.answers.evaluate import describe
    from jaxsft.disk.writing import place
    from jaxsft.folders.pretrained import load_weights
    from jaxsft.hosts.agreement import agree_on_start, together
    from jaxsft.model.abstract import whole
    from jaxsft.model.freezing import frozen_key
    from jaxsft.setup import Setup
    from jaxsft.training.checkpoint import Checkpointer
    from jaxsft.training.step import abstract_state, evaluation_params

    with together():
        is_run = epath.Path(place(args.config)).is_dir()
        config = load_run_config(args.config, args.overrides, say=_say) if is_run else _config(args)
        agree_on_start(config.model_dump(mode="json"))
        setup = Setup(config, say=print)
        config, mesh, folder = setup.config, setup.mesh, setup.folder
        if setup.examiner is None:
            raise ConfigError("data.eval: required to evaluate, not given")
    with contextlib.closing(Checkpointer(folder / "checkpoints", config.checkpoint, print)) as checkpointer:
        number = checkpointer.step_of(args.step)
        state = checkpointer.restore(abstract_state(setup.pretrained.model.params, config.optim, mesh), number)
    if state is None:
        print(f"no checkpoint in {folder}: evaluating {config.model.path} ({config.model.weights} weights)")
        weights = load_weights(setup.pretrained, mesh, seed=config.seed)
    else:
        print(f"evaluating checkpoint {int(state.step)} of {folder}")
        frozen = setup.load_frozen()
        checkpointer.beside(frozen_key(frozen))
        weights = whole(evaluation_params(config.optim, state), frozen)
    print(describe(setup.examiner.examine(weights)))
    return 0


def chat_command(args: argparse.Namespace) -> int:
    """talk to a model folder, or to the export of a run"""
    from jaxsft.answers.converse import converse, load_text, load_tools
    from jaxsft.answers.generate import Sampling

    system = args.system if args.system_file is None else load_text(args.system_file, "--system-file")
    tools = [] if args.tools is None else load_tools(args.tools)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    converse(args.model, system=system, sampling=sampling, max_new_tokens=args.max_new_tokens, tools=tools)
    return 0


def sweep_command(args: argparse.Namespace) -> int:
    """train a run for each combination of values such as optim.learning_rate=1e-5,2e-5, and compare them on one page"""
    from jaxsft.sweep.grid import make_trials
    from jaxsft.sweep.runs import in_process, sweep, with_one_day

    trials = with_one_day(make_trials(args.config, args.overrides))
    if args.print:
        for trial in trials:
            print(f"python run.py {shlex.join(['train', args.config, *trial.overrides])}")
        return 0
    from jaxsft.hosts.start import find_place

    if (found := find_place()) is not None and found.num_processes > 1:
        raise ConfigError(
            f"sweep: this is one of {found.num_processes} processes, and a sweep starts its runs on one host; --print "
            "prints the command of each run, for a job of its own"
        )
    command = f"python run.py {shlex.join(['sweep', args.config, *args.overrides])}"
    return sweep(trials, start=lambda trial: in_process(trial, args.config), command=command)


def compare_command(args: argparse.Namespace) -> int:
    """train the first steps of a run in PyTorch too, and show on one page where the two part, if they do"""
    from jaxsft.compare.hf import compare_hf
    from jaxsft.compare.trl import compare_trl
    from jaxsft.disk.buckets import is_bucket
    from jaxsft.disk.pages import refuse_other_pages
    from jaxsft.report.page import FILES, write_report
    from jaxsft.setup import Setup

    # The programs that are started want the accelerator for themselves.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that nothing is left behind
    config = _config(args)
    sources = [*config.data.train, *config.data.eval.values()]
    paths = [config.run_dir, config.model.path, config.model.tokenizer, *(source.path for source in sources)]
    if in_buckets := [path for path in paths if path and is_bucket(path)]:
        raise ConfigError(f"compare: {in_buckets[0]}: the other programs read and write on a disk only; download it")
    setup = Setup(config)
    folder = setup.folder
    out = pathlib.Path(folder).with_name(f"{folder.name}.compare-{args.baseline}")
    refuse_other_pages(out / name for name in FILES)
    compare = {"hf": compare_hf, "trl": compare_trl}[args.baseline]
    report = compare(setup.config, out=out, num_steps=args.steps, say=print)
    words = ["compare", args.config, *args.overrides, "--baseline", args.baseline, "--steps", str(args.steps)]
    page = write_report(report._replace(command=f"python run.py {shlex.join(words)}"), out)
    for check in report.checks:
        mark = {True: "same", False: "DIFFERS", None: "not checked"}[check.passed]
        measured = "" if check.measured is None else f"  {check.measured:.1e}"
        allowed = "" if check.tolerance is None else f" (allowed {check.tolerance:.0e})"
        print(f"{mark:<12}{check.name}{measured}{allowed}  {check.where}")
    print(report.verdict)
    print(f"page: {page}")
    return 0 if report.passed is not False else PARTED


def export_command(args: argparse.Namespace) -> int:
    """write the model of a run, or its adapter, from a checkpoint; with --merge-lora the adapter is in the weights"""
    from jaxsft.export_run import export_run

    print(f"ready: {export_run(args.run_dir, step=args.step, merge=args.merge_lora, out=args.out)}")
    return 0


def push_command(args: argparse.Namespace) -> int:
    """upload an export to the Hugging Face hub, after a look at its seal"""
    from jaxsft.answers.converse import model_of
    from jaxsft.folders.push import push

    print(f"uploaded: {push(model_of(args.export), args.repo, private=args.private, say=print)}")
    return 0


def report_command(args: argparse.Namespace) -> int:
    """overlay the curves of runs, ours and others', on one page"""
    from jaxsft.report.make import report, text_table

    pairs = [text.partition("=") for text in args.columns]
    if wrong := [text for text, (ours, _, theirs) in zip(args.columns, pairs, strict=True) if not (ours and theirs)]:
        raise ConfigError(f"--columns {wrong[0]}: expected our key and their column, such as loss=train/nll")
    given = (("--name", args.name), ("--columns", args.columns), ("--by", [args.by]), ("--out", [args.out]))
    words = ["report", *args.paths, *(word for flag, values in given if values for word in (flag, *values))]
    words += [] if args.smooth is None else ["--smooth", f"{args.smooth:g}"]
    made = report(
        args.paths,
        out=args.out,
        align=args.by,
        smooth=args.smooth,
        columns={ours: theirs for ours, _, theirs in pairs},
        names=args.name,
        command=f"python run.py {shlex.join(words)}",
    )
    print(text_table(made.runs))
    for caveat in dict.fromkeys(f"{run.name}: {caveat}" for run in made.runs for caveat in run.caveats):
        print(f"to know: {caveat}")
    print(f"page: {args.out.rstrip('/')}/report.html")
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """check everything that a run or an export sealed, to the byte; changes nothing"""
    from jaxsft.training.verify import verify

    return verify(args.path, say=print)


def doctor_command(args: argparse.Namespace) -> int:
    """look over all hosts before a run: devices, versions, memory, disks, clocks, the run folder, an all-reduce"""
    from etils import epath

    from jaxsft.disk.writing import place
    from jaxsft.hosts.agreement import together
    from jaxsft.hosts.doctor import examine
    from jaxsft.hosts.table import process_number

    with together():
        run_dir = _config(args).run_dir if args.config is not None else None
        places = {} if run_dir is None else {"run_dir": epath.Path(place(run_dir, "run_dir")).resolve()}
        problems, table = examine(places)
    if process_number() == 0:
        count = len(problems)
        print(f"{count} problem{'s' * (count > 1)}:" if problems else "no problems")
        print("\n".join([*(f"  {problem}" for problem in problems), *table]))
    return BUG if problems else 0


def convert_command(args: argparse.Namespace) -> int:
    """turn a config of TRL, axolotl or LLaMA-Factory into one of ours, and say what became of each key"""
    from jaxsft.convert.make import convert
    from jaxsft.disk.writing import at_home, write_new

    out = None if args.out is None else at_home(args.out, "-o")
    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"-o {args.out}: a config's name ends with .yaml")
    template = pathlib.Path("chat_template.jinja") if out is None else out.with_suffix(".jinja")
    width = shutil.get_terminal_size().columns
    made = convert(args.file, project=args.project, template_file=str(template), width=width)
    if out is None:
        print(made.report, file=sys.stderr)
        print(made.text, end="")
        if made.template is not None:
            print(f"{template}: not written; with -o OUT.yaml it is, beside it", file=sys.stderr)
    else:
        if taken := [path for path in (out, template)[: 1 + (made.template is not None)] if os.path.lexists(path)]:
            raise ConfigError(f"{taken[0]}: exists, and is not written over; give another name as -o")
        write_new(out, made.text)
        if made.template is not None:
            write_new(template, made.template)
        print(made.report)
        print(f"written: {out}; look at what it trains: python run.py preview {out}")
    if made.missing:
        raise ConfigError(f"{len(made.missing)} to fill in before this can be trained: {'; '.join(made.missing)}")
    return 0


def keys_command(args: argparse.Namespace) -> int:
    """list every config key: type, default, meaning"""
    for key, kind, default, meaning in config_keys():
        print(f"{key}  ({kind}; {default if default == 'required' else f'default {default}'})\n    {meaning}")
    return 0


COMPILING = (train_command, quickstart_command, evaluate_command, chat_command, compare_command, sweep_command)
"""Commands whose compiled programs are kept for the next start."""
TAKE_CONFIG = ("train", "preview", "evaluate", "plan", "compare")
"""Commands whose first argument is a config."""
CONFIG_OPTIONS = ("config", "c", "config_file", "config-file", "cfg")
"""Options by which others are given a config."""
WATCHED = (train_command, quickstart_command, evaluate_command, doctor_command)
"""Commands that end together where several processes run them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Mistakes of the user are one message, bugs a traceback.

    Called without arguments it is this process's program, which may be one of several of a cluster.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    # PyTorch is not needed, so that transformers need not miss it aloud.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if advice := _advice(words):
        print(f"error: {advice}", file=sys.stderr)
        return BUG
    args, rest = parser.parse_known_args(words)
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]:
        if hasattr(args, "overrides") and (advice := _as_overrides(words, wrong)):
            print(f"error: {advice}", file=sys.stderr)
            return BUG
        # Without values, of which one may be a token: those of "--key value" and behind "=".
        names = [word.partition("=")[0] for word in wrong if word.startswith("-")] or wrong
        parser.error(f"unrecognized arguments: {' '.join(names)}")
    if rest:  # overrides that stand behind an option
        args.overrides += rest
    if arguments is None:
        # Nor need transformers spend seconds on importing it where it is installed.
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    is_watched = arguments is None and args.command in WATCHED
    try:
        if arguments is None and args.command in COMPILING:
            from jaxsft.disk.compiled import keep_compiled

            keep_compiled(print)
        if is_watched:
            from jaxsft.hosts import failure
            from jaxsft.hosts.start import start_processes

            if args.command is not quickstart_command:
                start_processes()
            failure.watch()
        code = args.command(args)
        sys.stdout.flush()
        if is_watched:
            failure.part()
        return code
    except KeyboardInterrupt:
        if _is_one_of_several():
            failure.end("interrupted", INTERRUPTED)
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if _is_one_of_several():
            failure.fail(error)
        if isinstance(error, BrokenPipeError) and not is_watched:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Whoever reads has enough, as head has.
        elif is_bug(error):
            traceback.print_exc()
        else:
            print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


def _advice(words: Sequence[str]) -> str | None:
    """What to type in place of a command that other trainers have."""
    name = words[0] if words else ""
    if name in COMMANDS:
        file = next((word for word in words[1:] if word.endswith((".yaml", ".yml"))), "CONFIG")
        return f"{name}: no such command; here it is: python run.py {COMMANDS[name].replace('CONFIG', file)}"
    if name in OTHER_METHODS:
        return f"{name}: supervised fine-tuning alone is trained here: python run.py train CONFIG"
    if name.endswith((".yaml", ".yml")):
        return f"{name}: a config needs a command before it: python run.py train {name}"
    if name in TAKE_CONFIG and len(words) > 1 and "=" in words[1] and not os.path.exists(words[1]):
        key = words[1].partition("=")[0]
        shown = words[1] if _is_shown(key) else f"{key}=..."
        return f"{shown}: the config stands before what changes it: python run.py {name} CONFIG {shown}"
    return None


def _as_overrides(words: Sequence[str], wrong: Sequence[str]) -> str | None:
    """How arguments `--key value` of other trainers are given here; None: none of these is a key, ours or theirs."""
    told, is_any_known = [], False
    for at, word in enumerate(words):
        name, equals, value = word.lstrip("-").partition("=")
        if word not in wrong or not word.startswith("-") or not name:
            continue
        if not equals and at + 1 < len(words) and not words[at + 1].startswith("-") and "=" not in words[at + 1]:
            value = words[at + 1]
        answer = _as_override(name, value, command=words[0])
        is_any_known |= answer is not None
        # The value of a key that is none of ours is not shown: it may be a token.
        shown = f"{word}{f' {value}' if value and not equals else ''}" if _is_shown(name) else word.partition("=")[0]
        answer = answer or "no such key; keys are written key=value, and `python run.py keys` lists them"
        told.append(f"{shown}: {answer}")
    if not is_any_known:
        return None
    if len(told) == 1:
        return told[0]
    return "\n".join([f"{len(told)} arguments that are written otherwise here:", *(f"  {line}" for line in told)])


def _is_shown(name: str) -> bool:
    """Whether what is given for such a key may be repeated: a config, or the value of a key that is one of ours."""
    foreign = of_others(name)
    return name in CONFIG_OPTIONS or bool(keys_called(name)) or (foreign is not None and bool(foreign.ours))


def _as_override(name: str, value: str, *, command: str) -> str | None:
    """How one such argument is given; None: its name is not known."""
    if name in CONFIG_OPTIONS:
        command = command if command in TAKE_CONFIG else "train"
        return f"a config stands by itself: python run.py {command} {value or 'CONFIG'}"
    if near := [key for key in keys_called(name) if key == name] or keys_called(name):
        return "write " + " or ".join(f"{key}={value or '...'}" for key in near)
    foreign = of_others(name)
    if foreign is None or not foreign.ours or " and " in foreign.ours:
        return foreign and foreign.told()
    note = f" ({foreign.note})" if foreign.note else ""
    return f"write {foreign.ours}={value if value and not note else '...'}{note}"


def _is_one_of_several() -> bool:
    failure = sys.modules.get("jaxsft.hosts.failure")
    return failure is not None and failure.is_one_of_several()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jaxsft", description="Supervised fine-tuning in JAX, exactly.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        subparser.set_defaults(command=command)
        return subparser

    subparser = add("init", init_command)
    subparser.add_argument("--model", metavar="MODEL", help="folder or hub id")
    subparser.add_argument("--data", metavar="ROWS", help="file, folder or hub id of rows")
    subparser.add_argument("-o", dest="out", metavar="FILE", default="config.yaml", help="default: config.yaml")
    subparser = add("quickstart", quickstart_command)
    subparser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100")
    subparser.add_argument("--restart", action="store_true", help="begin anew; the run that is there is moved aside")
    for name, command in (("train", train_command), ("preview", preview_command), ("evaluate", evaluate_command)):
        subparser = add(name, command)
        is_evaluate = command is evaluate_command
        subparser.add_argument("config", help="YAML file, or run folder" if is_evaluate else "YAML file")
        subparser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.learning_rate=1e-4")
        if is_evaluate:
            subparser.add_argument(
                "--step", type=_step, default="last", help="of the checkpoint, best, or last (default)"
            )
        if command is train_command:
            subparser.add_argument(
                "--restart", action="store_true", help="begin anew; the run that is in run_dir is moved aside"
            )
        if command is preview_command:
            subparser.add_argument("--json", action="store_true", help="the same for programs; see docs/preview.md")
    subparser = add("plan", plan_command)
    subparser.add_argument("config", help="YAML file")
    subparser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.microbatch_size=64")
    subparser.add_argument("--topology", required=True, help="such as v6e:8x8, v5p:8x8x4, h100:8, h200:1, cpu:1")
    subparser.add_argument("--slices", type=_number(int, 1, 10**4), default=1, help="of TPUs, each of that topology")
    ways = subparser.add_mutually_exclusive_group()
    ways.add_argument("--search", action="store_true", help="find the most rows at once that fit")
    ways.add_argument("--suggest", action="store_true", help="rank meshes, remat policies and rows at once, as counted")
    subparser.add_argument("--page", metavar="FILE.html", help="the same as a page")
    subparser.add_argument("--quick", action="store_true", help="count alone, also where a compiler is installed")
    subparser.add_argument("--json", action="store_true", help="the same for programs")
    subparser = add("sweep", sweep_command)
    subparser.add_argument("config", help="YAML file")
    subparser.add_argument(
        "overrides", nargs="*", metavar="key=a,b", help="such as optim.learning_rate=1e-5,2e-5 train.epochs=1"
    )
    subparser.add_argument("--print", action="store_true", help="print the command of each run, and train none")
    subparser = add("compare", compare_command)
    subparser.add_argument("config", help="YAML file")
    subparser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.compute_dtype=float32")
    subparser.add_argument("--baseline", choices=("hf", "trl"), required=True, help="transformers, or TRL's SFTTrainer")
    subparser.add_argument("--steps", type=_number(int, 0, 10**6), default=100, help="at most so many (default: 100)")
    subparser = add("chat", chat_command)
    subparser.add_argument("model", metavar="MODEL_OR_RUN", help="Hugging Face folder or hub id, or run folder")
    prompts = subparser.add_mutually_exclusive_group()
    prompts.add_argument("--system", metavar="TEXT", help="system prompt")
    prompts.add_argument("--system-file", metavar="FILE", help="file with the system prompt")
    subparser.add_argument("--tools", metavar="FILE", help="JSON file with the tools that the model may call")
    subparser.add_argument(
        "--temperature", type=_number(float, 0, math.inf), default=0.0, help="0 takes the most likely token (default)"
    )
    subparser.add_argument(
        "--top-p", type=_number(float, 0, 1), default=1.0, help="draw from the likeliest tokens that sum to this"
    )
    subparser.add_argument("--seed", type=_number(int, 0, 2**31 - 1), default=0, help="of what is drawn")
    subparser.add_argument("--max-new-tokens", type=_number(int, 1, 2**20), default=512, help="longest answer")
    subparser = add("export", export_command)
    subparser.add_argument("run_dir", metavar="RUN", help="run folder")
    subparser.add_argument("--step", type=_step, help="of the checkpoint, best, or last (default: checkpoint.export)")
    subparser.add_argument("--merge-lora", action="store_true", help="a whole model, its adapter in its weights")
    subparser.add_argument("--out", metavar="FOLDER", help="where to write (default: RUN/export, or beside it)")
    subparser = add("push", push_command)
    subparser.add_argument("export", metavar="EXPORT_OR_RUN", help="folder of an export, or of a run that has one")
    subparser.add_argument("repo", metavar="ORG/NAME", help="on the hub; made where there is none")
    subparser.add_argument("--private", action="store_true", help="make it so that nobody else sees it")
    subparser = add("report", report_command)
    subparser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="run folder, trainer_state.json or its folder, TensorBoard folder or file, CSV",
    )
    subparser.add_argument("--name", nargs="+", default=[], help="one for each run, in their order")
    subparser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="such as loss=train/nll")
    subparser.add_argument("--by", choices=("step", "tokens"), default="step", help="x axis; tokens are trained ones")
    subparser.add_argument(
        "--smooth", type=_number(float, 0, math.inf), metavar="STEPS", help="window; 0 is none (default: by the length)"
    )
    subparser.add_argument("--out", default="report", metavar="FOLDER", help="where to write (default: ./report)")
    subparser = add("verify", verify_command)
    subparser.add_argument("path", metavar="RUN_OR_EXPORT", help="run folder, or the export of a run")
    subparser = add("doctor", doctor_command)
    subparser.add_argument("config", nargs="?", help="YAML file, whose run folder is looked for on all hosts")
    subparser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run_dir=/mnt/runs/one")
    subparser = add("convert", convert_command)
    subparser.add_argument("file", help="YAML, JSON, a saved command line (.sh), or a Python script with an SFTConfig")
    subparser.add_argument(
        "--from",
        dest="project",
        choices=("trl", "axolotl", "llama-factory"),
        help="whose it is, where its keys do not say so",
    )
    subparser.add_argument("-o", "--out", metavar="OUT.yaml", help="where to write (default: stdout)")
    add("keys", keys_command)
    return parser


def _number(kind: type, least: float, most: float) -> Any:
    """An argparse type: a number within bounds."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} given, expected {least} to {most}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it when it is no number at all
    return parse


def _step(text: str) -> int | str:
    if text in ("best", "last"):
        return text
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text} given, expected the number of a step, best or last")
    return int(text)


def _config(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides, say=_say)


def _say(text: str) -> None:
    """To the terminal; of several processes, the first speaks."""
    from jaxsft.hosts.table import process_number

    if process_number() == 0:
        print(text, flush=True)
