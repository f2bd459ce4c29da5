"""The auditor's page in a real browser: no complaint, every figure, no overflow on a phone, and it prints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import site_page
from client.ledger import Ledger
from client.site_report import site_report
from simulations.audit.page import page
from simulations.audit.report import build_report
from tests.client.test_spending import CHARGES, STEPS, charge
from tests.simulations.audit.browser import Browser, browser, browser_path
from tests.simulations.audit.report_cases import write_evidence
from tests.tiny import tiny_run

PLAN = {
    "privacy": {"noise_multiplier": 3.0, "epsilon": 30.0, "sampling_rate": 1.0},
    "training": {"rounds": 1, "steps_per_round": 1},
}
PHONE = 360
OVERFLOW = f"document.documentElement.scrollWidth - {PHONE}"

pytestmark = pytest.mark.skipif(
    browser_path() is None,
    reason="there is no browser here, so the page is not looked at: install chromium, or name one in FEDTIDE_BROWSER",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tiny_run(tmp_path_factory.mktemp("run"), plan=PLAN).run.path
    write_evidence(run)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(build_report(run)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program, folder = browser_path(), tmp_path_factory.mktemp("browser")
    assert program is not None
    with browser(program, folder) as opened:
        yield opened
    shutil.rmtree(folder, ignore_errors=True)


def changed(made: Path, folder: Path, old: str, new: str) -> Path:
    text = made.read_text(encoding="utf-8")
    assert old in text
    file = folder / "changed.html"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    return file


def test_the_page_opens_without_a_complaint_and_asks_for_nothing(made: Path, tab: Browser) -> None:
    tab.open(made, 1200)
    assert tab.errors == []
    assert tab.requests == [made.resolve().as_uri()]
    assert tab.value("document.querySelector('.verdict .word').textContent") == "The privacy promise held"


@pytest.mark.parametrize(
    "broken", ["<img src='missing.png'>", "<script>alert(1)</script>", "<svg><path d='x'/></svg>"]
)
def test_a_broken_page_is_noticed(made: Path, tab: Browser, tmp_path: Path, broken: str) -> None:
    tab.open(changed(made, tmp_path, "<main>", f"<main>{broken}"), 1200)
    assert tab.errors


SIZES = (
    "[...document.querySelectorAll('svg.chart')].map(each => each.getBoundingClientRect())"
    ".map(box => [box.width, box.height])"
)


@pytest.mark.parametrize("width", [1200, PHONE])
def test_every_figure_is_seen(made: Path, tab: Browser, width: int) -> None:
    tab.open(made, width)
    sizes = tab.value(SIZES)
    assert len(sizes) == 6
    for wide, high in sizes:
        assert wide >= 0.4 * min(width, 1000)
        assert 0.5 <= high / wide <= 0.8
    assert tab.value(
        "[...document.querySelectorAll('svg.chart')].every(each => each.querySelectorAll('path').length)"
    )


def test_nothing_overflows_on_a_phone(made: Path, tab: Browser, tmp_path: Path) -> None:
    tab.open(made, PHONE)
    assert tab.value(OVERFLOW) <= 0
    tab.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.value(OVERFLOW) <= 0
    tab.screenshot(tmp_path / "phone.png")
    tab.open(changed(made, tmp_path, 'class="scroll"', 'class="wide"'), PHONE)
    tab.value("document.querySelectorAll('.scroll').forEach(each => each.style.overflow = 'visible')")
    assert tab.value(OVERFLOW) > 0, "this check cannot fail"


CONTRAST = """(() => {
  const light = c => c.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const sum = c => light(c).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const read = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const back = each => { for (let e = each; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return read(c); } return [255, 255, 255]; };
  let least = 99;
  for (const each of document.querySelectorAll('p, li, td, th, dt, dd, h1, h2, h3, .state, .mark, summary, strong')) {
    const [a, b] = [sum(read(getComputedStyle(each).color)), sum(back(each))];
    least = Math.min(least, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
  }
  return least;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_by_day_and_by_night(made: Path, tab: Browser, tmp_path: Path, scheme: str) -> None:
    tab.open(made, 1200, scheme=scheme)
    assert tab.value(CONTRAST) >= 4.5
    assert tab.screenshot(tmp_path / f"{scheme}.png", whole=False).stat().st_size > 10_000
    faint = {"light": "#999", "dark": "#555"}[scheme]
    tab.value(f"document.querySelector('p').style.color = '{faint}'")
    assert tab.value(CONTRAST) < 4.5, "this check cannot fail"


def test_it_prints_whole(made: Path, tab: Browser, tmp_path: Path) -> None:
    tab.open(made, 1200)
    printed = tab.pdf(tmp_path / "report.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    tab.open(changed(made, tmp_path, "details::details-content", "details::nothing"), 1200)
    folded = tab.pdf(tmp_path / "folded.pdf").read_bytes()
    assert printed.count(b"/Type /Page") > folded.count(b"/Type /Page") or len(printed) > 1.03 * len(
        folded
    ), "what is folded up on the screen is not printed"


def test_a_sites_own_page_is_as_whole(tab: Browser, tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger", epsilon=8, delta=1e-6, typical_plan=[STEPS] * 20) as ledger:
        for number, (run, event, outcome) in enumerate(CHARGES):
            charge(ledger, number, run, event, outcome)
    file = tmp_path / "site.html"
    file.write_text(site_page.page(site_report(tmp_path)), encoding="utf-8")
    for width, scheme in ((1200, "light"), (1200, "dark"), (PHONE, "light")):
        tab.open(file, width, scheme=scheme)
        assert tab.errors == []
        assert tab.requests == [file.resolve().as_uri()]
        [(wide, high)] = tab.value(SIZES)
        assert 0.5 <= high / wide <= 0.8
        assert tab.value(CONTRAST) >= 4.5
    assert tab.value(OVERFLOW) <= 0
    assert tab.pdf(tmp_path / "site.pdf").read_bytes().startswith(b"%PDF")
