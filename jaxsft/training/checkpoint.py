"""Sealed checkpoints of the train state.

    checkpoints/STEP/meta.json   what is known of the run at this step; written first: the mark of a folder of ours
    checkpoints/STEP/state/      the arrays; see `arrays.py`, in a bucket `bucket_arrays.py`
    checkpoints/STEP/seal.json   see `seal.py`; written last
    progress.json                the newest step that was sealed

In: a state at a step. Out: a folder that a continued run restores, or nothing where the save was cut off. Checkpoint i
holds the state before step i. Saving goes on in the background while training continues: each process writes and sums
up its own files, no step waits for another process, and process 0 writes the seal when all are done.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from jaxsft.config import CheckpointConfig, ConfigError
from jaxsft.disk.buckets import is_bucket
from jaxsft.disk.seal import (
    REMOVING,
    SEAL,
    UNFINISHED,
    Entry,
    checksums,
    finish_removing,
    problem_of,
    read_object,
    read_sealed_object,
    remove_sealed,
)
from jaxsft.disk.writing import aside_of, check_space, set_aside, write_error, write_whole
from jaxsft.hosts.exchange import done_by_first, first_text
from jaxsft.hosts.sealing import problem_together, seal_together
from jaxsft.training.arrays import ArrayFolders, part_of, reason
from jaxsft.training.bucket_arrays import BucketArrays
from jaxsft.training.local_copies import LocalCopies, hold

META, PROGRESS = "meta.json", "progress.json"
LAST, BEST = "last", "best"
"""What users call the newest checkpoint, and that with the smallest held-out loss."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; what was saved before is untouched. Its text is shown as it is."""

    exit_code = 74


