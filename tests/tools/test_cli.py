"""The command line: its output on stdout and stderr, and its exit codes."""

import os
import re
import subprocess
import sys

import pytest

import v2drop_kernels
from v2drop_kernels import native
from v2drop_kernels.cli import main as cli


def _run(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "v2drop_kernels", *args], capture_output=True, text=True, env={**os.environ, **env}, check=False
    )


def test_info_names_versions_backends_and_reasons(capsys, monkeypatch):
    monkeypatch.delenv("V2DROP_BACKEND", raising=False)
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^triton +\d+\.\d+", out, flags=re.MULTILINE)
    assert f"v2drop-kernels  {v2drop_kernels.__version__} " in out
    assert f"instruction set {native.isa()} " in out
    cpu, cuda = out.split("\n\n")[1:]
    assert cpu.splitlines()[0] == "cpu tensors"
    assert cpu.splitlines()[1].split() == ["cpu", "runs"]
    assert "triton      serves GPU tensors; cpu tensors only under TRITON_INTERPRET=1" in cpu
    assert "cuda        serves CUDA tensors, not cpu" in cpu
    assert "cpu         serves cpu tensors, not cuda" in cuda
    assert f"CUDA kernels    {native.cuda_archs() or 'none'}\n" in out


def test_info_says_why_a_forced_backend_cannot_serve(capsys, monkeypatch):
    monkeypatch.setenv("V2DROP_BACKEND", "triton")
    assert cli.main(["info"]) == 0
    assert "backend 'triton' cannot serve cpu tensors of torch.float32: serves GPU tensors" in capsys.readouterr().out


def test_info_with_an_unknown_forced_backend(capsys, monkeypatch):
    monkeypatch.setenv("V2DROP_BACKEND", "fpga")
    assert cli.main(["info"]) == 0
    assert "V2DROP_BACKEND must be one of 'triton', 'cuda', 'cpu', 'reference', got 'fpga'" in capsys.readouterr().out


def test_as_a_process():
    done = _run("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("v2drop-kernels ")


def test_a_backend_that_cannot_serve_is_one_line():
    done = _run("demo", "china", "--width", "128", "--device", "cpu", "--backend", "triton", TRITON_INTERPRET="0")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m v2drop_kernels demo: error: backend 'triton' cannot serve cpu tensors")


@pytest.mark.parametrize("args", [[], ["none"], ["info", "--no-such-option"], ["demo", "--preset", "1"], ["demo", "--seed", "-1"]])
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("args", [["--help"], ["info", "--help"], ["demo", "--help"]])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


RUN = "import sys\nsys.exit(7 if sys.argv[1:] == ['--help', '-x', 'a b'] else 1)\n"


def checkout(path, project="v2drop-kernels"):
    """A folder with the files by which a checkout is recognised."""
    for folder in ("csrc", "bench"):
        (path / folder).mkdir(parents=True)
    (path / "bench" / "run.py").write_text(RUN)
    (path / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    return path


@pytest.mark.parametrize("beside", [None, "other"])
def test_bench_runs_nothing_of_the_current_folder(beside, capsys, monkeypatch, tmp_path):
    """Not even a checkout: whoever unpacked it there need not be whoever calls. Nor what another project left in site-packages."""
    site = tmp_path / "site-packages"
    if beside:
        checkout(site, beside)
    monkeypatch.setattr(cli, "_PACKAGE", site / "v2drop_kernels")
    monkeypatch.chdir(checkout(tmp_path / "here"))
    assert cli.main(["bench", "--help", "-x", "a b"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("run `make bench` in a checkout of the sources")


def test_bench_passes_arguments_and_exit_code_on(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_PACKAGE", checkout(tmp_path / "here") / "v2drop_kernels")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--help", "-x", "a b"]) == 7
