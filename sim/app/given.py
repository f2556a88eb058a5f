"""What a program hands over in place of a command line: a file or rows at hand, and how to read them.

Rows at hand go the way of rows from standard input: written as a file would hold them, checked line by line.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from governor.model.env_files import paths_of
from governor.model.errors import BadInput, BadSetting
from governor.model.estimate import CHAT, kind_of
from governor.model.policy import Policy, knob_named
from governor.model.requests import url_of
from sim.app.inputs import read_inputs
from sim.app.options import Options
from sim.model.provider_config import ProviderConfig
from sim.scenario.readers import Source
from sim.scenario.scenario import Scenario, made_policy, made_provider, plain_number, reads_with
from sim.scenario.scenario_file import Reading, Requests


@reads_with
def scenario_of(
    requests: Requests,
    reading: Reading,
    *,
    provider: ProviderConfig | Mapping[str, Any] | str | None,
    policy: Policy | Mapping[str, Any] | str | None,
    **fields: Any,
) -> Scenario:
    """Return a scenario of a file or of rows at hand, as the command line reads it; see `Reading` and `Options`."""
    if not isinstance(provider, str | Mapping):
        made_provider(provider)
    path, opened = _rows_at_hand(requests)
    words: dict[str, Any] = {name: value for name, value in reading.items() if value is not None}
    if isinstance(words.get("columns"), Mapping):
        words["columns"] = [f"{role}={column}" for role, column in words["columns"].items()]
    if "output_tokens" in words:
        p50, p95 = words["output_tokens"]
        words["output_tokens"] = f"{p50:g},{p95:g}"
    if "outputs_from" in words:
        words["outputs_from"] = os.fspath(words["outputs_from"])
    if "env_file" in words:
        words["env_file"] = list(paths_of(words["env_file"]))
    unknown = [name for name in words if name not in Reading.__annotations__]
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*Reading.__annotations__, *Scenario.__dataclass_fields__], 1)
        raise BadSetting(f"a scenario has no {unknown[0]!r}" + "".join(f": did you mean {name}?" for name in close))
    if isinstance(policy, Mapping):
        words["assignments"] = _assignments(policy)
    # A name may also be a file's, which is read together with the rest.
    named, habits = (provider, None) if isinstance(provider, str) else (None, provider)
    settings = None if policy is None or isinstance(policy, Mapping) else made_policy(policy)
    options = Options(workload=path, provider=named, **words, **fields)
    return read_inputs(options, {}, opened=opened, settings=settings, habits=habits).scenario


def _assignments(knobs: Mapping[str, Any]) -> list[str]:
    """Return knobs, under any of their names, as `--set` takes them. Raise BadSetting for an unknown name."""
    Policy().with_(**{name: plain_number(value) for name, value in knobs.items()})
    named = {knob: value for name, value in knobs.items() if (knob := knob_named(name)) is not None}
    return [f"{knob.env}={knob.text(plain_number(value))}" for knob, value in named.items()]


def _rows_at_hand(requests: Requests) -> tuple[str, Source | None]:
    """Return the path; for rows that a program holds, `-` and their bytes."""
    if isinstance(requests, str | os.PathLike):
        return os.fspath(requests), None
    if isinstance(requests, Iterable) and not hasattr(requests, "to_csv"):
        lines = [json.dumps(_line(i, row), default=_plain) for i, row in enumerate(requests)]
        data = "".join(f"{line}\n" for line in lines)
    elif hasattr(requests, "to_csv"):
        data = requests.to_csv(index=False)
    else:
        raise BadInput(f"{type(requests).__name__} where a file, rows or a DataFrame should be", "requests")
    if not data.strip():
        raise BadInput("there are no rows", "requests")
    return "-", Source("requests", "-", data.encode())


def _line(number: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row as a line of a file: a chat body alone becomes a batch line."""
    if not isinstance(row, Mapping):
        raise BadInput(f"{kind_of(row)} where a request should be (a mapping)", "requests", number + 1)
    if "messages" not in row:
        return row
    return {"custom_id": f"request-{number}", "method": "POST", "url": url_of(CHAT), "body": row}


def _plain(value: Any) -> Any:
    """Return NumPy's number as a plain one, as JSON needs it."""
    if isinstance(value, np.generic):
        return value.item()
    raise BadInput(f"{type(value).__name__} in a row, which JSON cannot hold", "requests")
