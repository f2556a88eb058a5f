"""Logs and traces in the form in which other tools export them: each read rightly, or refused in one line.

The rows are our own; names and nesting are those of each tool's documentation. All forms tell the same three calls:
500 tokens in and 100 out in 2.0 s, 700 and 50 in 1.5 s one second later, and a refusal with 429 at 4 s, so that one
expectation holds for all of them.
"""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from governor.model.errors import BadInput
from sim.calibration.calibrate import read_sources
from sim.calibration.observed import Observed
from sim.scenario.columns import KNOWN, OUR_COLUMNS, REFUSED, guessed, unit_named
from sim.scenario.readers import Source, read_workload

BEGAN = datetime(2026, 3, 12, 14, 5, 7, tzinfo=UTC)
# (begins after, took, prompt, output); the last one was refused.
CALLS = [(0.0, 2.0, 500, 100), (1.0, 1.5, 700, 50), (4.0, 0.1, 0, 0)]
Call = tuple[datetime, datetime, int, int, bool]


def calls() -> list[tuple[int, Call]]:
    """Number, beginning, end, tokens, and whether it was answered."""
    found = []
    for i, (after_s, took_s, prompt, output) in enumerate(CALLS):
        begun = BEGAN + timedelta(seconds=after_s)
        found.append((i, (begun, begun + timedelta(seconds=took_s), prompt, output, output > 0)))
    return found


def iso(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def ns(at: datetime) -> int:
    return round(at.timestamp() * 1_000) * 1_000_000


def rows(make: Callable[[int, Call], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(i, call) for i, call in calls()]


def as_csv(table: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(table[0]))
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()} for row in table
    )
    return out.getvalue()


def as_lines(table: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in table)


# ---------------------------------------------------------------- the forms


def langfuse_api(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "id": f"o{i}",
        "traceId": "t",
        "type": "GENERATION",
        "startTime": iso(begun),
        "endTime": iso(ended),
        "model": "gpt-4o-mini",
        "modelParameters": {"max_tokens": 256},
        "input": {"messages": [{"role": "user", "content": "x"}], "status": "not ours"},
        "usageDetails": {"input": prompt, "output": output, "total": prompt + output} if ok else {},
        "level": "DEFAULT" if ok else "ERROR",
        "statusMessage": None if ok else "Error code: 429 - Rate limit reached",
        "latency": (ended - begun).total_seconds(),
    }


def langfuse_blob(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "id": f"o{i}",
        "trace_id": "t",
        "type": "GENERATION",
        "start_time": f"{begun:%Y-%m-%d %H:%M:%S}.000000",
        "end_time": f"{ended:%Y-%m-%d %H:%M:%S.%f}",
        "provided_model_name": "gpt-4o-mini",
        "model_parameters": json.dumps({"max_tokens": 256}),
        "usage_details": {"input": prompt, "output": output} if ok else {},
        "level": "DEFAULT" if ok else "ERROR",
        "status_message": "" if ok else "RateLimitError",
    }


def helicone(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "request_id": f"r{i}",
        "request_created_at": f"{begun:%Y-%m-%d %H:%M:%S} UTC",
        "response_created_at": f"{ended:%Y-%m-%d %H:%M:%S.%f} UTC",
        "request_model": "gpt-4o-mini",
        "request_body": {"max_tokens": 256},
        "response_status": 200 if ok else 429,
        "delay_ms": 1_000 * (ended - begun).total_seconds(),
        "time_to_first_token": 400 if ok else None,
        "prompt_tokens": prompt if ok else None,
        "completion_tokens": output if ok else None,
        "total_tokens": prompt + output,
    }


def portkey(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "id": f"p{i}",
        "trace_id": f"t{i}",
        "created_at": iso(begun),
        "ai_model": "gpt-4o-mini",
        "req_units": prompt,
        "res_units": output,
        "total_units": prompt + output,
        "response_time": round(1_000 * (ended - begun).total_seconds()),
        "response_status_code": 200 if ok else 429,
        "is_success": ok,
        "metadata": {"id": "a user", "kind": "tool"},
    }


