"""Fisher merging against gradients written by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
import references_fisher
from expert_sets import expert_set
from references_masks import assert_close, assert_like, other_buffers

from retex_jax.calibration import Calibration
from retex_jax.mergers import fisher

VARIANTS = ["per_example", "batch_sum"]
BATCH = 4
CLASSES = [3, 1, 2, 4, 2, 3, 2, 5]  # task 1 is a regression


def _logits(params, head, batch):
    linear = batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"]
    before = params["scale"] * linear + batch["x"] @ params["second"]["kernel"]
    return jnp.tanh(before) @ head


def _batches(examples, size=BATCH):
    return [{"x": examples[i : i + size]} for i in range(0, len(examples), size)]


def _calibration(examples, heads, size=BATCH):
    return Calibration(
        batches=[_batches(x, size) for x in examples],
        features=lambda params, batch: batch["x"],
        logits=_logits,
        heads=heads,
    )


def _task(num_tasks):
    """Inputs and heads of the tasks."""
    return references_fisher.inputs(num_tasks), references_fisher.heads(CLASSES[:num_tasks])


def _merge(pretrained, experts, examples, heads, *, size=BATCH, names=None, **options):
    calibration = _calibration(examples, heads, size)
    experts = expert_set(pretrained, experts, names=names)
    return references.flat(fisher.fit(experts, calibration=calibration, **options))


def _fishers(experts, examples, heads, variant):
    one = {
        "per_example": references_fisher.fisher_per_example,
        "batch_sum": lambda *a: references_fisher.fisher_batch_sum(*a, BATCH),
    }[variant]
    return [one(*each) for each in zip(experts, heads, examples, strict=True)]


def _reference(pretrained, experts, examples, heads, variant, **options):
    found = _fishers(experts, examples, heads, variant)
    return references_fisher.fisher_merge(pretrained, experts, found, variant, **options)


@pytest.mark.parametrize("num_classes", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fisher_information(num_classes, variant):
    pretrained, _ = references.few_leaves(1)
    examples, heads = references_fisher.inputs(1), references_fisher.heads([num_classes])
    (want,) = _fishers([pretrained], examples, heads, variant)
    found = fisher.fisher_diagonal(
        _logits,
        references.nested(pretrained),
        heads[0],
        _batches(examples[0]),
        variant=variant,
        chunk_size=3,
    )
    assert_close(found, want)
    assert max(leaf.max() for leaf in want.values()) > 0.01


def _linear(params, head, batch):
    return batch["x"] @ params["kernel"]


def test_a_softmax_layer_by_hand():
    # logits = x K, K = 0, two classes: p = 1/2, grad of log p_c by K is x (e_c - p): F = x^2 / 4.
    params = {"kernel": np.zeros((2, 2), np.float32)}
    batches = [{"x": np.float32([[2, 0]])}, {"x": np.float32([[4, 6]])}]
    found = fisher.fisher_diagonal(_linear, params, None, batches)
    np.testing.assert_allclose(found["kernel"], [[2.5, 2.5], [4.5, 4.5]], rtol=1e-6)


def test_a_batch_sum_by_hand():
    # sqrt(p_c) = a = 1/sqrt 2; grad of a (log p_1 + log p_2) by logit c is a (1 - 2 / 2) = 0: the cross
    # terms of classes cancel all. With K = [ln 3, 0] and x = 1, p = (3/4, 1/4), and by logit 1 it is
    # sqrt(3)/2 - (sqrt(3) + 1)/2 * 3/4 = (sqrt(3) - 3)/8; twice that for two examples in one batch.
    one = np.ones((2, 1), np.float32)
    even = {"kernel": np.zeros((1, 2), np.float32)}
    found = fisher.fisher_diagonal(_linear, even, None, [{"x": one}], variant="batch_sum")
    np.testing.assert_allclose(found["kernel"], [[0, 0]], atol=1e-12)
    uneven = {"kernel": np.log(np.float32([[3, 1]]))}
    square = ((3**0.5 - 3) / 8) ** 2
    for batches, want in (([one], 2 * square), ([one[:1], one[:1]], square)):
        batches = [{"x": x} for x in batches]
        found = fisher.fisher_diagonal(_linear, uneven, None, batches, variant="batch_sum")
        np.testing.assert_allclose(found["kernel"], [[want, want]], rtol=1e-5)


@pytest.mark.parametrize("num_tasks", [1, 2, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_definition(num_tasks, variant):
    pretrained, experts = references.few_leaves(num_tasks)
    task = _task(num_tasks)
    found = _merge(pretrained, experts, *task, variant=variant)
    assert_close(found, _reference(pretrained, experts, *task, variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"floor": 0.3},
        {"floor": 0.3, "normalize": False},
        {"scaling": [0.2, 0.0, 0.7]},
    ],
    ids=str,
)
def test_options(variant, options):
    pretrained, experts = references.few_leaves(3)
    task = _task(3)
    found = _merge(pretrained, experts, *task, variant=variant, **options)
    options = {
        {"scaling": "coefficients"}.get(name, name): value for name, value in options.items()
    }
    assert_close(found, _reference(pretrained, experts, *task, variant, **options))


def test_defaults():
    pretrained, experts = references.few_leaves(2)
    task = _task(2)
    want = _merge(
        pretrained, experts, *task, variant="per_example", floor=1e-6, normalize=True, scaling=1.0
    )
    assert_close(_merge(pretrained, experts, *task), want, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rank_and_unused_leaves(variant):
    pretrained, experts = references.flax_model(2)
    task = _task(2)
    found = _merge(pretrained, other_buffers(experts), *task, variant=variant, normalize=False)
    assert_like(found, pretrained)
    # Their Fisher information is 0, so that the floor weighs them evenly.
    mean = references.weight_average(pretrained, experts)
    unused = [name for name in mean if name.split("/")[0] in ("attention", "conv", "token")]
    assert {mean[name].ndim for name in unused} == {2, 3, 4}
    want = _reference(pretrained, experts, *task, variant, normalize=False)
    assert_close(found, want)
    assert_close({n: found[n] for n in unused}, {n: mean[n] for n in unused})


def test_without_a_floor_unused_leaves_are_averaged():
    pretrained, experts = references.few_leaves(2)
    task = _task(2)
    found = _merge(pretrained, experts, *task, floor=0.0)
    assert_close(found, _reference(pretrained, experts, *task, "per_example", floor=0.0))
    mean = references.weight_average(pretrained, experts)
    np.testing.assert_allclose(found["token/embedding"], mean["token/embedding"], rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_expert_is_itself_and_so_are_identical_ones(variant):
    pretrained, experts = references.few_leaves(1)
    for count in (1, 3):
        found = _merge(pretrained, experts * count, *_task(count), variant=variant)
        assert_close(found, experts[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_tasks_does_not_matter(variant):
    pretrained, experts = references.few_leaves(3)
    examples, heads = _task(3)
    first = _merge(pretrained, experts, examples, heads, variant=variant)
    order = (2, 0, 1)
    moved = [[values[task] for task in order] for values in (experts, examples, heads)]
    assert_close(_merge(pretrained, *moved, variant=variant), first, rtol=1e-6, atol=1e-6)


def test_chunks_and_batches_do_not_matter_per_example():
    pretrained, experts = references.few_leaves(2)
    task = _task(2)
    want = _merge(pretrained, experts, *task)
    for options in ({"chunk_size": 1}, {"chunk_size": 100}, {"size": 2}):
        assert_close(_merge(pretrained, experts, *task, **options), want, rtol=1e-6, atol=1e-6)


def test_a_task_with_hardly_any_information():
    # The second task's logits hardly move: its Fisher information is some 1e-28 of the first's.
    pretrained, experts = references.few_leaves(2)
    examples, heads = references_fisher.inputs(2), references_fisher.heads([2, 2])
    heads[1] = heads[1] * np.float32(1e-14)
    for order in ((0, 1), (1, 0)):
        each = [[values[task] for task in order] for values in (experts, examples, heads)]
        found = _merge(pretrained, *each, floor=0.0)
        want = _reference(pretrained, *each, "per_example", floor=0.0)
        assert_close(found, want)


def test_drawn_classes_estimate_the_expectation():
    pretrained, _ = references.few_leaves(1)
    examples, heads = references_fisher.inputs(1), references_fisher.heads([4])
    options = {"num_samples": 2000, "chunk_size": 2000}
    arguments = (_logits, references.nested(pretrained), heads[0], _batches(examples[0]))
    found = fisher.fisher_diagonal(*arguments, **options)
    (want,) = _fishers([pretrained], examples, heads, "per_example")
    total, estimate = (sum(float(np.sum(leaf)) for leaf in f.values()) for f in (want, found))
    assert abs(estimate / total - 1) < 0.05
    other = fisher.fisher_diagonal(*arguments, **options, key=jax.random.key(1))
    assert not np.array_equal(found["dense/kernel"], other["dense/kernel"])


def test_draws_go_by_the_name_of_the_expert():
    pretrained, experts = references.few_leaves(2)
    examples, heads = references_fisher.inputs(2), references_fisher.heads([3, 4])
    options = {"num_samples": 1, "key": jax.random.key(5)}
    first = _merge(pretrained, experts, examples, heads, names=["a", "b"], **options)
    moved = [values[::-1] for values in (experts, examples, heads)]
    second = _merge(pretrained, *moved, names=["b", "a"], **options)
    assert_close(first, second, rtol=1e-6, atol=1e-6)
    renamed = _merge(pretrained, experts, examples, heads, names=["b", "a"], **options)
    assert not np.allclose(first["dense/kernel"], renamed["dense/kernel"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "step"), [(np.float16, 2**-10), (ml_dtypes.bfloat16, 2**-7)])
def test_half_precision(variant, dtype, step):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    task = _task(2)
    found = _merge(pretrained, experts, *task, variant=variant)
    assert_like(found, pretrained)
    want = _reference(pretrained, experts, *task, variant)
    assert_close(found, want, rtol=step, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_jit_equals_eager(variant):
    pretrained, _ = references.few_leaves(1)
    examples, heads = references_fisher.inputs(1, 2), references_fisher.heads([2])
    arguments = (_logits, references.nested(pretrained), heads[0], _batches(examples[0], 2))
    compiled = fisher.fisher_diagonal(*arguments, variant=variant)
    with jax.disable_jit():
        eager = fisher.fisher_diagonal(*arguments, variant=variant)
    assert_close(compiled, references.flat(eager))


@pytest.mark.parametrize("variant", VARIANTS)
def test_sharded_equals_one_device(variant, place_on_8_devices):
    rng = np.random.default_rng(0)
    models = [{"a/kernel": rng.normal(size=(16, 24)).astype(np.float32)} for _ in range(3)]
    batches = [[{"x": rng.normal(size=(8, 16)).astype(np.float32)}] for _ in range(2)]
    calibration = Calibration(
        batches=batches,
        features=lambda params, batch: batch["x"],
        logits=lambda params, head, batch: batch["x"] @ params["a"]["kernel"][:, head],
        heads=[np.arange(3), np.arange(4)],
    )
    want = fisher.fit(expert_set(models[0], models[1:]), calibration=calibration, variant=variant)
    placed = [place_on_8_devices(model) for model in models]
    found = fisher.fit(expert_set(placed[0], placed[1:]), calibration=calibration, variant=variant)
    assert_close(references.flat(found), references.flat(want))
    kernel = found["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(placed[0]["a/kernel"].sharding, kernel.ndim)


def test_all_problems_are_told_at_once():
    pretrained, experts = references.few_leaves(2)
    options = {"variant": "per_exampel", "floor": -1.0, "chunk_size": 0, "scaling": [0, 0]}
    with pytest.raises(ValueError) as raised:
        _merge(pretrained, experts, *_task(2), **options)
    message = str(raised.value)
    for part in ("did you mean 'per_example'", "floor: got -1.0", "chunk_size: got 0", "scaling: "):
        assert part in message
    with pytest.raises(ValueError, match="scaling: got"):
        _merge(pretrained, experts, *_task(2), scaling=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="num_samples: got 0"):
        _merge(pretrained, experts, *_task(2), num_samples=0)
    with pytest.raises(ValueError, match="batch_sum' draws nothing"):
        _merge(pretrained, experts, *_task(2), num_samples=1, variant="batch_sum")


def test_calibration_is_needed():
    experts = expert_set(*references.few_leaves(2))
    with pytest.raises(ValueError, match="calibration: got None, but fisher"):
        fisher.fit(experts)
    with pytest.raises(ValueError, match="expected one for each of the 2 tasks"):
        fisher.fit(experts, calibration=_calibration(*_task(1)))


@pytest.mark.parametrize("normalize", [True, False])
def test_values_that_are_not_finite_are_told(normalize):
    pretrained, experts = references.few_leaves(2)
    examples, heads = _task(2)
    examples[1][0, 0] = np.nan
    with pytest.raises(ValueError, match="task_1: its Fisher information"):
        _merge(pretrained, experts, examples, heads, normalize=normalize)
