"""README.md and experiments/docs/: links, commands and names exist, examples run, and every method has a page."""

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import retex_jax
from retex_jax import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "experiments/docs"
sys.path[:0] = [str(ROOT), str(DOCS)]  # the experiment files and the hooks are no packages

import hooks  # noqa: E402

from configs import common  # noqa: E402

PAGES = {"README.md": ROOT / "README.md"} | {
    f"experiments/docs/{p.name}": p for p in sorted(DOCS.glob("*.md"))
}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
GENERATED = hooks.method_pages()
FENCE = re.compile(
    r'(?P<mark><!-- not run -->\n)?```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<body>.*?)```',
    re.DOTALL,
)
EXPERIMENTAL = re.compile(r"^(configs|experiments|tests|retex_jax|docs)/[\w/.]+\.(py|md|json|svg)$")


def fences(name, kind):
    return [match for match in FENCE.finditer(TEXTS[name]) if match["kind"] == kind]


def inline(name):
    """What stands between backticks in running text."""
    return re.findall(r"`([^`]+)`", FENCE.sub("", TEXTS[name]))


# Links


def anchors(text):
    """Of headings, as Python-Markdown and GitHub make them for plain words."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def broken_links(path, text, texts):
    problems = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = Path(os.path.normpath(path.parent / file)) if file else path
        is_there = found in texts or found.is_file()
        if not is_there or (anchor and anchor not in anchors(texts[found])):
            problems.append(target)
    return problems


ALL_TEXTS = {PAGES[name]: text for name, text in TEXTS.items()} | {
    DOCS / name: text for name, text in GENERATED.items()
}


@pytest.mark.parametrize("path", list(ALL_TEXTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    assert not broken_links(path, ALL_TEXTS[path], ALL_TEXTS)


def test_a_broken_link_is_seen():
    path = DOCS / "index.md"
    text = "[a](nowhere.md) [b](limits.md#nothing) ![c](pictures/none.svg) [d](limits.md)"
    assert broken_links(path, text, ALL_TEXTS) == [
        "nowhere.md",
        "limits.md#nothing",
        "pictures/none.svg",
    ]


def test_every_page_is_in_the_navigation():
    listed = re.findall(
        r": (\S+\.md)$", (ROOT / "experiments/mkdocs.yml").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(
        [*(path.name for path in DOCS.glob("*.md")), "methods/index.md"]
    )


# Commands


def commands(name):
    lines = [
        line
        for match in fences(name, "bash")
        for line in match["body"].replace("\\\n", " ").splitlines()
    ]
    lines += [
        code.replace("\n", " ") for code in inline(name) if code.startswith(("python", "pip"))
    ]
    parts = [shlex.split(line, comments=True) for line in lines]
    for words in parts:
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def flags_of(file):
    """The flags that a program defines, whether by absl or by argparse, or that a table of the papers takes."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) and node.names[0].name in ("papers", "paper_programs"):
            found |= flags_of(ROOT / "experiments/paper_output.py")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "command_line.define_config":
            found.add("config")
        elif called == "command_line.define_dry_run":
            found.add("dry_run")
        elif called.startswith("flags.DEFINE_") or called.endswith(".add_argument"):
            found.add(node.args[0].value.removeprefix("--"))
    return found


def is_entry(path, file):
    """Whether an experiment file has an entry."""
    name = (
        file.removesuffix(".py").replace("/", ".") if (ROOT / file).is_file() else common.__name__
    )
    node = importlib.import_module(name).get_config()
    for part in path.split("."):
        if part not in node:
            return False
        node = node[part]
    return True


def command_problems(words):
    """What a command names that does not exist."""
    program, *rest = words[1:] if words[0] == "srun" else words
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = re.findall(r"\[(\w+)\]", " ".join(rest))
        return [extra for extra in named if extra not in extras["optional-dependencies"]]
    if program in ("pytest", "mkdocs", "hf"):
        return []
    if program == "sbatch":
        return [] if (ROOT / rest[-1]).is_file() else [rest[-1]]
    if program != "python":
        return [program]
    if rest[0] == "-m":
        parts = rest[1].split(".")
        file, rest = ROOT.joinpath(*parts).with_suffix(".py"), rest[2:]
        if not file.is_file():
            file = ROOT.joinpath(*parts, "__main__.py")
    else:
        file, rest = ROOT / rest[0], rest[1:]
    if not file.is_file():
        return [str(file.relative_to(ROOT))]
    known, problems = flags_of(file), []
    given = next((word for word in rest if word.startswith("--config=")), "").partition("=")[2]
    for word in rest:
        if not word.startswith("--"):
            continue
        flag, _, value = word[2:].partition("=")
        if flag == "config":
            problems += [] if "config" in known and (ROOT / value).is_file() else [word]
        elif flag.startswith("config."):
            entry = flag.removeprefix("config.")
            problems += [] if "config" in known and is_entry(entry, given) else [word]
            if entry == "methods" and value != "all":
                problems += [one for one in value.split(",") if one not in METHODS]
        elif flag not in known:
            problems.append(word)
    return problems


