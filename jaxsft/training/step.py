"""The train step and the evaluation step: pure functions of state and batch, compiled in one place.

A step is `train_step(state, frozen, batch) -> (state, metrics)`: a scan over microbatches sums the gradients of
the loss *sum* in float32, one division by the sum of all weights follows, then clipping and the optimizer. A loss or
gradient that is not finite leaves parameters and optimizer as they were and is counted.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxsft.batch import Batch
from jaxsft.config import LossConfig, OptimConfig
from jaxsft.mesh import AnyMesh, batch_sharding, constrain, constrain_params, replicated, shardings
from jaxsft.model.abstract import Model, whole
from jaxsft.model.architecture import DecoderConfig
from jaxsft.model.experts import RouterSums, router_losses
from jaxsft.model.noise import row_keys
from jaxsft.training.compiler_options import compiler_options
from jaxsft.training.loss import LossSums, next_token_objective
from jaxsft.training.metrics import StepMetrics
from jaxsft.training.objective import PLAIN
from jaxsft.training.optim import Course, make_course, make_optimizer, rate_at
from jaxsft.training.optimizers.optimizer import Given, Optimizer
from jaxsft.training.optimizers.schedule_free import averaged, is_averaging
from jaxsft.training.rounding import step_key


class TrainState(NamedTuple):
    """Everything that a step changes; `params` and moments are pytrees of Variables with `axes`."""

    step: jax.Array
    """int32 scalar: the number of steps done, which is also the position in the data."""
    params: Any
    opt_state: Any


def init_state(params: Any, optim: OptimConfig, mesh: Mesh) -> TrainState:
    """The state before step 0, of parameters that it takes over; moments are born sharded like their parameters."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(params, optim, mesh))
    with jax.set_mesh(mesh):
        init = functools.partial(_first_state, optim=optim)
        return jax.jit(init, out_shardings=state_shardings, donate_argnums=0)(params)


def _first_state(params: Any, *, optim: OptimConfig) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optim).init(params))


