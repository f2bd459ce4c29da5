"""Runs docs/verify_receipt.py as a stranger would: `python -I` this, with nothing of ours to import.

Arguments: the verifier, a file of items, JSON; prints JSON: item's name -> fault, or "" where it is believed.
"""

import base64
import importlib
import importlib.util
import json
import sys
from pathlib import Path

OURS = {"common", "client", "server", "simulations", "tests"}


class Closed:
    """Refuses every module of ours, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in OURS:
            raise ImportError(f"{name} is ours")


def bytes_of(text):
    return None if text is None else base64.b64decode(text)


def importable(name):
    try:
        return importlib.import_module(name) is not None
    except ImportError:
        return False


def judge(verifier, item):
    chains = [verifier.parse(bytes_of(each), 16_384) for each in item.get("entries") or []]
    data, held = bytes_of(item.get("data")), None
    if item["kind"] != "chain" and chains:
        held = verifier.chain(chains)
    match item["kind"]:
        case "chain":
            heads = {int(seq): head for seq, head in item["heads"].items()}
            verifier.chain(chains, heads, item["key_id"])
        case "receipt":
            verifier.receipt(data, bytes_of(item["released"]), item["request"], held)
        case "certificate":
            verifier.certificate(data, held)
        case "equivocation":
            verifier.equivocation(data, item["key"])
        case "countersignature":
            verifier.countersignature(data)
        case "run":
            verifier.check_run(Path(item["run"]), Path(item["registry"]))
        case "charge":
            return str(verifier.charge_of(item["event"], item["order"]))
        case "cap":
            return str(verifier.cap_of(*item["goal"]))
    return ""


def main(file, items):
    at_start = set(sys.modules)
    sys.meta_path.insert(0, Closed())
    shut = not any(importable(name) for name in OURS)
    spec = importlib.util.spec_from_file_location("stranger", file)
    verifier = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verifier)
    told = {}
    for item in json.loads(Path(items).read_text()):
        try:
            told[item["name"]] = judge(verifier, item)
        except verifier.RefusedError as fault:
            told[item["name"]] = str(fault)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            told[item["name"]] = f"unreadable: {error!r}"
    loaded = {name.split(".")[0] for name in sys.modules}
    new = {name.split(".")[0] for name in set(sys.modules) - at_start} - sys.stdlib_module_names
    print(json.dumps({"told": told, "ours": sorted(loaded & OURS), "shut": shut, "others": sorted(new)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
