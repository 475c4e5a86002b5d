"""The package where torch is not installed: in an environment of its own that holds NumPy and this package, nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import numpy as np
import pytest

import v2drop_kernels

PAGE = Path(__file__).parents[2] / "docs" / "linking.md"
TORCH_NAMES = sorted(
    set(v2drop_kernels.__all__)
    - {"Compacted", "Dropped", "Schedule", "Stage", "TokenLayout", "TopK", "n_keep", "positions", "schedule"}
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run a script, or the arguments of python, in that environment; return what it prints."""
    root = tmp_path_factory.mktemp("without_torch")
    venv.create(root / "env", with_pip=False)
    (site,) = (root / "env" / "lib").glob("python*/site-packages")
    numpy = Path(np.__file__).parent
    for path in (numpy, numpy.with_name("numpy.libs"), Path(v2drop_kernels.__file__).parent):
        if path.exists():
            (site / path.name).symlink_to(path)

    def run(*arguments):
        found = subprocess.run(
            [root / "env" / "bin" / "python", "-I", *arguments], capture_output=True, text=True, check=False, cwd=root
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    run("-c", "import importlib.util as u; assert u.find_spec('torch') is None; assert u.find_spec('pytest') is None")
    return run


def blocks(module):
    return [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if module in b]


def test_documented_example_for_numpy(python):
    (block,) = blocks("v2drop_kernels.array")
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    assert python("-c", block).strip() == "(2, 352, 1024) (2, 8, 352, 64)"


def test_examples_of_the_docstrings(python):
    python("-c", "import doctest, v2drop_kernels.array as m; r = doctest.testmod(m); assert r.attempted >= 5 > 0 == r.failed, r")


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_what_needs_torch_says_so(python, name):
    script = f"""
    import v2drop_kernels as vk
    assert {name!r} in dir(vk)
    for statement in ("vk.{name}", "from v2drop_kernels import {name}"):
        try:
            exec(statement)
        except ImportError as error:
            print(error)
    """
    line = f"v2drop_kernels.{name} needs torch: pip install torch; for NumPy arrays use v2drop_kernels.array"
    assert [x.startswith(line) for x in python("-c", textwrap.dedent(script)).splitlines()] == [True, True]


def test_what_needs_no_torch_is_there(python):
    script = """
    import v2drop_kernels as vk
    layout = vk.TokenLayout.padded([(1, 3), []], 5, lengths=[4, 5], padding_side="left")
    print(vk.n_keep(100, 0.29), layout.after(1).bounds, vk.TopK._fields)
    try:
        vk.no_such_name
    except AttributeError as error:
        print(error)
    try:
        vk.TokenLayout.padded((1, 3), "5", batch=1)
    except TypeError as error:
        print(error)
    """
    assert python("-c", textwrap.dedent(script)).splitlines() == [
        "29 ((2, 5), (0, 5)) ('values', 'indices')",
        "module 'v2drop_kernels' has no attribute 'no_such_name'",
        "seq_len must be an int, got str '5'",
    ]


def test_jax_says_what_is_missing(python):
    script = "try:\n    import v2drop_kernels.jax\nexcept ImportError as error:\n    print(error)"
    assert python("-c", script).strip() == "v2drop_kernels.jax needs jax: pip install jax"


def test_the_command_line_tells_where_the_headers_are(python):
    found = Path(python("-m", "v2drop_kernels", "config", "--includedir").strip())
    assert (found / "v2drop" / "v2drop.h").is_file()


def test_readme_example_for_jax():
    """With torch out of reach: JAX's part must not need it either."""
    pytest.importorskip("jax", reason="jax is not installed")
    (block,) = blocks("v2drop_kernels.jax")
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    script = f"import sys\nsys.modules['torch'] = None\n{block}\nassert (grad.shape, grad.dtype) == (h_cur.shape, h_cur.dtype)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[352 352]"


def test_importing_arrays_does_not_import_torch():
    """Where torch is installed too: it takes seconds, which users of NumPy should not pay."""
    script = """
    import sys
    import v2drop_kernels.array as va, numpy as np
    h = np.ones((1, 6, 2), np.float32)
    va.drop_tokens(h, h, [2], droppable=[[(1, 5)]])
    try:
        va.drop_tokens(h, h, 1.5)
    except TypeError:
        pass
    assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


ORDER = {
    "torch first": "import torch\nimport v2drop_kernels",
    "a name of the package": "import v2drop_kernels\nv2drop_kernels.drop_tokens\nimport torch",
    "a module of the package": "from v2drop_kernels.ops.drop_tokens import drop_tokens\nimport torch, v2drop_kernels",
}


@pytest.mark.parametrize("how", ORDER)
def test_with_torch_the_ops_are_registered(how):
    """Failure that it pins: ``compact`` is a function and a submodule, and importing the latter binds its name anew."""
    script = f"""{ORDER[how]}
assert torch.ops.v2drop.drop
assert callable(v2drop_kernels.compact) and v2drop_kernels.compact.__name__ == "compact"
import pickle
assert pickle.loads(pickle.dumps(v2drop_kernels.compact)) is v2drop_kernels.compact
from v2drop_kernels import *
assert drop_tokens is v2drop_kernels.drop_tokens and compact is v2drop_kernels.compact
"""
    subprocess.run([sys.executable, "-c", script], check=True)
