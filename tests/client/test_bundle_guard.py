"""A bundle runs at a site by its hash alone, and nothing of any bundle is unpacked or imported there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from flwr.app import Message
from flwr.supernode.runtime import run_clientapp

from client.bundle_guard import (
    BundleRefusedError,
    allowed_bundles,
    check_bundle,
    guarded_clientapp,
)
from client.policy import POLICY, Policy, policy_text
from common.bundle import bundle_files, bundle_hash
from common.logs import set_up_logs


def fab(extra: bytes = b"") -> bytes:
    from flwr.cli.build import build_fab_from_files

    files = bundle_files()
    files["fedtide_client.py"] += extra
    data: bytes = build_fab_from_files(files)[0]
    return data


def test_the_installed_versions_bundle_is_let_in_and_one_changed_byte_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = allowed_bundles(tmp_path)
    assert allowed == (bundle_hash(),)
    check_bundle(fab(), allowed, "policy.toml")
    with caplog.at_level(logging.ERROR), pytest.raises(BundleRefusedError) as refused:
        check_bundle(fab(b"\nprint('more')\n"), allowed, "policy.toml")
    assert "sha256" in caplog.text
    assert allowed[0] in caplog.text  # both hashes, and the way out, in the site's own log
    assert "put its sha256 into bundles in policy.toml" in caplog.text
    assert str(refused.value) == "the bundle is not on this site's list"


def test_a_list_in_the_policy_counts_alone(tmp_path: Path) -> None:
    (tmp_path / POLICY).write_text(policy_text(Policy(users_at_least=1, bundles=("ab" * 32,))))
    assert allowed_bundles(tmp_path) == ("ab" * 32,)
    with pytest.raises(BundleRefusedError):
        check_bundle(fab(), allowed_bundles(tmp_path), POLICY)


def test_flowers_own_process_asks_the_guard_and_loads_the_installed_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import client.app

    marker = tmp_path / "it-ran"
    evil = fab(f"\nopen({str(marker)!r}, 'w')\n".encode())
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    for name in ("install_from_fab", "get_load_client_app_fn", "pull_and_inflate_object_from_tree"):
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))  # restored at the end
    monkeypatch.setattr(Message, "__init__", Message.__init__)
    begun: list[dict[str, object]] = []
    monkeypatch.setattr(run_clientapp, "run_clientapp", lambda **given: begun.append(given))
    set_up_logs(tmp_path / "site.log", json=True)
    assert guarded_clientapp(tmp_path, "127.0.0.1:9", "a token") == 0
    assert begun == [{"runtime_api_address": "127.0.0.1:9", "token": "a token", "insecure": True}]
    logging.getLogger("fedtide.site").propagate = True
    with pytest.raises(BundleRefusedError):
        run_clientapp.install_from_fab(evil, skip_prompt=True)
    run_clientapp.install_from_fab(fab(), skip_prompt=True)
    load = run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)
    assert load("fedtide/fedtide", "../../evil", "0" * 64) is client.app.app
    assert not marker.exists()
    assert not (tmp_path / "flwr" / "apps").exists()
    (line,) = (tmp_path / "site.log").read_text().splitlines()
    assert "a bundle is refused" in json.loads(line)["message"]
