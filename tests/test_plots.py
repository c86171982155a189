"""Figures: well-formed, self-contained, right values in the right places, clear errors."""

import builtins
import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from retex_jax import plots
from retex_jax.plots import accuracy, canvas

TASKS = ["optdigits", "mnist_5k", "animals", "solar_defect", "cyrillic", "fourteen_lett"]
SVG = "{http://www.w3.org/2000/svg}"


def _series():
    return {
        "Individual": dict.fromkeys(TASKS, 0.9),
        "Merged": {task: 0.1 * i for i, task in enumerate(TASKS)},
        "Recovered": dict.fromkeys(TASKS, 0.85),
    }


def _rows():
    rows = [
        {"method": m, "variant": "", "task_known": False, "head_known": True}
        | {"bytes_per_task": 0, "normalized_accuracy": a}
        for m, a in (("weight_average", 0.64), ("task_arithmetic", 0.65), ("ties", 0.655))
    ]
    for rank, score in ((4, 0.94), (8, 0.969), (16, 0.981), (32, 0.991), (64, 0.999)):
        for known, head in ((True, True), (False, True), (False, False)):
            row = {"method": "retex", "variant": f"exact r={rank}", "task_known": known}
            row |= {"head_known": head, "bytes_per_task": 80_000 * rank}
            rows.append(row | {"normalized_accuracy": score - 0.002 * (not known)})
    return rows


def _front_rows():
    rows = [
        {"method": method, "variant": variant.format(size), "task_known": True, "head_known": True}
        | {"amr": size / 100, "normalized_accuracy": score + size / 100}
        | {"normalized_accuracy_interval": width}
        for method, variant, score, width in (
            ("retex", "budget={}, bits=3", 0.9, 0.01),
            ("retex", "rank={}", 0.85, None),
            ("dts_t", "amr={}", 0.8, 0.02),
        )
        for size in (4, 0.25, 1)
    ]
    few = {"method": "emr", "variant": "", "task_known": True, "head_known": True}
    return [*rows, few | {"amr": 0.15, "normalized_accuracy": 0.99}]


def _all():
    return {
        "bars": plots.accuracy_bars(TASKS, _series(), references=("Individual",)),
        "spectra": plots.spectra({"query": np.arange(8, 0, -1.0)}, rank=4),
        "confusion": plots.confusion(np.eye(6) * 9, TASKS),
        "bytes": plots.bytes_accuracy(_rows()),
        "fronts": plots.fronts(_front_rows()),
        "times": plots.times({"merge": 0.5, "fit": 61.0}),
        "histogram": plots.histogram(np.arange(9.0), np.arange(5.0, 12), threshold=8.0, title="h"),
    }


def _texts(svg):
    return ["".join(e.itertext()).strip() for e in ET.fromstring(svg).iter(f"{SVG}text")]


def _widths(svg, color):
    """Widths of the horizontal bars of one colour, in drawing order."""
    found = []
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        if f"fill: {color.lower()}" in path.get("style", ""):
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", path.get("d"))]
            found.append(max(xs) - min(xs))
    return found


def test_every_figure_is_one_self_contained_element():
    for name, svg in _all().items():
        root = ET.fromstring(svg)
        assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("aria-label")
        assert float(root.get("viewBox").split()[2]) == 360, name
        outside = set(re.findall(r"https?://[^\"' ]+", svg))
        assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, name
        assert "data:" not in svg and "<image" not in svg and "<script" not in svg
        ids = set(re.findall(r' id="([^"]+)"', svg))
        assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", svg)) == ids, name


def test_figures_are_reproducible_and_share_no_ids():
    first, second = _all(), _all()
    assert first == second
    ids = [i for svg in first.values() for i in re.findall(r' id="([^"]+)"', svg)]
    assert ids and len(ids) == len(set(ids))


def test_global_matplotlib_settings_are_untouched():
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams.items())
    plots.times({"merge": 1.0})
    assert dict(matplotlib.rcParams.items()) == before