def langsmith(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "id": f"l{i}",
        "run_type": "llm",
        "name": "ChatOpenAI",
        "start_time": f"{begun:%Y-%m-%dT%H:%M:%S.%f}",
        "end_time": f"{ended:%Y-%m-%dT%H:%M:%S.%f}",
        "inputs": {"messages": [{"role": "user"}], "model": "a word of the user"},
        "outputs": {"llm_output": {"token_usage": {"prompt_tokens": prompt, "completion_tokens": output}}}
        if ok
        else None,
        "extra": {"invocation_params": {"model": "gpt-4o-mini", "max_tokens": 256}},
        "status": "success" if ok else "error",
        "error": None if ok else "RateLimitError(\"Error code: 429 - {'error': {'code': 'rate_limit_exceeded'}}\")",
    }


def langsmith_around(_: int, call: Call) -> dict[str, Any]:
    """The chain around a call, which sums up its usage."""
    begun, ended, prompt, output, _ = call
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    times = {"start_time": f"{begun:%Y-%m-%dT%H:%M:%S.%f}", "end_time": f"{ended:%Y-%m-%dT%H:%M:%S.%f}"}
    return {"id": f"chain-{begun}", "run_type": "chain", **times, **usage, "status": "success", "error": None}


def litellm_payload(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "id": f"c{i}",
        "call_type": "acompletion",
        "status": "success" if ok else "failure",
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "startTime": begun.timestamp(),
        "endTime": ended.timestamp(),
        "completionStartTime": begun.timestamp() + 0.4,
        "response_time": 0.4,
        "model": "gpt-4o-mini",
        "cache_hit": False,
        "error_information": None if ok else {"error_code": "429", "error_class": "RateLimitError"},
        "model_parameters": {"max_tokens": 256},
        "hidden_params": {"additional_headers": {"llm_provider-x-ratelimit-remaining-tokens": "29000"}},
    }


def openrouter(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "generation_id": f"gen-{i}",
        "created_at": f"{begun:%Y-%m-%d %H:%M:%S}",
        "model_permaslug": "openai/gpt-4o-mini",
        "tokens_prompt": prompt,
        "tokens_completion": output,
        "generation_time_ms": round(1_000 * (ended - begun).total_seconds()),
        "time_to_first_token_ms": 400,
        "status_code": 200 if ok else 429,
    }


