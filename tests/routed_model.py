"""The model of `references_routed` in Flax, and its calibration."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import references
import references_routed as ref

import retex_jax as rtx
from retex_jax.calibration import Calibration


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        return nn.Dense(width, name="fc2")(nn.relu(nn.Dense(ref.HIDDEN, name="fc1")(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + Mlp(name="mlp")(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, batch):
        h = nn.Dense(ref.WIDTH, use_bias=False, name="embed")(batch["x"])
        for index in range(2):
            h = Block(name=f"blocks_{index}")(h)
        h = jnp.tanh(h * self.param("scale", nn.initializers.ones_init(), (ref.WIDTH,)))
        real = batch.get("attention_mask", jnp.ones(h.shape[:2]))[..., None]
        return (h * real).sum(axis=1) / real.sum(axis=1)


def features(params, batch):
    with jax.default_matmul_precision("highest"):
        return Net().apply({"params": params}, batch)


def experts(pretrained, models, names=None):
    return rtx.ExpertSet.from_trees(
        references.nested(pretrained),
        [references.nested(model) for model in models],
        names=names and list(names),
    )


def calibration(xs, heads, batch_size=4):
    """Inputs of each task [n, N, 6] in batches, and the model with the tasks' heads."""

    def logits(params, head, batch):
        return jnp.matmul(features(params, batch), head, precision="highest")

    batches = [
        [{"x": x[start : start + batch_size]} for start in range(0, len(x), batch_size)] for x in xs
    ]
    return Calibration(batches, features, logits, heads)


def case(num_tasks=3, **options):
    """Pretrained model, experts, inputs, heads and calibration."""
    pretrained, models = ref.models(num_tasks, **options)
    xs, heads = ref.inputs(num_tasks), ref.heads(num_tasks)
    return pretrained, models, xs, heads, calibration(xs, heads)


def mixed_batch(xs, seed=0):
    """All tasks' inputs, shuffled: the batch, and the true tasks."""
    tasks = np.repeat(np.arange(len(xs)), [len(x) for x in xs])
    order = np.random.default_rng(seed).permutation(len(tasks))
    return {"x": np.concatenate(xs)[order]}, tasks[order]


def assert_model(found, want, rtol=1e-5, atol=1e-5):
    """Equal leaves; the float64 reference `want` has no buffers."""
    found = references.flat(found)
    assert set(found) == set(want) | {"steps"}
    assert found["steps"] == 7
    for name, leaf in want.items():
        assert found[name].dtype != np.float64
        np.testing.assert_allclose(found[name], leaf, rtol=rtol, atol=atol, err_msg=name)
