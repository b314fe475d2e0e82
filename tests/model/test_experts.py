"""Mixtures of experts: equal to every expert on every token, to transformers, on every mesh; padding is nobody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import TO_READ
from flax import nnx

from jaxsft.config import MeshConfig
from jaxsft.mesh import make_mesh, shardings
from jaxsft.model import dispatch
from jaxsft.model.decoder import Decoder
from jaxsft.model.dispatch import block_of, make_plan
from jaxsft.model.experts import MixtureMLP, RouterSums, Routing, router_losses
from jaxsft.model.families.known import decoder_config
from jaxsft.training.program import read_program

SIZES = {"l": 1, "d": 16, "e": 8, "f": 12}
ROUTING = Routing(num_experts=8, top_k=3, normalise=True, router_bias=True)
EXACT = jax.lax.Precision.HIGHEST


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def clamped_swiglu(gate, up):
    """GPT-OSS."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)


def make(routing=ROUTING, *, gating=swiglu, bias=True, sizes=SIZES, seed=0):
    """graphdef, and random weights of one layer; biases too."""
    mlp = MixtureMLP(sizes, routing=routing, gating=gating, bias=bias, std=0.3, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(mlp)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 8))
    return graphdef, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), state)


def one_layer(state):
    return jax.tree.map(lambda leaf: leaf[0], state)


def inputs(num_rows=8, length=16, *, width=16, seed=2):
    """x, and rows of all kinds of length, one of them all padding."""
    x = jax.random.normal(jax.random.key(seed), (num_rows, length, width))
    lengths = np.array([length, 3, 0, 9, length, 7, 1, length])[:num_rows]
    return x, jnp.arange(length) < lengths[:, None]


def dense(state, x, is_token, *, routing, gating):
    """Every expert on every token, times its score or 0."""

    def weight(*path):
        tree = one_layer(state)
        for name in path:
            tree = tree[name]
        return tree.get_value()

    def expert_map(name, equation, x):
        y = jnp.einsum(equation, x, weight("experts", name, "weight"), precision=EXACT)
        has_bias = "bias" in state["experts"][name]
        return y + weight("experts", name, "bias") if has_bias else y

    logits = jnp.einsum("btd,de->bte", x, weight("router", "weight"), precision=EXACT)
    if routing.router_bias:
        logits += weight("router", "bias")
    scores, chosen = jax.lax.top_k(jax.nn.softmax(logits), routing.top_k)
    if routing.normalise:
        scores /= scores.sum(axis=-1, keepdims=True)
    of_expert = jnp.sum(jax.nn.one_hot(chosen, routing.num_experts) * scores[..., None], axis=-2)
    inner = gating(expert_map("gate_proj", "btd,edf->btef", x), expert_map("up_proj", "btd,edf->btef", x))
    y = jnp.einsum("bted,bte->btd", expert_map("down_proj", "btef,efd->bted", inner), of_expert, precision=EXACT)
    return jnp.where(is_token[..., None], y, 0)


def value_and_gradients(f, state, x):
    """f(state, x), and gradients by both of a number that depends on all of it."""

    def projected(state, x):
        y = f(state, x)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), y

    return jax.jit(jax.grad(projected, argnums=(0, 1), has_aux=True))(state, x)


def assert_near(ours, expected, *, tolerance=1e-5):
    for (path, each), other in zip(
        jax.tree_util.tree_flatten_with_path(jax.device_get(ours))[0],
        jax.tree.leaves(jax.device_get(expected)),
        strict=True,
    ):
        each, other = np.asarray(each), np.asarray(other)
        assert np.abs(other).max() > 0, path
        assert np.abs(each - other).max() <= tolerance * np.abs(other).max(), path


