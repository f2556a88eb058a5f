"""Where settings come from: an env file or the process's environment, and a command line's `--set` on top.

What lives here: the reading of env files, and the order of precedence. What must not: names, ranges and near-misses of
settings (`policy`), and the process's environment itself, which a caller hands over.

An env file is read by python-dotenv, values only: `${NAME}` stays as it stands, so that nothing of the environment
gets into a setting unseen. A production file holds foreign names and secrets: of a line that is not ours nothing is
kept and nothing is repeated, and one that cannot be parsed is passed over, as the programs that own the file do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import parse_stream

from governor.model.errors import BadInput, BadSetting
from governor.model.policy import KNOB_BY_ENV, Policy


class Stated(NamedTuple):
    """What an env file says of one name: the value as text, None without `=`; the line counts from 1."""

    value: str | None
    line: int


def read_env_file(path: str | Path) -> dict[str, Stated]:
    """Every name in an env file, ours and foreign; the last of equal names wins.

    BadInput where the file cannot be read or is empty (/dev/null is not: it states nothing on purpose), and for a line
    that names a setting of ours but is no NAME=VALUE.
    """
    name = str(path)
    try:
        if os.path.isdir(name):
            raise BadInput("this is a folder: name an env file", name)
        with open(name, encoding="utf-8-sig") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and os.fstat(file.fileno()).st_size == 0:
                raise BadInput("the file is empty", name)
            found: dict[str, Stated] = {}
            for binding in parse_stream(file):
                # The parser counts the blank lines before a binding as part of it.
                text = binding.original.string
                line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
                if binding.key is not None:
                    found[binding.key] = Stated(binding.value, line)
                elif binding.error and any(env in text for env in KNOB_BY_ENV):
                    raise BadInput("this line names a setting and is not NAME=VALUE", name, line)
    except FileNotFoundError:
        raise BadInput("there is no such file", name) from None
    except UnicodeDecodeError:
        raise BadInput("not UTF-8 text", name) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot be read: {getattr(error, 'strerror', None) or error}", name) from None
    return found


def policy_of(
    env_file: str | Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    assignments: Iterable[str] = (),
    base: Policy | None = None,
) -> Policy:
    """`base` (else the defaults), then the env file or, where none is named, the environment, then `NAME=VALUE` words.

    BadSetting for a value that is not allowed and for a near-miss of our names, BadInput with the line where it stands
    in the file.
    """
    if env_file is not None:
        stated = read_env_file(env_file)
        try:
            policy = Policy.from_env({name: each.value for name, each in stated.items()}, base)
        except BadSetting as error:
            line = stated[error.name].line if error.name in stated else 0
            raise BadInput(str(error), str(env_file), line) from None
    else:
        policy = Policy.from_env(environment or {}, base)
    return policy.set_values(assignments)
