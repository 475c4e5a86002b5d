"""What is written: a CSV row per run, a table, what the papers' orderings come to, and two plots."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import measure
from measure import BIAS_BUDGET, COLUMNS, NEEDS_MORE, PAPERS, POLICIES, POSITIONS, SHAPES, Run
from tasks import Task

from v2drop_kernels import plot

L2, ATTENTION = "variation L2", "last-token attention"
PLAIN = ("progressive", "persistent")
# (what a paper says is better, than what, who says so); each side is a policy, a shape and a mode of position ids.
CLAIMS = (
    ((L2, *PLAIN), ("variation L1", *PLAIN), "V2Drop"),
    ((L2, *PLAIN), ("variation cosine", *PLAIN), "V2Drop"),
    ((L2, *PLAIN), (ATTENTION, *PLAIN), "V2Drop"),
    (("variation L1", *PLAIN), (ATTENTION, *PLAIN), "V2Drop"),
    (("variation cosine", *PLAIN), (ATTENTION, *PLAIN), "V2Drop"),
    ((L2, *PLAIN), (L2, "one-time", "persistent"), "V2Drop"),
    ((ATTENTION, *PLAIN), (ATTENTION, "progressive", "compacted"), "HiDivDrop"),
    ((L2, *PLAIN), (L2, "progressive", "compacted"), "HiDivDrop, there for attention"),
    ((L2, *PLAIN), ("random", *PLAIN), "all"),
    ((ATTENTION, *PLAIN), ("random", *PLAIN), "all"),
)
Key = tuple[str, str, str]


def write(folder: Path, task: Task, undropped: Run, runs: Sequence[Run], conditions: dict[str, str], command: str) -> None:
    """accuracy.csv, accuracy.md, accuracy.png, methods.png and bias.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "accuracy.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, (*COLUMNS, *conditions), restval="", lineterminator="\n")
        out.writeheader()
        for done in (undropped, *runs):
            out.writerow({**measure.row(task, done, undropped), **conditions})
    pictures = []
    if accuracy_plot(runs, undropped, task, folder / "accuracy.png"):
        pictures.append("![Accuracy over the budget](accuracy.png)")
    if methods_plot(runs, undropped, task, folder / "methods.png"):
        pictures.append("![Methods of the papers](methods.png)")
    if bias_plot(runs, task, folder / "bias.png"):
        pictures.append("![Positional bias](bias.png)")
    sections = [
        f"# Accuracy with dropped vision tokens: {task.about}",
        f"{', '.join(f'{k} {v}' for k, v in conditions.items())}. Made by `{command}`.",
        f"Nothing dropped: **{_accuracy([undropped])} %** right (standard error {_error(undropped):.1f}). Drops before the "
        f"0-based layers {', '.join(map(str, task.layers))} of {task.depth} (one-time: {task.layers[0]}), "
        f"{task.vision_tokens[0]} vision tokens. A budget is the mean share of the vision tokens that enters a block, from the "
        "first drop on; every stage keeps the same share, but with an exit the last one keeps a single token. Decoding is greedy "
        "and prompts of one length run together, so neither sampling nor padding plays a part.",
        "## Accuracy, percent",
        "In brackets: answers equal to those of the undropped model. Random: mean over the seeds, and their range.",
        _table(_keys(runs), runs, undropped, _name),
        *_papers(runs, undropped),
        *pictures,
        "## Relevant tokens kept, percent",
        "Of the vision tokens that a question is about: left after the first drop / after the last. Random keeps the share of "
        "all tokens that is left."
        if any(item.relevant is not None for item in task.items)
        else "The questions do not say which tokens are relevant.",
        _relevant(task, runs),
        "## Orderings that the papers report",
        "Accuracy of the first less that of the second in points, paired by question, with its standard error. An ordering holds "
        "or fails where the difference is over two standard errors; else these questions cannot tell.",
        _claims(runs),
        "## Share kept per tenth of the sequence, percent",
        f"After one drop at layer {task.layers[0]} that keeps {BIAS_BUDGET:g} % of the tokens, first tenth to last.",
        _tenths(task, runs),
    ]  # fmt: skip
    (folder / "accuracy.md").write_text("\n\n".join(section for section in sections if section) + "\n")


def _of(runs: Iterable[Run], key: Key, budget: float) -> list[Run]:
    return [
        r for r in runs if r.method and (r.method.policy, r.method.shape, r.method.positions) == key and r.method.budget == budget
    ]


