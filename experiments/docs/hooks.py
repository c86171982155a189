"""Pages that are made from the package when the documentation is built: the methods, from their docstrings.

mkdocs calls `on_config` and `on_files`; `method_pages` needs nothing of mkdocs.
"""

import inspect
import re
import textwrap
from functools import partial
from importlib import import_module
from typing import Any

# At a glance; τₜ = θₜ − θ₀, and θₘ is the merged model. A method that is not here has a page all the same.
FORMULAS = {
    "weight_average": "θ = 1/T Σₜ θₜ",
    "task_arithmetic": "θ = θ₀ + λ Σₜ τₜ",
    "ties": "θ = θ₀ + λ mean { τₜ : |τₜ| among task t's largest, sgn τₜ = γ },\nγ = sgn Σₜ trimmed τₜ",
    "consensus": "θ = θ₀ + α [Σₜ mₜ ≥ k] ⊙ Σₜ τₜ,\nmₜ = [ |τₜ| > λₜ |Σₛ τₛ − τₜ| ]",
    "dare": "τₜ ← mₜ ⊙ τₜ / (1 − p),\nmₜ ~ Bernoulli(1 − p),\nthen a merger",
    "fisher": "θ = Σₜ cₜ Fₜ ⊙ θₜ / Σₜ cₜ Fₜ",
    "regmean": "W = (Σₜ Gₜ)⁻¹ Σₜ Gₜ Wₜ,\nGₜ = Xₜᵀ Xₜ / nₜ with off-diagonals times α",
    "adamerging": "θ = θ₀ + Σₜ λₜ τₜ,\nλ minimises Σₜ mean entropy of the predictions on task t",
    "svd": "θₜ ≈ θ₀ + Uₜ Σₜ Vₜᵀ,\nthe first k singular triplets of τₜ",
    "dts_t": "θₜ ≈ θ₀ + q(Uₜ) Σₜ q(Vₜ)ᵀ,\nthe first triplets of τₜ; q keeps four values a matrix",
    "dts_d": "θₜ ≈ θₘ + q(Uₜ) Σₜ q(Vₜ)ᵀ,\nthe first triplets of θₜ − θₘ; q keeps four values a matrix",
    "emr": "θₜ ≈ θ₀ + λₜ mₜ ⊙ τ_uni,\nmₜ = [ τₜ ⊙ γ > 0 ],\nγ = sgn Σₜ τₜ",
    "t_switch": "θₜ ≈ θ₀ + sₜ mₜ ⊙ sgn τₜ,\nsₜ = root mean square of the kept entries of a tensor",
    "tall_mask": "θₜ ≈ θ₀ + mₜ ⊙ Σₛ τₛ,\nmₜ = [ |τₜ| > λₜ |Σₛ τₛ − τₜ| ]",
    "twin": "θ(x) = θ* + Σₜ wₜ(x) trim(θₜ − θ*),\nθ* = θ₀ + λ Σₜ τₜ,\nw = router(x)",
    "dawin": "θ(x) = θ₀ + λ T Σₜ wₜ(x) τₜ,\nw = softmaxₜ(−entropy of expert t on x)",
    "smear_frozen": "θ(x) = Σₜ pₜ(x) θₜ,\np = router(x)",
    "wemoe": "an MLP: θ(h) = θ₀ + Σₜ gₜ(h) τₜ;\nall else: θ = θ₀ + λ Σₜ τₜ",
    "retex": "θₜ ≈ θₘ + Gₜ S,\nΣₜ ‖θₜ − θₘ − Gₜ S‖² least,\nof every leaf as a matrix (out, in)",
}

# Modules whose docstrings belong to a method's page, beside the one of its `fit`.
MORE = {
    "retex": (
        *(
            "offsets.state",
            "offsets.exact",
            "offsets.budget",
            "offsets.coding",
            "offsets.weighting",
            "offsets.activations",
        ),
        *("offsets.tucker", "offsets.factorized", "offsets.shape_shared", "offsets.affine"),
        *("offsets.adam", "offsets.extension", "offsets.factor_file"),
    ),
    "tall_mask": ("mergers.consensus",),
    "twin": ("personalized.router", "personalized.magnitude"),
    "smear_frozen": ("personalized.router",),
    "dts_t": ("personalized.thresholding", "personalized.low_rank"),
    "dts_d": ("personalized.thresholding", "personalized.low_rank"),
    "svd": ("personalized.low_rank",),
    "wemoe": ("personalized.gating",),
}

