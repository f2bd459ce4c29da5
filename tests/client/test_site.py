"""A site's answers, with a real ledger and real files: charge before touch, the same bytes again, one word for no."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

from client import site as site_module
from client.kept import device_of, take_threads
from client.ledger import Ledger
from client.ledger_reading import LedgerStatus
from client.policy import Limits, Performance
from client.site_folder import Site, SiteError
from client.training import StepSettings, train_round
from client.unit_memory import unit_memory
from common.config import Plan, make_plan
from common.events.catalog import Catalog
from common.events.histories import Histories
from common.models.batches import HistoryBatch
from common.models.build import build_model, item_texts
from common.models.interface import InterestModel
from common.privacy.receipts import Receipt, check_receipt_alone
from common.wire import Reason, Refusal, Request, Update, state_digest, state_to_bytes
from tests.asking import answer, answer_anyhow
from tests.tiny import WORDS, tiny_language_model

USERS, ITEMS, EVENTS = 12, 9, 5
NONCE = "ab" * 16
SECRET_USER = "user-whose-name-must-not-appear"
SECRET_ITEM = 7
CATALOG = Catalog(
    ids=tuple(f"i{item}" for item in range(ITEMS)),
    texts=tuple(f"red river {WORDS[item]}" for item in range(ITEMS)),
    categories=((),) * ITEMS,
)
Ask = Callable[..., Request]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny language model and a cache."""
    folder = tmp_path_factory.mktemp("shared")
    tiny_language_model(folder / "language-model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTIDE_HOME", str(folder / "home"))
        yield folder


@pytest.fixture(scope="module")
def plan(shared: Path) -> Plan:
    return make_plan(
        {
            "name": "tiny",
            "model": {
                "encoder": str(shared / "language-model"),
                "width": 4,
                "hidden_width": 4,
                "max_events": 6,
            },
            "privacy": {"users_per_site": 10, "noise_multiplier": 1.0, "sampling_rate": 0.5},
            "training": {"rounds": 40, "steps_per_round": 2},
        }
    )


def some_histories() -> Histories:
    chance = np.random.default_rng(0)
    events = USERS * EVENTS
    return Histories(
        users=np.array([SECRET_USER, *(f"pseudonym-{user}" for user in range(1, USERS))]),
        offsets=np.arange(0, events + 1, EVENTS, dtype=np.int64),
        items=chance.integers(0, ITEMS, size=events).astype(np.int32),
        times=np.arange(events, dtype=np.int64),
        kinds=np.zeros(events, dtype=np.int16),
        values=np.full(events, np.nan, dtype=np.float32),
        kind_names=("view",),
    )


@pytest.fixture
def site(tmp_path: Path, plan: Plan) -> Site:
    folder = tmp_path / "site"
    folder.mkdir(mode=0o700)
    CATALOG.save(tmp_path / "catalog.jsonl")
    made = Site(folder=folder, name="here", catalog=tmp_path / "catalog.jsonl", users_at_least=10)
    made.save()
    some_histories().save(made.histories_folder)
    Ledger.create(made.ledger_folder, epsilon=8, delta=1e-5, typical_plan=[plan.round_event()]).disconnect()
    return made


@pytest.fixture(scope="module")
def start(plan: Plan) -> dict[str, torch.Tensor]:
    """What the server broadcasts at first."""
    texts = item_texts(CATALOG.texts, CATALOG.categories)
    witness = plan.privacy.witness_places
    built = build_model(plan.model, texts, Path(plan.model.encoder), witness_places=witness)
    return built.model.trainable_state()


@pytest.fixture
def ask(plan: Plan, start: dict[str, torch.Tensor]) -> Ask:
    """Makes a request of the plan, for round 1 unless told."""

    def made(round: int = 1, *, nonce: str = NONCE, attempt: int = 1) -> Request:
        return Request(
            run="run-a", round=round, attempt=attempt, nonce=nonce, plan=plan.model_dump_json(), state=start
        )

    return made


def status(site: Site) -> LedgerStatus:
    with Ledger.open(site.ledger_folder) as ledger:
        ledger.verify()
        return ledger.status()


def outcomes(site: Site) -> list[str]:
    return [charge.outcome for charge in status(site).charges]


