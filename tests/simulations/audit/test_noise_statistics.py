"""The tests behind `fedtide audit noise`, against brute force and draws; false alarms and power as measured rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from simulations.audit import noise_statistics as test
from simulations.audit.conformance.sabotages_noise import cut_at_three, four_uniforms, large_drawn_again
from simulations.audit.noise import LEVEL
from simulations.audit.noise_checks import QUESTIONS, judge
from simulations.audit.witnesses import Release
from tests.simulations.audit.noise_cases import simulated


def alarms(releases: list[Release], level: float = LEVEL) -> set[str]:
    return {check.name for check in judge(releases, level=level) if not check.holds}


def test_honest_runs_alarm_at_no_more_than_the_stated_rate_and_not_never() -> None:
    chance, level, repetitions = np.random.default_rng(1), 0.3, 150
    found = [alarms(simulated(chance), level) for _ in range(repetitions)]
    rate = sum(bool(each) for each in found) / repetitions
    assert rate <= level + 3 * (level * (1 - level) / repetitions) ** 0.5
    assert rate > level / 4, "a level that is never used would make the audit blind"
    for question in QUESTIONS:
        share = level / len(QUESTIONS)
        count = sum(question in each for each in found)
        assert stats.binomtest(count, repetitions, share, alternative="greater").pvalue > 1e-4, question


def test_at_its_own_level_an_honest_run_of_ten_sites_and_twenty_rounds_holds_again_and_again() -> None:
    chance = np.random.default_rng(2)
    found = [alarms(simulated(chance, sites=10, rounds=20, places=256)) for _ in range(12)]
    assert not any(found)


@pytest.mark.parametrize(
    ("factor", "rounds", "questions"),
    [
        (0.0, 2, {"level", "level-by-site", "level-of-all", "rest"}),
        (0.1, 2, {"level", "level-by-site", "level-of-all", "rest"}),
        (0.5, 2, {"level", "level-by-site", "level-of-all", "rest"}),
        (0.9, 20, {"level-by-site", "level-of-all", "drift"}),
        (1 / 0.9, 20, {"level-by-site", "level-of-all", "drift"}),
    ],
)
def test_another_level_is_caught(factor: float, rounds: int, questions: set[str]) -> None:
    chance = np.random.default_rng(3)
    found = [alarms(simulated(chance, sites=1, rounds=rounds, places=256, factor=factor)) for _ in range(25)]
    for question in questions:
        assert sum(question in each for each in found) == 25, question


def test_noise_that_becomes_too_little_halfway_is_caught_by_the_chart_and_dated() -> None:
    chance, dates = np.random.default_rng(4), []
    for _ in range(20):
        releases = [
            replace(each, z=0.85 * each.z) if each.round > 10 else each
            for each in simulated(chance, sites=1, rounds=20, places=256)
        ]
        drift = next(check for check in judge(releases, level=LEVEL) if check.name == "drift")
        assert not drift.holds
        dates.append(int(drift.says.split("round ")[1].split(",")[0]))
    assert min(dates) >= 11
    assert np.median(dates) <= 15


def same_each_round(releases: list[Release]) -> list[Release]:
    first = {each.site: each.z for each in reversed(releases)}
    return [replace(each, z=first[each.site]) for each in releases]


def same_at_two_sites_once(releases: list[Release]) -> list[Release]:
    """Site 1 uses in round 5 what site 0 used in round 2."""
    used = next(each.z for each in releases if (each.site, each.round) == ("site-0", 2))
    return [replace(each, z=used) if (each.site, each.round) == ("site-1", 5) else each for each in releases]


def a_tenth_in_common(releases: list[Release]) -> list[Release]:
    """One of ten steps uses the same noise in each round: a correlation of 0.1 in every pair."""
    common = np.random.default_rng(5).standard_normal(releases[0].z.size)
    return [replace(each, z=0.9**0.5 * each.z + 0.1**0.5 * common) for each in releases]


def cancels(releases: list[Release]) -> list[Release]:
    """Each round takes back a part of the noise of the round before: correlated noise, charged as if fresh."""
    z = [each.z for each in releases]
    return [
        replace(each, z=(z[place] - z[place - 1]) / 2**0.5 if place else z[place])
        for place, each in enumerate(releases)
    ]


def uniform(releases: list[Release]) -> list[Release]:
    return [replace(each, z=3**0.5 * (2 * stats.norm.cdf(each.z) - 1)) for each in releases]


def one_place_of_data(releases: list[Release]) -> list[Release]:
    first = releases[0].z.copy()
    first[-1] = 7.0
    return [replace(releases[0], z=first), *releases[1:]]


def witness_alone(releases: list[Release]) -> list[Release]:
    """Noise in the witness, and a sum without any beside it."""
    return [
        replace(each, rest={"all": (0.2 * each.rest["all"][0], each.rest["all"][1])}) for each in releases
    ]


def changed(releases: list[Release], change: Callable[[np.ndarray], np.ndarray]) -> list[Release]:
    return [replace(each, z=change(each.z)) for each in releases]


def turned_each_second_time(releases: list[Release]) -> list[Release]:
    """Every second release has the noise of the one before it, turned by one place."""
    return [
        replace(each, z=np.roll(releases[place - 1].z, 1)) if place % 2 else each
        for place, each in enumerate(releases)
    ]


def sizes_again(releases: list[Release]) -> list[Release]:
    """The last release has the first one's numbers, turned and with other signs."""
    signs = np.random.default_rng(12).choice((-1.0, 1.0), releases[0].z.size)
    return [*releases[:-1], replace(releases[-1], z=signs * np.roll(releases[0].z, 9))]