class Checkpointer:
    """Saves and restores the state of one run.

    Args:
        folder: `checkpoints/` of the run, absolute or a bucket.
        config: how many to keep.
        say: where one-line notices go.
        run: what is sealed with every checkpoint: the fingerprint and the config of the run; plain JSON.
    """

    def __init__(
        self,
        folder: epath.Path,
        config: CheckpointConfig,
        say: Callable[[str], None],
        *,
        run: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._say = say
        self._run = json.loads(json.dumps(run or {}))
        # Orbax 0.12 takes an s3:// for a relative path, and renames folders where it knows no better.
        self._arrays: Any = BucketArrays() if is_bucket(folder) else ArrayFolders()
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._local = LocalCopies(folder, config.local_dir, say) if config.local_every else None
        self._local_thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="local copies")
        self._local_pending: concurrent.futures.Future[None] | None = None
        self._at: int | None = None
        self._making: epath.Path | None = None
        self._passed_over: dict[int, str] = {}
        self.progress: dict[str, Any] = {}
        """What `save` was given beside the state that was restored."""
        self.frozen_then = ""
        """The key of the weights beside which the state that was restored was trained; see `beside`."""

    def save(
        self, step: int, state: Any, *, eval_loss: float = math.inf, progress: dict[str, Any] | None = None
    ) -> None:
        """Begins to save; returns when the state is copied and may be donated.

        Args:
            step: the step that the state is before.
            state: pytree of arrays.
            eval_loss: held-out loss of this state, infinity where it was not measured; decides which one is the best.
            progress: what a continued run must know besides; plain JSON.

        Raises:
            SaveError: this or the previous save failed.
            WriteError: it would not fit.
        """
        self.wait()
        # The disk is not asked: another process might see the seal sooner or later than this one does.
        if step == self._at:
            return
        target = self.folder / str(step)
        leaves = _leaves_by_name(state)
        meta = self._meta(step, leaves, eval_loss, progress)
        needed = sum(leaf.nbytes for leaf in leaves.values())
        check_space(target, needed)

        def begin() -> None:
            self._make_room(step)
            target.mkdir(parents=True)  # where this fails, Orbax would wait five minutes
            self._making = target
            write_whole(target / META, json.dumps(meta, indent=1))

        try:
            if is_bucket(self.folder):
                # Orbax waits for its folder to be made. Here, what others write would make one, which is in the way.
                done_by_first("checkpoint begun", begin)
            elif jax.process_index() == 0:
                begin()
            self._arrays.save(target / "state", leaves)
        except (OSError, ValueError) as error:
            raise self._failed(target, needed, error) from error
        self._pending = self._thread.submit(self._finish, target, needed)
        self._at = step

    def save_local(self, step: int, state: Any, *, progress: dict[str, Any] | None = None) -> None:
        """Begins to copy the state to the disks of the hosts; returns when it may be donated. Arguments as of `save`.

        Only where the config asks for such copies.
        """
        assert self._local is not None
        if self._local_pending is not None:
            self._local_pending.result()
        self._local.begin()
        leaves = _leaves_by_name(state)
        meta = self._meta(step, leaves, math.inf, progress)
        self._local_pending = self._local_thread.submit(self._local.write, step, hold(leaves), meta)

    def _meta(
        self, step: int, leaves: dict[str, Any], eval_loss: float, progress: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "step": step,
            "eval_loss": eval_loss if math.isfinite(eval_loss) else None,
            "arrays": {name: _describe(leaf) for name, leaf in leaves.items()},
            "run": self._run,
            "progress": progress or {},
        }

    def _finish(self, target: epath.Path, needed: int) -> None:
        try:
            self._arrays.wait()
            seal_together(target, lambda: _sums(target))
            if jax.process_index() == 0:
                write_whole(self.folder.parent / PROGRESS, json.dumps({"sealed": int(target.name)}) + "\n")
                self._delete_old()
            if self._local is not None:
                self._local_thread.submit(self._local.remove, before=int(target.name) + 1)
        except Exception as error:
            raise self._failed(target, needed, error) from error

    def _failed(self, target: epath.Path, needed: int, error: Exception) -> SaveError:
        """The error of a save that failed, of which nothing is left that would take up room.

        Of several processes others still write into it, and would fail of its absence before this error is told; the
        next start removes it.
        """
        with contextlib.suppress(OSError):
            if jax.process_count() == 1 and self._making == target and not (target / SEAL).exists():
                # Where one of the writers has failed, others may go on for a moment, and write into what is removed.
                for _ in range(10):
                    with contextlib.suppress(OSError):
                        target.rmtree()
                    time.sleep(0.1)
        said = getattr(error, "strerror", None) or reason(str(error))
        return SaveError(str(write_error(target, said[:200], needed)))

    def beside(self, key: str) -> None:
        """Says what weights, that are not trained and in no checkpoint, a state of this run is nothing without.

        Raises:
            ConfigError: the state that was restored was trained beside others.
        """
        if self.frozen_then and self.frozen_then != key:
            raise ConfigError(
                f"{self.folder.parent}: its checkpoints were trained beside other frozen weights than those that "
                "model.path has now; give the model of then back, or choose another run_dir"
            )
        self._run["frozen"] = key

    def check(self) -> None:
        """Waits for nothing.

        Raises:
            SaveError: the save that was under way has failed.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            SaveError: the save that was under way failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the save under way: leaving Python without this would lose it.

        Raises:
            SaveError: that save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._local_thread.shutdown()
            self._arrays.close()

    def restore(self, abstract: Any, step: int | None = None, *, local: bool = False) -> Any | None:
        """The newest state that verifies, or None when no save was ever finished; changes nothing on disk.

        Args:
            abstract: pytree of ShapeDtypeStructs with shardings; the same values come back on any mesh.
            step: of one that is asked for.
            local: take the copies on the disks of the hosts, if there are any, all of them whole and newer.

        Raises:
            ConfigError: the arrays are of another model or optimizer, or every finished checkpoint is damaged, or that
                of `step` is, or is not there.
        """
        if local and self._local is not None:
            sealed = int(first_text("newest", str(max(sealed_steps(self.folder), default=-1))))
            wanted = _leaves_by_name(abstract)
            if (found := self._local.newest(wanted, after=sealed)) is not None:
                at, meta = found
                newest = "there is no checkpoint" if sealed < 0 else f"the newest checkpoint is {sealed}"
                self._say(f"going on from the local copies of step {at}; {newest}")
                return self._restored(meta, self._local.read(at, meta, wanted), abstract)
        if step is None:
            step = self._newest_verified()
        elif step not in (there := sealed_steps(self.folder)):
            raise ConfigError(f"{self.folder}: no finished checkpoint of step {step}; there are {there}")
        elif (problem := _agreed_problem(self.folder / str(step))) is not None:
            raise ConfigError(f"{self.folder / str(step)}: {problem}")
        if step is None:
            return None
        target = self.folder / str(step)
        try:
            meta = read_object(target / META)
            self._check_arrays(meta, abstract)
            leaves = self._arrays.restore(target / "state", _leaves_by_name(abstract))
        except ConfigError:
            raise
        except Exception as error:  # whatever Orbax makes of files that are as they were sealed, and still no state
            raise ConfigError(f"{target}: cannot be read: {' '.join(str(error).split())[:200]}") from error
        self._at = step
        return self._restored(meta, leaves, abstract)

    def _restored(self, meta: dict[str, Any], leaves: dict[str, Any], abstract: Any) -> Any:
        self.progress = meta.get("progress", {})
        self.frozen_then = meta.get("run", {}).get("frozen", "")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in _leaves_by_name(abstract)])

    def tidy(self) -> None:
        """Clears away what `restore` passed over; to be called by the process that holds the run folder.

        What was half saved or half removed is removed, if it is known to be ours; anything else is renamed, so that its
        step can be saved again when training comes back to it.
        """
        done_by_first("tidied", self._tidy)

    def _tidy(self) -> None:
        if not self.folder.is_dir():
            return
        for child in self.folder.iterdir():
            if child.is_dir() and (child / REMOVING).exists():
                finish_removing(child)
        for step in all_steps(self.folder):
            if step in self._passed_over or self._is_unfinished(self.folder / str(step)):
                self._make_room(step)

    def best_loss(self) -> float:
        """The smallest held-out loss among the finished checkpoints, infinity where there is none."""
        found = min((self._eval_loss(step) for step in sealed_steps(self.folder)), default=math.inf)
        return float(first_text("best_loss", repr(found)))

    def best_step(self) -> int:
        """That of the finished checkpoint with the smallest held-out loss, the same on every process.

        Raises:
            ConfigError: of none it is known.
        """
        losses = {step: self._eval_loss(step) for step in sealed_steps(self.folder)}
        known = [step for step, loss in losses.items() if math.isfinite(loss)]
        found = int(first_text("best_step", str(min(known, key=losses.__getitem__) if known else NONE_FOUND)))
        if found == NONE_FOUND:
            raise ConfigError(f"{self.folder}: no checkpoint has a held-out loss (data.eval and eval.every measure it)")
        return found

    def step_of(self, asked: int | str) -> int | None:
        """The step of a checkpoint as users ask for it: a number, "best", or "last", which is None here.

        Raises:
            ConfigError: as `best_step`.
        """
        return self.best_step() if asked == BEST else None if asked == LAST else int(asked)

    def note_export(self, step: int) -> None:
        """Notes of which checkpoint the export is; what is sealed later takes the note away. Every process calls this.

        Raises:
            WriteError: it cannot be written.
        """
        self.wait()
        if jax.process_index() == 0:
            note = {"sealed": max(sealed_steps(self.folder), default=None), "exported": step}
            write_whole(self.folder.parent / PROGRESS, json.dumps(note) + "\n")

    def exported_step(self) -> int | None:
        """Of which checkpoint the export is, the same on every process; None where that is not known."""
        found: Any = None
        with contextlib.suppress(OSError, ValueError):
            found = read_object(self.folder.parent / PROGRESS).get("exported")
        told = json.loads(first_text("exported", json.dumps(found)))
        return told if isinstance(told, int) else None

    def newest_before(self, step: int) -> epath.Path | None:
        """The newest finished checkpoint of a state before an earlier step than `step`; None where there is none."""
        steps = [saved for saved in sealed_steps(self.folder) if saved < step]
        return self.folder / str(steps[-1]) if steps else None

    def _newest_verified(self) -> int | None:
        """All processes look together, each at its share; what process 0 finds in the folder is there for all."""
        found, damaged = NONE_FOUND, {}
        steps, last = json.loads(first_text("checkpoints", json.dumps([all_steps(self.folder), self._last_sealed()])))
        self._passed_over = {}
        for step in reversed(steps):
            problem = _agreed_problem(self.folder / str(step))
            if problem is None:
                found = step
                break
            if problem == UNFINISHED and step == last:
                problem = f"it was finished, but its {SEAL} is gone"
            self._passed_over[step] = problem
            if problem != UNFINISHED:
                damaged[step] = problem
            self._say(f"passed over checkpoint {step}: {problem}")
        if found >= 0 and last is not None and last > found and last not in self._passed_over:
            self._say(f"checkpoint {last}, which was finished, is not there any more")
        if found < 0 and damaged:
            found = ALL_DAMAGED
        if found == ALL_DAMAGED:
            listed = "".join(f"\n  checkpoint {step}: {problem}" for step, problem in damaged.items())
            raise ConfigError(
                f"{self.folder}: every finished checkpoint is damaged{listed}\n"
                "nothing was changed; choose another run_dir, or start anew with --restart, which moves this run aside"
            )
        return found if found >= 0 else None

    def _check_arrays(self, meta: dict[str, Any], abstract: Any) -> None:
        """Orbax would cast or fail obscurely where shapes or dtypes differ."""
        saved = meta["arrays"]
        arrays = {name: _describe(leaf) for name, leaf in _leaves_by_name(abstract).items()}
        differing = [name for name in {**saved, **arrays} if saved.get(name) != arrays.get(name)]
        if differing:
            listed = "\n".join(f"  {n}: {saved.get(n)} then, {arrays.get(n)} now" for n in differing[:10])
            name = meta.get("run", {}).get("fingerprint", {}).get("optim.name")
            by = f" (its optim.name is {name})" if name else ""
            raise ConfigError(
                f"{self.folder.parent} holds a run of another model or optimizer{by}; "
                f"{len(differing)} arrays differ:\n{listed}\nchoose another run_dir"
            )

    def _make_room(self, step: int) -> None:
        """Moves or removes what stands where a checkpoint of this step will be."""
        target = self.folder / str(step)
        if self._is_unfinished(target):
            target.rmtree()
        if not target.is_dir():  # A file in this place is not ours; saving will say that it is in the way.
            return
        self._say(f"{target}: renamed to {set_aside(target, 'passed-over').name}")

    def _is_unfinished(self, target: epath.Path) -> bool:
        """Whether a folder is a save of this run that was cut off: we write its meta.json before all else."""
        if not target.is_dir() or os.path.islink(target) or (target / SEAL).exists():
            return False
        names = {child.name for child in target.iterdir()}
        if names <= {aside_of(target / META).name}:
            return True
        ours = {META, "state", *(aside_of(target / name).name for name in (META, SEAL))}
        if any(name not in ours and not name.startswith("state.orbax-checkpoint-tmp") for name in names):
            return False  # Somebody else has put something into it.
        last = self._last_sealed()
        if last is not None and int(target.name) <= last:
            return False  # It was finished once.
        try:
            meta = read_object(target / META)
        except (OSError, ValueError):
            return False
        run, mine = meta.get("run"), self._run.get("fingerprint")
        return meta.get("step") == int(target.name) and isinstance(run, dict) and run.get("fingerprint") == mine

    def _last_sealed(self) -> int | None:
        """The newest step that was sealed, as far as anyone knows."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            sealed = read_object(self.folder.parent / PROGRESS)["sealed"]
            return sealed if type(sealed) is int else None
        return None

    def _eval_loss(self, step: int) -> float:
        try:
            loss = read_sealed_object(self.folder / str(step), META)["eval_loss"]
            return math.inf if loss is None else float(loss)
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf  # damaged; not worth keeping as the best

    def _delete_old(self) -> None:
        """Keeps the newest and the best; runs after a seal, so that there is always a finished one."""
        steps = sealed_steps(self.folder)
        kept = set(steps[-self._config.keep :])
        best = min(steps, key=self._eval_loss)
        if math.isfinite(self._eval_loss(best)):
            kept.add(best)
        for step in steps:
            if step not in kept:
                remove_sealed(self.folder / str(step))


