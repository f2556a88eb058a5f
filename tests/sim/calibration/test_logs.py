"""Bad logs: one clear line each, that names file, line and column, and exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from sim.app.cli import main

GOOD = "custom_id,prompt_tokens,output_tokens,launched_s,finished_s,latency_s\na,10,5,0.0,1.0,1.0\nb,10,5,2.0,3.5,1.5\n"
MS = ("--columns", "latency=took_ms")
JSONL = '{"prompt_tokens": 10, "output_tokens": 5, "launched_s": 0.0, "latency_s": 1.0}\n'


@pytest.fixture
def refused(tmp_path: Path, capsys) -> Callable[..., str]:
    """Runs the command on a log of that text; its one line of complaint, without the file's name."""

    def run(text: str, name: str = "log.csv", *more: str) -> str:
        path = tmp_path / name
        path.write_text(text)
        code = main(["calibrate", str(path), "--out", str(tmp_path / "s.yaml"), *more])
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert not (tmp_path / "s.yaml").exists()
        assert str(path) in lines[0]
        return lines[0].split(str(path))[1]

    return run


def test_missing_columns_are_named_with_what_was_found(refused: Callable[..., str]) -> None:
    said = refused("when,how_long\n1,2\n")
    assert said.startswith(":1: ")
    for word in ("prompt and output", "'when'", "--columns prompt=NAME,output=NAME"):
        assert word in said


def test_negative_times_are_named(refused: Callable[..., str]) -> None:
    said = refused(GOOD + "c,10,5,-4.0,5.0,1.0\n")
    assert ":4: column 'launched_s': '-4.0' is a negative time" in said
    said = refused(GOOD + "c,10,5,9.0,5.0,1.0\n")
    assert ":4: column 'finished_s': it ended 4 s before it began (column 'launched_s')" in said
    said = refused(GOOD.replace("1.5\n", "-2.5\n"))
    assert ":3: column 'latency_s': '-2.5' is a negative time" in said


def test_mixed_units_are_named(refused: Callable[..., str]) -> None:
    said = refused(GOOD + "c,10,5,6.0,7.0,1000.0\n")
    assert ":4: column 'latency_s': 1,000 s, but 'launched_s' to 'finished_s' is 1 s: mixed units?" in said
    epochs = "prompt_tokens,output_tokens,arrived_at\n10,5,1700000000\n10,5,1700000001000\n"
    said = refused(epochs)
    assert ":3: column 'arrived_at'" in said
    assert "one unit per column" in said
    alone = "prompt_tokens,output_tokens,latency\n" + "10,5,0.8\n" * 30 + "10,5,850\n"
    said = refused(alone)
    assert ":32: column 'latency': 850 s, where the median is 0.8 s: mixed units" in said
    assert "--columns latency=latency:ms" in said
    said = refused("prompt_tokens,output_tokens,latency\n10,5,1.0\n10,5,350ms\n")
    assert ":3: column 'latency': '350ms' is not a number" in said


def test_a_time_without_a_zone_among_such_with_one_is_named(refused: Callable[..., str]) -> None:
    said = refused("prompt_tokens,output_tokens,start_time\n10,5,2026-11-20T08:00:00Z\n10,5,2026-11-20T09:00:01\n")
    assert ":3: column 'start_time'" in said
    assert "dates without a time zone among values in dates with a time zone" in said


def test_a_status_that_is_none_is_named(refused: Callable[..., str]) -> None:
    rows = (
        "prompt_tokens,output_tokens,status\n10,5,200\n10,5,ok\n10,,429 Too Many Requests\n10,,throttled\n10,,timeout\n"
    )
    assert ":7: column 'status': '20' is not a status" in refused(rows + "10,5,20\n")
    assert ":7: column 'status': 'what' is not a status" in refused(rows + "10,5,what\n")
    # A failure that says so nowhere: where it could.
    said = refused("prompt_tokens,output_tokens\n10,5\n10,\n")
    assert ":3: column 'output_tokens' has no value here" in said
    assert "--columns status=NAME" in said


def _timed(rows: Iterable[tuple[int, float]]) -> str:
    return "prompt_tokens,output_tokens,took_ms\n" + "".join(f"10,{output},{took}\n" for output, took in rows)


def test_seconds_among_milliseconds_are_named(refused: Callable[..., str]) -> None:
    lengths = [50 + 37 * i % 400 for i in range(40)]
    said = refused(_timed((n, 0.5 + n * (0.02 if i % 4 == 3 else 20.0)) for i, n in enumerate(lengths)), "log.csv", *MS)
    assert ":5: column 'took_ms'" in said
    assert "10 of 40 rows" in said


def test_what_a_cache_answered_is_no_mixture_of_units(tmp_path: Path) -> None:
    lengths = [50 + 37 * i % 400 for i in range(40)]
    log = tmp_path / "log.csv"
    log.write_text(_timed((n, 3.0 + i % 3 if i % 4 == 3 else 20.0 * n) for i, n in enumerate(lengths)))
    assert main(["calibrate", str(log), "--out", str(tmp_path / "s.yaml"), *MS]) == 0


def test_truncated_lines_are_named(refused: Callable[..., str]) -> None:
    said = refused(GOOD + "c,10,5,6.0")
    assert ":4: 4 values where the header names 6 columns" in said
    said = refused(JSONL + '{"prompt_tokens": 10, "outp', "log.jsonl")
    assert ":2: not JSON" in said
    assert "cut short" in said
    answer = '{"custom_id": "a", "response": {"status_code": 200, "body": {"usage": {"prompt_tokens": 5, '
    answer += '"completion_tokens": 5}}}, "error": null}\n'
    said = refused(answer + answer.replace('"a"', '"b"')[:60], "output.jsonl")
    assert ":2: not JSON" in said
    assert "cut short" in said
    said = refused('{"resourceSpans": [{"scopeSpans": [{"spa', "spans.json")
    assert ":1: not JSON" in said
    assert "cut short" in said


def test_spans_are_named_by_their_line(refused: Callable[..., str]) -> None:
    text = (
        '{"resourceSpans": [{"scopeSpans": [{"spans": [\n'
        '{"spanId": "a", "startTimeUnixNano": "1700000000000000000", "endTimeUnixNano": "1700000001000000000",\n'
        '"attributes": [{"key": "gen_ai.usage.input_tokens", "value": {"intValue": "5"}},\n'
        '{"key": "gen_ai.usage.output_tokens", "value": {"intValue": "5"}}]},\n'
        '{"spanId": "b", "startTimeUnixNano": "1700000009000000000", "endTimeUnixNano": "1700000001000000000",\n'
        '"attributes": [{"key": "gen_ai.usage.input_tokens", "value": {"intValue": "5"}},\n'
        '{"key": "gen_ai.usage.output_tokens", "value": {"intValue": "5"}}]}\n'
        "]}]}]}\n"
    )
    assert ":5: column 'endTimeUnixNano': it ended 8 s before it began" in refused(text, "spans.json")


def test_wrong_words_are_named(refused: Callable[..., str], tmp_path: Path, capsys) -> None:
    assert "there is no column 'tokens' for prompt" in refused(GOOD, "log.csv", "--columns", "prompt=tokens")
    (tmp_path / "log.csv").write_text(GOOD)
    assert main(["calibrate", str(tmp_path / "log.csv"), "--out", str(tmp_path / "s.txt")]) == 2
    assert "ends in .yaml" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "none.csv"), "--out", str(tmp_path / "s.yaml")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert "no answered request" in refused(
        GOOD.replace("latency_s", "status").replace("1.0\n", "429\n").replace("1.5\n", "429\n")
    )
