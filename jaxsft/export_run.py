"""The model of a run, or its adapters, written anew from any of its checkpoints.

In: a run folder. Out: a folder like the one that a run ends with, or with the adapters in the weights.
"""

import contextlib
import pathlib
from collections.abc import Callable

from flax import nnx

from jaxsft.config import ConfigError
from jaxsft.config_files import load_run_config
from jaxsft.disk.writing import place
from jaxsft.folders.pretrained import export_model
from jaxsft.model.abstract import whole
from jaxsft.model.freezing import frozen_key
from jaxsft.setup import Setup
from jaxsft.training.checkpoint import Checkpointer, newest_run
from jaxsft.training.step import abstract_state, evaluation_params


def export_run(
    run_dir: str,
    *,
    step: int | str | None = None,
    merge: bool = False,
    out: str | None = None,
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Writes the model of a checkpoint; returns the folder.

    Args:
        run_dir: folder of the run.
        step: of the checkpoint, "best" for that with the smallest held-out loss, or "last" for the newest; left out: as
            `checkpoint.export` of the run says.
        merge: adapters are added to the weights of their base, so that a whole model is written.
        out: where to; left out: `export` in the run folder where no step is given, and beside it for others:
            `export-best`, `export-step-100`, `export-merged`.
        say: is told what is done.

    Raises:
        ConfigError: no run, no such checkpoint, nothing to merge, or the base is another one now.
        ExportError: it could not be written.
    """
    config = load_run_config(run_dir)
    folder = place(run_dir).resolve()
    setup = Setup(config, say=say)
    lora = setup.pretrained.lora
    if merge and lora is None:
        raise ConfigError(f"{run_dir}: --merge-lora: this run has no adapters; its export is the whole model")
    weights = setup.pretrained.model.weights
    is_parted = merge and setup.pretrained.decoder_config.tie_embeddings and "adapter" in weights["embed_tokens"]
    if is_parted:
        say("the embedding has an adapter, and the output projection, one with it so far, has none: they are parted")
        model = config.model.model_copy(update={"tie_embeddings": False})
        setup = Setup(config.model_copy(update={"model": model}), say=say)
    with contextlib.closing(Checkpointer(folder / "checkpoints", config.checkpoint, say)) as checkpointer:
        number = checkpointer.step_of(config.checkpoint.export if step is None else step)
        state = checkpointer.restore(abstract_state(setup.pretrained.model.params, config.optim, setup.mesh), number)
        if state is None:
            raise ConfigError(f"{folder}: no finished checkpoint yet, so there is nothing to export")
        frozen = setup.load_frozen()
        of_run = nnx.State({name: part for name, part in frozen.items() if not (is_parted and name == "lm_head")})
        checkpointer.beside(frozen_key(of_run))
    words = [] if step is None else [step if isinstance(step, str) else f"step-{step}"]
    target = place(out) if out else folder / "-".join(["export", *words, *["merged"] * merge])
    say(f"exporting checkpoint {int(state.step)} of {folder} to {target}")
    weights = whole(evaluation_params(config.optim, state), frozen)
    facts = newest_run(folder / "checkpoints").get("data", [])  # as the run found it; the data may be elsewhere now
    card = setup.card(int(state.step), facts, merge=merge)
    export_model(setup.pretrained, setup.tokenizer, weights, target, merge=merge, card=card, say=say)
    return target