@pytest.mark.parametrize("name", list(PAGES))
def test_commands_exist(name):
    problems = {" ".join(words): command_problems(words) for words in commands(name)}
    assert not {command: found for command, found in problems.items() if found}


@pytest.mark.parametrize(
    "command",
    [
        "python -m retex_jax.trains --config=configs/demo.py",
        "python -m retex_jax.train --config=configs/none.py",
        "python -m retex_jax.train --config=configs/demo.py --config.offsets.ranks=3",
        "python -m retex_jax.train --config=configs/demo.py --dryrun",
        "python -m retex_jax.compare --config=configs/demo.py --config.methods=tees",
        "python -m retex_jax.convert --chek a b",
        "python -m retex_jax.evaluate --config=configs/demo.py",
        "python experiments/none.py",
        "sbatch experiments/cluster/none.sh",
        "python experiments/retex_table_1.py --suit=minilm_text8",
        "python experiments/scaling_num_tasks.py --tasks 3",
        "pip install -e '.[demos]'",
    ],
)
def test_a_wrong_command_is_seen(command):
    assert command_problems(shlex.split(command))


# Names


def resolves(dotted):
    """Whether "retex_jax.a.b" is a module, or something in one."""
    parts = ["retex_jax" if part == "rtx" else part for part in dotted.split(".")]
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[end:]:
                found = getattr(found, part)
        except AttributeError:
            return False
        return True
    return False


def unknown_names(codes):
    problems = []
    for code in codes:
        problems += [
            dotted
            for dotted in re.findall(r"(?<![\w./])((?:retex_jax|rtx)(?:\.\w+)+)", code)
            if not dotted.endswith(".py") and not resolves(dotted)
        ]
        if EXPERIMENTAL.match(code) and not (ROOT / code).is_file():
            problems.append(code)
    return problems


@pytest.mark.parametrize("name", list(PAGES))
def test_names_exist(name):
    code = inline(name) + [match["body"] for match in fences(name, "python")]
    if name == "experiments/docs/add_a_merger.md":  # the file that it makes
        code = [part for part in code if "median" not in part]
    assert not unknown_names(code)


def test_an_unknown_name_is_seen():
    codes = ["rtx.METHOD", "retex_jax.offset", "configs/demos.py", "rtx.METHODS", "configs/demo.py"]
    assert unknown_names(codes) == ["rtx.METHOD", "retex_jax.offset", "configs/demos.py"]


def keyword_problems(source):
    """Keywords that the functions of the package do not take, where a call names the function in full."""
    tree, names = ast.parse(source), {"rtx": retex_jax}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found = getattr(module, alias.name, None)
                names[alias.name] = found or importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(
            "rtx.Recovered.load("
        ):
            names[node.targets[0].id] = retex_jax.Recovered
    problems = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = names.get(ast.unparse(node.func).split(".")[0])
        for part in ast.unparse(node.func).split(".")[1:]:
            function = getattr(function, part, None)
        if function is None:
            problems.append(ast.unparse(node.func))
            continue
        parameters = inspect.signature(function).parameters
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            problems += [one.arg for one in node.keywords if one.arg not in parameters]
    return problems


@pytest.mark.parametrize(
    "source",
    [match["body"] for name in PAGES for match in fences(name, "python") if match["mark"]],
)
def test_examples_that_are_not_run_call_what_exists(source):
    assert not keyword_problems(source)


def test_a_wrong_keyword_is_seen():
    source = "import retex_jax as rtx\nx = rtx.Recovered.load('a', batch=3)\nx.serve()"
    assert keyword_problems(source) == ["batch", "x.serve"]


# Examples


