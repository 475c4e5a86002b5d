"""report.md and the plots of the GPU check, from the files that are there; nothing is typed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gpu_floors import floors_table
from gpu_outcomes import Outcomes
from tables import Row, conditions, duration, read, table

OWN = ("triton", "cuda", "cuda-cooperative", "cuda-fused", "cuda-separate", "reference")
OTHERS = {
    "eager": "eager, views", "v2drop": "V2Drop's code", "compile": "torch.compile", "compile-reduce-overhead": "reduce-overhead",
    "compile-max-autotune": "max-autotune", "topk+gather": "topk + gather", "copy": "copy", "one-block": "one block",
}  # fmt: skip


def latest(rows: list[Row], *key: str) -> list[Row]:
    """The last row of every key: rows are appended, and a later call may measure something again."""
    return list({tuple(row[name] for name in key): row for row in rows}.values())


def results_of(out: Path) -> list[Row]:
    """The valid rows of results.csv."""
    return latest(read(out / "results.csv"), "group", "mode", "provider") if (out / "results.csv").exists() else []


def targets_of(out: Path) -> list[Row]:
    """The valid rows of targets.csv."""
    return latest(read(out / "targets.csv"), "target", "what", "backend") if (out / "targets.csv").exists() else []


def targets_table(rows: list[Row]) -> str:
    """Every target and own backend: value, limit, verdict."""
    lines = []
    for row in rows:
        unit = "" if row["unit"] == "ratio" else row["unit"]
        value = f"{row['value']} {unit}".strip() if row["value"] else "-"
        lines.append([f"{row['target']}: {row['what']}", row["backend"] or "-", value, row["limit"], row["status"]])
    return table(["target", "backend", "value", "asked", "result"], lines)


def times_table(rows: list[Row]) -> str:
    """Every time that was taken."""
    lines = []
    for row in rows:
        shape = f"[{row['B']}, {row['N']}, {row['D']}] {row['dtype']}, k = {row['k']}"
        if row["median_us"]:
            spread = f"{duration(row['p20_us'])} to {duration(row['p80_us'])}"
            lines.append(
                [row["group"].split(" B")[0], shape, row["mode"], row["provider"], duration(row["median_us"]), spread, row["gb_s"]]
            )
        else:
            lines.append([row["group"].split(" B")[0], shape, row["mode"], row["provider"], row["check"], "", ""])
    return table(["group", "hidden", "mode", "provider", "median", "p20 to p80", "GB/s"], lines)


def drop_groups(rows: list[Row]) -> dict[tuple[str, str], tuple[dict[str, Row], dict[str, float]]]:
    """By shape and mode the rows of the whole step, and how many times longer others take than the fastest of ours beside them.

    torch.compile runs in groups of its own, beside times of ours that only its ratios come from.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        kind, _, shape = row["group"].partition(" ")
        if row["median_us"] and kind in ("drop", "compile", "max-autotune"):
            found.setdefault((shape, row["mode"]), {}).setdefault(kind, {})[row["provider"]] = row
    made = {}
    for key, kinds in found.items():
        ratios = {}
        for by in kinds.values():
            mine = min((float(by[name]["median_us"]) for name in OWN if name in by), default=math.nan)
            ratios |= {name: float(by[name]["median_us"]) / mine for name in OTHERS if name in by and not math.isnan(mine)}
        if any(name in kinds.get("drop", {}) for name in OWN):
            made[key] = kinds["drop"], ratios
    return made


def drop_table(rows: list[Row]) -> str:
    """The whole step: our times, and how many times longer the others take than the fastest of ours."""
    lines = []
    for (group, mode), (by, ratio) in drop_groups(rows).items():
        times = [duration(by[name]["median_us"]) if name in by else "-" for name in OWN]
        lines.append([group, mode, *times, *(f"{ratio[name]:.2f}x" if name in ratio else "-" for name in OTHERS)])
    return table(["drop_tokens", "mode", *OWN, *OTHERS.values()], lines)


def ncu_table(rows: list[Row]) -> str:
    """The counters of Nsight Compute, or why there are none."""
    columns = ("us", "dram_gb_s", "dram_percent", "l2_hit_percent", "registers", "occupancy_percent")
    lines = []
    for row in rows:
        shape = f"[{row['B']}, {row['N']}, {row['D']}]" if row["B"] else "-"
        if row["status"] == "measured":
            lines.append([row["backend"], shape, row["name"], *(row[c] or "-" for c in columns), row["commit"]])
        else:
            lines.append([row["backend"] or "-", shape, row["status"], *("" for _ in columns), row["commit"]])
    head = ["backend", "hidden", "kernel", "us", "DRAM GB/s", "% of peak", "% L2 hits", "registers", "% occupancy", "commit"]
    return table(head, lines)