def _keys(runs: Iterable[Run]) -> list[Key]:
    present = {(r.method.policy, r.method.shape, r.method.positions) for r in runs if r.method and r.method.budget != BIAS_BUDGET}
    return [(p, s, i) for s in SHAPES for i in POSITIONS for p in POLICIES if (p, s, i) in present]


def _paper_keys(runs: Iterable[Run]) -> list[Key]:
    present = {r.method.policy for r in runs if r.method}
    return [(name, *home[:2]) for name, home in PAPERS.items() if name in present]


def _budgets(runs: Iterable[Run]) -> list[float]:
    return sorted({r.method.budget for r in runs if r.method and r.method.budget != BIAS_BUDGET}, reverse=True)


def _each(runs: Sequence[Run]) -> list[float]:
    return [100 * statistics.mean(r.right) for r in runs]


def _accuracy(runs: Sequence[Run]) -> str:
    each = _each(runs)
    spread = f" ({min(each):.1f} to {max(each):.1f})" if len(each) > 1 else ""
    return f"{statistics.mean(each):.1f}{spread}"


def _error(done: Run) -> float:
    share = statistics.mean(done.right)
    return 100 * math.sqrt(share * (1 - share) / len(done.right))


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [list(head), ["---", *("---:" for _ in head[1:])], *map(list, lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _name(key: Key) -> str:
    return f"{key[1]}, {key[2]} ids, {key[0]}"


def _papers(runs: Sequence[Run], undropped: Run) -> list[str]:
    keys = _paper_keys(runs)
    if not keys:
        return []
    return [
        "## Methods of the papers, percent",
        "Each in the shape and with the ids that it was published with, at the layers and budgets above. Methods before the "
        "decoder keep as many tokens as the others have in the mean over all blocks, so that a column compares equal costs; two "
        "can only come near: DART keeps 4 + 8 m tokens, at most as many as it may, and VTW leaves at the nearest block. Not here: "
        + "; ".join(f"{name} ({why})" for name, why in NEEDS_MORE.items())
        + ".",
        _table(keys, runs, undropped, lambda key: f"{key[0]}: {key[1]}, {key[2]} ids"),
    ]


def _table(keys: Sequence[Key], runs: Sequence[Run], undropped: Run, name: Callable[[Key], str]) -> str:
    def cell(key: Key, budget: float) -> str:
        found = _of(runs, key, budget)
        if not found:
            return "-"
        agree = [100 * statistics.mean(a == b for a, b in zip(r.answers, undropped.answers, strict=True)) for r in found]
        return f"{_accuracy(found)} [{statistics.mean(agree):.1f}]"

    budgets = _budgets(runs)
    return _markdown(["method", *(f"{b:g} %" for b in budgets)], ([name(key), *(cell(key, b) for b in budgets)] for key in keys))


def _relevant(task: Task, runs: Sequence[Run]) -> str:
    def cell(key: Key, budget: float) -> str:
        found = _of(runs, key, budget)
        shares = [[measure.relevant_share(task, r.kept, stage) or 0.0 for r in found] for stage in (0, -1)]
        return " / ".join(f"{100 * statistics.mean(x):.1f}" for x in shares) if found else "-"

    if all(item.relevant is None for item in task.items):
        return ""
    budgets = _budgets(runs)
    keys = [key for key in _keys(runs) if key[2] == "persistent"]  # the first drop is the same for all modes of position ids
    return _markdown(["method", *(f"{b:g} %" for b in budgets)], ([_name(k), *(cell(k, b) for b in budgets)] for k in keys))


def verdict(points: float, error: float) -> str:
    """In one word whether a difference supports what was claimed to be positive."""
    if abs(points) <= 2 * error:
        return "open"
    return "holds" if points > 0 else "fails"


def _claims(runs: Sequence[Run]) -> str:
    budgets = _budgets(runs)
    lines = []
    for better, worse, who in CLAIMS:
        cells = []
        for budget in budgets:
            a, b = _of(runs, better, budget), _of(runs, worse, budget)
            if a and b:
                points, error = measure.difference(a, b)
                cells.append(f"{points:+.1f} ± {error:.1f} {verdict(points, error)}")
            else:
                cells.append("-")
        if set(cells) != {"-"}:
            differing = [i for i in range(3) if better[i] != worse[i]]
            what = " and ".join(f"{better[i]} over {worse[i]}" for i in differing)
            shared = "" if differing == [0] else f" ({better[0]})"
            lines.append([f"{what}{shared}: {who}", *cells])
    return _markdown(["ordering", *(f"{b:g} %" for b in budgets)], lines) if lines else ""


def _bias_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found = {policy: _of(runs, (policy, "one-time", "persistent"), BIAS_BUDGET) for policy in POLICIES}
    return {policy: some for policy, some in found.items() if some}


def _tenths(task: Task, runs: Sequence[Run]) -> str:
    lines = []
    for policy, some in _bias_runs(runs).items():
        kept = [stages[0] for r in some for stages in r.kept]
        lines.append([policy, *(f"{100 * x:.1f}" for x in plot.retention(kept, list(task.vision_tokens) * len(some)))])
    return _markdown(["policy", *map(str, range(1, 11))], lines) if lines else ""


def bias_plot(runs: Sequence[Run], task: Task, path: Path) -> bool:
    """V2Drop's figure on positional bias; False when there is nothing to draw."""
    found = _bias_runs(runs)
    if not found:
        return False
    kept = {policy: [stages[0] for stages in some[0].kept] for policy, some in found.items()}
    title = f"kept at layer {task.layers[0]}, of each tenth of the vision tokens"
    plot.positional_bias(kept, list(task.vision_tokens), title=title, caption=task.about).savefig(path, dpi=110)
    return True


def methods_plot(runs: Sequence[Run], undropped: Run, task: Task, path: Path) -> bool:
    """Accuracy of the papers' methods over the budget; False when there is nothing to draw."""
    from matplotlib.figure import Figure

    keys, budgets = _paper_keys(runs), _budgets(runs)
    if not keys:
        return False
    figure = Figure(figsize=(8, 4.6), dpi=110, facecolor="white", layout="constrained")
    axis = figure.subplots()
    axis.axhline(100 * statistics.mean(undropped.right), color="0.5", linestyle="--", linewidth=0.8, label="nothing dropped")
    shapes = list(dict.fromkeys(key[1] for key in keys))
    for number, key in enumerate(keys):
        found = [(b, statistics.mean(_each(some))) for b in budgets if (some := _of(runs, key, b))]
        style = ("-", "--", ":", "-.")[shapes.index(key[1]) % 4]
        axis.plot(
            *zip(*found, strict=True), style, label=f"{key[0]} ({key[1]})", color=f"C{number % 10}", marker="os^Dv"[number // 10]
        )
    axis.set(
        xlabel="mean share of the vision tokens from the first drop on, %", ylabel="accuracy, %", ylim=(-2, 102), title=task.about
    )
    axis.set_xticks(budgets, [f"{b:g}" for b in budgets])
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path)
    return True


def accuracy_plot(runs: Sequence[Run], undropped: Run, task: Task, path: Path) -> bool:
    """Accuracy over the budget, a panel per shape and mode of position ids; False when there is nothing to draw."""
    from matplotlib.figure import Figure

    keys, budgets = _keys(runs), _budgets(runs)
    shapes, ids = (list(dict.fromkeys(key[part] for key in keys)) for part in (1, 2))
    if not keys:
        return False
    figure = Figure(figsize=(1 + 2.9 * len(shapes), 0.7 + 2.6 * len(ids)), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(len(ids), len(shapes), sharex=True, sharey=True, squeeze=False)
    for axis, (mode, shape) in zip(axes.flat, itertools.product(ids, shapes), strict=True):
        axis.axhline(100 * statistics.mean(undropped.right), color="0.5", linestyle="--", linewidth=0.8, label="nothing dropped")
        for number, policy in enumerate(POLICIES):
            found = [(b, _each(some)) for b in budgets if (some := _of(runs, (policy, shape, mode), b))]
            if found:
                at, each = zip(*found, strict=True)
                axis.plot(
                    at, list(map(statistics.mean, each)), label=policy, color=f"C{number}", marker="os^Dv"[number], markersize=4
                )
                axis.fill_between(at, list(map(min, each)), list(map(max, each)), color=f"C{number}", alpha=0.15, linewidth=0)
        axis.set_title(f"{shape}, {mode} ids", fontsize=8)
        axis.set_xticks(budgets, [f"{b:g}" for b in budgets])
        axis.set_ylim(-2, 102)
        axis.grid(alpha=0.3)
    figure.supylabel("accuracy, %", fontsize=9)
    figure.supxlabel("mean share of the vision tokens from the first drop on, %", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(task.about, fontsize=9)
    figure.savefig(path)
    return True
