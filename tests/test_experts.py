import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import references
from safetensors.numpy import save_file

import retex_jax as rtx
from retex_jax import experts as experts_module
from retex_jax.mergers import leafwise


def _from_flat(pretrained, experts, **options):
    pretrained = None if pretrained is None else references.nested(pretrained)
    return rtx.ExpertSet.from_trees(
        pretrained, [references.nested(expert) for expert in experts], **options
    )


def _files(tmp_path, pretrained, experts):
    paths = [tmp_path / name for name in ["pretrained", *"abcdefgh"[: len(experts)]]]
    for path, model in zip(paths, [pretrained, *experts], strict=True):
        save_file(model, path)
    return paths[0], paths[1:]


@pytest.mark.parametrize(
    ("model", "num_tasks"),
    [(references.flax_model, 2), (references.few_leaves, 1), (references.few_leaves, 8)],
)
def test_from_trees(model, num_tasks):
    pretrained, experts = model(num_tasks)
    expert_set = _from_flat(pretrained, experts)
    assert expert_set.num_tasks == num_tasks
    assert expert_set.names == tuple(f"task_{task}" for task in range(num_tasks))
    assert expert_set.layout == "flax"
    assert list(expert_set.leaves) == sorted(pretrained)
    assert expert_set.float_leaves == sorted(
        name for name in pretrained if not name.startswith("buffers/")
    )
    for name, leaf in pretrained.items():
        assert expert_set.leaves[name].shape == leaf.shape
        assert expert_set.leaves[name].dtype == leaf.dtype
        np.testing.assert_array_equal(expert_set.pretrained(name), leaf)
        for task, expert in enumerate(experts):
            np.testing.assert_array_equal(expert_set.expert(name, task), expert[name])
    for name in expert_set.float_leaves:
        stack = np.stack([expert[name] for expert in experts])
        np.testing.assert_array_equal(expert_set.stacked(name), stack)
        np.testing.assert_array_equal(expert_set.task_vectors(name), stack - pretrained[name])
    for found, want in [
        (expert_set.pretrained_params(), pretrained),
        (expert_set.expert_params(num_tasks - 1), experts[-1]),
    ]:
        found = references.flat(found)
        assert set(found) == set(want)
        for name, leaf in want.items():
            np.testing.assert_array_equal(found[name], leaf)


def test_task_vectors_of_the_whole_model():
    pretrained, experts = references.flax_model(2)
    vectors = references.flat(rtx.task_vectors(_from_flat(pretrained, experts)))
    assert not any(name.startswith("buffers/") for name in vectors)
    for name, vector in vectors.items():
        assert vector.dtype == np.float32
        for task, expert in enumerate(experts):
            np.testing.assert_array_equal(vector[task], expert[name] - pretrained[name])


def test_nothing_is_copied():
    leaf = np.ones((3, 4), np.float32)
    expert_set = rtx.ExpertSet.from_trees({"a": leaf}, [{"a": leaf}])
    assert expert_set.pretrained("a") is leaf
    assert expert_set.expert("a", 0) is leaf


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("on_device", [False, True])
def test_half_precision_is_stacked_in_float32(dtype, on_device):
    pretrained, experts = references.few_leaves(2, dtype=dtype)
    if on_device:
        pretrained, experts = jax.tree.map(jnp.asarray, (pretrained, experts))
    expert_set = _from_flat(pretrained, experts)
    for name in expert_set.float_leaves:
        stack = np.stack([np.asarray(expert[name], np.float32) for expert in experts])
        assert expert_set.leaves[name].dtype == dtype
        assert expert_set.stacked(name).dtype == jnp.float32
        np.testing.assert_array_equal(expert_set.stacked(name), stack)
        np.testing.assert_array_equal(
            expert_set.task_vectors(name), stack - np.asarray(pretrained[name], np.float32)
        )


