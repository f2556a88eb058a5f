"""`paceline shadow` over a journal as a client without any pacing would have left it."""

from __future__ import annotations

import heapq
import json
from pathlib import Path

import pytest

from governor.model.errors import BadSetting
from sim.app.cli import main
from sim.app.options import ShadowOptions
from sim.app.shadow_command import RECOMMENDED, TODAY, shadowed
from sim.model.provider_config import ProviderConfig
from sim.serving.replies import Desk

CALLS, AT_ONCE = 80, 40
LATENCY = {"first_token_s": 0.5, "per_token_s": 0.01, "sigma": 0.1, "stall_ratio": 0.0}


def recorded(path: Path) -> tuple[int, int]:
    """80 calls of about 1,260 tokens in two minutes at 30,000 per minute, forty of them at once; how many 429s, lost.

    Each is tried three times, half a second and a second later: what the SDK does of itself.
    """
    desk = Desk(ProviderConfig(tpm=30_000, latency=LATENCY))
    due = [(0.0 if i < AT_ONCE else 3.0 * (i - AT_ONCE), i, 1) for i in range(CALLS)]
    heapq.heapify(due)
    refused = lost = 0
    with path.open("w") as file:
        while due:
            at, i, attempt = heapq.heappop(due)
            body = {
                "model": "gpt-4o",
                "messages": [{"role": "user", "content": f"{i:04d} " + "word " * 1_000}],
                "metadata": {"paceline_output_tokens": "150"},
            }
            reply = desk.decided(0, {}, json.dumps(body).encode(), at)
            desk.came(0, {}, at)
            desk.ended(reply, False, at)
            counts = {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in reply.counts}
            is_ok = reply.outcome == "ok"
            row = {
                "custom_id": f"c-{i}",
                "model": "gpt-4o",
                "prompt_tokens": 1_258,
                "chars": 5_005,
                "role_chars": 4,
                "messages": 1,
                "arrival": 1.7e9 + (0.0 if i < AT_ONCE else 3.0 * (i - AT_ONCE)),
                "launched": 1.7e9 + at,
                "latency": reply.service_s + 0.02,
                "outcome": reply.outcome,
                "status_code": reply.status,
                "limit_tokens": float(counts["limit-tokens"]),
                "remaining_tokens": float(counts["remaining-tokens"]),
                **({"output_tokens": 150} if is_ok else {}),
            }
            file.write(json.dumps(row) + "\n")
            refused += not is_ok
            if not is_ok and attempt < 3:
                heapq.heappush(due, (at + 0.5 * attempt, i, attempt + 1))
            lost += not is_ok and attempt == 3
    return refused, lost


def test_what_governing_would_have_avoided(tmp_path: Path) -> None:
    path = tmp_path / "shadow.jsonl"
    refused, lost = recorded(path)
    assert refused > 10
    assert lost > 3
    settings = tmp_path / "better.env"
    settings.write_text(
        "OPENAI_STAGGER_SECONDS=0\nOPENAI_MAX_CONCURRENCY=20\nOPENAI_CHARGE_RULE=auto\nOPENAI_TPM_WINDOW=bucket\n"
    )
    said: list[str] = []
    options = ShadowOptions(recommended=str(settings), replications=3)
    found, text = shadowed(str(path), options, {}, 100, said.append)
    assert len(said) == 1, "nothing is planned"
    for name in (TODAY, RECOMMENDED):
        assert found[name]["throttled"]["was"] == refused
        assert found[name]["throttled"]["would"] < 0.1 * refused
        assert found[name]["lost"]["was"] == lost
        assert found[name]["lost"]["would"] == 0.0
    # The defaults grant three calls per minute; a mirrored bucket makes a call wait for what the limit lacks.
    assert found[RECOMMENDED]["later_mean_s"] < 0.2 * found[TODAY]["later_mean_s"]
    assert found["settings"]["OPENAI_TPM_WINDOW"] == "bucket"
    assert f"{lost} of {lost} lost calls would have been answered" in " ".join(text.split())


def test_calls_of_less_than_a_minute_tell_nothing_of_others(tmp_path: Path) -> None:
    path = tmp_path / "shadow.jsonl"
    recorded(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["launched"] < 1.7e9 + 30.0))
    settings = tmp_path / "same.env"
    settings.write_text("# as today\n")
    found, _ = shadowed(str(path), ShadowOptions(recommended=str(settings), replications=1), {}, 100, lambda what: None)
    assert found["notes"] == ["what others use of the quota: the calls span less than a minute"]
    assert found[TODAY] == found[RECOMMENDED]


def test_a_plan_and_its_place_are_one_wish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadSetting, match="use one of them"):
        shadowed("x", ShadowOptions(out=str(tmp_path / "a.env"), recommended="b.env"), {}, 100, print)
    assert main(["shadow", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
