import numpy as np
import pytest
import references
from expert_sets import expert_set

import retex_jax as rtx
from retex_jax import offsets, plots

RETEX = rtx.METHODS["retex"]


def layers(num_tasks=2):
    rng = np.random.default_rng(0)

    def model():
        tensors = {f"blocks_{layer}/fc/kernel": rng.normal(size=(8, 6)) for layer in range(11)}
        tensors |= {f"blocks_{layer}/fc/bias": rng.normal(size=6) for layer in range(11)}
        tensors["embedding"] = rng.normal(size=(9, 5))
        return {name: tensor.astype("f4") for name, tensor in tensors.items()}

    return expert_set(model(), [model() for _ in range(num_tasks)])


def test_kinds_and_layers():
    experts = layers()
    state = RETEX.fit(experts, rank=3)
    found = offsets.by_kind(state)
    assert set(found) == {"blocks/fc/kernel", "embedding"}
    assert found["blocks/fc/kernel"]["rank"] == [3] * 11
    for layer, lost in enumerate(found["blocks/fc/kernel"]["residual"]):  # 10 comes after 9
        name = f"blocks_{layer}/fc/kernel"
        assert lost == state.report.residuals[name] / state.report.energies[name]
        assert 0 < lost < 1
    assert len(found["embedding"]["rank"]) == 1


def test_separate_and_absent_offsets():
    state = RETEX.fit(layers(), budget=0.2, sharing="separate")
    ranks = offsets.by_kind(state)["blocks/fc/kernel"]["rank"]
    want = []
    for layer in range(11):
        form = state.offsets.get(f"blocks_{layer}/fc/kernel")
        want.append(np.mean(form.ranks) if form else 0)
    assert ranks == want
    assert len(set(ranks)) > 1


def test_an_added_task_leaves_the_ranks_of_the_others():
    state = RETEX.fit(layers(), rank=3)
    extended = offsets.add_task(state, RETEX.recover(state, 0), budget=0.9, bits=8)
    assert offsets.by_kind(extended) == offsets.by_kind(state)


def test_no_energy_is_no_number():
    pretrained = {"a": np.ones((3, 3), "f4")}
    state = RETEX.fit(expert_set(pretrained, [pretrained, pretrained]), rank=1)
    assert offsets.by_kind(state) == {"a": {"rank": [1], "residual": [None]}}
    assert references.flat(state.merged).keys() == {"a"}


def test_plot_shows_every_number():
    svg = plots.by_layer(
        {"fc/kernel": [3, 17, None], "embedding": [5]}, title="Ranks of each layer"
    )
    assert svg.startswith("<svg")
    for text in ("17", "fc/kernel", "embedding", "Ranks of each layer"):
        assert text in svg
    assert ">42<" in plots.by_layer({"x": [0.42]}, title="Lost", percent=True)


@pytest.mark.parametrize("kinds", [{}, {"x": []}, {"x": [-1.0]}, {"x": [float("nan")]}])
def test_bad_plots(kinds):
    with pytest.raises(ValueError, match="kinds"):
        plots.by_layer(kinds, title="Ranks")
