"""A site's policy: what it reads, what it refuses on load, and which plans it keeps off, whatever a server says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from client.plan_check import check_memory, check_plan
from client.policy import (
    ANY_PLAN,
    POLICY,
    Limits,
    Performance,
    Policy,
    PolicyError,
    policy_text,
    read_policy,
)
from client.site_folder import Site
from client.unit_memory import unit_memory
from common.config import Plan, PlanError, make_plan
from common.models.names import FAMILIES
from common.privacy.mechanisms import MOST_STEPS

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
        (
            {"training": {"rounds": 4}},
            "plan's rounds is 5, but the site allows 4 at most: rounds in policy.toml",
        ),
        (
            {"training": {"steps_per_round": 5}},
            "round's steps is 5, but the site allows 4 at most: steps_per_round",
        ),
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


SIZES = [
    ("width", "model", "width", 64, 4, {}),
    ("hidden_width", "model", "hidden_width", 64, 4, {}),
    ("hidden_width", "model", "latent_width", 64, 1, {"family": "dual"}),
    ("max_events", "model", "max_events", 20, 1, {}),
    ("negatives", "model", "negatives", 20, 1, {}),
    ("most_tokens", "model", "most_tokens", 20, 1, {"mode": "lora"}),
    ("lora_rank", "model", "lora_rank", 4, 1, {"mode": "lora"}),
    ("lora_layers", "model", "lora_layers", 2, 1, {"mode": "lora"}),
    ("statistics_events", "statistics", "max_events", 30, 1, {}),
    ("statistics_gaps", "statistics", "gaps", 5, 1, {}),
]


@pytest.mark.parametrize(("name", "section", "field", "bound", "step", "model"), SIZES)
def test_a_size_is_allowed_up_to_its_bound_and_refused_above(
    name: str, section: str, field: str, bound: int, step: int, model: dict[str, Any]
) -> None:
    def of(size: int) -> Plan:
        return plan(**({"model": model} | {section: (model if section == "model" else {}) | {field: size}}))

    limits = Limits(**{name: bound})
    for size in (bound - step, bound):
        check_plan(of(size), limits, ALL, 15)
    says = (
        rf"{section}\.{field} is {bound + step}, but the site allows {bound} at most: {name} in policy\.toml"
    )
    with pytest.raises(PlanError, match=says):
        check_plan(of(bound + step), limits, ALL, 15)


@pytest.mark.parametrize("field", ["most_tokens", "lora_rank", "lora_layers"])
def test_what_adapters_take_binds_no_plan_without_adapters(field: str) -> None:
    check_plan(plan(model={field: 50}), Limits(**{field: 10}), ALL, 15)


@pytest.mark.parametrize(
    ("name", "field", "allowed", "refused"),
    [
        ("cores", "core", "gru", "attention"),
        ("modes", "mode", "vectors", "lora"),
        ("tasks", "task", "next-item", "interest"),
    ],
)
def test_what_is_not_on_a_list_is_refused_and_the_list_named(
    name: str, field: str, allowed: str, refused: str
) -> None:
    limits = Limits(**({"cores": ("gru",)} | {name: (allowed,)}))  # type: ignore[arg-type]
    usual = {"core": "gru"}
    check_plan(plan(model=usual | {field: allowed}), limits, ALL, 15)
    with pytest.raises(
        PlanError, match=rf"model\.{field} is {refused}, but the site allows {allowed}: {name} in"
    ):
        check_plan(plan(model=usual | {field: refused}), limits, ALL, 15)


def test_a_plan_whose_unit_needs_more_memory_than_the_site_gives_is_refused() -> None:
    big = plan(model={"core": "decay", "hidden_width": 64, "max_events": 200})
    needs = unit_memory(big, Performance()) / 2**30
    assert needs > 8
    for above in (1.001, 2.0):
        check_plan(big, Limits(memory=needs * above), ALL, 15)
    says = r"a unit of 96 users would need about .* GiB, but the site gives it .*: lower micro_batch .* memory, both in"
    for limits in (Limits(), Limits(memory=needs * 0.999)):
        with pytest.raises(PlanError, match=says):
            check_plan(big, limits, ALL, 15)
    check_plan(big, Limits(), ALL, 15, Performance(micro_batch=8))  # a smaller unit fits
    nothing = plan(model={"core": "decay", "hidden_width": 64, "max_events": 200}, training={"rounds": 0})
    check_plan(nothing, Limits(memory=1e-9), ALL, 15)  # sums take no unit


def test_what_grows_with_the_catalog_is_refused_once_the_catalog_is_known() -> None:
    whole, some = plan(), plan(model={"negatives": 256})
    check_memory(whole, Limits(), Performance(), items=20_000)
    with pytest.raises(PlanError, match="would need about"):
        check_memory(whole, Limits(), Performance(), items=1_000_000)
    check_memory(some, Limits(), Performance(), items=1_000_000)


def test_the_defaults_allow_the_plans_that_are_shipped_and_a_policy_without_them_has_them(
    tmp_path: Path,
) -> None:
    for model in (
        {},
        {"mode": "lora"},
        {"core": "attention"},
        {"core": "decay"},
        {"width": 384, "hidden_width": 128},
    ):
        check_plan(plan(model=model), Limits(), ALL, 15)
        check_memory(plan(model=model), Limits(), Performance(), items=4_000)
    for family in FAMILIES:
        check_plan(plan(model={"family": family}), Limits(), FAMILIES, 15)
    (tmp_path / POLICY).write_text("users_at_least = 15\n")
    assert read_policy(tmp_path / POLICY).limits == Limits()


def test_no_plan_is_beyond_the_bounds_of_simulated_sites() -> None:
    """The largest value of each field, as far as the plan's own bounds let it be."""
    sizes = {
        "width": 1024,
        "hidden_width": 4096,
        "max_events": 2000,
        "negatives": 10**6,
        "most_tokens": 8192,
        "lora_rank": 256,
        "lora_layers": 128,
        "latent_width": 1024,
    }
    for name, size in sizes.items():
        with pytest.raises(PlanError) if name != "negatives" else nullcontext():
            plan(model={name: 2 * size})
    largest = plan(
        training={"rounds": 100_000, "steps_per_round": MOST_STEPS // 100_000},
        model=sizes | {"mode": "lora", "core": "decay", "family": "ensemble", "members": tuple(FAMILIES)[:5]},
        statistics={"max_events": 100_000, "gaps": 1000},
    )
    check_plan(largest, ANY_PLAN, FAMILIES, 15, Performance(micro_batch=4096, engine="opacus"))


def test_what_a_run_costs_is_computed_from_its_noise_and_not_believed() -> None:
    honest = plan(privacy={"epsilon": 0.5})  # says 0.5, but its noise comes to more
    check_plan(honest, Limits(epsilon=20.0), ALL, 15)
    with pytest.raises(PlanError, match="the run's epsilon at delta 1e-05 is"):
        check_plan(honest, Limits(epsilon=0.5), ALL, 15)
    with pytest.raises(PlanError, match="at delta 1e-09"):
        check_plan(honest, Limits(epsilon=2.0, delta=1e-9), ALL, 15)


def test_the_file_comes_back_as_the_policy_that_it_was_made_of(tmp_path: Path) -> None:
    policy = Policy(users_at_least=15, families=ALL, metrics=True, bundles=("ab" * 32,), delta=1e-5, **TIGHT)
    own = Performance(engine="opacus", micro_batch=96, threads=3, device="auto", frozen_precision="bfloat16")
    every = {name: 7 for name, _, _, _, _, _ in SIZES} | {
        "memory": 0.5,
        "cores": ("gru",),
        "tasks": ("interest",),
    }
    for each in (policy, policy.model_copy(update=every | {"performance": own, "modes": ("lora",)})):
        text = policy_text(each)
        (tmp_path / POLICY).write_text(text)
        assert read_policy(tmp_path / POLICY) == each
        assert all(
            f"{name} = " in text
            for name in (*Limits.model_fields, *Performance.model_fields)
            if name != "language_models"
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("= 15", "= 0"), "users_at_least"),
        (lambda text: text.replace("rounds = 4", "rounds = -4"), r"rounds: .*greater than or equal to 1"),
        (lambda text: "bundles = ['abc']\n" + text.replace("bundles = []", ""), "'abc' is no sha256"),
        (lambda text: "weight = 3\n" + text, "weight: a policy has no such key; it has bundles"),
        (lambda text: "round = 3\n" + text, r"round: a policy has no such key; did you mean rounds\?"),
        (
            lambda text: text.replace("[performance]", "[performance]\nthread = 2"),
            r"performance\.thread: \[performance\] of a policy has no such key; did you mean performance\.threads\?",
        ),
        (lambda text: text.replace('"dual"', '"duel"'), "family 'duel' is unknown"),
        (lambda text: text + "=", "cannot be read"),
        (lambda text: text.replace('"gru"', '"gro"'), "cores: 'gro' is unknown: choose among lstm"),
        (lambda text: text.replace("width = 512", "width = 0", 1), "width: .*greater than or equal to 1"),
        (lambda text: text.replace("memory = 8.0", "memory = 0"), "memory: .*greater than 0"),
        (
            lambda text: text.replace("micro_batch = 96", "micro_batch = 60"),
            r"performance\.micro_batch: .*multiple of 8",
        ),
        (
            lambda text: text.replace("micro_batch = 96", "micro_batch = 0"),
            r"performance\.micro_batch: .*equal to 8",
        ),
        (
            lambda text: text.replace("micro_batch = 96", "micro_batch = 4104"),
            r"micro_batch: .*equal to 4096",
        ),
        (lambda text: text.replace("# threads = 1", "threads = 65"), r"performance\.threads: .*equal to 64"),
        (
            lambda text: text.replace('device = "cpu"', 'device = "tpu"'),
            r"performance\.device: .*'cuda' or 'auto'",
        ),
        (lambda text: text.replace('engine = "fast"', 'engine = "slow"'), r"performance\.engine: .*'opacus'"),
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