ROUTINGS = {
    "as mixtral": (ROUTING, swiglu, False),
    "as olmoe": (Routing(8, 3, normalise=False, router_bias=False), swiglu, False),
    "as gpt-oss": (Routing(8, 3, normalise=True, router_bias=True), clamped_swiglu, True),
    "one expert per token": (Routing(8, 1, normalise=False, router_bias=True), swiglu, True),
    "all experts": (Routing(8, 8, normalise=False, router_bias=True), swiglu, True),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_outputs_and_gradients_are_those_of_every_expert_on_every_token(name):
    routing, gating, bias = ROUTINGS[name]
    graphdef, state = make(routing, gating=gating, bias=bias)
    x, is_token = inputs()
    ours = value_and_gradients(lambda s, x: nnx.merge(graphdef, one_layer(s))(x, is_token)[0], state, x)
    expected = value_and_gradients(lambda s, x: dense(s, x, is_token, routing=routing, gating=gating), state, x)
    assert_near(ours, expected)


MESHES = [
    {"expert": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "expert": 4},
    {"context": 2, "expert": 2, "fsdp": 2},
    {"context": 2, "tensor": 2, "data": 2},
    {"expert": 8},
]


def on_mesh(axes, f, state, *arrays):
    """f(state, *arrays) under jit, everything cut as in training."""
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        return jax.device_get(f(jax.device_put(state, shardings(mesh, state)), *arrays))


def with_sums(state, x, is_token, graphdef):
    """Gradients and output as above, and what the router sums up."""

    def projected(state, x):
        y, sums = nnx.merge(graphdef, one_layer(state))(x, is_token)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), (y, sums)

    gradients, (y, sums) = jax.jit(jax.grad(projected, argnums=(0, 1), has_aux=True))(state, x)
    return (gradients, y), sums


@functools.cache
def with_sums_of_one_device():
    graphdef, state = make()
    return jax.device_get(with_sums(state, *inputs(), graphdef))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_outputs_gradients_and_sums_are_equal_on_every_mesh(axes):
    graphdef, state = make()
    (ours, sums), (expected, expected_sums) = (
        on_mesh(axes, functools.partial(with_sums, graphdef=graphdef), state, *inputs()),
        with_sums_of_one_device(),
    )
    assert_near(ours, expected)
    np.testing.assert_array_equal(sums.counts, expected_sums.counts)
    assert_near(sums, expected_sums, tolerance=1e-6)


@pytest.mark.parametrize(
    ("axes", "room"),
    [
        ({"fsdp": 8}, 3),  # eight experts on each device, in twos
        ({"expert": 2, "fsdp": 2, "tensor": 2}, 0),  # four, one by one
        ({"context": 2, "expert": 2, "fsdp": 2}, 2),
    ],
    ids=str,
)
def test_experts_may_be_gathered_in_groups(monkeypatch, axes, room):
    """`room` is for so many at once."""
    monkeypatch.setattr(dispatch, "WEIGHTS_AT_ONCE", room * 3 * 16 * 12)
    graphdef, state = make()
    x, is_token = inputs()

    def run(state, x):
        return value_and_gradients(lambda s, x: nnx.merge(graphdef, one_layer(s))(x, is_token)[0], state, x)

    assert_near(on_mesh(axes, run, state, x), run(state, x))


def test_no_more_than_a_group_of_experts_is_gathered_at_once(monkeypatch):
    """By the compiled program: what is sent over `fsdp`, for groups of two of the four experts of a device."""
    monkeypatch.setattr(dispatch, "WEIGHTS_AT_ONCE", 2 * 3 * 16 * 12)
    graphdef, state = make(bias=False)
    x, is_token = inputs()
    mesh = make_mesh(MeshConfig(fsdp=4, expert=2))
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda s, x: (nnx.merge(graphdef, one_layer(s))(x, is_token)[0] ** 2).sum()))
        compiled = grad.lower(jax.device_put(state, shardings(mesh, state)), x).compile(TO_READ)
    sent = [each for each in read_program(compiled.as_text(), mesh.shape).collectives if each.axes == ("fsdp",)]
    assert {(each.kind, each.num_bytes, each.times) for each in sent} == {
        ("all-gather", 2 * 16 * 12 * 4, 2),
        ("reduce-scatter", 2 * 16 * 12 * 4, 2),
    }


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (8, 7)])
def test_rows_and_positions_that_no_mesh_cuts_evenly_are_computed_all_the_same(shape):
    """As generation has them: with the mesh in scope, and with weights that lie on it but no mesh in scope."""
    graphdef, state = make()
    x = jax.random.normal(jax.random.key(3), (*shape, 16))
    run = jax.jit(lambda state, x: nnx.merge(graphdef, one_layer(state))(x, jnp.ones(shape, bool)))
    axes = {"context": 2, "expert": 2, "fsdp": 2}
    mesh = make_mesh(MeshConfig(**axes))
    expected = run(state, x)
    assert expected[0].shape == x.shape
    assert_near(on_mesh(axes, run, state, x), expected)
    assert_near(run(jax.device_put(state, shardings(mesh, state)), x), expected)