def otlp(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    values: dict[str, Any] = {
        "gen_ai.operation.name": {"stringValue": "chat"},
        "gen_ai.request.model": {"stringValue": "gpt-4o-mini"},
        "gen_ai.request.max_tokens": {"intValue": "256"},
    }
    if ok:
        values["gen_ai.usage.input_tokens"] = {"intValue": str(prompt)}
        values["gen_ai.usage.output_tokens"] = {"intValue": str(output)}
        values["gen_ai.usage.cache_read.input_tokens"] = {"intValue": "100"}
    else:
        values["error.type"] = {"stringValue": "RateLimitError"}
    return {
        "traceId": "t",
        "spanId": f"s{i}",
        "kind": 3,
        "startTimeUnixNano": str(ns(begun)),
        "endTimeUnixNano": str(ns(ended)),
        "attributes": [{"key": key, "value": value} for key, value in values.items()],
        "status": {} if ok else {"code": 2, "message": "too many"},
    }


def phoenix(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "context.span_id": f"s{i}",
        "context.trace_id": "t",
        "name": "ChatCompletion",
        "span_kind": "LLM",
        "start_time": str(begun),
        "end_time": str(ended),
        "status_code": "OK" if ok else "ERROR",
        "status_message": "" if ok else "RateLimitError: Error code: 429",
        "attributes.llm.model_name": "gpt-4o-mini",
        "attributes.llm.invocation_parameters": json.dumps({"max_tokens": 256}),
        "attributes.llm.token_count.prompt": prompt if ok else None,
        "attributes.llm.token_count.completion": output if ok else None,
    }


def datadog(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "id": f"e{i}",
        "type": "span",
        "attributes": {
            "span_id": f"s{i}",
            "trace_id": "t",
            "span_kind": "llm",
            "model_name": "gpt-4o-mini",
            "start_ns": ns(begun),
            "duration": ns(ended) - ns(begun),
            "status": "ok" if ok else "error",
            "metrics": {"input_tokens": prompt, "output_tokens": output, "total_tokens": prompt + output},
            "metadata": {"max_tokens": 256},
            "meta": {} if ok else {"error.type": "RateLimitError"},
        },
    }


def bigquery(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    return {
        "timestamp": f"{begun:%Y-%m-%d %H:%M:%S.%f} UTC",
        "request_id": f"b{i}",
        "model": "gpt-4o-mini",
        "input_tokens": prompt,
        "output_tokens": output,
        "latency_seconds": (ended - begun).total_seconds(),
        "http_status": 200 if ok else 429,
    }


def cloud_logging(i: int, call: Call) -> dict[str, Any]:
    begun, ended, prompt, output, ok = call
    payload = {"usage": {"prompt_tokens": prompt, "completion_tokens": output}, "model": "gpt-4o-mini"}
    payload |= {"duration_ms": 1_000 * (ended - begun).total_seconds(), "status_code": 200 if ok else 429}
    return {"insertId": f"i{i}", "timestamp": iso(begun), "jsonPayload": payload}


def frame_with_objects(i: int, call: Call) -> dict[str, Any]:
    """As pandas writes a column of dictionaries: in Python's spelling."""
    begun, ended, prompt, output, ok = call
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": {"cached_tokens": 0}}
    return {
        "Request ID": f"f{i}",
        "Start Time": begun.timestamp(),
        "Latency (ms)": 1_000 * (ended - begun).total_seconds(),
        "Model": "gpt-4o-mini",
        "usage": str(usage if ok else None),
        "Status Code": 200 if ok else 429,
    }


def document(make: Callable[[int, Call], dict[str, Any]], *keys: str) -> str:
    """The rows in an indented document, under these keys, one inside the other."""
    found: Any = rows(make)
    for key in reversed(keys):
        found = {key: found} if isinstance(found, list) else {key: [found]}
    return json.dumps(found, indent=2)


FORMS: dict[str, Callable[[], str]] = {
    "Langfuse API": lambda: document(langfuse_api, "data"),
    "Langfuse JSON lines": lambda: as_lines(rows(langfuse_api)),
    "Langfuse CSV": lambda: as_csv(rows(langfuse_api)),
    "Langfuse blob storage": lambda: as_lines(rows(langfuse_blob)),
    "Langfuse blob storage CSV": lambda: as_csv(rows(langfuse_blob)),
    "Helicone JSON lines": lambda: as_lines(rows(helicone)),
    "Helicone CSV": lambda: as_csv(rows(helicone)),
    "Portkey JSON lines": lambda: as_lines(rows(portkey)),
    "LangSmith runs": lambda: json.dumps(rows(langsmith) + rows(langsmith_around)),
    "LiteLLM payloads": lambda: as_lines(rows(litellm_payload)),
    "LiteLLM payloads CSV": lambda: as_csv(rows(litellm_payload)),
    "OpenRouter CSV": lambda: as_csv(rows(openrouter)),
    "OTLP document": lambda: document(otlp, "resourceSpans", "scopeSpans", "spans"),
    "OTLP lines": lambda: as_lines([json.loads(document(otlp, "resourceSpans", "scopeSpans", "spans"))]),
    "Phoenix CSV": lambda: as_csv(rows(phoenix)),
    "Phoenix JSON lines": lambda: as_lines(rows(phoenix)),
    "Datadog spans": lambda: document(datadog, "data"),
    "BigQuery CSV": lambda: as_csv(rows(bigquery)),
    "Cloud Logging": lambda: json.dumps(rows(cloud_logging)),
    "pandas with objects": lambda: as_csv(rows(frame_with_objects)),
}
NO_CAP = ("Portkey", "OpenRouter", "BigQuery", "Cloud", "pandas", "Helicone CSV", "Helicone JSON")


def observed(path: Path, text: str) -> Observed:
    path.write_text(text)
    return read_sources([str(path)], {})


@pytest.mark.parametrize("form", FORMS)
def test_each_form_tells_the_same_calls(form: str, tmp_path: Path) -> None:
    found = observed(tmp_path / "export", FORMS[form]())
    assert len(found) == 3
    assert found.answered.tolist() == [True, True, False]
    assert found.kind[2] == REFUSED
    assert found.tries.prompt_tokens[:2].tolist() == [500, 700]
    assert found.tries.output_tokens[:2].tolist() == [100, 50]
    assert found.launched_s.tolist() == pytest.approx([0.0, 1.0, 4.0], abs=1e-3)
    assert found.took_s.tolist() == pytest.approx([2.0, 1.5, 0.1], abs=1e-3)
    assert (found.tries.model(0) or "").endswith("gpt-4o-mini")
    if not form.startswith(NO_CAP):
        assert found.tries.max_tokens[0] == 256


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_a_trace_for_simulate(form: str, tmp_path: Path) -> None:
    (tmp_path / "export").write_text(FORMS[form]())
    workload = read_workload(Source.open(tmp_path / "export"))
    assert workload.prompt_tokens.tolist() == [500, 700]
    assert workload.output_tokens.tolist() == [100, 50]
    assert workload.arrival_s.tolist() == pytest.approx([0.0, 1.0], abs=1e-3)
    assert workload.recorded_s.tolist() == pytest.approx([2.0, 1.5], abs=1e-3)
    assert "1 rows of requests that failed are left out" in workload.provenance["requests"][1]


def test_what_is_left_out_and_what_was_cached_is_said(tmp_path: Path) -> None:
    found = observed(tmp_path / "runs.json", FORMS["LangSmith runs"]())
    assert found.notes[0] == "runs.json: 3 spans are not of a model call and are left out"
    found = observed(tmp_path / "otlp.json", FORMS["OTLP document"]())
    assert found.notes == ("otlp.json: 17% of the prompt tokens were read from the provider's cache",)
    hits = [{**row, "cache_hit": "True"} for row in rows(litellm_payload)[:1]]
    found = observed(tmp_path / "spend.csv", as_csv(hits + rows(litellm_payload)))
    assert found.notes == ("spend.csv: 1 calls were answered from a cache and are left out",)
    assert found.first_s.tolist() == pytest.approx([0.4, 0.4, -1.0], abs=1e-3)


def test_phoenix_parquet_has_dates_of_its_own(tmp_path: Path) -> None:
    frame = pd.DataFrame(rows(phoenix))
    for name in ("start_time", "end_time"):
        frame[name] = pd.to_datetime(frame[name], format="ISO8601")
    frame.to_parquet(tmp_path / "spans.parquet")
    found = read_sources([str(tmp_path / "spans.parquet")], {})
    assert found.kind.tolist() == [0, 0, REFUSED]
    assert found.launched_s.tolist() == pytest.approx([0.0, 1.0, 4.0])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # OpenAI's usage export: sums of a day or an hour.
        (
            "start_time,end_time,num_model_requests,model,input_tokens,output_tokens\n1773273600,1773360000,812,gpt-4o,9,8\n",
            [":2:", "'num_model_requests'", "'812' requests in one row", "one row per request"],
        ),
        # OpenRouter's API states milliseconds under a name without a unit.
        (
            as_lines(
                [
                    {"created_at": iso(c[0]), "tokens_prompt": 5, "tokens_completion": 5, "latency": 1250}
                    for _, c in calls()
                ]
            ),
            [":1:", "'latency'", "not in seconds?", "--columns latency=latency:ms"],
        ),
        # A trace without a single call of a model.
        (
            json.dumps([{"spanId": "a", "name": "GET /", "startTimeUnixNano": "1", "endTimeUnixNano": "2"}]),
            ["no span of a model call"],
        ),
        # A table with a total only.
        (
            "timestamp,model,total_tokens\n2026-03-12 14:05:07,gpt-4o,600\n",
            ["no column of prompt and output", "--columns"],
        ),
        # Dates of a spreadsheet.
        ("timestamp,prompt_tokens,completion_tokens\n3/12/2026 14:05,5,5\n", [":2:", "'timestamp'", "nor a date"]),
        # Tokens with a separator of thousands.
        ('prompt_tokens,completion_tokens\n"1,200",5\n', [":2:", "'prompt_tokens'", "'1,200'", "whole number"]),
    ],
)
def test_forms_that_cannot_be_read_are_refused_in_one_line(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        observed(tmp_path / "export", text)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# ---------------------------------------------------------------- the user's word, and the table itself


def test_the_users_columns_win_over_every_guess(tmp_path: Path) -> None:
    table = [{**row, "billed_in": 7, "billed_out": 3} for row in rows(langfuse_api)]
    for name, text in (
        ("log.jsonl", as_lines(table)),
        ("log.csv", as_csv(table)),
        ("log.json", json.dumps({"data": table})),
    ):
        (tmp_path / name).write_text(text)
        chosen = {"prompt": "billed_in", "output": "billed_out", "launched": "endTime"}
        found = read_sources([str(tmp_path / name)], chosen)
        assert found.tries.prompt_tokens.tolist() == [7, 7, 7], name
        assert found.launched_s.tolist() == pytest.approx([0.0, 0.5, 2.1], abs=1e-3), name
    found = read_sources([str(tmp_path / "log.json")], {"prompt": "usageDetails.total"})
    assert found.tries.prompt_tokens[:2].tolist() == [600, 750]
    with pytest.raises(BadInput, match="there is no column 'tokens' for prompt: found 'id'"):
        read_sources([str(tmp_path / "log.jsonl")], {"prompt": "tokens"})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "2026-03-12 14:05:07 UTC",
            "2026-03-12 14:05:07.250000 UTC",
            "2026-03-12T14:05:07Z",
            "2026-03-12 14:05:07 GMT",
        ),
        *("2026-03-12 14:05:07 +0000 UTC", "2026-03-12 15:05:07+01:00", "2026-03-12T14:05:07.123456789Z"),
        *("2026-03-12 16:05:07 +0200", "20260312T140507Z"),
    ],
)
def test_a_stated_time_zone_is_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"timestamp,prompt_tokens,completion_tokens\n{text},5,6\n2026-03-12 14:06:07 UTC,5,6\n")
    arrival_s = read_workload(Source.open(path)).arrival_s
    assert arrival_s[1] == pytest.approx(60.0, abs=0.3)
    assert read_sources([str(path)], {}).launched_s[1] == pytest.approx(60.0, abs=0.3)


