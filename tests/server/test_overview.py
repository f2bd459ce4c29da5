"""What status and Prometheus say of run folders: counted right, ends told apart, and nothing about a user."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from server.deployment import Deployment
from server.monitoring import serve_metrics
from server.overview import ending, overview, run_line
from server.setup import make_server
from server.status import print_overview


def record(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "round": number, "phase": "update", "admitted": ["north", "south"], "left_out": [], "missing": 0,
        "aggregated": True, "bytes_down": 1000, "bytes_up": 700, "update_norm": 1.0, "seconds": 2.5,
    } | fields  # fmt: skip


def run_folder(server: Deployment, name: str, *records: dict[str, Any], end: object = None) -> Path:
    folder = server.runs / name
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    (folder / "rounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    if end is not None:
        (folder / "ending.json").write_text(json.dumps(end))
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Deployment:
    made = Deployment(tmp_path / "server", "h")
    make_server(made)
    refused = [{"node": "1", "reason": "budget"}, {"node": "2", "reason": "node_error", "code": 5}]
    run_folder(made, "1-whole", record(1), record(2), end={"status": "completed", "reason": ""})
    run_folder(
        made, "2-bad.incomplete", record(1, admitted=["north"], left_out=refused, aggregated=False, missing=1),
        end={"status": "failed", "reason": "too few sites"},
    )  # fmt: skip
    torn = run_folder(made, "3-cut.incomplete", record(1))
    with (torn / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "adm')  # a line that is only being written
    return made


def test_runs_are_counted_and_their_ends_told_apart(server: Deployment) -> None:
    found = overview(server)
    assert found.up is False
    assert [(run.name, run.state) for run in found.runs] == [
        ("1-whole", "completed"), ("2-bad", "failed"), ("3-cut", "interrupted"),
    ]  # fmt: skip
    bad = found.runs[1]
    assert (bad.rounds, bad.aggregated, bad.admitted, bad.missing) == (1, 0, 1, 1)
    assert bad.refusals == {"budget": 1, "node_error": 1}
    assert found.runs[2].rounds == 1
    assert run_line(server.runs / "3-cut.incomplete", active=True).state == "running"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"reason": "x"}'])
def test_an_ending_that_is_no_ending_counts_as_none(server: Deployment, text: str) -> None:
    folder = server.runs / "3-cut.incomplete"
    (folder / "ending.json").write_text(text)
    assert ending(folder) is None


def test_status_says_what_to_do_with_runs_that_did_not_end_well(server: Deployment) -> None:
    console = Console(record=True, width=80)
    print_overview(console, overview(server))
    text = " ".join(console.export_text().split())
    assert "The server is down" in text
    assert "2-bad: too few sites" in text
    assert "budget 1, missing 1" in text
    assert text.count("with the same plan goes on with it") == 2


def scrape(server: Deployment) -> dict[tuple[str, str], float]:
    metrics = serve_metrics(server, port=0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
    finally:
        metrics.close()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_the_same_counts_from_loopback(server: Deployment) -> None:
    found = scrape(server)
    assert found["fedtide_rounds_total", ""] == 4
    assert found["fedtide_rounds_aggregated_total", ""] == 3
    assert found["fedtide_refusals_total", "budget"] == 1
    assert found["fedtide_admitted_total", "north"] == 4
    assert found["fedtide_admitted_total", "south"] == 3
    assert found["fedtide_bytes_total", "up"] == 2800
    assert found["fedtide_runs", "interrupted"] == 1
    assert found["fedtide_missing_total", ""] == 1


def test_a_folder_that_cannot_be_read_is_a_metric_too(server: Deployment) -> None:
    (server.registry / "registry.sqlite").write_bytes(b"nothing")
    assert scrape(server) == {("fedtide_readable", ""): 0.0}


def test_the_metrics_listen_on_loopback_alone(server: Deployment) -> None:
    metrics = serve_metrics(server, port=0)
    try:
        assert metrics.server.server_address[0] == "127.0.0.1"
    finally:
        metrics.close()


_ABOUT_USERS = re.compile(r"user|event|loss|norm|batch|clip", re.IGNORECASE)


def test_no_metric_is_about_users(server: Deployment) -> None:
    assert not [name for name, _ in scrape(server) if _ABOUT_USERS.search(name)]
    assert _ABOUT_USERS.search("fedtide_users_total")


def test_a_run_that_waits_for_sites_says_so(server: Deployment) -> None:
    folder = server.runs / "3-cut.incomplete"
    (folder / "waiting.json").write_text('{"round": 2, "more": 1}')
    assert run_line(folder, active=True).waiting == "waiting for 1 more site before round 2"
    assert run_line(folder, active=False).waiting == ""  # what was killed waits for nobody
    for odd in ("", "{}", "[]", '{"round": 2, "more": "x"}'):
        (folder / "waiting.json").write_text(odd)
        assert run_line(folder, active=True).waiting == ""
