"""Expert sets of the flat models of `references`, how results are compared, and what memory a call takes."""

import tracemalloc

import numpy as np
import references

from retex_jax import ExpertSet

MODELS = [references.flax_model(2), references.few_leaves(1), references.few_leaves(8)]
MODEL_IDS = ["2 tasks, all leaves", "1 task", "8 tasks"]


def expert_set(pretrained, experts, **options):
    """An ExpertSet of flat models."""
    return ExpertSet.from_trees(
        references.nested(pretrained), [references.nested(expert) for expert in experts], **options
    )


def assert_close(found, want, rtol=1e-5, atol=1e-5):
    """Compares two models, flat or nested, leaf by leaf in float64."""
    found = references.flat(found)
    assert set(found) == set(want)
    for name in want:
        one, two = np.asarray(found[name]), np.asarray(want[name])
        assert one.shape == two.shape, name
        one, two = one.astype(np.float64), two.astype(np.float64)
        np.testing.assert_allclose(one, two, rtol=rtol, atol=atol, err_msg=name)


def host_peak(function):
    """What a function returns, and the most bytes of NumPy arrays and Python objects that it held."""
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
