"""What is held out, and NDCG with several relevant items, against a plain reading of the definitions."""

import math

import numpy as np
import torch

from common.events.histories import Histories
from simulations.grid.protocols import LAST_INVOICE, LEAVE_ONE_OUT, hold_out, judge, one_user


def histories(events: list[list[tuple[int, int]]]) -> Histories:
    """From each user's (item, time)."""
    lengths = [len(each) for each in events]
    flat = [event for each in events for event in each]
    return Histories(
        users=np.array([f"u{row}" for row in range(len(events))]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.array([item for item, _ in flat], dtype=np.int32),
        times=np.array([time for _, time in flat], dtype=np.int64),
        kinds=np.zeros(len(flat), dtype=np.int16),
        values=np.full(len(flat), np.nan, dtype=np.float32),
        kind_names=("bought",),
    )


WHOLE = histories(
    [
        [(0, 1), (1, 1), (2, 5), (3, 9), (4, 9)],  # three invoices
        [(5, 2), (6, 4), (7, 4)],  # two
        [(8, 3), (9, 3)],  # one
    ]
)


def test_leave_one_out_keeps_the_last_for_the_test_and_the_one_before_for_validation() -> None:
    held_out = hold_out(WHOLE, LEAVE_ONE_OUT)
    assert [held_out.training.history(row).tolist() for row in range(3)] == [[0, 1, 2], [5], [8, 9]]
    assert held_out.validation.wanted.tolist() == [3, 6]
    assert held_out.test.wanted.tolist() == [4, 7]
    assert [held_out.test.histories.history(row).tolist() for row in range(2)] == [[0, 1, 2, 3], [5, 6]]


def test_the_whole_last_invoice_is_held_out() -> None:
    held_out = hold_out(WHOLE, LAST_INVOICE)
    assert [held_out.training.history(row).tolist() for row in range(3)] == [[0, 1], [5], [8, 9]]
    assert held_out.validation.wanted.tolist() == [
        2
    ]  # of the one user who has an invoice before it and one after
    assert held_out.test.wanted.tolist() == [3, 4, 6, 7]
    assert held_out.test.offsets.tolist() == [0, 2, 4]
    assert held_out.test.histories.history(0).tolist() == [0, 1, 2]


def test_nothing_held_out_is_learnt_from() -> None:
    for protocol in (LEAVE_ONE_OUT, LAST_INVOICE):
        held_out = hold_out(WHOLE, protocol)
        for question in (held_out.validation, held_out.test):
            for row, user in enumerate(question.histories.users):
                place = WHOLE.users.tolist().index(user)
                learnt = set(held_out.training.history(place).tolist())
                asked = set(question.wanted[question.offsets[row] : question.offsets[row + 1]].tolist())
                assert asked
                assert not asked & (learnt | set(question.histories.history(row).tolist()))


def test_ndcg_of_several_relevant_items_is_that_of_its_definition() -> None:
    chance = np.random.default_rng(0)
    for _ in range(50):
        scores = chance.normal(size=30)
        seen = chance.choice(30, size=5, replace=False)
        wanted = np.setdiff1d(chance.choice(30, size=int(chance.integers(1, 15)), replace=False), seen)
        if not len(wanted):
            continue
        order = [item for item in np.argsort(-scores) if item not in seen]
        gain = sum(1 / math.log2(place + 2) for place, item in enumerate(order[:10]) if item in wanted)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(10, len(wanted))))
        ndcg, hit = one_user(scores, wanted, seen.astype(np.int32), 30)
        assert math.isclose(ndcg, gain / ideal)
        assert hit == any(item in wanted for item in order[:10])


def test_equal_scores_are_worth_their_mid_rank() -> None:
    ndcg, hit = one_user(np.zeros(21), np.array([3]), np.array([], dtype=np.int32), 21)
    assert (ndcg, hit) == (0.0, 0.0)  # the middle of 21 is rank 11
    ndcg, _ = one_user(np.zeros(3), np.array([1]), np.array([], dtype=np.int32), 3)
    assert math.isclose(ndcg, 1 / math.log2(3))


def test_a_scorer_that_knows_the_answer_has_ndcg_one() -> None:
    question = hold_out(WHOLE, LAST_INVOICE).test

    def oracle(batch: object) -> torch.Tensor:
        scores = torch.zeros(2, 10)
        scores[0, [3, 4]] = torch.tensor([2.0, 1.0])  # in order, as equal ones share their mid-rank
        scores[1, [6, 7]] = torch.tensor([1.0, 2.0])
        return scores

    judged = judge(oracle, question, 10, max_events=4)
    assert judged.ndcg.tolist() == [1.0, 1.0]
    assert judged.hits.tolist() == [1.0, 1.0]
