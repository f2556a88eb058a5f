"""Batch files: every request exactly once, every file within the limits, and never half of a set."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from governor.batchapi.limits import QUEUE_HEADROOM
from governor.model.errors import BadInput
from governor.model.requests import read_requests
from sim.app.cli import main
from sim.selection import split as module
from sim.selection.split import LIST, LIVE, split

URLS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")


def line(i: int, model: str = "gpt-4o", url: str = URLS[0], words: int = 20, **more: Any) -> str:
    text = "word " * words
    body: dict[str, Any] = {"model": model}
    if url == URLS[0]:
        body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 50}
    else:
        body["input"] = text
    return json.dumps({"custom_id": f"q-{i}", "method": "POST", "url": url, "body": body} | more)


def written(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def files(folder: Path) -> dict[str, list[bytes]]:
    return {path.name: path.read_bytes().splitlines() for path in sorted(folder.glob("*.jsonl"))}


def test_every_request_stands_in_exactly_one_file(tmp_path: Path, monkeypatch, seed: int) -> None:
    """Random batches under small limits: all properties of a valid set, checked on the files alone."""
    rng = random.Random(seed)
    for trial in range(15):
        monkeypatch.setattr(module, "FILE_LINES", rng.choice([3, 10, 1_000]))
        monkeypatch.setattr(module, "FILE_BYTES", rng.choice([2_000, 100_000]))
        queue = rng.choice([0, 1_000, 5_000])
        rest = rng.choice(["waves", "live"])
        share = rng.choice([0.0, 0.25, 1.0])
        models = ["gpt-4o", "gpt-4o-mini", "weird/model name"][: rng.randint(1, 3)]
        lines = [line(i, rng.choice(models), rng.choice(URLS), rng.randint(1, 200)) for i in range(rng.randint(1, 80))]
        source = written(tmp_path / f"{trial}.jsonl", lines)
        out = tmp_path / f"out-{trial}"
        found = split(source, out, queue_tokens=queue, rest=rest, live_share=share)
        on_disk = files(out)
        assert set(on_disk) == {part.name for part in found.parts}
        assert Counter(each for rows in on_disk.values() for each in rows) == Counter(map(str.encode, lines))
        queued: Counter[tuple[str, int]] = Counter()
        for part in found.parts:
            requests = list(read_requests(on_disk[part.name], part.name))
            tokens = sum(request.sizes.prompt_tokens for request in requests)
            assert (part.requests, part.input_tokens) == (len(requests), tokens)
            assert part.bytes == (out / part.name).stat().st_size
            if part.name == LIVE:
                continue
            assert {(request.model, request.url) for request in requests} == {(part.model, part.url)}
            assert len(requests) <= module.FILE_LINES
            assert part.bytes <= module.FILE_BYTES
            queued[part.model, part.wave] += tokens
        assert not queue or max(queued.values(), default=0) <= queue * (1.0 - QUEUE_HEADROOM)
        live = sum(part.requests for part in found.parts if part.name == LIVE)
        assert live >= int(share * len(lines))
        if rest == "live":
            assert found.waves <= 1
        elif not share:
            assert live == 0
        assert json.loads((out / LIST).read_text()) == found.to_json_dict()
    assert not list(tmp_path.glob(".*"))


def test_the_published_limits() -> None:
    assert (module.FILE_LINES, module.FILE_BYTES) == (50_000, 200 * 10**6)


def test_a_missing_method_is_added_and_a_bom_is_not_kept(tmp_path: Path) -> None:
    bare = json.loads(line(0))
    del bare["method"]
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps(bare).encode() + b"\r\n\r\n" + line(1).encode())
    split(source, tmp_path / "out")
    (rows,) = files(tmp_path / "out").values()
    assert json.loads(rows[0]) == json.loads(line(0))
    assert rows[1] == line(1).encode()


@pytest.mark.parametrize(
    ("lines", "queue", "message"),
    [
        ([line(0), line(1), line(0)], 0, r"in.jsonl:3: custom_id 'q-0' stands on line 1 already"),
        ([line(0), "{"], 0, r"in.jsonl:2: not JSON"),
        ([line(0), line(1, method="GET")], 0, r"in.jsonl:2: method is 'GET'"),
        ([line(0, model="")], 0, r"in.jsonl:1: body.model is missing"),
        ([line(0), line(1, words=3_000)], 2_000, r"in.jsonl:2: request 'q-1' has about [\d,]+ input tokens"),
        ([""], 0, r"in.jsonl: nothing but blank lines in it"),
        (["prompt_tokens,output_tokens", "5,5"], 0, r"in.jsonl: this is a CSV trace, not a batch file"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(tmp_path: Path, lines: list[str], queue: int, message: str) -> None:
    source = written(tmp_path / "in.jsonl", lines)
    with pytest.raises(BadInput, match=message):
        split(source, tmp_path / "out", queue_tokens=queue)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_names_that_utf8_cannot_spell(tmp_path: Path, capsys) -> None:
    """JSON may hold half of a surrogate pair: such a line goes out as it came in."""
    lines = [line(0, model="m\ud800"), line(1).replace("q-1", "q-\\udc00"), line(2).replace("q-2", "q-\\udc01")]
    source = written(tmp_path / "in.jsonl", lines)
    assert main(["split", str(source), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "m?" in said
    assert "3 requests in 2 files" in said
    assert sorted(each for rows in files(tmp_path / "out").values() for each in rows) == sorted(map(str.encode, lines))


def test_standard_input(tmp_path: Path, monkeypatch) -> None:
    """Also where it has to be read again, to name both lines of a duplicate."""
    lines = [line(0), line(1)]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert split("-", tmp_path / "out").requests == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines + lines[:1]).encode())))
    with pytest.raises(BadInput, match="stdin:3: custom_id 'q-0' stands on line 1 already"):
        split("-", tmp_path / "again")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", [line(0)])
    (tmp_path / "out").mkdir()
    split(source, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(BadInput, match="this folder is not empty"):
        split(source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    with pytest.raises(BadInput, match="there is no folder"):
        split(source, tmp_path / "none" / "out")


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    source = written(tmp_path / "in.jsonl", [line(i) for i in range(10)])
    done = []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        done.append(1)
        if len(done) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        split(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_memory_is_flat(tmp_path: Path) -> None:
    """Ten times the lines: what is held at the peak grows by 8 bytes per line, a few times over."""
    peaks = []
    for count in (2_000, 20_000):
        source = written(tmp_path / f"{count}.jsonl", (line(i) for i in range(count)))
        tracemalloc.start()
        split(source, tmp_path / f"out-{count}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 18_000 * 8 * 8, peaks


def test_the_command(tmp_path: Path, capsys) -> None:
    source = written(tmp_path / "in.jsonl", [line(i, words=100) for i in range(40)])
    out = str(tmp_path / "out")
    assert main(["split", str(source), "--out", out, "--batch-queue", "3k", "--rest", "live", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 40
    assert [part["wave"] for part in found["files"]] == [1, 0]
    assert main(["split", str(source), "--out", out]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["split", str(source), "--out", out + "2", "--live", "25%"]) == 0
    text = capsys.readouterr().out
    assert "live.jsonl" in text
    assert "10" in text


def test_what_requests_only_point_to_counts_in_the_queue_and_is_told(tmp_path: Path, capsys) -> None:
    """Forty requests for a file each: 75,000 of a queue hold 15 at 5,000 tokens, and all at 1,000."""
    content = [{"type": "input_file", "file_id": "file-abc"}, {"type": "input_text", "text": "Summarise."}]
    body = {"model": "gpt-4o", "input": [{"role": "user", "content": content}], "max_output_tokens": 300}
    source = written(tmp_path / "files.jsonl", (line(i, url=URLS[1], body=body) for i in range(40)))
    words = ["split", str(source), "--batch-queue", "90k"]
    for tokens, waves in (((), 3), (("--file-tokens", "1k"), 1)):
        out = tmp_path / f"out-{waves}"
        assert main([*words, *tokens, "--out", str(out)]) == 0
        assert "40 requests with files whose tokens are unknown" in " ".join(capsys.readouterr().out.split())
        assert {int(name[4:6]) for name in files(out)} == set(range(1, waves + 1))
    found = split(source, tmp_path / "again", queue_tokens=90_000)
    assert "5,000 are assumed for each (--file-tokens)" in found.note
    assert found.to_json_dict()["note"] == found.note
    assert split(written(tmp_path / "plain.jsonl", [line(1)]), tmp_path / "plain").note == ""
