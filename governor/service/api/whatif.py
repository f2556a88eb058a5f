"""Prepare the simulator's input for `/what-if`: the batch in numbers, today's settings and the proposed ones.

For a batch that runs or is over, received answers count as they were, in tokens and in seconds; the rest is assumed.
The question is always about the whole batch from an idle start, so that settings can be compared.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from sqlalchemy import select

from governor.journal.schema import attempts, requests, to_json
from governor.model.errors import BadInput, BadSetting
from governor.model.estimate import CHAT, Sizes
from governor.model.policy import KNOBS
from governor.model.requests import Outcome, read_requests
from governor.service.api.bodies import Shape, WhatIf
from governor.service.api.state import Service
from governor.service.errors import INVALID_REQUEST, ApiError
from governor.service.store.ledger import part_of
from governor.service.store.store import BatchRow
from governor.service.worker.policies import words_of
from governor.service.worker.roster import batch_policy

_SIZES = tuple(Sizes.__slots__)
_REQUESTS_MOST = 100_000


def question_of(body: WhatIf, row: BatchRow | None, service: Service) -> dict[str, Any]:
    """Return the question. Blocks. Raise `ApiError` or BadInput if it makes no sense.

    `sizes`: by column of `Sizes`; `output_tokens`, `service_s`: -1 = not known; `today`, `proposed`: policies;
    `scenario`: the pool's.
    """
    given = [name for name in ("batch_id", "lines", "shape") if getattr(body, name) is not None]
    if len(given) != 1:
        text = f"name exactly one of batch_id, lines and shape, not {', '.join(given) or 'none'}"
        raise ApiError(422, INVALID_REQUEST, text)
    policies = service.worker.policies.in_force()
    pool = body.pool or (
        row.details["pools"][0] if row is not None and row.details.get("pools") else next(iter(policies))
    )
    if pool not in policies:
        raise BadSetting(f"there is no pool {pool!r}: {', '.join(policies)}")
    today = policies[pool] if row is None else batch_policy(policies[pool], row)
    proposed = today.set_values([f"{name}={words_of(value)}" for name, value in body.settings.items()])
    if row is not None:
        rows = _recorded(service, row, pool)
    elif body.lines is not None:
        rows = _sent(body.lines, service.config.file_tokens)
    else:
        assert body.shape is not None
        rows = _shaped(body.shape)
    changes = {
        knob.env: [knob.text(getattr(today, knob.name)), knob.text(getattr(proposed, knob.name))]
        for knob in KNOBS
        if getattr(today, knob.name) != getattr(proposed, knob.name)
    }
    scenario = next((each.scenario for each in service.config.pools if each.name == pool), "")
    about = {"today": today, "proposed": proposed, "changes": changes, "scenario": scenario}
    rest = about | {"runs": body.runs, "seed": body.seed}
    return rows | rest | {"finalize": bool(row is not None and row.finalize)}


def _columns(rows: Iterable[tuple[Sizes, int, float]], model: str) -> dict[str, Any]:
    sizes = {name: array("q") for name in _SIZES}
    outputs, services = array("q"), array("d")
    for each, output, service_s in rows:
        for name, column in sizes.items():
            column.append(getattr(each, name))
        outputs.append(output)
        services.append(service_s)
    if not outputs:
        raise BadInput("the batch has no requests in that pool", "what-if")
    return {"sizes": sizes, "output_tokens": outputs, "service_s": services, "model": model}


def _shaped(shape: Shape) -> dict[str, Any]:
    cap = -1 if shape.max_output_tokens is None else shape.max_output_tokens
    sizes = Sizes(CHAT, shape.prompt_tokens, 4 * shape.prompt_tokens, 4, 1, 0, 0, 1, cap)
    output = -1 if shape.output_tokens is None else shape.output_tokens
    return _columns(((sizes, output, -1.0) for _ in range(shape.requests)), shape.model)


def _sent(lines: list[dict[str, Any]], file_tokens: int) -> dict[str, Any]:
    models: dict[str, int] = {}

    def rows() -> Iterable[tuple[Sizes, int, float]]:
        for request in read_requests(map(to_json, lines), "lines", keep_body=False, file_tokens=file_tokens):
            models[request.model] = models.get(request.model, 0) + 1
            yield request.sizes, -1, -1.0

    found = _columns(rows(), "")
    return found | {"model": max(models, key=models.__getitem__)}


def _recorded(service: Service, row: BatchRow, pool: str) -> dict[str, Any]:
    if row.requests > _REQUESTS_MOST:
        text = f"the batch has {row.requests:,} requests, a what-if takes {_REQUESTS_MOST:,} at most"
        raise ApiError(422, INVALID_REQUEST, f"{text}: describe it by `shape`")
    first, last = part_of(row.number)
    r, a = requests.c, attempts.c
    query = select(r.request, r.model, *(r[name] for name in _SIZES)).order_by(r.request)
    query = query.where(r.request.between(first, last), r.pool == pool)
    answered = select(a.request, a.output_tokens, a.finished_s - a.launched_s)
    answered = answered.where(a.request.between(first, last), a.outcome == Outcome.OK, a.lane == "main")
    models: dict[str, int] = {}
    with service.store.database.reading() as c:
        known = {request: (output, took_s) for request, output, took_s in c.execute(answered)}
        stored = c.execute(query).all()
    scale = service.config.time_scale

    def rows() -> Iterable[tuple[Sizes, int, float]]:
        for found in stored:
            models[found.model] = models.get(found.model, 0) + 1
            output, took_s = known.get(found.request, (-1, -1.0))
            yield Sizes(*found[2:]), output, took_s / scale if took_s > 0.0 and scale != 1.0 else took_s

    columns = _columns(rows(), "")
    return columns | {"model": max(models, key=models.__getitem__)}
