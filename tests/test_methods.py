import inspect
from dataclasses import replace

import jax
import numpy as np
import pytest
import references
import routed_model as net

import retex_jax as rtx
from retex_jax.calibration import Calibration
from retex_jax.methods import NEEDS

OPTIONS = {
    "weight_average": {},
    "task_arithmetic": {"scaling": 0.4},
    "ties": {"density": 0.4},
    "consensus": {"k": 1},
    "dare": {"drop": 0.3},
    "svd": {"rank": 2},
    "dts_t": {},
    "dts_d": {},
    "emr": {},
    "t_switch": {},
    "tall_mask": {},
    "retex": {"rank": 4},
}


def _expert_set(num_tasks):
    pretrained, experts = references.few_leaves(num_tasks)
    return rtx.ExpertSet.from_trees(
        references.nested(pretrained), [references.nested(expert) for expert in experts]
    )


def test_one_table_lists_them_all():
    assert {name for name, method in rtx.METHODS.items() if method.needs == "none"} == set(OPTIONS)
    for name in rtx.mergers.MERGERS:
        assert rtx.METHODS[name].fit is rtx.mergers.MERGERS[name]


# DaWin needs inputs when it predicts, not before.
@pytest.mark.parametrize("name", sorted(set(rtx.METHODS) - set(OPTIONS) - {"dawin"}))
def test_methods_that_need_data_say_so(name):
    assert NEEDS[rtx.METHODS[name].needs] in ("train", "test")
    with pytest.raises(ValueError, match="calibration: got None"):
        rtx.METHODS[name].fit(_expert_set(2))


@pytest.mark.parametrize("name", sorted(set(rtx.METHODS) - set(OPTIONS) - {"dawin"}))
def test_batches_that_can_be_read_once_are_refused_and_not_read(name):
    once = [iter([{"x": np.ones((2, 3))}] * 2) for _ in range(2)]
    calibration = Calibration(once, lambda *_: None, lambda *_: None, [None] * 2)
    with pytest.raises(ValueError, match=r"calibration.batches: those of tasks \[0, 1\] are iter"):
        rtx.METHODS[name].fit(_expert_set(2), calibration=calibration)
    assert [len(list(batches)) for batches in once] == [2, 2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fisher", {}),
        ("fisher", {"variant": "batch_sum"}),
        ("adamerging", {"steps": 1}),
        ("wemoe", {"steps": 1}),
        ("dawin", {"variant": "mixture"}),
        ("retex", {"rank": 2, "task_weights": "divergence"}),
        ("retex", {"budget": 0.5, "leaf_weights": "fisher"}),
    ],
)
def test_models_are_compiled_once_for_all_heads_of_a_shape(name, options):
    traced = []
    for num_tasks in (2, 6):  # of two shapes in turn
        pretrained, models, _, _, calibration = net.case(num_tasks)

        def logits(params, head, batch, plain=calibration.logits, own=num_tasks):
            traced.append(own)
            return plain(params, head, batch)

        given = replace(calibration, logits=logits)
        rtx.METHODS[name].fit(net.experts(pretrained, models), calibration=given, **options)
    assert 0 < traced.count(2) == traced.count(6)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_method_keeps_the_contract(name):
    method = rtx.METHODS[name]
    experts = _expert_set(2)
    pretrained = experts.pretrained_params()
    state = method.fit(experts, key=jax.random.key(0), **OPTIONS[name])
    parameters = inspect.signature(method.fit).parameters
    assert parameters["key"].kind is parameters["key"].KEYWORD_ONLY
    assert parameters["key"].default is None
    assert method.needs == "none"
    for task in range(2):
        params = method.recover(state, task=task)
        assert jax.tree.structure(params) == jax.tree.structure(pretrained)
        for found, want in zip(jax.tree.leaves(params), jax.tree.leaves(pretrained), strict=True):
            assert found.shape == want.shape
            assert found.dtype == want.dtype
    leaves, structure = jax.tree.flatten(state)
    again = jax.tree.unflatten(structure, list(map(np.asarray, leaves)))
    assert method.extra_bytes(again) == method.extra_bytes(state) >= 0


@pytest.mark.parametrize("name", OPTIONS)
def test_the_key_is_optional_and_fits_repeat_bit_for_bit(name):
    method = rtx.METHODS[name]
    keys = [{}, {}, {"key": jax.random.key(0 if name == "dare" else 5)}]  # DARE is random
    states = [method.fit(_expert_set(8), **options, **OPTIONS[name]) for options in keys]
    for other in states[1:]:
        for one, two in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(one, two)
    assert method.random(OPTIONS[name]) == (name == "dare")


def test_dare_depends_on_its_key():
    one, two = (
        rtx.METHODS["dare"].fit(_expert_set(2), key=jax.random.key(seed), drop=0.5)
        for seed in (0, 5)
    )
    assert not np.array_equal(one["dense"]["kernel"], two["dense"]["kernel"])


@pytest.mark.parametrize("name", ["weight_average", "task_arithmetic", "ties"])
def test_static_mergers_ignore_the_task_and_store_nothing_more(name):
    method = rtx.METHODS[name]
    state = method.fit(_expert_set(2), **OPTIONS[name])
    assert method.extra_bytes(state) == 0
    assert method.mix is None
    for one, two in zip(
        jax.tree.leaves(method.recover(state, 0)),
        jax.tree.leaves(method.recover(state, 1)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_the_readmes_calls():
    experts = _expert_set(2)
    state = rtx.METHODS["ties"].fit(experts, key=jax.random.key(0), density=0.2)
    assert rtx.METHODS["ties"].recover(state, task=0)["dense"]["kernel"].shape == (12, 10)
    retex = rtx.METHODS["retex"]
    state = retex.fit(experts, rank=4, solver="exact", base="weight_average")
    assert 1 - 1e-6 <= state.report.ratio <= 1.0001
    features = [np.random.default_rng(seed).normal(size=(20, 10)) for seed in range(2)]
    ident = rtx.identifier.subspace.fit(features, rank=8, center=True)
    scores = rtx.identifier.subspace.scores(ident, features[0])
    assert scores.shape == (20, 2)
    mixed = retex.mix(state, jax.nn.softmax(scores[0]))
    assert mixed["dense"]["kernel"].shape == (12, 10)
