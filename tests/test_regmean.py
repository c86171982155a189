"""RegMean against the definition, its normal equations and a least-squares solution."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_fisher
from expert_sets import expert_set
from references_masks import assert_close, assert_like, other_buffers

import retex_jax as rtx
from retex_jax import models, tree
from retex_jax.calibration import Calibration, gram
from retex_jax.mergers import leafwise, regmean
from retex_jax.models.interception import linear_inputs

KERNELS = ("dense/kernel", "second/kernel")


def _linear_inputs(params, batch):
    second = jnp.tanh(params["scale"].astype(jnp.float32) * batch["x"])
    return {"dense/kernel": batch["x"], "head/kernel": batch["x"], "second/kernel": second}


def _calibration(examples, inputs=_linear_inputs, size=4):
    return Calibration(
        batches=[[{"x": x[i : i + size]} for i in range(0, len(x), size)] for x in examples],
        features=lambda params, batch: batch["x"],
        logits=lambda params, head, batch: batch["x"],
        heads=[None] * len(examples),
        linear_inputs=inputs,
    )


def _merge(pretrained, experts, examples, **options):
    calibration = _calibration(examples)
    return references.flat(
        regmean.fit(expert_set(pretrained, experts), calibration=calibration, **options)
    )


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_against_the_definition(num_tasks, alpha):
    pretrained, experts = references.few_leaves(num_tasks)
    examples = references_fisher.inputs(num_tasks, 32)
    found = _merge(pretrained, experts, examples, alpha=alpha)
    assert_close(found, references_fisher.regmean(pretrained, experts, examples, alpha))


def test_alpha_is_0_9_by_default():
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2)
    want = references_fisher.regmean(pretrained, experts, examples, 0.9)
    assert_close(_merge(pretrained, experts, examples), want)


def test_by_hand():
    # Task 1 reads (1, 0) and (1, 1), task 2 reads (0, 2): G_1 = [[1, .5], [.5, .5]], G_2 = [[0, 0], [0, 4]].
    # (G_1 + G_2) w = G_1 (1, 2) + G_2 (3, 6) = (2, 1.5) + (0, 24): 1 w_1 + .5 w_2 = 2, .5 w_1 + 4.5 w_2 = 25.5.
    kernels = [{"kernel": np.float32([[a], [b]])} for a, b in ((0, 0), (1, 2), (3, 6))]
    rows = [np.float32([[1, 0], [1, 1], [0, 0]]), np.float32([[0, 2], [0, 0], [0, 0]])]
    calibration = _calibration(rows, lambda params, batch: {"kernel": batch["x"]}, size=3)
    experts = expert_set(kernels[0], kernels[1:])
    found = regmean.fit(experts, calibration=calibration, alpha=1.0)
    np.testing.assert_allclose(found["kernel"], [[-15 / 17], [98 / 17]], rtol=1e-5)
    # Without off-diagonals: w_1 = 1 (task 1 alone reads it), (.5 * 2 + 4 * 6) / 4.5.
    found = regmean.fit(experts, calibration=calibration, alpha=0.0)
    np.testing.assert_allclose(found["kernel"], [[1], [50 / 9]], rtol=1e-6)


def test_it_is_the_least_squares_solution():
    pretrained, experts = references.few_leaves(3)
    examples = references_fisher.inputs(3, 16)
    found = _merge(pretrained, experts, examples, alpha=1.0)
    for name in KERNELS:
        reads = [
            references_fisher.linear_inputs(expert, x)[name]
            for expert, x in zip(experts, examples, strict=True)
        ]
        wanted = [
            x @ expert[name].astype(np.float64) for x, expert in zip(reads, experts, strict=True)
        ]
        merged = found[name].astype(np.float64)
        normal = sum(x.T @ (x @ merged - y) for x, y in zip(reads, wanted, strict=True))
        size = sum(np.abs(x.T @ y).max() for x, y in zip(reads, wanted, strict=True))
        assert np.abs(normal).max() < 1e-5 * size
        best = np.linalg.lstsq(np.concatenate(reads), np.concatenate(wanted), rcond=None)[0]
        np.testing.assert_allclose(merged, best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_one_expert_is_itself_and_so_are_identical_ones(alpha):
    pretrained, experts = references.few_leaves(1)
    for count in (1, 3):
        # Three inputs each do not determine twelve rows.
        examples = references_fisher.inputs(count, 3)
        found = _merge(pretrained, experts * count, examples, alpha=alpha)
        assert_close(found, experts[0], rtol=1e-6, atol=1e-6)


def test_what_no_input_excites_is_the_mean():
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2, 3)
    for x in examples:
        x[:, 4] = 0
    mean = references.weight_average(pretrained, experts)
    found = {alpha: _merge(pretrained, experts, examples, alpha=alpha) for alpha in (0.9, 1.0)}
    for name in KERNELS:
        for merged in found.values():
            assert np.isfinite(merged[name]).all()
            np.testing.assert_allclose(merged[name][4], mean[name][4], rtol=1e-6, atol=1e-6)
    # Six inputs of rank six: at alpha = 1 all of them are met, and their complement is the mean.
    x, name = np.concatenate(examples).astype(np.float64), "dense/kernel"
    merged = found[1.0][name].astype(np.float64)
    met = [x @ expert[name] for x, expert in zip(examples, experts, strict=True)]
    np.testing.assert_allclose(x @ merged, np.concatenate(met), rtol=1e-4, atol=1e-4)
    # The complement is that of inputs scaled to unit size: S (W - mean) lies in the span of S^-1 X^T.
    scale = np.sqrt(sum(np.mean(x.astype(np.float64) ** 2, axis=0) for x in examples))
    scale[4] = 1
    change = scale[:, None] * (merged - mean[name])
    span = np.linalg.svd(x / scale)[2][:6]
    np.testing.assert_allclose(change - span.T @ (span @ change), 0, atol=1e-4)


def test_rows_of_padding_do_not_count():
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2)
    want = _merge(pretrained, experts, examples)
    padded = [np.concatenate([examples[0], np.zeros((12, 12), np.float32)]), examples[1]]
    assert_close(_merge(pretrained, experts, padded), want, rtol=1e-6, atol=1e-6)


def test_more_inputs_of_the_same_kind_weigh_no_more():
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2)
    want = _merge(pretrained, experts, examples)
    longer = [np.concatenate([examples[0]] * 3), examples[1]]
    assert_close(_merge(pretrained, experts, longer), want)


def test_order_of_tasks_does_not_matter():
    pretrained, experts = references.few_leaves(3)
    examples = references_fisher.inputs(3)
    first = _merge(pretrained, experts, examples)
    second = _merge(pretrained, experts[::-1], examples[::-1])
    assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("group_bytes", [1, 3000, 1e9])
def test_groups_do_not_matter(group_bytes):
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2)
    want = _merge(pretrained, experts, examples)
    found = _merge(pretrained, experts, examples, group_bytes=group_bytes)
    assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_a_pass_over_the_data_for_each_group():
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2)
    passes = []

    class Counted(list):
        def __iter__(self):
            passes.append(len(self))
            return super().__iter__()

    needed = 12 * 12**2 + 16 * 12 * 10  # of one of the two kernels
    for group_bytes, groups in ((2 * needed, 1), (2 * needed - 1, 2), (1, 2)):
        calibration = _calibration(examples)
        counted = [Counted(batches) for batches in calibration.batches]
        calibration = dataclasses.replace(calibration, batches=counted)
        passes.clear()
        # Two looks at whether batches can be read again, two at whether there is one, and one at its shapes.
        regmean.fit(
            expert_set(pretrained, experts), calibration=calibration, group_bytes=group_bytes
        )
        assert len(passes) == 2 + 2 + 1 + 2 * groups


def test_experts_are_never_stacked_whole(monkeypatch):
    stacks = []
    stacked = rtx.ExpertSet.stacked
    monkeypatch.setattr(leafwise, "_MOST_UNROLLED", 2)
    monkeypatch.setattr(
        rtx.ExpertSet,
        "stacked",
        lambda self, *args: stacks.append(self.num_tasks) or stacked(self, *args),
    )
    pretrained, experts = references.few_leaves(8)
    _merge(pretrained, experts, references_fisher.inputs(8))
    assert max(stacks) == 2


def test_a_kernel_of_four_axes_reads_flattened_inputs():
    pretrained, experts = references.flax_model(2)
    experts = other_buffers(experts)
    rng = np.random.default_rng(3)
    examples = [rng.normal(size=(32, 16)).astype(np.float32) for _ in range(2)]
    calibration = _calibration(examples, lambda params, batch: {"conv/kernel": batch["x"]})
    found = references.flat(
        regmean.fit(expert_set(pretrained, experts), calibration=calibration, alpha=1.0)
    )
    assert_like(found, pretrained)
    kernels = [expert["conv/kernel"].astype(np.float64).reshape(16, 6) for expert in experts]
    outputs = [x @ kernel for x, kernel in zip(examples, kernels, strict=True)]
    best = np.linalg.lstsq(np.concatenate(examples), np.concatenate(outputs), rcond=None)[0]
    np.testing.assert_allclose(found["conv/kernel"], best.reshape(2, 2, 4, 6), rtol=1e-5, atol=1e-5)
    mean = references.weight_average(pretrained, experts)
    others = [name for name in mean if name != "conv/kernel"]
    assert_close({n: found[n] for n in others}, {n: mean[n] for n in others})


@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(dtype, step):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    examples = references_fisher.inputs(2, 32)
    found = _merge(pretrained, experts, examples)
    assert_like(found, pretrained)
    want = references_fisher.regmean(pretrained, experts, examples, 0.9)
    assert_close(found, want, rtol=step, atol=1e-5)


def test_jit_equals_eager():
    x = jnp.asarray(references_fisher.inputs(1)[0]).at[2].set(0)
    (product, count), (compiled, compiled_count) = gram(x), jax.jit(gram)(x)
    np.testing.assert_allclose(product, compiled, rtol=1e-6, atol=1e-6)
    assert count == compiled_count == 7


def test_sharded_equals_one_device(place_on_8_devices):
    rng = np.random.default_rng(0)
    trees = [{"a/kernel": rng.normal(size=(16, 24)).astype(np.float32)} for _ in range(3)]
    examples = [rng.normal(size=(8, 16)).astype(np.float32) for _ in range(2)]
    calibration = _calibration(examples, lambda params, batch: {"a/kernel": batch["x"]})
    want = regmean.fit(expert_set(trees[0], trees[1:]), calibration=calibration)
    placed = [place_on_8_devices(model) for model in trees]
    calibration = dataclasses.replace(
        calibration, batches=[[place_on_8_devices({"x": x})] for x in examples]
    )
    found = regmean.fit(expert_set(placed[0], placed[1:]), calibration=calibration)
    assert_close(references.flat(found), references.flat(want))
    kernel = found["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(placed[0]["a/kernel"].sharding, kernel.ndim)


def test_on_a_transformer():
    config = models.BertConfig(
        vocab_size=20, width=8, num_layers=1, num_heads=2, mlp_dim=12, max_length=6
    )
    model = models.Bert(config)
    rng = np.random.default_rng(0)
    spec = models.expected_params(model)
    trees = [
        jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), spec)
        for _ in range(3)
    ]
    batches = [
        {
            "input_ids": rng.integers(0, 20, (5, 6)).astype(np.int32),
            "attention_mask": (np.arange(6) < rng.integers(2, 7, (5, 1))).astype(np.int32),
        }
        for _ in range(2)
    ]
    calibration = Calibration(
        batches=[[batch] for batch in batches],
        features=lambda params, batch: model.apply({"params": params}, batch).pooled,
        logits=lambda params, head, batch: model.apply({"params": params}, batch).pooled,
        heads=[None] * len(batches),
        linear_inputs=lambda params, batch: linear_inputs(model, params, batch),
    )
    experts = rtx.ExpertSet.from_trees(trees[0], trees[1:])
    found = tree.flatten(regmean.fit(experts, calibration=calibration))
    read = [linear_inputs(model, *each) for each in zip(trees[1:], batches, strict=True)]
    experts = [tree.flatten(expert) for expert in trees[1:]]
    for name, leaf in found.items():
        want = np.mean([expert[name] for expert in experts], axis=0)
        if name in read[0]:
            total, moment = 0, 0
            for expert, inputs, batch in zip(experts, read, batches, strict=True):
                x = np.asarray(inputs[name], np.float64)
                gram = 0.9 * x.T @ x + 0.1 * np.diag(np.sum(x**2, axis=0))
                gram /= batch["attention_mask"].sum()
                total, moment = total + gram, moment + gram @ np.asarray(expert[name], np.float64)
            want = np.linalg.solve(total, moment)
        np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(read[0]) == 6


def test_calibration_is_needed():
    experts = expert_set(*references.few_leaves(2))
    with pytest.raises(ValueError, match="calibration: got None, but regmean"):
        regmean.fit(experts)
    examples = references_fisher.inputs(2)
    with pytest.raises(ValueError, match="linear_inputs: got None"):
        regmean.fit(experts, calibration=_calibration(examples, None))
    nothing = _calibration(examples, lambda params, batch: {"other/kernel": batch["x"]})
    with pytest.raises(ValueError, match=r"\['other/kernel'\], none of which"):
        regmean.fit(experts, calibration=nothing)

    def misfits(params, batch):
        return {"dense/kernel": batch["x"][:, :5], "dense/bias": batch["x"]}

    with pytest.raises(ValueError) as raised:
        regmean.fit(experts, calibration=_calibration(examples, misfits))
    assert "dense/kernel" in str(raised.value) and "dense/bias" in str(raised.value)


def test_all_problems_are_told_at_once():
    pretrained, experts = references.flax_model(1)
    pretrained, *experts = map(references.as_torch, (pretrained, *experts))
    experts = rtx.ExpertSet.from_trees(pretrained, experts, layout="torch")
    with pytest.raises(ValueError) as raised:
        regmean.fit(experts, alpha=1.5, group_bytes=0)
    for part in ("alpha: got 1.5", "group_bytes: got 0", "layout: got 'torch'"):
        assert part in str(raised.value)


def test_values_that_are_not_finite_are_told():
    pretrained, experts = references.few_leaves(2)
    examples = references_fisher.inputs(2)
    examples[1][0, 0] = np.nan
    with pytest.raises(ValueError, match="task_1: the inputs of dense/kernel"):
        _merge(pretrained, experts, examples)
