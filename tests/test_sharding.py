"""Where leaves lie on a mesh, and what is computed there, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_adamerging as reference
from expert_sets import expert_set
from jax.sharding import PartitionSpec as P
from references_identifier import points

import retex_jax as rtx
from retex_jax import models, recovery, sharding, tree
from retex_jax.calibration import Calibration
from retex_jax.identifier import router
from retex_jax.mergers import adamerging
from retex_jax.offsets import adam, generator

NUM_DEVICES = 8


def mesh_of(**sizes):
    devices = np.array(jax.devices()[: int(np.prod([*sizes.values()]))])
    return jax.sharding.Mesh(devices.reshape(*sizes.values()), tuple(sizes))


def specs(leaves, mesh, rules):
    return jax.tree.map(lambda found: found.spec, sharding.shardings(leaves, mesh, rules))


def whole_norm(leaves):
    return np.sqrt(
        sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(leaves))
    )


def difference(found, want):
    """The norm of the difference of two pytrees, relative."""
    apart = jax.tree.map(
        lambda one, two: np.asarray(one, np.float64) - np.asarray(two, np.float64), found, want
    )
    return whole_norm(apart) / whole_norm(want)


# Rules


def test_the_first_rule_that_matches_says_where_a_leaf_lies():
    mesh = mesh_of(layer=2, model=4)
    leaves = {"a": {"weight": jnp.zeros((2, 3, 8)), "bias": jnp.zeros((2, 8))}, "b": jnp.zeros(4)}
    rules = [
        ("^a/weight$", P("layer", None, "model")),
        ("^a", P("task", "model")),
        ("", P("model", "layer")),
    ]
    assert specs(leaves, mesh, rules) == {
        "a": {"weight": P("layer", None, "model"), "bias": P(None, "model")},
        "b": P("model"),
    }
    with pytest.raises(ValueError, match="no rule matches leaf 'b'"):
        sharding.shardings(leaves, mesh, rules[:2])


def test_an_axis_that_does_not_divide_is_whole():
    mesh = mesh_of(layer=2, model=4)
    leaves = {"odd": jnp.zeros((3, 8)), "both": jnp.zeros((8, 3)), "half": jnp.zeros((4, 3))}
    assert specs(leaves, mesh, [("", P("layer", "model"))])["odd"] == P(None, "model")
    found = specs(leaves, mesh, [("", P(("layer", "model")))])
    assert found == {"odd": P(None), "both": P(("layer", "model")), "half": P(None)}


def test_mesh_axes_alone_split_the_longest_axis_that_they_divide():
    mesh = mesh_of(layer=2, model=4)
    leaves = [jnp.zeros((8, 12)), jnp.zeros((8, 9)), jnp.zeros((3, 5)), jnp.zeros(()), jnp.zeros(8)]
    assert specs(leaves, mesh, [("", "model")]) == [
        P(None, ("model",)),
        P(("model",), None),
        P(None, None),
        P(),
        P(("model",)),
    ]
    both = [("", ("layer", "model"))]
    assert specs(leaves[:1], mesh, both) == [P(("layer", "model"), None)]
    assert specs(leaves[:1], mesh_of(task=8), both) == [P(None, None)]


def test_bytes_are_those_of_one_device():
    mesh = mesh_of(model=8)
    leaves = {"split": np.zeros((16, 4), np.float32), "whole": np.zeros(3, np.float32)}
    assert sharding.place(leaves, None, ()) is leaves
    placed = sharding.place(leaves, mesh, sharding.MODEL_RULES)
    assert sharding.device_bytes(placed) == 4 * (2 * 4 + 3)
    assert sharding.device_bytes(jax.device_put(leaves)) == 4 * (64 + 3)
    assert sharding.device_bytes(leaves) == 4 * (64 + 3)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), placed
    )
    assert sharding.device_bytes(like) == 4 * (2 * 4 + 3)
    assert sharding.mesh_of(placed) == mesh
    assert sharding.mesh_of(leaves) is sharding.mesh_of(jax.device_put(leaves)) is None


def test_unknown_axes_are_told():
    sharding.check_axes(mesh_of(model=2), ("model", "data"))
    with pytest.raises(
        ValueError, match=r"mesh: got axes \{'x': 2\}, expected some of \['model'\]"
    ):
        sharding.check_axes(mesh_of(x=2), ["model"])


# The Adam loop


def adam_experts():
    rng = np.random.default_rng(0)
    shapes = {"a/kernel": (16, 24), "b/kernel": (16, 24), "b/bias": (24,), "scale": ()}
    pretrained = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    models = [
        {name: x + np.float32(0.3) * rng.normal(size=x.shape) for name, x in pretrained.items()}
        for _ in range(3)
    ]
    return expert_set(
        pretrained,
        [{name: np.asarray(x, np.float32) for name, x in model.items()} for model in models],
    )


class Kept:
    """The last step's state, where it lies."""

    def latest(self):
        return None

    def save(self, step, tree, metadata):
        self.state = jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"model": 8}, {}),
        ({"layer": 2, "model": 4}, {"tasks_per_step": "one"}),
        ({"layer": 2, "model": 4}, {"form": "affine", "objective": "cosine_l2"}),
    ],
    ids=str,
)
def test_adam_on_a_mesh_is_that_of_one_device(sizes, options):
    experts, losses, kept = adam_experts(), {}, {}
    mesh = mesh_of(**sizes)
    states = {}
    for name, own in (("one", None), ("mesh", mesh)):
        kept[name], losses[name] = Kept(), []
        states[name] = rtx.offsets.fit(
            experts,
            rank=8,
            solver="adam",
            key=jax.random.key(0),
            learning_rate=1e-2,
            steps=20,
            warmup_steps=5,
            chunk_steps=5,
            checkpoint_every=5,
            checkpoints=kept[name],
            progress=lambda done, steps, loss, name=name: losses[name].append(loss),
            mesh=own,
            **options,
        )
    np.testing.assert_allclose(losses["mesh"], losses["one"], rtol=1e-6)
    assert difference(kept["mesh"].state.params, kept["one"].state.params) < 1e-6
    for name in ("residual", "energy"):
        one, two = (getattr(states[kind].report, name) for kind in ("mesh", "one"))
        assert one == pytest.approx(two, rel=1e-6)
    state = kept["mesh"].state
    moments = state.opt_state[0].mu["groups"]
    for group in (state.params["groups"], moments):
        for name, part in group[0].items():
            if name.startswith("gamma"):  # a number a task and leaf
                continue
            held = part.addressable_shards[0].data.size
            assert held * mesh.size == part.size
    with pytest.raises(ValueError, match=r"mesh: got axes \{'task': 2\}"):
        rtx.offsets.fit(experts, rank=8, solver="adam", warmup_steps=0, mesh=mesh_of(task=2))


