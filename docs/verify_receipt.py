"""Verify what sites and server signed, after docs/formats.md and without Fedtide: Python 3.11 and `cryptography`.

python -I verify_receipt.py RUN REGISTRY.sqlite     every receipt of a run, every chain of the server's registry
python -I verify_receipt.py closing.json            the certificate of a withdrawal
"""

import hashlib
import json
import math
import re
import sqlite3
import sys
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

PATTERNS = {
    "count": "0|[1-9][0-9]{0,18}",
    "number": r"(?=.{1,64}$)(0|[1-9][0-9]*)(\.[0-9]*[1-9])?",
    "digest": "[0-9a-f]{64}",
    "signature": "[0-9a-f]{128}",
    "nonce": "[0-9a-f]{32,128}",
    "name": "[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}",
    "day": "2[0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])",
}
TABLE = """
entry       body=any format=fedtide/entry/1 kind=any seq=count prev=digest key_id=digest signature=signature
genesis     unit=user adjacency=add_or_remove_one mode=site|secagg epsilon=number delta=number order=count
genesis     cap=count public_key=digest dataset_commitment=digest? day=day
reserve     genesis=digest run=name round=count attempt=count event=any charge=count spent=count plan_hash=digest
reserve     model_hash=digest nonce=nonce clip_norm=number normaliser=number learning_rate=number? day=day
release     reservation=digest content=update|statistics|metrics update_digest=digest update_bytes=count
burnt       reservation=digest
anchor      seq=count head=digest server_key=digest countersignature=signature
close       spent=count day=day
gaussian_sum                  mechanism=any noise_multiplier=number
poisson_subsampled_gaussian   mechanism=any noise_multiplier=number sampling_rate=number steps=count
receipt           entries=any format=fedtide/receipt/1 genesis=any
certificate       format=fedtide/certificate/1 in_words=any signed=any
signed            entries=any genesis=any
equivocation      first=any second=any
countersignature  format=fedtide/anchor/1 head=digest seq=count server_key=digest signature=signature
countersignature  site_key_id=digest
"""
FORMS = {}
for row in TABLE.split("\n"):
    for field in row.split()[1:]:
        FORMS.setdefault(row.split()[0], {}).update([field.split("=")])
KINDS = ("genesis", "reserve", "release", "burnt", "anchor", "close")
BOUNDS = {  # above, at most
    "epsilon": (0, 1000),
    "delta": (0, 0.01),
    "order": (1, 256),
    "cap": (0, 10**18),
    "sampling_rate": (0, 1),
    "noise_multiplier": (math.nextafter(0.1, 0), 10**6),
    "steps": (0, 10**7),
}
LABELS = {"run", "round", "site", "key_id", "delta", "event", "receipt", "anchor"}
OWN_FAULTS = {name: f"wrong_{name}" for name in ("unit", "adjacency", "content")}


class RefusedError(Exception):
    """What was given does not hold; the text is the fault's name in docs/formats.md."""


def need(holds, fault):
    if not holds:
        raise RefusedError(fault)