def test_numpy_scalars_keep_their_dtype():
    for scalar in (np.float64(1), np.float32(1), np.bool_(True), np.int64(1)):
        source = experts_module.TreeSource({"a": scalar})
        assert source.leaves["a"].dtype == scalar.dtype
        rtx.ExpertSet.from_trees(
            {"a": np.asarray(scalar), "b": np.ones(2, np.float32)},
            [{"a": scalar, "b": np.ones(2, np.float32)}],
        )


def test_numbers_are_leaves():
    expert_set = rtx.ExpertSet.from_trees({"a": 1.5, "n": 3}, [{"a": 2.5, "n": 3}])
    assert expert_set.float_leaves == ["a"]
    assert expert_set.leaves["a"].shape == ()
    np.testing.assert_array_equal(expert_set.task_vectors("a"), [1.0])


def test_exclude():
    pretrained, experts = references.flax_model(2)
    for task, expert in enumerate(experts):
        expert[f"head_{task}/kernel"] = np.full((3, task + 2), np.nan, np.float32)
    expert_set = _from_flat(pretrained, experts, exclude=["^head", "^second/"])
    assert set(expert_set.leaves) == set(pretrained) - {"second/kernel"}
    with pytest.raises(ValueError, match="no leaf is left"):
        _from_flat(pretrained, experts, exclude=[""])


def test_exclude_takes_patterns_not_one_string():
    # Taken letter by letter, "head" would leave out every leaf with an h, e, a or d in its name.
    pretrained, experts = references.flax_model(2)
    with pytest.raises(ValueError, match="exclude"):
        _from_flat(pretrained, experts, exclude="head")
    told = r"exclude: got '\(head', expected a regular expression.*\n.*got 3, expected a regular"
    with pytest.raises(ValueError, match=told):
        _from_flat(pretrained, experts, exclude=["scale", "(head", 3])


def _spoil(experts):
    """One problem of each kind, in several experts."""
    del experts[0]["dense/bias"]
    experts[1]["extra/kernel"] = np.ones((2, 2), np.float32)
    experts[1]["dense/kernel"] = np.ones((10, 12), np.float32)
    experts[2]["scale"] = np.array(1, np.float16)
    experts[2]["dense/bais"] = experts[2].pop("dense/bias")


