"""README.md and experiments/docs/ say what the committed results say."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = [
    "README.md",
    *sorted(f"experiments/docs/{path.name}" for path in (ROOT / "experiments/docs").glob("*.md")),
]


def load(path):
    """A module of experiments/, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = load(ROOT / "experiments/readme.py")
compared = sys.modules["compared"]


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == readme.render(text), "run python experiments/readme.py"


def test_the_picture_is_of_the_results():
    path = ROOT / readme.picture.PATH
    assert readme.picture.is_current(path, readme.points()), "run python experiments/readme.py"


@pytest.mark.parametrize("name", NAMES)
def test_no_accuracy_stands_outside_what_is_generated(name):
    text = readme.MARKED.sub("", (ROOT / name).read_text(encoding="utf-8"))
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    assert not re.findall(r"\b[01]\.\d{3}\b|\b\d\d\.\d%|\b\d+:\d\d min", text)


def test_all_blocks_are_used():
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in NAMES)
    assert {match[2] for match in readme.MARKED.finditer(text)} == set(readme.BLOCKS)


def test_every_table_names_its_file_and_commit():
    for name in set(readme.BLOCKS) - {"methods", "identifiers", "data_sets"}:
        text = readme.BLOCKS[name]()
        assert "experiments/" in text and re.search(r"`[0-9a-f]{12}`", text), name


def normalized(suite, entry):
    return readme.entry(suite, entry)["normalized_accuracy"]


def test_claims_without_figures_hold():
    text, images = compared.SUITES
    from_mean = {"dts_d": "dts_d base=weight_average", "emr": "emr from=weight_average"}
    for usual, differences in from_mean.items():
        assert normalized(images, differences) > normalized(images, usual)
        assert normalized(text, differences) < normalized(text, usual)
    for label in ("Task Arithmetic", "TIES, 20%"):
        searched = compared.ONE_MODEL[f"{label}, searched"]
        published = compared.ONE_MODEL["TIES, 20%, 1.0" if "TIES" in label else f"{label}, 0.3"]
        assert normalized(text, searched) < normalized(text, published)
    for suite, inputs in ((text, 32), (images, 16)):
        for name in compared.ROUTED.values():
            assert f"{inputs} inputs a task" in readme.entry(suite, name)["variant"]


def test_drift_is_seen(tmp_path):
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    results = tmp_path / "experiments/results/demo/results.json"
    results.write_text(results.read_text().replace("d668218488e2", "0123456789ab"))
    before = (tmp_path / "README.md").read_text()

    def run(*arguments):
        command = [sys.executable, "experiments/readme.py", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = run("--check")
    assert done.returncode == 1, done.stderr
    assert "0123456789ab" in done.stdout
    assert (tmp_path / "README.md").read_text() == before
    assert run().returncode == 0
    assert "0123456789ab" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "<!-- begin nothing -->\n<!-- end nothing -->",
        "<!-- begin demo -->\n",
        "<!-- end demo -->\n<!-- begin demo -->",
        "<!-- begin demo -->\n<!-- end methods -->",
    ],
)
def test_marks_must_fit(text):
    with pytest.raises(ValueError, match="marks"):
        readme.render(text)
