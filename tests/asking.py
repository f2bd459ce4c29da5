"""Asks sites in the place of a server: every request is signed, as sites answer nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from flwr.app import RecordDict

from client import site as site_module
from client.app import answered
from client.generators import SECURE, Generators
from client.origin import OriginError
from client.site import refusal_of
from client.site_folder import Site
from common.privacy.canonical import encode
from common.wire import Refusal, Request, Update, answer_from_records, request_to_records
from simulations.asking import KEY, asked_of, signed_for


def answer(
    site: Site, request: Request, *, until: float = math.inf, generators: Generators = SECURE
) -> Update | Refusal:
    """What a site answers to a request that a server of ours signs for it."""
    try:
        asked = asked_of(site.folder, request, until=until)
    except OriginError as error:
        return refusal_of(error)
    return site_module.answer(site, asked, generators=generators)


def answer_anyhow(site: Site, request: Request, **fields: str) -> Update | Refusal:
    """What a site answers where the server signs a statement with fields that ours would not write."""
    signed = signed_for(site.folder, request)
    statement = encode({**json.loads(signed.statement), **fields})
    content = request_to_records(replace(signed, statement=statement, signature=KEY.sign(statement)))
    return answer_from_records(answered(lambda: site.folder, content))


def content_for(folder: Path, request: Request) -> RecordDict:
    """The content of such a message to the site in a folder."""
    return request_to_records(signed_for(folder, request))
