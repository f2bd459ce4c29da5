"""Whole answers, from request to update: the plan's rounds by hand, and sabotages that must be seen."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest

from client.generators import SECURE, Generators
from client.site import answer
from client.together import answered_together
from client.training import train_round
from common.config import Plan, make_plan
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from simulations.audit.conformance.by_hand import constants_of, train_by_hand
from simulations.audit.conformance.code import Chosen, Code, Everyone, SameAgain
from simulations.audit.conformance.controls_noise import SEEN_BY as SEEN_IN_NOISE
from simulations.audit.conformance.controls_training import CLOCK, SEEN_BY
from simulations.audit.conformance.made_up_sites import (
    ITEMS,
    Draws,
    MadeUpSites,
    SiteRefusedError,
    at_made_up_sites,
    distance,
    in_sums,
)
from simulations.audit.conformance.pairs_of_sites import LOUD, Way, numbers_that_are_none, overflow
from simulations.audit.conformance.rounds_of_sites import exact_round, round_of_run
from simulations.audit.conformance.sabotage import BEGIN, END, table
from simulations.audit.conformance.sabotages import SABOTAGES
from simulations.audit.conformance.subjects import some_users

ALONE, TOGETHER = Code().paths.items()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUpSites]:
    folder = tmp_path_factory.mktemp("answers")
    with at_made_up_sites(folder):
        yield MadeUpSites(folder)


def test_a_site_draws_anew_for_each_answer_unless_a_caller_says_otherwise(sites: MadeUpSites) -> None:
    assert Generators(noise=SecureGaussian, sampler=SecurePoissonSampler) == SECURE
    for ask in (answer, answered_together):
        asked = signature(ask).parameters["generators"]  # type: ignore[arg-type]
        assert (asked.kind, asked.default) == (Parameter.KEYWORD_ONLY, SECURE)
    plan, rows, draws = sites.plan(0.3), some_users(5, ITEMS), Draws()
    for path in Code().paths.values():
        given = [sites.released(path, plan, [rows, rows], draws.again())[0] for _ in range(2)]
        fresh = [sites.released(path, plan, [rows, rows])[0] for _ in range(2)]
        assert distance(in_sums(given[0], plan), in_sums(given[1], plan)) == 0
        assert distance(in_sums(fresh[0], plan), in_sums(fresh[1], plan)) > 1


def test_a_round_by_hand_is_the_trainers_and_a_bolder_one_is_not(sites: MadeUpSites) -> None:
    way, noise = Way(sites, *ALONE), SameAgain()
    plan = sites.plan(way.loudness(LOUD) / 1e3, steps=3, moves=0.1)
    batch, found = sites.batch([LOUD, [1, 2, 3], [4, 5]]), []
    for trainer in (train_round, train_by_hand, SABOTAGES["clip factor with a floor"].trainer):
        assert trainer is not None
        sites.model.load_trainable(sites.start)
        update = trainer(sites.model, batch, constants_of(plan), sampler=Everyone(), noise=noise.rewind())
        found.append(in_sums(update, plan))
    assert distance(found[0], found[1]) < 1e-3
    assert distance(found[0], found[2]) > 10


def test_sites_that_cannot_be_trained_together_are_answered_for_all_the_same(
    sites: MadeUpSites, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("client.together.check_sites_apart", fails)
    rows = some_users(5, ITEMS)
    assert len(sites.released(TOGETHER[1], sites.plan(0.3), [rows, rows])) == 2


def a_run(**training: float) -> Plan:
    return make_plan({"training": training, "privacy": {"noise_multiplier": 3.0, "users_per_site": 20}})


@pytest.mark.parametrize("learning_rate", [2.0, 200.0])
def test_a_runs_own_round_is_followed_as_far_as_rounding_allows(
    sites: MadeUpSites, learning_rate: float
) -> None:
    run = a_run(steps_per_round=64, learning_rate=learning_rate)
    checks = {check.name: check for check in round_of_run(Way(sites, *ALONE), run)}
    assert checks["draws"].holds, checks["draws"].says
    assert checks["exact round"].holds, checks["exact round"].says
    followed = "64 steps" in checks["exact round"].says
    assert followed == (learning_rate == 2.0)
    with SABOTAGES["sigma read halved"].at_work():
        assert not all(check.holds for check in round_of_run(Way(sites, *ALONE), run))


def test_a_sampler_or_a_noise_that_was_not_asked_is_told(sites: MadeUpSites) -> None:
    with SABOTAGES["batches with replacement"].at_work():
        draws, _ = exact_round(Way(sites, *ALONE), steps=3)
    assert not draws.holds
    assert "users were drawn 0 times" in draws.says
    with SABOTAGES["together: one noise"].at_work():
        draws, _ = exact_round(Way(sites, *TOGETHER), steps=3)
    assert not draws.holds
    assert "noise was drawn 0 times" in draws.says


def test_a_user_whose_numbers_are_none_is_one_among_others_whose_are_not(sites: MadeUpSites) -> None:
    for of in ("gradients", "scores"):
        found = overflow(sites, of)
        assert len(found.others) >= 3
        assert all(bool(value.isfinite().all()) for value in found.state.values())
    with SABOTAGES["breaks off at inf"].at_work():
        (check,) = numbers_that_are_none(Way(sites, *ALONE))
    assert not check.holds
    assert "answers without that user" in check.says


def test_a_site_that_refuses_is_no_silent_pass(sites: MadeUpSites) -> None:
    with pytest.raises(SiteRefusedError, match="model"):
        sites.released(
            ALONE[1], sites.plan(0.3), [[[1, 2]]], Draws(Chosen(np.ones(1, dtype=bool))).again(), state={}
        )


def test_every_sabotage_is_a_control() -> None:
    assert set(SABOTAGES) <= {*SEEN_BY, *(name for name, _, _ in SEEN_IN_NOISE), CLOCK}
    assert set(SEEN_BY) <= set(SABOTAGES)


def test_the_table_of_sabotages_names_what_caught_each_and_the_document_holds_them_all() -> None:
    name = "few users refused"
    assert f"| {name} | {SABOTAGES[name].does} | **any site** |" in table({name: ["any site"]})
    assert "| nothing |" in table({name: []})
    assert "**a, b, c, d** and 1 more" in table({name: list("abcde")})
    page = (Path(__file__).parents[3] / "docs" / "audit.md").read_text(encoding="utf-8")
    shown = page.split(BEGIN)[1].split(END)[0]
    assert all(f"| {name} | {each.does} | **" in shown for name, each in SABOTAGES.items())
