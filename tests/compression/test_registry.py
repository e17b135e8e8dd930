"""The table of policies: what each one in it promises, creation from options, and the documentation that lists them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from engine.compression import registry
from engine.compression.base import Evidence
from engine.compression.razor_attention import RazorAttention
from engine.compression.registry import Hook
from engine.errors import InvalidParameter
from engine.scheduling.compression import Realisation
from tests.compression.views import SHAPE, view_of

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = (ROOT / "docs" / "policies.md").read_text()
ALL = registry.names(offline=True)


def policy_called(name: str):
    """With its defaults, and where it needs one, an artefact."""
    policy = registry.create(name, offline=True)
    return policy.bind(((0, 0), (2, 1))) if isinstance(policy, RazorAttention) else policy


def test_the_table_has_the_policies_that_are_promised():
    promised = (
        "streaming_llm h2o snapkv pyramidkv tova scissorhands keyformer a2sf vatp ems razor_attention kvcrush raas "
        "quest gemfilter random"
    )
    assert set(promised.split()) <= set(registry.names())
    assert "oracle" in ALL
    assert "oracle" not in registry.names()


@pytest.mark.parametrize("name", ALL)
def test_a_plan_says_what_the_scheduler_needs(name):
    policy = policy_called(name)
    for num_prompt_tokens in (1, 17, 300, 5000):
        plan = policy.plan(num_prompt_tokens, SHAPE)
        assert plan.policy == name
        assert plan.first_point is None or plan.first_point >= num_prompt_tokens >= plan.num_queries
        assert plan.period >= 0
        assert all(count >= 1 for count in plan.kept)
        if plan.realisation is Realisation.DENSE:
            assert plan.first_point is None
        else:
            expected = {Realisation.LAYERS: 4, Realisation.HEADS: 8}.get(plan.realisation, 1)
            assert len(plan.kept) == expected
        if plan.first_point is not None:
            # every point drops something: otherwise it would only cost
            assert min(plan.kept) < plan.first_point
            assert plan.period == 0 or plan.first_point + plan.period > min(plan.kept)


@pytest.mark.parametrize("name", ALL)
def test_a_budget_of_the_whole_text_changes_nothing(name):
    options = [item.name for item in registry.entry(name, offline=True).options]
    base = registry.entry(name, offline=True).bases
    if "budget" not in options and not base:
        policy = RazorAttention(min_recent=2000).bind(((0, 0),))
    else:
        policy = registry.create(name, {"budget": 2000}, offline=True)
    plan = policy.plan(1000, SHAPE)
    # a thousand tokens of prompt, a thousand of answer
    assert plan.first_point is None or plan.first_point > 2000


@pytest.mark.parametrize("name", ALL)
def test_weights_have_a_row_per_channel_and_choices_are_valid(name):
    policy = policy_called(name)
    evidence = policy.evidence
    assert evidence is None or isinstance(evidence, Evidence)
    num_channels = 1 if evidence is None else evidence.channels
    weights = policy.query_weights(torch.arange(290, 300), 300, 300)
    assert weights.shape == (num_channels, 10)
    assert weights.dtype == torch.float32
    assert bool(weights.any()) == (evidence is not None)
    if evidence is not None and evidence.kind == "noisy":
        assert policy.temperatures(torch.arange(290, 300), 300).shape == (10,)
    plan = policy.plan(5000, SHAPE)
    if plan.first_point is None or Hook.FUTURE in registry.needs(policy):
        return
    kept = torch.tensor(plan.kept).clamp(max=plan.first_point)
    kept = kept.view(4, 2) if len(kept) == 8 else kept.view(-1, 1).expand(4, 2)
    scores = torch.rand(num_channels, 4, 2, plan.first_point)
    if plan.realisation is Realisation.BLOCKS:
        scores[...] = 0
    index = policy.keep(view_of(scores, kept, num_prompt_tokens=5000)).index
    assert index.dtype == torch.int64
    assert index.shape == (4, 2, int(kept.max()))
    assert torch.equal((index >= 0).sum(-1), kept)
    for row, count in zip(index.reshape(8, -1), kept.flatten(), strict=True):
        assert bool((row[: int(count)].diff() > 0).all())
        assert int(row[int(count) - 1]) < plan.first_point
        assert bool((row[int(count) :] == -1).all())


@pytest.mark.parametrize("name", ALL)
def test_a_policy_tells_its_source_or_that_it_is_a_yardstick(name):
    found = registry.entry(name, offline=True)
    text = Path(ROOT / "engine" / "compression" / f"{found.policy.__module__.rsplit('.', 1)[1]}.py").read_text()
    assert re.search(r"Source: .*arXiv:\d{4}\.\d{5}", text) or "yardstick" in text
    assert found.summary.endswith(".")


@pytest.mark.parametrize("name", registry.names())
def test_an_unknown_option_is_answered_with_the_known_ones(name):
    with pytest.raises(InvalidParameter) as refused:
        registry.create(name, {"budgets": 3})
    assert refused.value.param == "kv_policy.budgets"
    for item in registry.entry(name).options:
        assert f"{item.name} ({item.bounds}; default {item.default})" in str(refused.value)


def test_an_unknown_name_is_answered_with_the_known_ones():
    for name in ("snapkw", None, 7, "", ["h2o"]):
        with pytest.raises(InvalidParameter) as refused:
            registry.create(name)  # type: ignore[arg-type]
        assert refused.value.param == "kv_policy.name"
        assert ", ".join(registry.names()) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "param", "message"),
    [
        ("snapkv", {"window": 0}, "window", "window is 0, allowed: integer, at least 1, at most 4096"),
        ("snapkv", {"window": True}, "window", "window is True"),
        ("snapkv", {"budget": 10**400}, "budget", "allowed: integer, at least 1, at most 16777216"),
        ("h2o", {"ratio": 10**400}, "ratio", "allowed: number, above 0, at most 1"),
        ("h2o", {"budget": [3]}, "budget", "budget is [3]"),
        ("snapkv", {"window": 8.5}, "window", "window is 8.5"),
        ("snapkv", {"kernel": 4}, "kernel", "kernel is 4, allowed: odd integer"),
        ("snapkv", {"pooling": "sum"}, "pooling", "pooling is 'sum', allowed: avg, max"),
        ("snapkv", {"window": None}, "window", "window is None"),
        ("h2o", {"ratio": 0}, "ratio", "ratio is 0, allowed: number, above 0, at most 1"),
        ("h2o", {"ratio": float("nan")}, "ratio", "ratio is nan"),
        ("h2o", {"budget": 10, "ratio": 0.1}, "ratio", "are both given"),
        ("tova", {"per_layer": 1}, "per_layer", "allowed: true or false"),
        ("a2sf", {"budget": 16}, "budget", "it must exceed num_recent"),
        ("vatp", {"base": "scissorhands"}, "base", "base is 'scissorhands', known are h2o, a2sf"),
        ("vatp", {"base": 3}, "base", "base is 3, known are"),
        ("kvcrush", {"base": {"name": "h2o", "windows": 3}}, "base.windows", "h2o has no option 'windows'"),
        ("kvcrush", {"base": {"name": "h2o"}, "budget": 3}, "budget", "kvcrush has no option 'budget'"),
        ("kvcrush", {"base": {"name": "h2o", "budget": 0}}, "base.budget", "budget is 0"),
    ],
)
def test_values_out_of_bounds_are_refused_with_their_bounds(name, options, param, message):
    with pytest.raises(InvalidParameter, match=re.escape(message)) as refused:
        registry.create(name, options)
    assert refused.value.param == f"kv_policy.{param}"


def test_a_modifier_hands_the_options_that_it_does_not_know_to_its_base():
    plain = registry.create("vatp", {"budget": 77, "num_first": 3})
    assert plain == registry.create("vatp", {"base": {"name": "h2o", "budget": 77}, "num_first": 3})
    nested = registry.create("kvcrush", {"rescue": 1, "base": {"name": "vatp", "base": "snapkv", "budget": 90}})
    assert nested.base.base == registry.create("snapkv", {"budget": 90})  # type: ignore[attr-defined]
    assert registry.create("kvcrush", {"base": "vatp", "budget": 90}).base.base.budget == 90  # type: ignore[attr-defined]


def test_needs_are_those_of_a_policy_and_its_base():
    assert registry.needs(registry.create("snapkv")) == frozenset()
    assert registry.needs(registry.create("ems")) == {Hook.MERGE}
    assert registry.needs(registry.create("kvcrush", {"base": "keyformer"})) == {Hook.TEMPERATURES}


def test_equal_options_make_equal_policies():
    assert registry.create("snapkv", {"budget": 99}) == registry.create("snapkv", {"budget": 99})
    assert hash(registry.create("kvcrush")) == hash(registry.create("kvcrush"))


def test_two_policies_cannot_have_one_name():
    with pytest.raises(ValueError, match="two cache policies are called h2o"):
        registry.register("h2o")(registry.entry("h2o").policy)


def section_of(name: str) -> str:
    """What the documentation has to say about a policy; a failing test prints it."""
    found, hooks = registry.entry(name), sorted(registry.needs(policy_called(name)))
    rows = [(item.name, item.default, str(item.bounds), item.bounds.about) for item in found.options]
    if found.bases:
        rows.append(("base", found.bases[0], ", ".join(found.bases), "the policy that is modified"))
    lines = [f"### `{name}`", "", found.summary, ""]
    if hooks:
        lines += [f"Needs {', '.join(hooks)}.", ""]
    if rows:
        lines += ["| option | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [f"| `{option}` | {default} | {bounds} | {about} |" for option, default, bounds, about in rows]
    return "\n".join(lines).rstrip() + "\n"


@pytest.mark.parametrize("name", registry.names())
def test_the_documentation_lists_every_option_with_its_default_and_bounds(name):
    assert section_of(name) in DOCS


def test_the_documentation_has_no_policy_that_does_not_exist():
    assert set(re.findall(r"^### `(\w+)`$", DOCS, flags=re.MULTILINE)) <= set(registry.names())


def test_the_example_for_authors_works(tmp_path, monkeypatch):
    """The file that the documentation shows is a policy."""
    path = tmp_path / "key_norm.py"
    blocks = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    path.write_text(next(block for block in blocks if "@register" in block))
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    spec = importlib.util.spec_from_file_location("key_norm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "key_norm", module)
    spec.loader.exec_module(module)
    policy = registry.create("key_norm", {"budget": 4, "num_recent": 2})
    keys = torch.tensor([3.0, 1, 2, 5, 4, 6, 7, 8, 9, 9]).view(1, 1, -1, 1)
    # the smallest keys, and the newest tokens
    assert policy.keep(view_of(torch.zeros(10), 4, keys=keys)).index[0, 0].tolist() == [1, 2, 8, 9]
