import jax
import numpy as np
import pytest
import references
import safetensors.numpy
from expert_sets import MODEL_IDS, MODELS, expert_set

import retex_jax as rtx
from retex_jax.offsets import factor_file

RETEX = rtx.METHODS["retex"]


def assert_same(one, other):
    first, first_form = jax.tree.flatten(one)
    second, second_form = jax.tree.flatten(other)
    assert first_form == second_form
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert np.asarray(mine).dtype == np.asarray(theirs).dtype


@pytest.mark.parametrize(("pretrained", "experts"), MODELS, ids=MODEL_IDS)
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 4, "orientation": "auto", "bits": 4, "vector_bits": 8},
        {"budget": 0.3, "sharing": "auto", "bits": 3},
        {"rank": 3, "base": "ties", "task_weights": "energy", "bits": 16},
    ],
)
def test_a_fit_in_a_file_is_bitwise_that_in_memory(pretrained, experts, options, tmp_path):
    made = expert_set(pretrained, experts)
    path = tmp_path / "offsets.safetensors"
    filed = RETEX.fit(made, **options, file=path)
    assert_same(filed, RETEX.fit(made, **options))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    loaded = factor_file.load(path)
    assert loaded.layout == filed.layout
    assert_same((loaded.merged, loaded.task_embeddings), (filed.merged, filed.task_embeddings))
    assert loaded.offsets.keys() == filed.offsets.keys()
    for name, form in filed.offsets.items():
        assert_same(loaded.offsets[name], form)
    assert loaded.report.residuals == filed.report.residuals
    assert loaded.report.ratio == filed.report.ratio
    recovered = references.flat(RETEX.recover(loaded, 0))
    for name, leaf in references.flat(RETEX.recover(filed, 0)).items():
        np.testing.assert_array_equal(recovered[name], leaf)


def test_other_readers_read_it(tmp_path):
    path = tmp_path / "offsets.safetensors"
    state = RETEX.fit(expert_set(*references.few_leaves(2)), rank=4, file=path)
    tensors = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(
        tensors["offsets/dense/kernel/generator"], state.offsets["dense/kernel"].generator
    )
    for name, leaf in references.flat(state.merged).items():
        np.testing.assert_array_equal(tensors[f"merged/{name}"], leaf)


def test_large_tensors_are_mapped(tmp_path):
    rng = np.random.default_rng(0)
    pretrained = {"w/kernel": rng.normal(size=(64, 64)).astype("f4")}
    experts = [{"w/kernel": rng.normal(size=(64, 64)).astype("f4")} for _ in range(2)]
    path = tmp_path / "offsets.safetensors"
    state = RETEX.fit(expert_set(pretrained, experts), rank=16, file=path)
    generator = state.offsets["w/kernel"].generator
    address = generator.unsafe_buffer_pointer()
    with open("/proc/self/maps") as maps:
        ranges = [line.split() for line in maps if str(path) in line]
    bounds = [[int(side, 16) for side in line[0].split("-")] for line in ranges]
    assert any(start <= address < stop for start, stop in bounds)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_fit_leaves_the_old_file_or_none(there, after, tmp_path):
    made = expert_set(*references.flax_model(2))
    path = tmp_path / "offsets.safetensors"
    if there:
        path.write_bytes(b"old")

    def stop(done, total):
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RETEX.fit(made, rank=4, file=path, progress=stop)
    assert [each.name for each in tmp_path.iterdir()] == ([path.name] if there else [])
    if there:
        assert path.read_bytes() == b"old"


def test_long_names_have_room_in_the_header(tmp_path):
    name = "é" * 500 + "/kernel"
    pretrained = {name: np.ones((3, 4), np.float32)}
    made = expert_set(pretrained, [pretrained, {name: 2 * pretrained[name]}])
    path = tmp_path / "offsets.safetensors"
    state = RETEX.fit(made, rank=2, bits=4, file=path)
    assert_same(factor_file.load(path).offsets[name], state.offsets[name])


@pytest.mark.parametrize(
    "options", [{"solver": "adam"}, {"form": "affine"}, {"d_emb": 1}, {"form": "shape_shared"}]
)
def test_only_the_closed_form_takes_a_file(options, tmp_path):
    made = expert_set(*references.few_leaves(2))
    with pytest.raises(ValueError, match=r"file: got .*solver 'exact'"):
        RETEX.fit(made, rank=2, file=tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.ones(2)}, path)
    with pytest.raises(ValueError, match="not the file of a fit"):
        factor_file.load(path)
    with pytest.raises(FileNotFoundError):
        factor_file.load(tmp_path / "missing")
