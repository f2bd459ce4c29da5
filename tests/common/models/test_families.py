"""Every family, on every task, held to the contract: one row a user, no look ahead, zero residual at the start."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from client.opacus_gradients import check_layers, per_user_gradients
from common.config import PlanError, make_plan
from common.models.batches import HistoryBatch
from common.models.build import make_task
from common.models.families.lstm_lm import LstmLm
from common.models.history_encoder import HistoryEncoder
from common.models.item_vectors import ItemVectors, item_vectors
from common.models.language_model import LanguageModel, LanguageModelError
from common.models.names import CORES, FAMILIES, TASKS, named
from common.models.row_noise import row_noise
from common.models.sequence import Ingredients, SequenceModel
from tests.common.models.tiny_models import TEXTS, histories, tiny_language_model

WIDTH, EVENTS = 8, 6
CATEGORIES = [(("odd",), ("even", "small"), (), ("odd", "large"))[row % 4] for row in range(len(TEXTS))]
NEW_FAMILIES = [name for name in FAMILIES if name != "recommend"]
EVERY = [(family, task, "vectors") for family in FAMILIES for task in TASKS] + [
    (family, task, "lora") for family in NEW_FAMILIES for task in TASKS
]


@cache
def language_model(architecture: str = "bert") -> tuple[LanguageModel, ItemVectors]:
    lm = tiny_language_model(architecture)
    return lm, item_vectors(lm, TEXTS, WIDTH)


def a_model(
    family: str, task: str = "next-item", mode: str = "vectors", *, architecture: str = "bert", **more: Any
) -> SequenceModel:
    plan = make_plan(
        {
            "model": {
                "family": family,
                "task": task,
                "mode": mode,
                "width": WIDTH,
                "hidden_width": 4,
                "latent_width": 3,
                "soft_tokens": 2,
                "max_events": EVENTS,
                "time_features": True,
                "members": ("recommend", "dual", "lstm-vae", "lstm-lm", "classifier"),
                **more,
            }
        }
    ).model
    lm, public = language_model(architecture)
    torch.manual_seed(4)
    encoder = (
        HistoryEncoder(lm, TEXTS, public.projection, top_layers=2, rank=2, train_down=True, most_tokens=40)
        if mode == "lora"
        else None
    )
    of_task = make_task(plan, public.vectors, CATEGORIES)
    model: SequenceModel = named(FAMILIES, family).of(
        Ingredients(public.vectors, of_task, lm, public.projection, encoder, plan)
    )
    return model


def moved(model: SequenceModel) -> SequenceModel:
    """Away from the start, where zero layers hide what is behind them."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def a_batch() -> HistoryBatch:
    items, times = histories([[0, 3, 5, 7, 2, 1], [4, 9], [6, 8, 10, 11], [2, 2, 5], [1]], width=EVENTS)
    times = times * torch.tensor([1, 1, 3, 1, 1]).view(-1, 1)
    labels = ((items * 7 + 1) % 3 == 0).float()
    labels[items < 0] = float("nan")
    labels[0, 2] = float("nan")  # unknown
    return HistoryBatch(items=items, times=times, labels=labels)


