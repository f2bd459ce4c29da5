"""Runs side by side: tables, a plot, a test over the same users, and refusals of what says nothing of one another."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from common.cli import main
from server.runs import RunError, RunFolder
from simulations import begun
from simulations.by_user import load_by_user
from simulations.compare import Pair, _with_holm, compare
from simulations.federation import simulate
from simulations.outcome import FEDTIDE, Outcome
from simulations.quality import category_quality, interest_quality, ranking_quality
from tests.tiny import own_cache, tiny_dataset, tiny_options, tiny_plan, tiny_run

QUIET = {"privacy": {"noise_multiplier": 0.9, "epsilon": 100.0}, "training": {"learning_rate": 0.5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def three(folder: Path) -> list[Outcome]:
    """Two of one plan with other seeds, and one with far less noise."""
    return [
        tiny_run(folder, plan={"name": "noisy"}),
        tiny_run(folder, plan={"name": "again"}, seed=1),
        tiny_run(folder, plan={"name": "quiet", **QUIET}),
    ]


def runs_of(outcomes: list[Outcome]) -> list[RunFolder]:
    return [outcome.run for outcome in outcomes]


def test_a_comparison_is_of_the_same_users_one_by_one(three: list[Outcome]) -> None:
    found = compare(runs_of(three))
    assert found.part == "test"
    assert found.headline == "NDCG@10"
    for other, pair in zip(three[1:], found.pairs, strict=True):
        own, theirs = (load_by_user(each.run, "test").of[FEDTIDE]["NDCG@10"] for each in (three[0], other))
        assert own.mean() == pytest.approx(three[0].test[FEDTIDE].metrics["NDCG@10"].value)
        independent = ttest_rel(theirs, own)
        assert pair.mean == pytest.approx(theirs.mean() - own.mean())
        assert pair.mean / pair.standard_error == pytest.approx(independent.statistic)
        assert pair.p == pytest.approx(2 * norm.sf(abs(independent.statistic)))
        assert pair.users == 120
    assert set(found.differing) >= {"simulate.seed", "privacy.epsilon", "privacy.noise_multiplier"}
    assert not {"name", "model.width", "simulate.split"} & set(found.differing)
    assert found.differing["simulate.seed"] == ["0", "1", "0"]


def test_users_are_paired_whatever_the_seed_calls_them(three: list[Outcome]) -> None:
    one, other = (load_by_user(each.run, "test") for each in three[:2])
    assert (one.keys == other.keys).all()
    assert sorted(one.keys) == one.keys.tolist()
    # Content alone is the same model under both seeds, so its figures agree where the same event is foretold.
    same = one.targets == other.targets
    assert same.mean() > 0.9
    pair = [each.of["content only"]["NDCG@10"][same] for each in (one, other)]
    np.testing.assert_allclose(pair[0], pair[1], atol=1e-9)
    # The check can fail: users in another order do not agree.
    assert np.abs(pair[0] - np.roll(pair[1], 1)).max() > 0.1


def test_holm_allows_for_how_many_are_held_against_the_first() -> None:
    def pair(p: float) -> Pair:
        return Pair("x", "m", 9, 0.1, 0.1, p, p, 0.0)

    held = _with_holm([pair(0.02), pair(0.01), pair(0.04), pair(0.6), pair(math.nan)][:4])
    assert [each.p_holm for each in held] == pytest.approx([0.06, 0.04, 0.08, 0.6])
    assert held[0].verdict == "no significant difference"
    assert held[1].verdict == "better"
    assert _with_holm([pair(math.nan)])[0].verdict == "no significant difference"


def refused(runs: list[RunFolder], **part: Any) -> str:
    with pytest.raises(RunError) as error:
        compare(runs, **part)
    said = str(error.value)
    assert "\n" not in said
    return said


def test_what_says_nothing_of_one_another_is_refused_in_a_sentence(
    three: list[Outcome], folder: Path, tmp_path: Path
) -> None:
    first = three[0].run
    assert "give two runs or more" in refused([first])
    assert "is given twice" in refused([first, first])
    with own_cache(folder / "cache"):
        fewer = simulate(
            tiny_dataset(tmp_path / "data", users=100),
            tiny_plan(folder / "language-model"),
            tiny_options(tmp_path),
        )
    assert "they are of other data" in refused([first, fewer.run])
    temporal = tiny_run(folder, plan={"name": "temporal"}, split="temporal", n_sites=2).run
    assert "one holds out by leave-one-out, the other by temporal" in refused([first, temporal])
    fold = tiny_run(folder, plan={"name": "fold"}, fold=(1, 3), test=False, n_sites=2).run
    assert "holds out by leave-one-out, the other by fold 1 of 3" in refused([first, fold])
    assert "no figures of its test split: compare the runs by --part validation" in refused(
        [first, fold], part="test"
    )
    categories = tiny_run(folder, plan={"name": "categories", "model": {"task": "next-category"}}).run
    assert "of the task next-item, the other of next-category" in refused([first, categories])

    def changed(name: str, change: Callable[[RunFolder], None]) -> RunFolder:
        copy = RunFolder(tmp_path / name)
        shutil.copytree(first.path, copy.path)
        change(copy)
        return copy

    half = changed("half.incomplete", lambda run: None)
    assert "has not come to its end" in refused([first, half])
    assert "simulate --resume" in refused([first, half])
    bare = changed("bare", lambda run: (run.path / "private" / "by-user.npz").unlink())
    assert "keeps no figures of its test split by user" in refused([first, bare])
    served = changed("served", lambda run: run.metrics_file.unlink())
    assert "as a deployment's run has none" in refused([first, served])

    def other_users(run: RunFolder) -> None:
        file = run.path / "private" / "by-user.npz"
        with np.load(file) as kept:
            arrays = {name: kept[name] for name in kept.files}
        arrays["test/keys"][0] = b"0" * 32
        np.savez(file, **arrays)

    assert "they are judged by other users" in refused([first, changed("users", other_users)])
    old = changed("old", lambda run: (run.path / "private" / "simulation.json").unlink())
    assert "does not say what it was begun with" in refused([first, old])


def test_runs_without_a_look_at_the_test_are_compared_on_validation(
    three: list[Outcome], folder: Path
) -> None:
    blind = tiny_run(folder, plan={"name": "blind"}, test=False)
    assert compare([three[0].run, blind.run]).part == "validation"
    assert compare(runs_of(three), "validation").part == "validation"


def test_another_task_is_compared_by_its_own_metric(folder: Path) -> None:
    made = [
        tiny_run(folder, plan={"name": name, "model": {"task": "next-category"}}).run for name in ("a", "b")
    ]
    found = compare(made)
    assert found.headline == "HR@1"
    assert found.pairs[0].metric == "reciprocal rank"


def test_every_task_keeps_what_is_compared_of_each_user() -> None:
    chance = np.random.default_rng(4)
    labels = chance.integers(0, 2, 40)
    interest = interest_quality(chance.random(40), labels)
    right = np.eye(5, dtype=bool)[chance.integers(0, 5, 40)]
    category = category_quality(chance.random((40, 5)), right)
    ranking = ranking_quality(chance.integers(1, 20, 40).astype(float), np.zeros((40, 10), int), 20)
    for quality in (interest, category, ranking):
        assert quality.by_user[quality.per_user_name] is quality.per_user
        for name, values in quality.by_user.items():
            assert values.shape == (40,)
            if name in quality.metrics:
                assert quality.metrics[name].value == pytest.approx(values.mean())


def test_the_command_prints_a_table_and_leaves_table_plot_and_json(
    three: list[Outcome], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["compare", *arguments])
        found = capsys.readouterr()
        assert end.value.code == 0, found.err
        return found.out

    names = [outcome.run.name for outcome in three]
    out = said(*names, "--runs", str(folder / "runs"), "--out", str(tmp_path / "it"))
    assert all(name in out for name in names)
    assert "2 against 1: NDCG@10" in out
    assert "of 2 tests by Holm" in " ".join(out.split())
    assert "they are private, and no epsilon covers them" in " ".join(out.split())
    assert (tmp_path / "it" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "it" / "comparison.md").read_text()
    assert "| privacy.noise_multiplier | 2.0 | 2.0 | 0.9 |" in page
    told = json.loads(
        said(*(str(outcome.run.path) for outcome in three), "--out", str(tmp_path / "that"), "--json")
    )
    assert told == json.loads((tmp_path / "that" / "comparison.json").read_bytes())
    assert [run["run"] for run in told["runs"]] == names
    # Nothing of a single user: no list is as long as there are users.
    text = json.dumps(told) + page
    keys = load_by_user(three[0].run, "test").keys
    assert not any(key.decode() in text for key in keys)
    public = begun.Begun.load(three[0].run)
    for outcome in three:
        replace(public, public=True, settings=begun.Begun.load(outcome.run).settings).save(outcome.run)
    assert "private" not in said(*names, "--runs", str(folder / "runs"), "--out", str(tmp_path / "it"))
