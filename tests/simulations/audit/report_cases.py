"""Made-up evidence of every tool, of the shape that the tools write, for tests of the report."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

from simulations.audit.evidence import Check, Evidence

SITES = tuple(f"site-{number}" for number in range(4))
ROUNDS = 5


def write_evidence(run: Path, *tools: str) -> None:
    """Writes what these tools, or all of them, would write where everything holds."""
    made = {each.tool: each for each in (conformance(), noise(), canary(), attack())}
    for tool in tools or tuple(made):
        made[tool].write(run)


def conformance() -> Evidence:
    """Two checks and a positive control."""
    checks = [
        Check("sensitivity", "recommend, vectors", 1.0, "at most 1.001", True, "one user moves a sum by C at most"),
        Check("noise", "recommend, vectors", 0.996, "within 0.98 to 1.02", True, "as much noise as is charged"),
        Check("sensitivity", "clipping off", 18.3, "at most 1.001", True, "caught", control=True),
    ]  # fmt: skip
    return Evidence("conformance", "fedtide audit conformance --run RUN", checks, {"level": 1e-6}, {},
                    ["It tests inputs that it thought of."], 21.0)  # fmt: skip


def noise(ratio: float = 1.0) -> Evidence:
    """A control chart whose points all stand at a ratio, give or take."""
    sites = {
        site: [
            {"round": number, "phase": "update", "ratio": ratio + 0.01 * math.sin(7 * number + place),
             "low": 0.9, "high": 1.1}
            for number in range(1, ROUNDS + 1)
        ]
        for place, site in enumerate(SITES)
    }  # fmt: skip
    holds = 0.9 <= ratio <= 1.1
    check = Check(
        "noise level", "all sites", ratio, "within 0.9 to 1.1", holds, "as much noise as was signed for"
    )
    return Evidence("noise", "fedtide audit noise RUN", [check], {"level": 1e-3},
                    {"sites": sites, "correlations": {}}, ["It finds bugs, not fraud."], 1.2)  # fmt: skip


def canary() -> Evidence:
    """Bounds that grow and stay below the claim."""
    rounds = [
        {"round": number, "claimed": 0.9 * math.sqrt(number), "steinke": 0.2 * math.sqrt(number),
         "f_dp": 0.35 * math.sqrt(number)}
        for number in range(1, ROUNDS + 1)
    ]  # fmt: skip
    control = Check("f-DP one run", "noise off", 6.1, "more than 2.0", True, "caught", control=True)
    check = Check("f-DP one run", "recommend", 0.78, "at most 2.0", True, "planted users stay hidden enough")
    return Evidence("canary", "fedtide audit canary RUN", [check, control], {"canaries": 1000, "epsilon": 2.0},
                    {"rounds": rounds}, [], 9.0)  # fmt: skip


def attack() -> Evidence:
    """Curves of binormal attackers, one strong without noise and one weak with it."""
    normal = NormalDist()
    rates = [10 ** (-3 + each / 20) for each in range(60)]
    curves = {
        variant: [[rate, normal.cdf(normal.inv_cdf(rate) + power)] for rate in rates]
        for variant, power in (("no noise", 2.2), ("this run", 0.15))
    }
    boundary = [[rate, normal.cdf(normal.inv_cdf(rate) + 1.6)] for rate in rates]
    recovery = [
        {"variant": "no noise", "sigma": 0.0, "precision": 1.0, "chance": 0.1},
        {"variant": "this run", "sigma": 3.0, "precision": 0.12, "chance": 0.1},
    ]
    control = Check("recovery", "no noise", 1.0, "at least 0.9", True, "the attack works", control=True)
    check = Check(
        "recovery", "this run", 0.12, "near chance, 0.1", True, "items cannot be read off an update"
    )
    return Evidence("attack", "fedtide audit attack RUN", [check, control], {},
                    {"roc": {"loss threshold": curves}, "dp_boundary": boundary, "recovery": recovery},
                    ["Attacks are no bound on epsilon."], 60.0)  # fmt: skip
