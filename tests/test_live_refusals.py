"""Refusals against a server that is not ours: one request never takes the others with it, and what is wrong is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.live import Cli, check_whole, line, lines_of, run_args, shared_cli, write_batch
from tests.strangers import Reply, chat, error, stranger

ONE_BY_ONE = {"OPENAI_MAX_CONCURRENCY": "1"}


@pytest.fixture(scope="module")
def cli() -> Cli:
    return shared_cli()


def picky(body: dict[str, Any]) -> Reply:
    """Knows one model, and flags one prompt."""
    if body["model"] != "gpt-4o-mini":
        return error(404, f"The model `{body['model']}` does not exist", "model_not_found")
    if "flag me" in body["messages"][0]["content"]:
        return error(403, "Your input was flagged by moderation")
    return chat()


def test_an_unknown_model_and_a_flagged_prompt_cost_two_of_forty(cli: Cli, tmp_path: Path) -> None:
    lines = [line("q-0", model="gpt-9"), line("q-1", text="flag me"), *(line(f"q-{i}") for i in range(2, 40))]
    write_batch(tmp_path / "requests.jsonl", lines)
    with stranger(picky) as server:
        ran = cli.run(*run_args(tmp_path, server.base_url, "--json"), env=ONE_BY_ONE)
        assert len(server.bodies) == 40
    assert (ran.code, ran.json["completed"], ran.json["failed"]) == (1, 38, 2)
    errors = {
        each["custom_id"]: each["response"]["status_code"] for each in lines_of(tmp_path / "results.errors.jsonl")
    }
    assert errors == {"q-0": 404, "q-1": 403}
    check_whole(tmp_path, 40)


def test_one_of_two_models_is_missing(cli: Cli, tmp_path: Path) -> None:
    for order in (sorted, reversed):
        lines = list(order(range(40)))  # type: ignore[operator]
        write_batch(
            tmp_path / "requests.jsonl",
            [line(f"q-{i}", model="gpt-9" if i < 20 else "gpt-4o-mini") for i in lines],
        )
        with stranger(picky) as server:
            ran = cli.run(*run_args(tmp_path, server.base_url, "--json"), env=ONE_BY_ONE)
        assert (ran.code, ran.json["completed"], ran.json["failed"]) == (1, 20, 20)
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_model_that_no_request_can_have_stops_the_run_and_the_same_command_goes_on(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", [line(f"q-{i}", model="new") for i in range(40)])
    with stranger(picky) as server:
        ran = cli.run(*run_args(tmp_path, server.base_url), env=ONE_BY_ONE)
        assert len(server.bodies) == 3
    assert ran.code == 3
    assert "request 'q-2': 404 model_not_found: The model `new` does not exist: check the model's name" in ran.err
    with stranger(lambda body: chat()) as server:
        ran = cli.run(*run_args(tmp_path, server.base_url, "--json"), env=ONE_BY_ONE)
        assert len(server.bodies) == 40
    assert (ran.code, ran.json["completed"], ran.json["failed"]) == (0, 40, 0)
    check_whole(tmp_path, 40)


def test_yes_goes_on_whatever_is_refused(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", [line(f"q-{i}", model="gpt-9") for i in range(12)])
    with stranger(picky) as server:
        ran = cli.run(*run_args(tmp_path, server.base_url, "--json", "--yes"), env=ONE_BY_ONE)
    assert (ran.code, ran.json["failures"]) == (1, {"BAD_REQUEST": 12})


def test_a_base_url_without_v1_stops_with_the_remedy(cli: Cli, tmp_path: Path) -> None:
    write_batch(tmp_path / "requests.jsonl", [line(f"q-{i}") for i in range(40)])
    with stranger(lambda body: (404, {}, "<html><title>404</title>Not Found</html>")) as server:
        ran = cli.run(*run_args(tmp_path, server.base_url.removesuffix("/v1")), env=ONE_BY_ONE)
        assert len(server.bodies) == 3
    assert ran.code == 3
    assert "check the base URL (OPENAI_BASE_URL, --base-url or the pool's base_url; most end in /v1)" in ran.err
    with stranger(lambda body: chat()) as server:
        assert cli.run(*run_args(tmp_path, server.base_url)).code == 0
    check_whole(tmp_path, 40)


# ---------------------------------------------------------------- a corrected file


def names(bodies: list[dict[str, Any]]) -> list[str]:
    return [body["messages"][0]["content"] for body in bodies]


def of_names(path: Path, models: dict[str, str]) -> Path:
    return write_batch(path, [line(name, model=model, text=name) for name, model in models.items()])


def test_a_corrected_line_is_tried_and_the_others_are_not(cli: Cli, tmp_path: Path) -> None:
    good = {f"q-{i}": "gpt-4o-mini" for i in range(40)}
    of_names(tmp_path / "requests.jsonl", good | {"q-7": "gpt-9"})
    with stranger(picky) as server:
        args = run_args(tmp_path, server.base_url, "--json", "--record")
        ran = cli.run(*args)
        assert (ran.code, ran.json["completed"], ran.json["failed"]) == (1, 39, 1)
        before = len(server.bodies)
        of_names(tmp_path / "requests.jsonl", good)
        ran = cli.run(*args)
        assert names(server.bodies[before:]) == ["q-7"]
        assert (ran.code, ran.json["completed"], ran.json["failed"]) == (0, 40, 0)
        assert "the input was corrected: 1 changed" in ran.err
        check_whole(tmp_path, 40)
        # Once taken over, it is the journal's own; and so is another order of the lines.
        assert cli.run(*args).code == 0
        of_names(tmp_path / "requests.jsonl", dict(reversed(good.items())))
        ran = cli.run(*args)
        assert (ran.code, len(server.bodies)) == (0, before + 1)
        assert "no line of it, but for their order" in ran.err
        assert cli.run("verify", tmp_path / "results.journal.db").code == 0


def test_only_the_rest_and_new_lines_are_run(cli: Cli, tmp_path: Path) -> None:
    first = {f"q-{i}": "gpt-4o-mini" for i in range(10)}
    of_names(tmp_path / "requests.jsonl", first | {"q-3": "gpt-9"})
    with stranger(picky) as server:
        args = run_args(tmp_path, server.base_url, "--json")
        assert cli.run(*args).code == 1
        before = len(server.bodies)
        of_names(tmp_path / "requests.jsonl", {"q-3": "gpt-4o-mini", "q-10": "gpt-4o-mini", "q-11": "gpt-4o-mini"})
        ran = cli.run(*args)
        assert sorted(names(server.bodies[before:])) == ["q-10", "q-11", "q-3"]
        assert (ran.code, ran.json["completed"]) == (0, 12)
        assert "the input was corrected: 1 changed, 2 added" in ran.err
    check_whole(tmp_path, 12)


def test_what_was_answered_before_it_changed_is_named_and_needs_a_flag(cli: Cli, tmp_path: Path) -> None:
    first = {f"q-{i}": "gpt-4o-mini" for i in range(6)}
    requests = of_names(tmp_path / "requests.jsonl", first)
    with stranger(lambda body: chat(body["messages"][0]["content"])) as server:
        args = run_args(tmp_path, server.base_url, "--json")
        assert cli.run(*args).code == 0
        changed = [line(name, text=f"{name} anew" if name in ("q-1", "q-4") else name) for name in first]
        write_batch(requests, changed)
        ran = cli.run(*args)
        assert (ran.code, ran.err.count("\n"), len(server.bodies)) == (2, 1, 6)
        assert "2 lines ('q-1', 'q-4') changed after the answer came" in ran.err
        assert "add --resend-changed" in ran.err
        ran = cli.run(*args, "--resend-changed")
        assert (ran.code, sorted(names(server.bodies[6:]))) == (0, ["q-1 anew", "q-4 anew"])
    check_whole(tmp_path, 6)
    said = [
        each["response"]["body"]["choices"][0]["message"]["content"] for each in lines_of(tmp_path / "results.jsonl")
    ]
    assert said == ["q-0", "q-1 anew", "q-2", "q-3", "q-4 anew", "q-5"]


def test_a_refused_start_leaves_the_journal_as_it_was(cli: Cli, tmp_path: Path) -> None:
    first = {f"q-{i}": "gpt-4o-mini" for i in range(6)}
    of_names(tmp_path / "requests.jsonl", first)
    with stranger(lambda body: chat()) as server:
        args = run_args(tmp_path, server.base_url, "--json")
        assert cli.run(*args).code == 0
        write_batch(tmp_path / "requests.jsonl", [line(name, text="x" * 4_000_000) for name in first])
        refused = cli.run(*args, "--resend-changed", "--tpm", "30000")
        assert (refused.code, "skip-oversized" in refused.err) == (2, True)
        of_names(tmp_path / "requests.jsonl", first)
        assert (cli.run(*args).code, len(server.bodies)) == (0, 6)
    check_whole(tmp_path, 6)


def test_another_file_is_refused(cli: Cli, tmp_path: Path) -> None:
    of_names(tmp_path / "requests.jsonl", {"q-0": "gpt-4o-mini"})
    with stranger(lambda body: chat()) as server:
        args = run_args(tmp_path, server.base_url)
        assert cli.run(*args).code == 0
        of_names(tmp_path / "requests.jsonl", {"other-0": "gpt-4o-mini"})
        ran = cli.run(*args)
        assert (ran.code, len(server.bodies)) == (2, 1)
        assert "it belongs to another input" in ran.err


def test_what_waits_and_is_gone_from_the_file_is_not_sent(cli: Cli, tmp_path: Path) -> None:
    names_ = {f"q-{i}": "gone" for i in range(6)}
    of_names(tmp_path / "requests.jsonl", names_)
    with stranger(picky) as server:
        args = run_args(tmp_path, server.base_url, "--json")
        assert cli.run(*args, env=ONE_BY_ONE).code == 3
        before = len(server.bodies)
        of_names(tmp_path / "requests.jsonl", dict.fromkeys(list(names_)[:4], "gpt-4o-mini"))
        ran = cli.run(*args, env=ONE_BY_ONE)
        assert names(server.bodies[before:]) == ["q-0", "q-1", "q-2", "q-3"]
        assert (ran.code, ran.json["completed"]) == (0, 4)
        assert "4 changed, 2 gone and not sent" in ran.err
    check_whole(tmp_path, 4)
