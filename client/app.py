"""The Flower ClientApp: finds the site's folder in the node's own configuration, and hands over to `site.py`.

torch is imported when a message comes, not when Flower loads the app.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()

_log = logging.getLogger("fedtide.site")

SITES_FOLDER = "FEDTIDE_SITES"
"""Where a simulation keeps its sites, one folder a partition."""


def site_folder(context: Context) -> Path:
    """The site's folder: `site` in the node's configuration, or a simulation's partition. Never the server's choice."""
    named = context.node_config.get("site")
    if named:
        return Path(str(named))
    return Path(os.environ[SITES_FOLDER]) / f"{int(str(context.node_config['partition-id'])):05d}"


def _answered(message: Message, context: Context) -> Message:
    from client.site import Site, answer
    from common.wire import Reason, Refusal, Update, WireError, answer_to_records, request_from_records

    reply: Update | Refusal
    try:
        reply = answer(Site.load(site_folder(context)), request_from_records(message.content))
    except WireError:
        reply = Refusal(Reason.POLICY)
    except Exception as error:
        # Flower would send the exception's text to the server, and texts may depend on the data.
        _log.error("the site failed before or after its work: %s", type(error).__name__)
        reply = Refusal(Reason.FAILED)
    return Message(answer_to_records(reply), reply_to=message)


@app.query()  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Statistics, as a Gaussian sum."""
    return _answered(message, context)


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """One round of private fine-tuning."""
    return _answered(message, context)


@app.evaluate()  # type: ignore[untyped-decorator]
def evaluate(message: Message, context: Context) -> Message:
    """Metrics, as a Gaussian sum, where the site's policy allows them."""
    return _answered(message, context)
