"""Env files: what is read, what is passed over, what is refused and on which line."""

from __future__ import annotations

from pathlib import Path

import pytest

from governor.model.env_files import SCENARIO, environment_of, policy_of, read_env_file, scenario_path
from governor.model.errors import BadInput, BadSetting
from governor.model.policy import Policy

SECRET = "sk-do-not-repeat-me"


def written(folder: Path, text: str) -> str:
    path = folder / "today.env"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_values_quotes_comments_and_export(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "# today\n\nexport OPENAI_MAX_CONCURRENCY = 7\nOPENAI_STAGGER_SECONDS='2.5'  # seconds\n"
        'OPENAI_TPM_LIMIT="450000"\nOPENAI_TPM_LIMIT=90000\n',
    )
    policy = policy_of(path)
    assert (policy.max_concurrency, policy.stagger_seconds, policy.tpm_limit) == (7, 2.5, 90_000)
    # Everything else is the default, and only what stood there counts as named.
    assert policy.model_fields_set == {"max_concurrency", "stagger_seconds", "tpm_limit"}


def test_the_line_is_that_of_the_name_and_not_of_the_blanks_before(tmp_path: Path) -> None:
    stated = read_env_file(written(tmp_path, '\n\nA=1\n\n\n# c\nB="two\nlines"\nC=3\n'))
    assert {name: each.line for name, each in stated.items()} == {"A": 3, "B": 7, "C": 9}


def test_nothing_is_taken_from_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("N", "9")
    path = written(tmp_path, "N=8\nOPENAI_MAX_CONCURRENCY=${N}\n")
    assert read_env_file(path)["OPENAI_MAX_CONCURRENCY"].value == "${N}"
    with pytest.raises(BadInput, match=r"today\.env:2: OPENAI_MAX_CONCURRENCY"):
        policy_of(path)


def test_a_file_stands_in_place_of_the_environment_and_set_on_top(tmp_path: Path) -> None:
    path = written(tmp_path, "OPENAI_MAX_CONCURRENCY=7\n")
    environment = {"OPENAI_MAX_CONCURRENCY": "5", "OPENAI_STAGGER_SECONDS": "4"}
    assert policy_of(environment=environment) == Policy(max_concurrency=5, stagger_seconds=4.0)
    assert policy_of(path, environment=environment) == Policy(max_concurrency=7)
    assert policy_of(path, assignments=["OPENAI_MAX_CONCURRENCY=9"]) == Policy(max_concurrency=9)
    base = Policy.preset("paceline")
    assert policy_of(path, base=base) == base.with_(max_concurrency=7)


def test_of_several_files_the_later_wins_and_each_error_has_its_own_line(tmp_path: Path) -> None:
    below, above = tmp_path / "below.env", tmp_path / "above.env"
    below.write_text("OPENAI_MAX_CONCURRENCY=7\nOPENAI_STAGGER_SECONDS=4\nKEY=a\nOTHER=b\n")
    above.write_text("KEY=c\nOPENAI_STAGGER_SECONDS=2\nOPENAI_MAX_CONCURRENCY=\n")
    # Stated without a value is as good as not stated.
    assert policy_of([below, above]) == Policy(max_concurrency=7, stagger_seconds=2.0)
    assert policy_of([above, below]) == Policy(max_concurrency=7, stagger_seconds=4.0)
    found = environment_of([below, above], {"KEY": "x", "MINE": "y"})
    assert (found["KEY"], found["OTHER"], found["MINE"]) == ("c", "b", "y")
    above.write_text("\nOPENAI_STAGGER_SECONDS=soon\n")
    with pytest.raises(BadInput, match=r"above\.env:2: OPENAI_STAGGER_SECONDS"):
        policy_of([below, above])


def test_the_scenario_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    plan, none, absolute = tmp_path / "out" / "recommended.env", tmp_path / "none.env", tmp_path / "absolute.env"
    plan.write_text(f"{SCENARIO}=scenario.yaml\n")
    none.write_text(f"A=1\n{SCENARIO}=\n")
    absolute.write_text(f"{SCENARIO}='/plans/scenario.yaml'\n")
    assert scenario_path(plan, {}) == str(tmp_path / "out" / "scenario.yaml")
    assert scenario_path([plan, none], {SCENARIO: "here.yaml"}) == str(tmp_path / "out" / "scenario.yaml")
    assert scenario_path([plan, absolute], {}) == "/plans/scenario.yaml"
    assert scenario_path(none, {SCENARIO: "here.yaml"}) == "here.yaml"
    assert scenario_path(None, {}) == ""


def test_foreign_lines_are_passed_over_however_odd(tmp_path: Path) -> None:
    path = written(tmp_path, f"OPENAI_API_KEY={SECRET}\nthis is no line\nX='open\nOPENAI_MAX_CONCURRENCY=4\nBARE\n")
    assert policy_of(path).max_concurrency == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=1\nOPENAI_TPM_LIMIT 30000\n", "today.env:2: this line names a setting and is not NAME=VALUE"),
        ("A=1\n\nOPENAI_STAGER_SECONDS=1\n", "today.env:3: there is no setting 'OPENAI_STAGER_SECONDS'"),
        ("OPENAI_TPM_HEADROOM=1.5\n", "today.env:1: OPENAI_TPM_HEADROOM='1.5' is not allowed"),
        ("", "today.env: the file is empty"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        policy_of(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_secret_is_in_no_message(tmp_path: Path) -> None:
    # A near-miss whose value is a secret: the name is repeated, the value is not.
    path = written(tmp_path, f"OPENAI_TMP_LIMIT={SECRET}\n")
    with pytest.raises(BadInput) as caught:
        policy_of(path)
    assert "did you mean OPENAI_TPM_LIMIT" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no such file"):
        read_env_file(tmp_path / "none.env")
    with pytest.raises(BadInput, match="this is a folder"):
        read_env_file(tmp_path)
    (tmp_path / "latin.env").write_bytes(b"A=\xe9\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_env_file(tmp_path / "latin.env")


def test_no_settings_on_purpose() -> None:
    assert policy_of("/dev/null") == Policy()


def test_set_names_must_be_ours() -> None:
    with pytest.raises(BadSetting, match="did you mean OPENAI_MAX_CONCURRENCY"):
        policy_of(assignments=["OPENAI_MAX_CONCURENCY=3"])
