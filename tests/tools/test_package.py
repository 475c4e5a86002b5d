"""The public names of the package, their docstrings and examples, and the version."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import v2drop_kernels as vk

ROOT = Path(__file__).resolve().parents[2]
# Public names that must stay.
PROMISED = {
    "variation_score", "segmented_topk", "variation_topk", "compact", "compact_", "drop_tokens", "TokenLayout",
    "n_keep", "explain", "backend", "TopK", "Compacted", "Dropped", "reference", "positions", "attention_score",
    "cls_attention_score", "text_raters", "text_rater_score", "cross_modal_score", "key_norm_score", "cosine_to_pivots",
    "frame_similarity", "random_score", "soft_topk", "weighted_merge", "bipartite_merge", "merge_dropped",
}  # fmt: skip
FUNCTIONS = [name for name in vk.__all__ if inspect.isfunction(inspect.unwrap(getattr(vk, name)))]
METHODS = ["padded", "packed", "from_mask", "from_token_ids", "after", "droppable_rows", "real_rows", "segments"]
MODULES = [
    m.name
    for m in pkgutil.walk_packages(vk.__path__, "v2drop_kernels.")
    if not re.search(r"triton$|backends.(configs|launch)|_C$|_xla$|__main__", m.name)
]


def section(doc: str, title: str) -> str:
    """The body of a NumPy-style section, or nothing."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", inspect.cleandoc(doc), re.MULTILINE | re.DOTALL)
    return found.group(1).strip() if found else ""


def test_all_is_complete():
    public = {name for name, x in vars(vk).items() if not name.startswith("_") and not inspect.ismodule(x)}
    assert set(vk.__all__) == public | {"positions", "reference", "schedule"}
    assert set(vk.__all__) >= PROMISED
    assert len(vk.__all__) == len(set(vk.__all__))


def test_type_checkers_see_the_public_names():
    """The imports that only type checkers see give every public name, and each resolves to the same object."""
    (hidden, *_) = [node for node in ast.parse(Path(vk.__file__).read_text()).body if isinstance(node, ast.If)]
    visible = {alias.name: node.module for node in hidden.body for alias in node.names}
    assert sorted(visible) == sorted([*vk.__all__, "distributed", "models", "plot"])
    for name, home in visible.items():
        module = importlib.import_module(f"v2drop_kernels.{home or name}")
        assert getattr(vk, name) is (getattr(module, name) if home else module)
    assert set(dir(vk)) >= set(vk.__all__)


def test_version_agrees_with_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.*)"$', text, re.MULTILINE).group(1) == vk.__version__


def test_package_is_typed():
    assert (Path(vk.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions(name):
    function = inspect.unwrap(getattr(vk, name))
    doc = inspect.getdoc(function) or ""
    assert re.match(r"[A-Z][^\n]*[.;:]", doc), "one sentence first"
    for title in ("Parameters", "Raises", "Examples"):
        assert section(doc, title), f"{name} has no section {title}"
    assert section(doc, "Returns") or section(doc, "Yields") or name == "backend", f"{name} has no section Returns"
    documented = section(doc, "Parameters")
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", documented), f"{name} does not document {parameter}"
    assert ">>>" in section(doc, "Examples")


@pytest.mark.parametrize("name", [n for n in vk.__all__ if inspect.isclass(getattr(vk, n))])
def test_docstrings_of_classes(name):
    cls = getattr(vk, name)
    assert inspect.getdoc(cls)
    fields = getattr(cls, "_fields", None) or list(getattr(cls, "__dataclass_fields__", {}))
    for field in fields:
        assert re.search(rf"\b{field}\b", inspect.getdoc(cls) + (_same_as(cls) or "")), f"{name} does not document {field}"


def _same_as(cls):
    """The docstring that ``see :class:`Other` `` points to."""
    found = re.search(r":class:`(\w+)`", inspect.getdoc(cls))
    return inspect.getdoc(getattr(vk, found.group(1))) if found else None


@pytest.mark.parametrize("name", METHODS)
def test_docstrings_of_token_layout(name):
    method = getattr(vk.TokenLayout, name)
    doc = inspect.getdoc(method)
    assert doc
    assert doc.splitlines()[0].rstrip().endswith((".", ";", ",", ":")) or "." in doc
    for parameter in inspect.signature(method).parameters:
        if parameter not in ("self", "device", "k"):
            assert re.search(rf"\b{parameter}\b", section(doc, "Parameters")), f"{name} does not document {parameter}"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_of_modules(name):
    path = Path(vk.__file__).parent.joinpath(*name.split(".")[1:])
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    doc = ast.get_docstring(ast.parse(source))
    assert doc, f"{name} has no docstring"
    # The docstring of a policy names its paper, formula, layers, presets and deviations.
    assert len(doc.splitlines()) <= (40 if ".policies." in name else 12)


@pytest.mark.parametrize("name", ["v2drop_kernels", *(m for m in MODULES if "demo" not in m)])
def test_examples_run(name):
    """Every ``>>>`` of every docstring, with ``torch`` and ``vk`` imported."""
    if name.endswith(".plot"):
        pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    if name.endswith(".jax"):
        pytest.importorskip("jax", reason="the extra 'jax' is not installed")
    module = importlib.import_module(name)
    found = doctest.testmod(module, extraglobs={"torch": torch, "vk": vk})
    assert not found.failed


def test_every_op_has_examples():
    finder = doctest.DocTestFinder()
    for name in FUNCTIONS:
        if name != "backend":  # a context manager: its example is found through its module
            examples = [e for t in finder.find(inspect.unwrap(getattr(vk, name)), name) for e in t.examples]
            assert examples, f"{name} shows no example"


@pytest.mark.parametrize("name", ["variation_score", "segmented_topk", "variation_topk", "compact", "compact_", "drop_tokens"])
def test_reference_has_the_same_names_and_arguments(name):
    """The reference takes the arguments of the op, except the choice of the backend."""
    op, spec = (inspect.signature(getattr(m, name)).parameters for m in (vk, vk.reference))
    options = {"backend"} | ({"rows"} if name == "compact_" else set()) | ({"cu_seqlens"} if name == "variation_score" else set())
    assert {p for p in op if p not in options} == set(spec)
    for parameter, found in spec.items():
        assert (found.kind, found.default) == (op[parameter].kind, op[parameter].default)


def test_options_are_keyword_only():
    for name in ("variation_score", "segmented_topk", "variation_topk", "compact", "compact_", "drop_tokens"):
        parameters = inspect.signature(getattr(vk, name)).parameters.values()
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.default is not p.empty)
