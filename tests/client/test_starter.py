"""Code that was installed since is never run by a starter that imported what was there before."""

from __future__ import annotations

import json
from pathlib import Path

from simulations.faults.place import below, command_of
from tests.client.fleet import node_at, until
from tests.client.test_comeback import answered, secrets_of

UPDATED = """
import sys
from common.bundle import installed_code
versions = iter(["old", "old", "new"])
installed_code.__wrapped__ = lambda: next(versions)
from client.starter import main
main(sys.argv[1:])
"""
"""A starter under which another version is installed after its first ClientApp was forked."""


def test_code_that_was_installed_since_is_run_by_a_process_of_its_own(tmp_path: Path) -> None:
    with node_at(tmp_path, starter=("-c", UPDATED)) as (fleet, node):
        answered(fleet, node)
        assert node.ended["starter"] == 0
        node.worker.held.clear()
        node.worker.asked.clear()
        message = fleet.give()
        assert node.worker.asked.wait(120), node.said("starter")
        (new,) = below(node.processes["starter"].pid)
        assert "--one" in command_of(new)
        assert secrets_of({new}) == []  # its token came another way
        node.worker.held.set()
        until(lambda: fleet.reply_to(message) is not None)
        until(lambda: node.ended["starter"] == 1)  # to be started again, with the new code
        said = [json.loads(line)["message"] for line in node.site_log().splitlines()]
        assert any("another version was installed" in each for each in said)
        assert not any("ClientApp was killed" in each for each in said)
        answered(fleet, node)
