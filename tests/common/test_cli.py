"""The command line: quick help, and one line with the way out for everything that a person can get wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from common.cli import COMMANDS, main
from common.config import Plan, PlanError, read_plan
from tests.tiny import own_cache, tiny_files, tiny_language_model


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "common.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in COMMANDS)
    code = (
        "import sys\n"
        "from common.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'polars', 'flwr', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of([command], capsys)
    group = re.search(r"^Commands:\n((?:  .*\n?)+)", said, re.MULTILINE)
    for name in re.findall(r"^  (\S+)", group[1], re.MULTILINE) if group else ():
        said += help_of([command, name], capsys)
    assert "[default: " in said or "[required]" in said
    assert "\\[" not in said  # marks of rich's


def help_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert re.search(rf"^Usage: .*{' '.join(command)}", said)
    return said


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return (tiny_language_model(folder / "model"), *tiny_files(folder / "data"))


def test_another_epsilon_on_the_command_line_calibrates_a_plans_noise_anew(
    tiny: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, seen = tmp_path / "plan.toml", list[Plan]()
    with suppress(SystemExit):
        main(["plan", "--users-per-site", "50", "--sites", "10", "--epsilon", "4", "--out", str(plan)])
    stated = read_plan(plan)
    assert stated.privacy.noise_multiplier is not None

    def simulated(_: object, plan: Plan, *more: object, **given: object) -> None:
        seen.append(plan)
        raise SystemExit(0)

    monkeypatch.setattr("simulations.federation.simulate", simulated)
    with pytest.raises(SystemExit):
        main(["simulate", str(plan), "--epsilon", "2", "--log", str(tiny[1]), "--catalog", str(tiny[2])])
    calibrated = seen[0].calibrated()
    assert calibrated.privacy.noise_multiplier is not None
    assert calibrated.privacy.epsilon == 2
    assert calibrated.privacy.noise_multiplier > stated.privacy.noise_multiplier
    with pytest.raises(PlanError, match=r"leave privacy\.noise_multiplier, .* out, so that it is calibrated"):
        stated.model_copy(update={"privacy": stated.privacy.model_copy(update={"epsilon": 2.0})}).calibrated()


def simulate_says(
    arguments: list[str],
    tiny: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    base: bool = True,
) -> str:
    """Runs `fedtide simulate`, which must fail, and gives its one line."""
    model, log, catalog = tiny
    usual = [
        *("--log", str(log), "--catalog", str(catalog), "--encoder", str(model)),
        *("--users-per-site", "10", "--n-sites", "4"),
    ]
    rest = ["--engine", "inline", "--offline", "--runs", str(tmp_path / "runs")]
    with own_cache(tmp_path / "cache"), pytest.raises(SystemExit) as end:
        main(["simulate", *(usual if base else []), *rest, *arguments])
    said = capsys.readouterr()
    assert end.value.code not in (0, None)
    assert "Traceback" not in said.err
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said.err
    assert not list(tmp_path.glob("runs/*/summary.md"))
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epsilon", "0"], ["privacy.epsilon", "greater than 0", "given: 0"]),
        (["--epsilon", "-3"], ["privacy.epsilon", "greater than 0"]),
        (["--delta", "1"], ["privacy.delta", "less than 1"]),
        (["--delta", "0.2"], ["delta is 0.2", "1/users_per_site"]),
        (["--family", "oracle"], ["family 'oracle' is unknown", "recommend"]),
        (["--set", "model.core=abacus"], ["core 'abacus' is unknown", "lstm"]),
        (["--set", "model.colour=red"], ["model.colour", "[model] of a plan has no such key"]),
        (["--set", "nonsense"], ["--set 'nonsense'", "section.name=value"]),
        (["--sampling-rate", "1.5"], ["privacy.sampling_rate", "less than or equal to 1"]),
        (["--engine", "steam"], ["engine 'steam'", "inline"]),
        (["--columns", "user"], ["--columns 'user'", "field=column"]),
        (["--columns", "user=Klant"], ["Klant", "user"]),
        (["--sites-by", "moon"], ["'moon'", "zip, hash or dirichlet"]),
        (["--users-per-site", "60"], ["users", "at least 60", "fewer sites"]),
        (["--n-sites", "0"], ["--n-sites"]),
        (["/no/such/plan.toml"], ["/no/such/plan.toml", "TOML or JSON"]),
    ],
)
def test_a_wrong_option_is_one_line_with_the_way_out(
    arguments: list[str],
    words: list[str],
    tiny: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = simulate_says(arguments, tiny, tmp_path, capsys)
    for word in words:
        assert word in said


def test_a_missing_log_an_empty_log_and_a_folder_without_weights_are_one_line_each(
    tiny: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, log, catalog = tiny
    said = simulate_says(["--log", "/no/such/log.csv"], tiny, tmp_path, capsys, base=False)
    assert "/no/such/log.csv" in said
    empty = tmp_path / "empty.csv"
    empty.write_text("user,item,time\n")
    said = simulate_says(["--log", str(empty), "--encoder", str(model)], tiny, tmp_path, capsys, base=False)
    assert "empty" in said
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    arguments = [
        "--log",
        str(log),
        "--catalog",
        str(catalog),
        "--encoder",
        str(bare),
        "--users-per-site",
        "10",
    ]
    said = simulate_says([*arguments, "--n-sites", "4"], tiny, tmp_path, capsys, base=False)
    assert "weights" in said


def test_without_a_network_and_a_cache_the_way_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with own_cache(tmp_path / "cache"), pytest.raises(SystemExit) as end:
        main(["simulate", "--offline", "--runs", str(tmp_path / "runs")])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "movielens-100k" in said
    assert "fedtide data fetch" in said or "--source" in said or "network" in said


def test_recommend_refuses_what_is_no_finished_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nowhere", tmp_path / "20260101-000000-x.incomplete"):
        if folder.suffix:
            folder.mkdir()
        with pytest.raises(SystemExit) as end:
            main(["recommend", "--run", str(folder), "--history", "x"])
        assert end.value.code == 2
        assert "run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["simulat"], "No such command 'simulat'; did you mean simulate?"),
        (["sit", "init"], "did you mean site?"),
        (["sever", "up"], "did you mean server?"),
        (["recomend"], "did you mean recommend?"),
        (["compar"], "did you mean compare?"),
        (["xyzzy"], "No such command 'xyzzy'; there are plan, simulate"),
        (["site", "initt"], "Did you mean 'init'?"),
        (["server", "stauts"], "Did you mean 'status'?"),
        (["audit", "recepts"], "'receipts'"),
        (["simulate", "--epsilno", "3"], "--epsilon"),
        (["plan", "--user-per-site", "3"], "--users-per-site"),
        (["server", "init", "x", "--hots", "a"], "--host"),
    ],
)
def test_what_is_misspelt_is_told_what_is_near_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    words = " ".join(capsys.readouterr().err.split())
    assert said in words
    assert words.lower().count("did you mean") <= 1