def lose_histories(site: Site) -> None:
    """Whoever looks at the data from here on fails."""
    site.histories_folder.rename(site.histories_folder.with_name("elsewhere"))


def test_a_request_that_has_expired_spends_nothing_and_one_that_has_not_is_answered(
    site: Site, ask: Ask
) -> None:
    assert answer(site, ask(), until=time.time() - 0.01) == Refusal(Reason.EXPIRED)
    assert outcomes(site) == []
    assert isinstance(answer(site, ask(), until=time.time() + 60), Update)
    assert outcomes(site) == ["released"]
    assert answer(site, ask(), until=0.0) == Refusal(Reason.EXPIRED)  # nor are the same bytes sent again


def test_a_round_is_charged_and_answered_with_an_update_and_its_receipt(
    site: Site, plan: Plan, ask: Ask
) -> None:
    request = ask()
    reply = answer(site, request)
    assert isinstance(reply, Update)
    assert set(reply.state) == set(request.state)
    assert all(float(change.norm()) > 0 for change in reply.state.values())
    assert outcomes(site) == ["released"]
    (charge,) = status(site).charges
    assert charge.reserve.event == plan.round_event()
    assert charge.reserve.plan_hash == plan.digest()
    assert charge.reserve.model_hash == state_digest(request.state)
    assert charge.reserve.nonce == NONCE
    assert (charge.reserve.clip_norm, charge.reserve.normaliser) == (
        plan.privacy.clip_norm,
        plan.privacy.normaliser,
    )
    assert (
        check_receipt_alone(Receipt.from_bytes(reply.receipt), state_to_bytes(reply.state)) == charge.reserve
    )


