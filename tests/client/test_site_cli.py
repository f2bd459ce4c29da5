"""`fedtide site` and `fedtide server`: from a log to an enrolled site, its budget shown, verified, withdrawn."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from client.cli import app as site_app
from client.init_options import admitted
from client.ledger import Ledger
from client.policy import Performance
from client.site_folder import Site
from common.cli import known_errors
from common.privacy.certificates import ClosingCertificate
from common.privacy.entries import Reserve
from common.privacy.mechanisms import PoissonSubsampledGaussian
from common.privacy.spending import up_to
from server.cli import app as server_app
from server.registry import Registry, RegistryReader
from tests.tiny import tiny_files, tiny_plan

EVENT = PoissonSubsampledGaussian(0.5, 2.0, 2)


def site(*arguments: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(site_app, [str(each) for each in arguments], input=typed)


def server(*arguments: object) -> Result:
    return CliRunner().invoke(server_app, [str(each) for each in arguments])


def init(folder: Path, data: Path, *more: object) -> Result:
    log, catalog = tiny_files(data)
    plan = data / "plan.json"
    plan.write_text(tiny_plan(data / "no-model-needed").to_json())
    options = ["--logs", log, "--catalog", catalog, "--epsilon", 8, "--delta", 1e-5, "--users-at-least", 100]
    return site("init", folder, *options, "--typical-plan", plan, *more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = init(tmp_path / "north", tmp_path / "data")
    assert made.exit_code == 0, made.output
    return tmp_path / "north"


def charge(folder: Path, number: int, run: str = "run-a", *, burn: bool = False) -> None:
    with Ledger.open(folder / "ledger") as ledger:
        reservation = ledger.reserve(
            run=run, round=number, attempt=1, event=EVENT, plan_hash="a" * 64, model_hash="b" * 64,
            nonce="c" * 32, clip_norm=1.0, normaliser=1.0, learning_rate=1.0,
        )  # fmt: skip
        if burn:
            ledger.burn(reservation)
        else:
            ledger.release(reservation, b"noise")


def test_a_site_is_made_for_its_owner_only_and_says_what_to_do(tmp_path: Path) -> None:
    result = init(tmp_path / "north", tmp_path / "data")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "north"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert "for the site's eyes only" in result.output
    with Ledger.open(folder / "ledger") as ledger:
        genesis, key_id = ledger.genesis, ledger.key_id
    assert key_id in result.output.replace(" ", "").replace("\n", "")
    assert (genesis.epsilon, genesis.delta) == (8.0, 1e-5)
    assert genesis.dataset_commitment is not None
    enrolment = (folder / "enrolment.json").read_text()
    assert (folder / "secret").read_text().strip() not in enrolment
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_how_a_site_computes_is_its_own_choice_and_without_one_takes_no_accelerator(
    folder: Path, tmp_path: Path
) -> None:
    assert Site.load(folder).performance == Performance(device="cpu")
    said = ("--engine", "opacus", "--device", "auto", "--threads", 2, "--micro-batch", 48)
    assert init(tmp_path / "south", tmp_path / "data", *said).exit_code == 0
    own = Performance(engine="opacus", device="auto", threads=2, micro_batch=48)
    assert Site.load(tmp_path / "south").performance == own


def test_two_sites_with_one_log_share_neither_secret_nor_commitment(folder: Path, tmp_path: Path) -> None:
    assert init(tmp_path / "south", tmp_path / "data").exit_code == 0
    found = []
    for each in (folder, tmp_path / "south"):
        with Ledger.open(each / "ledger") as ledger:
            found.append((ledger.genesis.dataset_commitment, (each / "secret").read_text(), ledger.key_id))
    assert not set(found[0]) & set(found[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--users-at-least", 121], "has 120 users, but --users-at-least is 121"),
        (["--delta", 0.5], "delta is 0.5"),
        (["--epsilon", 0.001], "leaves no budget"),
        (["--epsilon", "nan"], "epsilon is nan, but must be finite"),
        (["--epsilon", "inf"], "epsilon is inf, but must be finite"),
        (["--epsilon", 1e-9], "epsilon is 1e-09, but the accountants vouch for no less than 0.001"),
        (["--delta", "nan"], "delta is nan, but must lie in (0, 1)"),
        (["--delta", 0], "delta is 0.0, but must lie in (0, 1)"),
        (["--delta", 1e-30], "delta is 1e-30, but the accountants vouch for no less than 1e-12"),
        (["--users-at-least", 10**9], "delta is 1e-05, but must be far below 1/users_at_least = 1e-09"),
        (["--users-at-least", 3], "the typical plan counts on 15 users, but --users-at-least is 3"),
        (["--columns", "user"], "must read field=column"),
        (["--micro-batch", 50], "--micro-batch: input should be a multiple of 8 (given: 50)"),
        (["--threads", 0], "--threads: input should be greater than or equal to 1 (given: 0)"),
        (["--device", "tpu"], "--device: input should be 'cpu', 'cuda' or 'auto' (given: 'tpu')"),
        (["--engine", "slow"], "--engine: input should be 'fast' or 'opacus' (given: 'slow')"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(
    tmp_path: Path, options: list[object], says: str
) -> None:
    result = init(tmp_path / "north", tmp_path / "data", *options)
    assert isinstance(result.exception, known_errors()), result.output
    assert says in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_site_is_not_made_over_another(folder: Path, tmp_path: Path) -> None:
    before = (folder / "secret").read_bytes()
    result = init(folder, tmp_path / "data")
    assert "as a site's budget does not reset" in str(result.exception)
    assert (folder / "secret").read_bytes() == before


def test_status_tells_what_is_spent_and_draws_it(folder: Path, tmp_path: Path) -> None:
    charge(folder, 1)
    charge(folder, 2, burn=True)
    charge(folder, 1, "run-b")
    shown = site("status", folder, "--plot", tmp_path / "burn-down.png")
    assert shown.exit_code == 0, shown.output
    facts = json.loads(site("status", folder, "--json").output)
    with Ledger.open(folder / "ledger") as ledger:
        cap, spent = ledger.genesis.cap, ledger.status().spent
    assert facts["share_spent"] == spent / cap
    text = " ".join(shown.output.split())
    assert f"{spent / cap:.1%} of the Renyi budget at order" in text
    assert "total guarantee (epsilon 8, delta 1e-05) for each user, whatever happens next" in text
    assert [(run["run"], run["released"], run["burnt"]) for run in facts["runs"]] == [
        ("run-a", 1, 1),
        ("run-b", 1, 0),
    ]
    assert facts["runs"][-1]["left_after"] == pytest.approx(1 - spent / cap)
    assert sum(run["share"] for run in facts["runs"]) == pytest.approx(spent / cap)
    assert "█" in shown.output
    with Ledger.open(folder / "ledger") as ledger:
        known = ledger.status().spending()
    assert facts["spent"] == known.as_json()
    assert known.epsilon is not None
    assert 0 < known.epsilon < known.by_filter < 8
    for line in (text, " ".join(site("budget", folder).output.split())):
        assert f"{up_to(known.epsilon)} by the PLD, {up_to(known.by_filter)} by the filter, of 8" in line
        assert "over all 2 runs, burnt and open charges included" in line
    assert json.loads(site("budget", folder, "--json").output)["spent"] == known.as_json()
    assert (tmp_path / "burn-down.png").read_bytes().startswith(b"\x89PNG")


def test_verify_holds_for_an_honest_ledger_and_names_an_edit(folder: Path) -> None:
    charge(folder, 1)
    charge(folder, 2)
    good = site("verify", folder)
    assert good.exit_code == 0
    assert "5 entries verify" in good.output
    assert "The histories are those that the ledger began with" in good.output
    with sqlite3.connect(folder / "ledger" / "ledger.sqlite") as db:
        (data,) = db.execute("SELECT entry FROM entries WHERE seq = 1").fetchone()
        db.execute("DROP TRIGGER entries_no_update")
        db.execute(
            "UPDATE entries SET entry = ? WHERE seq = 1", (data.replace(b'"steps":"2"', b'"steps":"1"'),)
        )
    bad = site("verify", folder)
    assert bad.exit_code == 1
    assert "FAULT bad_signature" in bad.output
    assert json.loads(site("verify", folder, "--json").output)["reason"] == "bad_signature"


def test_init_counts_at_least_a_thousandth_for_each_request_of_the_typical_plan(
    folder: Path,
) -> None:
    nearly_free = PoissonSubsampledGaussian(0.001, 1000.0, 1)
    once = admitted(Site.load(folder), [nearly_free])
    assert (once.runs, once.whole) == (pytest.approx(1000, rel=1e-3), True)
    often = admitted(Site.load(folder), [nearly_free] * 1001)
    assert not often.whole
    assert often.runs < 1


@pytest.mark.parametrize(
    ("plan_delta", "ledger_delta"),
    [(1e-3, 1e-6), (1e-4, 1e-6), (1e-4, 1e-7), (1e-5, 1e-8), (1e-3, 1e-9), (1e-3, 1e-4)],
)
def test_a_typical_run_that_the_policy_refuses_is_not_said_to_fit(
    tmp_path: Path, plan_delta: float, ledger_delta: float
) -> None:
    plan = tmp_path / "typical.json"
    asked = tiny_plan(tmp_path / "no-model-needed")
    privacy = asked.privacy.model_copy(update={"epsilon": 8.0, "delta": plan_delta, "noise_multiplier": None})
    plan.write_text(asked.model_copy(update={"privacy": privacy}).calibrated().to_json())
    made = init(tmp_path / "north", tmp_path / "data", "--delta", ledger_delta, "--typical-plan", plan)
    assert made.exit_code == 0, made.output
    said = " ".join(made.output.split())
    assert "no round of the typical run is admitted" in said
    assert f"allows 8. Give runs that delta (`fedtide plan --delta {ledger_delta:g}`)" in said
    assert "% of one typical run" not in said


def test_a_site_that_was_moved_has_its_catalog(folder: Path, tmp_path: Path) -> None:
    assert Site.load(folder).catalog == folder / "catalog.jsonl"
    for place in (tmp_path / "moved", tmp_path / "deep" / "er" / "north", tmp_path / "with space"):
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = folder.rename(place)
        assert Site.load(folder).catalog == folder / "catalog.jsonl"
        assert Site.load(folder).catalog.is_file()


def test_a_site_of_an_earlier_version_that_was_moved_has_its_own_catalog(
    folder: Path, tmp_path: Path
) -> None:
    said = {"name": "north", "catalog": str(folder / "catalog.jsonl")}  # as it was written before
    (folder / "site.json").write_text(json.dumps(said))
    assert Site.load(folder).catalog == folder / "catalog.jsonl"
    moved = folder.rename(tmp_path / "moved")
    assert Site.load(moved).catalog == moved / "catalog.jsonl"
    other = tmp_path / "other.jsonl"  # what is there is never replaced by the folder's own
    other.write_text("{}\n")
    (moved / "site.json").write_text(json.dumps(said | {"catalog": str(other)}))
    assert Site.load(moved).catalog == other


def test_budget_counts_at_least_a_thousandth_for_one_more_round_like_the_last(folder: Path) -> None:
    with Ledger.open(folder / "ledger") as ledger:
        ledger.burn(
            ledger.reserve(
                run="run-a", round=1, attempt=1, event=PoissonSubsampledGaussian(0.001, 1000.0, 1), plan_hash="a" * 64,
                model_hash="b" * 64, nonce="c" * 32, clip_norm=1.0, normaliser=1.0, learning_rate=1.0,
            )
        )  # fmt: skip
    assert json.loads(site("budget", folder, "--json").output)["more_like_the_last"] == 998


def test_a_lost_mark_is_a_fault_until_somebody_answers_for_the_ledger(folder: Path) -> None:
    charge(folder, 1)
    (folder / "ledger" / "high-water").unlink()
    bad = site("verify", folder)
    assert bad.exit_code == 1
    assert "FAULT mark_lost" in bad.output
    assert isinstance(site("status", folder).exception, known_errors())
    refused = site("renew-mark", folder, typed="n\n")
    assert "nothing was done" in str(refused.exception)
    assert site("verify", folder).exit_code == 1
    renewed = site("renew-mark", folder, typed="y\n")
    assert renewed.exit_code == 0, renewed.output
    assert "the ledger verifies, and is marked at entry 2" in renewed.output
    assert site("verify", folder).exit_code == 0
    assert "has a high-water mark" in str(site("renew-mark", folder, "--yes").exception)


def test_verify_finds_other_data_than_the_ledger_began_with(folder: Path) -> None:
    file = folder / "histories" / "items.npy"
    items = np.load(file)
    items[0] += 1
    np.save(file, items)
    result = site("verify", folder)
    assert result.exit_code == 1
    assert "FAULT other_data" in result.output


def test_withdrawing_asks_first_and_leaves_a_certificate(folder: Path, tmp_path: Path) -> None:
    charge(folder, 1)
    kept = site("withdraw", folder, typed="n\n")
    assert "the site has not withdrawn" in str(kept.exception)
    charge(folder, 2)
    told = site("withdraw", folder, typed="y\n")
    assert told.exit_code == 0
    assert site("withdraw", folder, "--yes", "--certificate", tmp_path / "again.json").exit_code == 0
    data = (folder / "closing.json").read_bytes()
    assert data == (tmp_path / "again.json").read_bytes()
    certificate = ClosingCertificate.from_bytes(data)
    for sentence in certificate.in_words():  # on the terminal and, as indented JSON, in the file
        assert sentence in told.output
        assert f'\n    "{sentence}"' in data.decode()
    with Ledger.open(folder / "ledger") as ledger:
        assert certificate.verify().spent == ledger.status().spent
        assert sum(isinstance(entry.body, Reserve) for entry in ledger.entries()) == 2
    assert "The site has withdrawn" in site("status", folder).output


def test_a_server_enrols_by_file_and_lists_its_sites(folder: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    told = server("enroll", folder / "enrolment.json", "--name", "north", "--registry", registry)
    assert told.exit_code == 0, told.output
    (enrolled,) = RegistryReader(registry).sites()
    assert enrolled.key_id in told.output.replace(" ", "").replace("\n", "")
    again = server("enroll", folder / "enrolment.json", "--name", "south", "--registry", registry)
    assert "is enrolled already" in str(again.exception)
    (listed,) = json.loads(server("sites", "--registry", registry, "--json").output)
    assert (listed["name"], listed["epsilon"], listed["barred"]) == ("north", 8.0, False)
    assert "north" in server("sites", "--registry", registry).output
    assert (listed["spent"]["epsilon_pld"], listed["spent"]["epsilon_filter"]) == (0.0, 0.0)


def test_a_server_says_what_its_sites_spent_as_far_as_receipts_told_it(folder: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    server("enroll", folder / "enrolment.json", "--name", "north", "--registry", registry)
    charge(folder, 1)
    charge(folder, 2, burn=True)
    with Ledger.open(folder / "ledger") as ledger:
        known = Registry(registry)
        known.accept(known.chain(ledger.key_id).extended(ledger.entries()))
        told = ledger.status().spending()
    charge(folder, 3)  # no receipt of it has come yet
    (listed,) = json.loads(server("sites", "--registry", registry, "--json").output)
    assert listed["spent"] == told.as_json() | {"seen_until_entry": 4}
    assert told.epsilon is not None
    text = " ".join(server("sites", "--registry", registry).output.split())
    assert up_to(told.epsilon) in text
    assert up_to(told.by_filter) in text
    assert "as far as the receipts that this server got tell" in text


def test_an_enrolment_file_that_was_edited_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "enrolment.json"
    honest = (folder / "enrolment.json").read_text()
    for old, new, fault in (
        ('"epsilon":"8"', '"epsilon":"800"', "BadSignatureError"),
        ("fedtide/enrolment/1", "fedtide/enrolment/9", "UnknownFormatError"),
        ('{"format"', '{"Format"', "MalformedEntryError"),
    ):
        file.write_text(honest.replace(old, new))
        refused = server("enroll", file, "--name", "north", "--registry", tmp_path / "registry")
        assert type(refused.exception).__name__ == fault
        assert isinstance(refused.exception, known_errors())
    missing = server("enroll", tmp_path / "none.json", "--name", "n", "--registry", tmp_path / "registry")
    assert "cannot be read" in str(missing.exception)


@pytest.mark.parametrize("command", ["site", "server", "audit"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from common.cli import main\n"
        f"try:\n    main(['{command}', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'flwr', 'polars', 'transformers', 'rich.table'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] in ("[]", "['rich.table']"), done.stdout