def cut_at_three_deviations(releases: list[Release]) -> list[Release]:
    return changed(releases, cut_at_three)


def of_four_uniforms(releases: list[Release]) -> list[Release]:
    return changed(releases, four_uniforms)


def large_again(releases: list[Release]) -> list[Release]:
    return changed(releases, large_drawn_again)


def off_the_grid(releases: list[Release]) -> list[Release]:
    return [replace(each, off_grid=0 if place else 3) for place, each in enumerate(releases)]


@pytest.mark.parametrize(
    ("lie", "sites", "question", "others"),
    [
        (same_each_round, 1, "repeat", {"shared", "shape", "places", "sizes"}),
        (same_at_two_sites_once, 2, "repeat", {"places"}),
        (a_tenth_in_common, 1, "shared", set[str]()),
        (cancels, 1, "shared", {"repeat", "places"}),
        (uniform, 1, "shape", {"level-by-site", "level-of-all", "drift", "level", "tails", "sizes"}),
        (turned_each_second_time, 2, "places", set[str]()),
        (sizes_again, 2, "places", set[str]()),
        (cut_at_three_deviations, 10, "tails", {"shape"}),
        (of_four_uniforms, 10, "tails", {"shape"}),
        (
            large_again,
            20,
            "sizes",
            {"level-of-all", "level-by-site", "level", "drift", "rest", "tails", "shape"},
        ),
        (off_the_grid, 1, "grid", set[str]()),
        (one_place_of_data, 1, "outlier", set[str]()),
        (witness_alone, 1, "rest", set[str]()),
    ],
)
def test_each_lie_is_caught_by_the_question_made_for_it(
    lie: Callable[[list[Release]], list[Release]], sites: int, question: str, others: set[str]
) -> None:
    honest = simulated(np.random.default_rng(6), sites=sites, rounds=20, places=256)
    assert not alarms(honest)
    found = alarms(lie(honest))
    assert question in found
    assert found <= {question} | others


def test_the_drift_charts_evidence_has_mean_one_at_any_time() -> None:
    chance = np.random.default_rng(7)
    for factor in (test.DRIFT, 1 / test.DRIFT):
        draws = np.array(
            [test.drift_evidence(list(chance.standard_normal((8, 8))), factor) for _ in range(4000)]
        )
        spread = draws.std(axis=0) / len(draws) ** 0.5
        assert (np.abs(draws.mean(axis=0) - 1) < 5 * spread + 1e-12).all()
        assert np.mean(draws.max(axis=1) > 4) <= 1 / 4  # Ville


def test_the_most_alike_pair_is_brute_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test, "_ROWS_AT_ONCE", 3)
    vectors = np.random.default_rng(8).standard_normal((11, 5))
    groups = [place % 3 for place in range(11)]
    for chosen in (None, groups):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        pairs = {
            (i, j): float(unit[i] @ unit[j])
            for i in range(11)
            for j in range(i + 1, 11)
            if chosen is None or chosen[i] != chosen[j]
        }
        best = max(pairs, key=lambda pair: abs(pairs[pair]))
        found = test.most_alike(vectors, chosen)
        assert found is not None
        assert (found.first, found.second) == best
        assert found.correlation == pytest.approx(pairs[best])
    assert test.most_alike(vectors[:1]) is None
    assert test.most_alike(vectors[:3], [0, 0, 0]) is None


def test_probabilities_are_uniform_for_honest_noise_and_limits_fit_them() -> None:
    chance = np.random.default_rng(9)
    level, correlation, shared = [], [], []
    for _ in range(2000):
        z = chance.standard_normal((4, 12))
        level.append(test.level_probability(z[0]))
        unit = z / np.linalg.norm(z, axis=1, keepdims=True)
        correlation.append(test.correlation_probability(float(unit[0] @ unit[1]), 12))
        shared.append(test.shared_part(z)[1])
    for found in (level, correlation, shared):
        assert stats.kstest(found, "uniform").pvalue > 1e-4
    low, high = test.level_limits(12, 0.05)
    assert test.level_probability(np.full(12, low)) == pytest.approx(0.05)
    assert test.level_probability(np.full(12, high)) == pytest.approx(0.05)
    assert test.correlation_probability(test.correlation_limit(12, 0.01), 12) == pytest.approx(0.01)
    assert test.outlier_probability(test.outlier_limit(500, 0.01), 500) == pytest.approx(0.01)
    assert test.shape_limit(500, 0.01) == pytest.approx(1.63 / 500**0.5, rel=0.02)


def test_no_noise_at_all_and_one_place_are_no_errors() -> None:
    silent = simulated(np.random.default_rng(0), factor=0.0)
    assert {"level", "rest"} <= alarms(silent)
    assert "repeat" not in alarms(simulated(np.random.default_rng(0), places=1))