def spell(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse(data, longest, canonical=True):
    def once(pairs):
        need(len(dict(pairs)) == len(pairs), "not_canonical")
        return dict(pairs)

    def check(value, depth):
        if isinstance(value, str):
            return need(re.fullmatch("[ -~]*", value), "not_canonical")
        need(isinstance(value, list | dict) and depth <= 16, "not_canonical")
        for each in value if isinstance(value, list) else [*value, *value.values()]:
            check(each, depth + 1)

    need(len(data) <= longest, "not_canonical")
    try:
        value = json.loads(data.decode("ascii"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise RefusedError("not_canonical") from None
    check(value, 1)
    need(not canonical or spell(value) == data, "not_canonical")
    return value


def shaped(value, form, other="malformed_entry", bad="bad_field"):
    """The value: an object with the fields of that form, each a string as its pattern and within its bounds."""
    need(isinstance(value, dict), "malformed_entry")
    form = FORMS[form]
    need(value.get("format", form.get("format")) == form.get("format"), "unknown_format")
    need(set(value) == set(form), other)
    for name, kind in form.items():
        text, pattern = value[name], kind.rstrip("?")
        if kind == "any" or (kind.endswith("?") and text == ""):
            continue
        need(isinstance(text, str), "malformed_entry" if bad == "bad_field" else bad)
        need(re.fullmatch(PATTERNS.get(pattern, pattern), text), OWN_FAULTS.get(name, bad))
        if pattern in ("count", "number"):
            least, most = BOUNDS.get(name, (-1, 10**18) if pattern == "count" else (0, 10**12))
            need(least < Decimal(text) <= most, bad)
            shortest = Decimal(repr(float(text)))  # decimal that reads back as the same double
            need(pattern == "count" or shortest == Decimal(text), bad)
    return value


def entry(value):
    """One entry, its form checked; its signature needs the genesis' key."""
    kind = shaped(value, "entry")["kind"]
    need(isinstance(kind, str), "malformed_entry")
    need(kind in KINDS, "unknown_kind")
    event = shaped(value["body"], kind).get("event")
    if kind == "reserve":
        need(isinstance(event, dict), "malformed_entry")
        mechanism = str(event.get("mechanism"))
        need(mechanism in ("gaussian_sum", "poisson_subsampled_gaussian"), "unknown_mechanism")
        shaped(event, mechanism, "unknown_mechanism", "bad_event")
    need(len(spell(value)) <= 16_384, "not_canonical")
    return value


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def hash_of(signed):
    return sha256(spell(signed))


def check_signature(signed, key, fault="bad_signature"):
    unsigned = {name: value for name, value in signed.items() if name != "signature"}
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signed["signature"]), spell(unsigned))
    except (InvalidSignature, ValueError):
        raise RefusedError(fault) from None


def charge_of(event, order):
    """Nano-units. Decimal(float(text)) is the double to its last digit."""
    with localcontext(Context(prec=80, Emax=MAX_EMAX, Emin=MIN_EMIN)):
        q, sigma = (Decimal(float(event.get(name, "1"))) for name in ("sampling_rate", "noise_multiplier"))
        nats = order / (2 * sigma**2)
        if q != 1:
            weights = {k: math.comb(order, k) * (1 - q) ** (order - k) * q**k for k in range(2, order + 1)}
            growth = sum(weight * ((k * (k - 1) / (2 * sigma**2)).exp() - 1) for k, weight in weights.items())
            nats = (1 + growth).ln() / (order - 1)
        return max(1, math.ceil(nats * int(event.get("steps", "1")) * 10**9))


def cap_of(epsilon, delta, order):
    with localcontext(Context(prec=80)):
        spare = (order * Decimal(float(delta))).ln() / (order - 1) - (1 - 1 / Decimal(order)).ln()
        return math.floor((Decimal(float(epsilon)) + spare) * 10**9)


class Chain:
    """A chain from its genesis on, to which entries are added; with `end`, they may leave a gap after the genesis."""

    def __init__(self, genesis):
        need(genesis["kind"] == "genesis" and genesis["seq"] == "0", "missing_genesis")
        self.promise = promise = genesis["body"]
        self.key_id, self.order, self.cap = genesis["key_id"], int(promise["order"]), int(promise["cap"])
        need(self.key_id == sha256(bytes.fromhex(promise["public_key"])), "key_mismatch")
        check_signature(genesis, promise["public_key"])
        need(genesis["prev"] == "0" * 64, "wrong_previous_hash")
        need(self.cap == cap_of(promise["epsilon"], promise["delta"], self.order), "wrong_cap")
        self.head, self.hashes, self.day = genesis, {0: hash_of(genesis)}, promise["day"]
        self.spent, self.whole, self.closed = 0, True, False
        self.reserves, self.outcomes, self.requests = {}, {}, set()

    def add(self, entries, end=False):
        previous = None
        for each in entries:
            need(each["key_id"] == self.key_id, "key_mismatch")
            check_signature(each, self.promise["public_key"])
            seq, following = int(each["seq"]), int(self.head["seq"]) + 1
            if previous or seq == following:
                before = previous or self.head
                need(seq > int(before["seq"]), "sequence_repeated")
                need(seq == int(before["seq"]) + 1, "sequence_gap")
                need(each["prev"] == hash_of(before), "wrong_previous_hash")
            previous = each
            if seq < following:
                need(self.hashes.get(seq) == hash_of(each), "fork")
                continue
            if seq > following:
                need(end and following == 1, "detached_segment")
                self.whole, self.spent = False, None
            self.admit(each["kind"], each["body"], hash_of(each))
            need(each["kind"] != "anchor" or int(each["body"]["seq"]) < seq, "fork")
            self.head, self.hashes[seq] = each, hash_of(each)
        return self

    def admit(self, kind, body, hash_):
        need(not self.closed or kind == "anchor", "after_close")
        need(kind != "genesis", "second_genesis")
        need(body.get("day", self.day) >= self.day, "clock_backwards")
        self.day = body.get("day", self.day)
        if kind == "reserve":
            charge, spent, due = int(body["charge"]), int(body["spent"]), charge_of(body["event"], self.order)
            request = (body["run"], body["round"], body["attempt"])
            need(body["genesis"] == self.hashes[0], "wrong_genesis")
            need(request not in self.requests, "second_reservation")
            need(charge in (due, max(due, -(-self.cap // 1000))), "wrong_charge")
            need(spent <= self.cap, "over_cap")
            need(spent >= charge and self.spent in (None, spent - charge), "wrong_total")
            self.requests.add(request)
            self.spent, self.reserves[hash_] = spent, body
        elif kind in ("release", "burnt"):
            reserve, was = self.reserves.get(body["reservation"]), self.outcomes.get(body["reservation"])
            need(reserve or not self.whole, "missing_reservation")
            need(was != "burnt", "burnt_reservation")
            need(was is None, "second_release" if kind == "release" else "released_reservation")
            if kind == "release" and reserve:
                summed = reserve["event"]["mechanism"] == "gaussian_sum"
                need(summed != (body["content"] == "update"), "wrong_content")
            self.outcomes[body["reservation"]] = kind
        elif kind == "anchor":
            signed = {"format": "fedtide/anchor/1", "site_key_id": self.key_id, **body}
            signed["signature"] = signed.pop("countersignature")
            check_signature(signed, body["server_key"], "bad_anchor")
            unseen = None if self.whole else body["head"]  # what stands in the gap cannot be told
            need(self.hashes.get(int(body["seq"]), unseen) == body["head"], "fork")
        else:
            need(set(self.reserves) <= set(self.outcomes), "open_reservation")
            need(int(body["spent"]) <= self.cap, "over_cap")
            need(self.spent in (None, int(body["spent"])), "wrong_total")
            self.spent, self.closed = int(body["spent"]), True


def chain(entries, heads=None, key_id=None):
    """The chain of all these entries; `heads`, seq -> hash, were countersigned, and `key_id` was enrolled."""
    need(entries, "empty")
    found = Chain(entry(entries[0]))
    need(key_id in (None, found.key_id), "unknown_key")
    found.add([entry(each) for each in entries])
    for seq, head in (heads or {}).items():
        need(seq in found.hashes, "truncated")
        need(found.hashes[seq] == head, "fork")
    return found


def segment(genesis, entries, held=None):
    """The chain of a receipt or certificate, against a copy that is `held`, or as far as can be told alone."""
    need(isinstance(entries, list), "malformed_entry")
    genesis, entries = entry(genesis), [entry(each) for each in entries]
    need(held is None or held.hashes[0] == hash_of(genesis), "wrong_genesis")
    return (held or Chain(genesis)).add(entries, end=held is None)


def receipt(data, released=None, request=None, held=None):
    """A receipt's chain; `released` are the bytes that left, `request` is what was asked for, as a reserve has it."""
    value = shaped(parse(data, 1 << 24), "receipt")
    found = segment(value["genesis"], value["entries"], held)
    need(value["entries"] and value["entries"][-1]["kind"] == "release", "missing_release")
    bodies, release = {hash_of(each): each["body"] for each in value["entries"]}, value["entries"][-1]["body"]
    reserve = bodies.get(release["reservation"])
    need(reserve, "missing_reservation")
    need(all(reserve[name] == asked for name, asked in (request or {}).items()), "wrong_request")
    if released is not None:
        size, digest = str(len(released)), sha256(released)
        need((size, digest) == (release["update_bytes"], release["update_digest"]), "wrong_digest")
    return found


def certificate(data, held=None):
    """A certificate's chain. The words in the file are not looked at."""
    value = parse(data, 1 << 25, canonical=False)
    if isinstance(value, dict) and set(value) == {"close", "genesis"}:  # of earlier versions
        signed = {"entries": [value["close"]], "genesis": value["genesis"]}
    else:
        signed = shaped(value, "certificate")["signed"]
    shaped(signed, "signed")
    found = segment(signed["genesis"], signed["entries"], held)
    need(signed["entries"] and signed["entries"][-1]["kind"] == "close", "missing_close")
    return found


def countersignature(data):
    """A server's countersignature, verified against the key that it names."""
    found = shaped(parse(data, 4096), "countersignature")
    check_signature(found, found["server_key"], "bad_anchor")
    return found


def equivocation(data, key):
    """A proof that the owner of `key` signed two entries at one place."""
    first, second = map(entry, shaped(parse(data, 1 << 15), "equivocation").values())
    for each in (first, second):
        need(each["key_id"] == sha256(bytes.fromhex(key)), "no_equivocation")
        check_signature(each, key)
    need(first["seq"] == second["seq"] and first != second, "no_equivocation")


def check_run(run, registry):
    """Every chain of the registry, and every receipt of the run against them; what was found, in words."""
    database, held, servers = sqlite3.connect(f"file:{registry}?mode=ro", uri=True), {}, set()
    names = dict(database.execute("SELECT key_id, name FROM sites"))
    for key_id in names:
        entries = database.execute("SELECT entry FROM entries WHERE key_id = ? ORDER BY seq", (key_id,))
        stored = database.execute("SELECT countersignature FROM anchors WHERE key_id = ?", (key_id,))
        anchors = [countersignature(data) for (data,) in stored]
        need(all(each["site_key_id"] == key_id for each in anchors), "bad_anchor")
        heads = {int(each["seq"]): each["head"] for each in anchors}
        held[key_id] = chain([parse(data, 16_384) for (data,) in entries], heads, key_id), anchors
    lines = [json.loads(line) for line in (run / "receipts.jsonl").read_bytes().splitlines()]
    for line in lines:
        need(set(line) == LABELS, "malformed_line")
        update = run / "updates" / f"{line['round']:05d}-{line['key_id'][:16]}.safetensors"
        found = receipt(line["receipt"].encode(), update.read_bytes())
        need(found.key_id in held, "not_enrolled")
        known, anchors = held[found.key_id]
        reserve = found.reserves[found.head["body"]["reservation"]]
        signed = (
            reserve["run"],
            int(reserve["round"]),
            reserve["event"],
            found.key_id,
            float(found.promise["delta"]),
        )
        need(
            signed == tuple(line[name] for name in ("run", "round", "event", "key_id", "delta")),
            "wrong_label",
        )
        need(line["site"] == names[found.key_id], "wrong_label")
        need(int(found.head["seq"]) in known.hashes, "truncated")
        need(found.hashes.items() <= known.hashes.items(), "fork")
        anchor = countersignature(line["anchor"].encode())
        over = (anchor["site_key_id"], anchor["seq"], anchor["head"])
        need(over == (found.key_id, found.head["seq"], hash_of(found.head)), "bad_anchor")
        need(anchor in anchors, "missing_anchor")
        servers.add(anchor["server_key"])
    need(len({line["receipt"] for line in lines}) == len(lines), "unlisted_receipt")
    need(len(servers) == 1, "wrong_server")
    return f"{len(held)} chains and {len(lines)} receipts hold, countersigned by {servers.pop()}"


def main(first, registry=None):
    if Path(first).is_dir():
        return check_run(Path(first), registry)
    found = certificate(Path(first).read_bytes())
    spent = f"{found.spent} of {found.cap} nano-units at order {found.order} spent"
    return f"the certificate holds: closed on {found.day}, {spent}, by the key {found.key_id}"


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or (Path(sys.argv[1]).is_dir() and not Path(*sys.argv[2:3]).is_file()):
        print("usage: verify_receipt.py CERTIFICATE | RUN REGISTRY/registry.sqlite", file=sys.stderr)
        sys.exit(2)
    try:
        print(main(*sys.argv[1:]))
    except RefusedError as fault:
        sys.exit(f"REFUSED: {fault}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, sqlite3.Error) as error:
        sys.exit(f"REFUSED: it cannot be read: {error!r}")
