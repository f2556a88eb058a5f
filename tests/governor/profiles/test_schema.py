"""A profile file: read, merged and chosen; a wrong one is one line with file, field, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from governor.model.errors import BadInput, BadSetting
from governor.profiles.loader import all_profiles, names, profile_for, read_profile

OWN = "extends: openai\nname: mine\ntitle: Mine\nchecked: 2026-11-01\n"


def test_every_shipped_file_is_sound_and_called_by_its_name() -> None:
    assert [profile.name for profile in all_profiles()] == sorted(names(), key=lambda name: (name == "generic", name))
    tiers = [
        f"{model}-{tier}"
        for profile in all_profiles()
        for entry in profile.tiers
        for model in entry.models
        for tier in entry.limits
    ]
    assert len(tiers) == len(set(tiers)), "two profiles have a tier of one name"


def test_a_file_of_ones_own_states_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN + "dimensions: {TPM: {limit: 12000}, RPD: null, TPD: null}\n")
    mine, openai = read_profile(str(path)), read_profile("openai")
    assert list(mine.dimensions) == ["TPM", "RPM"]
    assert mine.dimensions["TPM"] == openai.dimensions["TPM"].model_copy(update={"limit": 12_000.0})
    assert mine.base_urls == openai.base_urls


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dimensions: {TPM: {window: rolling}}", "dimensions.TPM.window='rolling': must be 'fixed', 'clock'"),
        ("dimensions: {TPM: {weights: {inputs: 1}}}", "dimensions.TPM.weights.inputs='inputs': must be 'requests'"),
        ("dimensions: {TPM: {weights: {output: 0, input: 0, cached_input: 0, cache_write: 0}}}", "are all 0"),
        ("dimensions: {TPM: {length: 3}}", "dimensions.TPM.length is not known: did you mean length_s?"),
        ("dimensions: {TPM: {window: clock, time_zone: Mars}}", "time_zone: 'Mars' is not a time zone"),
        ("dimensions: {TPM: {time_zone: UTC}}", "time_zone UTC needs window: clock"),
        ("dimensions: {TPM: {headers: {limit: a b}}}", "dimensions.TPM.headers.limit: 'a b' is not the name of"),
        ("dimensions: {tpm: {unit: usd, weights: {cost: 1}}}", "dimensions.tpm: name it by capitals"),
        ("errors: {codes: {throttle: [a]}}", "errors.codes.throttle='throttle'"),
        ("errors: {messages: [{pattern: '(', outcome: quota}]}", "'(' is not a regular expression"),
        ("prices: {a: {input: 1}}", "prices: a: output is missing: US dollars per million tokens"),
        (
            "tiers: [{models: [a], source: me, since: 2026-11-01, limits: {free: {ITPM: 3}}}]",
            "tiers.0.limits.free.ITPM: there is no such dimension; this profile has TPM",
        ),
        ("retry_after: [{}]", "retry_after.0: it must be one of header: NAME"),
        ("charge: {refusals_count: 3}", "charge.refusals_count: 3 must be true, false, tokens or requests"),
        ("charge: {rule: half}", "charge.rule: 'half' must be one of fixed"),
        ("base_url: notaurl", "base_url: URL 'notaurl' is not an address: write https://HOST/v1"),
        ("key: sk-secret", "key: it must be the name of the variable"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN + text + "\n")
    with pytest.raises(BadInput) as wrong:
        read_profile(str(path))
    message = str(wrong.value)
    assert message.startswith(f"{path}: ")
    assert complaint in message
    assert "\n" not in message
    assert "secret" not in message


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(BadSetting, match="there is no profile 'antropic': did you mean anthropic"):
        read_profile("antropic")


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("", "openai"),
        ("https://api.openai.com/v1", "openai"),
        ("https://API.anthropic.com", "anthropic"),
        ("http://127.0.0.1:8000/v1", "generic"),
        ("https://llm.example.com/v1", "generic"),
    ],
)
def test_the_base_url_chooses(url: str, name: str) -> None:
    assert profile_for("", url).name == name
    assert profile_for("anthropic", url).name == "anthropic"
