"""The lower layers' states of a site's users: computed once for a run, in the site's folder alone, never stale."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from client.lower_states import prepare_kept
from client.training import prepare_histories
from common.models.batches import HistoryBatch
from common.models.families.recommend import Recommend
from common.models.history_encoder import HistoryEncoder
from common.models.item_vectors import item_vectors
from tests.client.training_cases import a_model, batch_of, some_users
from tests.common.models.tiny_models import TEXTS, tiny_language_model

USERS = some_users(19, items=12)


def lora_model(*, texts: list[str] = TEXTS, seed: int = 0, top_layers: int = 2) -> Recommend:
    lm = tiny_language_model("bert", seed=seed)
    public = item_vectors(lm, texts, 6)
    encoder = HistoryEncoder(lm, texts, public.projection, top_layers=top_layers, rank=2, most_tokens=20)
    return Recommend(public.vectors, core="lstm", hidden_width=4, encoder=encoder)


def batch(rows: list[list[int]] = USERS) -> HistoryBatch:
    return batch_of(rows, 12)


@pytest.fixture(name="runs")
def lower_layers_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Users at each pass through the lower layers."""
    seen: list[int] = []
    below = HistoryEncoder._below

    def counted(encoder: HistoryEncoder, ids: Tensor, token_events: Tensor) -> Tensor:
        seen.append(len(ids))
        return below(encoder, ids, token_events)

    monkeypatch.setattr(HistoryEncoder, "_below", counted)
    return seen


def assert_same(found: HistoryBatch, wanted: HistoryBatch) -> None:
    for name in ("items", "times", "token_states", "token_events"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def kept(folder: Path, model: Recommend | None = None, rows: list[list[int]] = USERS) -> HistoryBatch:
    return prepare_kept(model or lora_model(), batch(rows), 8, folder)


def test_lower_layers_run_once_for_a_site_and_give_what_they_would_without_a_cache(
    tmp_path: Path, runs: list[int]
) -> None:
    wanted = prepare_histories(lora_model(), batch(), 8)
    model = lora_model()
    runs.clear()
    assert_same(kept(tmp_path / "lower", model), wanted)
    assert sum(runs) == 24  # nineteen users, evened
    assert_same(kept(tmp_path / "lower", model), wanted)
    assert_same(kept(tmp_path / "lower"), wanted)  # another process has a model of its own
    assert sum(users for users in runs if users > 1) == 24  # an encoder tries itself with one made-up user
    with torch.no_grad():  # what is trained lies above
        for parameter in model.trainable().values():
            parameter.add_(1.0)
    before = len(runs)
    assert_same(kept(tmp_path / "lower", model), wanted)
    assert len(runs) == before


def test_files_are_their_owners_alone_and_lie_in_the_sites_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTIDE_HOME", str(tmp_path / "home"))
    kept(tmp_path / "site" / "lower")
    folder = tmp_path / "site" / "lower"
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


CHANGES: dict[str, tuple[Callable[[], Recommend], list[list[int]]]] = {
    "a user less": (lora_model, USERS[:-1]),
    "other events": (lora_model, [*USERS[:-1], [1, 2, 3]]),
    "another encoder": (lambda: lora_model(seed=1), USERS),
    "other texts": (lambda: lora_model(texts=TEXTS[::-1]), USERS),
    "another cut": (lambda: lora_model(top_layers=1), USERS),
}


@pytest.mark.parametrize(("model", "rows"), CHANGES.values(), ids=CHANGES)
def test_other_histories_or_another_encoder_are_computed_anew_and_the_old_file_goes(
    model: Callable[[], Recommend], rows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = prepare_histories(model(), batch(rows), 8)
    kept(tmp_path)
    (old,) = tmp_path.iterdir()
    assert_same(kept(tmp_path, model(), rows), wanted)
    (new,) = tmp_path.iterdir()
    assert new != old
    monkeypatch.setattr(HistoryEncoder, "lower_key", lambda *_: "ab" * 32)  # a key that tells nothing apart
    kept(tmp_path)
    if len(rows) == len(USERS):
        stale = kept(tmp_path, model(), rows)
        assert not torch.equal(stale.token_states, wanted.token_states)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "a bit", "foreign"])
def test_a_damaged_or_foreign_file_is_computed_anew(damage: str, tmp_path: Path) -> None:
    wanted = prepare_histories(lora_model(), batch(), 8)
    kept(tmp_path / "mine")
    (file,) = (tmp_path / "mine").iterdir()
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:-200]
    elif damage == "a bit":
        data[len(data) // 2] ^= 4
    else:
        kept(tmp_path / "other", rows=[row[::-1] for row in USERS])
        (foreign,) = (tmp_path / "other").iterdir()
        data = bytearray(foreign.read_bytes())
    file.write_bytes(data)
    assert_same(kept(tmp_path / "mine"), wanted)


def test_a_disk_that_takes_no_file_costs_no_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lower").write_text("a file stands where the folder should")
    assert_same(kept(tmp_path / "lower"), prepare_histories(lora_model(), batch(), 8))
    assert "cannot be kept" in caplog.text


def test_a_model_without_lower_layers_and_a_site_without_users_write_nothing(tmp_path: Path) -> None:
    assert prepare_kept(a_model(), batch(), 8, tmp_path).token_states is None
    empty = kept(tmp_path, rows=[])
    assert empty.token_states is not None
    assert len(empty) == 0
    assert not list(tmp_path.iterdir())


def test_scores_of_prepared_histories_run_no_lower_layer_again_and_are_the_same(
    tmp_path: Path, runs: list[int]
) -> None:
    model = lora_model()
    wanted = model.scores(batch())
    prepared = kept(tmp_path, model)
    runs.clear()
    torch.testing.assert_close(model.scores(prepared), wanted)
    assert runs == []
    model.scores(batch())
    assert runs == [len(USERS)]  # without preparation it would be seen
    longer = prepared.followed_by(torch.ones(len(USERS), dtype=torch.int64))
    assert longer.token_states is None  # states of other histories are never taken along
