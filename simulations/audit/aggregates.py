"""Whether each checkpoint follows from the one before it and the updates kept: nothing else was added.

Public pre-training at the server is taken as given: it is post-processing, and its outcome is a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.config import Plan
from common.phases import Phase
from common.sums import SITES
from common.wire import State
from common.witness import without_witness
from server.aggregation import aggregation
from server.progress import average_of_rounds, stepped
from server.runs import RunFolder
from simulations.audit.findings import Findings

_RELATIVE, _ABSOLUTE = 1e-4, 1e-5  # other machines add floats in another order


def check_aggregates(run: RunFolder, plan: Plan, findings: Findings) -> None:
    """Recomputes every aggregated round and the final model; notes lies, raises nothing."""
    keys = {site.site: site.key_id for site in findings.sites}
    phases = {exchange.round: exchange.phase for exchange in plan.schedule()}
    velocity: State = {}
    history: list[Mapping[str, Tensor]] = []
    number = 0
    try:
        for record in run.records():
            number = int(record["round"])
            if number not in phases:
                continue
            if not record["aggregated"]:
                if phases[number] is Phase.UPDATE and not _close(
                    run.sent_state(number - 1), run.round_state(number)
                ):
                    findings.lie(
                        f"round {number}", "wrong_aggregate", "nothing was aggregated, yet the model changed"
                    )
                continue
            names = sorted(record["admitted"])
            updates = [run.update(number, keys[name]) for name in names if name in keys]
            if len(updates) != len(names) or not updates:
                findings.lie(f"round {number}", "missing_update", "an aggregated site is not enrolled")
                return
            mean = aggregation(plan.server)(updates)
            sums = without_witness(mean)
            if phases[number] is Phase.UPDATE:
                before = run.sent_state(number - 1)
                velocity = velocity or {name: torch.zeros_like(value) for name, value in before.items()}
                state, velocity = stepped(before, velocity, mean, plan.training)
                if not _close(state, run.round_state(number)):
                    findings.lie(
                        f"round {number}", "wrong_aggregate", "the checkpoint is not its updates' sum"
                    )
                history.append(run.round_state(number))
            elif phases[number].content == "statistics":
                released = run.released_state(number)
                wanted = {name: value * len(names) for name, value in sums.items()}
                wanted |= {name + SITES: torch.tensor([float(len(names))]) for name in sums}
                if not _close(wanted, {name: released[name] for name in wanted if name in released}):
                    findings.lie(
                        f"round {number}", "wrong_aggregate", "the statistics are not their releases' sum"
                    )
        if history and (run.path / "model.safetensors").is_file():
            number = 0
            final = average_of_rounds(history, plan)
            if not _close(final, run.model_state()):
                findings.lie("model.safetensors", "wrong_model", "it is not the mean of the last checkpoints")
    except Exception as error:  # a missing or damaged file, whatever the reader makes of it
        place = f"round {number}" if number else "model.safetensors"
        findings.lie(
            place, "cannot_recompute", f"the files to recompute it cannot be read ({type(error).__name__})"
        )


def _close(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    return wanted.keys() == found.keys() and all(
        wanted[name].shape == found[name].shape
        and torch.allclose(wanted[name], found[name], rtol=_RELATIVE, atol=_ABSOLUTE)
        for name in wanted
    )
