"""Plans: what is wrong is told in one line with name, value and bound; what is right comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common.config import Plan, PlanError, make_plan, read_plan, read_recorded_plan
from common.models.names import FAMILIES

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "field", "value", "bound"),
    [
        ("privacy", "epsilon", 0, "greater than 0"),
        ("privacy", "epsilon", -1.5, "greater than 0"),
        ("privacy", "epsilon", 101, "less than or equal to 100"),
        ("privacy", "epsilon", NAN, "finite"),
        ("privacy", "epsilon", INFINITY, "finite"),
        ("privacy", "epsilon", "much", "valid number"),
        ("privacy", "delta", 0, "greater than 0"),
        ("privacy", "delta", 1, "less than 1"),
        ("privacy", "delta", NAN, "finite"),
        ("privacy", "clip_norm", 0, "greater than 0"),
        ("privacy", "clip_norm", INFINITY, "finite"),
        ("privacy", "sampling_rate", 1.01, "less than or equal to 1"),
        ("privacy", "sampling_rate", 0, "greater than 0"),
        ("privacy", "users_per_site", 0, "greater than or equal to 1"),
        ("privacy", "users_per_site", 2.5, "valid integer"),
        ("privacy", "noise_multiplier", 0.0, "greater than or equal to 0.1"),
        ("privacy", "noise_multiplier", NAN, "finite"),
        ("training", "rounds", -1, "greater than or equal to 0"),
        ("training", "steps_per_round", 0, "greater than or equal to 1"),
        ("training", "learning_rate", 0, "greater than 0"),
        ("training", "server_momentum", 1, "less than 1"),
        ("model", "width", 0, "greater than or equal to 4"),
        ("model", "width", 62, "multiple of 4"),
        ("model", "hidden_width", 15, "multiple of 4"),
        ("model", "max_events", 1, "greater than or equal to 2"),
        ("model", "mode", "other", "vectors"),
        ("server", "minimum_sites", 0, "greater than or equal to 1"),
        ("server", "aggregation", "other", "mean"),
        ("wire", "precision", "float16", "int8"),
    ],
)
def test_a_bad_value_is_one_line_with_name_value_and_bound(
    section: str, field: str, value: Any, bound: str
) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan({section: {field: value}})
    said = str(caught.value)
    assert said.count("\n") == 0
    assert said.startswith(f"{section}.{field}: ")
    assert bound in said
    assert f"given: {value!r}" in said


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"family": "oracle"}}, "'oracle' is unknown: choose one of recommend"),
        ({"model": {"core": "abacus"}}, "'abacus' is unknown: choose one of lstm"),
        (
            {"privacy": {"unheard": 1}},
            r"privacy\.unheard: \[privacy\] of a plan has no such key; it has epsilon, delta",
        ),
        ({"unheard": 1}, "unheard: a plan has no such key; it has name, catalog"),
        (
            {"privacy": {"epsilno": 1}},
            r"\[privacy\] of a plan has no such key; did you mean privacy\.epsilon\?",
        ),
        ({"privcay": {"epsilon": 1}}, r"privcay: a plan has no such key; did you mean privacy\?"),
        ({"epsilon": 1}, r"epsilon: a plan has no such key; did you mean privacy\.epsilon\?"),
        ({"model": {"hiden_width": 1}}, r"did you mean model\.hidden_width\?"),
        ({"training": {"round": 1}}, r"did you mean training\.rounds\?"),
        ({"statistics": {"popularity_shares": 0.1}}, r"did you mean statistics\.popularity_share\?"),
        ({"server": {"deadline": 1}}, r"server\.deadline: \[server\] of a plan has no such key"),
        ({"wire": {"precisoin": "int8"}}, r"did you mean wire\.precision\?"),
        ({"metrics": {"clip_norm": 1}}, r"metrics\.clip_norm: .* did you mean privacy\.clip_norm\?"),
        ({"name": "Not A Name"}, r"name: .*pattern.*given: 'Not A Name'"),
        ({"name": "../up"}, "name: .*pattern"),
        ({"privacy": 3}, "privacy: "),
        (
            {"privacy": {"delta": 0.02, "users_per_site": 50}},
            r"delta is 0\.02, but must be below 1/users_per_site = 0\.02",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line_too(values: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        make_plan(values)
    assert "\n" not in str(caught.value)


def test_every_bad_value_is_told_not_just_the_first() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan({"privacy": {"epsilon": -1}, "training": {"rounds": -1}, "odd": 1})
    for place in ("privacy.epsilon", "training.rounds", "odd"):
        assert place in str(caught.value)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("field", ["epsilon", "clip_norm", "sampling_rate", "users_per_site"])
def test_a_yes_or_no_is_no_number(field: str, value: bool) -> None:
    with pytest.raises(PlanError, match=f"privacy.{field}"):
        make_plan({"privacy": {field: value}})


def test_a_plan_cannot_be_changed() -> None:
    plan = Plan()
    with pytest.raises(ValueError, match="frozen"):
        plan.privacy.epsilon = 100.0
    with pytest.raises(ValueError, match="frozen"):
        plan.name = "other"


def test_the_normaliser_is_a_public_constant() -> None:
    assert make_plan({"privacy": {"sampling_rate": 0.25, "users_per_site": 60}}).privacy.normaliser == 15


def test_an_uncalibrated_plan_has_no_event() -> None:
    with pytest.raises(PlanError, match="no noise multiplier yet: calibrate it"):
        Plan().round_event()


def other(value: Any) -> list[Any]:
    """Values near a field's own, some of which its bounds allow."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1, 2 * value]
        case float():
            return [value / 2, value * 1.5, 0.5]
        case str():
            return [
                *FAMILIES,
                "gru",
                "lora",
                "median",
                "cpu",
                "interest",
                "float32",
                "bfloat16",
                "allow",
                f"{value}-x",
            ]
        case None:
            return [2, 0.5, 2.0]
        case tuple() | list():
            return [[*value, "dual"], ["recommend", "recommend"], ["click"]]
    raise AssertionError(f"no other value for {value!r}")