@pytest.mark.parametrize("axes", [{}, {"expert": 4, "tensor": 2}], ids=str)
def test_all_tokens_may_choose_the_same_experts(axes):
    """Nothing is dropped, and experts that nobody chose get gradients of exactly 0."""
    graphdef, state = make()
    state["router"]["bias"] = state["router"]["bias"].replace(jnp.array([[0, 9, 0, 9, 9, 0, 0, 0]], jnp.float32) * 10)
    x, is_token = inputs()

    def run(state, x):
        return value_and_gradients(lambda s, x: nnx.merge(graphdef, one_layer(s))(x, is_token)[0], state, x)

    expected = value_and_gradients(lambda s, x: dense(s, x, is_token, routing=ROUTING, gating=swiglu), state, x)
    ours = on_mesh(axes, run, state, x) if axes else run(state, x)
    assert_near(ours, expected)
    gradient = ours[0][0]["experts"]["gate_proj"]["weight"].get_value()[0]
    is_chosen = np.array([0, 1, 0, 1, 1, 0, 0, 0], bool)
    np.testing.assert_array_equal(np.any(gradient != 0, axis=(1, 2)), is_chosen)


def test_of_equal_probabilities_the_first_experts_are_chosen():
    graphdef, state = make()
    state["router"] = jax.tree.map(jnp.zeros_like, state["router"])
    x, is_token = inputs()
    y, sums = nnx.merge(graphdef, one_layer(state))(x, is_token)
    assert sums.counts.tolist() == [float(is_token.sum())] * 3 + [0] * 5
    assert_near(y, dense(state, x, is_token, routing=ROUTING, gating=swiglu))


@pytest.mark.parametrize("axes", [{}, {"data": 2, "expert": 4}], ids=str)
def test_padding_is_zero_counts_for_nothing_and_changes_nothing(axes):
    graphdef, state = make()
    x, is_token = inputs()
    other = jnp.where(is_token[..., None], x, 1e3 * x[::-1])

    def run(state, x):
        def sums(state, x):
            y, sums = nnx.merge(graphdef, one_layer(state))(x, is_token)
            return sum(jnp.sum(leaf) for leaf in sums[::2]) + jnp.square(y).sum(), (y, sums)

        return jax.jit(jax.grad(sums, argnums=(0, 1), has_aux=True))(state, x)

    before, after = (on_mesh(axes, run, state, each) if axes else run(state, each) for each in (x, other))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    (_, x_gradient), (y, sums) = before
    for each in (x_gradient, y):
        assert not np.asarray(each)[~np.asarray(is_token)].any()
    assert sums.counts.sum() == 3 * is_token.sum()
    np.testing.assert_allclose(sums.probabilities.sum(), is_token.sum(), rtol=1e-6)


def test_bfloat16_is_near_float32_and_its_router_is_as_exact():
    graphdef, state = make()
    x, is_token = inputs()
    x = x.astype(jnp.bfloat16)
    y, sums = nnx.merge(graphdef, one_layer(state))(x, is_token)
    expected, expected_sums = nnx.merge(graphdef, one_layer(state))(x.astype(jnp.float32), is_token)
    assert y.dtype == jnp.bfloat16
    assert_near(y.astype(jnp.float32), expected, tolerance=0.02)
    jax.tree.map(np.testing.assert_array_equal, sums, expected_sums)