def test_accuracy_bars_have_lengths_in_proportion():
    svg = plots.accuracy_bars(TASKS, _series(), references=("Individual",))
    merged, recovered = _widths(svg, canvas.BARS[0]), _widths(svg, canvas.BARS[1])
    # The last of each is the sample in the legend.
    assert len(recovered) == len(TASKS) + 1
    unit = recovered[0] / 0.85
    drawn = [w / unit for w in merged[:-1]]
    np.testing.assert_allclose(drawn[-5:], [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-4)
    assert set(TASKS) | {"Individual", "Merged", "Recovered"} <= set(_texts(svg))


def test_accuracy_bars_leave_missing_values_out():
    series = {"A": {"x": 0.5, "y": None, "z": math.nan}, "B": {}}
    assert len(_widths(plots.accuracy_bars("xyz", series), canvas.BARS[0])) == 1 + 1


def test_accuracy_bars_reach_below_zero_for_a_correlation():
    """The axis then begins below zero, and the bars keep their proportions."""
    series = {"A": {"x": -0.3, "y": 0.6}}
    negative, positive, _ = _widths(plots.accuracy_bars("xy", series), canvas.BARS[0])
    assert positive / negative == pytest.approx(2, rel=1e-3)


def test_accuracy_bars_name_every_problem():
    with pytest.raises(ValueError) as error:
        plots.accuracy_bars(["x"], {"A": {"x": 1.2}, "B": {"x": -1.1}}, references=["C"])
    for part in ("1.2", "-1.1", "'C'"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="must not be empty"):
        plots.accuracy_bars([], {})


def test_text_is_escaped_and_no_mathematics():
    svg = plots.accuracy_bars(["<b>&", "$x_1$"], {"$\\frac": {"<b>&": 0.5, "$x_1$": 0.5}})
    assert {"<b>&", "$x_1$", "$\\frac"} <= set(_texts(svg))
    assert "<b>" not in svg
    assert "&quot;" in plots.times({"a": 1.0}, title='say "a"')


def test_spectra_normalise_squares_and_mark_rank():
    svg = plots.spectra({"one": np.array([4.0, 3.0])}, rank=2)
    assert {"rank 2", "one", "100%"} <= set(_texts(svg))
    style = f"stroke: {canvas.PALETTE[0].lower()}"
    curve = next(
        p.get("d")
        for p in ET.fromstring(svg).iter(f"{SVG}path")
        if style in p.get("style", "") and p.get("clip-path")
    )
    (_, y1), (_, y2) = [
        tuple(map(float, xy)) for xy in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", curve)
    ]
    # The ticks of the y axis give the scale: points of height a decade.
    ticks = {}
    for group in ET.fromstring(svg).iter(f"{SVG}text"):
        label = "".join(group.itertext()).strip()
        if label.endswith("%"):
            ticks[float(label[:-1]) / 100] = float(group.get("y"))
    assert (y2 - y1) / (ticks[0.1] - ticks[1.0]) == pytest.approx(math.log10(16 / 9), rel=1e-3)


@pytest.mark.parametrize("count", [1, 12, 13, 40])
def test_spectra_of_many_groups(count):
    svg = plots.spectra({f"leaf{i}": 0.9 ** np.arange(20 - i % 3) for i in range(count)})
    texts = _texts(svg)
    assert (f"median of {count}" in texts) == (count > 12)
    assert ("leaf0" in texts) == (count <= 12)


@pytest.mark.parametrize(
    "values", [[], [[1.0]], [1.0, 2.0], [0.0, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0]]
)
def test_spectra_reject_what_is_no_spectrum(values):
    with pytest.raises(ValueError, match="'bad'"):
        plots.spectra({"good": np.ones(3), "bad": np.array(values)})


def test_spectra_reject_no_group_and_rank_zero():
    with pytest.raises(ValueError, match=r"at least one; rank = 0"):
        plots.spectra({}, rank=0)


def test_spectra_take_exact_zeros():
    assert "a" in _texts(plots.spectra({"a": np.array([1.0, 0.5, 0.0])}))


def test_confusion_shows_shares_of_rows():
    matrix = np.array([[3, 1, 0], [0, 999, 1], [0, 0, 0]])
    texts = _texts(plots.confusion(matrix, ["a", "b", "c"], title="Layer 5"))
    for text in ("75", "25", ">99", "<1", "n=4", "n=1,000", "n=0", "a", "b", "c"):
        assert text in texts, text
    assert texts.count("\N{EN DASH}") == 3
    transposed = _texts(plots.confusion(matrix.T, ["a", "b", "c"]))
    assert "75" not in transposed and "n=3" in transposed


@pytest.mark.parametrize(
    "matrix", [np.ones((2, 3)), np.ones(2), [[1, -1], [0, 1]], [[1, np.nan]] * 2]
)
def test_confusion_rejects_bad_counts(matrix):
    with pytest.raises(ValueError, match="matrix"):
        plots.confusion(matrix, ["a", "b"])


def test_bytes_accuracy_labels_each_variant_once():
    texts = _texts(plots.bytes_accuracy(_rows()))
    for label in ["weight_average", "ties", *(f"retex exact r={r}" for r in (4, 8, 16, 32, 64))]:
        assert texts.count(label) == 1, label
    assert {"task known", "routed, own head", "nothing known", "0", "1 MB", "100%"} <= set(texts)


def test_bytes_accuracy_labels_do_not_overlap(monkeypatch):
    boxes = []
    place = accuracy._label_points

    def spy(fig, ax, points):
        texts = place(fig, ax, points)
        renderer = fig.canvas.get_renderer()
        frame = ax.get_window_extent(renderer)
        marks = ax.transData.transform([(x, y) for _, x, y in points])
        boxes.append(([t.get_window_extent(renderer) for t in texts], marks, frame))
        return texts

    monkeypatch.setattr(accuracy, "_label_points", spy)
    plots.bytes_accuracy(_rows())
    ((labels, marks, frame),) = boxes
    assert len(labels) == 8
    for i, box in enumerate(labels):
        assert not any(box.overlaps(other) for other in labels[:i])
        assert not any(box.contains(x, y) for x, y in marks)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1


def test_of_equals_by_protocol_the_small_and_good_are_named():
    points = [
        ("weight_average", "", "known", 0, 0.6),
        ("ties", "", "known", 0, 0.7),
        ("dare", "", "known", 0, 0.7),
        ("emr", "", "known", 100, 0.9),
        ("svd", "", "known", 100, 0.95),
        ("dts", "", "known", 50, 0.9),
        ("tall", "", "known", 200, 0.95),
        ("twin", "", "head", 300, 0.8),
        ("retex", "", "known", 300, 0.8),
    ]
    want = [True, True, False, False, True, True, False, True, True]
    assert accuracy.named(points) == want


def test_bytes_accuracy_of_many_methods_names_few(monkeypatch):
    boxes = []
    place = accuracy._label_points

    def spy(fig, ax, points):
        boxes.append(
            [t.get_window_extent(fig.canvas.get_renderer()) for t in place(fig, ax, points)]
        )

    monkeypatch.setattr(accuracy, "_label_points", spy)
    rows = _rows() + [
        {"method": f"merger_{i}", "variant": "scaling=0.4", "task_known": True, "head_known": True}
        | {"bytes_per_task": 0 if i < 15 else 1e5 * i, "normalized_accuracy": 0.6 + 0.01 * i}
        for i in range(30)
    ]
    texts = _texts(plots.bytes_accuracy(rows))
    for label in ("weight_average", "ties", "merger_14 scaling=0.4", "retex exact r=64"):
        assert texts.count(label) == 1, label
    assert not {"task_arithmetic", "merger_3 scaling=0.4"} & set(texts)
    ((*labels,),) = boxes
    assert 8 <= len(labels) < 20
    for i, box in enumerate(labels):
        assert not any(box.overlaps(other) for other in labels[:i])


def test_bytes_accuracy_without_personalised_rows():
    texts = _texts(plots.bytes_accuracy(_rows()[:1]))
    assert "weight_average" in texts and "nothing known" not in texts


def test_bytes_accuracy_rejects_nothing_and_negative():
    with pytest.raises(ValueError, match="expected at least one"):
        plots.bytes_accuracy([{"method": "ties", "bytes_per_task": None}])
    with pytest.raises(ValueError, match="'ties'"):
        plots.bytes_accuracy([{"method": "ties", "bytes_per_task": -1, "normalized_accuracy": 1}])


def test_fronts_have_a_curve_for_each_method_of_several_sizes():
    curves = plots.families(_front_rows())
    assert list(curves) == ["retex by budget, bits=3", "retex by rank", "dts_t by amr"]
    assert [row["amr"] for row in curves["retex by rank"]] == [0.0025, 0.01, 0.04]
    svg = plots.fronts(_front_rows())
    assert {"retex by budget, bits=3", "retex by rank", "1%", "0.2%"} <= set(_texts(svg))
    without = plots.fronts([row for row in _front_rows() if row["method"] != "dts_t"])
    assert svg.count(canvas.PALETTE[2].lower()) > 0 == without.count(canvas.PALETTE[2].lower())
    with pytest.raises(ValueError, match="3 or more sizes"):
        plots.fronts(_front_rows()[:2])


def test_times_bars_and_texts():
    svg = plots.times({"merge": 1.5, "fit": 3.0, "nothing": 0.0})
    assert {"1.50 s", "3.00 s", "0.00 s", "merge", "fit"} <= set(_texts(svg))
    first, second = _widths(svg, canvas.PALETTE[0])[:2]
    assert second == pytest.approx(2 * first, rel=1e-4)
    with pytest.raises(ValueError, match=r"seconds\['x'\]"):
        plots.times({"x": -1.0})
    with pytest.raises(ValueError, match="at least one"):
        plots.times({})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1250, "1.25 kB"),
        (5200000, "5.2 MB"),
        (999600, "1 MB"),
        (86000000, "86 MB"),
        (123456789, "123 MB"),
        (2500000000000.0, "2500 GB"),
    ],
)
def test_bytes_text(count, text):
    assert plots.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.416, "0.42 s"),
        (9.999, "10.0 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3720, "1 h 02 min"),
    ],
)
def test_seconds_text(seconds, text):
    assert plots.seconds_text(seconds) == text


