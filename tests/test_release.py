import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from retex_jax import artifact, evaluate, offsets, recovery, release, tree
from retex_jax.identifier import IDENTIFIERS, subspace
from retex_jax.offsets.coding import code
from retex_jax.offsets.forms import Elementwise, Product, Separate
from retex_jax.offsets.serialization import to_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny.trained(tmp_path_factory)


def leaves_of(released):
    state, identifier = released.state, released.identifier
    return {
        **{f"merged/{name}": leaf for name, leaf in tree.flatten(state.merged).items()},
        **{f"offsets/{name}": leaf for name, leaf in to_tensors(state.offsets)[0].items()},
        **{f"head/{name}": leaf for name, leaf in tree.flatten(released.heads).items()},
        "embeddings": state.task_embeddings,
        "centers": identifier.state.centers,
        "bases": identifier.state.bases,
    }


def small(embeddings=3):
    """A release of a model of three leaves and three tasks, its numbers drawn."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype("f4")

    state = offsets.OffsetState(
        merged={"a": {"kernel": draw(6, 5), "bias": draw(5)}, "b": {"kernel": draw(5, 4)}},
        task_embeddings=draw(3, embeddings),
        offsets={
            "a/bias": Elementwise(code(draw(embeddings, 5), 8, -1), draw()),
            "a/kernel": Product(draw(embeddings, 5, 2), draw(2, 6)),
            # Products that are one task's each know no other embedding than the tasks' own.
            "b/kernel": Separate(code(draw(3, 4), 3, -1), code(draw(3, 5), 4, -1), (2, 0, 1))
            if embeddings == 3
            else Product(draw(embeddings, 4, 2), draw(2, 5)),
        },
        report=offsets.FitReport(
            {"a/bias": 0.0, "a/kernel": 2.5, "b/kernel": 1 / 3},
            {"a/bias": 0.0, "a/kernel": 2.0, "b/kernel": 0.25},
            {"a/bias": 1.0, "a/kernel": 9.0, "b/kernel": 8.0},
            {"a/kernel": np.ones(4), "b/kernel": np.ones(4)},
        ),
        layout="flax",
    )
    signatures = subspace.fit([rng.normal(size=(9, 5)) for _ in range(3)], 2, normalize=True)
    heads = {name: {"kernel": draw(5, n), "bias": draw(n)} for n, name in enumerate("zam", start=2)}
    metadata = {"settings": {"seed": 1}, "individual": {"z": 0.5}, "commit": "abc"}
    return release.Release(state, recovery.Identifier(signatures, 1), heads, metadata)


@pytest.mark.parametrize("embeddings", [3, 2], ids=["baked", "generator"])
def test_saved_release_is_loaded_bit_by_bit(tmp_path, embeddings):
    saved = small(embeddings)
    size = release.save(tmp_path, saved)
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    loaded = release.load(tmp_path)
    before, after = leaves_of(saved), leaves_of(loaded)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert after[name].dtype == leaf.dtype
        assert after[name].shape == leaf.shape, name
        np.testing.assert_array_equal(after[name], leaf)
    assert list(loaded.heads) == ["z", "a", "m"]
    assert loaded.identifier.layer == 1
    assert loaded.identifier.state.normalize is True
    assert loaded.state.layout == saved.state.layout
    assert loaded.metadata["commit"] == "abc"
    report, kept = saved.state.report, loaded.state.report
    assert kept.residual == report.residual
    assert kept.ratio == report.ratio
    assert (kept.residuals, kept.optima) == (report.residuals, report.optima)
    for task in range(3):
        want, found = (offsets.recover(one.state, task) for one in (saved, loaded))
        jax.tree.map(np.testing.assert_array_equal, want, found)
    features = np.random.default_rng(5).normal(size=(4, 5)).astype("f4")
    np.testing.assert_array_equal(
        subspace.scores(saved.identifier.state, features),
        subspace.scores(loaded.identifier.state, features),
    )


def test_signature_options_are_kept(tmp_path):
    saved = small()
    signatures = dataclasses.replace(saved.identifier.state, normalize=False)
    identifier = recovery.Identifier(signatures, 0)
    release.save(tmp_path, dataclasses.replace(saved, identifier=identifier))
    loaded = release.load(tmp_path).identifier
    assert (loaded.layer, loaded.state.normalize) == (0, False)


@pytest.mark.parametrize("kind", IDENTIFIERS)
@pytest.mark.parametrize("layer", [2, (1, 2)])
def test_any_identifier_is_released(tmp_path, kind, layer):
    rng = np.random.default_rng(0)
    shape = (9, 5) if isinstance(layer, int) else (9, 2, 5)
    features = [rng.normal(size=shape).astype("f4") for _ in range(3)]
    options = {"rank": 2} if kind == "subspace" else {"epochs": 1} if kind == "router" else {}
    method, saved = IDENTIFIERS[kind], small()
    identifier = recovery.Identifier(method.fit(features, **options), layer, kind)
    state = dataclasses.replace(saved.state, task_embeddings=jnp.eye(3))
    release.save(tmp_path, dataclasses.replace(saved, state=state, identifier=identifier))
    loaded = release.load(tmp_path)
    assert (loaded.identifier.kind, loaded.identifier.layer) == (kind, layer)
    leaves = (jax.tree.leaves(one.state) for one in (identifier, loaded.identifier))
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)
    fewer = release.remove_task(loaded, "a").identifier
    assert fewer.state.num_tasks == 2
    want = jax.tree.leaves(method.take(identifier.state, [0, 2]))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(fewer.state), want)


def test_releases_of_before_there_were_kinds_are_read(tmp_path):
    saved = small()
    release.save(tmp_path, saved)
    tensors, metadata = artifact.load(tmp_path)
    metadata["identifier"] = {"layer": 1, "normalize": True}
    artifact.save(tmp_path / "old", tensors, metadata)
    loaded = release.load(tmp_path / "old").identifier
    assert (loaded.kind, loaded.layer) == ("subspace", 1)
    assert loaded.state.normalize is True
    for name in ("centers", "bases"):
        np.testing.assert_array_equal(
            getattr(loaded.state, name), getattr(saved.identifier.state, name)
        )


def test_unknown_optimum_is_kept_unknown(tmp_path):
    saved = small()
    optima = {**saved.state.report.optima, "b/kernel": float("nan")}
    report = dataclasses.replace(saved.state.report, optima=optima)
    state = dataclasses.replace(saved.state, report=report)
    release.save(tmp_path, dataclasses.replace(saved, state=state))
    json.loads((tmp_path / "manifest.json").read_text(), parse_constant=pytest.fail)
    loaded = release.load(tmp_path).state.report
    assert np.isnan(loaded.optima["b/kernel"])
    assert np.isnan(loaded.ratio)  # unknown too, not infinite
    assert loaded.optima["a/kernel"] == optima["a/kernel"]


def test_a_task_is_added_and_removed_without_the_other_experts(run, tmp_path):
    loaded = release.load(run.workdir)
    names = list(loaded.heads)
    expert = offsets.recover(loaded.state, 0)
    expert = jax.tree.map(lambda x: x + 0.01 if x.dtype == jnp.float32 else x, expert)
    width = loaded.identifier.state.centers.shape[1]
    features = np.random.default_rng(0).normal(size=(64, width)).astype("f4")
    head = loaded.heads[names[0]]
    with pytest.raises(ValueError, match=f"name: '{names[0]}' is a task of the release"):
        release.add_task(loaded, names[0], expert, head, features, budget=0.9)
    added = release.add_task(loaded, "new", expert, head, features, budget=2.0**40, bits=8)
    release.save(tmp_path / "added", added)
    again = release.load(tmp_path / "added")
    assert list(again.heads) == [*names, "new"]
    for name, leaf in tree.flatten(offsets.recover(again.state, len(names))).items():
        np.testing.assert_allclose(leaf, tree.flatten(expert)[name], atol=2e-3, err_msg=name)
    with pytest.raises(ValueError, match=r"name: got 'nwe', expected one of .*did you mean 'new'"):
        release.remove_task(again, "nwe")
    release.save(tmp_path / "removed", release.remove_task(again, "new"))
    before, after = (
        artifact.load(folder).tensors for folder in (run.workdir, tmp_path / "removed")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    fewer = release.remove_task(loaded, names[1])
    assert list(fewer.heads) == [names[0], *names[2:]]
    np.testing.assert_array_equal(
        fewer.identifier.state.centers, np.delete(loaded.identifier.state.centers, 1, 0)
    )


def test_artifact_that_is_no_release_is_refused(tmp_path):
    artifact.save(tmp_path, {"x": np.zeros(2)}, {"tasks": [], "layout": "flax"})
    with pytest.raises(
        ValueError, match=r"lacks \['forms', 'identifier', 'report'\]: not a release"
    ):
        release.load(tmp_path)


def test_release_with_a_missing_part_is_refused(tmp_path):
    release.save(tmp_path, small())
    tensors, metadata = artifact.load(tmp_path)
    kept = {name: x for name, x in tensors.items() if not name.startswith("offsets/")}
    artifact.save(tmp_path, kept, metadata)
    with pytest.raises(ValueError, match="offsets"):
        release.load(tmp_path)


def test_missing_release(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json and artifact\.safetensors"):
        release.load(tmp_path)


def test_changed_tensor_is_named(run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(run.workdir, folder)
    path = folder / "artifact.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tensor 'task_embeddings'|tensor 'offsets"):
        release.load(folder)


def test_loaded_run_predicts_bit_by_bit_what_was_evaluated(run):
    """The rows in results.json are of the release in memory; the file gives the same."""
    released, facts = run.released, run.released.metadata
    rows, confusion = evaluate.unknown_rows(
        tiny.suite(run), facts["variant"], released.state, released.identifier, facts["seconds_fit"]
    )
    for row, want in zip(rows, run.results["rows"][-2:], strict=True):
        assert {**row, "peak_rss_bytes": 0} == {**want, "peak_rss_bytes": 0}
    assert confusion.sum() == 240


def test_metadata_says_what_it_is(run):
    metadata = run.released.metadata
    assert metadata["settings"] == run.settings
    assert metadata["individual"] == run.results["individual"]
    assert metadata["checkpoint_set"] == run.results["checkpoint_set"]
    assert metadata["commit"] == run.results["commit"]
    assert metadata["tasks"] == list(tiny.NAMES)


def test_loaded_leaves_are_on_the_device(run):
    assert all(isinstance(leaf, jnp.ndarray) for leaf in leaves_of(run.released).values())
