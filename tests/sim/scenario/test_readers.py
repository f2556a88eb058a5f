"""Files into workloads: the real traces, both readers agreeing, old results, one clear line for whatever is wrong."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.model.errors import BadInput, BadSetting, PacelineError
from governor.model.estimate import charge_of, sizes_of
from governor.model.requests import CHAT, read_requests
from sim.model.synthetic import from_tokens
from sim.model.workload import ARRAYS, Workload
from sim.scenario.columns import parse_columns
from sim.scenario.readers import BATCH, SCENARIO, TRACE_CSV, TRACE_JSON, Source, read_workload, save_rows
from sim.selection.split import split

VIDUR = "vidur-arxiv/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
CODE = "azure-llm-2023/AzureLLMInferenceTrace_code.csv"
CONV = "azure-llm-2023/AzureLLMInferenceTrace_conv.csv"


def stdin(text: str | bytes) -> Source:
    return Source.open("-", io.BytesIO(text.encode() if isinstance(text, str) else text))


def read(text: str | bytes, **options: Any) -> Workload:
    return read_workload(stdin(text), **options)


def refusal(text: str | bytes, **options: Any) -> str:
    """The one line that a bad input is answered with."""
    with pytest.raises(PacelineError) as caught:
        read(text, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def line(number: int, **changes: Any) -> str:
    """One line of a batch file, 40 characters of prompt, cap 100."""
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "x" * 40}], "max_tokens": 100}
    request = {"custom_id": f"q-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(request | changes)


def batch(count: int) -> str:
    return "".join(line(number) + "\n" for number in range(count))


# ---------------------------------------------------------------- the public traces


@pytest.mark.parametrize(
    ("name", "rows", "prompts", "outputs"),
    [
        # p5, p50, p95, p99 and mean, docs/explanation/provider.md#traces.
        (CODE, 8_819, (75, 1469, 7303, 7436, 2048), (6, 13, 90, 251, 28)),
        (CONV, 19_366, (181, 1020, 4083, 4142, 1155), (41, 129, 451, 601, 211)),
        (VIDUR, 28_257, (748, 2730, 3813, 3933, 2588), (60, 167, 736, 3271, 291)),
    ],
)
def test_real_traces_have_their_published_figures(
    data_file: Callable[[str], Path], name: str, rows: int, prompts: tuple[int, ...], outputs: tuple[int, ...]
) -> None:
    workload = read_workload(Source.open(data_file(name)))
    assert len(workload) == rows
    for column, figures in ((workload.prompt_tokens, prompts), (workload.output_tokens, outputs)):
        found = [*np.quantile(column, (0.05, 0.5, 0.95, 0.99)), column.mean()]
        np.testing.assert_allclose(found, figures, rtol=0.005, atol=0.51)
    assert (workload.max_tokens == 4_096).all()
    assert workload.provenance["output cap"][0] == "assumed"
    assert workload.provenance["output tokens"][0] == "measured"


@pytest.mark.parametrize(("name", "per_s", "cv", "peak"), [(CODE, 2.57, 13.2, 67), (CONV, 5.53, 1.09, 16)])
def test_real_arrivals(data_file: Callable[[str], Path], name: str, per_s: float, cv: float, peak: int) -> None:
    arrival_s = read_workload(Source.open(data_file(name))).arrival_s
    gaps = np.diff(arrival_s)
    assert arrival_s[0] == 0
    assert len(arrival_s) / arrival_s[-1] == pytest.approx(per_s, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.01)
    # Seconds of the clock: the first arrival of either trace is not at one, so that the peak may move by a few.
    assert np.bincount(arrival_s.astype(int)).max() == pytest.approx(peak, rel=0.1)


def test_the_first_rows_are_the_first_rows(data_file: Callable[[str], Path]) -> None:
    whole, part = (read_workload(Source.open(data_file(CONV)), first=first) for first in (0, 400))
    assert len(part) == 400
    np.testing.assert_array_equal(part.prompt_tokens, whole.prompt_tokens[:400])
    assert part.provenance["requests"] == ("measured", "the first 400 rows of AzureLLMInferenceTrace_conv.csv")


def test_the_same_rows_read_the_same_in_every_format(data_file: Callable[[str], Path], tmp_path: Path) -> None:
    """CSV, JSON lines, one JSON list, Parquet, and the first two packed."""
    frame = pd.read_csv(data_file(CONV)).head(5_000)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "rows.json", orient="records", indent=1)
    frame.assign(TIMESTAMP=pd.to_datetime(frame["TIMESTAMP"])).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    first = read_workload(Source.open(tmp_path / "rows.csv"))
    assert len(first) == 5_000
    assert first.prompt_tokens.tolist() == frame["ContextTokens"].tolist()
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv.gz", "rows.jsonl.gz"):
        other = read_workload(Source.open(tmp_path / name))
        for column in ARRAYS:
            np.testing.assert_allclose(
                getattr(first, column), getattr(other, column), atol=1e-6, err_msg=f"{name} {column}"
            )


# ---------------------------------------------------------------- formats and columns


def test_mooncake_counts_milliseconds() -> None:
    rows = [{"timestamp": 27_482, "input_length": 6_955, "output_length": 52, "hash_ids": [46, 47]}]
    rows.append({"timestamp": 30_535, "input_length": 6_472, "output_length": 26, "hash_ids": [46]})
    workload = read("".join(json.dumps(row) + "\n" for row in rows))
    assert workload.prompt_tokens.tolist() == [6_955, 6_472]
    assert workload.output_tokens.tolist() == [52, 26]
    assert workload.arrival_s.tolist() == [0.0, 3.053]


def test_vidur_with_arrivals_counts_seconds() -> None:
    workload = read("arrived_at,num_prefill_tokens,num_decode_tokens\n1.5,10,20\n4,11,21\n")
    assert workload.arrival_s.tolist() == [0.0, 2.5]


@pytest.mark.parametrize(
    ("first", "second", "seconds"),
    [
        ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:05", 1.02004),
        ("2023-11-16T18:17:03Z", "2023-11-16T20:17:03.5+01:00", 3_600.5),
        ("10", "12.25", 2.25),
        ("1700158623.5", "1700158625", 1.5),
        ("1700158623500", "1700158625000", 1.5),
        ("1700158623500000", "1700158625000000", 1.5),
        ("1700158623500000000", "1700158625000000000", 1.5),
    ],
)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_times_in_whatever_form(form: str, first: str, second: str, seconds: float) -> None:
    if form == "csv":
        text = f"when,in,out\n{first},1,2\n{second},3,4\n"
    else:
        number = first.replace(".", "").isdigit()
        values = [float(t) if number else t for t in (first, second)]
        text = "".join(json.dumps({"when": value, "in": 1, "out": 2}) + "\n" for value in values)
    workload = read(text, columns={"prompt": "in", "output": "out", "arrival": "when"})
    np.testing.assert_allclose(workload.arrival_s, [0.0, seconds], atol=1e-6)


def test_any_columns_can_be_named() -> None:
    text = "a;b;c;d;e;f;g\nx 1;10;20;500;0.5;30;gpt-4o\nx 2;11;21;750;;;\n"
    chosen = {
        "id": "a",
        "prompt": "b",
        "output": "c",
        "arrival": "d:ms",
        "latency": "e",
        "max_tokens": "f",
        "model": "g",
    }
    workload = read(text, columns=chosen)
    assert workload.custom_ids == ["x 1", "x 2"]
    assert workload.prompt_tokens.tolist() == [10, 11]
    assert workload.arrival_s.tolist() == [0.0, 0.25]
    assert workload.recorded_s.tolist() == [0.5, -1.0]
    assert workload.max_tokens.tolist() == [30, -1]
    assert [workload.model(0), workload.model(1)] == ["gpt-4o", ""]
    assert workload.provenance["output cap"] == ("measured", "column f of stdin")
    assert workload.provenance["latency"] == ("measured", "column e of stdin, 1 of 2 rows")
    assert read(text, columns=chosen, max_tokens=77).max_tokens.tolist() == [77, 77]


def test_a_mapping_completes_a_known_format() -> None:
    text = "ContextTokens,GeneratedTokens,cap\n10,20,64\n"
    assert read(text, columns={"max_tokens": "cap"}).max_tokens.tolist() == [64]


def test_rows_out_of_order_are_sorted_and_that_is_said() -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n30,1,1\n10,2,2\n30,3,3\n20,4,4\n10,5,5\n"
    workload = read(text)
    # Rows of one moment keep their order.
    assert workload.prompt_tokens.tolist() == [2, 5, 4, 1, 3]
    assert workload.arrival_s.tolist() == [0, 0, 10, 20, 20]
    assert "have been sorted" in workload.provenance["arrivals"][1]


def test_the_assumed_cap_is_the_same_for_every_row_and_longer_answers_are_counted() -> None:
    workload = read("ContextTokens,GeneratedTokens\n1,5000\n1,3\n1,4097\n")
    assert workload.max_tokens.tolist() == [4_096] * 3
    assert workload.output_tokens.tolist() == [5_000, 3, 4_097]
    assert "2 answers are longer" in workload.provenance["output cap"][1]
    uncapped = read("ContextTokens,GeneratedTokens\n1,5000\n", max_tokens=-1)
    assert uncapped.max_tokens.tolist() == [-1]


def test_answers_can_be_drawn_for_a_trace_that_has_none() -> None:
    workload = read("ContextTokens\n" + "100\n" * 50, output_tokens=(10, 30), seed=4)
    assert workload.provenance["output tokens"][0] == "assumed"
    assert workload.output_tokens.min() >= 1
    assert "output=NAME" in refusal("ContextTokens\n100\n")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (batch(1), BATCH),
        ("\ufeff" + batch(1), BATCH),
        ('\n\n{"input_length": 1}', TRACE_JSON),
        ("a,b\n1,2\n", TRACE_CSV),
        ("prompt tokens: all,b\n", TRACE_CSV),
        ("# mine\nworkload:\n  path: a.csv\n", SCENARIO),
        ("---\nworkload: {path: a.csv}\n", SCENARIO),
    ],
)
def test_kinds_are_recognised_by_their_first_lines(text: str, kind: str) -> None:
    assert stdin(text).kind() == kind


def test_a_byte_order_mark_and_foreign_line_ends_are_no_part_of_a_name() -> None:
    for text in ("\ufeffContextTokens,GeneratedTokens\r\n5,6\r\n", '\ufeff{"input_length": 5, "output_length": 6}\r\n'):
        assert read(text).prompt_tokens.tolist() == [5]


def test_parse_columns() -> None:
    assert parse_columns("prompt=in, output = out put,arrival=t:ms") == {
        "prompt": "in",
        "output": "out put",
        "arrival": "t:ms",
    }
    for text, part in (("prompt", "ROLE=NAME"), ("", "empty"), ("id=a,id=b", "twice"), ("prompt=", "ROLE=NAME")):
        with pytest.raises(BadSetting, match=part):
            parse_columns(text)


# ---------------------------------------------------------------- batch files


def test_a_batch_file_is_sized_as_the_live_run_sizes_it(root: Path) -> None:
    workload = read_workload(Source.open(root / "examples" / "batch.jsonl"))
    for row, text in enumerate((root / "examples" / "batch.jsonl").read_text("utf-8").splitlines()):
        request = json.loads(text)
        sizes = sizes_of(CHAT, request["body"])
        assert workload.custom_id(row) == request["custom_id"]
        assert workload.model(row) == request["body"]["model"]
        assert int(workload.max_tokens[row]) == request["body"]["max_tokens"]
        charges = [charge_of(rule, sizes, 0) for rule in ("auto", "prompt_plus_max")]
        row_sizes = {name: int(getattr(workload, name)[row]) for name in type(sizes).__slots__}
        assert [charge_of(rule, type(sizes)(**row_sizes), 0) for rule in ("auto", "prompt_plus_max")] == charges


def results(**outputs: int) -> str:
    """An old results file with these numbers of output tokens by custom_id, `_` for `-`; -1 = a failed request."""
    lines = []
    for name, tokens in outputs.items():
        usage = {"prompt_tokens": 20, "completion_tokens": tokens, "total_tokens": 20 + tokens}
        response = {"status_code": 200, "request_id": "r", "body": {"usage": usage}}
        if tokens < 0:
            response = {"status_code": 400, "request_id": "r", "body": {"error": {"code": "invalid_value"}}}
        lines.append(json.dumps({"custom_id": name.replace("_", "-"), "response": response, "error": None}))
    return "\n".join(lines) + "\n"


def test_answers_of_an_old_run_are_taken_by_custom_id(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text(results(q_2=30, q_0=10, q_9=99, q_1=100))
    workload = read(batch(3), outputs_from=old)
    # The answer of 100 tokens had reached its cap: how much longer it would have become is not known.
    assert workload.output_tokens.tolist() == [10, 101, 30]
    label, text = workload.provenance["output tokens"]
    assert label == "measured"
    assert "3 of 3" in text
    assert "1 had reached their cap" in text


def test_answers_that_an_old_run_lacks_come_from_the_others_and_that_is_said(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text(results(q_0=10, q_1=-1))
    workload = read(batch(3), outputs_from=old)
    assert workload.output_tokens.tolist() == [10, 10, 10]
    label, text = workload.provenance["output tokens"]
    assert (label, "the other 2" in text) == ("assumed", True)


def test_an_old_run_of_another_batch(tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text(results(a=10))
    assert "'q-0'" in refusal(batch(2), outputs_from=old)
    assert "no such file" in refusal(batch(2), outputs_from=tmp_path / "older.jsonl")
    old.write_text(results(q_0=10) + '{"custom_id": "q-1", "respon')
    message = refusal(batch(2), outputs_from=old)
    assert f"{old}:2:" in message
    assert "cut short" in message


def test_output_tokens_by_quantiles_and_by_assumption() -> None:
    given_, assumed = read(batch(50), output_tokens=(300, 300)), read(batch(50))
    # Uncapped: the declared 100 cut them at run time only.
    assert set(given_.output_tokens.tolist()) == {300}
    assert assumed.provenance["output tokens"][0] == "assumed"
    assert len(set(assumed.output_tokens.tolist())) > 10
    np.testing.assert_array_equal(read(batch(50), seed=3).output_tokens, read(batch(50), seed=3).output_tokens)


# ---------------------------------------------------------------- what is wrong, in one line

HEADER = "ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        # (what stands in the file, what the message must say)
        ("", ["empty"]),
        ("\n \n\t\n", ["nothing but blank lines"]),
        (HEADER, ["only a header"]),
        (HEADER + "1,2\n3,-4\n", [":3:", "'GeneratedTokens'", "'-4'", "whole number from 0"]),
        (HEADER + "1,2\nx,4\n", [":3:", "'ContextTokens'", "'x'"]),
        (HEADER + "1.5,2\n", [":2:", "'1.5'", "whole number"]),
        (HEADER + "1,NaN\n", [":2:", "'GeneratedTokens'", "no value"]),
        (HEADER + "1,\n", [":2:", "no value"]),
        (HEADER + "1,inf\n", [":2:", "'inf'"]),
        (HEADER + "1,2000000000\n", [":2:", "100,000,000"]),
        (HEADER + "1,2\n\n1,2,3\n", [":4:", "3 values", "2 columns"]),
        (HEADER + "1,2\n3", [":3:", "1 values", "is the line whole"]),
        (HEADER + '1,"2\n', ["not CSV"]),
        ("ContextTokens,ContextTokens\n1,2\n", [":1:", "two columns"]),
        ("3772,54\n2015,156\n", [":1:", "header line"]),
        ("in,out\n1,2\n", ["'in', 'out'", "--columns prompt=NAME,output=NAME"]),
        (b"ContextTokens,GeneratedTokens\n1,2\n\xff,3\n", [":3:", "not UTF-8"]),
        ("ContextTokens,GeneratedTokens\n".encode("utf-16"), ["UTF-16"]),
        (b"\x1f\x8b\x08\x00rest", ["gzip"]),
        (b"PAR1rest", ["Parquet"]),
        (f"[{line(1)}]", [":1:", "one JSON list", "jq"]),
        (gzip.compress(line(1).encode()), ["gzip", "gunzip"]),
        (b"\x00\x01\x02", ["not a text file"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", [":2:", "'TIMESTAMP'", "'yesterday'"]),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n5,1,2\n2026-01-01,1,2\n",
            [":3:", "dates without a time zone among values in seconds"],
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1763900100,1,2\n1763900100000,1,2\n", [":3:", "in ms since 1970"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n5,1,2\n-3,1,2\n", [":3:", "'TIMESTAMP'", "negative time"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n5,1,2\n,1,2\n", [":3:", "'TIMESTAMP'", "no value"]),
        ('[{"input_length": 1}]', [":1:", "output=NAME"]),
        ('[{"input_length": 1, "output_length": 2},\n{"input_length": 1,', [":2:", "not JSON", "cut short"]),
        ('[{"input_length": 1, "output_length": 2}', ["no end", "cut short"]),
        ('[{"input_length": 1, "output_length": 2},\n{"input_length": 1}]', [":2:", "'output_length'", "no value"]),
        ('{"input_length": 1, "output_length": 2}\n{"input_len', [":2:", "not JSON", "cut short"]),
        ('{"input_length": 1, "output_length": 2}\n{oops}\n', [":2:", "not JSON", "column 2"]),
        ('{"input_length": 1, "output_length": 2}\n[1]\n', [":2:", "a list where a JSON object"]),
        ('{"input_length": 1, "output_length": 2}\n{"input_length": 1}\n', [":2:", "'output_length'", "no value"]),
        ('{"input_length": 1, "output_length": true}\n', [":1:", "True"]),
        ('{"input_length": 1, "output_length": NaN}\n', [":1:", "no value"]),
        ('{"input_length": 1, "output_length": 1e400}\n', [":1:", "inf"]),
        ('{"input_length": 1, "output_length": ' + "9" * 5_000 + "}\n", [":1:", "not JSON"]),
        ('{"input_length": ' + "[" * 100_000 + "\n", [":1:", "not JSON"]),
        ('{"input_length": 1, "output_length": 2}\n' + line(1) + "\n", [":2:", "batch format", "one kind per file"]),
        (line(1) + '\n{"input_length": 1, "output_length": 2}\n', [":2:", "every line of a batch file"]),
        (line(1) + "\n" + line(2)[:60], [":2:", "not JSON", "cut short"]),
        (line(1) + "\n" + line(1) + "\n", [":2:", "'q-1'", "line 1"]),
        (line(1, url="/v1/images"), [":1:", "'/v1/images'"]),
        (line(1, body={"messages": []}), [":1:", "messages"]),
    ],
)
def test_bad_input_is_one_line_with_place_value_and_remedy(text: str | bytes, parts: list[str]) -> None:
    message = refusal(text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"columns": {"prompt": "in"}}, ["'in'", "'ContextTokens'"]),
        ({"columns": {"promt": "ContextTokens"}}, ["did you mean prompt"]),
        ({"columns": {"id": "x"}}, [":4:", "'a'", "line 2"]),
        ({"columns": {"n": "x"}}, [":2:", "'a'", "from 1"]),
        ({"columns": {"endpoint": "x"}}, [":2:", "'a'", "/v1/chat/completions"]),
        ({"outputs_from": "x.jsonl"}, ["batch files"]),
        ({"output_tokens": (50.0, 10.0)}, ["P95 not below P50"]),
        ({"output_tokens": (math.nan, 10.0)}, ["P50"]),
        ({"max_tokens": -2}, ["max_tokens"]),
        ({"first": -1}, ["--first"]),
    ],
)
def test_bad_options(options: dict[str, Any], parts: list[str]) -> None:
    message = refusal("ContextTokens,GeneratedTokens,x\n1,2,a\n3,0,0\n5,2,a\n", **options)
    for part in parts:
        assert part in message


def test_options_of_traces_do_not_fit_a_batch() -> None:
    assert "is for traces" in refusal(batch(1), columns={"prompt": "a"})
    assert "is for traces" in refusal(batch(1), max_tokens=5)


def test_latencies_must_be_times() -> None:
    text = "ContextTokens,GeneratedTokens,ms\n1,2,1500\n1,2,-1\n"
    assert read(text, columns={"latency": "ms:ms"}).recorded_s.tolist() == [1.5, -1.0]
    assert ":3:" in refusal(text.replace("-1", "-2"), columns={"latency": "ms:ms"})


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, part in ((tmp_path / "no.csv", "no such file"), (tmp_path, "folder"), ("a\0b", "no such file")):
        with pytest.raises(BadInput, match=part):
            Source.open(path)
    locked = tmp_path / "locked.csv"
    locked.write_text(HEADER)
    locked.chmod(0)
    if not os.access(locked, os.R_OK):
        with pytest.raises(BadInput, match="cannot be read"):
            Source.open(locked)


def test_a_scenario_is_no_workload() -> None:
    assert "scenario" in refusal("workload: {path: a}\n")


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (batch(2).encode("utf-16"), "save it as UTF-8"),
        (batch(2).encode("utf-16-be"), ""),
        (gzip.compress(batch(2).encode()), "unpack it first (gunzip)"),
        (f"[{line(0)},\n{line(1)}]".encode(), "jq -c '.[]'"),
        (json.dumps([json.loads(line(0))], indent=2).encode(), "jq -c '.[]'"),
        (b"PK\x03\x04 a spreadsheet", "unpack or export it first"),
    ],
)
def test_every_command_names_the_same_remedy(data: bytes, remedy: str, tmp_path: Path) -> None:
    """`run` and `preflight` read lines, `simulate` and `split` look at the file first."""
    (tmp_path / "requests.jsonl").write_bytes(data)
    source = Source.open(tmp_path / "requests.jsonl")
    with pytest.raises(BadInput) as planned:
        read_workload(source)
    with pytest.raises(BadInput) as ran, open(tmp_path / "requests.jsonl", "rb") as stream:
        list(read_requests(stream, source.name))
    with pytest.raises(BadInput) as cut:
        split(source.path, tmp_path / "parts")
    assert remedy in str(planned.value)
    if remedy:
        assert str(ran.value) == str(planned.value) == str(cut.value)


# ---------------------------------------------------------------- rows that have no file


def test_saved_rows_read_back_exactly(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = [",", '"', "a\nb", "null", " spaced ", "ä", "", "1", "x\r", "'"]
    lines = [
        line(i, custom_id=f"{texts[i % 10]}{'' if i in (3,) else i}")
        if i % 2
        else line(i, url="/v1/embeddings", body={"input": "abc"})
        for i in range(40)
    ]
    original = read("\n".join(lines))
    original = original.with_(arrival_s=np.cumsum(rng.random(40)), has_arrivals=True, recorded_s=rng.random(40))
    save_rows(original, tmp_path / "rows.csv")
    again = read_workload(Source.open(tmp_path / "rows.csv"))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(original, name), err_msg=name)
    assert again.custom_ids == original.custom_ids
    assert [again.model(i) for i in range(40)] == [original.model(i) for i in range(40)]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_saved_rows_of_a_plain_trace_have_no_arrivals(tmp_path: Path) -> None:
    save_rows(from_tokens(np.array([5]), np.array([6])), tmp_path / "rows.csv")
    assert not read_workload(Source.open(tmp_path / "rows.csv")).has_arrivals


# ---------------------------------------------------------------- anything at all


def read_or_refuse(data: bytes) -> None:
    """Either a workload or one line: never any other exception."""
    try:
        workload = read_workload(stdin(data))
    except PacelineError as error:
        refused = error
    else:
        assert len(workload) > 0
        assert (np.diff(workload.arrival_s) >= 0).all()
        assert (workload.prompt_tokens >= 0).all()
        return
    assert "\n" not in str(refused)
    assert refused.exit_code == 2


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    read_or_refuse(data)


CELL = st.one_of(
    st.integers(-3, 10**12).map(str),
    st.floats().map(str),
    st.sampled_from(["", "NaN", "2026-01-01", "2026-01-01T00:00:00Z", "9999-12-31", "0001-01-01", '"', "1e5", "x"]),
    st.text(max_size=5),
)


@given(st.lists(st.tuples(CELL, CELL, CELL), max_size=6), st.sampled_from([",", ";", "\t"]))
def test_any_csv(rows: list[tuple[str, str, str]], separator: str) -> None:
    lines = [("TIMESTAMP", "ContextTokens", "GeneratedTokens"), *rows]
    read_or_refuse("\n".join(separator.join(row) for row in lines).encode("utf-8", "replace"))


PLAIN = st.tuples(st.integers(0, 10**6), st.integers(0, 10**5), st.floats(0, 1e6, allow_subnormal=False))


@given(st.lists(PLAIN, min_size=1, max_size=20))
def test_blocks_of_numbers_read_as_single_ones(rows: list[tuple[int, int, float]]) -> None:
    """A block is converted at once where all of it is plain; an absent value makes it go one by one."""
    names = ("num_prefill_tokens", "num_decode_tokens", "latency_s")
    plain = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
    mixed = plain + json.dumps({"num_prefill_tokens": "5", "num_decode_tokens": 1, "latency_s": None}) + "\n"
    one, other = read(plain), read(mixed)
    for name in ("prompt_tokens", "output_tokens", "recorded_s"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name)[:-1], err_msg=name)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
NAMES = ["input_length", "output_length", "timestamp", "custom_id", "url", "body", "method"]


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=7), min_size=1, max_size=4))
def test_any_jsonl(rows: list[dict[str, Any]]) -> None:
    read_or_refuse("\n".join(json.dumps(row) for row in rows).encode())


@given(st.data())
def test_any_damage_to_a_batch_file(data: st.DataObject) -> None:
    good = batch(3).encode()
    at = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(at, len(good)))
    read_or_refuse(good[:at] + data.draw(st.binary(max_size=8)) + good[end:])
