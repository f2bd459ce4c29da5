"""What is held out reaches no site, by any split; and a development run never looks at the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site_folder import SiteError
from common.events.cleaning import CleaningPolicy
from common.events.histories import Histories
from simulations import federation
from simulations.outcome import FEDTIDE, POPULARITY, Outcome
from simulations.sites import whole_histories
from simulations.splits import Fold, LeaveOneOut, Split, Temporal
from tests.tiny import own_cache, tiny_dataset, tiny_files, tiny_language_model, tiny_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Histories:
    dataset = tiny_dataset(tmp_path_factory.mktemp("data"))
    return whole_histories(dataset, CleaningPolicy(minimum_events=5), seed=0)[0]


def held(run: Outcome) -> list[Histories]:
    return [Histories.load(site.folder / "histories") for site in run.sites]


def events_of(histories: Histories) -> set[tuple[str, int, int]]:
    users = np.repeat(histories.users, histories.lengths)
    return set(zip(users.tolist(), histories.times.tolist(), histories.items.tolist(), strict=True))


def splits(whole: Histories) -> list[Split]:
    return [LeaveOneOut(), Temporal.of(whole), Fold.of(whole, 2, 3, seed=0)]


def test_no_event_to_foretell_is_trained_on_and_validation_shows_nothing_of_the_test(
    whole: Histories,
) -> None:
    for split in splits(whole):
        training = events_of(split.training(whole))
        validation, test = split.judged(whole, "validation"), split.judged(whole, "test")
        to_foretell = {}
        for part, judged in (("validation", validation), ("test", test)):
            last = judged.offsets[1:] - 1
            to_foretell[part] = set(
                zip(
                    judged.users.tolist(),
                    judged.times[last].tolist(),
                    judged.items[last].tolist(),
                    strict=True,
                )
            )
            assert len(to_foretell[part]) > 5
            assert not to_foretell[part] & training
            assert (judged.lengths >= 2).all()
        assert not to_foretell["test"] & events_of(validation)
        assert not to_foretell["test"] & to_foretell["validation"]


def test_a_temporal_split_trains_before_its_first_moment_and_tests_from_its_second_on(
    whole: Histories,
) -> None:
    split = Temporal.of(whole)
    assert (split.training(whole).times < split.validation_from).all()
    assert (split.training(whole).lengths > 0).all()
    assert (split.judged(whole, "validation").times < split.test_from).all()
    test = split.judged(whole, "test")
    assert (test.times[test.offsets[1:] - 1] >= split.test_from).all()
    assert "temporal split: training before 2023-11-1" in split.words


def test_a_log_whose_events_share_one_time_has_no_temporal_split(whole: Histories) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="no moment parts validation from test"):
        Temporal.of(replace(whole, times=np.zeros_like(whole.times)))


def test_each_user_judges_in_one_fold_and_is_at_no_site_then(whole: Histories) -> None:
    judging: list[str] = []
    for number in (1, 2, 3):
        fold = Fold.of(whole, number, 3, seed=0)
        users = fold.judged(whole, "validation").users.tolist()
        assert not set(users) & set(fold.training(whole).users.tolist())
        assert len(users) + len(fold.training(whole)) == len(whole)
        judging += users
    assert sorted(judging) == sorted(whole.users.tolist())


def test_sites_of_a_temporal_run_hold_nothing_from_the_moment_on(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, split="temporal")
    dataset = tiny_dataset(tmp_path / "data")
    split = Temporal.of(whole_histories(dataset, CleaningPolicy(minimum_events=5), seed=0)[0])
    assert all((histories.times < split.validation_from).all() for histories in held(run))
    assert split.words in (run.run.path / "summary.md").read_text()
    assert set(run.test) >= {FEDTIDE, POPULARITY}
    # The check can fail: leave-one-out leaves later events at the sites.
    other = tiny_run(tmp_path, sites=tmp_path / "kept")
    assert any((histories.times >= split.validation_from).any() for histories in held(other))
    with pytest.raises(SiteError, match="made under the split leave-one-out"):
        tiny_run(tmp_path, sites=tmp_path / "kept", split="temporal")


def test_a_run_without_a_look_at_the_test_split_evaluates_and_shows_validation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    whole_evaluate = federation.evaluate

    def spy(scorer: Any, held_out: Any, part: Any, *more: Any) -> Any:
        looked.append(part)
        return whole_evaluate(scorer, held_out, part, *more)

    monkeypatch.setattr(federation, "evaluate", spy)
    run = tiny_run(tmp_path, test=False)
    assert set(looked) == {"validation"}
    assert run.test == {}
    assert run.part == "validation"
    assert set(run.results) == set(run.final_validation) >= {FEDTIDE, POPULARITY}
    summary = (run.run.path / "summary.md").read_text()
    assert "validation; nobody looked at the test split" in summary
    last = json.loads((run.run.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(last) == {"final", "validation"}
    # The check can fail: a run that looks is seen to look.
    looked.clear()
    assert set(tiny_run(tmp_path).test) >= {FEDTIDE, POPULARITY}
    assert looked.count("test") == 3


def test_folds_and_splits_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from common.cli import main

    model = tiny_language_model(tmp_path / "model")
    log, catalog = tiny_files(tmp_path / "data", users=60)
    command = [
        *("simulate", "--log", str(log), "--catalog", str(catalog), "--encoder", str(model), "--offline"),
        *("--engine", "inline", "--n-sites", "2", "--users-per-site", "10", "--rounds", "1", "--steps", "1"),
        *("--baseline-epochs", "0", "--runs", str(tmp_path / "runs"), "--set", "model.width=8", "--json"),
    ]

    def run(*options: str) -> tuple[object, str, str]:
        with own_cache(tmp_path / "cache"), pytest.raises(SystemExit) as end:
            main([*command, *options])
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    code, printed, shown = run("--folds", "2")
    assert code == 0, shown
    found = json.loads(printed)
    assert [fold["split"].rpartition(": ")[2] for fold in found["folds"]] == ["fold 1 of 2", "fold 2 of 2"]
    assert all("test" not in fold and fold["validation"][FEDTIDE] for fold in found["folds"])
    values = [fold["validation"][FEDTIDE]["MRR"]["value"] for fold in found["folds"]]
    mean, deviation = found["validation"][FEDTIDE]["MRR"]
    assert (mean, deviation) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert "validation over 2 folds of users" in shown
    assert "looked at once" not in shown

    code, printed, shown = run("--split", "temporal", "--no-test")
    assert code == 0, shown
    assert "test" not in json.loads(printed)
    assert json.loads(printed)["split"].startswith("temporal split")

    for wrong, said in (
        (("--split", "random"), "split 'random' is unknown: choose leave-one-out or temporal"),
        (("--folds", "1"), "--folds 1 must be at least 2"),
        (("--folds", "2", "--split", "temporal"), "folds go with leave-one-out"),
        (("--folds", "61"), "must lie between 2 and the 60 users"),
    ):
        code, _, shown = run(*wrong)
        assert code == 2
        assert said in " ".join(shown.split())
