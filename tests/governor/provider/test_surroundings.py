"""What an environment's proxy and certificate variables can do to a client: one line with the variable's name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from governor.model.errors import BadSetting
from governor.model.pools import Pool
from governor.provider.openai_adapter import CERTIFICATES, PROXIES, Adapter, check_surroundings
from sim.app.cli import main

PASSWORD = "my-proxy-password"
LOOPBACK = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *CERTIFICATES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (f"nonsense://u:{PASSWORD}@h", "a proxy of an unknown kind ('nonsense')"),
        (f"http://u:{PASSWORD}@:badport", "is not an address of a proxy"),
        (f"http://u:{PASSWORD}@h:99999", "is not an address of a proxy"),
        ("127.0.0.1:99999", "is not an address of a proxy"),
        ("http://", "is not an address of a proxy"),
        ("http://[::1", "is not an address of a proxy"),
    ],
)
def test_a_proxy_that_is_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSetting) as refused:
        Adapter(Pool(base_url=LOOPBACK))
    text = str(refused.value)
    assert text.startswith(f"{name} ")
    assert words in text
    assert text.endswith(f"unset {name}")
    assert PASSWORD not in text
    assert "\n" not in text


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_a_socks_proxy_says_which_package_it_needs(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("governor.provider.openai_adapter.find_spec", lambda name: None)
    with pytest.raises(BadSetting, match=r"ALL_PROXY names a SOCKS proxy, .*: pip install socksio, or unset ALL_PROXY"):
        check_surroundings({"ALL_PROXY": f"{scheme}://u:{PASSWORD}@127.0.0.1:1080"})
    monkeypatch.setattr("governor.provider.openai_adapter.find_spec", lambda name: object())
    check_surroundings({"ALL_PROXY": f"{scheme}://127.0.0.1:1080"})


def test_what_can_be_used_is_no_error(tmp_path: Path, root: Path) -> None:
    check_surroundings(
        {
            "HTTP_PROXY": f"http://u:{PASSWORD}@proxy.example:3128",
            "https_proxy": "proxy.example:3128",
            "ALL_PROXY": "",
            "SSL_CERT_FILE": str(root / "tests" / "tls" / "certificate.pem"),
            "SSL_CERT_DIR": str(tmp_path),
        }
    )


def test_certificates_that_are_not_there_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone.pem"
    for name, what in zip(CERTIFICATES, ("file", "folder"), strict=True):
        with pytest.raises(BadSetting, match=f"{name}: there is no {what} '.*gone.pem': correct the path, or unset"):
            check_surroundings({name: str(gone)})
    text = tmp_path / "text.pem"
    text.write_text("no certificate\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(text))
    with pytest.raises(BadSetting, match=r"SSL_CERT_FILE cannot be used: it holds no certificate .*: correct or unset"):
        Adapter(Pool(base_url=LOOPBACK))


@pytest.mark.parametrize("command", ["run", "doctor", "probe"])
@pytest.mark.parametrize("variable", ["ALL_PROXY=gopher://127.0.0.1:1", "SSL_CERT_FILE=/there/is/none.pem"])
def test_every_command_that_calls_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, root: Path, capsys, command: str, variable: str
) -> None:
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    batch = tmp_path / "batch.jsonl"
    batch.write_text("".join((root / "examples" / "batch.jsonl").read_text().splitlines(keepends=True)[:2]))
    words = {
        "run": ["run", str(batch), "--out", str(tmp_path / "out.jsonl"), "--quiet"],
        "doctor": ["doctor"],
        "probe": ["probe", "--max-cost", "0.1"],
    }[command]
    try:
        code = main([*words, "--base-url", LOOPBACK])
    except SystemExit as ended:
        code = ended.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(name)
    assert not list(tmp_path.glob("*.db"))
