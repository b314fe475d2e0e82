"""Sealed checkpoints of the train state, and whose run a folder holds: the one module that knows Orbax.

    fingerprint.json             what must be equal for the run in this folder to be continued
    checkpoints/STEP/state/      the arrays, as Orbax writes them
    checkpoints/STEP/meta.json   held-out loss, shape and dtype of every array
    checkpoints/STEP/seal.json   size and CRC-32 of every other file; written last

Checkpoint i holds the state before step i. Saving goes on in the background while training continues. A step without a
seal was never finished; one whose files differ from its seal is damaged: Orbax itself notices neither flipped bytes
nor an empty folder.
"""

import concurrent.futures
import json
import math
import signal
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxsft.config import CheckpointConfig, ConfigError

CRC_READ_SIZE = 2**24


class SaveError(RuntimeError):
    """A checkpoint could not be written; what was saved before is untouched. Its text is shown as it is."""

    exit_code = 74


def claim_run_folder(folder: epath.Path, fingerprint: dict[str, Any]) -> None:
    """Makes the folder of a run, or recognises it as the same run's; changes nothing in a folder of anything else.

    Args:
        folder: the run folder.
        fingerprint: what must be equal for a run to be continued, by name; plain JSON values.

    Raises:
        ConfigError: the folder holds another run (the differing fields are named), or something that is no run.
    """
    path = folder / "fingerprint.json"
    part = folder / "fingerprint.json.part"
    if path.exists():
        try:
            saved = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"run_dir: {path} is damaged ({error}); choose another run_dir") from None
        fields = [name for name in {**saved, **fingerprint} if saved.get(name) != fingerprint.get(name)]
        if fields:
            listed = "\n".join(f"  {f}: {saved.get(f)!r} then, {fingerprint.get(f)!r} now" for f in fields)
            raise ConfigError(
                f"run_dir: {folder} holds another run, begun with other settings:\n{listed}\n"
                "set these back to continue it, or choose another run_dir"
            )
    elif folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {part}):
        raise ConfigError(f"run_dir: {folder} exists and is not a run of jaxsft; choose another run_dir")
    _sync("run_folder")  # nobody may find the file that process 0 is about to write
    if jax.process_index() == 0 and not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(fingerprint, indent=1) + "\n")
            part.replace(path)
        except OSError as error:
            raise ConfigError(f"run_dir: {folder} cannot be made: {error}") from None
    _sync("run_folder_claimed")


