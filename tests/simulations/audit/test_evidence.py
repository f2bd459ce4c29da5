"""Evidence comes back from its file as it was written; a broken file is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simulations.audit.evidence import Check, Evidence, EvidenceError, evidence_of, record_digest

HOLDS = Check("noise", "site00, round 1", 1.002, "within 0.9 to 1.1", True, "as much noise as was claimed")


def test_evidence_comes_back(tmp_path: Path) -> None:
    found = Evidence(
        "noise", "fedtide audit noise RUN", [HOLDS], {"level": 1e-3}, {"ratio": [1.0]}, ["no proof"]
    )
    found.write(tmp_path)
    assert evidence_of(tmp_path) == {"noise": found}
    assert found.as_json()["holds"] is True


def test_one_failed_check_or_none_at_all_does_not_hold() -> None:
    assert not Evidence("noise", "", [HOLDS, replace(HOLDS, holds=False)]).holds
    assert not Evidence("noise", "", []).holds


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"holds": true, "checks": [{}]}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "noise.json").write_text(text)
    with pytest.raises(EvidenceError, match=r"noise\.json.*run the tool again"):
        evidence_of(tmp_path)


def test_evidence_names_the_record_that_it_is_about(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    Evidence("noise", "", [HOLDS]).write(tmp_path)
    assert evidence_of(tmp_path)["noise"].record == record_digest(tmp_path)
    (tmp_path / "receipts.jsonl").write_text("one more\n")
    assert evidence_of(tmp_path)["noise"].record != record_digest(tmp_path)


def test_other_files_of_a_tool_are_no_evidence(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "canary.registered.json").write_text("{}")
    assert evidence_of(tmp_path) == {}
