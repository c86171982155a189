"""The report page: content, choice of rows, escaping, self-containedness, atomic writing."""

import math
import os
from html.parser import HTMLParser

import numpy as np
import pytest

from retex_jax import report

TASKS = ["optdigits", "mnist_5k", "animals", "solar_defect"]
TASKS += ["indian_pines", "cyrillic", "greek", "fashion_mnist"]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects tables, texts and attributes, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.tags, self.urls, self.policy = [], [], [], [], ""
        self.text, self.script, self.scripts = "", "", 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.urls += [v for k, v in attrs.items() if k in ("src", "href", "xlink:href", "action")]
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
            return
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def _results(tasks=TASKS):
    individual = {task: 0.9 - 0.01 * i for i, task in enumerate(tasks)}
    rows = []

    def row(method, variant, known, head, scale, stored, identified=None):
        rows.append(
            {
                "method": method,
                "variant": variant,
                "task_known": known,
                "head_known": head,
                "needs": "none" if known or not stored else "calibration inputs",
                "accuracy": {task: scale * x for task, x in individual.items()},
                "normalized_accuracy": scale,
                "worst_normalized_accuracy": 0.96 * scale,
                "adr": 1 - scale,
                "amr": stored / 86e6,
                "bytes_per_task": stored,
                "identification_accuracy": identified,
                "seconds_fit": 3.25,
                "peak_rss_bytes": 1_300_000_000,
            }
        )

    row("ties", "density=0.2", False, True, 0.65, 0)
    row("weight_average", "", False, True, 0.637, 0)
    row("retex", "adam r=64", True, True, 0.9995, 5_200_000)
    row("retex", "exact r=64", True, True, 0.9987, 5_200_000)
    row("retex", "exact r=64", False, True, 0.994, 5_250_000, 0.983)
    row("retex", "exact r=64", False, False, 0.981, 5_250_000, 0.983)
    return {
        "schema": 1,
        "commit": "0123abc",
        "checkpoint_set": "dinov2_s14/demo",
        "seed": 0,
        "device": "cpu",
        "tasks": list(tasks),
        "individual": individual,
        "linear_probe": {task: 0.7 * x for task, x in individual.items()},
        "rows": rows,
        "offsets": {"solver": "exact", "rank": 64, "ratio": 1.00001, "seconds": 3.2},
    }


def _write(tmp_path, results, **kwargs):
    path = report.write(tmp_path / "report.html", results, **kwargs)
    return path.read_text(encoding="utf-8")


def _full(tmp_path, results, tasks=TASKS):
    return _write(
        tmp_path,
        results,
        spectra={"attention/query": np.arange(9, 0, -1.0), "mlp/fc1": np.ones(5)},
        confusion=[("Identified at layer 5", np.eye(len(tasks)) * 7)],
        seconds={"fit offsets": 3.2, "evaluate": 100.0},
        config_text="rank: 64\nnote: a < b & c",
    )


def test_further_sections(tmp_path):
    rows = [["<a>", 0.12345, 7], ["b", None, math.nan]]
    figure = ("Shape", "what it shows", "<svg><title>s</title></svg>")
    section = report.Section("More & more", "text < here", ["x", "y", "z"], rows, [figure])
    plain = Page(_write(tmp_path, _results()))
    page = Page(_write(tmp_path, _results(), sections=[section, section._replace(figures=())]))
    (added, again) = (table for table in page.tables if table[0] == ["x", "y", "z"])
    assert (
        added
        == again
        == [["x", "y", "z"], ["<a>", "0.123", "7"], ["b", "\N{EN DASH}", "\N{EN DASH}"]]
    )
    assert len(page.tables) == len(plain.tables) + 2
    assert page.text.count("More & more") == page.text.count("text < here") == 2
    assert page.text.count("what it shows") == 1
    assert page.tags.count("svg") == plain.tags.count("svg") + 1


def test_headline_and_tables(tmp_path):
    page = Page(_full(tmp_path, _results()))
    main, methods, every = page.tables
    assert main[0] == [
        "Task",
        "Individual",
        "Linear probe",
        "Merged: weight_average",
        "Merged: ties density=0.2",
        "Recovered: task known",
        "Recovered: backbone routed, own head",
        "Recovered: nothing known",
    ]
    expected = ["optdigits", "90.0", "63.0", "57.3", "58.5", "89.9", "89.5", "88.3"]
    assert main[1] == expected
    assert [line[0] for line in main[1:]] == [*TASKS, "Mean"]
    assert main[-1][1] == "86.5"
    assert methods[0][:4] == ["Method", "Known", "Needs", "Normalized accuracy"]
    assert methods[5] == (
        [
            "retex exact r=64",
            "backbone routed, own head",
            "calibration inputs",
            "99.40%",
            "95.42%",
            "0.60%",
            "5.25 MB",
            "6.10%",
            "98.3%",
            "3.25 s",
            "1.3 GB",
        ]
    )
    assert methods[2][:3] == ["weight_average", "own head", "none"]
    assert len(every[0]) == 3 + 6
    for text in ("63.7%", "99.9%", "98.1%", "98.3%", "5.2 MB", "1.0000", "dinov2_s14/demo"):
        assert text in page.text, text
    assert "Recovered is retex exact r=64." in page.text
    assert "note: a < b & c" in page.text


def test_figures_each_with_a_sentence(tmp_path):
    text = _full(tmp_path, _results())
    page = Page(text)
    assert page.tags.count("svg") == page.tags.count("figure") == 5
    assert "1 min 43 s in all" in page.text
    assert "right of rank 64" in page.text
    assert "Identified at layer 5" in page.text
    for part in text.split("<figure>")[1:]:
        caption = part.split("</figcaption>")[0]
        assert caption.count("<p>") == 1 and caption.endswith(".</p>")