def all_fields() -> list[tuple[str, str]]:
    plan = Plan()
    return [
        (section, field)
        for section, part in plan
        if isinstance(part, BaseModel)
        for field in type(part).model_fields
    ]


@pytest.mark.parametrize(("section", "field"), all_fields())
def test_the_digest_changes_with_every_field(section: str, field: str) -> None:
    base = Plan()
    values = json.loads(base.model_dump_json())
    changed = []
    for value in other(getattr(getattr(base, section), field)):
        tried = {**values, section: {**values[section], field: value}}
        try:
            plan = make_plan(tried)
        except PlanError:
            continue
        if getattr(getattr(plan, section), field) != getattr(getattr(base, section), field):
            changed.append(plan.digest())
    if not changed and (section, field) in ONLY_TOGETHER:
        return
    assert changed, f"no other value of {section}.{field} was accepted: the test is empty"
    assert base.digest() not in changed


ONLY_TOGETHER = {
    ("model", "family"),
    ("statistics", "transition_share"),
    ("model", "adapter"),
    ("model", "members"),
    ("training", "head_rounds"),
}
"""Fields with no other value that is allowed alone."""


def test_the_digest_changes_with_the_name() -> None:
    assert Plan(name="other").digest() != Plan().digest()


def test_the_digest_changes_with_the_catalog_and_a_plan_keeps_to_one() -> None:
    one, other = Plan().for_catalog("a" * 64), Plan().for_catalog("b" * 64)
    assert len({Plan().digest(), one.digest(), other.digest()}) == 3
    assert make_plan(json.loads(one.to_json())) == one == one.for_catalog("a" * 64)
    for check in (one.for_catalog, one.check_catalog):
        with pytest.raises(PlanError, match=r"is for the catalog a+, but the one here is b+: .*same order"):
            check("b" * 64)
    with pytest.raises(PlanError, match="catalog"):
        make_plan({"catalog": "short"})


