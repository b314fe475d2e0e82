"""What a config asks for: tokenizer, model, data and mesh of a run, each opened when it is first asked for.

In: a `Config`. Out: a `Setup`, which `train`, `preview`, `evaluate` and `compare` share; a command that asks for no
model reads none. Every mistake of a user that can be known without the weights is found here.
"""

import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxsft.answers.evaluate import Examiner, HeldOut, describe_questions, make_questions
from jaxsft.batch import Batch
from jaxsft.batches.loader import Loader
from jaxsft.batches.mixture import Dataset, check_weights, make_dataset
from jaxsft.batches.overlap import check_overlap
from jaxsft.batches.prepare import prepare, read_items
from jaxsft.batches.stream import StreamLoader
from jaxsft.chat.encoder import ChatEncoder
from jaxsft.config import Config, ConfigError, SourceConfig
from jaxsft.disk.writing import place
from jaxsft.folders.pretrained import (
    OpenTokenizer,
    Pretrained,
    check_positions,
    compute_dtype,
    is_exported_as_adapter,
    load_frozen,
    open_model,
    open_tokenizer,
)
from jaxsft.folders.weights.key import weights_key
from jaxsft.hosts.agreement import agree, share
from jaxsft.hosts.table import num_processes
from jaxsft.mesh import check_divisible, make_mesh
from jaxsft.model.abstract import with_attention
from jaxsft.model.attention import Choice, choose_kernel
from jaxsft.model.cudnn import FEWEST_SEGMENTS, room_for_segments
from jaxsft.model.kernel_check import check_kernel
from jaxsft.model.pairs import share_of_whole_rows
from jaxsft.preview.make import make_preview
from jaxsft.preview.records import Preview
from jaxsft.report.card import Base, card_of_run
from jaxsft.rows.strict import DataError
from jaxsft.training.optimizers.params import check_groups
from jaxsft.training.run_folder import template_date
from jaxsft.training.step import put_batch

COUNTED_ROWS = 64
"""Of the first batch, by which a kernel is chosen."""


