"""The scripts of the papers' tables and figures."""

import csv
import importlib
import inspect
import json
import re
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import tiny

from retex_jax import METHODS, command_line, compare, experiment, offsets, tree

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.glob("retex_*.py")) + sorted(EXPERIMENTS.glob("dts_*.py"))


sys.path.insert(0, str(EXPERIMENTS))  # it is no package

import findings  # noqa: E402
import paper_output  # noqa: E402
import paper_programs  # noqa: E402
import papers  # noqa: E402


def load(path):
    return importlib.import_module(path.stem)


def entries(path, suite):
    module, config = load(path), paper_output.load(suite)
    if hasattr(module, "curves"):
        return [entry for curve in module.curves(config).values() for entry in curve.values()]
    if hasattr(module, "paper_programs"):  # its rows are no fits
        return []
    return list(module.rows(config).values())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("suite", ["minilm_text8", "dinov2_vision8", "vit_b32_8"])
def test_scripts_name_rows_that_can_be_fitted(path, suite):
    for entry in entries(path, suite):
        keywords = inspect.signature(METHODS[entry.method].fit).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in keywords.values())
        assert free or set(entry.options) <= set(keywords), entry.name
    assert f"python experiments/{path.name} --suite=" in path.read_text()


def run(script, call, cache, folder, monkeypatch):
    def config(suite):
        assert suite == "minilm_text8"
        made = tiny.get_config()
        made.search.enabled = False
        return made

    monkeypatch.setattr(paper_output, "load", config)
    out = ["--out", str(folder / "out"), "--workdir", str(folder / "work")]
    with tiny.world(cache):
        call(str(EXPERIMENTS / script), out)
    made = folder / "out/minilm_text8" / Path(script).stem
    with made.with_suffix(".csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file)), made.with_suffix(".svg").read_text()


def test_a_table_and_a_figure(tmp_path_factory, tmp_path, monkeypatch, capsys):
    trained = tiny.trained(tmp_path_factory)
    seeds = ["--seeds", "0"]
    module = load(EXPERIMENTS / "retex_figure_11.py")

    def figure(path, out):
        papers.figure(path, module.curves, "amr", [*out, *seeds])

    found, picture = run("retex_figure_11.py", figure, trained.cache, tmp_path, monkeypatch)
    labels = ["ReTeX", "ReTeX-Alt", "longer side shared"]
    assert [row["row"] for row in found] == [
        "Individual",
        *(name for name in labels for _ in range(3)),
    ]
    assert all(name in picture for name in labels)
    own = found[0]
    for row in found[1:]:
        ratio = sum(float(row[t]) / float(own[t]) for t in tiny.NAMES) / len(tiny.NAMES)
        assert float(row["normalized_accuracy"]) == pytest.approx(ratio, abs=1e-5)
        assert float(row["mean"]) == pytest.approx(
            sum(float(row[t]) for t in tiny.NAMES) / len(tiny.NAMES), abs=1e-5
        )
        assert row["seeds"] == "0"
    sizes = [float(row["amr"]) for row in found[1:4]]
    assert sizes == sorted(sizes)

    def table(path, out):
        papers.table(
            path, lambda _: {"ReTeX": papers.retex(rank=8), "TIES": papers.TIES}, [*out, *seeds]
        )

    def alike(path, out):
        chosen = list(tiny.NAMES[1:])
        papers.table(path, lambda _: {"TIES": papers.TIES}, [*out, *seeds], tasks=lambda _: chosen)

    (own, rest), _ = run("dts_table_14.py", alike, trained.cache, tmp_path, monkeypatch)
    assert [name in rest for name in tiny.NAMES] == [False, True, True]
    capsys.readouterr()
    rows, picture = run("retex_table_1.py", table, trained.cache, tmp_path, monkeypatch)
    assert [row["row"] for row in rows] == ["Individual", "ReTeX", "TIES"]
    assert rows[1] == {**found[3], "row": "ReTeX"}  # what a figure has made is not made again
    assert "TIES" in picture
    assert "kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["retex_table_1", "retex_table_2", "dts_figure_1", "retex_table_9"]
)
def test_what_the_user_can_mend_is_told_as_by_the_programs(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("RETEX_CACHE", str(tmp_path / "cache"))
    given = ["--suite=vit_b32_8", f"--workdir={tmp_path}/rows", f"--out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", [name, *given])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXPERIMENTS / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: experiment 'vit_b32_8' cannot run as it is:")


def test_growth_takes_the_first_tasks(tmp_path_factory, tmp_path, monkeypatch):
    trained = tiny.trained(tmp_path_factory)

    def growth(path, out):
        papers.growth(path, lambda _: {"TIES": papers.TIES}, [*out, "--seeds", "0"])

    found, _ = run("retex_table_2.py", growth, trained.cache, tmp_path, monkeypatch)
    assert [(row["row"], row["num_tasks"]) for row in found] == [
        ("Individual", ""),
        ("TIES", "2"),
        ("TIES", "3"),
    ]
    assert [bool(found[1][task]) for task in tiny.NAMES] == [True, True, False]
    assert float(found[1]["mean"]) == pytest.approx(
        sum(float(found[1][task]) for task in tiny.NAMES[:2]) / 2, abs=1e-5
    )


def test_pairs_give_the_best_and_the_worst_partner(tmp_path_factory, tmp_path, monkeypatch):
    trained = tiny.trained(tmp_path_factory)
    first, *others = tiny.NAMES

    def pairs(path, out):
        papers.pairs(path, lambda _: {"TIES": papers.TIES}, lambda _: first, [*out, "--seeds", "0"])

    run("dts_figure_1.py", pairs, trained.cache, tmp_path, monkeypatch)
    text = (tmp_path / "out/minilm_text8/dts_figure_1.csv").read_text()
    (name, *_), (own, _, accuracy, *_), (label, best, high, worst, low, seeds) = csv.reader(
        text.splitlines()
    )
    assert (name, own, label, seeds) == (first, "Individual", "TIES", "0")
    assert float(accuracy) == pytest.approx(trained.results["individual"][first], abs=1e-5)
    assert {best, worst} <= set(others)
    found = {}
    for other in others:
        folder = tmp_path / f"work/minilm_text8_papers/{first}_{other}"
        (row,) = json.loads((folder / "results.json").read_text())["rows"]
        found[other] = row["accuracy"][first]
    assert float(high) == pytest.approx(max(found.values()), abs=1e-5)
    assert float(low) == pytest.approx(min(found.values()), abs=1e-5)


def test_what_is_identified_is_averaged_over_seeds(tmp_path, monkeypatch, capsys):
    for seed, better in ((0, 0.0), (1, 0.02)):
        folder = tmp_path / f"work/minilm_text8_identify/seed_{seed}"
        folder.mkdir(parents=True)
        sweep = [
            {"identifier": "router", "limit": None, "accuracy": {"32": 0.8 + better, "64": 0.9}},
            {"identifier": "router", "limit": 0.6, "accuracy": {"32": 0.1, "64": 0.1}},
        ]
        measures = dict.fromkeys(load(EXPERIMENTS / "retex_table_7.py").COLUMNS, 0.5)
        unseen = [
            {"identifier": "router", "measure": "entropy", **measures, "f1": f1 + better}
            for f1 in (0.2, 0.4)
        ]
        config = paper_output.load("minilm_text8")
        config.seed = seed
        experts = experiment.checkpoint_set(command_line.as_dict(config))
        results = {"calibration_sizes": sweep, "out_of_distribution": unseen}
        results["checkpoint_set"] = experts
        (folder / "results.json").write_text(json.dumps(results))
    out = ["--out", str(tmp_path / "out"), "--workdir", str(tmp_path / "work"), "--seeds", "0", "1"]
    for name in ("retex_figure_12", "retex_table_7"):
        paper_programs.identified(
            str(EXPERIMENTS / f"{name}.py"), load(EXPERIMENTS / f"{name}.py").rows, out
        )
    folder = tmp_path / "out/minilm_text8"
    assert (folder / "retex_figure_12.csv").read_text() == (
        "row,32,64,seeds\nrouter,0.81,0.9,0 1\n"
    )
    (row,) = csv.DictReader((folder / "retex_table_7.csv").read_text().splitlines())
    assert (row["row"], row["recall"], row["f1"]) == ("router, entropy", "0.5", "0.31")
    assert "entropy" in (folder / "retex_table_7.svg").read_text()

    def identify(config, workdir):
        raise RuntimeError(f"anew in {workdir.name}")

    monkeypatch.setattr(paper_programs, "identify", identify)
    path = tmp_path / "work/minilm_text8_identify/seed_1/results.json"
    known, halves = json.loads(path.read_text()), [{"rows": {"a": 1, "b": 1}}, {"rows": {"a": 1}}]
    others = {"checkpoint_set": "others"}, {"identity": "of other settings"}
    for part in (*others, {"failed": {"a": "no"}}, {"splits": halves}):
        path.write_text(json.dumps({**known, **part}))
        with pytest.raises(SystemExit):
            script = EXPERIMENTS / "retex_table_7.py"
            paper_programs.identified(str(script), load(script).rows, out)
        assert capsys.readouterr().err == "error: anew in seed_1\n"


def test_identifiers_and_what_they_recover():
    found = [
        {"identifier": "router", "limit": limit, "accuracy": 0.9, "forward": forward}
        for limit, forward in ((None, 1.0), (0.6, 0.5))
    ]
    protocols = [
        {"task_known": known, "head_known": head, "normalized_accuracy": ratio}
        for known, head, ratio in ((True, True, 0.99), (False, True, 0.98), (False, False, 0.9))
    ]
    rows = load(EXPERIMENTS / "retex_table_9.py").rows({"identifiers": found, "rows": protocols})
    assert rows["router within the limit"] == {"identified": 0.9, "forward": 0.5}
    assert rows["recovered, backbone routed"] == {"normalized accuracy": 0.98}
    assert len(rows) == 5


def test_scales_are_those_of_the_fit(tmp_path_factory, tmp_path, monkeypatch):
    trained = tiny.trained(tmp_path_factory)
    module = load(EXPERIMENTS / "retex_figure_7.py")

    def learn(config, workdir):
        config.offsets.adam.update({"steps": 64, "warmup_steps": 4, "learning_rate": 1e-2})
        return module.learn(config, workdir)

    def scales(path, out):
        paper_programs.programmed(path, module.rows, "gammas", learn, [*out, "--seeds", "0"])

    found, picture = run("retex_figure_7.py", scales, trained.cache, tmp_path, monkeypatch)
    assert list(found[0]) == ["row", "2", "4", "8", "16", "32", "64", "seeds"]
    path = tmp_path / "work/minilm_text8_gammas/seed_0/results.json"
    gammas = json.loads(path.read_text())["gammas"]
    (row,) = [row for row in found if row["row"] == "attention/query"]
    values = [by_chunk[31] for name, by_chunk in gammas.items() if "attention/query" in name]
    assert float(row["64"]) == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert row["64"] != row["2"]
    assert "attention/query" in picture
    written = path.stat().st_mtime_ns
    run("retex_figure_7.py", scales, trained.cache, tmp_path, monkeypatch)
    assert path.stat().st_mtime_ns == written


def test_costs_of_inputs_of_unknown_tasks(tmp_path_factory, tmp_path, monkeypatch):
    trained = tiny.trained(tmp_path_factory)
    module = load(EXPERIMENTS / "retex_table_4.py")
    monkeypatch.setattr(module, "REPEATS", 1)

    def costs(path, out):
        paper_programs.programmed(
            path, module.rows, "costs", module.measure, [*out, "--seeds", "0"], "seconds"
        )

    found, picture = run("retex_table_4.py", costs, trained.cache, tmp_path, monkeypatch)
    assert [row["row"] for row in found] == [*module.MODES, *module.ROUTED]
    assert all(float(row["seconds"]) > 0 and float(row["passes"]) > 0 for row in found)
    (known,) = {float(row["normalized_accuracy"]) for row in found[:3]}
    (held,) = {float(row["held"]) for row in found[:3]}
    routed = [row for row in trained.results["rows"] if row["head_known"] > row["task_known"]]
    assert known == pytest.approx(routed[0]["normalized_accuracy"], abs=0.05)  # of fewer inputs
    parts = routed[0]["bytes_per_task"] * len(tiny.NAMES)
    assert held == pytest.approx(1 + parts / (routed[0]["bytes_per_task"] / routed[0]["amr"]))
    dawin = found[-1]
    # The pretrained model, all experts, and their heads, which are small.
    assert 0 < float(dawin["held"]) - (1 + len(tiny.NAMES)) < 0.01
    assert "DaWin" in picture


def test_parts_of_generated_offsets(tmp_path_factory, tmp_path, monkeypatch):
    trained = tiny.trained(tmp_path_factory)
    module = load(EXPERIMENTS / "retex_table_5.py")
    found, picture = run(
        "retex_table_5.py",
        lambda path, out: paper_programs.stated(path, module.rows, "numbers", out),
        trained.cache,
        tmp_path,
        monkeypatch,
    )
    assert "mathdefault" not in picture
    state = trained.released.state
    tasks, size = state.num_tasks, tree.param_bytes(state.merged)
    memory = offsets.normalized_memory(state.offsets, size, tasks, tasks)
    total = {part: float(found[-1][part]) for part in module.PARTS}
    assert total["offsets"] == tasks
    assert 1 + total["baked"] + total["shared"] == pytest.approx(memory.baked, rel=1e-5)
    generator = 1 + total["generator"] + total["shared"] + 4 * tasks**2 / size
    assert generator == pytest.approx(memory.generator, rel=1e-5)
    leaves = sum(float(row["leaves"]) for row in found[:-1])
    assert leaves == len(tree.flatten(state.merged))


def test_layers_that_a_router_may_read():
    module = load(EXPERIMENTS / "retex_figure_16.py")
    trials = [
        {"options": {"layer": layer, "shrinkage": shrinkage}, "score": score}
        for layer, shrinkage, score in ((1, 0.1, 0.5), (1, 0.3, 0.6), (2, 0.1, None), (2, 0.3, 0.7))
    ]
    results = {"num_layers": 2, "trials": {"mahalanobis": trials, "router": []}}
    assert module.rows(results) == {"experts' features": {"1": 0.6, "2": 0.7}}


def test_unseen_tasks_are_those_of_the_program(tmp_path, monkeypatch):
    def evaluate_unseen(config, workdir):
        assert workdir == tmp_path / f"work/minilm_text8_unseen/seed_{config.seed}"
        row = {"rule": "ties", "seen_accuracy": 0.9, "unseen_accuracy": 0.5 + 0.1 * config.seed}
        return {"rows": [row]}

    monkeypatch.setattr(paper_programs, "evaluate_unseen", evaluate_unseen)
    script = EXPERIMENTS / "dts_table_4.py"
    out = ["--out", str(tmp_path / "out"), "--workdir", str(tmp_path / "work"), "--seeds", "0", "1"]
    paper_programs.transferred(str(script), load(script).rows, out)
    text = (tmp_path / "out/minilm_text8/dts_table_4.csv").read_text()
    assert text == "row,seen,unseen,seeds\nties,0.9,0.55,0 1\n"


def test_the_index_holds_one_line_a_run(tmp_path, monkeypatch):
    index = tmp_path / "README.md"
    index.write_text((EXPERIMENTS / "README.md").read_text())
    monkeypatch.setattr(paper_output, "INDEX", index)
    command = "python experiments/x.py --suite=vit_b32_30"
    for seeds, seconds in (("", 60), (" --seeds 4", 120)):
        paper_output._list(f"{command}_own", "", "Of another suite.", 60)
        paper_output._list(command, seeds, "Shows it.", seconds)
    lines = [line for line in index.read_text().splitlines() if "vit_b32_30" in line]
    assert lines == [
        f"| `{command} --seeds 4` | 2.0 min | Shows it. |",
        f"| `{command}_own` | 1.0 min | Of another suite. |",
    ]


def test_snapshots_are_compared_once():
    """Their experts have no seeds; what is asked for is kept, and refused by the comparison."""
    assert paper_output.parse("", ["--suite=vit_b32_8"]).seeds == []
    assert paper_output.parse("", ["--suite=demo"]).seeds == [0]
    assert paper_output.parse("", ["--suite=demo", "--seeds", "4"]).seeds == [4]
    row = {"entry": "ties", "accuracy": {"dtd": 0.5}, "commit": "abc", "amr": 0.25}
    results = {"tasks": ["dtd"], "individual": {"dtd": 0.75}}
    [head, own, ties] = papers._lines([("TIES", 0.0, row)], None, results)
    assert (own[0], own[1], ties[0], ties[1]) == ("Individual", "0.75", "TIES", "0.5")
    assert dict(zip(head, ties, strict=True))["seeds"] == ""


@pytest.mark.parametrize("suite", ["minilm_text8", "dinov2_vision8"])
def test_findings_are_of_rows_that_a_script_makes(suite):
    made = {entry.name for path in SCRIPTS for entry in entries(path, suite)}
    changes = findings.changes(suite)
    for change in changes:
        assert {change.changed.name, change.plain.name} <= made, change.what
        assert change.changed.name != change.plain.name
    assert len({change.what for change in changes}) == len(changes)


def test_a_finding_is_a_paired_difference():
    change = findings.Change("twice", papers.retex(rank=2), papers.retex(rank=1))
    found = [
        {
            "seed": seed,
            "tasks": ["a", "b"],
            "individual": {"a": 0.5, "b": 1.0},
            "rows": [
                {"entry": f"retex rank={rank}", "accuracy": dict(zip("ab", scores, strict=True))}
                | {"amr": rank / 100, "commit": f"commit {rank}"}
                for rank, scores in ((1, (0.4, 0.8)), (2, (0.45, more)))
            ],
        }
        for seed, more in ((0, 0.8), (2, 0.9))
    ]
    unpaired = {**found[0], "seed": 1, "rows": found[0]["rows"][:1]}
    bought = findings.difference(change, [found[0], unpaired, found[1]])
    values = [0.1, 0.0, 0.1, 0.1]
    half_width = 3.182446 * statistics.stdev(values) / 2  # t of 3 degrees of freedom
    assert bought["mean"] == pytest.approx(statistics.mean(values))
    assert bought["half_width"] == pytest.approx(half_width, rel=1e-6)
    assert (bought["plain"], bought["changed"], bought["seeds"]) == (0.01, 0.02, [0, 2])
    assert set(bought["commits"]) == {"commit 1", "commit 2"}
    assert findings.difference(change, [unpaired]) is None
    means = {**found[0], "seed": None, "expert_seeds": [0, 1, 2]}
    assert findings.difference(change, [means])["seeds"] == [0, 1, 2]


UNKEPT = ["minilm_text8/retex_figure_6.csv"]  # made before rows were kept


def committed():
    """The CSV files whose rows are part of the repository."""
    for path in sorted(paper_output.RESULTS.glob("*/*.csv")):
        text = (EXPERIMENTS / f"{path.stem}.py").read_text()
        is_kept = str(path.relative_to(paper_output.RESULTS)) not in UNKEPT
        if is_kept and re.search(r"papers\.(table|figure|growth|pairs)\(|\.stated\(", text):
            yield path


@pytest.mark.parametrize("path", list(committed()), ids=lambda path: path.stem)
def test_committed_tables_are_those_of_the_rows(path, tmp_path, monkeypatch):
    def compared(config, workdir, entries):
        repeats = {}
        for seed in config.expert_seeds:
            settings = {**command_line.as_dict(config), "seed": seed, "expert_seeds": ()}
            results = json.loads((workdir / f"seed_{seed}/results.json").read_text())
            assert results["identity"] == compare.identity(settings)
            assert {entry.name for entry in entries} <= {row["entry"] for row in results["rows"]}
            repeats[seed] = results
        return {**compare.over_experts(repeats), "failed": {}}

    monkeypatch.setattr(papers.compare, "compare", compared)
    want = path.read_text()
    row = list(csv.DictReader(want.splitlines()))[1]
    seeds = ["--seeds", *row["seeds"].split()] if "seeds" in row else []
    suite = f"--suite={path.parent.name}"
    script = str(EXPERIMENTS / f"{path.stem}.py")
    monkeypatch.setattr(sys, "argv", [script, suite, *seeds, "--out", str(tmp_path)])
    runpy.run_path(script, run_name="__main__")
    assert (tmp_path / path.parent.name / path.name).read_text() == want