def abstract_state(params: Any, optim: OptimConfig, mesh: AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, to restore a checkpoint into."""
    state = jax.eval_shape(functools.partial(_first_state, optim=optim), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(mesh, state),
    )


def evaluation_params(optim: OptimConfig, state: TrainState) -> Any:
    """The parameters that are evaluated, asked and exported, of those that are trained: most often the same.

    Of schedule-free optimizers it is the average, made anew and cut over the mesh as the parameters are.
    """
    if not is_averaging(state.opt_state):
        return state.params
    placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
    average = jax.jit(averaged, static_argnames="beta1", out_shardings=placed)
    return average(state.params, state.opt_state, beta1=optim.beta1)


def non_finite(params: Any) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    names = [".".join(str(key.key) for key in path) for path, _ in leaves]
    finite = jax.jit(lambda params: [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)])(params)
    return [name for name, is_finite in zip(names, jax.device_get(finite), strict=True) if not is_finite]


def put_batch(rows_of: Callable[[slice], Batch], shape: tuple[int, int], mesh: Mesh) -> Batch:
    """A batch on the devices, leaves [B, T] = `shape`; each process builds only the rows that its devices hold.

    Args:
        rows_of: builds some rows of the batch on the host, leaves [rows, T]; asked once for each leaf and shard.
        shape: rows of the whole batch, and their length.
        mesh: where the rows go.
    """

    def part(index: tuple[slice, ...], field: str) -> np.ndarray:
        rows, positions = index
        return getattr(rows_of(rows), field)[:, positions]

    def leaf(field: str) -> jax.Array:
        return jax.make_array_from_callback(shape, batch_sharding(mesh), functools.partial(part, field=field))

    return Batch(*map(leaf, Batch._fields))


def forward_loss(graphdef: Any, weights: Any, batch: Batch) -> tuple[LossSums, RouterSums | None]:
    """Runs the model on one (micro)batch of leaves [B, T]: the sums of the loss, and those of a mixture's routers."""
    return forward_objective(graphdef, weights, batch, loss=PLAIN)[1:]


def forward_objective(
    graphdef: Any, weights: Any, batch: Batch, *, loss: LossConfig, noise: jax.Array | None = None
) -> tuple[jax.Array, LossSums, RouterSums | None]:
    """The sum that `loss` asks to be minimised, float32 [], and what `forward_loss` gives.

    `noise` are the keys [B, 2] of the rows, where something is drawn.
    """
    model = nnx.merge(graphdef, weights)
    out = _output(model, batch, noise, loss)
    objective, sums = next_token_objective(
        out.hidden, model.unembedding, batch.targets, batch.loss_weights, logits=model.config.logits, loss=loss
    )
    return objective, sums, out.router


def _output(model: Any, batch: Batch, noise: jax.Array | None, loss: LossConfig) -> Any:
    return model(batch.tokens, batch.segment_ids, batch.positions, noise=noise, neftune_alpha=loss.neftune_alpha)


def split_microbatches(batch: Batch, num_microbatches: int) -> Batch:
    """Leaves [B, T] to [A, B / A, T]: row r goes to microbatch r mod A, so that no row leaves its device."""

    return jax.tree.map(lambda x: split_rows(x, num_microbatches, "t"), batch)


def split_rows(x: jax.Array, num_microbatches: int, letter: str) -> jax.Array:
    """[B, T] to [A, B / A, T], the last dim being that of `letter`."""
    x = constrain(x.reshape(-1, num_microbatches, x.shape[1]), f"b a {letter}")
    return constrain(x.swapaxes(0, 1), f"a b {letter}")


class Summed(NamedTuple):
    """Sums over all microbatches of a step."""

    gradients: Any
    """float32: of the sum that is minimised, and of what the routers' losses add to it."""
    loss: LossSums
    router: RouterSums | None
    """None where the model is no mixture of experts."""
    objective: jax.Array | None
    """The sum that is minimised, without the routers' losses; None where it is that of the loss."""


@jax.named_scope("gradients")
def summed_gradients(
    graphdef: Any,
    params: Any,
    frozen: Any,
    microbatches: Batch,
    *,
    optim: OptimConfig,
    loss: LossConfig = PLAIN,
    noise: jax.Array | None = None,
) -> Summed:
    """Gradients and sums over all microbatches (leaves [A, B, T]); `noise` are the keys [A, B, 2] of their rows.

    The routers' losses are of all tokens of the step, however it is cut. They enter times the sum of all weights, by
    which the gradients are divided later. Balance multiplies shares of choices by probabilities: where there are
    several microbatches, a first forward pass counts the choices of all (a third more time, and exact).

    Where there are several microbatches, devices along `data` add up what they make of their own rows, and their sums
    are summed up over all of them once. Left to the partitioner, that would be done for every microbatch.
    """
    num_tokens = jnp.maximum(jnp.sum(microbatches.segment_ids > 0, dtype=jnp.float32), 1.0)
    weight_sum = divisor(microbatches.loss_weights.sum())
    sums = functools.partial(_sums_of_rows, graphdef, optim=optim, loss=loss)
    mesh = jax.sharding.get_abstract_mesh()
    if microbatches.tokens.shape[0] == 1 or mesh.empty or mesh.shape["data"] == 1:
        return sums(params, frozen, microbatches, noise, num_tokens, weight_sum, copy_axes=())
    everywhere = PartitionSpec()
    return jax.shard_map(
        functools.partial(sums, copy_axes=("data",)),
        in_specs=(everywhere, everywhere, *[PartitionSpec(None, "data")] * 2, everywhere, everywhere),
        out_specs=everywhere,
        axis_names={"data"},
        check_vma=False,
    )(params, frozen, microbatches, noise, num_tokens, weight_sum)


def _sums_of_rows(
    graphdef: Any,
    params: Any,
    frozen: Any,
    microbatches: Batch,
    noise: jax.Array | None,
    num_tokens: jax.Array,
    weight_sum: jax.Array,
    *,
    optim: OptimConfig,
    loss: LossConfig,
    copy_axes: tuple[str, ...],
) -> Summed:
    """`summed_gradients`, of rows that some mesh axes have cut already, over which the sums then are summed up."""

    def over_copies(sums: Any) -> Any:
        return jax.lax.psum(sums, copy_axes) if copy_axes else sums

    nothing_routed = _nothing_routed(nnx.merge(graphdef, params, frozen).config)
    all_counts = None
    if nothing_routed is not None and optim.router_balance > 0 and microbatches.tokens.shape[0] > 1:
        all_counts = over_copies(
            _all_counts(graphdef, whole(params, frozen), microbatches, noise, loss, nothing_routed.counts)
        )

    def objective(
        params: Any, batch: Batch, noise: jax.Array | None
    ) -> tuple[jax.Array, tuple[LossSums, RouterSums | None, jax.Array | None]]:
        total, sums, router = forward_objective(graphdef, whole(params, frozen), batch, loss=loss, noise=noise)
        of_tokens = None if loss.is_plain else total
        if router is not None and (optim.router_balance > 0 or optim.router_z > 0):
            counts = router.counts if all_counts is None else all_counts
            balance, z = router_losses(router._replace(counts=counts), num_tokens)
            total += weight_sum * (optim.router_balance * balance + optim.router_z * z)
        return total, (sums, router, of_tokens)

    def add(total: Any, microbatch: tuple[Batch, jax.Array | None]) -> tuple[Any, None]:
        (_, sums), gradients = jax.value_and_grad(objective, has_aux=True)(params, *microbatch)
        # Sharded like the parameters before they are added, so that no device holds the sum of whole gradients.
        return jax.tree.map(jnp.add, total, (constrain_params(gradients), *sums)), None

    zero = jnp.zeros((), jnp.float32)
    no_gradients = constrain_params(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    nothing = no_gradients, LossSums(zero, zero, zero, zero), nothing_routed, None if loss.is_plain else zero
    total, _ = jax.lax.scan(add, nothing, (microbatches, noise))
    return Summed(*over_copies(total))


def _nothing_routed(config: DecoderConfig) -> RouterSums | None:
    if config.routing is None:
        return None
    num_layers, num_experts = (config.sizes[letter] for letter in "le")
    each = jnp.zeros((num_layers, num_experts), jnp.float32)
    return RouterSums(each, each, jnp.zeros(num_layers, jnp.float32))


def _all_counts(
    graphdef: Any,
    weights: Any,
    microbatches: Batch,
    noise: jax.Array | None,
    loss: LossConfig,
    no_counts: jax.Array,
) -> jax.Array:
    """Choices [L, E] of all microbatches."""

    def add(counts: jax.Array, microbatch: tuple[Batch, jax.Array | None]) -> tuple[jax.Array, None]:
        return counts + _output(nnx.merge(graphdef, weights), *microbatch, loss).router.counts, None

    return jax.lax.scan(add, no_counts, (microbatches, noise))[0]


def divisor(weight_sum: jax.Array) -> jax.Array:
    """Without a trained token the gradient is 0, and must not become 0 / 0."""
    return jnp.where(weight_sum > 0, weight_sum, 1.0)


class Numbers(NamedTuple):
    """What a step is given of the config as numbers, so that runs which differ in nothing else share its program."""

    course: Course
    """Of the learning rate."""
    clip_norm: np.float32
    """Infinite: no clipping."""
    weight_decay: np.float32
    """Outside of all groups."""
    seed: np.uint32


class TrainStep(NamedTuple):
    """`(state, frozen, batch) -> (state, StepMetrics)`; batch leaves are [B, T]; the state is used up."""

    program: Any
    """The jitted function, of the three and `numbers`, as what is compiled ahead of time is called, too."""
    numbers: Numbers

    def __call__(self, state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return self.program(state, frozen, batch, self.numbers)

    def trace(self, state: TrainState, frozen: Any, batch: Batch) -> Any:
        """The `jax.stages.Traced`, of arrays or of their shapes."""
        return self.program.trace(state, frozen, batch, self.numbers)

    def lower(self, state: TrainState, frozen: Any, batch: Batch) -> Any:
        """The `jax.stages.Lowered`, of arrays or of their shapes."""
        return self.program.lower(state, frozen, batch, self.numbers)


def make_train_step(
    model: Model,
    optim: OptimConfig,
    *,
    num_steps: int,
    num_microbatches: int,
    mesh: AnyMesh,
    loss: LossConfig = PLAIN,
    seed: int = 0,
) -> TrainStep:
    """The step of a run, compiled at its first call; the state is donated.

    Learning rate, warm-up, number of steps, clipping, weight decay and seed are no part of the program: another run
    that differs in them alone finds it compiled.

    Args:
        model: structure of the decoder; its `params` are those trained, its `frozen` are given to each step.
        optim: schedule, optimizer and clipping.
        num_steps: steps of the whole run, for the schedule.
        num_microbatches: forward-backward passes that a batch is cut into.
        mesh: where everything lives.
        seed: of what is drawn in a step, such as adapters' dropout, noise on embeddings, or what is rounded at random.
    """
    optimizer, schedule = make_optimizer(optim), optim.schedule
    clip_norm = math.inf if optim.clip_norm is None else optim.clip_norm
    numbers = Numbers(
        make_course(optim, num_steps), np.float32(clip_norm), np.float32(optim.weight_decay), np.uint32(seed)
    )
    decoder = nnx.merge(*model)
    config, draws_by_rows = decoder.config, decoder.drops_inputs or loss.neftune_alpha > 0

    def train_step(state: TrainState, frozen: Any, batch: Batch, numbers: Numbers) -> tuple[TrainState, StepMetrics]:
        microbatches = split_microbatches(batch, num_microbatches)
        noise = None
        if draws_by_rows:
            noise = split_rows(row_keys(numbers.seed, state.step, batch.tokens.shape[0]), num_microbatches, "w")
        summed, sums, router, objective = summed_gradients(
            model.graphdef, state.params, frozen, microbatches, optim=optim, loss=loss, noise=noise
        )
        weight_sum = divisor(sums.weight_sum)
        grad_norm = optax.tree.norm(summed) / weight_sum
        factor = 1.0 / weight_sum
        factor *= jnp.minimum(1.0, numbers.clip_norm / jnp.maximum(grad_norm, 1e-30))

        learning_rate = rate_at(schedule, numbers.course, state.step)
        is_finite = jnp.isfinite(sums.loss_sum) & jnp.isfinite(grad_norm)

        given = Given(summed, factor, learning_rate, step_key(numbers.seed, state.step), numbers.weight_decay)
        params, opt_state = _updated(optimizer, state, given, is_finite=is_finite)
        metrics = StepMetrics(
            sums=sums,
            tokens=jnp.sum(batch.segment_ids > 0, dtype=jnp.float32),
            attention_pairs=attention_pairs(batch, config),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=1.0 - is_finite,
            objective=objective,
            router=router,
        )
        return TrainState(state.step + 1, params, opt_state), metrics

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model.params, optim, mesh))
    program = jax.jit(
        train_step,
        in_shardings=(state_shardings, shardings(mesh, model.frozen), batch_sharding(mesh), replicated(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
    return TrainStep(program, numbers)


def _updated(optimizer: Optimizer, state: TrainState, given: Given, *, is_finite: jax.Array) -> tuple[Any, Any]:
    """The next parameters and optimizer state; the old ones where the step's numbers are not finite.

    The parameters are computed in one branch, and then the moments in another, so that each can be written over its old
    values; in one branch together, the compiler would copy the old moments. The first branch also returns whether it
    moved the parameters, and the second one depends on that answer: this keeps the compiler from running them at once.
    """

    def move(old: Any) -> tuple[Any, bool]:
        return optimizer.move(given, state.opt_state, old), True

    def advance(old: Any) -> Any:
        return optimizer.advance(given, old, state.params)

    params, moved = jax.lax.cond(is_finite, move, lambda old: (old, False), state.params)
    opt_state = jax.lax.cond(moved, advance, lambda old: old, state.opt_state)
    return params, opt_state


def attention_pairs(batch: Batch, config: DecoderConfig) -> jax.Array:
    """(query, key) pairs that attention looks at, of all layers: no more than a window of keys where there is one."""
    num_keys = jnp.where(batch.segment_ids > 0, batch.positions + 1, 0)
    windows = collections.Counter(config.windows)
    pairs = jnp.zeros((), jnp.float32)
    for window, num_layers in windows.items():
        of_layer = num_keys if window is None else jnp.minimum(num_keys, window)
        pairs += num_layers * jnp.sum(of_layer, dtype=jnp.float32)
    return pairs


def make_eval_step(model: Model, mesh: Mesh) -> Callable:
    """Compiles `(weights, batch) -> LossSums`: all weights, trained or not, and batch leaves [B, T]; no gradients."""

    def eval_step(weights: Any, batch: Batch) -> LossSums:
        return forward_loss(model.graphdef, weights, batch)[0]

    return jax.jit(
        eval_step,
        in_shardings=(shardings(mesh, model.weights), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
