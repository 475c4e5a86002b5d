"""The command line: ``python -m v2drop_kernels info | demo | methods | models | bench | config``.

Exit codes: 0 for success, 1 for a wrong result, 2 for a wrong argument or something missing (one line on stderr). ``bench`` returns
the exit code of the benchmark script.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from . import config

_PACKAGE = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    program = "v2drop-kernels" if Path(sys.argv[0]).name == "v2drop-kernels" else "python -m v2drop_kernels"
    parser = argparse.ArgumentParser(prog=program, description="Drop vision tokens: what runs here, a demo, benchmarks.")
    parser.add_argument("--version", action="version", version=f"v2drop-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("info", help="versions, backends with reasons, instruction set, GPU", description="What runs here.")
    demo_parser = commands.add_parser(
        "demo",
        help="question the small trained model with and without drops, or drop the tokens of a photo",
        description="Put a question about a picture to the small trained model of a source checkout, with and without drops. "
        "With a photo: run it through a LLaVA-shaped decoder (random weights) that drops at three layers, and check and time every "
        "stage. Both write a picture of what was kept. Exit code 1 if a result differs from the PyTorch reference.",
    )
    commands.add_parser("methods", help="a table of all methods, in Markdown", description="Print a table of all methods.")
    _add_models(commands)
    commands.add_parser("bench", help="run the benchmarks of a source checkout; arguments are passed on", add_help=False)
    config_parser = commands.add_parser(
        "config",
        help="paths and flags for programs that link libv2drop",
        description="Print where the C library of this installation lies, or the flags that compile and link with it.",
    )
    config.add_arguments(config_parser)
    expected: tuple[type[Exception], ...] = (ImportError, RuntimeError, ValueError)
    try:
        if argv[:1] == ["demo"]:  # imports torch, which `config` does without
            from . import demo

            demo.add_arguments(demo_parser)
            expected = (*expected, demo.DemoError)
        args, rest = parser.parse_known_args(argv)
        if rest and args.command != "bench":
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if args.command == "info":
            return info()
        if args.command == "config":
            return config.run(args)
        if args.command == "methods":
            return methods()
        if args.command == "models":
            return models(args.types)
        return demo.run(args) if args.command == "demo" else bench(rest)
    except expected as error:
        line = " ".join(str(error).split())
        print(f"{program} {argv[0]}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def info() -> int:
    """Print what runs here."""
    import torch

    from .. import native
    from ..backends.choice import explain

    built, reason = native.available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    toolkits = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built_for = " ".join(f"{name} {version}" for name, version in toolkits.items() if version) or "no GPU"
    lines = {
        "v2drop-kernels": f"{__version__} in {_PACKAGE}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built for {built_for}",
        "triton": _version_of("triton"),
        "native library": native.version() if built else reason,
        "instruction set": f"{native.isa()} (native library)" if built else "-",
        "CUDA kernels": (native.cuda_archs() if built else "") or "none",
        "threads": str(torch.get_num_threads()),
        "GPU": ", ".join(gpus) or "none",
    }
    for name, value in lines.items():
        print(f"{name:<16}{value}")
    for device in ("cpu", "cuda"):
        print(f"\n{device} tensors" + (" (there are none here)" if device == "cuda" and not gpus else ""))
        try:
            found = explain(device=device)
        except (RuntimeError, ValueError) as error:  # a backend is forced that cannot serve
            print(f"  {error}")
            continue
        print(f"  {found.chosen:<12}runs")
        for name, why in found.rejected.items():
            print(f"  {name:<12}{why}")
    return 0


def _add_models(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        help="which models of the installed transformers can drop tokens, in Markdown",
        description="Judge every image-text-to-text type of the installed transformers by the model of its default config, which "
        "takes no memory, and print a table: served, served with spans=, or refused and why. Takes half a minute.",
    )
    parser.add_argument("types", nargs="*", help="config.model_type of the models to judge; all by default")


def methods() -> int:
    """Print the table of methods."""
    from ..models import methods as table

    print(table.markdown())
    return 0


def models(types: Sequence[str]) -> int:
    """Print which models can drop tokens."""
    from ..models import support

    print(support.markdown(types or None))
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmark suite of the checkout that this package lies in, never one of the current folder."""
    root = _PACKAGE.parent
    script, project = root / "bench" / "run.py", root / "pyproject.toml"
    if script.is_file() and project.is_file() and 'name = "v2drop-kernels"' in project.read_text():
        return subprocess.run([sys.executable, str(script), *arguments], check=False).returncode
    raise RuntimeError("the benchmarks are not in the installed package: run `make bench` in a checkout of the sources")


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
