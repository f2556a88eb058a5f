"""Pools: which line goes where, where a key comes from, and that no key is ever repeated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from governor.model.errors import BadInput, BadSetting
from governor.model.policy import Policy
from governor.model.pools import (
    NO_KEY,
    Pool,
    checked_url,
    default_pools,
    groups_of,
    is_loopback,
    key_of,
    pool_for,
    read_pools,
)

EXAMPLE = """
pools:
  - name: main
    models: ["gpt-4o*"]
    key: MAIN_KEY
    limits: {tpm: 450000, rpm: 500}
    settings: {OPENAI_MAX_CONCURRENCY: 20, OPENAI_TPM_WINDOW: bucket, OPENAI_SETTLE: true, OPENAI_STAGGER_SECONDS: 0}
  - name: europe
    models: [gpt-4.1, o4-mini]
    azure: {endpoint: "https://example.openai.azure.com/", deployment: gpt-41, api_version: 2024-10-21}
  - name: rest
    models: "*"
    base_url: http://127.0.0.1:8000/v1/
    organization: org-1
    project: proj-1
"""


def pools(
    tmp_path: Path, text: str = EXAMPLE, base: Policy | None = None, words: tuple[str, ...] = ()
) -> tuple[Pool, ...]:
    path = tmp_path / "pools.yaml"
    path.write_text(text)
    return read_pools(path, base or Policy(), words)


def test_a_line_goes_to_the_first_pool_that_takes_its_model(tmp_path: Path) -> None:
    found = pools(tmp_path)
    where = {
        m: (pool_for(m, found) or Pool("none")).name for m in ("gpt-4o-mini", "gpt-4.1", "gpt-4.1-mini", "o4-mini", "")
    }
    assert where == {
        "gpt-4o-mini": "main",
        "gpt-4.1": "europe",
        "gpt-4.1-mini": "rest",
        "o4-mini": "europe",
        "": "rest",
    }
    assert pool_for("claude", found[:2]) is None


def test_settings_of_a_pool_stand_above_the_base_and_below_the_command_line(tmp_path: Path) -> None:
    base = Policy(max_concurrency=7, retry_max_attempts=9)
    main, europe, _ = pools(tmp_path, base=base, words=("OPENAI_TPM_LIMIT=1000",))
    assert (main.policy.max_concurrency, europe.policy.max_concurrency) == (20, 7)
    assert (main.policy.tpm_limit, europe.policy.tpm_limit) == (1000, 1000)
    assert (main.policy.rpm_limit, main.policy.settle, main.policy.stagger_seconds) == (500, True, 0.0)
    assert main.policy.retry_max_attempts == 9


def test_addresses_and_azure(tmp_path: Path) -> None:
    main, europe, rest = pools(tmp_path)
    assert (main.key, europe.key, rest.key) == ("MAIN_KEY", "AZURE_OPENAI_API_KEY", "OPENAI_API_KEY")
    assert europe.azure is not None
    assert (europe.azure.endpoint, europe.azure.api_version) == ("https://example.openai.azure.com", "2024-10-21")
    assert (rest.base_url, rest.organization, rest.project) == ("http://127.0.0.1:8000/v1", "org-1", "proj-1")


def test_a_key_comes_from_its_variable_and_goes_nowhere_else(tmp_path: Path) -> None:
    main, europe, rest = pools(tmp_path)
    environment = {"MAIN_KEY": " sk-secret ", "OPENAI_API_KEY": "sk-other"}
    assert key_of(main, environment) == "sk-secret"
    assert key_of(rest, environment) == "sk-other"
    with pytest.raises(BadSetting, match=r"AZURE_OPENAI_API_KEY is not set \(the key of pool 'europe'\)"):
        key_of(europe, environment)
    # On this machine a stand-in serves.
    assert key_of(rest, {}) == NO_KEY
    for pool in (main, europe, rest):
        assert "sk-" not in json.dumps(pool.to_json_dict()) + repr(pool)


def test_the_default_pool_reads_the_sdk_s_own_names() -> None:
    environment = {"OPENAI_BASE_URL": "https://proxy.example/v1/", "OPENAI_ORG_ID": "org-9", "OPENAI_PROJECT_ID": "p"}
    (pool,) = default_pools(Policy(), environment)
    assert (pool.name, pool.base_url, pool.organization, pool.project) == (
        "default",
        "https://proxy.example/v1",
        "org-9",
        "p",
    )
    assert pool.takes("anything")
    (pool,) = default_pools(Policy(), environment, "http://localhost:9/v1")
    assert pool.base_url == "http://localhost:9/v1"
    with pytest.raises(BadSetting, match=r"^OPENAI_API_KEY is not set: export it"):
        key_of(Pool(), {"OPENAI_API_KEY": "  "})


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://x", "localhost:80", "http://", "https://user:pass@host/v1", "https://user:pass@host:99999/v1"),
        *("http://127.0.0.1:99999/v1", "http://host:0/v1", "http://[::1/v1", "http://a b/v1", "http://host/v1\n"),
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(BadSetting) as caught:
        checked_url(url)
    assert "pass" not in str(caught.value).replace("password", "")


def test_what_is_on_this_machine() -> None:
    local = {"http://127.0.0.1:1", "http://[::1]:1/v1", "http://localhost/v1"}
    remote = {"https://api.openai.com/v1", "http://10.0.0.1", "http://localhost.example.com", ""}
    assert {url for url in local | remote if is_loopback(url)} == local


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pools: []\n", "it has no 'pools'"),
        ("pools: [7]\n", "pool 1 is a number"),
        ("pool: []\n", "there is no key 'pool'"),
        ("pools: [{models: [a]}]\n", "pool 1: name is missing"),
        ("pools: [{name: 'a b', models: [a]}]\n", "pool 1: name is 'a b'"),
        ("pools: [{name: a}]\n", "pool a: models must be a list"),
        ("pools: [{name: a, models: []}]\n", "pool a: models must be a list"),
        ("pools: [{name: a, models: [x], keys: K}]\n", "pool a: there is no key 'keys'"),
        ("pools: [{name: a, models: [x]}, {name: a, models: [y]}]\n", "two pools are named 'a'"),
        ("pools: [{name: a, models: [x], limits: {tpm: 0}}]\n", "pool a: OPENAI_TPM_LIMIT='0' is not allowed"),
        ("pools: [{name: a, models: [x], limits: {itpm: 0}}]\n", "pool a: limit 'ITPM' is 0: write a number above 0"),
        ("pools: [{name: a, models: [x], settings: {OPENAI_TPM_LIMT: 1}}]\n", "did you mean OPENAI_TPM_LIMIT?"),
        ("pools: [{name: a, models: [x], settings: {OPENAI_TPM_LIMIT: [1]}}]\n", "OPENAI_TPM_LIMIT is a list"),
        ("pools: [{name: a, models: [x], settings: [1]}]\n", "pool a: settings is a list"),
        ("pools: [{name: a, models: [x], base_url: nowhere}]\n", "pool a: base URL 'nowhere' is not an address"),
        ("pools: [{name: a, models: [x], azure: {endpoint: 'https://x'}}]\n", "azure: api_version is missing"),
        ("pools: [{name: a, models: [x], azure: here}]\n", "pool a: azure is text"),
        (
            "pools: [{name: a, models: [x], base_url: 'https://y', azure: {endpoint: 'https://x', api_version: v}}]\n",
            "both base_url and azure",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_pool_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        pools(tmp_path, text)
    assert complaint in str(caught.value)
    assert "pools.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_in_the_place_of_its_name_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="must be the name of the variable") as caught:
        pools(tmp_path, "pools: [{name: a, models: [x], key: sk-verysecret}]\n")
    assert "verysecret" not in str(caught.value)


def test_pools_of_one_group_share_their_models_and_a_group_has_two(tmp_path: Path) -> None:
    def read(*groups: str, models: str = "gpt-4o*") -> tuple[Pool, ...]:
        entries = [f"  - {{name: p{i}, models: ['gpt-4o*'], group: {group}}}" for i, group in enumerate(groups)]
        entries.append(f"  - {{name: last, models: ['{models}'], group: {groups[0]}}}")
        (tmp_path / "pools.yaml").write_text("pools:\n" + "\n".join(entries) + "\n")
        return read_pools(tmp_path / "pools.yaml", Policy())

    assert [[pool.name for pool in each] for each in groups_of(read("a", "b", "b"))] == [["p0", "last"], ["p1", "p2"]]
    assert [len(each) for each in groups_of((Pool("x"), Pool("y")))] == [1, 1]
    with pytest.raises(BadInput, match="pool p1: no other pool has group 'b'"):
        read("a", "b")
    with pytest.raises(BadInput, match="pool last: its models are not those of pool p0, with which it shares group"):
        read("a", models="*")
