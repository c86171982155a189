"""The notebooks run from top to bottom, in their own folder, as Jupyter runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments/colabs"


def script(path):
    """The notebook's code cells; a line of the shell as a call, and without what installs."""
    lines = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            lines += "".join(cell["source"]).splitlines()
    shell = "import subprocess; subprocess.run({!r}, shell=True, check=True)"
    code = [line for line in lines if not line.startswith("%pip")]
    return "\n".join(shell.format(line[1:]) if line.startswith("!") else line for line in code)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("quickstart", marks=pytest.mark.packages),
        "bring_your_own_experts",
    ],
)
def test_a_notebook_runs(name, tmp_path):
    code = script(FOLDER / f"{name}.ipynb")
    for part in ("configs", "retex_jax"):
        (tmp_path / part).symlink_to(ROOT / part)
    shutil.copy(ROOT / "setup.py", tmp_path)
    folder = tmp_path / FOLDER.relative_to(ROOT)
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": "", "PYTHONWARNINGS": "default"}
    bin_folder = Path(sys.executable).parent
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "workdirs").is_dir()
    assert list(folder.iterdir()) == []


def test_a_notebook_without_a_clone_makes_one(tmp_path):
    for path in FOLDER.glob("*.ipynb"):
        folder = tmp_path / path.stem
        folder.mkdir()
        (folder / "git").write_text('#!/bin/sh\nmkdir "$3"\n')
        (folder / "git").chmod(0o755)
        first = next(c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
        done = subprocess.run(
            [sys.executable, "-c", "".join(first["source"]) + "\nprint(os.getcwd())"],
            cwd=folder,
            env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == str(folder / "retex_jax"), done.stderr


def test_all_notebooks_are_run():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {
        "quickstart",
        "bring_your_own_experts",
    }