def model_table(rows: list[dict[str, Any]]) -> str:
    """What the model level printed, a column for every name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return table(names, [[str(row.get(name, "-")) for name in names] for row in rows])


def policies(out: Path, env: dict[str, Any]) -> str:
    """What policies.md says below its title, and what became of it in this run."""
    why = env.get("policies", "not run yet")
    path = out / "policies.md"
    return f"In this run: {why}." + (f"\n\n{path.read_text().partition(chr(10))[2].strip()}" if path.exists() else "")


def readme(folder: Path) -> str:
    """The part of docs/results/gpu.md on one GPU."""
    results, targets = results_of(folder), targets_of(folder)
    if any(row["run"] != "full" for row in [*results, *targets]):
        raise SystemExit(f"{folder} does not hold a full measurement")
    others = ("copy", "eager", "compile", "compile-reduce-overhead", "v2drop", "topk+gather")
    lines = []
    for (_, mode), (by, ratio) in drop_groups(results).items():
        name = min((n for n in OWN if n in by), key=lambda n: float(by[n]["median_us"]))
        row = by[name]
        shape = f"[{row['B']}, {row['N']}, {row['D']}] {row['dtype']}, k = {row['k']}"
        lines.append(
            [
                shape,
                mode,
                name,
                duration(row["median_us"]),
                row["gb_s"],
                *(f"{ratio[n]:.2f}x" if n in ratio else "-" for n in others),
            ]
        )
    status = [row["status"] for row in targets]
    failed = [f"{row['target']} {row['backend']}: {row['what']} {row['value']} (asked {row['limit']})" for row in targets
              if row["status"] == "fail"]  # fmt: skip
    head = ["drop_tokens", "inputs", "fastest", "median", "GB/s", *(f"over {OTHERS[name]}" for name in others)]
    where = results[0] if results else targets[0]
    return "\n\n".join(
        [
            table(head, lines),
            f"GPU time of a captured graph, {where['gpu']}; ratios are those of times taken in turns. Of {len(targets)} targets "
            f"{status.count('pass')} pass, {len(failed)} fail{': ' + '; '.join(failed) if failed else ''}, "
            f"{len(targets) - status.count('pass') - len(failed)} are without a verdict.",
            f"Measured on {where['gpu']} ({conditions(where)}). "
            f"Everything: [bench/results/{folder.name}](../../bench/results/{folder.name}/report.md).",
        ]
    )


def sanitizer_table(rows: list[Row]) -> str:
    """What compute-sanitizer found."""
    return table(["tool", "backend", "result", "its last line", "commit"],
                 [[row[c] for c in ("tool", "backend", "status", "summary", "commit")] for row in rows])  # fmt: skip


def forbidden(outcomes: Outcomes, results: list[Row]) -> str:
    """Which figures failing tests forbid, including those that were measured before the test ran."""
    found = outcomes.forbidden(("triton", "cuda", "reference"), dict.fromkeys(row["op"] for row in results))
    if not found:
        return ""
    return "**Failing tests forbid these figures:** " + "; ".join(f"{op} of {b} ({test})" for (b, op), test in found.items()) + "."


def predictions(out: Path) -> str:
    """Times beside what bench/gpu_model.py predicted, and the constants that were fitted to them."""
    path = out / "predictions.csv"
    if not path.exists():
        return "Not compared yet: that is done when a call of the check ends."
    rows, fit = read(path), json.loads((out / "fitted.json").read_text())
    fitted = ", ".join(f"{name} {value:.4g}" for name, value in fit["constants"].items()) or "none"
    lines = [[row[name] for name in rows[0]] for row in rows]
    text = f"Predicted by `bench/gpu_model.py` as {fit['machine']}; predictions are no results. Fitted constants: {fitted}."
    return f"{text}\n\n{table(list(rows[0]), lines)}" if rows else text


def rewrite(out: Path) -> None:
    """report.md again, after a file beside it changed; nothing where no check has run."""
    if (out / "env.json").exists() and (out / "targets.csv").exists():
        write(out, json.loads((out / "env.json").read_text()), Outcomes(out / "tests.jsonl"))


def write(out: Path, env: dict[str, Any], outcomes: Outcomes) -> None:
    """report.md, as far as things are known."""
    results, targets = results_of(out), targets_of(out)
    dry = any(row["run"] == "dry" for row in [*results, *targets])
    ncu = read(out / "ncu.csv") if (out / "ncu.csv").exists() else []
    sanitizer = read(out / "sanitizer.csv") if (out / "sanitizer.csv").exists() else []
    model = [row for path in sorted(out.glob("model-*.json")) for row in json.loads(path.read_text())]
    counted = {s: sum(row["status"] == s for row in targets) for s in ("pass", "fail")}
    open_targets = len(targets) - sum(counted.values())
    constants = env.get("constants", {})
    lines = [[name, f"{found['value']:.4g} {found['unit']}", found["how"]] for name, found in constants.items()]
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items() if v)
    parts = [
        f"# GPU check: {env['gpu']['name']}{' (a dry run: tiny shapes, no measurement)' if dry else ''}",
        f"`{env['command']}`, {env['date']}, commit {env['commit']}; {env['machine']}; {versions}. {outcomes.words()} "
        f"Targets: {counted['pass']} pass, {counted['fail']} fail, {open_targets} without a verdict.",
        f"Device: {', '.join(f'{k} {v}' for k, v in env['gpu'].items())}. Build: {env['build']}.",
        forbidden(outcomes, results),
        "GPU times are medians of replays of a CUDA graph of at least 20 calls (100 where a call takes less than 20 us, 3 where it "
        "moves over 4 GB), all candidates of a group taken in turns; cold: inputs rotated over three times the L2 cache or 180 MB, "
        "warm: the same inputs. Eager: wall time of as many calls launched one by one. reduce-overhead and max-autotune replay "
        "their own graphs, jax and cupy launch on their own: timed in a stream. Every result was compared with the reference "
        "before it was timed; no figure is taken where a test fails.",
        "## Targets",
        targets_table(targets) if targets else "None yet.",
        "## Constants",
        table(["constant", "measured", "how"], lines) if lines else "Not measured.",
        "## Floors",
        "Bytes over the measured bandwidth, and models of that and the measured constants: they explain times, they are none.",
        floors_table(results, constants),
        "## Predictions",
        predictions(out),
        "## Nsight Compute",
        ncu_table(ncu) if ncu else "Not run yet.",
        "## compute-sanitizer",
        sanitizer_table(sanitizer) if sanitizer else "Not run yet.",
        "## Tuning",
        "[tune.md](tune/tune.md)" if (out / "tune" / "tune.md").exists() else "Not run yet: `bench/gpu_check.sh --tune`.",
        "## Models",
        model_table(model) if model else "No figures: see the targets of the model level.",
        "## Policies",
        policies(out, env),
        "## drop_tokens",
        drop_table(results) if results else "None yet.",
        "![GB/s over bytes](gpu_roofline.png)" if (out / "gpu_roofline.png").exists() else "",
        "![targets](gpu_targets.png)" if (out / "gpu_targets.png").exists() else "",
        "## Everything",
        times_table(results),
        "## Backends",
        "```\n" + env["backends"] + "\n```",
    ]  # fmt: skip
    (out / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def plot(out: Path) -> None:
    """GB/s over bytes, and every target as a share of its limit; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    results, targets = results_of(out), targets_of(out)
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row["provider"] for row in results):
        mine = [
            r for r in results if (r["provider"], r["op"], r["mode"]) == (name, "drop", "cold") and r["median_us"] and r["bytes"]
        ]
        points = sorted((float(r["bytes"]), float(r["bytes"]) / float(r["median_us"]) / 1e3) for r in mine)
        if points:
            axis.plot(
                *zip(*points, strict=True), marker="o" if name in OWN else "x", linestyle="-" if name in OWN else ":", label=name
            )
    axis.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="GB/s of those bytes", title="drop_tokens, cold")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7)
    _save(figure, out / "gpu_roofline.png")
    judged = [row for row in targets if row["value"]]
    figure, axis = pyplot.subplots(figsize=(10, 1 + 0.18 * max(len(judged), 1)))
    shares, colours = [], {"pass": "tab:green", "fail": "tab:red"}
    for row in judged:
        sense, limit = row["limit"].split()
        value, asked = float(row["value"]), float(limit)
        shares.append((asked / value if value else 1.0) if sense == ">=" else (value / asked if asked else 1.0 + value))
    names = [f"{row['target']} {row['backend']}: {row['what']}"[:90] for row in judged]
    axis.barh(range(len(judged)), shares, color=[colours.get(row["status"], "0.7") for row in judged])
    axis.set_yticks(range(len(judged)), names, fontsize=5)
    axis.invert_yaxis()
    axis.axvline(1.0, color="0.3", linewidth=0.8)
    axis.set(xlabel="share of what the target allows (less is better)", xlim=(0, 3))
    _save(figure, out / "gpu_targets.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
