"""README and docs: their code runs, their tables are those of the code, and what they name exists."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import v2drop_kernels as vk

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [README, ROOT / "CONTRIBUTING.md", *PAGES]
RUN_ELSEWHERE = {"linking.md", "contributing.md"}  # by the tests of linking, and by those of the methods
IMAGE, VIDEO, PATCHES = 90, 91, 16
name_of = lambda path: str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


class Processor:
    """In place of a checkpoint's processor: fixed words, and pictures of 16 patches, in the shapes that the models take."""

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, padding: bool = False, return_tensors: str = "pt"
    ) -> Any:
        from transformers import BatchFeature

        prompts = [text] if isinstance(text, str) else text
        rows = [[1, *self.tokens(prompt)] for prompt in prompts]
        width = max(map(len, rows))
        found = {
            "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        }
        draw = torch.Generator().manual_seed(0)
        if videos:
            found["pixel_values_videos"] = torch.randn(len(videos), len(videos[0]), 3, 28, 28, generator=draw)
        else:
            count = len(images) if isinstance(images, list) else 1
            found["pixel_values"] = torch.randn(count, 3, 28, 28, generator=draw)
        return BatchFeature(found)

    @staticmethod
    def tokens(prompt: str) -> list[int]:
        words = re.findall(r"<image>|<video>|\w+", prompt)
        vision = {"<image>": [IMAGE] * PATCHES, "<video>": [VIDEO] * (4 * PATCHES // 4 + 1)}
        return [token for word in words for token in vision.get(word, [3 + sum(map(ord, word)) % 80])]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return f"{len(ids)} tokens"


def model(kind: str) -> Any:
    """A model of 24 narrow blocks, deep enough for the presets."""
    import transformers as tf

    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    text = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llava":
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**tower), text_config=tf.LlamaConfig(**text), image_token_index=IMAGE
        )
        return tf.LlavaForConditionalGeneration(config).eval()
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**tower, vision_use_head=False), text_config=tf.Qwen2Config(**text),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[28, 56], [56, 28]],
    )  # fmt: skip
    return tf.LlavaOnevisionForConditionalGeneration(config).eval()


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``from_pretrained`` gives narrow models, and the working directory has two photos."""
    import transformers as tf
    from PIL import Image

    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", lambda name: Processor())
    monkeypatch.setattr(tf.LlavaForConditionalGeneration, "from_pretrained", lambda name, **_: model("llava"))
    monkeypatch.setattr(tf.LlavaOnevisionForConditionalGeneration, "from_pretrained", lambda name, **_: model("onevision"))
    monkeypatch.chdir(tmp_path)
    for photo in ("photo.jpg", "other.jpg"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / photo)


def run(path: Path) -> dict[str, Any]:
    """Every Python block of a page, in order, in one namespace."""
    names: dict[str, Any] = {}
    for block in blocks(path, "python"):
        exec(compile(block, name_of(path), "exec"), names)
    return names


def test_the_first_code_of_the_readme_drops_tokens_in_a_model(checkpoints: None, capsys: pytest.CaptureFixture[str]):
    first, *_ = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert first[0] == "python"
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 12
    names = run(README)
    out = capsys.readouterr().out
    assert f"{names['answer'].shape[1]} tokens" in out
    assert names["session"].report().layers[23].vision == (1,)
    assert names["session"].report().layers[1].vision == (PATCHES,)  # the preset for 32 blocks at its shares of 24


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 110 and not line.startswith("|")] == []


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python") and p.name not in RUN_ELSEWHERE], ids=name_of)
def test_code_on_the_pages_runs(checkpoints: None, path: Path):
    names = run(path)
    if path.name == "getting-started.md":
        assert tuple(names["step"].hidden.shape) == (2, 352, 1024)
        assert names["later"].layout.spans == (((35, 121),),) * 2
        assert [stage.keep for stage in names["learned"].stages] != [0.5, 0.5]


def test_the_method_on_the_page_of_contributing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (block,) = blocks(ROOT / "docs" / "contributing.md", "python")
    (tmp_path / "keynorm.py").write_text(block)
    monkeypatch.setattr(vk.models.policies, "__path__", [*vk.models.policies.__path__, str(tmp_path)])
    schedule = vk.Schedule((vk.Stage(2, 0.5, policy="keynorm", options={"norm": "l1"}),))
    inputs = Processor()(None, "<image>\nWhat is it?")
    try:
        net = model("llava")
        with torch.no_grad(), vk.models.TokenDropper(schedule)(net) as session:
            net(**inputs)
            assert session.report().layers[2].vision == (PATCHES // 2,)
    finally:
        sys.modules.pop("v2drop_kernels.models.policies.keynorm", None)


def test_the_c_code_on_the_page_of_linking_is_that_of_the_example():
    (block,) = blocks(ROOT / "docs" / "linking.md", "c")
    example = {line.strip() for line in (ROOT / "examples" / "c" / "drop.c").read_text().splitlines()}
    assert [line for line in block.splitlines() if line.strip() not in example] == []


def test_generated_parts_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_on_the_page_of_ops_or_models():
    text = "".join((ROOT / "docs" / page).read_text() for page in ("ops.md", "models.md"))
    named = set(re.findall(r"^::: v2drop_kernels\.([\w.]+)", text, re.MULTILINE))
    public = {*vk.__all__, *(f"models.{name}" for name in vk.models.__all__)}
    modules = {"models", "plot", "positions", "reference", "schedule"}
    deprecated = {name for name in public if "Deprecated" in (getattr(getattr(vk, name, None), "__doc__", "") or "")}
    assert sorted(public - named - modules - deprecated) == []


def sources() -> list[Path]:
    """What is built or run: no test, no page, no result."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    kinds = (".py", ".cpp", ".cu", ".h", ".cuh", ".cmake", ".txt", ".sh", "Makefile", "run", ".toml")
    return [ROOT / path for path in listed if path.endswith(kinds) and not path.startswith(("tests/", "csrc/tests/", "docs/"))]