def test_no_device_gathers_the_offsets_that_adam_is_fitted_to():
    """By the analysis of the compiled program: arguments, results and scratch memory."""
    optimizer = adam.make_optimizer(1e-3, 1, 10)
    targets = {0: jax.ShapeDtypeStruct((1, 32, 64, 64), jnp.float32)}

    def start():
        params = generator.init_params(jax.random.key(0), [["a"]], targets, {0: 8}, 4)
        return adam.TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    each, one = jnp.zeros(32), jnp.zeros(())
    mesh = mesh_of(model=8)
    parts = (jax.eval_shape(start), generator.Problem(targets, {}, {0: one}, each, each, one))
    placed = jax.tree.map(
        lambda leaf, there: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        parts,
        tuple(sharding.shardings(part, mesh, adam.RULES) for part in parts),
    )
    lowered = adam.run_steps.lower(
        optimizer, "all", generator.Objective(), "product", mesh, 2, *placed, jax.random.key(0)
    )
    found = lowered.compile().memory_analysis()
    assert found.argument_size_in_bytes < 1.15 / 8 * tree.param_bytes(parts)
    assert found.temp_size_in_bytes < tree.param_bytes(targets) / 4


# Evaluation


def test_a_model_on_a_mesh_gives_what_it_gives_on_one_device():
    config = models.ViTConfig(
        image_size=8, patch_size=4, width=16, num_layers=2, num_heads=2, mlp_dim=32
    )
    model = models.ViT(config)
    params = models.init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    inputs = {"image": rng.integers(0, 256, (21, 8, 8, 3)).astype(np.uint8)}
    head = {"kernel": rng.normal(size=(16, 3)).astype("f4"), "bias": np.zeros(3, "f4")}
    placed = sharding.place(params, mesh_of(data=2, model=4), sharding.MODEL_RULES)
    assert sharding.device_bytes(placed) <= 1.15 / 4 * tree.param_bytes(params)
    want = recovery.outputs(model, params, head, inputs, 8)
    found = recovery.outputs(model, placed, head, inputs, 8)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


# Routers


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_router_trained_on_a_mesh_is_that_of_one_device(kind):
    features = points(8, 40, width=8, spread=3.0)
    options = {"kind": kind, "epochs": 4, "batch_size": 64, "key": jax.random.key(0)}
    want = router.fit(features, **options)
    found = router.fit(features, **options, mesh=mesh_of(data=2, model=4))
    params = found.router.variables["params"]
    one, two = (tree.flatten(state.router.variables) for state in (found, want))
    # Biases before a batch norm have gradients that are nothing but rounding, of which Adam makes whole steps.
    free = r"hidden_\d/bias$|norm_\d/mean$"
    compared = [name for name in two if not tree.matches_any([free], name)]
    assert len(compared) == {"linear": 2, "mlp": 10}[kind]
    assert difference([one[n] for n in compared], [two[n] for n in compared]) < 1e-6
    assert difference(one, two) < 1e-2
    kernel = params["out" if kind == "linear" else "hidden_0"]["kernel"]
    assert 4 * kernel.addressable_shards[0].data.size == kernel.size
    with pytest.raises(ValueError, match=r"mesh: got axes \{'task': 2\}"):
        router.fit(features, **options, mesh=mesh_of(task=2))


# AdaMerging


def test_adamerging_on_a_mesh_is_that_of_one_device():
    pretrained, experts = reference.model(2)
    experts = expert_set(pretrained, experts)

    def logits(params, head, batch):
        return reference.logits(tree.flatten(params), head, batch)

    calibration = Calibration(
        reference.batches(2, 3), features=None, logits=logits, heads=reference.heads(2)
    )
    options = {"calibration": calibration, "steps": 12, "learning_rate": 0.05}
    want, values = adamerging.fit_coefficients(experts, **options)
    found, entropies = adamerging.fit_coefficients(
        experts, **options, mesh=mesh_of(data=2, model=4)
    )
    np.testing.assert_allclose(entropies, values, rtol=1e-6)
    assert difference(found, want) < 1e-6
    with pytest.raises(ValueError, match=r"mesh: got axes \{'task': 2\}"):
        adamerging.fit_coefficients(experts, **options, mesh=mesh_of(task=2))
