"""What a deployment's run leaves to read: rounds, sites, epsilon by site, and nothing that a server cannot know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server import plots
from server.privacy_record import privacy_record
from server.registry import RegistryReader
from server.runs import RunError, RunFolder
from server.summary import SUMMARY, summary, write_summary
from simulations.outcome import Outcome
from simulations.sites import registry_folder
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run with all phases; its folder is what a deployment's is, too."""
    noise = {"noise_multiplier": 20.0}
    plan = {
        "privacy": {"noise_multiplier": 20.0, "epsilon": 90.0},
        "statistics": {"popularity_share": 0.2, "popularity_noise_multiplier": 20.0},
        "metrics": {"share": 0.1, **noise},
    }
    return tiny_run(tmp_path_factory.mktemp("run"), plan=plan)


def test_the_summary_says_what_the_server_knows(outcome: Outcome, tmp_path: Path) -> None:
    run = RunFolder(outcome.run.path)
    registry = RegistryReader(registry_folder(run.path / "sites"))
    write_summary(run, run.plan(), privacy_record(run, run.plan(), registry))
    said = (run.path / SUMMARY).read_text()
    for name in ("epsilon-by-site.png", "sites-by-round.png"):
        assert (run.path / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in said
    assert "4 sites were admitted in a round or more; 4 of 4 rounds were aggregated" in said
    assert "there are no test figures here" in said
    assert "| 1 | popularity | 4 | 0 | 0 | yes |" in said
    assert "Quality, as sites released it" in said
    assert "| NDCG@10 |" in said
    epsilon = json.loads((run.path / "privacy.json").read_bytes())["epsilon"]
    for number in range(4):
        assert f"| site-{number} | {epsilon:.3f} | 4, 4 |" in said
    users = {str(site.users) for site in outcome.sites}
    assert not users & set(said.replace("|", " ").split()), "a site's users are not for the server"


def test_a_run_that_nobody_took_part_in_has_a_summary_too(outcome: Outcome, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, outcome.plan, outcome.run.catalog())
    run.save_model(outcome.run.model_state())
    record = privacy_record(run, outcome.plan, RegistryReader(registry_folder(outcome.run.path / "sites")))
    write_summary(run, outcome.plan, record)
    assert "0 sites were admitted in a round or more; 0 of 0 rounds" in summary(run, outcome.plan, record)


def test_many_sites_are_a_band_and_the_one_that_spent_most(tmp_path: Path) -> None:
    epsilons = {f"site-{number}": [0.0, 0.1 * number, 0.2 * number] for number in range(50)}
    plots.epsilon_by_site(tmp_path / "many.png", epsilons, 8.0)
    plots.epsilon_by_site(tmp_path / "none.png", {}, 8.0)
    assert (tmp_path / "many.png").stat().st_size > (tmp_path / "none.png").stat().st_size


def test_a_plot_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        plots.sites_by_round(tmp_path / "nowhere" / "plot.png", [1], [0])