def loop(model: SequenceModel, batch: HistoryBatch) -> dict[str, Tensor]:
    """Gradients one user at a time, by plain autograd."""
    model.train()
    rows = []
    for user in range(len(batch)):
        model.zero_grad()
        model.per_user_loss(batch.rows(torch.tensor([user]))).sum().backward()
        rows.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in model.trainable().items()
            }
        )
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(("family", "task", "mode"), EVERY)
def test_per_user_gradients_of_every_layer_equal_a_loop(family: str, task: str, mode: str) -> None:
    model, batch = moved(a_model(family, task, mode)), a_batch()
    check_layers(model)
    expected = loop(model, batch)
    with per_user_gradients(model) as gradients:
        found = dict(zip(model.trainable(), gradients(batch), strict=True))
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert rows.shape[0] == len(batch)
        torch.testing.assert_close(
            rows, expected[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert float(expected[name].abs().max()) > 1e-7, (
            f"{name} has no gradient: the comparison says nothing"
        )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_per_user_gradients_under_functorch_equal_a_loop(family: str) -> None:
    from opacus.grad_sample import GradSampleHooks

    model, batch = moved(a_model(family, "interest")), a_batch()
    expected = loop(model, batch)
    hooks = GradSampleHooks(model, loss_reduction="sum", force_functorch=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.per_user_loss(batch).sum().backward()
        for name, parameter in model.trainable().items():
            torch.testing.assert_close(parameter.grad_sample, expected[name], rtol=1e-3, atol=2e-5)  # type: ignore[attr-defined]
    finally:
        hooks.remove_hooks()


@pytest.mark.parametrize(("family", "task", "mode"), EVERY)
def test_a_users_loss_and_scores_do_not_depend_on_other_users(family: str, task: str, mode: str) -> None:
    model, batch = moved(a_model(family, task, mode)).train(), a_batch()
    one = torch.tensor([2])
    with torch.no_grad():
        torch.testing.assert_close(
            model.per_user_loss(batch)[2:3], model.per_user_loss(batch.rows(one)), rtol=1e-4, atol=1e-5
        )
    model.eval()
    torch.testing.assert_close(model.scores(batch)[2:3], model.scores(batch.rows(one)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "task", "mode"), EVERY)
def test_states_know_nothing_of_later_events_or_of_padding(family: str, task: str, mode: str) -> None:
    model, batch = moved(a_model(family, task, mode)).eval(), a_batch()
    later = batch.rows(torch.tensor([0]))
    earlier = HistoryBatch(
        items=later.items[:, :3], times=later.times[:, :3], labels=later.known_labels[:, :3]
    )
    padded = earlier.widened().widened()
    with torch.no_grad():
        torch.testing.assert_close(model.states(later)[:, :3], model.states(earlier), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.scores(padded), model.scores(earlier), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_at_the_start_every_family_is_the_content_recommender(family: str, task: str) -> None:
    batch = a_batch()
    content = a_model("recommend", task).eval().scores(batch)
    torch.testing.assert_close(a_model(family, task).eval().scores(batch), content, rtol=1e-5, atol=1e-6)
    assert (moved(a_model(family, task)).eval().scores(batch) - content).abs().max() > 1e-3


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_training_lowers_the_loss_and_the_state_travels(family: str, task: str) -> None:
    model, batch = a_model(family, task), a_batch()
    optimiser = torch.optim.Adam(model.trainable().values(), lr=0.03)
    before = float(model.train().per_user_loss(batch).detach().mean())
    for _ in range(40):
        optimiser.zero_grad()
        model.per_user_loss(batch).mean().backward()
        optimiser.step()
    assert float(model.per_user_loss(batch).detach().mean()) < before - 0.05
    other = a_model(family, task)
    other.load_trainable(model.trainable_state())
    assert torch.equal(other.eval().scores(batch), model.eval().scores(batch))


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_histories_that_are_empty_or_short_or_unlabelled_get_finite_scores_and_losses(
    family: str, task: str
) -> None:
    model = moved(a_model(family, task))
    candidates = len(model.task.candidates)
    for width in (0, 1, 3):
        batch = HistoryBatch(
            items=torch.full((2, width), -1, dtype=torch.int64),
            times=torch.zeros(2, width, dtype=torch.int64),
        )
        scores = model.eval().scores(batch)
        assert scores.shape == (2, candidates)
        assert scores.isfinite().all()
        if width:
            batch.items[0, 0] = 3
            assert model.eval().scores(batch).isfinite().all()
            assert model.train().per_user_loss(batch).isfinite().all()
            assert (
                float(model.train().per_user_loss(batch)[1].detach()) == 0.0
            )  # nothing to learn from nobody


@pytest.mark.parametrize("family", list(FAMILIES))
def test_interest_is_a_probability_that_own_later_labels_do_not_change(family: str) -> None:
    model, batch = moved(a_model(family, "interest")).eval(), a_batch()
    items = torch.tensor([8, 1, 2, 3, 4])
    found = model.interest(batch, items)
    assert ((found > 0) & (found < 1)).all()
    liked = batch.followed_by(items)
    assert liked.known_labels.gather(1, batch.lengths.unsqueeze(1)).isnan().all()
    flipped = HistoryBatch(items=batch.items, times=batch.times, labels=1 - batch.known_labels)
    assert (model.interest(flipped, items) - found).abs().max() > 1e-3  # labels of the past do count


def test_interest_logit_of_an_event_does_not_see_its_own_label() -> None:
    from common.models.tasks.interest import Interest

    for family in FAMILIES:
        model, batch = moved(a_model(family, "interest")).eval(), a_batch()
        flipped = HistoryBatch(items=batch.items, times=batch.times, labels=batch.known_labels.clone())
        flipped.known_labels[0, 3] = 1 - flipped.known_labels[0, 3]

        def logits(of: HistoryBatch, model: SequenceModel = model) -> Tensor:
            assert isinstance(model.task, Interest)
            reading = model.read(model.event_vectors(of), of)
            return model.task.logits(
                model.task.content(of) + reading.residual, model.priors_of(len(of)), of, reading.pairs
            ).detach()

        difference = (logits(batch) - logits(flipped))[0].abs()
        assert float(difference[:4].max()) < 1e-6
        assert float(difference[4:].max()) > 1e-4


def test_interest_asked_of_a_next_item_model_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"model\.task=interest"):
        a_model("recommend").interest(a_batch(), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("architecture", ["roberta", "electra", "gpt2", "llama", "qwen2"])
def test_soft_tokens_go_into_any_language_model(architecture: str) -> None:
    model, batch = moved(a_model("lstm-lm", architecture=architecture)), a_batch()
    expected = loop(model, batch)
    with per_user_gradients(model) as gradients:
        found = dict(zip(model.trainable(), gradients(batch), strict=True))
    for name, rows in found.items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-3, atol=2e-5)
    assert float(expected["to_token.weight"].abs().max()) > 1e-7
    with torch.no_grad():
        model.eval()
        later = model.states(batch.rows(torch.tensor([0])))
        shorter = HistoryBatch(items=batch.items[:1, :3], times=batch.times[:1, :3])
        torch.testing.assert_close(later[:, :3], model.states(shorter), rtol=1e-4, atol=1e-5)


def test_a_soft_token_out_of_the_window_is_not_read() -> None:
    model = a_model("lstm-lm", soft_tokens=1)
    see = model._attention(5, 1)[0, 0]  # type: ignore[operator]
    assert torch.equal(see == 0, torch.eye(5, dtype=torch.bool))


def test_too_many_events_for_the_positions_of_a_language_model_are_refused_in_words() -> None:
    with pytest.raises(LanguageModelError, match="choose at most"):
        a_model("lstm-lm", max_events=500)


@pytest.mark.parametrize("core", list(CORES))
def test_every_core_works_in_the_families_that_have_one(core: str) -> None:
    for family in ("recommend", "lstm-vae", "lstm-lm"):
        model, batch = moved(a_model(family, core=core)), a_batch()
        expected = loop(model, batch)
        with per_user_gradients(model) as gradients:
            for name, rows in zip(model.trainable(), gradients(batch), strict=True):
                torch.testing.assert_close(rows, expected[name], rtol=1e-3, atol=2e-5)


def test_row_noise_is_standard_normal_and_a_function_of_the_row_and_the_nonce() -> None:
    from scipy.stats import kstest

    items = torch.randint(0, 1000, (200, 20), generator=torch.Generator().manual_seed(0))
    noise = row_noise(items, 10, 5)
    assert torch.equal(noise[3:4], row_noise(items[3:4], 10, 5))
    assert not torch.equal(noise, row_noise(items, 10, 6))
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest((1.05 * noise).flatten().numpy(), "norm").pvalue < 1e-3  # the test would see a wrong scale
    same = row_noise(torch.full((1, 20), 7), 10, 5)
    assert len(same.flatten().unique()) == 200  # equal events do not share noise
    across = torch.corrcoef(noise.flatten(1).T[:40])
    assert float((across - torch.eye(40)).abs().max()) < 0.35


def test_ensembles_weigh_members_equally_at_the_start_and_need_two() -> None:
    model = a_model("ensemble")
    batch = a_batch()
    moved(model)
    with torch.no_grad():
        model.weights.weight.zero_()  # type: ignore[union-attr, operator]
        raw = model.event_vectors(batch)
        parts = [member.read(raw, batch).residual for member in model.members.values()]  # type: ignore[union-attr, operator]
        torch.testing.assert_close(model.read(raw, batch).residual, torch.stack(parts).mean(dim=0))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "needs 2 to 5 members, not 0"),
        (["recommend"], "needs 2 to 5 members, not 1"),
        (
            ["recommend", "ensemble"],
            "'ensemble' cannot be a member of an ensemble: choose among recommend, dual",
        ),
        (
            ["recommend", "gru4rec"],
            "'gru4rec' cannot be a member of an ensemble: choose among recommend, dual",
        ),
        (["dual", "recommend", "dual"], "'dual' stands 2 times among the members"),
    ],
)
def test_an_ensemble_of_too_few_unknown_or_repeated_members_is_refused_in_words(
    members: list[str], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        make_plan({"model": {"family": "ensemble", "members": members}})


def test_an_ensemble_names_the_member_for_which_the_plan_or_the_language_model_will_not_do() -> None:
    with pytest.raises(LanguageModelError, match="of the family lstm-lm: choose at most"):
        a_model("ensemble", max_events=500)
    with pytest.raises(LanguageModelError, match="or another family than lstm-lm"):
        a_model("ensemble", architecture="deberta-v2")


def test_a_language_model_that_takes_no_soft_tokens_or_ignores_the_window_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LanguageModelError, match="deberta-v2 takes no soft tokens"):
        a_model("lstm-lm", architecture="deberta-v2")
    assert a_model("dual", architecture="deberta-v2").scores(a_batch()).isfinite().all()
    everything = LstmLm._attention
    monkeypatch.setattr(LstmLm, "_attention", lambda self, *shape: torch.zeros_like(everything(self, *shape)))
    with pytest.raises(LanguageModelError, match="lets an event see later ones"):
        a_model("lstm-lm")