def test_every_environment_variable_is_documented():
    reads = re.compile(
        r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*[\"'](\w+)|getenv\([\"'](\w+)|\$\{?(V2DROP_\w+)|ENV\{(\w+)\}|option\((V2DROP_\w+)"
        r"|set\((V2DROP_\w+) [^)]*CACHE|^(V2DROP_\w+)=|-D(V2DROP_\w+)",
        re.MULTILINE,
    )
    named = set()
    for path in sources():
        if path.exists():
            named |= {name for match in reads.findall(path.read_text()) for name in match if name.startswith("V2DROP_")}
    internal = {name for name in named if re.fullmatch(r"V2DROP_(CUDA_MODE|CUDA_ARCHITECTURES|CUDA_ARCHS_STRING|ISA_\w+)", name)}
    assert len(named) >= 8
    text = (ROOT / "docs" / "environment.md").read_text()
    assert sorted(name for name in named - internal if f"`{name}`" not in text) == []


GENERATED = ("keynorm.py", "build/", "dist/", ".venv", "bench/results/NAME", "v2drop_kernels/lib", "v2drop_kernels/include")
PATHLIKE = re.compile(r"^[\w.<>*{},-]+(/[\w.<>*{},-]+)+/?$|^[\w-]+\.(py|md|sh|toml|yml|txt|cpp|h|cu|cuh|csv|png|json)$")


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_every_path_that_a_page_names_exists(path: Path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        if not PATHLIKE.match(quoted) or quoted.startswith(GENERATED) or "<" in quoted or "NAME" in quoted:
            continue
        parts = re.split(r"\{([^}]*)\}", quoted)
        for alternative in parts[1].split(",") if len(parts) == 3 else [""]:
            name = quoted if len(parts) != 3 else f"{parts[0]}{alternative}{parts[2]}"
            if not list(ROOT.glob(name.rstrip("/"))) and not list(ROOT.glob(f"*/**/{name}")):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_every_link_leads_somewhere(path: Path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = path if not name else (path.parent / name)
        if not target.exists() or (
            anchor and anchor not in {slug(head) for head in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}
        ):
            broken.append(link)
    assert broken == []


def slug(head: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower())).strip("-")


def test_make_targets_and_commands_that_pages_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for path in WRITTEN for target in re.findall(r"`make ([\w-]+)", path.read_text())}
    assert named - targets == set()
    commands = {
        word for path in WRITTEN for word in re.findall(r"`(?:python -m v2drop_kernels|v2drop-kernels) (\w+)", path.read_text())
    }
    help_text = subprocess.run(
        [sys.executable, "-m", "v2drop_kernels", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    assert {word for word in commands if word not in help_text} == set()


def test_the_site_builds_without_warnings_and_asks_no_other_server(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(https?:)?//|<link[^>]*rel=\"(?:stylesheet|preconnect|icon)\"[^>]*href=\"(https?:)?//"
    )
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    assert [page.name for page in pages if loads.search(page.read_text())] == []


def test_diagrams_are_generated_for_every_svg():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        drawn = importlib.import_module("diagrams").all_of_them()
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert {path.stem for path in (ROOT / "docs" / "assets").glob("*.svg")} == set(drawn)
