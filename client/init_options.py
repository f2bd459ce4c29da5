"""What `fedtide site init` makes of its options: the typical run of a budget, and language models' folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.privacy.mechanisms import Event


def model_folders(given: list[str] | None) -> dict[str, str]:
    """Name -> folder, of `NAME=FOLDER` each.

    Raises:
        UserError: one reads otherwise.
        AssetError: there is no such folder.
    """
    from common.assets import language_model
    from common.cli import UserError

    found = {}
    for each in given or ():
        name, equals, folder = each.rpartition("=")
        if not equals or not name or not folder:
            raise UserError(f"--language-model {each!r} must read NAME=FOLDER, as a plan's encoder names it")
        found[name] = str(language_model(Path(folder).expanduser().resolve(), offline=True))
    return found


def typical_events(plan_file: Path | None, epsilon: float, delta: float, users: int) -> list[Event]:
    """The events of the run that a budget is to serve best: of a plan's file, or of the default plan.

    Raises:
        UserError: the plan counts on more users than the site promises.
        PlanError: the file is no plan.
    """
    from common.cli import UserError
    from common.config import make_plan, read_recorded_plan

    if plan_file is not None:
        plan = read_recorded_plan(plan_file)  # its events alone count: an older plan has them, too
        if plan.privacy.users_per_site > users:
            raise UserError(
                f"the typical plan counts on {plan.privacy.users_per_site} users, but --users-at-least is "
                f"{users}: such a run would be refused"
            )
    else:
        privacy = {"epsilon": min(epsilon, 100.0), "delta": delta, "users_per_site": users}
        plan = make_plan({"privacy": privacy})
    return list(plan.calibrated().events())