def test_the_worked_example_of_a_plan():
    chosen = jnp.array([(0, 2), (2, 3), (2, 0)])
    plan = make_plan(chosen, 3)
    assert plan.order.tolist() == [0, 5, 1, 2, 4, 3]
    plan = plan._replace(block_size=2, block_ends=jnp.array([1, 1, 3]))
    assert plan.starts.tolist() == [0, 2, 2] and plan.counts.tolist() == [2, 0, 3] and plan.num_blocks == 3
    blocks = [jax.tree.map(np.ndarray.tolist, jax.device_get(block_of(plan, i))) for i in range(3)]
    assert blocks == [(0, [0, 2], [0, 5]), (2, [0, 1], [1, 2]), (2, [2, 7], [4, 7])]


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 1000])
def test_blocks_hold_each_choice_once_with_its_expert(num_tokens):
    rng = np.random.default_rng(num_tokens)
    chosen = np.array([rng.permutation(7)[:3] for _ in range(num_tokens)], np.int32)  # 6 is none
    plan = make_plan(jnp.asarray(chosen), 6)
    found = []
    for i in range(int(plan.num_blocks)):
        expert, token, choice = map(np.asarray, block_of(plan, jnp.asarray(i)))
        is_real = choice < chosen.size
        assert len(set(choice.tolist())) == len(set(token.tolist())) == plan.block_size
        assert (chosen.ravel()[choice[is_real]] == expert).all() and (token[is_real] == choice[is_real] // 3).all()
        assert is_real.any() and (token[~is_real] >= num_tokens).all()
        found += choice[is_real].tolist()
    assert sorted(found) == np.flatnonzero(chosen.ravel() < 6).tolist()


@pytest.mark.parametrize("axes", [{}, {"expert": 8}], ids=str)
def test_nothing_is_held_that_grows_with_the_number_of_experts_times_tokens(axes):
    """Memory for gradients: a few times tokens and weights, of one device; every expert on every token is far more."""
    sizes = {"l": 1, "d": 64, "e": 32, "f": 128}
    routing = Routing(32, 4, normalise=True, router_bias=False)
    graphdef, state = make(routing, bias=False, sizes=sizes)
    num_rows, length = 8, 512
    x, is_token = inputs(num_rows, length, width=64)

    def temp(f):
        grad = jax.jit(jax.grad(lambda s, x: f(s, x).sum(), argnums=(0, 1)))
        if not axes:
            return grad.lower(state, x).compile(TO_READ).memory_analysis().temp_size_in_bytes
        mesh = make_mesh(MeshConfig(**axes))
        with jax.set_mesh(mesh):
            lowered = grad.lower(jax.device_put(state, shardings(mesh, state)), x)
            return lowered.compile(TO_READ).memory_analysis().temp_size_in_bytes

    ours = temp(lambda s, x: nnx.merge(graphdef, one_layer(s))(x, is_token)[0])
    every_inner = num_rows * length * 32 * 128 * 4
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((state, x)))
    assert ours < 4 * whole < every_inner / 2


def test_under_fsdp_only_a_layer_of_experts_at_a_time_is_gathered():
    fields = {"num_hidden_layers": 16, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 128}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_local_experts": 8}
    config = decoder_config({"model_type": "mixtral"} | fields | heads)

    def make():
        return Decoder(config, compute_dtype="float32", param_dtype="float32", remat="full", rngs=nnx.Rngs(0))

    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    mesh = make_mesh(MeshConfig(expert=2, fsdp=4))
    rows, sharded = [jax.ShapeDtypeStruct((8, 16), jnp.int32)] * 3, shardings(mesh, abstract)

    def loss(state, *rows):
        return nnx.merge(graphdef, state)(*rows).hidden.sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=(sharded, None, None, None), out_shardings=sharded)
        memory = step.lower(abstract, *rows).compile(TO_READ).memory_analysis()
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract))
    assert memory.argument_size_in_bytes < whole / 7.9
    assert memory.temp_size_in_bytes < whole / 2


# transformers


