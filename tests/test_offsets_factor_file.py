import dataclasses

import jax
import numpy as np
import pytest
import references
import safetensors.numpy
from expert_sets import MODEL_IDS, MODELS, expert_set

import retex_jax as rtx
from retex_jax.mergers import LEAFWISE, MERGERS
from retex_jax.offsets import bases, exact, factor_file
from retex_jax.offsets.state import check_fits

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


@pytest.mark.parametrize(("base", "calls"), [("weight_average", None), ("ties", 1)])
def test_the_base_is_merged_some_leaves_at_a_time(base, calls, tmp_path, monkeypatch):
    """Where each leaf is merged by itself; and to the same bits."""
    made, merged = expert_set(*references.few_leaves(2)), []
    want = RETEX.fit(made, rank=4, base=base)
    merge = MERGERS[base]

    def counted(experts, **options):
        merged.append(list(experts.leaves))
        return merge(experts, **options)

    monkeypatch.setitem(MERGERS, base, counted)
    monkeypatch.setattr(bases, "_MERGED_BYTES", 1)
    got = RETEX.fit(made, rank=4, base=base, file=tmp_path / "offsets.safetensors")
    assert_same(got.merged, want.merged)
    assert [name for names in merged for name in names] == list(made.leaves)
    assert len(merged) == (calls or len(made.leaves))


@pytest.mark.parametrize("base", LEAFWISE)
def test_leafwise_mergers_need_no_other_leaf(base):
    made = expert_set(*references.few_leaves(3))
    whole = references.flat(MERGERS[base](made))
    for name, leaf in whole.items():
        (alone,) = references.flat(MERGERS[base](made.only([name]))).values()
        np.testing.assert_array_equal(alone, leaf)


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


def test_the_ranks_of_many_tasks_have_room_in_the_header(tmp_path):
    rng = np.random.default_rng(0)
    models = [{"w/kernel": rng.normal(size=(12, 12)).astype("f4")} for _ in range(2001)]
    path = tmp_path / "offsets.safetensors"
    made = expert_set(models[0], models[1:])
    state = RETEX.fit(made, budget=20000, sharing="separate", file=path)
    assert factor_file.load(path).offsets["w/kernel"].ranks == state.offsets["w/kernel"].ranks


def test_added_tasks_have_room_in_the_header(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"w_{number}/kernel" for number in range(8)]
    models = [{name: rng.normal(size=(8, 8)).astype("f4") for name in names} for _ in range(4)]
    state = RETEX.fit(expert_set(models[0], models[1:]), rank=2)
    for expert in models[1:]:
        expert = references.nested(expert)
        state = rtx.offsets.add_task(state, expert, budget=0.9, bits=4, vector_bits=4)
    factor_file.save(tmp_path / "offsets.safetensors", state)
    assert_same(factor_file.load(tmp_path / "offsets.safetensors").offsets, state.offsets)


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


# Going on from a fit that was killed


def stop_after(leaves):
    def progress(done, total):
        if done >= leaves:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("num_tasks", "options"),
    [
        (1, {"rank": 4, "group_bytes": 1}),
        (2, {"rank": 3, "group_bytes": 1, "bits": 3, "vector_bits": 4, "orientation": "auto"}),
        (2, {"budget": 0.3, "sharing": "auto", "bits": 3, "group_bytes": 1}),
        (2, {"rank": 4, "stack_bytes": 1, "task_weights": "energy"}),
        (8, {"rank": 4}),
    ],
)
def test_a_fit_goes_on_from_its_finished_leaves_to_the_same_file(
    options, num_tasks, tmp_path, monkeypatch
):
    made = expert_set(*references.flax_model(num_tasks))
    whole, path = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    first = RETEX.fit(made, **options, file=whole, resume="x")
    solved = []
    real = exact._fit_group
    monkeypatch.setattr(exact, "_fit_group", lambda *args: solved.append(1) or real(*args))
    for leaves in (2, 1, 3):  # a kill, one before anything more is finished, and another one
        with pytest.raises(KeyboardInterrupt):
            RETEX.fit(made, **options, file=path, resume="x", progress=stop_after(leaves))
    state = RETEX.fit(made, **options, file=path, resume="x")
    assert path.read_bytes() == whole.read_bytes()
    assert_same(state, first)
    assert {each.name for each in tmp_path.iterdir()} == {whole.name, path.name}
    if options == {"rank": 4, "group_bytes": 1}:  # then each leaf is a group, and solved once
        matrices = [name for name in made.float_leaves if len(made.leaves[name].shape) > 1]
        assert len(solved) == len(matrices)


def test_a_finished_fit_is_opened(tmp_path, monkeypatch):
    made = expert_set(*references.flax_model(2))
    path = tmp_path / "offsets.safetensors"
    first = RETEX.fit(made, rank=4, file=path, resume="x")
    with monkeypatch.context() as patch:
        patch.setattr(exact, "fit", None)
        again = RETEX.fit(made, rank=4, file=path, resume="x")
    assert_same(again, first)
    for options in ({"rank": 3, "resume": "x"}, {"rank": 4, "resume": "y"}):
        before = path.read_bytes()
        RETEX.fit(made, **options, file=path)
        assert path.read_bytes() != before