def test_the_charge_stands_in_the_ledger_before_histories_are_opened(
    site: Site, plan: Plan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = Histories.load, list[list[str]]()

    def watched(folder: Path) -> Histories:
        seen.append(outcomes(site))  # through a second connection: it is on the disk
        return real(folder)

    monkeypatch.setattr(Histories, "load", watched)
    assert isinstance(answer(site, ask()), Update)
    assert seen == [["open"]]


def test_a_round_that_fails_at_the_data_stays_charged(site: Site, plan: Plan, ask: Ask) -> None:
    lose_histories(site)
    assert answer(site, ask()) == Refusal(Reason.FAILED)
    assert outcomes(site) == ["burnt"]
    assert status(site).spent > 0


def test_a_round_that_fails_in_training_stays_charged(
    site: Site, plan: Plan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "train_round", fail)
        assert answer(site, ask()) == Refusal(Reason.FAILED)
    assert outcomes(site) == ["burnt"]
    assert answer(site, ask()) == Refusal(Reason.POLICY)  # no second try of the same attempt
    assert isinstance(answer(site, ask(attempt=2)), Update)
    assert outcomes(site) == ["burnt", "released"]


def test_an_update_that_is_no_number_stays_at_the_site(
    site: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def infinite(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
        return {name: tensor / 0 for name, tensor in train_round(*given, **named).items()}

    monkeypatch.setattr(site_module, "train_round", infinite)
    assert answer(site, ask()) == Refusal(Reason.FAILED)
    assert outcomes(site) == ["burnt"]


@pytest.mark.parametrize(
    "change",
    [
        lambda request: {"state": {name: tensor[:1] for name, tensor in request.state.items()}},
        lambda request: {"state": {}},
        lambda _: {"released": {"popularity": torch.zeros(3)}},
        lambda request: {"state": {name: tensor * math.inf for name, tensor in request.state.items()}},
        lambda request: {
            "state": {name: torch.full_like(tensor, math.nan) for name, tensor in request.state.items()}
        },
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_anything_is_reserved(
    site: Site, ask: Ask, change: Callable[[Request], dict[str, object]]
) -> None:
    lose_histories(site)
    request = ask()
    assert answer(site, replace(request, **change(request))) == Refusal(Reason.MODEL)  # type: ignore[arg-type]
    assert outcomes(site) == []


def test_a_model_that_the_engine_does_not_vouch_for_burns_no_round(
    site: Site, ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("client.opacus_gradients.LARGEST_DIMENSION", 10)
    monkeypatch.setattr("client.self_test._SHOWN", WeakKeyDictionary())
    lose_histories(site)
    assert answer(site, ask()) == Refusal(Reason.MODEL)
    assert "trainable coordinates" in caplog.text
    assert outcomes(site) == []


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("performance", {"micro_batch": 9}),
        ("performance", {"micro_batch": 64}),
        ("performance", {"threads": 4}),
        ("performance", {"device": "auto"}),
        ("performance", {"device": "cpu"}),
        ("performance", {"engine": "opacus"}),
        ("performance", {}),
        ("model", {"frozen_precision": "float32"}),
    ],
)
def test_a_server_that_says_how_a_site_is_to_compute_is_refused_and_nothing_is_charged(
    site: Site, ask: Ask, section: str, fields: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    lose_histories(site)
    request, threads = ask(), torch.get_num_threads()
    values = json.loads(request.plan)
    values[section] = values.get(section, {}) | fields
    assert answer(site, replace(request, plan=json.dumps(values))) == Refusal(Reason.PLAN)
    assert "policy.toml" in caplog.text
    assert outcomes(site) == []
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"width": 516}, "width in policy.toml"),
        ({"hidden_width": 4096}, "hidden_width in policy.toml"),
        ({"max_events": 501}, "max_events in policy.toml"),
        ({"negatives": 10_001}, "negatives in policy.toml"),
        ({"mode": "lora", "most_tokens": 1025}, "most_tokens in policy.toml"),
        ({"mode": "lora", "lora_rank": 65}, "lora_rank in policy.toml"),
        ({"core": "decay", "hidden_width": 512, "max_events": 500}, "memory, both in policy.toml"),
        ({"core": "attention"}, "cores in policy.toml"),
    ],
)
def test_a_plan_beyond_what_the_policy_allows_is_refused_before_anything_is_looked_up(
    site: Site, ask: Ask, fields: dict[str, object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    replace(site, limits=Limits(cores=("lstm", "decay"))).save()
    site.catalog.unlink()  # whoever looked anything up, opened a ledger or built a model would fail
    database = site.ledger_folder / "ledger.sqlite"
    database.rename(site.folder / "elsewhere")
    request = ask()
    values = json.loads(request.plan)
    values["model"] |= fields
    assert answer(Site.load(site.folder), replace(request, plan=json.dumps(values))) == Refusal(Reason.PLAN)
    assert says in caplog.text
    (site.folder / "elsewhere").rename(database)
    assert outcomes(site) == []


def test_what_a_catalog_makes_too_large_is_refused_before_a_model_is_built(
    site: Site, plan: Plan, ask: Ask, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = unit_memory(plan, Performance()) / 2**30
    with_items = unit_memory(plan, Performance(), items=ITEMS) / 2**30
    replace(site, limits=Limits(memory=(alone + with_items) / 2)).save()
    with monkeypatch.context() as patch:
        patch.setattr("client.site.site_model", None)
        assert answer(Site.load(site.folder), ask()) == Refusal(Reason.PLAN)
    assert "would need about" in caplog.text
    assert outcomes(site) == []
    replace(site, limits=Limits(memory=with_items)).save()
    assert isinstance(answer(Site.load(site.folder), ask()), Update)


def test_a_policy_that_names_no_threads_gets_those_of_the_process_again() -> None:
    with few_threads(2):
        for named, taken in ((None, 2), (1, 1), (3, 3), (None, 2), (1, 1), (None, 2)):
            take_threads(Performance(threads=named))
            assert torch.get_num_threads() == taken


def test_a_site_computes_as_its_own_policy_says(
    site: Site, plan: Plan, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[StepSettings] = []
    real = site_module.train_round

    def watched(model: InterestModel, histories: HistoryBatch, settings: StepSettings, **more: Any) -> Any:
        seen.append(settings)
        assert {each.device.type for each in model.parameters()} == {histories.items.device.type} == {"cpu"}
        return real(model, histories, settings, **more)

    monkeypatch.setattr(site_module, "train_round", watched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # an accelerator is not taken unasked
    for number, own in enumerate((Performance(), Performance(micro_batch=8, threads=2, engine="opacus")), 1):
        replace(site, performance=own).save()
        with few_threads(1):
            assert isinstance(answer(Site.load(site.folder), ask(number)), Update)
            assert torch.get_num_threads() == (own.threads or 1)
        assert seen.pop() == StepSettings.of(plan, own)
    assert StepSettings.of(plan, own) == replace(StepSettings.of(plan), micro_batch=8, engine="opacus")


def test_an_accelerator_is_taken_with_the_sites_own_yes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of(Performance()).type == "cpu"
        assert device_of(Performance(device="cuda")).type == "cuda"
        assert device_of(Performance(device="auto")).type == ("cuda" if there else "cpu")


@contextmanager
def few_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_retry_gets_the_same_bytes_without_a_second_charge(site: Site, plan: Plan, ask: Ask) -> None:
    request = ask()
    first = answer(site, request)
    lose_histories(site)  # nor is the data looked at again
    second = answer(site, request)
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert state_to_bytes(first.state) == state_to_bytes(second.state)
    assert first.receipt == second.receipt
    assert outcomes(site) == ["released"]


def test_another_nonce_for_a_round_already_released_is_no_second_noising(
    site: Site, plan: Plan, ask: Ask
) -> None:
    assert isinstance(answer(site, ask()), Update)
    assert answer(site, ask(nonce="cd" * 16)) == Refusal(Reason.POLICY)
    assert outcomes(site) == ["released"]


def test_an_exhausted_budget_is_refused_and_nothing_is_touched(site: Site, plan: Plan, ask: Ask) -> None:
    lose_histories(site)  # whoever touched the data would fail in another way
    event = plan.round_event()
    with Ledger.open(site.ledger_folder) as ledger:
        round_ = 0
        while ledger.fits(event):
            round_ += 1
            ledger.burn(
                ledger.reserve(
                    run="spend",
                    round=round_,
                    attempt=1,
                    event=event,
                    plan_hash="a" * 64,
                    model_hash="b" * 64,
                    nonce=NONCE,
                    clip_norm=1.0,
                    normaliser=1.0,
                    learning_rate=1.0,
                )
            )
        before = ledger.status()
    assert answer(site, ask()) == Refusal(Reason.BUDGET)
    assert status(site) == before


def test_a_site_that_has_withdrawn_refuses(site: Site, plan: Plan, ask: Ask) -> None:
    with Ledger.open(site.ledger_folder) as ledger:
        ledger.withdraw()
    lose_histories(site)
    assert answer(site, ask()) == Refusal(Reason.CLOSED)


def changed(plan: Plan, **sections: dict[str, object]) -> str:
    values = json.loads(plan.model_dump_json())
    for section, fields in sections.items():
        values[section].update(fields)
    return json.dumps(values)


@pytest.mark.parametrize(
    "bad",
    [
        lambda plan: changed(plan, privacy={"users_per_site": 11}),  # more than the site has agreed to
        lambda plan: changed(plan, privacy={"noise_multiplier": None}),
        lambda plan: changed(plan, privacy={"noise_multiplier": 0.001}),
        lambda plan: changed(plan, privacy={"sampling_rate": 1.5}),
        lambda plan: changed(plan, privacy={"unheard_of": 1}),
        lambda plan: changed(plan, model={"family": "unknown"}),
        lambda plan: changed(plan, training={"rounds": 0}),
        lambda _: "no JSON",
        lambda _: "[]",
        lambda _: "null",
        lambda _: "[" * 200_000,
        lambda _: '{"privacy": NaN}',
        lambda _: '{"privacy": {"epsilon": ' + "1" * 5000 + "}}",
    ],
)
def test_a_plan_that_the_site_does_not_accept_costs_nothing(
    site: Site, plan: Plan, ask: Ask, bad: object
) -> None:
    assert callable(bad)
    lose_histories(site)
    request = replace(ask(), plan=bad(plan))
    assert answer(site, request) == Refusal(Reason.PLAN)
    assert outcomes(site) == []


def test_a_round_that_the_plan_does_not_have_costs_nothing(site: Site, plan: Plan, ask: Ask) -> None:
    assert answer(site, ask(round=41)) == Refusal(Reason.PLAN)
    for round_ in ("0", "-1"):
        assert answer_anyhow(site, ask(), round=round_) == Refusal(Reason.ORIGIN)
    assert outcomes(site) == []


def test_a_family_that_is_not_on_the_sites_list_is_refused(site: Site, plan: Plan, ask: Ask) -> None:
    assert answer(replace(site, families=()), ask()) == Refusal(Reason.PLAN)


@pytest.mark.parametrize(
    "fields",
    [
        {"run": ""},
        {"run": "x" * 3_000},
        {"run": "../../etc"},
        {"nonce": "no hex"},
        {"nonce": ""},
        {"attempt": "-1"},
        {"phase": "confession"},
        {"expires": "soon"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_request_with_fields_out_of_bounds_is_refused_in_one_word(
    site: Site, ask: Ask, fields: dict[str, str]
) -> None:
    lose_histories(site)
    assert answer_anyhow(site, ask(), **fields) == Refusal(Reason.ORIGIN)
    assert outcomes(site) == []


@pytest.mark.parametrize("anchor", [b"no anchor", b"{}", b""])
def test_an_anchor_that_is_none_is_refused_though_the_server_signed_it(
    site: Site, ask: Ask, anchor: bytes
) -> None:
    lose_histories(site)
    assert answer(site, replace(ask(), anchor=anchor)) == Refusal(Reason.POLICY)
    assert outcomes(site) == []


def test_an_abandoned_reservation_is_burnt_at_the_next_request(site: Site, plan: Plan, ask: Ask) -> None:
    with Ledger.open(site.ledger_folder) as ledger:
        ledger.reserve(
            run="dead",
            round=1,
            attempt=1,
            event=plan.round_event(),
            plan_hash="a" * 64,
            model_hash="b" * 64,
            nonce=NONCE,
            clip_norm=1.0,
            normaliser=1.0,
            learning_rate=1.0,
        )
    assert isinstance(answer(site, ask()), Update)
    assert outcomes(site) == ["burnt", "released"]


def test_no_log_line_holds_data(
    site: Site, plan: Plan, ask: Ask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{SECRET_USER} bought item {SECRET_ITEM}")

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(site_module, "train_round", fail)
    assert answer(site, ask()) == Refusal(Reason.FAILED)
    assert "RuntimeError" in caplog.text  # the kind of failure is told to the site's own log
    assert SECRET_USER not in caplog.text
    assert "item 7" not in caplog.text
    assert all(record.exc_info is None for record in caplog.records)


def test_progress_tells_steps_alone(site: Site, plan: Plan, ask: Ask) -> None:
    answer(site, ask(round=3))
    assert (site.folder / "progress").read_text() == "3 2 2"


def test_a_site_reads_back_what_it_saved(site: Site) -> None:
    assert Site.load(site.folder) == site


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"name": 1}', "\x00"])
def test_a_folder_without_a_readable_site_is_refused_in_words(tmp_path: Path, content: str) -> None:
    with pytest.raises(SiteError, match="holds nothing"):
        Site.load(tmp_path)
    (tmp_path / "site.json").write_text(content)
    with pytest.raises(SiteError, match=r"site\.json is damaged: put the newest copy"):
        Site.load(tmp_path)


def over(plan: Plan, catalog: Catalog, request: Request) -> Request:
    return replace(request, plan=plan.for_catalog(catalog.digest()).model_dump_json())


def test_a_plan_over_the_same_items_in_another_order_is_refused_and_costs_nothing(
    site: Site,
    plan: Plan,
    ask: Ask,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = [1, 0, *range(2, ITEMS)]
    other = Catalog(CATALOG.ids, tuple(CATALOG.texts[row] for row in order), CATALOG.categories)
    request = over(plan, other, ask())
    assert answer(site, request) == Refusal(Reason.PLAN)
    assert outcomes(site) == []
    assert other.digest() in caplog.text
    assert CATALOG.digest() in caplog.text
    with monkeypatch.context() as patch:  # nothing else would have refused it
        patch.setattr(Plan, "check_catalog", lambda *_: None)
        assert isinstance(answer(site, request), Update)
    assert isinstance(answer(site, over(plan, CATALOG, ask(2))), Update)