class Setup:
    """The parts of a run, opened one by one as they are asked for, and then kept."""

    def __init__(
        self, config: Config, *, restart: bool = False, say: Callable[[str], None] = lambda text: None
    ) -> None:
        """Opens nothing yet.

        Args:
            config: of the run.
            restart: the run that is in its folder is of no account.
            say: is told how far a long preparation is, and what is odd about held-out rows.

        Raises:
            ConfigError: `run_dir` cannot be a run folder.
        """
        self._say = say
        self.config = config
        self.config = _with_date(config, None if restart or config.run_dir is None else self.folder)
        """With the day that templates see."""

    @functools.cached_property
    def folder(self) -> epath.Path:
        """The folder of the run, absolute.

        Raises:
            ConfigError: it is not given, or no place that can be written to.
        """
        run_dir = self.config.run_dir
        if run_dir is None:
            raise ConfigError("run_dir: required for a run whose config is no file, not given")
        return epath.Path(place(run_dir, "run_dir")).resolve()

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Raises ConfigError where the devices cannot be cut so."""
        return make_mesh(self.config.mesh)

    @functools.cached_property
    def tokenizer(self) -> OpenTokenizer:
        """Raises ConfigError, see `open_tokenizer`."""
        data = self.config.data
        return open_tokenizer(self.config.model, data.chat_template, set_eos=data.set_eos)

    @functools.cached_property
    def encoder(self) -> ChatEncoder:
        """What makes examples of rows, trained and held-out ones alike.

        Raises:
            DataError: the chat template cannot be trained on; says why, and what would help.
        """
        return ChatEncoder(self.tokenizer.tokenizer, self.config.data, self.tokenizer.stops)

    @functools.cached_property
    def pretrained(self) -> Pretrained:
        """The model without its weights. Raises ConfigError, see `open_model`."""
        return open_model(self.config.model, self.tokenizer, self.config.lora, self.config.train.only)

    def agree_on_model(self) -> None:
        """Looks whether all processes have the same tokenizer, template and model, before rows or weights are read.

        Raises:
            ConfigError: they do not; on all of them.
        """
        if num_processes() == 1:
            return
        facts = {"tokenizer": self.tokenizer.key, "config.json": self.pretrained.hf_config}
        stored = self.pretrained.stored
        facts["weights"] = "random" if stored is None else weights_key(stored)
        if self.pretrained.source.adapter is not None:
            facts["adapter"] = weights_key(self.pretrained.source.adapter.stored)
        agree("model and tokenizer", facts | self.encoder.settings, say=self._say)

    def agree_on_batches(self) -> None:
        """Looks whether all processes will make the same batches.

        Raises:
            DataError: they will not; on all of them.
        """
        rows, length = self.loader.shape
        plan = {
            "steps": self.num_steps,
            "rows of a step": rows,
            "tokens of a row": length,
            "microbatches of a step": self.config.train.num_microbatches,
            "mesh": str(dict(self.mesh.shape)),
            "kernel of attention": self.attention.split()[0],
        }
        agree("rows and batches", plan | self.fingerprint, error=DataError, say=self._say)

    @functools.cached_property
    def loader(self) -> Loader | StreamLoader:
        """The batches of the run, prepared or streamed.

        Raises:
            DataError, ConfigError: the training rows are not usable.
        """
        config = self.config
        if config.data.stream:
            return StreamLoader(
                config.data,
                self.encoder,
                tokenizer_files_key=self.tokenizer.key,
                batch_size=config.train.batch_size,
                seed=config.seed,
            )
        check_weights(config.data.train)  # before all of it is prepared
        return Loader(
            self.prepared(config.data.train),
            seq_len=config.data.seq_len,
            batch_size=config.train.batch_size,
            seed=config.seed,
            packing=config.data.packing,
        )

    @functools.cached_property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.config.train.steps or self.loader.num_steps(self.config.train.epochs)

    def check_fit(self) -> None:
        """Looks whether mesh, model and batch go together.

        Raises:
            ConfigError: the mesh does not divide the batch or the model, or keys do not fit the model.
        """
        config, mesh, decoder_config = self.config, self.mesh, self.pretrained.decoder_config
        check_positions(decoder_config, config.data.seq_len)
        router_losses = [key for key in ("router_balance", "router_z") if getattr(config.optim, key)]
        if router_losses and decoder_config.routing is None:
            keys = ", ".join(f"optim.{key}" for key in router_losses)
            raise ConfigError(f"{keys}: no effect on {config.model.path}, which is no mixture of experts")
        key = "train.microbatch_size" if config.train.microbatch_size else "train.batch_size"
        sizes = {f"{key} (b)": config.train.microbatch_rows, "data.seq_len (t)": config.data.seq_len}
        check_divisible(mesh, self.pretrained.model.weights, sizes)
        check_groups(config.optim, self.pretrained.model.params)

    @functools.cached_property
    def attention(self) -> str:
        """What computes attention, and why: a line for the log. A kernel is held against the formula first.

        Where the rows decide, or a kernel must know something of them, `pretrained` is a model with it from now on.

        Raises:
            ConfigError: the kernel that is asked for cannot be had, or computes something else.
        """
        model, structure = self.config.model, self.pretrained.decoder_config
        dtype = compute_dtype(model)
        tokens = self.config.train.microbatch_rows, self.config.data.seq_len
        q, k = (
            jax.ShapeDtypeStruct((*tokens, heads, structure.head_dim), dtype)
            for heads in (structure.num_heads, structure.num_kv_heads)
        )
        choose = functools.partial(
            choose_kernel, model.attention, q, k, soft_cap=structure.attention_soft_cap, has_sinks=structure.sinks
        )
        num_segments = None
        with jax.set_mesh(self.mesh):
            choice = choose(num_segments=FEWEST_SEGMENTS)  # before the rows are looked at
            if choice.kernel == "cudnn":
                num_segments = self._room_for_segments()
                choice = choose(num_segments=num_segments)
            elif model.attention == "auto" and choice.kernel != "xla":
                choice = choose(share=self._share_of_whole_rows())
            apart = ""
            if choice.kernel != "xla":
                try:
                    apart = f"{check_kernel(choice.kernel, structure, dtype):.2%}"
                except ConfigError as error:
                    # It was never seen on a GPU, and may be refused by a driver.
                    if (model.attention, choice.kernel) != ("auto", "cudnn"):
                        raise
                    choice = Choice("xla", str(error))
        if choice.kernel in ("packed", "cudnn"):
            decoder = with_attention(self.pretrained.model, choice.kernel, num_segments=num_segments)
            self.pretrained = self.pretrained._replace(model=decoder)
        return f"{choice.kernel} ({choice.why})" + (f"; apart from the formula by {apart} at most" if apart else "")

    def _room_for_segments(self) -> int | None:
        """Segments of a row at most, trained or held out, as a power of two; None of a stream of packed rows."""
        of_loaders = [self.loader.most_segments(self.num_steps)]
        of_loaders += [each.loader.most_segments(each.loader.steps_per_epoch) for each in self.held_out]
        known = [each for each in of_loaders if each is not None]
        return room_for_segments(max(known)) if len(known) == len(of_loaders) else None

    def _share_of_whole_rows(self) -> float | None:
        """What kernels for packed rows compute of the first rows, the same on every process; None of a stream.

        Rows of a stream are not read before the run has its folder, nor again when it goes on.
        """
        if isinstance(self.loader, StreamLoader):
            return None
        rows = self.loader.batch(0, slice(0, min(self.config.train.batch_size, COUNTED_ROWS)))
        structure = self.pretrained.decoder_config
        return share_of_whole_rows(
            np.asarray(rows.segment_ids),
            np.asarray(rows.positions),
            group_size=structure.num_heads // structure.num_kv_heads,
            head_dim=structure.head_dim,
            windows=structure.windows,
        )

    @functools.cached_property
    def held_out(self) -> list[HeldOut]:
        """The sets of `data.eval`.

        Raises:
            DataError: the held-out rows are not usable.
        """
        return [self._held_out(name, source) for name, source in self.config.data.eval.items()]

    @functools.cached_property
    def examiner(self) -> Examiner | None:
        """What examines the states of this run on each set of `data.eval`; None where there is none.

        Raises:
            DataError: the held-out rows are not usable.
        """
        sets = self.held_out
        if not sets:
            return None
        return Examiner(
            self.config.eval, model=self.pretrained.model, mesh=self.mesh, sets=sets, tokenizer=self.tokenizer
        )

    def load_frozen(self) -> Any:
        """The weights that are not trained, from where they lie; no others are read."""
        return load_frozen(self.pretrained, self.mesh, seed=self.config.seed)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to be continued: the data in its order, the model, and the optimizer."""
        model = json.dumps(self.pretrained.hf_config, sort_keys=True).encode()
        return (
            self.loader.fingerprint
            | {
                "seed": self.config.seed,
                "data.packing": self.config.data.packing,
                "train.batch_size": self.config.train.batch_size,
                "model.weights": self.config.model.weights,
                "optim.name": self.config.optim.name,
                "model: config.json": hashlib.sha256(model).hexdigest()[:16],
            }
            | {key: value for key, value in self._trained if value is not None}
        )

    @property
    def _trained(self) -> list[tuple[str, Any]]:
        lora, kind = self.pretrained.lora, self.config.model.quantize
        return [
            ("lora", None if lora is None else lora.model_dump()),
            ("train.only", self.config.train.only),
            ("model.quantize", None if kind == "none" else kind),
        ]

    @property
    def notes(self) -> list[str]:
        """What a user should know of tokenizer, model and sources before the first step, in sentences."""
        loader, sets = self.loader, self.examiner.sets if self.examiner else ()
        trained = loader.described if isinstance(loader, StreamLoader) else [s.report for s in loader.dataset.sources]
        held_out = [source.report for each in sets for source in each.loader.dataset.sources]
        of_sources = [note for report in (*trained, *held_out) for note in report["notes"]]
        return [*self.tokenizer.notes, *self.pretrained.notes, *self.encoder.notes, *of_sources]

    def check_overlap(self) -> None:
        """Looks for held-out rows that are trained as well.

        Raises:
            DataError: there are some.
        """
        sources = None if isinstance(self.loader, StreamLoader) else self.loader.dataset.sources
        for name, loader, _ in self.examiner.sets if self.examiner else ():
            check_overlap(self.config.data, name, loader.dataset.sources, sources, say=self._say)

    def prepared(self, sources: Sequence[SourceConfig], *, limit: int | None = None) -> Dataset:
        """Some sources of the config as one dataset, each with at most `limit` rows.

        Raises:
            DataError, ConfigError: rows are not usable.
        """
        data, key = self.config.data, self.tokenizer.key
        prepared = [
            prepare(data, source, self.encoder, tokenizer_files_key=key, limit=limit, say=self._say)
            for source in sources
        ]
        return make_dataset(prepared, sources, ends=data.mixture_ends)

    def preview(self) -> Preview:
        """What will be trained, for the eye."""
        opened, loader, title = self.tokenizer, self.loader, self.folder.name
        return make_preview(
            loader, loader.dataset, opened.tokenizer, stops=opened.stops, title=title, notes=opened.notes
        )

    def card(self, step: int, data: Sequence[Mapping[str, Any]], *, merge: bool = False) -> str:
        """The model card of a checkpoint of this run.

        Args:
            step: of the checkpoint.
            data: what `data_facts` gave when it was trained.
            merge: adapters are in the weights of the export.
        """
        pretrained = self.pretrained
        base = Base(pretrained.source.name, pretrained.folder, is_random=self.config.model.weights == "random")
        is_adapter = is_exported_as_adapter(pretrained, merge=merge)
        return card_of_run(self.folder, self.config, base, step=step, is_adapter=is_adapter, data=data)

    def place_batch(self, step: int) -> Batch:
        """The batch of a step on the devices, leaves [B, T]; each process builds only the rows that its devices hold.

        Raises:
            DataError: a row has an id without an embedding, which would be taken for another one.
        """
        vocab_size = self.pretrained.decoder_config.vocab_size

        def rows_of(rows: slice) -> Batch:
            batch = self.loader.batch(step, rows)
            if batch.tokens.size and (largest := int(batch.tokens.max())) >= vocab_size:
                raise DataError(
                    f"step {step}: a row has token {largest}, but the model knows ids 0 to {vocab_size - 1}"
                )
            return batch

        return put_batch(rows_of, self.loader.shape, self.mesh)

    def _held_out(self, name: str, source: SourceConfig) -> HeldOut:
        config, encoder = self.config, self.encoder
        limit = config.eval.examples
        loader = Loader(
            self.prepared([source], limit=limit),
            seq_len=config.data.seq_len,
            batch_size=config.train.microbatch_rows,
            seed=config.seed,
            packing=config.data.packing,
            shuffle=False,
        )
        num_questions = None if config.eval.exact_match else config.eval.samples
        items = read_items(config.data, source, encoder, limit=limit) if num_questions != 0 else []
        notes: list[str] = []
        questions = make_questions(
            items, encoder, ask=config.eval.ask, most=num_questions, seq_len=config.data.seq_len, say=notes.append
        )
        if config.eval.exact_match:
            notes += describe_questions(questions, encoder, max_new_tokens=config.eval.max_new_tokens)
        for note in notes:
            self._say(f"held-out {name}: {note}")
        return HeldOut(name, loader, questions)


def _with_date(config: Config, folder: epath.Path | None) -> Config:
    """The config with the day that templates see: that on which the run in `folder` began, else today, for all."""
    if config.data.template_date is not None:
        return config
    began = template_date(folder) if folder is not None else None
    today = began or datetime.date.today()
    # It may be midnight between two processes.
    day = share("which day it is", today.isoformat(), lambda days: days[0])
    data = config.data.model_copy(update={"template_date": day})
    return config.model_copy(update={"data": data})
