"""Public names that changed work under their old names for one release, with a DeprecationWarning that names the new one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support import tiny
from support.tiny import item

from v2drop_kernels import models
from v2drop_kernels.models import DropContext, DropSession, Method, Policy, TokenDropper, policies
from v2drop_kernels.models.policies.fastervlm import FasterVLM
from v2drop_kernels.schedule import Schedule, Stage

ITEMS = [item(4, "image", 6, seed=1)]
HALF = Schedule((Stage(2, 0.5),))


@pytest.mark.parametrize(("old", "new"), [("Stop", DropContext), ("Dropping", DropSession)])
def test_classes(old, new):
    with pytest.warns(DeprecationWarning, match=f"models.{old} is deprecated.*use v2drop_kernels.models.{new.__name__}"):
        assert getattr(models, old) is new


@pytest.mark.parametrize(("module", "old", "new"), [("policy", "Stop", DropContext), ("dropper", "Dropping", DropSession)])
def test_classes_in_the_modules_that_held_them(module, old, new):
    with pytest.warns(DeprecationWarning, match=old):
        assert getattr(getattr(__import__(f"v2drop_kernels.models.{module}").models, module), old) is new


def test_methods_of_a_session():
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper(HALF)(model) as session:
        model(**inputs)
    with pytest.warns(DeprecationWarning, match=r"totals\(\).*vision_token_counts\(\)"):
        assert session.totals() == session.vision_token_counts() == (16,)
    with pytest.warns(DeprecationWarning, match=r"learnt\(\).*learned_schedule\(\)"):
        assert session.learnt() == session.learned_schedule() == HALF


def run_policy(monkeypatch, policy, name="fastv"):
    """Kept tokens of a run in which ``policy`` replaces one of the package's, and all warnings."""
    monkeypatch.setattr(policies, "find", lambda _: policy)
    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper(Schedule((Stage(1, 0.5, name),)))(model) as session:
        model(**inputs)
    return session.kept().stages


def test_a_policy_file_with_the_old_names(monkeypatch):
    """``watch``, and every attribute of the context that was renamed, as a user's own policy file has them."""
    seen_by_score = []
    with pytest.warns(DeprecationWarning, match=r"Old.watch\(\) is deprecated.*Old.register_hooks\(\)"):

        @dataclass(frozen=True)
        class Old(Policy):
            method = Method(paper="-", where="decoder", score="-", needs_weights=False)

            def watch(self, family, seen):
                yield from super().watch(family, seen)
                yield family.decoder.register_forward_pre_hook(lambda module, args: seen.update(mark=family.kind))

            def score(self, at):
                seen_by_score.append((at.seen["mark"], at.family is at.adapter, at.before is at.prev_hidden))
                assert torch.equal(at.rows_of(at.droppable, 16), at.row_indices(at.droppable, 16))
                at.seen = dict(at.seen)
                return -torch.arange(at.hidden.shape[1]).expand(at.hidden.shape[:2]).float()

    with pytest.warns(DeprecationWarning, match="DropContext") as caught:
        kept = run_policy(monkeypatch, Old)
    assert kept == (tuple(range(8)),)
    assert seen_by_score == [("llava", True, True)]
    text = "\n".join(str(w.message) for w in caught)
    for old in ("DropContext.seen", "DropContext.family", "DropContext.before", "DropContext.rows_of()", "Policy.watch()"):
        assert f"{old} is deprecated" in text, text


def test_super_watch_reaches_the_hooks_of_the_base():
    """A subclass of a method of this package that still defines ``watch`` and calls its base's."""
    with pytest.warns(DeprecationWarning, match=r"Mine.watch"):

        class Mine(FasterVLM):
            def watch(self, family, seen):
                return super().watch(family, seen)

    model, _, _ = tiny.batch("llava", ITEMS)
    adapter = models.adapters.adapter_of(model)
    with pytest.warns(DeprecationWarning, match=r"Policy.watch"):
        handles = list(Mine().register_hooks(adapter, {}))
    assert len(handles) == len([handle.remove() for handle in FasterVLM().register_hooks(adapter, {})]) > 5
    for handle in handles:
        handle.remove()


def test_new_names_do_not_warn(recwarn):
    @dataclass(frozen=True)
    class New(FasterVLM):
        def register_hooks(self, adapter, tower_cache):
            return super().register_hooks(adapter, tower_cache)

    model, inputs, _ = tiny.batch("llava", ITEMS)
    with torch.no_grad(), TokenDropper("fastervlm-192")(model) as session:
        model(**inputs)
    session.vision_token_counts()
    assert New().layer == -2
    assert not [w for w in recwarn if w.category is DeprecationWarning and "v2drop" in str(w.message)]
