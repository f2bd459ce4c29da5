"""A run waits for the sites that a round needs, and stops where going on would cost sites something for nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest

from common.phases import Exchange, Phase
from common.privacy.mechanisms import GaussianSum
from common.privacy.renyi import charge_at, least_charge
from server.budgets import rounds_that_fit, site_budget
from server.registry import Registry
from server.runs import RunError, RunFolder
from server.waiting import ROUNDS_IN_VAIN
from tests.common.privacy.honest_chain import Writer
from tests.server.bad_replies import asked, reserve
from tests.server.test_rounds import LATE, NODES, Network, Sites, records, sites, start

__all__ = ["sites"]


class Away(Network):
    """One node is not connected for so many looks, from the time that its answer to a round was sent."""

    def __init__(self, after: int, looks: int, run: RunFolder) -> None:
        super().__init__("well")
        self.after, self.looks, self.run_folder = after, looks, run
        self.waited: list[dict[str, int] | None] = []

    def get_node_ids(self) -> Iterable[int]:
        self.waited.append(self.run_folder.waiting())
        if len(list(self.run_folder.records())) >= self.after and self.looks:
            self.looks -= 1
            return [node for node in super().get_node_ids() if node != LATE]
        return super().get_node_ids()


def with_rounds(sites: Sites, rounds: int, **server: object) -> RunFolder:
    plan = sites.first.plan
    kept = sites.first.plan
    training = plan.training.model_copy(update={"rounds": rounds})
    try:
        object.__setattr__(sites.first, "plan", plan.model_copy(update={"training": training}))
        return sites.run(**server)
    finally:
        object.__setattr__(sites.first, "plan", kept)


def test_a_round_waits_for_the_sites_that_it_needs_and_says_so(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    run = sites.run(minimum_sites=NODES, patience=600.0)
    grid = Away(1, 4, run)
    with caplog.at_level(logging.INFO, "fedtide.server"):
        start(sites, run, grid=grid)
    assert [len(each["admitted"]) for each in records(run)] == [NODES, NODES]
    assert [sites.charges(number, run) for number in range(NODES)] == [[1, 2]] * NODES
    said = [each.getMessage() for each in caplog.records]
    assert said.count("round 2: waiting for 1 more sites, of 3 that it needs; not connected: site-2") == 1
    assert {"round": 2, "more": 1} in grid.waited
    assert run.waiting() is None


def test_a_round_that_too_few_could_answer_is_neither_asked_nor_recorded_and_the_run_goes_on(
    sites: Sites,
) -> None:
    run = sites.run(minimum_sites=NODES, patience=0.2)
    grid = Away(1, 10_000, run)
    with pytest.raises(
        RunError, match=r"of the 3 that round 2 needs, 2 sites came in 0\.2 s: start more sites"
    ):
        start(sites, run, grid=grid)
    assert [each["round"] for each in records(run)] == [1]
    assert {message.metadata.group_id for message in grid.sent} == {"1"}
    assert run.asked(2) == set()
    assert [sites.charges(number, run) for number in range(NODES)] == [[1]] * NODES
    assert run.waiting() is None
    start(sites, run)
    assert [len(each["admitted"]) for each in records(run)] == [NODES, NODES]


def test_a_half_done_round_counts_the_releases_that_it_holds(sites: Sites) -> None:
    """A site that was admitted before a crash need not be there after it."""
    run = sites.run(minimum_sites=NODES, patience=0.2)
    start(sites, run)
    run.rounds_file.unlink()
    for file in (run.path / "rounds").glob("00002.*"):
        file.unlink()
    for file in (run.path / "updates").glob("00002-*"):
        file.unlink()
    lines = run.receipts_file.read_bytes().splitlines(keepends=True)
    run.receipts_file.write_bytes(b"".join(lines[:NODES]))
    with pytest.raises(RunError, match="of the 3 that round 2 needs, 2 sites came"):
        start(sites, run, grid=Away(0, 10_000, run))
    assert [(each["round"], len(each["admitted"])) for each in records(run)] == [(1, NODES)]


def test_rounds_in_vain_end_a_run_that_can_go_on(sites: Sites) -> None:
    rounds = ROUNDS_IN_VAIN + 2
    run = with_rounds(sites, rounds, minimum_sites=NODES, round_deadline=1.0)
    with pytest.raises(
        RunError, match=rf"{ROUNDS_IN_VAIN} rounds in a row were not aggregated, the last .* round 3"
    ):
        start(sites, run, "silent")
    assert [each["aggregated"] for each in records(run)] == [False] * ROUNDS_IN_VAIN
    assert sites.charges(0, run) == list(range(1, ROUNDS_IN_VAIN + 1))
    start(sites, run)
    assert [each["aggregated"] for each in records(run)] == [False] * ROUNDS_IN_VAIN + [True] * 2
    assert sites.charges(0, run) == list(range(1, rounds + 1))


def test_a_run_that_budgets_cannot_finish_ends_before_anything_is_asked(sites: Sites) -> None:
    run = with_rounds(sites, 1001, minimum_sites=2)  # each costs a thousandth at least
    with pytest.raises(
        RunError, match=r"1001 rounds that remain fit the budgets of 0 sites, and each needs 2"
    ):
        start(sites, run)
    assert records(run) == []
    assert [sites.charges(number, run) for number in range(NODES)] == [[]] * NODES
    plan = run.plan()
    fits = rounds_that_fit(plan, Registry(sites.registry), 2)
    assert fits is not None
    assert 0 < fits < 1000


def test_a_sites_budget_counts_each_round_once_at_the_ledgers_own_order() -> None:
    site = Writer()
    reserve(site, asked("run-a", 1))
    from common.privacy.chain import verified_chain

    chain = verified_chain(site.entries)
    genesis, event = chain.genesis, GaussianSum(1000.0)
    exchanges = [Exchange(number, Phase.UPDATE, event) for number in (1, 2, 3)]
    assert charge_at(event, genesis.order, genesis.cap) == least_charge(genesis.cap)
    new, going = site_budget("north", chain, exchanges), site_budget("north", chain, exchanges, "run-a")
    assert new.left == chain.filter.cap - chain.filter.spent
    assert (new.cost, going.cost) == (3 * least_charge(genesis.cap), 2 * least_charge(genesis.cap))
    many = [Exchange(number, Phase.UPDATE, event) for number in range(1, 1100)]
    whole = site_budget("north", chain, many)
    assert not whole.fits
    assert whole.affords == new.left // least_charge(genesis.cap)


@pytest.mark.parametrize(("grace", "admitted"), [(60.0, NODES), (0.0, NODES - 1)])
def test_sites_that_were_asked_before_a_restart_are_waited_for_as_long_as_the_grace(
    sites: Sites, grace: float, admitted: int
) -> None:
    run = sites.run(minimum_sites=1, grace=grace, round_deadline=300.0)
    run.save_asked(2, [site.key_id for site in Registry(sites.registry).sites()])
    grid = Away(1, 4 if grace else 10_000, run)  # as one that connects last after the server is up again
    start(sites, run, grid=grid)
    assert [len(each["admitted"]) for each in records(run)] == [NODES, admitted]
