"""Admission: an honest reply is admitted, each bad one of the corpus is left out for its own reason, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Array, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.faults import ReceiptError
from common.privacy.receipts import Receipt
from common.wire import Reason, Refusal, answer_to_records
from server.admission import Admitted, LeftOut, admit
from server.registry import Registry
from simulations.inline import over_the_wire
from tests.common.privacy import bad_receipts
from tests.server import bad_replies as corpus


def decide(it: corpus.Scene, content: RecordDict) -> Admitted | LeftOut:
    return admit(content, corpus.expectation(), it.registry, it.taken)


@pytest.fixture
def scene(tmp_path: Path) -> corpus.Scene:
    return corpus.scene(tmp_path / "registry")


def test_an_honest_reply_is_admitted_and_its_head_countersigned(scene: corpus.Scene) -> None:
    state = corpus.update()
    verdict = decide(scene, corpus.reply(state, corpus.answered(scene.site, state)))
    assert isinstance(verdict, Admitted)
    assert (verdict.site, verdict.key_id) == ("north", scene.key_id)
    assert all(verdict.state[name].equal(state[name]) for name in state)
    anchor = scene.registry.accept(verdict.chain)
    anchor.check()
    assert (anchor.seq, anchor.head) == (4, scene.site.entries[-1].hash)


def test_a_reply_may_begin_before_the_head_that_is_held(scene: corpus.Scene) -> None:
    """A site that missed the last anchor sends more than is needed."""
    state = corpus.update()
    corpus.answered(scene.site, state)
    verdict = decide(scene, corpus.reply(state, corpus.receipt(scene.site, 1)))
    assert isinstance(verdict, Admitted)


@pytest.mark.parametrize("name", corpus.CASES)
def test_each_bad_reply_is_left_out_for_its_own_reason(name: str, scene: corpus.Scene) -> None:
    reason, explanation, case = corpus.CASES[name]
    content = case(scene)
    before = [entry.hash for entry in scene.registry.chain(scene.key_id).entries]
    verdict = decide(scene, content)
    assert isinstance(verdict, LeftOut), "it was admitted"
    assert verdict.reason == reason, verdict
    assert explanation in verdict.explanation
    assert verdict.explanation.isprintable()
    assert not verdict.refused
    assert [
        entry.hash for entry in Registry(scene.registry._file.parent).chain(scene.key_id).entries
    ] == before


def test_the_corpus_is_large_and_no_two_families_share_all_reasons() -> None:
    assert len(corpus.CASES) >= 60
    assert len({reason for reason, _, _ in corpus.CASES.values()}) >= 25


RECEIPTS = [
    name
    for name, (reason, _) in bad_receipts.CASES.items()
    if name.startswith("receipt with ") and reason != "not_canonical"
]


@pytest.mark.parametrize("name", RECEIPTS)
def test_bad_receipts_are_left_out_by_their_own_names(
    name: str, scene: corpus.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipts' corpus through admission: its cases of form, as bytes in a reply."""
    reason, case = bad_receipts.CASES[name]
    sent: list[bytes] = []
    read = Receipt.from_bytes
    monkeypatch.setattr(Receipt, "from_bytes", lambda data: (sent.append(data), read(data))[1])
    with pytest.raises(ReceiptError):
        case()
    monkeypatch.undo()
    content = corpus.reply(corpus.update(), corpus.answered(scene.site, corpus.update()))
    content["receipt"]["entries"] = sent[-1]
    verdict = decide(scene, content)
    assert isinstance(verdict, LeftOut)
    assert verdict.reason == reason


@pytest.mark.parametrize("reason", list(Reason))
def test_a_refusal_is_recorded_as_the_sites_own_no(reason: Reason, scene: corpus.Scene) -> None:
    verdict = decide(scene, answer_to_records(Refusal(reason)))
    assert verdict == LeftOut(reason.value, "the site refused", refused=True)


def test_one_key_has_one_update_in_a_round(scene: corpus.Scene) -> None:
    state = corpus.update()
    content = corpus.reply(state, corpus.answered(scene.site, state))
    first = decide(scene, content)
    assert isinstance(first, Admitted)
    scene.registry.accept(first.chain)
    scene.taken.append(first.key_id)
    again = decide(scene, content)
    assert isinstance(again, LeftOut)
    assert again.reason == "second_update"
    other = corpus.reply(state, corpus.answered(scene.site, state, attempt=2))
    assert isinstance(again := decide(scene, other), LeftOut)
    assert again.reason == "second_update"


