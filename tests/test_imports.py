"""Who may import whom: reads every import of the package, and every import that is a string."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import retex_jax

PACKAGE = Path(retex_jax.__file__).parent
ROOT = PACKAGE.parent

CORE = {
    "buffers",
    "calibration",
    "",  # retex_jax/__init__.py
    "expert_checks",
    "experts",
    "files",
    "identifier",
    "lora",
    "mergers",
    "methods",
    "metrics",
    "offsets",
    "personalized",
    "preemption",
    "search",
    "sharding",
    "snapshot",
    "sources",
    "tree",
    "typing",
}
NETS = {"models"}
INFRA = {
    "artifact",
    "checkpoint",
    "convert",
    "data",
    "distributed",
    "logging",
    "plots",
    "report",
}
RECOVERY = {"recovery", "release"}
PROGRAMS = {
    "bench",
    "classifiers",
    "collection",
    "command_line",
    "compare",
    "estimate",
    "evaluate",
    "experiment",
    "export",
    "finetune",
    "finetune_snapshot",
    "finetune_steps",
    "identifier_checks",
    "method_checks",
    "trainable",
    "training",
    "identification",
    "identify",
    "preflight",
    "pretrained",
    "probe",
    "protocols",
    "huggingface",
    "language_checks",
    "serving",
    "snapshot_checks",
    "task_features",
    "train",
    "unseen",
    "variants",
}

# What retex_jax/__init__.py may import besides the core, when it is asked for.
FACES = {"serving"}

CORE_LIBRARIES = {"flax", "jax", "numpy", "optax", "safetensors"}
NET_LIBRARIES = {"flax", "jax", "numpy"}
NOWHERE = {
    "_pickle",
    "benchmarks",
    "cloudpickle",
    "colabs",
    "configs",
    "dill",
    "experiments",
    "jax._src",
    "jaxlib",
    "joblib",
    "pickle",
    "tensorflow",
    "tests",
    "torch",
}


def _starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def imported(source: str, package: str) -> set[str]:
    """Dotted names that a module of `package` imports, with what `from` takes: "a.b" for both
    `import a.b` and `from a import b`.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                parent = ".".join([*start, *([parent] if parent else [])])
            names |= {f"{parent}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = ast.unparse(node.func).split(".")[-1]
            if function in ("import_module", "__import__"):
                names.add(str(node.args[0].value))
        elif isinstance(node, ast.Attribute):
            names |= {prefix for prefix in ("jax._src",) if ast.unparse(node) == prefix}
    return names


def component(name: str) -> str:
    """ "retex_jax.offsets.exact.fit" is of "offsets"; what `__init__` defines itself is of ""."""
    parts = name.split(".")
    if len(parts) == 1:
        return ""
    if parts[-1] == "__main__":
        return "command_line"  # a program of its package
    known = CORE | NETS | INFRA | RECOVERY | PROGRAMS
    is_module = (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()
    return parts[1] if is_module or parts[1] in known else ""


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """What in the source of `module` ("retex_jax.tree") is against the rules."""
    own = component(module)
    package = module if is_package else module.rpartition(".")[0]
    problems = []
    if own not in CORE | NETS | INFRA | RECOVERY | PROGRAMS:
        return [f"{module}: {own!r} is in no layer"]
    if own in CORE:
        allowed, libraries = CORE | FACES if own == "" else CORE, CORE_LIBRARIES
    elif own in NETS:
        allowed, libraries = CORE | NETS, NET_LIBRARIES
    elif own in INFRA:
        beside = {own, "plots"} if own == "report" else {own}
        allowed, libraries = CORE | NETS | beside, None
    elif own in RECOVERY:
        allowed, libraries = CORE | NETS | INFRA | RECOVERY, None
    else:
        allowed, libraries = CORE | NETS | INFRA | RECOVERY | PROGRAMS, None
    for name in sorted(imported(source, package)):
        library = name.split(".")[0]
        if library == "retex_jax":
            if component(name) not in allowed:
                problems.append(f"{module} imports {name}")
            elif component(name) == "" and own != "":
                problems.append(f"{module} imports {name} from the package itself")
            continue
        if any(_starts_with(name, wrong) for wrong in NOWHERE):
            problems.append(f"{module} imports {name}, which nothing may")
        if _starts_with(name, "orbax") and own != "checkpoint":
            problems.append(f"{module} imports {name}, which only checkpoint may")
        is_flags = any(_starts_with(name, flags) for flags in ("absl.flags", "absl.app"))
        if (library == "ml_collections" or is_flags) and own not in PROGRAMS:
            problems.append(f"{module} imports {name}, which only programs may")
        if libraries is not None and library not in {*libraries, *sys.stdlib_module_names}:
            problems.append(f"{module} imports {name}, which its layer may not")
    return problems


def _modules() -> list[tuple[str, Path]]:
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.append((name, path))
    return modules


def test_the_rules_hold():
    problems = []
    for name, path in _modules():
        source = path.read_text(encoding="utf-8")
        problems += violations(name, source, is_package=path.name == "__init__.py")
    assert not problems, "\n".join(problems)


def test_nothing_unpickles():
    # np.load(..., allow_pickle=True) and pickle's friends in other libraries.
    for name, path in _modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                value = node.value
                assert isinstance(value, ast.Constant) and value.value is False, name


def test_configs_import_ml_collections_and_their_siblings_only():
    for path in sorted((ROOT / "configs").glob("*.py")):
        for name in imported(path.read_text(encoding="utf-8"), "configs"):
            library = name.split(".")[0]
            assert library in {"ml_collections", "configs", *sys.stdlib_module_names}, (
                f"{path.name} imports {name}"
            )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("retex_jax.tree", "from retex_jax import models"),
        ("retex_jax.tree", "import retex_jax.data.tasks"),
        ("retex_jax.tree", "import scipy"),
        ("retex_jax.tree", "import retex_jax"),
        ("retex_jax.tree", "from retex_jax import METHODS"),
        ("retex_jax.offsets.exact", "from ..checkpoint import leaves"),
        ("retex_jax.offsets.exact", "from .. import artifact"),
        ("retex_jax.offsets.exact", "def f():\n  import retex_jax.train"),
        ("retex_jax.offsets.exact", "import absl.logging"),
        ("retex_jax.offsets.exact", "from jax import _src"),
        ("retex_jax.offsets.exact", "import jax._src.core"),
        ("retex_jax.offsets.exact", "import jax\njax._src.core"),
        ("retex_jax.offsets.exact", "import importlib\nimportlib.import_module('torch')"),
        ("retex_jax.models.vit", "import optax"),
        ("retex_jax.models.vit", "from retex_jax import data"),
        ("retex_jax.data.vision", "from retex_jax.convert import engine"),
        ("retex_jax.data.vision", "from retex_jax import recovery"),
        ("retex_jax.data.vision", "import orbax.checkpoint as ocp"),
        ("retex_jax.data.vision", "from absl import flags"),
        ("retex_jax.data.vision", "from ml_collections import ConfigDict"),
        ("retex_jax.data.vision", "import pickle"),
        ("retex_jax.data.vision", "from torch import nn"),
        ("retex_jax.plots.canvas", "from retex_jax.report import page"),
        ("retex_jax.recovery", "from retex_jax import train"),
        ("retex_jax.recovery", "from absl import flags"),
        ("retex_jax.train", "import orbax"),
        ("retex_jax.train", "from configs import demo"),
        ("retex_jax.train", "import tests.tiny"),
    ],
)
def test_a_breach_is_seen(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "retex_jax.tree",
            "import re\nimport jax.numpy as jnp\nfrom retex_jax.typing import Array",
        ),
        ("retex_jax.offsets.adam", "import optax\nfrom retex_jax.offsets import exact"),
        ("retex_jax.offsets.adam", "from . import exact\nfrom ..tree import flatten"),
        ("retex_jax.checkpoint.leaves", "import orbax.checkpoint as ocp"),
        ("retex_jax.data.vision", "from absl import logging\nfrom retex_jax import models, tree"),
        ("retex_jax.report.page", "from retex_jax import plots"),
        ("retex_jax.recovery", "from retex_jax import data, models"),
        ("retex_jax.train", "from absl import app, flags\nimport ml_collections"),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    assert not violations(module, source)


def test_a_new_module_must_be_given_a_layer(monkeypatch, tmp_path):
    (tmp_path / "novelty.py").touch()
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert violations("retex_jax.novelty", "") == ["retex_jax.novelty: 'novelty' is in no layer"]


@pytest.mark.parametrize(("own", "used"), [(None, "14"), ("20", "20")])
def test_openblas_threads_wait_no_longer_than_asked(monkeypatch, own, used):
    if own is None:
        monkeypatch.delenv("OPENBLAS_THREAD_TIMEOUT")  # of this process' own import
    else:
        monkeypatch.setenv("OPENBLAS_THREAD_TIMEOUT", own)
    code = "import sys, retex_jax, os; print(os.environ['OPENBLAS_THREAD_TIMEOUT'], 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [used, "False"]  # before NumPy reads it


def test_importing_the_package_starts_no_backend():
    script = """
import retex_jax, jax
jax.config.update("jax_num_cpu_devices", 3)  # raises once a backend has started
assert len(jax.devices()) == 3
try:
    jax.config.update("jax_num_cpu_devices", 4)
except RuntimeError:
    print("a backend that has started is noticed")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "is noticed" in done.stdout
