"""Laws of grouped products and of mixtures of experts."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpo_jax.errors import UserError
from dpo_jax.model import expert_split, experts
from dpo_jax.model import spec as specs
from dpo_jax.model.adapters import AdaptedKernel
from dpo_jax.model.decoder import _merged
from dpo_jax.model.quantised import QuantisedKernel, quantise
from dpo_jax.planning.exchanges import groups_of
from dpo_jax.sharding import make_mesh
from tests.model.test_grouped import multiplications
from tests.support.tiers import by_pairs, night

WIDTH = 12

BASE = specs.Experts(count=8, chosen=2, width=8)
VARIANTS = {
    "mixtral": BASE,
    "olmoe": dataclasses.replace(BASE, chosen=3, normalised=False),
    "qwen2_moe": dataclasses.replace(BASE, normalised=False, shared=specs.MLP(6), shared_gate=True),
    "deepseek_v3": dataclasses.replace(
        BASE, chosen=3, scores="sigmoid", scaling=2.5, groups=4, chosen_groups=2, correction=True, shared=specs.MLP(6)
    ),
    "gpt_oss": dataclasses.replace(BASE, router_bias=True, bias=True, limit=0.6),
    "gemma4": dataclasses.replace(BASE, activation="gelu_tanh", router_norm=specs.Norm(1e-6, scale=False)),
}


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def built(spec: specs.Experts, seed: int = 0):
    """A mixture's graph, and parameters that are all random and large enough to matter."""
    graph, params = nnx.split(experts.Mixture(spec, WIDTH, rngs=nnx.Rngs(seed)))
    leaves, structure = jax.tree.flatten(params)
    leaves = [0.6 * draw(100 * seed + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return graph, jax.tree.unflatten(structure, leaves)


def forward(graph, params, x, router_input=None, weights=None, activations=None):
    return nnx.merge(graph, params)(x, router_input, weights, activations=activations)


@functools.partial(jax.jit, static_argnums=0)
def routed(graph, params, x, weights):
    return forward(graph, params, x, None, weights)


def close(got, expected, tolerance: float = 1e-5) -> None:
    """Two trees are the same, to a part of the largest entry of each leaf (or of one, where that is larger)."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


def paths(params) -> dict[str, jax.Array]:
    return {
        "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


# ---- the oracle: every expert on every token, written from the formulas of each family's paper or reference


def oracle_router(leaf: dict, spec: specs.Experts, x: jax.Array) -> jax.Array:
    """The share of each expert for each token, zero for those that are not chosen."""
    if spec.router_norm is not None:
        norm = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + spec.router_norm.epsilon)
        x = norm * leaf["router/channel_scale"] / np.sqrt(WIDTH).astype(np.float32)
    logits = x @ leaf["router/kernel"] + leaf.get("router/bias", 0.0)
    scores = jax.nn.sigmoid(logits) if spec.scores == "sigmoid" else jax.nn.softmax(logits)
    ranked = scores + leaf.get("router/correction", 0.0)
    if spec.groups > 1:
        by_group = ranked.reshape(*ranked.shape[:2], spec.groups, -1)
        totals = jnp.sort(by_group, -1)[..., -2:].sum(-1)
        low = jnp.sort(totals, -1)[..., -spec.chosen_groups, None]
        ranked = jnp.where((totals >= low)[..., None], by_group, -jnp.inf).reshape(ranked.shape)
    shares = jnp.where(ranked >= jnp.sort(ranked, -1)[..., -spec.chosen, None], scores, 0.0)
    shares = shares / shares.sum(-1, keepdims=True) if spec.normalised else shares
    return shares * spec.scaling * leaf.get("router/expert_scale", 1.0)


def oracle(leaf: dict, spec: specs.Experts, x: jax.Array, router_input: jax.Array) -> jax.Array:
    shares = oracle_router(leaf, spec, router_input)
    gate = jnp.einsum("btd,edf->btef", x, leaf["gate/kernel"]) + leaf.get("gate/bias", 0.0)
    up = jnp.einsum("btd,edf->btef", x, leaf["up/kernel"]) + leaf.get("up/bias", 0.0)
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
        unit = (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    else:
        unit = up * (jax.nn.gelu(gate) if spec.activation == "gelu_tanh" else jax.nn.silu(gate))
    y = jnp.einsum("btef,efd->bted", unit, leaf["down/kernel"]) + leaf.get("down/bias", 0.0)
    y = jnp.einsum("bted,bte->btd", y, shares)
    if spec.shared is not None:
        unit = jax.nn.silu(x @ leaf["shared/gate/kernel"]) * (x @ leaf["shared/up/kernel"])
        shared = unit @ leaf["shared/down/kernel"]
        y = y + (shared * jax.nn.sigmoid(x @ leaf["shared_gate/kernel"]) if spec.shared_gate else shared)
    return y


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mixture_is_what_all_experts_give_times_their_shares(name):
    """Outputs, sums and gradients; to 1e-5 of the largest, since the terms are summed in another order."""
    spec = VARIANTS[name]
    graph, params = built(spec)
    x, router_input, out = draw(1, 3, 7, WIDTH), draw(2, 3, 7, WIDTH), draw(3, 3, 7, WIDTH)
    weights = jnp.abs(draw(4, 3, 7))

    def ours(params, x, router_input):
        y, routing = forward(graph, params, x, router_input, weights)
        return jnp.vdot(y, out), (y, routing.counts, routing.total, routing.scores.sum())

    def theirs(params, x, router_input):
        with jax.numpy_rank_promotion("allow"):
            y = oracle(paths(params), spec, x, router_input)
            chosen = oracle_router(paths(params), spec, router_input) != 0
        counts = jnp.einsum("bt,bte->e", weights, chosen.astype(jnp.float32))
        return jnp.vdot(y, out), (y, counts, weights.sum(), weights.sum())

    got, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(params, x, router_input) for f in (ours, theirs)
    )
    close(got, expected)


def test_leaves_have_the_names_that_tables_use():
    everything = dataclasses.replace(
        VARIANTS["deepseek_v3"], bias=True, router_bias=True, router_norm=specs.Norm(scale=False), shared_gate=True
    )
    linears = [f"{name}/{leaf}" for name in ("gate", "up", "down") for leaf in ("kernel", "bias")]
    router = [f"router/{leaf}" for leaf in ("kernel", "bias", "correction", "channel_scale", "expert_scale")]
    shared = [f"shared/{name}/kernel" for name in ("gate", "up", "down")] + ["shared_gate/kernel"]
    assert sorted(paths(built(everything)[1])) == sorted(linears + router + shared)


# ---- cost


def test_a_mixture_multiplies_each_token_with_its_own_experts_only():
    spec = dataclasses.replace(BASE, count=64, chosen=2, width=32)
    graph, params = built(spec)
    x = jnp.zeros((8, 128, WIDTH))
    program = jax.make_jaxpr(lambda params, x: forward(graph, params, x)[0])(params, x)
    tokens = 8 * 128
    chosen = 3 * 2 * tokens * WIDTH * 32
    assert multiplications(program.jaxpr) - tokens * WIDTH * 64 <= 2 * chosen


# ---- routing


def test_tokens_do_not_see_each_other():
    graph, params = built(BASE)
    x, weights, order = draw(1, 1, 10, WIDTH), jnp.ones((1, 10)), np.random.default_rng(0).permutation(10)
    close(routed(graph, params, x, weights)[0][:, order], routed(graph, params, x[:, order], weights)[0])


def test_the_correction_decides_and_learns_nothing():
    graph, params = built(dataclasses.replace(BASE, scores="sigmoid", correction=True))
    favoured = jnp.where(jnp.arange(8) == 5, 100.0, 0.0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: favoured if "correction" in jax.tree_util.keystr(path) else leaf, params
    )
    x, weights = draw(1, 2, 5, WIDTH), jnp.ones((2, 5))

    def loss(params):
        y, routing = forward(graph, params, x, None, weights)
        return y.sum() + experts.load_balance(*routing), routing.counts

    moved, counts = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert counts[5] == 10
    np.testing.assert_array_equal(paths(moved)["router/correction"], 0.0)
    assert jnp.any(paths(moved)["router/kernel"] != 0)


def test_of_equal_scores_the_first_experts_are_chosen():
    graph, params = built(BASE)
    params = jax.tree.map(jnp.zeros_like, params)
    _, routing = routed(graph, params, draw(1, 1, 4, WIDTH), jnp.ones((1, 4)))
    np.testing.assert_array_equal(routing.counts, [4, 4, 0, 0, 0, 0, 0, 0])


def test_groups_that_lose_are_out_whatever_their_best_expert():
    """Group 1 has the best expert, and group 0 the best two, also where a correction makes all scores negative."""
    spec = specs.Experts(count=6, chosen=2, width=4, groups=2, chosen_groups=1, scores="sigmoid")
    router = experts.Router(spec, WIDTH, rngs=nnx.Rngs(0))
    scores = jnp.array([[[0.8, 0.1, 0.7, 0.9, 0.2, 0.3]]])
    np.testing.assert_array_equal(router.best(scores), [[[0, 2]]])
    np.testing.assert_array_equal(router.best(scores - 1), [[[0, 2]]])


# ---- the auxiliary loss


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_the_auxiliary_loss_is_that_of_transformers(name, masked):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    spec, shape = VARIANTS[name], (2, 9)
    weights = (draw(5, *shape) > 0).astype(jnp.float32) if masked else jnp.ones(shape)
    layers = [(built(spec, seed), draw(10 + seed, *shape, WIDTH)) for seed in range(3)]
    sums = [routed(graph, params, x, weights)[1] for (graph, params), x in layers]
    total = jax.tree.map(lambda *leaves: sum(leaves), *sums)
    logits = [np.asarray(x.reshape(-1, WIDTH) @ paths(params)["router/kernel"]) for (_, params), x in layers]
    expected = reference(
        tuple(map(torch.tensor, logits)), spec.count, spec.chosen, torch.tensor(np.asarray(weights)) if masked else None
    )
    np.testing.assert_allclose(experts.load_balance(*total), expected.numpy(), rtol=1e-5)


def test_the_auxiliary_loss_moves_the_router_and_nothing_else():
    graph, params = built(BASE)
    x, weights = draw(1, 2, 9, WIDTH), jnp.ones((2, 9))
    gradient = paths(jax.jit(jax.grad(lambda p: experts.load_balance(*forward(graph, p, x, None, weights)[1])))(params))
    assert {name for name, leaf in gradient.items() if jnp.any(leaf != 0)} == {"router/kernel"}


def test_without_tokens_the_auxiliary_loss_is_zero():
    routing = experts.Routing(jnp.zeros(4), jnp.zeros(4), jnp.zeros(()))
    assert experts.load_balance(*routing) == 0.0


# ---- several devices, loops, recomputation


def objective(graph, activations, params, x, router_input):
    """A scalar that everything takes part in, and the output."""
    weights = (x[..., 0] > 0).astype(jnp.float32)
    y, routing = forward(graph, params, x, router_input, weights, activations)
    return jnp.sin(y).sum() + experts.load_balance(*routing), y


@functools.cache
def alone(name: str, rows: int):
    graph, params = built(VARIANTS[name])
    inputs = (params, draw(1, rows, 6, WIDTH), draw(2, rows, 6, WIDTH))
    return inputs, jax.jit(jax.value_and_grad(functools.partial(objective, graph, None), (0, 1, 2), has_aux=True))(
        *inputs
    )


def placed(params, x, router_input, mesh):
    """Inputs as training places them: kernels split over fsdp and tensor, tokens over data and fsdp."""

    def place(path, leaf):
        split = P(None, "tensor", "fsdp") if "down" in jax.tree_util.keystr(path) else P(None, "fsdp", "tensor")
        return jax.device_put(leaf, NamedSharding(mesh, split if leaf.ndim == 3 else P()))

    rows = NamedSharding(mesh, P(("data", "fsdp")) if x.shape[0] % 4 == 0 else P())
    return jax.tree_util.tree_map_with_path(place, params), jax.device_put(x, rows), jax.device_put(router_input, rows)


@pytest.mark.parametrize(
    ("name", "mesh", "rows"),
    [
        ("mixtral", (2, 2, 1), 4),
        night("mixtral", (1, 4, 1), 4),
        night("mixtral", (1, 2, 2), 4),
        ("mixtral", (2, 2, 1), 3),
        ("deepseek_v3", (1, 2, 2), 4),
        night("gpt_oss", (1, 2, 2), 4),
        night("gemma4", (2, 2, 1), 4),
    ],
)
def test_sharded_equals_single(name, mesh, rows):
    """To 1e-5 of the largest entry; sums over devices are in another order."""
    inputs, expected = alone(name, rows)
    mesh = make_mesh(*mesh, devices=jax.devices()[:4])
    activations = NamedSharding(mesh, P(("data", "fsdp"), None, None))
    run = functools.partial(objective, built(VARIANTS[name])[0], activations)
    got = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*placed(*inputs, mesh))
    close(got, expected)


@pytest.mark.parametrize("mesh", [(1, 4, 1), (1, 2, 2)])
def test_no_device_sees_the_tokens_of_another(mesh):
    """Collectives carry weights, their gradients and sums; with 64 tokens of width 12 all of these are distinct."""
    (params, _, _), _ = alone("mixtral", 4)
    graph = built(BASE)[0]
    mesh = make_mesh(*mesh, devices=jax.devices()[:4])
    activations = NamedSharding(mesh, P(("data", "fsdp"), None, None))
    inputs = placed(params, draw(1, 4, 16, WIDTH), draw(2, 4, 16, WIDTH), mesh)
    step = jax.jit(jax.grad(lambda *inputs: objective(graph, activations, *inputs)[0], (0, 1)))
    text = step.lower(*inputs).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line or " all-to-all(" in line]
    assert gathers
    assert not [line for line in gathers if "[4,16," in line or "[64," in line or "[128," in line]


def test_layers_in_a_loop_with_recomputation_are_layers_one_by_one():
    spec = BASE
    graph = built(spec)[0]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(built(spec, seed)[1] for seed in range(2)))
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    activations = NamedSharding(mesh, P(("data", "fsdp"), None, None))
    x, weights = draw(1, 4, 5, WIDTH), jnp.ones((4, 5))

    def layer(activations, x, params):
        y, routing = forward(graph, params, x, None, weights, activations)
        return x + y, routing

    def looped(stack, x):
        x, routings = jax.lax.scan(jax.checkpoint(functools.partial(layer, activations)), x, stack)
        return jnp.sin(x).sum() + experts.load_balance(*(leaf.sum(axis=0) for leaf in routings))

    def unrolled(stack, x):
        routings = []
        for index in range(2):
            x, routing = layer(None, x, jax.tree.map(lambda leaf, i=index: leaf[i], stack))
            routings.append(routing)
        return jnp.sin(x).sum() + experts.load_balance(*map(sum, zip(*routings, strict=True)))

    got, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(stack, x) for f in (looped, unrolled))
    close(got, expected, 1e-4)


# ---- an axis of experts

BATCH = P(("data", "fsdp", "expert"), None, None)


def on_experts(data: int, fsdp: int, expert: int, tensor: int) -> Mesh:
    return make_mesh(data, fsdp, tensor, jax.devices()[:4], expert=expert)


def spread_out(params, x, router_input, mesh):
    """Inputs as training places them: experts split over their axis, each kernel over fsdp and tensor."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        split = P("expert", "tensor", "fsdp") if "down" in name else P("expert", "fsdp", "tensor")
        return jax.device_put(leaf, NamedSharding(mesh, split if leaf.ndim == 3 else P()))

    rows = NamedSharding(mesh, BATCH if x.shape[0] % 4 == 0 else P())
    return jax.tree_util.tree_map_with_path(place, params), jax.device_put(x, rows), jax.device_put(router_input, rows)


def split_run(name: str, mesh: Mesh):
    run = functools.partial(objective, built(VARIANTS[name])[0], NamedSharding(mesh, BATCH))
    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ("name", "mesh", "rows"),
    [
        ("mixtral", (1, 1, 4, 1), 4),
        ("mixtral", (2, 1, 2, 1), 3),
        ("deepseek_v3", (1, 2, 2, 1), 4),
        ("gpt_oss", (1, 1, 2, 2), 4),
        ("gemma4", (2, 1, 2, 1), 4),
    ],
)
def test_an_axis_of_experts_changes_no_number(name, mesh, rows):
    """Values and gradients, to 1e-5 of the largest entry; sums over devices are in another order."""
    inputs, expected = alone(name, rows)
    mesh = on_experts(*mesh)
    close(split_run(name, mesh)(*spread_out(*inputs, mesh)), expected)


FAVOURED = ("the experts of one device", "one expert", "none")
ALONE, HALVED = (1, 1, 4, 1), (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("mesh", "favoured"),
    by_pairs(itertools.product((ALONE, HALVED), FAVOURED), ((ALONE, FAVOURED[0]), (HALVED, FAVOURED[1]))),
)
def test_no_pair_is_dropped_whatever_a_router_picks(mesh, favoured, monkeypatch):
    """Of 8 experts a device has 2 or 4; all tokens go to them, in as many rounds as that takes."""
    monkeypatch.setattr(experts, "ROUND", 4)
    spec = dataclasses.replace(BASE, router_bias=True, bias=True)
    graph, params = built(spec)
    bias = {"none": [0.0] * 8, "one expert": [0.0] * 5 + [50.0] + [0.0] * 2}
    bias = jnp.asarray(bias.get(favoured, [0.0] * 6 + [50.0] * 2))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: bias if "router" in str(path) and "bias" in str(path) else leaf, params
    )
    inputs = params, draw(1, 4, 6, WIDTH), draw(2, 4, 6, WIDTH)
    mesh = on_experts(*mesh)
    expected, got = (
        jax.jit(jax.value_and_grad(functools.partial(objective, graph, where), (0, 1, 2), has_aux=True))(*args)
        for where, args in ((None, inputs), (NamedSharding(mesh, BATCH), spread_out(*inputs, mesh)))
    )
    close(got, expected)


