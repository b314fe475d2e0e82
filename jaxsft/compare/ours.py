"""Our run of a comparison: `python -m jaxsft.compare.ours FOLDER`.

In: FOLDER/config.yaml and request.json. Out, in FOLDER/ours, what a baseline writes to FOLDER/theirs: `metrics.jsonl`,
`facts.json` and, where the request asks for it, the first row layer by layer, the gradients of the first step, the
parameters after the first and the last step, and the batches as the devices got them. All goes the way of `train`.
"""

import functools
import json
import math
import pathlib
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxsft.batch import Batch
from jaxsft.config import Config
from jaxsft.config_files import load_config
from jaxsft.folders.peft.write import write_tensors
from jaxsft.folders.pretrained import Pretrained, adapted_model, load_weights
from jaxsft.folders.weights.save import write_weights
from jaxsft.folders.weights.stored import open_folder
from jaxsft.mesh import ROW_AXES
from jaxsft.model.abstract import whole
from jaxsft.setup import Setup
from jaxsft.training.metrics import Totals, memory_gib, summarise, to_json_line
from jaxsft.training.step import divisor, init_state, make_train_step, split_microbatches, summed_gradients

MAX_FILE_BYTES = 5 * 10**9
PLACES = ("_name_or_path", "transformers_version", "dtype")
"""Fields of a config that do not say what a model computes."""


def main(folder: pathlib.Path) -> None:
    """The whole run of a request."""
    began = time.perf_counter()
    request = json.loads((folder / "request.json").read_text())
    config = load_config(folder / "config.yaml")
    ours = folder / "ours"
    ours.mkdir(exist_ok=True)
    setup = Setup(config)
    mesh, pretrained, loader = setup.mesh, setup.pretrained, setup.loader
    params, frozen = pretrained.model.split(load_weights(pretrained, mesh, seed=config.seed))
    num_microbatches, looks_inside = request["num_microbatches"], request["looks_inside"]

    with jax.set_mesh(mesh):
        if looks_inside:
            look_inside(pretrained, whole(params, frozen), loader.batch(0), request, ours)
            gradients = jax.jit(functools.partial(_gradients, pretrained, config, num_microbatches))
            _write(pretrained, gradients(params, frozen, setup.place_batch(0)), frozen, ours / "gradients")
        state = init_state(params, config.optim, mesh)
        train_step = make_train_step(
            pretrained.model,
            config.optim,
            num_steps=request["schedule_steps"],
            num_microbatches=num_microbatches,
            mesh=mesh,
        )
        startup = time.perf_counter() - began
        totals, batches = Totals(), []
        with (ours / "metrics.jsonl").open("w") as metrics:
            for step in range(request["num_steps"]):
                batch = setup.place_batch(step)
                if looks_inside:
                    batches.append(jax.device_get(batch))
                at = time.perf_counter()
                state, of_step = jax.block_until_ready(train_step(state, frozen, batch))
                seconds = time.perf_counter() - at
                line, totals = summarise([jax.device_get(of_step)], totals, batch_positions=math.prod(loader.shape))
                line |= {"seconds": seconds, "memory_gib": memory_gib()}
                metrics.write(to_json_line({"step": step + 1} | line) + "\n")
                metrics.flush()
                print(f"jaxsft: step {step + 1} of {request['num_steps']}, loss {line['loss']:.4f}", flush=True)
                if step == 0:
                    startup += seconds
                    if looks_inside:
                        _write(pretrained, state.params, frozen, ours / "params_first")
    if looks_inside:
        _write(pretrained, state.params, frozen, ours / "params_last")
        for leaf in Batch._fields:
            np.save(ours / f"{leaf}.npy", np.stack([getattr(batch, leaf) for batch in batches]))
    text = json.dumps(facts(pretrained, request) | {"startup_seconds": startup}, default=str)
    (ours / "facts.json").write_text(text)


def look_inside(
    pretrained: Pretrained, weights: Any, batch: Batch, request: dict[str, Any], folder: pathlib.Path
) -> None:
    """What a row becomes at some positions: the residual stream before and after each layer, and the logits."""
    at, positions = request["looked_row"], np.array(request["looked_at"])

    def run(weights: Any, row: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(pretrained.model.graphdef, weights)
        inputs = row.tokens, row.segment_ids, row.positions
        logits = model.logits(model(*inputs).hidden[:, positions])
        return model.residuals(*inputs)[:, 0, positions], logits[0, :, : model.config.vocab_size]

    # The row is repeated as often as the mesh cuts rows, since it can only cut evenly.
    copies = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in ROW_AXES)
    row = jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf[at : at + 1]), copies, axis=0), batch)
    residuals, logits = (np.asarray(each, np.float32) for each in jax.jit(run)(weights, row))
    save_file({"residuals": residuals, "logits": logits}, folder / "first_row.safetensors")


def _gradients(
    pretrained: Pretrained, config: Config, num_microbatches: int, params: Any, frozen: Any, batch: Batch
) -> Any:
    """Gradients of the loss of the first step, before clipping."""
    microbatches = split_microbatches(batch, num_microbatches)
    sums = summed_gradients(pretrained.model.graphdef, params, frozen, microbatches, optim=config.optim)
    return jax.tree.map(lambda gradient: gradient / divisor(sums.loss.weight_sum), sums.gradients)


def _write(pretrained: Pretrained, tree: Any, frozen: Any, folder: pathlib.Path) -> None:
    """Trained parameters or their gradients as safetensors, under the names that transformers or PEFT gives them."""
    folder.mkdir(exist_ok=True)
    if pretrained.lora is not None:
        with_base = pretrained._replace(stored=open_folder(folder.parents[1] / "model"))
        write_tensors(folder / "adapter_model.safetensors", adapted_model(with_base, whole(tree, frozen)))
        return
    write_weights(
        folder,
        tree,
        pretrained.family,
        vocab_size=pretrained.decoder_config.vocab_size,
        dtype=np.dtype(np.float32),
        max_shard_bytes=MAX_FILE_BYTES,
    )


def facts(pretrained: Pretrained, request: dict[str, Any]) -> dict[str, Any]:
    """Versions and the settings that were used."""
    import transformers

    raw = pretrained.hf_config
    model_config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw).to_dict()
    model_config = {key: value for key, value in model_config.items() if key not in PLACES}
    settings = {key: value for key, value in request.items() if not key.startswith("look")}
    devices = jax.devices()
    return {
        "versions": {"Python": platform.python_version(), "jax": jax.__version__},
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "settings": settings | {f"model.{key}": value for key, value in model_config.items()},
        "caveats": ["memory and start-up include looking inside the first step"] if request["looks_inside"] else [],
    }


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