def test_finite_and_protocol():
    assert plots.finite(np.float32(0.5)) == 0.5 and plots.finite(3) == 3.0
    assert all(plots.finite(x) is None for x in (None, "1", math.nan, math.inf))
    assert plots.protocol({"task_known": True, "head_known": False}) == "known"
    assert plots.protocol({"task_known": False, "head_known": True}) == "head"
    assert plots.protocol({}) == "none"


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    load = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    for call in (plots.check_available, lambda: plots.times({"a": 1.0})):
        with pytest.raises(ImportError, match=r"pip install 'retex_jax\[plots\]'"):
            call()


def test_histogram_draws_shares_of_both_groups():
    inside, outside = np.zeros(30), np.r_[np.zeros(5), np.ones(15)]
    svg = plots.histogram(inside, outside, threshold=0.5, title="t")
    assert {"known tasks, n=30", "unknown task, n=20", "threshold"} <= set(_texts(svg))
    heights = {}
    for color in canvas.PALETTE[:2]:
        paths = [
            path.get("d")
            for path in ET.fromstring(svg).iter(f"{SVG}path")
            if f"fill: {color.lower()}" in path.get("style", "")
        ]
        ys = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", paths[0])]
        heights[color] = max(ys) - np.unique(ys)
    known, unknown = (heights[color] for color in canvas.PALETTE[:2])
    np.testing.assert_allclose(unknown[unknown > 0] / known.max(), [0.75, 0.25], rtol=1e-3)
    assert "threshold" not in _texts(plots.histogram(inside, outside, title="t"))
    plots.histogram(np.zeros(2), np.zeros(3), title="all equal")


def test_histogram_names_every_problem():
    with pytest.raises(ValueError) as error:
        plots.histogram(np.zeros(0), np.array([np.nan]), threshold=np.inf, title="t")
    for part in (
        "known tasks: got shape (0,)",
        "unknown task: got shape (1,)",
        "threshold: got inf",
    ):
        assert part in str(error.value)
