"""Attacks succeed where nothing protects and come to nothing under noise; their statistics are what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import mannwhitneyu

from common.cli import main
from common.config import Plan, make_plan
from common.models.interface import InterestModel
from simulations.audit.attack_findings import dp_boundary, membership_checks
from simulations.audit.attack_plan import OWN, AttackPlan, plan_attacks
from simulations.audit.attacks import run_attacks
from simulations.audit.canary import canary_model
from simulations.audit.evidence import read_evidence
from simulations.audit.membership import (
    ATTACKS,
    Losses,
    curve_of_attack,
    halves,
    losses_of_models,
    scores,
    thinned,
    train_with_privacy,
    train_without_privacy,
)
from simulations.audit.recovery import (
    CLIPPING_ONLY,
    NO_DP,
    AttackError,
    Variant,
    random_histories,
    recover,
)
from tests.simulations.audit.liars import TRAINERS

torch.set_num_threads(1)


def a_plan(**sections: dict[str, float]) -> Plan:
    return make_plan({"model": {"width": 8, "hidden_width": 8}, **sections})


@pytest.fixture(scope="module")
def plan() -> AttackPlan:
    """A private mechanism of epsilon 1."""
    return plan_attacks(
        a_plan(privacy={"epsilon": 1.0}, training={"rounds": 2}), models=6, users=80, items=80, sites=20
    )


@pytest.fixture(scope="module")
def model(plan: AttackPlan) -> Iterator[InterestModel]:
    """Its model."""
    with canary_model(plan.model, plan.items) as built:
        yield built


def test_without_noise_an_update_gives_a_users_items_away_and_with_noise_it_does_not(
    model: InterestModel, plan: AttackPlan
) -> None:
    own = Variant(OWN, noise_multiplier=plan.settings.noise_multiplier)
    start = model.trainable_state()
    no_dp, clipped, private = recover(model, plan.settings, [NO_DP, CLIPPING_ONLY, own], sites=20)
    # an item that comes late is a candidate for its forerunners, which can push it below 0: 3 items in 1,000 are missed
    assert no_dp.precision > 0.95
    assert clipped.precision > 0.95
    assert abs(private.precision - private.chance) < 5 * private.error + 0.02
    assert private.chance < private.ceiling < 0.5
    assert all(torch.equal(start[name], value) for name, value in model.trainable_state().items())


def test_among_ten_users_without_noise_most_items_come_out_and_with_noise_none_does(plan: AttackPlan) -> None:
    items = 400  # of so many, ten users have a quarter: a guess is mostly wrong
    own = Variant(OWN, noise_multiplier=plan.settings.noise_multiplier)
    with canary_model(plan.model, items) as model:
        clipped, noised = recover(model, plan.settings, [CLIPPING_ONLY, own], users=10, sites=5)
    assert clipped.chance == pytest.approx(1 - (1 - 12 / items) ** 10)
    assert clipped.precision > 0.85
    assert noised.precision < 0.35


def test_a_model_without_a_prior_cannot_be_read_so_the_plan_gives_it_one(plan: AttackPlan) -> None:
    without = make_plan({"model": {"item_prior": False, "width": 8}})
    assert plan_attacks(without).model.item_prior
    with (
        canary_model(without.model, 60) as built,
        pytest.raises(AttackError, match=r"this model has none: set model\.item_prior"),
    ):
        recover(built, plan.settings, [CLIPPING_ONLY])


def test_members_are_told_without_privacy_and_hardly_at_epsilon_one(
    model: InterestModel, plan: AttackPlan
) -> None:
    chance = np.random.default_rng(5)
    histories = random_histories(plan.users, plan.items, chance)
    members = halves(plan.models, plan.users, chance)
    plain = losses_of_models(
        model, histories, members, lambda moved, some: train_without_privacy(moved, some, 100, 0.01)
    )
    private = losses_of_models(
        model, histories, members, lambda moved, some: train_with_privacy(moved, some, plan.settings)
    )
    for attack in ATTACKS:
        open_book = curve_of_attack(scores(plain)[attack], members)
        assert open_book.area > 0.85
        assert open_book.at[0.01][1] > 0.05
        assert abs(curve_of_attack(scores(private)[attack], members).area - 0.5) < 0.15


def some_scores(shift: float) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(8)
    members = chance.random((4, 200)) < 0.5
    return chance.standard_normal((4, 200)) + shift * members, members


def test_area_and_rates_are_those_of_brute_force() -> None:
    score, members = some_scores(1.0)
    found = curve_of_attack(score, members)
    inside, outside = score[members], score[~members]
    assert found.area == pytest.approx(mannwhitneyu(inside, outside).statistic / len(inside) / len(outside))
    for rate, (true, low, high) in found.at.items():
        best = max(
            ((inside >= t).mean() for t in score.ravel() if (outside >= t).mean() <= rate), default=0.0
        )
        assert true == pytest.approx(best)
        assert low <= true <= high
    assert abs(curve_of_attack(*some_scores(0.0)).area - 0.5) < 0.08
    rates = np.array(thinned(found.roc))
    assert (np.diff(rates, axis=0) >= 0).all()
    assert len(rates) <= 120
    assert rates[-1].tolist() == [1.0, 1.0]


def test_what_a_user_usually_loses_is_taken_off_so_that_loud_users_do_not_hide_members() -> None:
    chance = np.random.default_rng(9)
    members = halves(12, 150, chance)
    hard = 3 + chance.standard_normal(150)  # some users' losses are high in every model
    losses = np.abs(hard) + 0.1 * chance.standard_normal((12, 150)) - 0.3 * members + 1.0
    found = {
        attack: curve_of_attack(score, members).area
        for attack, score in scores(Losses(losses, members)).items()
    }
    assert found["loss threshold"] < 0.65
    assert min(found["calibrated"], found["LiRA"]) > 0.9


def test_every_user_is_in_half_of_the_models() -> None:
    assert (halves(6, 40, np.random.default_rng(1)).sum(axis=0) == 3).all()


def one_gaussian(plan: AttackPlan, sigma: float) -> AttackPlan:
    return replace(plan, settings=replace(plan.settings, sampling_rate=1.0, steps=1, noise_multiplier=sigma))


def test_the_boundary_is_the_gaussian_trade_off_where_nobody_is_sampled(plan: AttackPlan) -> None:
    boundary = np.array(dp_boundary(one_gaussian(plan, 2.0)))
    exact = ndtr(ndtri(boundary[:, 0]) + 0.5)
    assert np.abs(boundary[:, 1] - exact).max() < 1e-3
    assert (boundary[:, 1] >= exact - 1e-6).all()


def test_an_attack_beyond_what_the_claim_allows_does_not_hold(plan: AttackPlan) -> None:
    perfect = curve_of_attack(*some_scores(50.0))
    usual = curve_of_attack(*some_scores(0.1))

    def holding(own_curve: object) -> list[bool]:
        curves = {"LiRA": {NO_DP.name: perfect, OWN: own_curve}}
        return [check.holds for check in membership_checks(plan, curves)]  # type: ignore[arg-type]

    assert holding(usual) == [True, True]
    assert holding(perfect) == [True, False]


def test_evidence_does_not_hold_where_the_sites_noise_is_off(plan: AttackPlan) -> None:
    found = run_attacks(replace(plan, models=4, users=40, sites=10), trainer=TRAINERS["noise off"])
    assert f"recommend, vectors, {OWN}" in [check.subject for check in found.checks if not check.holds]
    assert not found.holds


def test_what_cannot_be_attacked_is_refused_in_one_line(plan: AttackPlan) -> None:
    without = make_plan({"training": {"rounds": 0}, "statistics": {"popularity_share": 1.0}})
    with pytest.raises(AttackError, match="there are no updates to attack"):
        plan_attacks(without)
    with pytest.raises(AttackError, match=r"shadows is 2, but must lie in \[4, 10000\]"):
        plan_attacks(a_plan(), models=2)
    with pytest.raises(AttackError, match="events is 12, but must lie in"):
        random_histories(3, 5, np.random.default_rng())


def test_the_command_writes_its_evidence_and_says_that_it_bounds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--shadows", "4", "--users", "30", "--items", "200", "--sites", "20"]
    with pytest.raises(SystemExit) as end:
        main(["audit", "attack", "--out", str(tmp_path), *sizes])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "No figure here is a bound on epsilon" in said
    written = read_evidence(tmp_path / "audit" / "attack.json")
    assert written.holds
    assert set(written.series["roc"]) == set(ATTACKS)
    assert [row["variant"] for row in written.series["recovery"]][:2] == ["no DP", "clipping only"]
    with pytest.raises(SystemExit) as end:
        main(["audit", "attack", "--shadows", "1"])
    assert end.value.code == 2
    assert "shadows is 1" in capsys.readouterr().err