PROBLEMS = [
    r"one: missing leaf dense/bias",
    r"two: extra leaf extra/kernel",
    r"two: dense/kernel has shape \(10, 12\), expected \(12, 10\)",
    r"three: scale has dtype float16, expected float32",
    r"three: missing leaf dense/bias \(did you mean 'dense/bais'\?\)",
    r"three: extra leaf dense/bais \(did you mean 'dense/bias'\?\)",
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_all_problems_are_listed_at_once(problem):
    pretrained, experts = references.flax_model(3)
    _spoil(experts)
    with pytest.raises(ValueError, match=problem):
        _from_flat(pretrained, experts, names=["one", "two", "three"])


def test_as_many_problems_as_there_are():
    pretrained, experts = references.flax_model(3)
    _spoil(experts)
    with pytest.raises(ValueError, match="do not fit") as error:
        _from_flat(pretrained, experts)
    assert len(str(error.value).splitlines()) == 1 + len(PROBLEMS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_inf_are_found_in_every_model(value, dtype):
    pretrained, experts = references.flax_model(3, dtype=dtype)
    for model, name in [(pretrained, "scale"), (experts[0], "dense/kernel"), (experts[2], "scale")]:
        model[name] = model[name].copy()
        model[name].reshape(-1)[-1] = value
    experts[2]["dense/bias"] = np.full(10, value, dtype)
    with pytest.raises(ValueError, match="NaN or Inf") as error:
        _from_flat(pretrained, experts, names=["x", "y", "z"])
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "pretrained: scale has 1 values that are NaN or Inf",
        "x: dense/kernel has 1 values that are NaN or Inf",
        "z: dense/bias has 10 values that are NaN or Inf",
        "z: scale has 1 values that are NaN or Inf",
    ]
    assert _from_flat(pretrained, experts, check_finite=False).num_tasks == 3


def test_no_expert():
    pretrained, _ = references.flax_model(1)
    for names in (None, []):
        with pytest.raises(ValueError, match="T = 0"):
            _from_flat(pretrained, [], names=names)


@pytest.mark.parametrize("names", [["a"], ["a", "a"], ["a", "b", "c"], "ab"])
def test_names_must_be_one_an_expert(names):
    with pytest.raises(ValueError, match=r"names.*2 unique names"):
        _from_flat(*references.flax_model(2), names=names)


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout: got 'pytorch'"):
        _from_flat(*references.flax_model(1), layout="pytorch")


@pytest.mark.parametrize(
    "leaf", ["text", None, [1.0], np.array(["text"]), np.array([None]), np.ones(3, np.complex64)]
)
def test_leaves_must_be_real_arrays(leaf):
    with pytest.raises(ValueError, match="a/b"):
        rtx.ExpertSet.from_trees({"a": {"b": leaf}}, [{"a": {"b": leaf}}])


def test_something_must_be_left_to_merge():
    buffers = {"steps": np.array([3])}
    with pytest.raises(ValueError, match="no leaf is left to merge"):
        rtx.ExpertSet.from_trees(buffers, [buffers])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_from_safetensors(tmp_path, dtype):
    pretrained, experts = (
        map(references.as_torch, references.flax_model(2, dtype=dtype)[1]),
        references.flax_model(2, 1, dtype)[1],
    )
    pretrained = next(pretrained)
    experts = [references.as_torch(expert) for expert in experts]
    path, paths = _files(tmp_path, pretrained, experts)
    expert_set = rtx.ExpertSet.from_safetensors(path, paths)
    assert expert_set.names == ("a", "b")
    assert expert_set.layout == "torch"
    assert set(expert_set.leaves) == {name.replace(".", "/") for name in pretrained}
    for name, leaf in pretrained.items():
        name = name.replace(".", "/")
        assert expert_set.leaves[name].shape == leaf.shape
        assert expert_set.leaves[name].dtype == leaf.dtype
        np.testing.assert_array_equal(expert_set.pretrained(name), leaf)
    np.testing.assert_array_equal(
        expert_set.task_vectors("dense/weight"),
        np.stack([np.float32(e["dense.weight"]) for e in experts])
        - np.float32(pretrained["dense.weight"]),
    )
    for name, leaf in experts[1].items():
        np.testing.assert_array_equal(expert_set.expert(name.replace(".", "/"), 1), leaf)


def test_safetensors_problems_are_those_of_trees(tmp_path):
    pretrained, experts = references.flax_model(3)
    _spoil(experts)
    path, paths = _files(tmp_path, pretrained, experts)
    with pytest.raises(ValueError, match="do not fit") as error:
        rtx.ExpertSet.from_safetensors(path, paths, layout="flax")
    assert len(str(error.value).splitlines()) == 1 + len(PROBLEMS)
    experts[0] = {**pretrained, "scale": np.array(np.nan, np.float32)}
    path, paths = _files(tmp_path, pretrained, experts[:1])
    with pytest.raises(ValueError, match="a: scale has 1 values that are NaN or Inf"):
        rtx.ExpertSet.from_safetensors(path, paths, layout="flax")
    path, paths = _files(tmp_path, experts[0], [pretrained])
    told = rf"pretrained \({re.escape(str(path))}\): scale has 1 values that are NaN or Inf"
    with pytest.raises(ValueError, match=told):
        rtx.ExpertSet.from_safetensors(path, paths, layout="flax")


def test_names_of_files_in_folders(tmp_path):
    pretrained, experts = references.flax_model(2)
    paths = [tmp_path / folder / "model.safetensors" for folder in ("x", "y")]
    for path, expert in zip(paths, experts, strict=True):
        path.parent.mkdir()
        save_file(expert, path)
    save_file(pretrained, tmp_path / "p")
    expert_set = rtx.ExpertSet.from_safetensors(tmp_path / "p", paths, layout="flax")
    assert expert_set.names == ("task_0", "task_1")


def test_no_safetensors_expert(tmp_path):
    path, _ = _files(tmp_path, references.flax_model(1)[0], [])
    with pytest.raises(ValueError, match="T = 0"):
        rtx.ExpertSet.from_safetensors(path, [])


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_file(tmp_path, kept):
    pretrained, experts = references.flax_model(1)
    path, paths = _files(tmp_path, pretrained, experts)
    paths[0].write_bytes(paths[0].read_bytes()[:kept])
    with pytest.raises(ValueError, match="not a whole safetensors file") as error:
        rtx.ExpertSet.from_safetensors(path, paths, layout="flax")
    assert str(paths[0]) in str(error.value)


def test_one_path_is_no_sequence_of_experts(tmp_path):
    path, paths = _files(tmp_path, *references.flax_model(1))
    for one in (paths[0], str(paths[0])):
        with pytest.raises(
            ValueError, match=f"experts: got {re.escape(repr(one))}, expected a seq"
        ):
            rtx.ExpertSet.from_safetensors(path, one)
    with pytest.raises(ValueError, match="adapters: got 'adapter', expected a sequence of paths"):
        rtx.ExpertSet.from_lora(path, "adapter")


def test_all_files_that_cannot_be_opened_are_named(tmp_path):
    path, paths = _files(tmp_path, *references.flax_model(3))
    path.unlink()
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:8])
    with pytest.raises(ValueError, match="no such file") as error:
        rtx.ExpertSet.from_safetensors(path, paths)
    named = [str(file) in str(error.value) for file in (path, *paths)]
    assert named == [True, True, True, False]


