"""Every receipt of a run against its site's chain, the plan, the model that was sent and the update that came.

Chains are verified whole from the registry, anchors included; then each line of receipts.jsonl; then whether
rounds.jsonl tells of the same releases. Epsilons are in `epsilons.py`, aggregates in `aggregates.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import Plan, PlanError
from common.events.catalog import CatalogError
from common.phases import Exchange, Phase
from common.precision import broadcast
from common.privacy.anchors import Countersignature
from common.privacy.chain import Chain
from common.privacy.faults import ReceiptError
from common.privacy.mechanisms import event_to_fields
from common.privacy.receipts import Receipt, check_receipt_alone, check_update
from common.wire import Request
from server.registry import EnrolledSite, RegistryReader
from server.runs import RunError, RunFolder
from simulations.audit.aggregates import check_aggregates
from simulations.audit.epsilons import check_epsilons
from simulations.audit.findings import Findings, SiteFinding

_FIELDS = {"run", "round", "site", "key_id", "delta", "event", "receipt", "anchor"}


@dataclass(frozen=True)
class Line:
    """One line of receipts.jsonl: what it says of itself, the receipt, and the server's countersignature."""

    place: str
    site: str
    round: int
    receipt: Receipt
    said: dict[str, Any]
    anchor: Countersignature


def audit_receipts(
    path: Path,
    registry: Path | None = None,
    on_receipts: Callable[[int, int], None] = lambda done, of: None,
) -> Findings:
    """Checks a run's folder. What does not hold is in the findings; only what is not there at all is raised.

    Args:
        path: of the run.
        registry: folder of the server's registry; else looked for in the run's folder.
        on_receipts: told of how many receipts are checked, and of how many there are.

    Raises:
        RunError: there is no such run.
        PlanError: its plan cannot be read.
        RegistryError: there is no registry.
    """
    run = run_folder(path)
    plan = run.plan_signed_for()
    findings = Findings(run=run.name)
    reader = RegistryReader(registry or registry_of(run))
    chains = _chains(reader, findings)
    lines = _lines(run, findings)
    _check_catalog(run, plan, findings)
    if lines and lines[0].said["run"] != run.name:
        findings.run = str(lines[0].said["run"])
        findings.notes.append(f"the folder is now called {run.name}, but the run was {findings.run}")
    for number, line in enumerate(lines, 1):
        _check_line(line, run, plan, reader, chains, findings)
        on_receipts(number, len(lines))
    _check_rounds(run, plan, lines, findings)
    check_epsilons(run, plan, chains, lines_seen(lines), findings)
    check_aggregates(run, plan, findings)
    if not run.is_whole:
        findings.notes.append("the run did not end well: what there is of it was checked")
    return findings


def _check_catalog(run: RunFolder, plan: Plan, it: Findings) -> None:
    """Whether the catalog that is kept is the one that the plan, and so every receipt, is about."""
    try:
        plan.check_catalog(run.catalog().digest())
    except (CatalogError, PlanError) as error:
        it.lie("catalog.jsonl", "wrong_catalog", str(error))


def lines_seen(lines: list[Line]) -> dict[str, int]:
    """Key id -> the last sequence number of its chain that the server had seen when the run ended."""
    seen: dict[str, int] = {}
    for line in lines:
        key = line.receipt.genesis.key_id
        seen[key] = max(seen.get(key, 0), line.receipt.entries[-1].seq if line.receipt.entries else 0)
    return seen


def run_folder(path: Path) -> RunFolder:
    """The run in a folder. Raises `RunError` where there is none."""
    if not (path / "plan.json").is_file():
        raise RunError(f"there is no run in {path}: give a run's folder, such as those under runs/")
    return RunFolder(path.resolve())


def registry_of(run: RunFolder) -> Path:
    """The registry that lies in a run's folder. Raises `RunError` where there is none."""
    for folder in (run.path / "registry", run.path / "sites" / "registry"):  # the second: of an older version
        if (folder / "registry.sqlite").is_file():
            return folder
    raise RunError(f"{run.path} holds no registry: say where the server's lies with --registry")