def hugging_face(name):
    """(their module, our routing, gating, the map from our state to their parameters), 16 wide, 8 experts of 12."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    common = {"hidden_size": 16, "num_experts_per_tok": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if name == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        config = transformers.MixtralConfig(intermediate_size=12, num_local_experts=8, **common)
        routing = Routing(8, 3, normalise=True, router_bias=False)
    elif name == "qwen3_moe":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

        config = transformers.Qwen3MoeConfig(moe_intermediate_size=12, num_experts=8, norm_topk_prob=True, **common)
        routing = Routing(8, 3, normalise=True, router_bias=False)
    elif name == "olmoe":
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Block

        config = transformers.OlmoeConfig(intermediate_size=12, num_experts=8, **common)
        routing = Routing(8, 3, normalise=False, router_bias=False)
    else:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP as Block

        config = transformers.GptOssConfig(intermediate_size=12, num_local_experts=8, head_dim=8, **common)
        routing = Routing(8, 3, normalise=True, router_bias=True)
    return Block(config), routing


def to_ours(name, tensors):
    """Their parameters (or gradients) as our state's arrays, without the leading l."""
    if name == "gpt_oss":
        gate_up, gate_up_bias = tensors["experts.gate_up_proj"], tensors["experts.gate_up_proj_bias"]
        return {
            ("router", "weight"): tensors["router.weight"].T,
            ("router", "bias"): tensors["router.bias"],
            ("experts", "gate_proj", "weight"): gate_up[..., ::2],
            ("experts", "up_proj", "weight"): gate_up[..., 1::2],
            ("experts", "gate_proj", "bias"): gate_up_bias[..., ::2],
            ("experts", "up_proj", "bias"): gate_up_bias[..., 1::2],
            ("experts", "down_proj", "weight"): tensors["experts.down_proj"],
            ("experts", "down_proj", "bias"): tensors["experts.down_proj_bias"],
        }
    gate, up = np.split(tensors["experts.gate_up_proj"], 2, axis=1)
    return {
        ("router", "weight"): tensors["gate.weight"].T,
        ("experts", "gate_proj", "weight"): gate.swapaxes(1, 2),
        ("experts", "up_proj", "weight"): up.swapaxes(1, 2),
        ("experts", "down_proj", "weight"): tensors["experts.down_proj"].swapaxes(1, 2),
    }


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"])
def test_outputs_and_gradients_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    block, routing = hugging_face(name)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, _ = inputs()
    their_x = torch.tensor(np.asarray(x), requires_grad=True)
    out = block(their_x)
    their_y = out[0] if isinstance(out, tuple) else out
    projection = jax.random.normal(jax.random.key(9), x.shape)
    (their_y * torch.tensor(np.asarray(projection))).sum().backward()
    weights = to_ours(name, {key: each.detach().numpy() for key, each in block.named_parameters()})
    gradients = to_ours(name, {key: each.grad.numpy() for key, each in block.named_parameters()})

    is_gpt_oss = name == "gpt_oss"
    graphdef, state = make(routing, gating=clamped_swiglu if is_gpt_oss else swiglu, bias=is_gpt_oss)
    state = nnx.to_pure_dict(state)
    for path, weight in weights.items():
        tree = state
        for key in path[:-1]:
            tree = tree[key]
        assert tree[path[-1]].shape[1:] == weight.shape
        tree[path[-1]] = jnp.asarray(weight)[None]
    everywhere = jnp.ones(x.shape[:2], bool)
    given = value_and_gradients(lambda s, x: nnx.merge(graphdef, one_layer(s))(x, everywhere)[0], state, x)
    (state_gradient, x_gradient), y = given
    assert_near((y, x_gradient), (their_y.detach().numpy(), their_x.grad.numpy()))
    for path, gradient in gradients.items():
        ours = state_gradient
        for key in path:
            ours = ours[key]
        assert_near(ours[0], gradient)


def test_the_balance_of_one_layer_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    graphdef, state = make()
    x, is_token = inputs()
    sums = nnx.merge(graphdef, one_layer(state))(x, is_token)[1]
    logits = np.asarray(nnx.merge(graphdef, one_layer(state)).router(x))
    mask = torch.tensor(np.asarray(is_token, np.int64))
    theirs = load_balancing_loss_func((torch.tensor(logits.reshape(-1, 8)),), 8, 3, attention_mask=mask)
    balance, z = router_losses(jax.tree.map(lambda leaf: leaf[None], sums), is_token.sum())
    np.testing.assert_allclose(balance, theirs.item(), rtol=1e-6)
    real = logits[np.asarray(is_token)].astype(np.float64)
    np.testing.assert_allclose(z, np.mean(np.log(np.exp(real).sum(axis=-1)) ** 2), rtol=1e-6)


def test_the_balance_of_even_choices_is_top_k_and_that_of_a_collapse_is_the_number_of_experts():
    even, collapsed = np.full((2, 8), 100 / 8), np.eye(8)[[3, 5]] * 100
    zero = np.zeros(2)
    assert router_losses(RouterSums(even, 3 * even, zero), 100.0)[0] == 3
    assert router_losses(RouterSums(collapsed, collapsed, zero), 100.0)[0] == 8
