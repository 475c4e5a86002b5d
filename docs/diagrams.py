"""The diagrams of the documentation, drawn as plain SVG: boxes, arrows and text, no library and no script in the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

FONT = 13
WIDE = 0.56 * FONT  # of a character, roughly
INK, SOFT, LINE = "#1f2430", "#5b6472", "#8a93a3"
FILL = {"plain": "#f4f6fb", "blue": "#dfe8ff", "green": "#dff3e4", "amber": "#fff0d0", "red": "#fde2e0", "white": "#ffffff"}


class Drawing:
    """An SVG under construction; lengths are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.parts = (width, height), title, [""]

    def text(
        self, x: float, y: float, words: str, *, size: int = FONT, anchor: str = "middle", weight: str = "normal", ink: str = INK
    ) -> None:
        style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{ink}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>')

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str], fill: str = "plain", bold: bool = True
    ) -> None:
        """A rounded box with centred lines, the first one bold."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"'
        self.parts.append(f'<rect {shape} fill="{FILL[fill]}" stroke="{LINE}"/>')
        step = 17
        top = y + height / 2 - step * (len(lines) - 1) / 2 + 4.5
        for i, line in enumerate(lines):
            first = i == 0 and bold
            self.text(x + width / 2, top + i * step, line, size=FONT if i == 0 else FONT - 1, weight="bold" if first else "normal",
                      ink=INK if i == 0 else SOFT)  # fmt: skip

    def arrow(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke="{SOFT}" stroke-width="1.4" fill="none"{dash} marker-end="url(#tip)"/>'
        )

    def svg(self) -> str:
        width, height = self.size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'font-family="ui-sans-serif, Helvetica, Arial, sans-serif">\n<title>{escape(self.title)}</title>\n'
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{SOFT}"/></marker></defs>\n'
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        )
        return "\n".join([head, *self.parts[1:], "</svg>\n"])


def floors() -> str:
    """The folders of the package; imports go down only."""
    d = Drawing(760, 496, "Floors of the package: imports go down only")
    rows = [
        ("amber", [("cli  ·  plot  ·  demo", "commands, pictures, the demonstration")]),
        ("amber", [("models", "TokenDropper: sessions, adapters/ per family, policies/ per method")]),
        ("blue", [("distributed", "sequences sharded over ranks: collectives, selection, rebalancing")]),
        ("blue", [("ops/<op>", "public function, reference, Triton, native call, registration, gradient")]),
        (
            "green",
            [
                ("backends", "protocol, choice and explanation, launch helpers, configurations"),
                ("interop", "NumPy, DLPack, JAX: no torch"),
            ],
        ),
        (
            "plain",
            [
                ("core", "no framework: layout, plan, argument rules, nested structures, budgets"),
                ("native.py", "loads the C++ library"),
            ],
        ),
        ("plain", [("csrc", "libv2drop behind v2drop.h: one entry point per op, CPU and CUDA")]),
    ]
    y, height = 20, 50
    for fill, boxes in rows:
        x, total = 20.0, 720
        widths = [total] if len(boxes) == 1 else [470, total - 470 - 14]
        for (name, about), width in zip(boxes, widths, strict=True):
            d.box(x, y, width, height, [name, about], fill)
            x += width + 14
        if y > 20:
            d.arrow(200, y - 18, 200, y - 1)
        y += height + 18
    d.arrow(640, 20 + 5 * 68 - 18, 640, 20 + 5 * 68 - 1)
    return d.svg()


def call() -> str:
    """How a call runs."""
    d = Drawing(860, 350, "How a call of drop_tokens runs")
    d.box(20, 20, 190, 70, ["public function", "checks shapes and dtypes,", "names the wrong argument"], "blue")
    d.box(250, 20, 170, 70, ["plan", "one row of integers", "per segment, on the host"], "plain")
    d.box(460, 20, 160, 70, ["request", "source, plan, mask,", "gathers, options"], "plain")
    d.box(660, 20, 180, 70, ["choice of the backend", "supports(request):", "None, or a reason"], "green")
    for x1, x2 in ((210, 250), (420, 460), (620, 660)):
        d.arrow(x1, 55, x2 - 2, 55)
    d.box(130, 125, 270, 46, ["eager", "a direct call"], "white")
    d.box(460, 125, 270, 46, ["torch.compile, torch.export", "one operator torch.ops.v2drop.*"], "white")
    d.arrow(700, 90, 402, 130)
    d.arrow(740, 90, 640, 123)
    backends = [
        ("reference", "plain PyTorch, any device"),
        ("cpu", "C++, AVX-512 or AVX2"),
        ("triton", "CUDA and ROCm"),
        ("cuda", "CUDA C++"),
    ]
    d.parts.append(f'<rect x="20" y="205" width="820" height="66" rx="6" fill="#ffffff" stroke="{LINE}" stroke-dasharray="4 3"/>')
    for i, (name, about) in enumerate(backends):
        d.box(30 + i * 203, 213, 191, 50, [name, about], "amber")
    d.arrow(265, 171, 265, 203)
    d.arrow(595, 171, 595, 203)
    d.box(190, 300, 480, 36, ["result: kept rows, every gathered tensor, the layout of the next stage"], "blue")
    d.arrow(430, 271, 430, 298)
    return d.svg()


def segment() -> str:
    """The eight columns of the segment table."""
    d = Drawing(860, 300, "One row of the segment table")
    x0, unit, y_in, y_out = 60, 11, 70, 190
    parts = [
        ("n_prefix = 8, kept", 8, "plain"),
        ("n = 40 competing rows, of which k = 12 survive", 40, "amber"),
        ("n_suffix = 9, kept", 9, "plain"),
    ]
    x, edges = x0, [x0]
    for label, n, fill in parts:
        d.box(x, y_in, n * unit, 44, [], fill)
        d.text(x + n * unit / 2, y_in - 10, label, size=12)
        x += n * unit
        edges.append(x)
    d.text(x0 - 8, y_in + 27, "in", anchor="end", weight="bold")
    d.text(x0 - 8, y_out + 27, "out", anchor="end", weight="bold")
    d.text(x0 - 4, y_in + 70, "src_start", size=12, ink=SOFT, anchor="end")
    d.arrow(x0 + 2, y_in + 72, x0 + 2, y_in + 46)
    for i in (2, 3, 7, 11, 12, 13, 18, 22, 27, 31, 36, 38):
        left = edges[1] + i * unit
        d.parts.append(f'<rect x="{left:g}" y="{y_in}" width="{unit}" height="44" fill="#e8a317"/>')
    out = [(3, "red"), (8, "plain"), (12, "amber"), (9, "plain"), (4, "red")]
    x, starts = x0, []
    for n, fill in out:
        d.box(x, y_out, n * unit, 44, [], fill)
        starts.append(x)
        x += n * unit
    ends = x
    d.text(x0 - 4, y_out + 70, "dst_start", size=12, ink=SOFT, anchor="end")
    d.arrow(x0 + 2, y_out + 72, x0 + 2, y_out + 46)
    for left, n, label in ((starts[0], 3, "pad_before"), (starts[4], 4, "pad_after")):
        d.text(left + n * unit / 2 + (26 if label == "pad_before" else 0), y_out + 62, label, size=11, ink="#a33")
    d.arrow(edges[0] + 44, y_in + 44, starts[1] + 44, y_out - 2)
    d.arrow(edges[1] + 220, y_in + 44, starts[2] + 66, y_out - 2)
    d.arrow(edges[2] + 50, y_in + 44, starts[3] + 50, y_out - 2)
    d.text(ends + 20, y_out + 18, "The segments of a batch entry tile its rows, in the input", size=12, anchor="start", ink=SOFT)
    d.text(ends + 20, y_out + 36, "and in the output. Padding rows hold the fill value.", size=12, anchor="start", ink=SOFT)
    return d.svg()


def engine() -> str:
    """The parts of the model engine and what passes between them."""
    d = Drawing(860, 360, "The parts of TokenDropper")
    d.box(20, 30, 180, 60, ["TokenDropper", "frozen options"], "blue")
    d.box(250, 30, 200, 60, ["DropSession", "hooks, report(), kept()"], "blue")
    d.box(500, 30, 150, 60, ["prefill", "drops at each stage"], "amber")
    d.box(690, 30, 150, 60, ["decode", "masks of later steps"], "amber")
    d.box(500, 140, 150, 60, ["policy", "scores, or merging"], "green")
    d.box(690, 140, 150, 60, ["caches", "rows kept per layer"], "plain")
    d.box(250, 140, 200, 60, ["model adapter", "all use of transformers"], "plain")
    d.box(20, 140, 180, 60, ["Hugging Face model", "unmodified"], "white")
    d.box(
        250, 260, 590, 60, ["ops: drop_tokens, attention_score, compact_, ...", "one call per stage for the whole batch"], "green"
    )
    down = [(x, 90, x, 138) for x in (350, 575, 765)] + [(x, 200, x, 258) for x in (575, 765)]
    for a in [(200, 60, 248, 60), (450, 60, 498, 60), (250, 170, 202, 170), (650, 80, 700, 138), *down]:
        d.arrow(*a)
    d.text(110, 225, "forward hooks exist only", size=12, ink=SOFT)
    d.text(110, 242, "inside the with block", size=12, ink=SOFT)
    return d.svg()


def all_of_them() -> dict[str, str]:
    """Name of the file to its text."""
    return {"floors": floors(), "call": call(), "segment": segment(), "engine": engine()}