def _chains(reader: RegistryReader, findings: Findings) -> dict[str, Chain]:
    """Key id -> verified chain, of the sites whose chain and anchors verify."""
    chains = {}
    for site in reader.sites():
        finding = SiteFinding(site.name, site.key_id, barred=site.barred)
        findings.sites.append(finding)
        try:
            chain = reader.chain(site.key_id)
            anchors = reader.anchors(site.key_id)
            for anchor in anchors:
                anchor.check()
                _check_server(anchor, findings, f"registry, {site.name}", site.name)
                if anchor.site_key_id != site.key_id:
                    findings.lie(
                        f"registry, {site.name}", "wrong_site", "an anchor is for another site", site.name
                    )
            for proof in reader.proofs(site.key_id):
                proof.verify(chain.genesis.public_key)
        except ReceiptError as error:
            findings.lie(f"registry, {site.name}", error.reason, str(error), site.name)
            continue
        if site.barred != bool(reader.proofs(site.key_id)):
            findings.lie(
                f"registry, {site.name}",
                "wrong_bar",
                "it is barred without a proof, or a proof stands and it is not",
                site.name,
            )
        chains[site.key_id] = chain
        report = chain.report()
        finding.epsilon, finding.delta = report.genesis.epsilon, report.genesis.delta
        finding.order, finding.entries = report.genesis.order, report.seq + 1
        finding.anchors, finding.share = len(anchors), report.spent / report.cap
    return chains


def _check_server(anchor: Countersignature, findings: Findings, place: str, site: str) -> None:
    findings.server_key = findings.server_key or anchor.server_key
    if anchor.server_key != findings.server_key:
        findings.lie(place, "wrong_server", "an anchor is signed by another server's key", site)


def _lines(run: RunFolder, findings: Findings) -> list[Line]:
    found = []
    data = run.receipts_file.read_bytes() if run.receipts_file.is_file() else b""
    for number, text in enumerate(data.split(b"\n"), start=1):
        place = f"receipts.jsonl line {number}"
        if not text:
            continue
        try:
            said = json.loads(text)
            if not isinstance(said, dict) or set(said) != _FIELDS or not isinstance(said["round"], int):
                raise ValueError("missing or unknown fields")
            receipt = Receipt.from_bytes(str(said["receipt"]).encode())
            anchor = Countersignature.from_bytes(str(said["anchor"]).encode())
        except ReceiptError as error:
            findings.lie(place, error.reason, str(error))
        except ValueError as error:
            findings.lie(place, "malformed_line", f"the line cannot be read: {error}")
        else:
            found.append(Line(place, str(said["site"]), said["round"], receipt, said, anchor))
    return found


def _check_line(
    line: Line, run: RunFolder, plan: Plan, reader: RegistryReader, chains: dict[str, Chain], it: Findings
) -> None:
    before = len(it.lies)
    site = reader.site(line.receipt.genesis.key_id)
    if site is None:
        it.lie(line.place, "not_enrolled", "the receipt's key is not enrolled")
        return
    try:
        check_receipt_alone(line.receipt)
        _check_update_file(line, run, site, it)
        _check_said(line, site, it)
        _check_asked(line, run, plan, site, it)
        _check_anchor(line, reader, site, it)
    except ReceiptError as error:
        it.lie(line.place, error.reason, str(error), site.name)
    except PlanError as error:
        it.lie(line.place, "wrong_plan", str(error), site.name)
    if site.key_id in chains:
        _check_in_chain(line, chains[site.key_id], site, it)
    if len(it.lies) == before:
        for finding in it.sites:
            finding.receipts += finding.key_id == site.key_id


def _check_said(line: Line, site: EnrolledSite, it: Findings) -> None:
    """Whether a line's labels are what the signed receipt says."""
    reserve, genesis = line.receipt.reserve, line.receipt.genesis
    truth = {
        "run": reserve.run,
        "round": reserve.round,
        "site": site.name,
        "key_id": site.key_id,
        "delta": getattr(genesis.body, "delta", None),
        "event": event_to_fields(reserve.event),
    }
    for name, value in truth.items():
        if line.said[name] != value:
            it.lie(
                line.place,
                "wrong_label",
                f"the line says {name} {_short(line.said[name])}, but what was signed says {_short(value)}",
                site.name,
            )
    if reserve.run != it.run:
        it.lie(line.place, "wrong_request", f"a receipt of another run, {reserve.run}", site.name)


def _short(value: object) -> str:
    return repr(value)[:120]


