"""How far long work is: a bar on a terminal, lines now and then elsewhere, and something to tell in every phase."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from simulations import bars
from simulations.audit.noise import audit_noise
from simulations.audit.receipts import audit_receipts
from simulations.audit.report import build_report
from simulations.bars import Lines, progress
from simulations.console import ConsoleWatcher, QuietWatcher
from simulations.federation import simulate
from tests.tiny import own_cache, tiny_dataset, tiny_language_model, tiny_options, tiny_plan


def test_lines_come_now_and_then_and_name_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(bars.time, "monotonic", lambda: now)
    said: list[str] = []
    lines = Lines(said.append, every=30.0)
    for second in range(100):
        now = float(second)
        lines.tell("test of Fedtide", second * 100, 10_000)
    lines.tell("looks", 7, None)
    assert said == [f"test of Fedtide: {done} of 10,000" for done in ("3,000", "6,000", "9,000")]


def test_every_phase_after_training_tells_how_far_it_is(tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int | None]]] = {}
    phase = ""

    def on_phase(name: str) -> None:
        nonlocal phase
        phase = name
        told.setdefault(name, [])

    with own_cache(tmp_path / "cache"):
        watcher = ConsoleWatcher(Console(file=io.StringIO()), 2)
        watcher.on_phase, watcher.on_progress = on_phase, lambda done, of: told[phase].append((done, of))
        outcome = simulate(
            tiny_dataset(tmp_path / "data"),
            tiny_plan(tiny_language_model(tmp_path / "model")),
            tiny_options(tmp_path / "runs", baseline_epochs=1),
            watcher,
        )
    for name in ("popularity", "content only", "no privacy", "Fedtide"):
        for part in ("validation", "test"):
            assert told[f"{part} of {name}"][-1] == (120, 120)
    assert [done for done, _ in told["training without privacy: looks at validation data"]][:2] == [1, 2]
    assert [of for _, of in told["recomputing what each site was charged"]] == [4] * 4
    receipts: list[tuple[int, int]] = []
    audit_receipts(outcome.run.path, on_receipts=lambda done, of: receipts.append((done, of)))
    assert receipts == [(number, 8) for number in range(1, 9)]
    receipts.clear()
    build_report(outcome.run.path, on_receipts=lambda done, of: receipts.append((done, of)))
    assert receipts[-1] == (8, 8)
    asked: list[tuple[int, int]] = []
    audit_noise(outcome.run.path, on_asked=lambda done, of: asked.append((done, of)))
    assert asked == [(number, 6) for number in range(1, 7)]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_watcher_shows_bars_on_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    now = 0.0
    watcher = QuietWatcher(console, "epsilon 8")
    monkeypatch.setattr(bars.time, "monotonic", lambda: now)
    watcher._lines._said = 0.0
    with watcher.showing():
        watcher.on_phase("test of Fedtide")
        for number in range(4):
            now = 40.0 * number
            watcher.on_progress(number, 3)
        watcher._progress.refresh()
    shown = screen.getvalue()
    if terminal:
        assert "epsilon 8: test of Fedtide" in shown
        assert "3/3" in shown
    else:
        assert shown.splitlines() == [f"epsilon 8: test of Fedtide: {number} of 3" for number in (1, 2, 3)]


def test_a_command_that_prints_json_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("receipts", hidden=True, total=3) as tell:
        for number in range(4):
            tell(number, 3)
    assert capsys.readouterr() == ("", "")