NONE_FOUND, ALL_DAMAGED = -1, -2


def all_steps(folder: epath.Path) -> list[int]:
    """The steps of which `checkpoints/` has a folder, finished or not, ascending.

    Raises:
        ConfigError: it is no folder.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise ConfigError(f"{folder}: a file, where a run has its folder of checkpoints; move it away")
    # Only as we write them: `007` and `²` are digits too.
    names = [child.name for child in folder.iterdir() if child.name.isascii() and child.name.isdecimal()]
    return sorted(int(name) for name in names if name == str(int(name)))


def sealed_steps(folder: epath.Path) -> list[int]:
    """The steps whose checkpoints were finished, ascending."""
    return [step for step in all_steps(folder) if (folder / str(step) / SEAL).exists()]


def checkpoint_problem(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint, None when it is as it was sealed, and the one that its name says."""
    return problem_of(folder) or _meta_problem(folder)


def _agreed_problem(folder: epath.Path) -> str | None:
    """As `checkpoint_problem`; each process looks at a share of the bytes."""
    problem = problem_together(folder)
    return problem or first_text("meta", _meta_problem(folder) or "" if jax.process_index() == 0 else "") or None


def _meta_problem(folder: epath.Path) -> str | None:
    try:
        meta = read_object(folder / META)
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    if not isinstance(meta.get("arrays"), dict) or type(meta.get("step")) is not int:
        return f"its {META} does not say what it holds"
    return None if meta["step"] == int(folder.name) else f"it is a copy of checkpoint {meta['step']}"


def newest_run(folder: epath.Path) -> dict[str, Any]:
    """What the newest checkpoint whose meta.json is as it was sealed says of its run; {} where there is none."""
    if not folder.is_dir():
        return {}
    for step in reversed(sealed_steps(folder)):
        try:
            meta = read_sealed_object(folder / str(step), META)
        except (OSError, ValueError):
            continue
        if meta.get("step") == step and isinstance(meta.get("run"), dict) and meta["run"]:
            return meta["run"]
    return {}


def _sums(target: epath.Path) -> dict[str, Entry]:
    """Of what this process has written, process 0 of all that is no other's."""
    if (process := jax.process_index()) == 0:
        others = [f"state/{part_of(number)}" for number in range(1, jax.process_count())]
        return checksums(target, but=others)
    own = f"state/{part_of(process)}"
    return checksums(target, within=own) if (target / own).is_dir() else {}


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree under their paths, a form that Orbax restores without knowing our types."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