class Checkpointer:
    """Saves and restores the state of one run.

    Args:
        folder: `checkpoints/` of the run, absolute or a bucket.
        config: how many to keep.
        say: where one-line notices go.
    """

    def __init__(self, folder: epath.Path, config: CheckpointConfig, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._config = config
        self._say = say
        self._orbax = ocp.StandardCheckpointer()
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._at: int | None = None

    def save(self, step: int, state: Any, *, eval_loss: float = math.inf) -> None:
        """Begins to save; returns when the state is copied and may be donated.

        Args:
            step: the step that the state is before.
            state: pytree of arrays.
            eval_loss: held-out loss of this state, infinity where it was not measured; decides which one is the best.

        Raises:
            SaveError: this or the previous save failed.
        """
        self.wait()
        # Not a look at the disk: another process might see the seal sooner or later than this one.
        if step == self._at:
            return
        target = self._folder / str(step)
        leaves = _leaves_by_name(state)
        meta = {
            "step": step,
            "eval_loss": eval_loss if math.isfinite(eval_loss) else None,
            "arrays": {name: _describe(leaf) for name, leaf in leaves.items()},
        }
        try:
            if jax.process_index() == 0:
                if target.is_dir():
                    target.rmtree()  # a save that was never finished
                target.mkdir(parents=True)  # where this fails, Orbax would wait five minutes
            _sync("checkpoint_folder")
            self._orbax.save(target / "state", leaves)
        except (OSError, ValueError) as error:
            raise SaveError(f"{target}: could not be saved: {error}") from error
        self._pending = self._thread.submit(self._finish, target, meta)
        self._at = step

    def _finish(self, target: epath.Path, meta: dict) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            (target / "meta.json").write_text(json.dumps(meta, indent=1))
            (target / "seal.json").write_text(json.dumps(_checksums(target), indent=1))
            self._delete_old()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            SaveError: the save that was under way failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise SaveError(f"{self._folder}: a checkpoint could not be saved: {error}") from error

    def close(self) -> None:
        """Waits for the save under way: leaving Python without this would lose it.

        Raises:
            SaveError: that save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def restore(self, abstract: Any) -> Any | None:
        """The newest state that verifies, or None when no save was ever finished.

        Args:
            abstract: pytree of ShapeDtypeStructs with shardings; the same values come back on any mesh.

        Raises:
            ConfigError: the arrays are of another model or optimizer, or every finished checkpoint is damaged.
        """
        step = self._newest_verified()
        if step is None:
            return None
        target = self._folder / str(step)
        meta = json.loads((target / "meta.json").read_text())
        self._check_arrays(meta["arrays"], abstract)
        leaves = self._orbax.restore(target / "state", _leaves_by_name(abstract))
        self._at = step
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in _leaves_by_name(abstract)])

    def best_loss(self) -> float:
        """The smallest held-out loss among the finished checkpoints, infinity where there is none."""
        return min((self._eval_loss(step) for step in self._sealed_steps()), default=math.inf)

    def newest_before(self, step: int) -> epath.Path | None:
        """The newest finished checkpoint of a state before an earlier step than `step`; None where there is none."""
        steps = [saved for saved in self._sealed_steps() if saved < step]
        return self._folder / str(steps[-1]) if steps else None

    def _newest_verified(self) -> int | None:
        """Process 0 looks and all processes follow, so that all restore the same step."""
        found, damaged = NONE_FOUND, {}
        if jax.process_index() == 0:
            for step in sorted(self._steps(), reverse=True):
                problem = _problem(self._folder / str(step))
                if problem is None:
                    found = step
                    break
                if problem is not UNFINISHED:
                    damaged[step] = problem
                self._say(f"passed over checkpoint {step}: {problem}")
            if found < 0 and damaged:
                found = ALL_DAMAGED
            for step in damaged if found >= 0 else {}:
                # Out of the way, so that the step can be saved again when training comes back to it.
                (self._folder / str(step)).rename(self._folder / f"{step}.damaged-{time.time_ns()}")
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(found))
        if found == ALL_DAMAGED:
            listed = "".join(f"\n  checkpoint {step}: {problem}" for step, problem in damaged.items())
            raise ConfigError(
                f"{self._folder}: every finished checkpoint is damaged{listed}\n"
                "nothing was changed; choose another run_dir, or remove this one, to start anew"
            )
        return found if found >= 0 else None

    def _check_arrays(self, saved: dict[str, str], abstract: Any) -> None:
        """Orbax would cast or fail obscurely where shapes or dtypes differ."""
        arrays = {name: _describe(leaf) for name, leaf in _leaves_by_name(abstract).items()}
        differing = [name for name in {**saved, **arrays} if saved.get(name) != arrays.get(name)]
        if differing:
            listed = "\n".join(f"  {n}: {saved.get(n)} then, {arrays.get(n)} now" for n in differing[:10])
            raise ConfigError(
                f"{self._folder.parent} holds a run of another model or optimizer; "
                f"{len(differing)} arrays differ:\n{listed}\nchoose another run_dir"
            )

    def _steps(self) -> list[int]:
        if not self._folder.exists():
            return []
        return [int(child.name) for child in self._folder.iterdir() if child.name.isdigit()]

    def _sealed_steps(self) -> list[int]:
        return sorted(step for step in self._steps() if (self._folder / str(step) / "seal.json").exists())

    def _eval_loss(self, step: int) -> float:
        try:
            loss = json.loads((self._folder / str(step) / "meta.json").read_text())["eval_loss"]
        except (OSError, ValueError, KeyError):
            return math.inf  # damaged; not worth keeping as the best
        return math.inf if loss is None else loss

    def _delete_old(self) -> None:
        """Keeps the newest and the best; runs after a seal, so that there is always a finished one."""
        steps = self._sealed_steps()
        kept = set(steps[-self._config.keep :])
        best = min(steps, key=self._eval_loss)
        if math.isfinite(self._eval_loss(best)):
            kept.add(best)
        for step in steps:
            if step not in kept:
                (self._folder / str(step) / "seal.json").unlink()  # half deleted must not look finished
                (self._folder / str(step)).rmtree()


class StopSignal:
    """Whether someone asked this run to stop: SIGTERM (preemption) or Ctrl-C, on any of the processes.

    With several processes JAX catches SIGTERM itself and agrees on a step at which all of them stop, so `at` must be
    asked on every step by every process; Ctrl-C then ends at once, as a second one does in a single process.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        signals = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name

    def at(self, step: int) -> str | None:
        """The name of the signal if the run should stop before this step, else None."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                return "SIGTERM"
            if self._received is not None:
                raise KeyboardInterrupt  # the other processes cannot be asked to stop at the same step
            return None
        return self._received


UNFINISHED = "it was never finished"
NONE_FOUND, ALL_DAMAGED = -1, -2


def _problem(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint, None when every file is as it was sealed."""
    if not (folder / "seal.json").exists():
        return UNFINISHED
    try:
        sealed = json.loads((folder / "seal.json").read_text())
        found = _checksums(folder)
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    differing = sorted(name for name in {**sealed, **found} if sealed.get(name) != found.get(name))
    if not differing:
        return None
    name = differing[0]
    return (
        f"{len(differing)} files differ from its seal, first {name}: {sealed.get(name)} sealed, {found.get(name)} found"
    )


def _checksums(folder: epath.Path) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every file but the seal, by path."""
    checksums = {}
    for path in sorted(_files(folder)):
        crc, size = 0, 0
        with path.open("rb") as file:
            while block := file.read(CRC_READ_SIZE):
                crc, size = zlib.crc32(block, crc), size + len(block)
        checksums[str(path.relative_to(folder))] = {"size": size, "crc32": crc}
    checksums.pop("seal.json", None)
    return checksums


def _files(folder: epath.Path) -> list[epath.Path]:
    files = []
    for child in folder.iterdir():
        files += _files(child) if child.is_dir() else [child]
    return files


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree under their paths, a form that Orbax restores without knowing our types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