def test_unreadable_files(tmp_path):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x00\xff" * 500)
    for path, said in (
        (tmp_path / "absent", "no such file"),
        (tmp_path, "holds neither model.safetensors nor"),
        (garbage, "not a whole safetensors file"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            rtx.ExpertSet.from_safetensors(path, [path])
        assert str(path) in str(error.value)


@pytest.mark.parametrize("names", [("a.b", "a/b"), ("a", "a.b")])
def test_leaves_that_have_no_place_in_one_tree(tmp_path, names):
    save_file({name: np.ones((2, 2), np.float32) for name in names}, tmp_path / "p")
    with pytest.raises(ValueError, match="a"):
        rtx.ExpertSet.from_safetensors(tmp_path / "p", [tmp_path / "p"])


def test_read_safetensors(tmp_path):
    pretrained, _ = references.flax_model(1)
    save_file(pretrained, tmp_path / "p")
    whole = references.flat(experts_module.read_safetensors(tmp_path / "p"))
    assert set(whole) == set(pretrained)
    for name, leaf in pretrained.items():
        np.testing.assert_array_equal(whole[name], leaf)
        assert whole[name].dtype == leaf.dtype
    part = references.flat(experts_module.read_safetensors(tmp_path / "p", "^dense/"))
    assert set(part) == {"dense/kernel", "dense/bias"}


def test_safetensors_leaves_are_read_one_by_one(tmp_path, monkeypatch):
    pretrained, experts = references.flax_model(2)
    path, paths = _files(tmp_path, pretrained, experts)
    read = []
    real = experts_module.SafetensorsSource.read
    monkeypatch.setattr(
        experts_module.SafetensorsSource,
        "read",
        lambda self, name: read.append((self.path.name, name)) or real(self, name),
    )
    expert_set = rtx.ExpertSet.from_safetensors(path, paths, layout="flax", check_finite=False)
    assert not read
    expert_set.stacked("dense/kernel")
    assert read == [("a", "dense/kernel"), ("b", "dense/kernel")]
    read.clear()
    save_file({name: experts[0][name] for name in experts[0] if name != "scale"}, paths[0])
    with pytest.raises(ValueError, match="missing leaf scale"):
        rtx.ExpertSet.from_safetensors(path, paths, layout="flax")
    assert not read, "a wrong header must be told before any data is read"


def test_parts_of_files_and_trees(tmp_path, monkeypatch):
    monkeypatch.setattr(experts_module, "PART_SIZES", (16,))
    pretrained, experts = references.flax_model(2)
    path, paths = _files(tmp_path, pretrained, experts)
    files = rtx.ExpertSet.from_safetensors(path, paths, layout="flax")
    trees = rtx.ExpertSet.from_trees(
        references.nested(pretrained), list(map(references.nested, experts))
    )
    for expert_set in (files, trees):
        for name in expert_set.float_leaves:
            parts = expert_set.parts(name)
            size = pretrained[name].size
            assert parts == [slice(i, min(i + 16, size)) for i in range(0, size, 16)]
            for read in (expert_set.stacked, expert_set.task_vectors):
                pieces = [np.array(read(name, part)) for part in parts]
                assert {piece.dtype for piece in pieces} == {np.dtype(np.float32)}
                whole = np.asarray(read(name)).reshape(2, -1)
                np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.parametrize(
    ("num_tasks", "want"),
    [(32, 1 << 18), (33, 1 << 15), (256, 1 << 15), (257, 1 << 12), (4096, 1 << 12)],
)
def test_parts_of_many_experts_need_no_padding(num_tasks, want):
    pretrained = {"a": np.zeros((1 << 18) + 1, np.float32)}
    expert_set = rtx.ExpertSet.from_trees(pretrained, [pretrained] * num_tasks, check_finite=False)
    *parts, last = expert_set.parts("a")
    assert {part.stop - part.start for part in parts} == {want}
    assert last.stop - last.start == 1
    padded = leafwise.padded(np.zeros((1, want), np.float32), parts[0])
    assert padded.shape == (1, want)


def test_what_is_not_in_host_memory_is_read_whole(tmp_path):
    pretrained, experts = references.flax_model(1)
    on_device = {name: jnp.asarray(leaf) for name, leaf in experts[0].items()}
    device = rtx.ExpertSet.from_trees(references.nested(pretrained), [references.nested(on_device)])
    transposed = {**pretrained, "dense/kernel": np.asfortranarray(pretrained["dense/kernel"])}
    strided = rtx.ExpertSet.from_trees(
        references.nested(transposed), [references.nested(pretrained)]
    )
    source = experts_module.TreeSource(references.nested(pretrained))
    own = rtx.ExpertSet.from_sources(source, [_Doubled(source)], layout="flax")
    for expert_set in (device, strided, own):
        assert list(expert_set.parts("dense/kernel")) == [None]
        with pytest.raises(ValueError, match="dense/kernel: can't be read in parts"):
            expert_set.task_vectors("dense/kernel", slice(0, 4))


def _sharded(folder, model):
    """Writes the tensors in turn to two shards, and returns the index."""
    folder.mkdir(exist_ok=True)
    shards = [f"model-{shard + 1:05}-of-00002.safetensors" for shard in (0, 1)]
    weight_map = {key: shards[index % 2] for index, key in enumerate(sorted(model))}
    for shard in shards:
        save_file({k: x for k, x in model.items() if weight_map[k] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_folders_and_shards(tmp_path):
    pretrained, experts = (
        references.as_torch(references.flax_model(2)[0]),
        [references.as_torch(expert) for expert in references.flax_model(2)[1]],
    )
    (tmp_path / "base-v1.5").mkdir()
    save_file(pretrained, tmp_path / "base-v1.5" / "model.safetensors")
    for folder, expert in zip(("x-v1.5", "y-v1.5"), experts, strict=True):
        _sharded(tmp_path / folder, expert)
    expert_set = rtx.ExpertSet.from_safetensors(
        tmp_path / "base-v1.5", [tmp_path / "x-v1.5", tmp_path / "y-v1.5"]
    )
    assert expert_set.names == ("x-v1.5", "y-v1.5")
    assert list(expert_set.leaves) == sorted(name.replace(".", "/") for name in pretrained)
    for key, leaf in pretrained.items():
        name = key.replace(".", "/")
        np.testing.assert_array_equal(expert_set.pretrained(name), leaf)
        for task, expert in enumerate(experts):
            np.testing.assert_array_equal(expert_set.expert(name, task), expert[key])


class _Doubled:
    """A source of its own kind: twice another one's leaves, computed when they are read."""

    def __init__(self, source):
        self.source, self.leaves, self.reads = source, source.leaves, []

    def read(self, name):
        self.reads.append(name)
        return self.source.read(name) * 2


def test_from_sources():
    pretrained = experts_module.TreeSource(references.nested(references.few_leaves(1)[0]))
    expert = _Doubled(pretrained)
    expert_set = rtx.ExpertSet.from_sources(
        pretrained, [expert], layout="flax", exclude=["^buffers/"], check_finite=False
    )
    assert expert_set.names == ("task_0",)
    assert expert.reads == []
    np.testing.assert_array_equal(
        expert_set.task_vectors("dense/kernel")[0], pretrained.read("dense/kernel")
    )
    assert expert.reads == ["dense/kernel"]
    with pytest.raises(ValueError, match="layout: got 'torsch'"):
        rtx.ExpertSet.from_sources(pretrained, [expert], layout="torsch")
    with pytest.raises(ValueError, match="x: missing leaf scale"):
        rtx.ExpertSet.from_sources(
            pretrained, [experts_module.TreeSource({"a": 1.0})], names=["x"], layout="flax"
        )


def test_rebased_puts_a_merged_model_in_the_pretrained_ones_place():
    pretrained, experts = references.flax_model(2)
    merged = references.weight_average(pretrained, experts)
    merged = {name: leaf.astype(pretrained[name].dtype) for name, leaf in merged.items()}
    moved = _from_flat(pretrained, experts).rebased(references.nested(merged))
    for name in moved.float_leaves:
        np.testing.assert_array_equal(moved.pretrained(name), merged[name])
        stack = np.stack([expert[name] for expert in experts])
        np.testing.assert_array_equal(moved.task_vectors(name), stack - merged[name])
    assert references.flat(moved.expert_params(1)).keys() == experts[1].keys()


def test_rebased_takes_what_a_merger_returns():
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        pretrained, experts = references.flax_model(2, dtype=dtype)
        expert_set = _from_flat(pretrained, experts)
        merged = rtx.METHODS["weight_average"].fit(expert_set)
        assert expert_set.rebased(merged).num_tasks == 2


def test_rebased_lists_what_does_not_fit():
    pretrained, experts = references.few_leaves(1)
    names = sorted(pretrained)
    wrong = dict(pretrained)
    wrong["another"] = wrong.pop(names[0])
    wrong[names[1]] = wrong[names[1]][..., None]
    with pytest.raises(ValueError, match="the merged model does not fit") as error:
        _from_flat(pretrained, experts).rebased(references.nested(wrong))
    for part in (f"missing leaf {names[0]}", "extra leaf another", f"{names[1]} has shape"):
        assert part in str(error.value)
    expert_set = rtx.ExpertSet.from_trees({"a": np.ones(2, "f4")}, [{"a": np.ones(2, "f4")}])
    for leaf, match in (
        (np.ones(2, np.float16), "merged: a has dtype float16"),
        (np.array([1, np.nan], np.float32), "merged: a has 1 values"),
    ):
        with pytest.raises(ValueError, match=match):
            expert_set.rebased({"a": leaf})


def _without(num_tasks=2):
    pretrained, experts = references.flax_model(num_tasks)
    for task, expert in enumerate(experts):
        for name, leaf in expert.items():
            if not references.is_float(leaf):
                expert[name] = (leaf + task).astype(leaf.dtype)
    return pretrained, experts, _from_flat(None, experts)


def test_without_a_pretrained_model_the_first_expert_gives_what_is_not_merged():
    pretrained, experts, expert_set = _without()
    assert list(expert_set.leaves) == sorted(pretrained)
    with_it = _from_flat(pretrained, experts)
    found = references.flat(rtx.METHODS["weight_average"].fit(expert_set))
    want = references.flat(rtx.METHODS["weight_average"].fit(with_it))
    buffers = set(pretrained) - set(expert_set.float_leaves)
    assert buffers
    for name in pretrained:
        expected = experts[0][name] if name in buffers else want[name]
        np.testing.assert_array_equal(found[name], expected)


WORK_WITHOUT = {
    "weight_average": {},
    "dts_d": {"base": "weight_average"},
    "svd": {"base": "weight_average", "rank": 2},
    "retex": {"rank": 2},
}
NEED_IT = {
    "task_arithmetic": {},
    "ties": {},
    "dare": {},
    "consensus": {},
    "svd": {"rank": 2},
    "dts_t": {},
    "dts_d": {},
    "emr": {},
    "t_switch": {},
    "tall_mask": {},
    "dawin": {},
    "retex": {"rank": 2, "base": "ties"},
}


@pytest.mark.parametrize("name", WORK_WITHOUT)
def test_methods_that_work_without_a_pretrained_model(name):
    pretrained, experts, expert_set = _without()
    method = rtx.METHODS[name]
    found = method.fit(expert_set, **WORK_WITHOUT[name])
    want = method.fit(_from_flat(pretrained, experts), **WORK_WITHOUT[name])
    for task in range(2):
        ours, theirs = (references.flat(method.recover(state, task)) for state in (found, want))
        for leaf in expert_set.float_leaves:
            np.testing.assert_array_equal(ours[leaf], theirs[leaf], err_msg=leaf)


@pytest.mark.parametrize("name", NEED_IT)
def test_methods_that_need_a_pretrained_model_say_so_and_rebased_serves_them(name):
    _, _, expert_set = _without()
    method = rtx.METHODS[name]
    with pytest.raises(ValueError, match=r"pretrained: got None.*experts\.rebased\(merged\)"):
        method.fit(expert_set, **NEED_IT[name])
    moved = expert_set.rebased(rtx.METHODS["weight_average"].fit(expert_set))
    params = method.recover(method.fit(moved, **NEED_IT[name]), 1)
    assert set(references.flat(params)) == set(expert_set.leaves)


def test_problems_of_experts_without_a_pretrained_model(tmp_path):
    _, experts = references.few_leaves(2)
    name = next(name for name in sorted(experts[0]) if references.is_float(experts[0][name]))
    bad = {**experts[1], name: np.full_like(experts[1][name], np.nan)}
    with pytest.raises(ValueError, match=f"task_1: {name} has .* NaN or Inf"):
        _from_flat(None, [experts[0], bad])
    with pytest.raises(ValueError, match=f"task_1: missing leaf {name}"):
        _from_flat(None, [experts[0], {k: v for k, v in experts[1].items() if k != name}])
    with pytest.raises(ValueError, match="task_0: no leaf is left to merge"):
        _from_flat(None, experts, exclude=[""])
    _, paths = _files(tmp_path, experts[0], experts)
    expert_set = rtx.ExpertSet.from_safetensors(None, paths, layout="flax")
    np.testing.assert_array_equal(expert_set.expert(name, 1), experts[1][name])


def test_only_some_leaves():
    made = _from_flat(*references.few_leaves(2))
    name = made.float_leaves[-1]
    few = made.only([name])
    assert list(few.leaves) == [name]
    np.testing.assert_array_equal(few.stacked(name), made.stacked(name))
    with pytest.raises(ValueError, match=r"leaves: got \['nothing'\]"):
        made.only([name, "nothing"])
