"""A site's policy: what it reads, what it refuses on load, and which plans it keeps off, whatever a server says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.policy import POLICY, Limits, Policy, PolicyError, check_plan, policy_text, read_policy
from client.site import Site
from common.config import Plan, PlanError, make_plan

ALL = ("recommend", "dual", "ensemble")


def plan(**sections: dict[str, Any]) -> Plan:
    values: dict[str, dict[str, Any]] = {
        "privacy": {"noise_multiplier": 2.0, "clip_norm": 0.5, "users_per_site": 15, "delta": 1e-5},
        "training": {"rounds": 3, "steps_per_round": 4},
        "statistics": {"popularity_share": 0.5, "popularity_noise_multiplier": 5.0},
    }
    for section, fields in sections.items():
        values.setdefault(section, {}).update(fields)
    return make_plan({"name": "some", **values})


TIGHT: dict[str, Any] = {
    "noise_for_updates": 2.0,
    "noise_for_sums": 5.0,
    "rounds": 4,
    "steps_per_round": 4,
    "clip_norm": 0.5,
    "epsilon": 100.0,
    "language_models": {"all-MiniLM-L6-v2": ""},
}


def test_a_plan_at_every_bound_is_allowed() -> None:
    check_plan(plan(), Limits(**TIGHT), ALL, 15)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"privacy": {"noise_multiplier": 1.99}}, "noise multiplier of updates is 1.99"),
        ({"statistics": {"popularity_noise_multiplier": 4.99}}, "noise multiplier of sums is 4.99"),
        ({"training": {"rounds": 4}}, "the plan has 5 rounds, but the site allows 4"),
        ({"training": {"steps_per_round": 5}}, "a round has 5 steps"),
        ({"privacy": {"clip_norm": 0.51}}, "the clip norm is 0.51"),
        ({"privacy": {"users_per_site": 16}}, "counts on 16 users"),
        ({"model": {"encoder": "/etc"}}, "language model '/etc' is not on the site's list"),
        ({"model": {"family": "classifier"}}, "family classifier"),
        ({"model": {"family": "ensemble", "members": ("recommend", "lstm-vae")}}, "family lstm-vae"),
    ],
)
def test_a_plan_beyond_a_bound_is_refused_with_the_value_and_the_bound(
    sections: dict[str, dict[str, Any]], says: str
) -> None:
    with pytest.raises(PlanError, match=says.replace("(", r"\(")):
        check_plan(plan(**sections), Limits(**TIGHT), ALL, 15)
    check_plan(plan(**sections), Limits(), (*ALL, "classifier", "lstm-vae"), 16)  # the bound alone refused it


def test_what_a_run_costs_is_computed_from_its_noise_and_not_believed() -> None:
    honest = plan(privacy={"epsilon": 0.5})  # says 0.5, but its noise comes to more
    check_plan(honest, Limits(epsilon=20.0), ALL, 15)
    with pytest.raises(PlanError, match="the run comes to epsilon"):
        check_plan(honest, Limits(epsilon=0.5), ALL, 15)
    with pytest.raises(PlanError, match="at delta 1e-09"):
        check_plan(honest, Limits(epsilon=2.0, delta=1e-9), ALL, 15)


def test_the_file_comes_back_as_the_policy_that_it_was_made_of(tmp_path: Path) -> None:
    policy = Policy(users_at_least=15, families=ALL, metrics=True, bundles=("ab" * 32,), delta=1e-5, **TIGHT)
    (tmp_path / POLICY).write_text(policy_text(policy))
    assert read_policy(tmp_path / POLICY) == policy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("= 15", "= 0"), "users_at_least"),
        (lambda text: text.replace("rounds = 4", "rounds = -4"), r"rounds: .*greater than or equal to 1"),
        (lambda text: "bundles = ['abc']\n" + text.replace("bundles = []", ""), "'abc' is no sha256"),
        (lambda text: "weight = 3\n" + text, "weight: extra inputs are not permitted"),
        (lambda text: text.replace('"dual"', '"duel"'), "family 'duel' is unknown"),
        (lambda text: text + "=", "cannot be read"),
        (lambda text: text.replace("users_at_least = 15", ""), "users_at_least: field required"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_on_load_in_one_line(
    tmp_path: Path, change: Callable[[str], str], says: str
) -> None:
    site = Site(folder=tmp_path, name="here", catalog=tmp_path / "catalog.jsonl", users_at_least=15)
    site.save()
    text = change(policy_text(Policy(users_at_least=15, families=ALL, **TIGHT)))
    (tmp_path / POLICY).write_text(text)
    with pytest.raises(PolicyError, match=says):
        Site.load(tmp_path)


def test_what_the_policy_says_now_is_what_the_site_allows(tmp_path: Path) -> None:
    site = Site(
        folder=tmp_path, name="here", catalog=tmp_path / "catalog.jsonl", users_at_least=100, families=ALL
    )
    site.save()
    assert Site.load(tmp_path) == site
    (tmp_path / POLICY).write_text(policy_text(Policy(users_at_least=15, families=("dual",), rounds=7)))
    found = Site.load(tmp_path)
    assert (found.users_at_least, found.families, found.limits.rounds) == (15, ("dual",), 7)