def test_no_name_has_two_roles() -> None:
    """Names are compared without case and separators, so that two spellings of one name may not play two roles."""
    for role, names in KNOWN.items():
        for name in names:
            found = guessed(name)
            assert found is not None, name
            assert found[0] == role, name
    for role, name in OUR_COLUMNS.items():
        assert (guessed(name) or ("",))[0] == role


@pytest.mark.parametrize(
    ("name", "role", "unit"),
    [
        ("promptTokens", "prompt", ""),
        ("Prompt Tokens", "prompt", ""),
        ("usage.prompt_tokens", "prompt", ""),
        ("response.body.usage.input_tokens", "prompt", ""),
        ("cumulative_token_count.prompt", None, ""),
        ("max_prompt_tokens", None, ""),
        ("inputs.status", None, ""),
        ("metadata.id", None, ""),
        ("latencyMs", "latency", "ms"),
        ("duration_ns", "latency", "ns"),
        ("Latency (ms)", "latency", "ms"),
        ("items", None, ""),
        ("startTimeUnixNano", "launched", "ns"),
        ("hidden_params.additional_headers.x_ratelimit_limit_requests", "limit_requests", ""),
        ("usage.prompt_tokens_details.cached_tokens", "cached", ""),
    ],
)
def test_names_are_known_by_their_words(name: str, role: str | None, unit: str) -> None:
    found = guessed(name)
    assert (found[0] if found else None) == role
    assert unit_named(name) == unit