_SECTIONS = ("Args:", "Returns:", "Raises:")
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def escape(text: str) -> str:
    """Plain text as Markdown that shows the same, but for what stands between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_<>\[\]|#])", r"\\\1", part)
        for part in parts
    )


def markdown(docstring: str) -> str:
    """Paragraphs, lists and indented blocks of a docstring."""
    blocks = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if block.startswith("    "):
            blocks.append(block)
            continue
        before, *items = re.split(r"(?:^|\n)- ", block)
        blocks += [escape(before)] if before else []
        if items:
            lines = (textwrap.indent(escape(inspect.cleandoc(item)), "  ")[2:] for item in items)
            blocks.append("\n".join(f"- {item}" for item in lines))
    return "\n\n".join(blocks)


def function(docstring: str) -> str:
    """A function's docstring, its arguments and errors as lists."""
    text, sections = inspect.cleandoc(docstring), []
    parts = re.split(rf"^({'|'.join(_SECTIONS)})\n", text, flags=re.MULTILINE)
    shown = [markdown(parts[0])]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        entries = re.split(r"\n(?! )", textwrap.dedent(body).strip())
        sections.append(f"**{title}**")
        if title == "Returns:":
            sections.append(escape(" ".join(textwrap.dedent(body).split())))
            continue
        lines = []
        for item in entries:
            name, _, meaning = " ".join(item.split()).partition(": ")
            lines.append(f"- `{name}`: {escape(meaning)}")
        sections.append("\n".join(lines))
    return "\n\n".join([*shown, *sections])


def papers(text: str) -> list[str]:
    """Links to what a docstring cites, in order."""
    return [
        f"[arXiv:{number}](https://arxiv.org/abs/{number})"
        for number in dict.fromkeys(_ARXIV.findall(text))
    ]


def _parts(method: Any) -> tuple[Any, dict[str, Any]]:
    """The function under a method's `fit`, and what is fixed of it."""
    fit = method.fit
    return (fit.func, dict(fit.keywords)) if isinstance(fit, partial) else (fit, {})


def method_page(name: str, method: Any) -> str:
    """One method: what it is, needs and stores, its options, and what its docstrings say."""
    fit, fixed = _parts(method)
    module = inspect.getmodule(fit)
    first, _, rest = inspect.cleandoc(module.__doc__).partition("\n")
    facts = [f"needs: {method.needs}"]
    if method.option_needs is not None:
        facts[0] += " (with some options more, see there)"
    if method.mix is not None:
        facts.append("`mix(state, weights)` gives a mixture of experts")
    if method.predict is not None:
        facts.append("mixes by input: `predict(state, model, batch)`")
    if method.random({}):
        facts.append("random: another `key` gives another result")
    if cited := papers(module.__doc__):
        facts.append("cites: " + ", ".join(cited))
    arguments = [f"{key}={value!r}" for key, value in fixed.items()]
    lines = [f"# {name}", escape(first)]
    if name in FORMULAS:
        lines.append(f"```text\n{FORMULAS[name]}\n```")
    lines.append("\n".join(f"- {fact}" for fact in facts))
    lines.append(markdown(rest))
    lines.append("## Options")
    lines.append(
        f'`rtx.METHODS["{name}"].fit(experts, ...)` is `{module.__name__}.{fit.__name__}`.'
    )
    if arguments:
        lines[-1] += f" Fixed here: `{', '.join(arguments)}`."
    lines.append(f"```python\n{_signature(fit)}\n```")
    lines.append(function(fit.__doc__))
    for part in MORE.get(name, ()):
        other = import_module(f"retex_jax.{part}")
        lines += [f"## {part.rpartition('.')[2]}", f"`{other.__name__}`: {markdown(other.__doc__)}"]
    return "\n\n".join(lines) + "\n"


def _signature(fit: Any) -> str:
    parameters = list(inspect.signature(fit).parameters.values())
    shown = [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters]
    starts = next((i for i, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY), None)
    if starts is not None:
        shown.insert(starts, "*")
    return "fit(\n    " + ",\n    ".join(shown) + ",\n)"


def method_pages() -> dict[str, str]:
    """Path below docs/ to Markdown: one page a method, and their list."""
    from retex_jax.methods import METHODS

    pages = {f"methods/{name}.md": method_page(name, method) for name, method in METHODS.items()}
    rows = ["| method | | needs |", "| --- | --- | --- |"]
    for name, method in METHODS.items():
        doc = inspect.getmodule(_parts(method)[0]).__doc__
        about = escape(inspect.cleandoc(doc).split("\n")[0])
        rows.append(f"| [{name}]({name}.md) | {about} | {method.needs} |")
    intro = (
        "# Methods\n\nA method is a pair of pure functions: `fit(experts, *, key, ...)` gives a state, "
        "`recover(state, task)` the parameters that serve a task. `rtx.METHODS` is the table of them. These "
        "pages are made from it and from the docstrings.\n\n"
    )
    pages["methods/index.md"] = intro + "\n".join(rows) + "\n"
    return pages


def on_config(config: Any) -> Any:
    """Puts the methods into the navigation."""
    paths = sorted(method_pages(), key=lambda path: path != "methods/index.md")
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = [
                {path.split("/")[1].removesuffix(".md").replace("index", "All methods"): path}
                for path in paths
            ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for path, text in method_pages().items():
        files.append(File.generated(config, path, content=text))
    return files