def write_checkpoints(folder):
    """What experiments/docs/own_experts.md opens: a model in torch layout, two experts of it, and two adapters."""
    rng = np.random.default_rng(0)
    shapes = {"up.weight": (12, 8), "up.bias": (12,), "classifier.weight": (3, 12)}
    for name in ("base", "a", "b"):
        drawn = {leaf: rng.normal(size=shape).astype("f4") for leaf, shape in shapes.items()}
        save_file(drawn, folder / f"{name}.safetensors")
    for name in ("adapter_a", "adapter_b"):
        (folder / name).mkdir()
        factors = {"A": rng.normal(size=(2, 8)), "B": rng.normal(size=(12, 2))}
        tensors = {
            f"base_model.model.up.lora_{side}.weight": x.astype("f4") for side, x in factors.items()
        }
        save_file(tensors, folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))


def examples(name):
    return [m for m in fences(name, "python") if not m["mark"] and not m["title"]]


@pytest.mark.parametrize(
    "name", [name for name in PAGES if name.startswith("experiments/docs/") and examples(name)]
)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoints(tmp_path)
    namespace = {"__name__": "example"}
    for match in examples(name):
        line = TEXTS[name][: match.start()].count("\n") + 1
        exec(compile("\n" * line + match["body"], name, "exec"), namespace)
    if name == "experiments/docs/quickstart.md":
        assert namespace["state"].report.ratio == pytest.approx(1, abs=1e-5)
        assert namespace["fewer"].num_tasks == 3
    if name == "experiments/docs/identifiers.md":
        assert np.argmax(namespace["scores"], axis=1).tolist() == [1] * 5
    if name == "experiments/docs/own_experts.md":
        assert namespace["experts"].names == ("a", "b")
        assert namespace["experts"].float_leaves == ["up/bias", "up/weight"]
        assert retex_jax.tree.flatten(namespace["params"]).keys() == {"up/bias", "up/weight"}
        assert namespace["get_config"]().offsets.budget == 0.01


def test_the_merger_of_the_documentation(tmp_path):
    blocks = {m["title"]: m["body"] for m in fences("experiments/docs/add_a_merger.md", "python")}
    shutil.copytree(ROOT / "retex_jax", tmp_path / "retex_jax", ignore=lambda *_: ["__pycache__"])
    table = "retex_jax/mergers/__init__.py"
    line = blocks.pop(table)
    assert line.count("\n") == 1
    text = (tmp_path / table).read_text()
    text = text.replace("    fisher,\n", "    fisher,\n    median,\n", 1)
    text = text.replace("MERGERS = {\n", f"MERGERS = {{\n{line}", 1)
    (tmp_path / table).write_text(text)
    assert len(blocks) == 2
    for title, body in blocks.items():
        assert not (ROOT / title).exists()
        (tmp_path / title).parent.mkdir(exist_ok=True)
        (tmp_path / title).write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "tests/test_median.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


# The pages of the methods


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_has_a_page(name):
    page = GENERATED[f"methods/{name}.md"]
    fit, _ = hooks._parts(METHODS[name])
    assert METHODS[name].needs in page
    for parameter in inspect.signature(fit).parameters.values():
        assert f"- `{str(parameter).split(':')[0].split('=')[0]}`:" in page, parameter
    assert hooks.FORMULAS[name] in page
    assert f"[{name}]({name}.md)" in GENERATED["methods/index.md"]


def test_formulas_and_modules_are_of_methods():
    assert set(hooks.FORMULAS) <= set(METHODS)
    assert set(hooks.MORE) <= set(METHODS)
    assert len(GENERATED) == len(METHODS) + 1


def test_a_method_without_a_formula_has_a_page():
    assert "```text" not in hooks.method_page("unknown", METHODS["ties"])


def test_docstrings_become_markdown():
    docstring = """First *a* and theta_0 <b>.

    Text:
    - `x_1 * y`: one
      line
    - two [T, *shape]

        code_as * it is
    """
    assert hooks.markdown(docstring) == (
        "First \\*a\\* and theta\\_0 \\<b\\>.\n\n"
        "Text:\n\n"
        "- `x_1 * y`: one\n  line\n- two \\[T, \\*shape\\]\n\n"
        "    code_as * it is"
    )


def test_functions_become_markdown():
    docstring = """Does.

    Args:
      one: of
        two lines.
      **rest: more.

    Returns:
      A_b.

    Raises:
      ValueError: if so.
    """
    assert hooks.function(docstring) == (
        "Does.\n\n**Args:**\n\n- `one`: of two lines.\n- `**rest`: more.\n\n"
        "**Returns:**\n\nA\\_b.\n\n**Raises:**\n\n- `ValueError`: if so."
    )