def test_lines_and_lists_of_many_blocks_agree(tmp_path: Path, seed: int) -> None:
    """More rows than a block holds, a role that turns up late, and a document longer than what is read at once."""
    rng = np.random.default_rng(seed)
    table = [
        {
            "prompt_tokens": int(p),
            "completion_tokens": int(o),
            "note": "é" * 400,
            **({"latency": 0.5} if i > 3_000 else {}),
        }
        for i, (p, o) in enumerate(rng.integers(1, 5_000, (5_000, 2)))
    ]
    (tmp_path / "rows.jsonl").write_text(as_lines(table))
    (tmp_path / "rows.json").write_text(json.dumps({"data": table}, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(table, ensure_ascii=False, indent=1), encoding="utf-8")
    first = read_workload(Source.open(tmp_path / "rows.jsonl"))
    assert first.prompt_tokens.tolist() == [row["prompt_tokens"] for row in table]
    assert (first.recorded_s >= 0.0).sum() == 1_999
    for name in ("rows.json", "list.json"):
        other = read_workload(Source.open(tmp_path / name))
        np.testing.assert_array_equal(first.prompt_tokens, other.prompt_tokens)
        np.testing.assert_array_equal(first.recorded_s, other.recorded_s)


# ---------------------------------------------------------------- the same rows in two formats


def start_time_log(rng: np.random.Generator) -> list[dict[str, Any]]:
    """One moment per attempt, named as in JSON payloads; every fifth was refused with its tokens stated."""
    at = BEGAN
    table = []
    for i in range(120):
        at += timedelta(milliseconds=int(rng.integers(50, 4_000)))
        refused = i % 5 == 2
        table.append(
            {
                "startTime": at.isoformat(timespec="microseconds"),
                "model": "gpt-4o-mini",
                "prompt_tokens": int(rng.integers(200, 3_000)),
                "completion_tokens": 0 if refused else int(rng.integers(30, 600)),
                "latency": 0.05 if refused else round(float(rng.uniform(1.0, 10.0)), 3),
                "status": 429 if refused else 200,
            }
        )
    return table


def spend_log(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of LiteLLM's spend log; every 24th failed, whose tokens it states as 0."""
    table = []
    for i, row in enumerate(start_time_log(rng)):
        failed = i % 24 == 7
        begun = datetime.fromisoformat(row["startTime"])
        prompt, output = (0, 0) if failed else (row["prompt_tokens"], row["completion_tokens"] + 1)
        table.append(
            {
                "request_id": f"chatcmpl-{i}",
                "call_type": "acompletion",
                "total_tokens": prompt + output,
                "prompt_tokens": prompt,
                "completion_tokens": output,
                "startTime": iso(begun),
                "endTime": iso(begun + timedelta(seconds=2)),
                "completionStartTime": iso(begun + timedelta(seconds=2)),
                "model": "gpt-4o-mini",
                "cache_hit": "False",
                "metadata": {"status": "", "error_information": {"error_code": "429"} if failed else None},
                "status": "failure" if failed else "success",
            }
        )
    return table


@pytest.mark.parametrize(("make", "refused"), [(start_time_log, 24), (spend_log, 5)])
def test_a_log_tells_the_same_as_csv_as_lines_and_as_a_list(
    make: Callable[[np.random.Generator], list[dict[str, Any]]], refused: int, tmp_path: Path, seed: int
) -> None:
    table = make(np.random.default_rng(seed))
    answered = [row for row in table if row["status"] in (200, "success")]
    for name, text in (("a.csv", as_csv(table)), ("a.jsonl", as_lines(table)), ("a.json", json.dumps(table))):
        found = observed(tmp_path / name, text)
        assert (len(found), int(found.answered.sum()), int((found.kind == REFUSED).sum())) == (
            120,
            120 - refused,
            refused,
        )
        outputs = found.tries.output_tokens[found.answered]
        assert np.median(outputs) == np.median([row["completion_tokens"] for row in answered]), name
        # A failed call's 0 tokens are no prompt: one that is not known is taken from the others.
        prompts = found.tries.prompt_tokens[found.answered]
        assert prompts.tolist() == [row["prompt_tokens"] for row in answered], name
        assert (found.tries.prompt_tokens > 0).all()
        took_s = [row.get("latency", 2.0) for row in table]
        assert found.took_s.tolist() == pytest.approx(took_s, abs=1e-6), name
        workload = read_workload(Source.open(tmp_path / name))
        assert workload.prompt_tokens.tolist() == prompts.tolist()


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_large_files_are_read_as_streams(form: str, tmp_path: Path) -> None:
    """A million rows stay under 500 MB: at most 500 bytes a row beside what is read ahead, whatever it holds."""
    count = 20_000
    allowed = 500 * count + 8 * 2**20
    row = {"model": "gpt-4o", "prompt_tokens": 500, "completion_tokens": 90, "latency": 2.5, "prompt": "x" * 500}
    table = [{"request_id": f"chatcmpl-{i:07d}", "startTime": 1_770_000_000 + i, **row} for i in range(count)]
    texts = {"csv": as_csv, "jsonl": as_lines, "json": json.dumps}
    path = tmp_path / f"log.{form}"
    path.write_text(texts[form](table))
    del table
    tracemalloc.start()
    try:
        assert len(read_workload(Source.open(path))) == count
        assert tracemalloc.get_traced_memory()[1] < allowed
        tracemalloc.reset_peak()
        assert len(read_sources([str(path)], {})) == count
        assert tracemalloc.get_traced_memory()[1] < allowed
    finally:
        tracemalloc.stop()