def test_page_needs_nothing_from_outside(tmp_path):
    text = _full(tmp_path, _results())
    page = Page(text)
    assert all(url.startswith("#") for url in page.urls)
    assert page.policy.startswith("default-src 'none'")
    assert not {"link", "img", "iframe", "object", "image"} & set(page.tags)
    assert page.tags.count("script") == 1 and "fetch" not in page.script
    for word in ("@import", "url(http", "data:", "file:", "metadata"):
        assert word not in text
    assert 'name="viewport"' in text and '<meta charset="utf-8">' in text
    assert len(text) < 400_000


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&$"
    results = _results([evil, "b"])
    for key in ("commit", "checkpoint_set", "seed", "device"):
        results[key] = evil
    results["offsets"]["solver"] = evil
    for row in results["rows"]:
        row |= {"variant": evil, "needs": evil}
    text = _write(
        tmp_path,
        results,
        spectra={evil: np.ones(2)},
        confusion=[(evil, np.eye(2))],
        seconds={evil: 1.0},
        config_text=evil,
    )
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert page.tables[0][1][0] == evil
    assert page.tables[1][1][0] == f"ties {evil}"


def test_tint_marks_what_lost(tmp_path):
    results = _results(["a", "b", "c"])
    results["rows"] = results["rows"][:1]
    ratios = {"a": 0.96, "b": 0.94, "c": 0.79}
    individual = results["individual"]
    results["rows"][0]["accuracy"] = {t: r * individual[t] for t, r in ratios.items()}
    results["linear_probe"] = None
    text = _write(tmp_path, results)
    table = text.split("<tbody>")[1].split("</tbody>")[0]
    for line, kind in zip(table.strip().split("\n"), ("", "low", "lower"), strict=True):
        assert line.split("<td class=")[2].startswith(f'"{kind}"')


@pytest.mark.parametrize("drop", ["rows", "extras", "values"])
def test_incomplete_results_still_make_a_page(tmp_path, drop):
    results = _results()
    if drop == "rows":
        results["rows"] = []
    elif drop == "extras":
        for key in ("linear_probe", "offsets", "commit", "checkpoint_set", "seed", "device"):
            del results[key]
        results["rows"] = [{"method": "ties", "accuracy": {"greek": 0.5}}]
    else:
        results["offsets"] = None
        for row in results["rows"]:
            row |= {"normalized_accuracy": math.nan, "amr": None, "seconds_fit": None}
            row["accuracy"] = {}
    page = Page(_write(tmp_path, results))
    assert "Accuracy per task" in page.text
    assert "None" not in page.text and "nan" not in page.text.lower()
    if drop == "extras":
        cells = {line[0]: line[2] for line in page.tables[0][1:]}
        assert cells["greek"] == "50.0" and cells["animals"] == cells["Mean"] == "\N{EN DASH}"


def test_rows_of_one_name_keep_their_columns(tmp_path):
    results = _results()
    results["rows"] = [*results["rows"], results["rows"][1], results["rows"][1]]
    heads = Page(_write(tmp_path, results)).tables[0][0]
    assert [h for h in heads if "weight_average" in h] == [
        "Merged: weight_average",
        "Merged: weight_average #2",
        "Merged: weight_average #3",
    ]


def test_rows_of_several_seeds_show_their_spread(tmp_path):
    results = _results()
    assert "\u00b1" not in _write(tmp_path, results)
    results["rows"][0] |= {"normalized_accuracy_std": 0.0123, "seeds": [0, 1, 2]}
    results["rows"][1] |= {"normalized_accuracy_std": None, "seeds": [0]}
    page = Page(_write(tmp_path, results))
    assert page.tables[1][1][3] == "65.00% \u00b1 1.23"
    assert page.tables[1][2][3] == "63.70%"
    assert "mean \u00b1 standard deviation of 3 seeds" in page.text


def test_of_many_merged_models_the_main_table_has_two(tmp_path):
    results = _results()
    results["rows"] += [
        {**results["rows"][0], "variant": f"density=0.{i}", "normalized_accuracy": 0.5 + 0.05 * i}
        for i in range(3, 9)
    ]
    page = Page(_write(tmp_path, results))
    merged = [head for head in page.tables[0][0] if head.startswith("Merged")]
    assert merged == ["Merged: weight_average", "Merged: ties density=0.8"]
    assert len(page.tables[2][0]) == 3 + 12


def test_other_personalised_methods_take_the_first_place_without_retex(tmp_path):
    results = _results()
    for row in results["rows"]:
        if row["method"] == "retex":
            row["method"] = "svd"
    assert "Recovered is svd exact r=64." in Page(_write(tmp_path, results)).text


def test_bad_results_write_nothing_and_name_every_problem(tmp_path):
    results = {"schema": 2, "individual": {}, "rows": [{"variant": "x"}]}
    with pytest.raises(ValueError) as error:
        _write(tmp_path, results)
    for part in ("schema = 2", "'tasks'", "rows[0]: 'method'", "rows[0]: 'accuracy'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="matrix"):
        _write(tmp_path, _results(), confusion=[("x", np.eye(3))])
    assert os.listdir(tmp_path) == []


def test_write_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert report.write(path, _results()) == path
    before = path.read_bytes()

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    results = _results()
    results["commit"] = "another"
    with pytest.raises(OSError, match="disk full"):
        report.write(path, results)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["report.html"]
