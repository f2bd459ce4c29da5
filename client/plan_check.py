"""Holds a plan against a site's policy, before anything is looked up, built or reserved.

Why a plan is refused stands in the site's own log, with the value, the bound and the line of the policy to change; the
server learns one word.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from client.policy import POLICY, Limits, Performance
from client.unit_memory import unit_memory
from common.config import Plan, PlanError
from common.privacy.mechanisms import GaussianSum, PoissonSubsampledGaussian


def check_plan(
    plan: Plan,
    limits: Limits,
    families: Iterable[str],
    users_at_least: int,
    performance: Performance | None = None,
) -> None:
    """Raises `PlanError` for a plan that the site does not allow; looks at nothing but the plan."""
    allowed = set(families)
    members = plan.model.members if plan.model.family == "ensemble" else ()
    for family in (plan.model.family, *members):
        if family not in allowed:
            raise PlanError(f"family {family} is not on the site's list: {POLICY} names {_list(allowed)}")
    if plan.privacy.users_per_site > users_at_least:
        raise PlanError(
            f"the plan counts on {plan.privacy.users_per_site} users, but the site agreed to {users_at_least} "
            f"(users_at_least in {POLICY})"
        )
    if limits.language_models is not None and plan.model.encoder not in limits.language_models:
        raise PlanError(
            f"language model {plan.model.encoder!r} is not on the site's list: {POLICY} names "
            f"{_list(limits.language_models)}"
        )
    _check_model(plan, limits)
    _at_most(plan.rounds, limits, "rounds", "the number of the plan's rounds")
    for event in plan.events():
        if isinstance(event, PoissonSubsampledGaussian):
            _at_least(event.noise_multiplier, limits, "noise_for_updates", "the noise multiplier of updates")
            _at_most(event.steps, limits, "steps_per_round", "the number of a round's steps")
            _at_most(plan.privacy.clip_norm, limits, "clip_norm", "the clip norm")
            _at_least(plan.privacy.clip_norm, limits, "least_clip_norm", "the clip norm")
        elif isinstance(event, GaussianSum):
            _at_least(event.noise_multiplier, limits, "noise_for_sums", "the noise multiplier of sums")
        else:
            raise PlanError(f"the plan has an event that no bound of the site covers: {type(event).__name__}")
    if limits.epsilon is not None:
        delta = plan.privacy.delta if limits.delta is None else limits.delta
        spent = _epsilon(plan.model_dump_json(), delta)
        _at_most(spent, limits, "epsilon", f"the run's epsilon at delta {delta:g}")
    check_memory(plan, limits, performance or Performance())


def _check_model(plan: Plan, limits: Limits) -> None:
    model, statistics = plan.model, plan.statistics
    for name, value in (("cores", model.core), ("modes", model.mode), ("tasks", model.task)):
        if value not in getattr(limits, name):
            raise PlanError(
                f"model.{name[:-1]} is {value}, but the site allows {_list(getattr(limits, name))}: {name} in {POLICY} "
                "says so"
            )
    sizes = ["width", "hidden_width", "max_events", "negatives"]
    if model.mode == "lora":
        sizes += ["most_tokens", "lora_rank", "lora_layers"]
    for name in sizes:
        if (size := getattr(model, name)) is not None:
            _at_most(size, limits, name, f"model.{name}")
    _at_most(model.latent_width, limits, "hidden_width", "model.latent_width")
    _at_most(statistics.max_events, limits, "statistics_events", "statistics.max_events")
    _at_most(statistics.gaps, limits, "statistics_gaps", "statistics.gaps")


def check_memory(
    plan: Plan, limits: Limits, performance: Performance, *, items: int = 0, categories: int = 0
) -> None:
    """Raises `PlanError` for a plan whose unit of rows needs more memory than the site gives it.

    Args:
        items, categories: of the catalog; 0 where it is not looked at yet.
    """
    needs = unit_memory(plan, performance, items=items, categories=categories) / 2**30
    if needs > limits.memory:
        raise PlanError(
            f"a unit of {performance.micro_batch} users would need about {needs:.3g} GiB, but the site gives it "
            f"{limits.memory:g}: lower micro_batch under [performance], or raise memory, both in {POLICY}"
        )


def _at_most(value: float, limits: Limits, name: str, what: str) -> None:
    if not value <= (bound := getattr(limits, name)):
        raise PlanError(
            f"{what} is {value:.6g}, but the site allows {bound:.6g} at most: {name} in {POLICY} says so"
        )


def _at_least(value: float, limits: Limits, name: str, what: str) -> None:
    if not value >= (bound := getattr(limits, name)):
        raise PlanError(
            f"{what} is {value:.6g}, but the site asks for {bound:.6g} at least: {name} in {POLICY} says so"
        )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


@lru_cache(maxsize=64)
def _epsilon(plan: str, delta: float) -> float:
    from common.privacy.accountants import epsilon_pld

    return epsilon_pld(Plan.model_validate_json(plan).events(), delta)
