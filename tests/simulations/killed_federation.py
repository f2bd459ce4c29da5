"""A real federation in a process of its own, to be killed at random instants: `test_kills.py` kills it.

Run as a program with a folder, it builds the model and then, for each line on its standard input, forks a child
that works in the folder until it is killed. What each node was asked and what it answered
is written to disk, as the network between them would have it: asked before it is delivered, answers before the
server sees them. A new child first delivers the last requests again, as a link does that missed the answers;
then it starts a new run over the same sites.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

import client.app
from client.app import SITES_FOLDER
from client.policy import Performance
from client.training import StepSettings, train_round
from common.config import Plan, read_plan
from common.events.catalog import Catalog
from common.models.batches import HistoryBatch
from common.privacy.noise import SecureGaussian, SecurePoissonSampler
from common.wire import Refusal, answer_from_records, request_from_records, state_to_bytes
from server.app import NODES_EXPECTED, REGISTRY_FOLDER, RUN_FOLDER
from server.app import app as server_app
from server.runs import RunFolder, write_whole
from simulations import inline
from simulations.sites import registry_folder

NODES, AGAIN = 2, 4


def to_bytes(message: Message) -> bytes:
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def from_bytes(data: bytes) -> Message:
    proto = ProtoMessage()
    proto.ParseFromString(data)
    return message_from_proto(proto)


def name_of(asked: Message) -> str:
    """A node and the nonce that it is asked under."""
    return f"{asked.metadata.dst_node_id}-{request_from_records(asked.content).said.nonce}"


class Network(inline.InlineGrid):
    """The inline grid, with everything that travels written down first."""

    wire: Path

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            (identity,) = super().push_messages([message])
            write_whole(self.wire / f"{name_of(message)}.asked", to_bytes(message))
            pushed.append(identity)
        return pushed

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        record(self.wire, message, reply)
        return reply


def record(wire: Path, asked: Message, reply: Message) -> None:
    """Keeps an answer as a file of its own: every answer to one nonce that carries an update must be the same."""
    if reply.has_error():
        kind, data = "error", reply.error.reason.encode()
    else:
        answer = answer_from_records(reply.content)
        if isinstance(answer, Refusal):
            kind, data = "refusal", answer.reason.value.encode()
        else:
            kind = "update"
            data = len(answer.receipt).to_bytes(4, "big") + answer.receipt + state_to_bytes(answer.state)
    name = name_of(asked)
    if kind == "update":
        (wire.parent / "at-work").touch()
    write_whole(wire / f"{name}.{os.getpid()}.{os.urandom(4).hex()}.{kind}", data)


def answer_again(wire: Path) -> None:
    """Delivers the last few requests of each node once more."""
    for node in range(2, 2 + NODES):
        asked = sorted(wire.glob(f"{node}-*.asked"), key=lambda path: path.stat().st_mtime_ns)
        for path in asked[-AGAIN:]:
            message = from_bytes(path.read_bytes())
            config = {"partition-id": node - 2}
            context = Context(1, node, config, RecordDict(), {})
            record(wire, message, client.app.app(message, context))


def work(folder: Path) -> None:
    """Retries, then runs federations over the sites in the folder until it is killed."""
    sites, wire = folder / "sites", folder / "wire"
    os.environ.update(
        {SITES_FOLDER: str(sites), REGISTRY_FOLDER: str(registry_folder(sites)), NODES_EXPECTED: str(NODES)}
    )
    Network.wire = wire
    inline.InlineGrid = Network  # type: ignore[misc]
    inline.TaskIdentity.task_id, inline.TaskIdentity.run_id, inline.TaskIdentity.node_id = 1, 1, 1
    plan: Plan = read_plan(folder / "plan.json")
    catalog = Catalog.load(sites / "catalog.jsonl")
    start = (folder / "start.safetensors").read_bytes()
    answer_again(wire)
    while True:
        run = RunFolder.create(folder / "runs", plan, catalog)
        write_whole(run.path / "rounds" / "00000.safetensors", start)
        os.environ[RUN_FOLDER] = str(run.path)
        configs = {node: {"partition-id": node - 2} for node in range(2, 2 + NODES)}
        inline.run_inline(server_app, client.app.app, configs, {"run-dir": str(run.path)})
        run.finish()


def main() -> None:
    """The nursery: children are forked from a process that has the model, and has never had a second thread."""
    import client.site
    import server.rounds

    assert server.rounds
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    catalog = Catalog.load(folder / "sites" / "catalog.jsonl")
    plan = read_plan(folder / "plan.json")
    model = client.site.site_model(plan, catalog, Performance(), offline=True)
    items = torch.zeros(8, 3, dtype=torch.int64).numpy()
    settings = StepSettings.of(
        plan
    )  # one round on nobody's data, so that a child's first is as quick as its next
    train_round(
        model, HistoryBatch.of(items, items), settings, sampler=SecurePoissonSampler(), noise=SecureGaussian()
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            log = os.open(folder / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                work(folder)
            finally:
                os._exit(3)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
