"""bench/model/decoders.py runs dry: every policy and shape, so that a measurement cannot fail on a typo."""

from __future__ import annotations

import json

from support.bench import BENCH, run_script


def test_dry_run():
    done = run_script(BENCH / "model" / "decoders.py", "--dry", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["run"] for row in rows} == {"dry"}
    assert [row["policy"] for row in rows[:2]] == ["none", "hooks, no drop"]
    whole = rows[2:]
    assert {(row["policy"], row["batch"], row["new"]) for row in whole} == {
        (policy, batch, new) for policy in ("none", "variation", "fastv") for batch in (1, 2) for new in (1, 3)
    }
    assert {row["schedule"] for row in whole} == {"v2drop-192", "v2drop-128", "v2drop-64", "v2drop-qwen2-vl", "25 %"}
    # Published figures stand beside the shapes that they are of, and nowhere else.
    assert {row["published"] for row in whole} == {""}
    for row in whole:
        assert row["prefill_ms"] > 0
        assert row["end_to_end_ms"] > 0
        assert (row["predicted"] is None) == (row["policy"] == "none")
        assert not row["check"].startswith("red")
    # 24 vision tokens in 24 layers: 24 in 3 of them, then 5 % and at least one, so 1.
    llava = [row for row in whole if row["schedule"] == "v2drop-64" and row["new"] == 1 and row["batch"] == 1]
    assert [row["average_tokens"] for row in llava] == [24, (3 * 24 + 21) / 24, (3 * 24 + 21) / 24]
    assert llava[1]["cache_mb"] < llava[0]["cache_mb"]


def test_dry_run_of_sessions():
    done = run_script(BENCH / "model" / "session.py", "--dry", "--only", "entering", "hooks", "steps")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["run"] for row in rows] == ["dry"] * 3
    assert all(row["ours_ms"] > 0 for row in rows)