def _check_asked(line: Line, run: RunFolder, plan: Plan, site: EnrolledSite, it: Findings) -> None:
    """Whether a receipt answers what this run asked for: plan, model, mechanism.

    Raises:
        PlanError: the plan has no such round.
    """
    reserve = line.receipt.reserve
    exchange = next((each for each in plan.schedule() if each.round == reserve.round), None)
    if exchange is None:
        raise PlanError(f"the plan has no round {reserve.round}")
    if reserve.plan_hash != plan.digest():
        it.lie(line.place, "wrong_plan", "the receipt was signed for another plan than plan.json", site.name)
    sent = model_sent(run, exchange)
    if sent is None:
        it.lie(line.place, "missing_model", f"round {reserve.round} lacks its checkpoint", site.name)
    elif reserve.model_hash != sent:
        it.lie(
            line.place,
            "wrong_model",
            f"the receipt was signed for another model than the checkpoints give for round {reserve.round}",
            site.name,
        )
    stated = plan.stated(exchange.phase)
    said = (reserve.event, reserve.clip_norm, reserve.normaliser, reserve.learning_rate)
    asked = (exchange.event, stated.clip_norm, stated.normaliser, stated.learning_rate)
    if said != asked or line.receipt.release.content != exchange.phase.content:
        it.lie(
            line.place, "wrong_mechanism", "the receipt states another mechanism than the plan's", site.name
        )


def model_sent(run: RunFolder, exchange: Exchange) -> str | None:
    """Digest of what was sent to the sites in a round, from the checkpoints; None where one is missing."""
    asked_of = exchange.round if exchange.phase is Phase.METRICS else exchange.round - 1
    try:
        parameters = run.plan().wire.parameters
        statistics = exchange.phase.content == "statistics"
        state = {} if statistics else broadcast(run.sent_state(asked_of), parameters)
        released = run.released_state(exchange.round - 1)
    except Exception:  # a missing or damaged file, whatever the reader makes of it
        return None
    request = Request(
        run="", round=exchange.round, attempt=1, nonce="", plan="", state=state, released=released
    )
    return request.model_digest


def _check_update_file(line: Line, run: RunFolder, site: EnrolledSite, it: Findings) -> None:
    """Raises `WrongDigestError` if the update kept is not the one that was signed for."""
    file = run.update_file(line.receipt.reserve.round, site.key_id)
    if not file.is_file():
        it.lie(line.place, "missing_update", f"the update {file.name} is not in the run's folder", site.name)
        return
    check_update(line.receipt.release, file.read_bytes())


def _check_anchor(line: Line, reader: RegistryReader, site: EnrolledSite, it: Findings) -> None:
    line.anchor.check()
    _check_server(line.anchor, it, line.place, site.name)
    last = line.receipt.entries[-1]
    anchored = (line.anchor.site_key_id, line.anchor.seq, line.anchor.head)
    if anchored != (site.key_id, last.seq, last.hash):
        it.lie(
            line.place,
            "bad_anchor",
            "the countersignature is over another head than the receipt's",
            site.name,
        )
    elif line.anchor not in reader.anchors(site.key_id):
        it.lie(line.place, "missing_anchor", f"the registry lacks the anchor of head {last.seq}", site.name)


def _check_in_chain(line: Line, chain: Chain, site: EnrolledSite, it: Findings) -> None:
    for entry in (line.receipt.genesis, *line.receipt.entries):
        if entry.seq >= len(chain.entries):
            it.lie(
                line.place,
                "truncated",
                f"the registry's chain ends at {chain.head.seq}, but the receipt holds entry {entry.seq}",
                site.name,
            )
            return
        if chain.entries[entry.seq].hash != entry.hash:
            it.lie(line.place, "fork", f"the registry's chain holds another entry {entry.seq}", site.name)
            return


def _check_rounds(run: RunFolder, plan: Plan, lines: list[Line], it: Findings) -> None:
    """Whether rounds.jsonl and receipts.jsonl tell of the same admitted releases, in the plan's rounds."""
    try:
        records = list(run.records())
        admitted = Counter((int(each["round"]), str(name)) for each in records for name in each["admitted"])
        numbers = [int(each["round"]) for each in records]
    except (ValueError, KeyError, TypeError) as error:
        it.lie("rounds.jsonl", "malformed_line", f"it cannot be read ({type(error).__name__})")
        return
    it.rounds = len(numbers)
    planned = [exchange.round for exchange in plan.schedule()]
    whole = run.is_whole
    if numbers != planned[: len(numbers)] or (whole and len(numbers) != len(planned)):
        it.lie("rounds.jsonl", "wrong_rounds", f"it tells of rounds {numbers}, but the plan has {planned}")
    receipts = Counter((line.round, line.site) for line in lines)
    for number, name in sorted((admitted - receipts).keys()):
        it.lie(f"round {number}", "missing_receipt", f"{name} was admitted, but has no receipt", name)
    for number, name in sorted((receipts - admitted).keys()):
        if number in numbers:
            why = "has a receipt more than rounds.jsonl says was admitted"
            it.lie(f"round {number}", "unlisted_receipt", f"{name} {why}", name)