def test_opening_a_finished_fit_leaves_another_unfinished_one(tmp_path):
    made = expert_set(*references.few_leaves(2))
    path, journal = tmp_path / "offsets.safetensors", tmp_path / ".offsets.safetensors.journal"
    RETEX.fit(made, rank=4, file=path, resume="x")
    with pytest.raises(KeyboardInterrupt):
        RETEX.fit(made, rank=3, file=path, resume="x", progress=stop_after(1))
    kept = journal.read_bytes()
    RETEX.fit(made, rank=4, file=path, resume="x")
    assert journal.read_bytes() == kept


def test_a_damaged_finished_fit_is_solved_again_and_named(tmp_path, caplog):
    made = expert_set(*references.flax_model(2))
    path = tmp_path / "offsets.safetensors"
    RETEX.fit(made, rank=4, file=path, resume="x")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    RETEX.fit(made, rank=4, file=path, resume="x")
    assert path.read_bytes() == whole
    assert str(path) in caplog.text and "solved again" in caplog.text


@pytest.mark.parametrize(
    "name", [".offsets.safetensors.journal", ".offsets.safetensors.unfinished"]
)
@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_what_is_damaged_in_an_unfinished_fit_is_solved_again(name, place, tmp_path):
    made = expert_set(*references.flax_model(2))
    whole, path = tmp_path / "whole.safetensors", tmp_path / "offsets.safetensors"
    RETEX.fit(made, rank=4, group_bytes=1, file=whole, resume="x")
    with pytest.raises(KeyboardInterrupt):
        RETEX.fit(made, rank=4, group_bytes=1, file=path, resume="x", progress=stop_after(3))
    data = bytearray((tmp_path / name).read_bytes())
    data[int(place * len(data))] ^= 4
    (tmp_path / name).write_bytes(data)
    RETEX.fit(made, rank=4, group_bytes=1, file=path, resume="x")
    assert path.read_bytes() == whole.read_bytes()


def test_an_unfinished_fit_of_other_experts_or_options_is_not_taken(tmp_path):
    pretrained, experts = references.flax_model(2)
    made = expert_set(pretrained, experts)
    path, other = tmp_path / "offsets.safetensors", tmp_path / "other.safetensors"
    with pytest.raises(KeyboardInterrupt):
        RETEX.fit(made, rank=4, file=path, resume="x", progress=stop_after(1))
    RETEX.fit(made, rank=3, file=other, resume="x")
    RETEX.fit(made, rank=3, file=path, resume="x")
    assert path.read_bytes() == other.read_bytes()
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        RETEX.fit(made, rank=4, file=path, resume="x", progress=stop_after(1))
    moved = [
        {name: leaf + 1 if leaf.dtype.kind == "f" else leaf for name, leaf in expert.items()}
        for expert in experts
    ]
    with pytest.raises(ValueError, match=r"same identity whose merged/.* differs"):
        RETEX.fit(expert_set(pretrained, moved), rank=4, file=path, resume="x")


def test_two_fits_of_one_file_do_not_mix(tmp_path):
    made = expert_set(*references.flax_model(2))
    path = tmp_path / "offsets.safetensors"

    def meet(done, total):
        with pytest.raises(RuntimeError, match="in use by another fit"):
            RETEX.fit(made, rank=4, file=path, resume="x")

    RETEX.fit(made, rank=4, file=path, resume="x", progress=meet)
    factor_file.load(path)


def test_resume_needs_a_file():
    with pytest.raises(ValueError, match="resume: got 'x' without a file"):
        RETEX.fit(expert_set(*references.few_leaves(2)), rank=2, resume="x")


# Damage


def test_each_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "offsets.safetensors"
    RETEX.fit(expert_set(*references.few_leaves(2)), rank=1, bits=3, file=path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    text = 8 + len(data[8:header].rstrip())
    for position in (*range(0, text, 37), *range(header, len(data), 5)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 2]) + data[position + 1 :])
        with pytest.raises(ValueError, match=path.name):
            factor_file.load(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    factor_file.load(path, verify=False)
    path.write_bytes(data)
    factor_file.load(path)


def test_spectra_are_part_of_the_file(tmp_path):
    path = tmp_path / "offsets.safetensors"
    state = RETEX.fit(expert_set(*references.few_leaves(2)), rank=2, file=path)
    loaded = factor_file.load(path)
    assert loaded.report.spectra.keys() == state.report.spectra.keys() != set()
    for name, spectrum in state.report.spectra.items():
        assert loaded.report.spectra[name].dtype == spectrum.dtype
        np.testing.assert_array_equal(loaded.report.spectra[name], spectrum)


def test_offsets_that_do_not_fit_are_listed(tmp_path):
    path = tmp_path / "offsets.safetensors"
    state = RETEX.fit(expert_set(*references.few_leaves(2)), rank=2, file=path)
    check_fits(state, "here")
    form = state.offsets["dense/kernel"]
    wrong = {
        "shared": dataclasses.replace(form, shared=form.shared[:, 1:]),
        "rank": dataclasses.replace(form, shared=form.shared[1:]),
        "orientation": dataclasses.replace(form, orientation="left"),
        "tasks": dataclasses.replace(form, generator=form.generator[:1]),
    }
    for changed in wrong.values():
        offsets = {**state.offsets, "dense/kernel": changed}
        with pytest.raises(ValueError, match=r"here: offsets do not fit.*\n  dense/kernel: "):
            check_fits(dataclasses.replace(state, offsets=offsets), "here")
    with pytest.raises(ValueError, match=r"\n  none: KeyError"):
        check_fits(dataclasses.replace(state, offsets={"none": form}), "here")