plans = st.builds(
    make_plan,
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,20}\Z"),
            "model": st.fixed_dictionaries(
                {
                    "width": st.integers(1, 256).map(lambda fours: 4 * fours),
                    "mode": st.sampled_from(["vectors", "lora"]),
                    "negatives": st.none() | st.integers(1, 1000),
                    "seed": st.integers(0, 2**31 - 1),
                    "encoder": st.text(min_size=1, max_size=20),
                }
            ),
            "privacy": st.fixed_dictionaries(
                {
                    "epsilon": st.floats(1e-3, 100),
                    "delta": st.floats(1e-12, 1e-4),
                    "sampling_rate": st.floats(1e-6, 1),
                    "noise_multiplier": st.none() | st.floats(0.1, 1e6),
                    "users_per_site": st.integers(1, 9_999),
                }
            ),
        }
    ),
)


@given(plan=plans)
@settings(max_examples=60, deadline=None)
def test_plans_come_back_from_json_as_they_were(plan: Plan) -> None:
    assert make_plan(json.loads(plan.to_json())) == plan
    assert make_plan(json.loads(plan.model_dump_json())).digest() == plan.digest()


SITES_OWN = [
    {"performance": {}},
    {"performance": 3},
    *(
        {"performance": {name: value}}
        for name, value in (("micro_batch", 64), ("threads", 1), ("device", "cpu"))
    ),
    *({"model": {"mode": "lora", "frozen_precision": each}} for each in ("float32", "bfloat16")),
]
"""What plans once said of how a site computes, harmless values among them."""


@pytest.mark.parametrize("values", SITES_OWN)
def test_a_plan_that_says_how_a_site_computes_is_refused_and_told_where_that_stands(
    values: dict[str, Any], tmp_path: Path
) -> None:
    place = "performance" if "performance" in values else r"model\.frozen_precision"
    says = rf"^{place}: how a site computes is no part of a plan: .*\[performance\] in its policy\.toml"
    with pytest.raises(PlanError, match=says):
        make_plan(values)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match=says):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("values", SITES_OWN)
def test_the_plan_that_a_run_recorded_earlier_is_read_without_it(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(values))
    found = read_recorded_plan(tmp_path / "plan.json")
    assert found == make_plan({"model": {"mode": found.model.mode}})
    (tmp_path / "plan.json").write_text(json.dumps(values | {"odd": 1}))
    with pytest.raises(PlanError, match="odd: a plan has no such key"):
        read_recorded_plan(tmp_path / "plan.json")


def test_a_plan_is_read_from_json_and_toml(tmp_path: Path) -> None:
    plan = make_plan({"name": "mine", "privacy": {"epsilon": 3}, "training": {"rounds": 2}})
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "plan.json") == plan
    (tmp_path / "plan.toml").write_text('name = "mine"\n[privacy]\nepsilon = 3\n[training]\nrounds = 2\n')
    assert read_plan(tmp_path / "plan.toml") == plan
    (tmp_path / "empty.toml").write_text("")
    assert read_plan(tmp_path / "empty.toml") == Plan()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("plan.toml", b"[privacy\nepsilon = 3", "cannot be parsed"),
        ("plan.toml", b"epsilon", "cannot be parsed"),
        ("plan.json", b"{", "cannot be parsed"),
        ("plan.json", b"[1, 2]", "must be a table"),
        ("plan.json", b"[" * 100_000, "cannot be parsed"),
        ("plan.json", b'{"privacy": {"epsilon": NaN}}', "privacy.epsilon"),
        ("plan.toml", b"\xff\xfe\x00", "no text"),
        ("plan.toml", b"[privacy]\nepsilon = -1", "privacy.epsilon: .*greater than 0"),
        ("plan.toml", b"[privacy]\nepsilon = nan", "privacy.epsilon: .*finite"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PlanError, match=said) as caught:
        read_plan(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"No such file.*give the path of a TOML or JSON file"):
        read_plan(tmp_path / "missing.toml")
    with pytest.raises(PlanError, match="cannot be read"):
        read_plan(tmp_path)