def test_tokens_move_along_the_axis_of_experts_and_matrices_do_not(monkeypatch):
    """Gathers over it carry tokens, and what a router says of them; sums over it carry no gradient of a matrix. Rounds
    that are rarely wanted have their name in the text, by which a plan leaves them out."""
    monkeypatch.setattr(experts, "ROUND", 4)
    graph, params = built(dataclasses.replace(BASE, width=10))
    mesh = on_experts(1, 1, 4, 1)
    inputs = spread_out(params, draw(1, 4, 16, WIDTH), draw(2, 4, 16, WIDTH), mesh)
    step = jax.jit(jax.value_and_grad(functools.partial(objective, graph, NamedSharding(mesh, BATCH)), (0, 1), True))
    text = step.lower(*inputs).compile().as_text()
    exchange = re.compile(r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)\((.*replica_groups=.*)")
    moved = [found.groups() for found in map(exchange.search, text.splitlines()) if found]
    over = [(result, kind) for result, kind, rest in moved if groups_of(rest, 4).shape[1] > 1]
    assert {kind for _, kind in over} >= {"all-gather", "all-reduce"}
    assert not [one for one in over if f",{WIDTH},10]" in one[0] or f",10,{WIDTH}]" in one[0]]
    branches = [line for line in text.splitlines() if " conditional(" in line]
    assert len(branches) > 1 and all(experts.RARE in line for line in branches)


@pytest.mark.parametrize(
    ("mesh", "kind"),
    by_pairs(itertools.product((ALONE, HALVED), ("adapter", "nf4")), ((HALVED, "adapter"), (ALONE, "nf4"))),
)
def test_adapters_and_quantised_experts_are_split_too(kind, mesh):
    graph, params = built(BASE)
    names = enumerate(("gate", "up", "down"))
    made = {name: kernel_of(kind, paths(params)[f"{name}/kernel"], index) for index, name in names}

    def run(activations, made, x):
        plain = nnx.to_pure_dict(params) | {name: {"kernel": kernel} for name, kernel in made.items()}
        module = _merged(graph, params, plain)
        return jnp.sin(module(x, activations=activations)[0]).sum()

    x, mesh = draw(1, 4, 6, WIDTH), on_experts(*mesh)
    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(run, where), (0, 1), allow_int=True))(made, x)
        for where in (NamedSharding(mesh, BATCH), None)
    )
    floats = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]  # noqa: E731
    close(floats(got), floats(expected))


def kernel_of(kind: str, kernel: jax.Array, seed: int):
    """A kernel of experts with factors of rank 2 beside it, or in 4 bits."""
    count, inputs, outputs = kernel.shape
    if kind == "adapter":
        a, b = 0.3 * draw(10 + seed, count, inputs, 2), 0.3 * draw(20 + seed, count, 2, outputs)
        return AdaptedKernel(kernel, a, b, jnp.float32(0.5))
    leaf = {name: jnp.asarray(x) for name, x in quantise(np.asarray(kernel).swapaxes(1, 2), "nf4").items()}
    return QuantisedKernel.of(leaf, (inputs, outputs))


@pytest.mark.parametrize(
    ("count", "parts", "says"),
    [(None, 4, "has no experts"), (8, 3, "does not divide the model's 8 experts; set it to 2")],
)
def test_a_mesh_that_cannot_split_the_experts_is_refused(count, parts, says):
    mesh = Mesh(np.asarray(jax.devices()[:parts]).reshape(1, parts), ("data", "expert"))
    spec = None if count is None else dataclasses.replace(BASE, count=count)
    with pytest.raises(UserError, match=says):
        expert_split.check(mesh, spec)