@pytest.mark.parametrize(
    "lie", ["ledger rolled back behind the anchored head", "history rewritten with twice the noise"]
)
def test_two_histories_bar_a_site_with_a_proof_that_convinces_anyone(lie: str, tmp_path: Path) -> None:
    scene = corpus.scene(tmp_path / "registry")
    verdict = decide(scene, corpus.CASES[lie][2](scene))
    assert isinstance(verdict, LeftOut)
    assert verdict.reason == "fork"
    again = Registry(tmp_path / "registry")  # another process of the server, later
    assert again.site(scene.key_id) is not None
    assert [(site.name, site.barred) for site in again.sites()] == [("north", True), ("south", False)]
    (proof,) = again.proofs(scene.key_id)
    proof.verify(scene.site.genesis.public_key)
    state = corpus.update()
    honest = corpus.reply(state, corpus.answered(scene.site, state))
    later = admit(honest, corpus.expectation(), again, [])
    assert isinstance(later, LeftOut)
    assert later.reason == "barred"
    assert len(again.proofs(scene.key_id)) == 1


def test_a_forged_fork_bars_nobody(scene: corpus.Scene) -> None:
    """Someone else's copy of the site's entries, signed by someone else, proves nothing against the site."""
    state = corpus.update()
    lying = corpus.Writer(corpus.STRANGER)
    signed = corpus.answered(lying, state)
    dressed = tuple(
        corpus.replace(entry, key_id=scene.key_id, seq=entry.seq, signature=entry.signature)
        for entry in signed.entries
    )
    verdict = decide(scene, corpus.reply(state, Receipt(scene.site.entries[0], dressed)))
    assert isinstance(verdict, LeftOut)
    assert verdict.reason == "bad_signature"
    assert not any(site.barred for site in scene.registry.sites())


def test_what_a_site_wrote_is_never_in_an_explanation(scene: corpus.Scene) -> None:
    state = corpus.update()
    data = corpus.reply(state, corpus.answered(scene.site, state))
    for place, word in ((b'"kind":"release"', b'"kind":"evil-word"'), (b'"seq":"', b'"evil-word":"')):
        content = corpus.reply(state, corpus.answered(scene.site, state, attempt=len(scene.site.entries)))
        raw = content["receipt"]["entries"]
        assert isinstance(raw, bytes)
        content["receipt"]["entries"] = raw.replace(place, word)
        verdict = decide(scene, content)
        assert isinstance(verdict, LeftOut)
        assert "evil" not in verdict.explanation + verdict.reason
    assert data


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> corpus.Scene:
    return corpus.scene(tmp_path_factory.mktemp("lasting") / "registry")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_make_admission_raise(data: st.DataObject, lasting: corpus.Scene) -> None:
    """Receipts and arrays of an honest reply with bytes changed, cut or added: never an exception, never in."""
    site = corpus.Writer()
    corpus.answered(site, corpus.update(1), corpus.asked("run-a", 2))
    state = corpus.update()
    content = corpus.reply(state, corpus.answered(site, state))
    if data.draw(st.booleans()):
        raw = content["receipt"]["entries"]
        assert isinstance(raw, bytes)
        changed = _changed(raw, data)
        content["receipt"]["entries"] = changed
        harmless = changed == raw
    else:
        raw = content["update"]["tensors"].data
        changed = _changed(raw, data)
        harmless = changed == raw
        content["update"]["tensors"] = Array("uint8", (len(changed),), "safetensors", changed)
    verdict = decide(lasting, content)
    assert harmless or isinstance(verdict, LeftOut)
    assert not any(each.barred for each in lasting.registry.sites())


def _changed(raw: bytes, data: st.DataObject) -> bytes:
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 40)))
    return raw[:start] + data.draw(st.binary(max_size=40)) + raw[end:]


def test_replies_are_the_same_after_the_wire(scene: corpus.Scene) -> None:
    """The corpus is decided upon as received: what the wire itself would refuse proves nothing here."""
    from flwr.app import Message, Metadata

    metadata = Metadata(1, "m", 2, 1, "r", "", 0.0, 60.0, "train")
    survived = 0
    for name, (reason, _, case) in corpus.CASES.items():
        it = corpus.scene(scene.registry._file.parent.parent / name.replace(" ", "-").replace("/", "-"))
        message = Message(case(it), metadata=metadata)
        try:
            received = over_the_wire(message)
        except Exception:  # Flower's own serialisation refuses it, before we are asked
            continue
        survived += 1
        verdict = decide(it, received.content)
        assert isinstance(verdict, LeftOut)
        assert verdict.reason == reason, name
    assert survived > len(corpus.CASES) * 0.9
