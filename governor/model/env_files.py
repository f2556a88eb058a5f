"""Sources of settings: env files or the process's environment, and a command line's `--set` on top.

An env file is read by python-dotenv, values only: `${NAME}` stays as written, so that no environment variable enters a
setting unseen. A production file holds foreign names and secrets: nothing of a foreign line is kept or repeated, and a
line that cannot be parsed is skipped, as the programs that own the file do.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dotenv.parser import parse_stream

from governor.model.errors import BadInput, BadSetting
from governor.model.policy import KNOB_BY_ENV, KNOBS, Policy
from governor.model.pools import PROFILE, is_name

# The scenario file of a plan: what the plan assumed of the provider, for every forecast of the same batch.
SCENARIO = "PACELINE_SCENARIO"
# The line of a plan's env file that identifies the settings it was made from, by their `settings_digest`.
MADE_FROM = "# made from settings"
EnvFiles = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


class EnvValue(NamedTuple):
    """An env file's entry for one name: the value as text, None without `=`; the line counts from 1."""

    value: str | None
    line: int


def read_env_file(path: str | Path) -> dict[str, EnvValue]:
    """Return every name in an env file, ours and foreign; the last of equal names wins.

    Raise BadInput if the file cannot be read or is empty (/dev/null is accepted: it states nothing on purpose), and for
    a line that names a setting of ours but is not NAME=VALUE.
    """
    name = str(path)
    try:
        if os.path.isdir(name):
            raise BadInput("this is a folder: name an env file", name)
        with open(name, encoding="utf-8-sig") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and os.fstat(file.fileno()).st_size == 0:
                raise BadInput("the file is empty", name)
            found: dict[str, EnvValue] = {}
            for binding in parse_stream(file):
                # The parser counts the blank lines before a binding as part of it.
                text = binding.original.string
                line = binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")
                if binding.key is not None:
                    found[binding.key] = EnvValue(binding.value, line)
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
    env_files: EnvFiles = (),
    *,
    environment: Mapping[str, str] | None = None,
    assignments: Iterable[str] = (),
    base: Policy | None = None,
) -> Policy:
    """Return `base` (else the defaults) overlaid with env files or the environment, then with `--set`.

    Env files count in order; the environment counts only if no env file is named. `assignments`: the NAME=VALUE words
    of `--set`. Raise BadSetting for a value that is not allowed and for a near-miss of our names; BadInput, with the
    line, if it is in a file.
    """
    policy = base or Policy()
    files = paths_of(env_files)
    for path in files:
        stated = read_env_file(path)
        try:
            policy = Policy.from_env({name: each.value for name, each in stated.items()}, policy)
        except BadSetting as error:
            line = stated[error.name].line if error.name in stated else 0
            raise BadInput(str(error), path, line) from None
    if not files:
        policy = Policy.from_env(environment or {}, policy)
    return policy.set_values(assignments)


def paths_of(env_files: EnvFiles) -> tuple[str, ...]:
    """Return the named env files: one, several in order, or none."""
    if env_files is None:
        return ()
    if isinstance(env_files, str | os.PathLike):
        return (os.fspath(env_files),)
    return tuple(os.fspath(path) for path in env_files)


def environment_of(env_files: EnvFiles, environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables by name: those of `environment`, overlaid with those of the env files.

    Keys are looked up here.
    """
    found = dict(environment)
    for path in paths_of(env_files):
        found |= {name: each.value for name, each in read_env_file(path).items() if each.value is not None}
    return found


def scenario_path(env_files: EnvFiles, environment: Mapping[str, str]) -> str:
    """Return the scenario that PACELINE_SCENARIO names, as a path relative to the working directory; "" = none."""
    return _path_in(SCENARIO, env_files, environment)


def stated_profile(env_files: EnvFiles, environment: Mapping[str, str]) -> str:
    """Return the profile that PACELINE_PROFILE names: a shipped one's name, or a path as in `scenario_path`."""
    return _path_in(PROFILE, env_files, environment)


def _path_in(variable: str, env_files: EnvFiles, environment: Mapping[str, str]) -> str:
    """Return the path that a variable holds; "" = none.

    `environment`: the process's variables. In an env file the path is relative to that file, and of several files the
    last that states one counts; in the environment it is relative to the working directory.
    """
    for path in reversed(paths_of(env_files)):
        stated = (getattr(read_env_file(path).get(variable), "value", None) or "").strip()
        if stated:
            return stated if variable == PROFILE and is_name(stated) else os.path.join(os.path.dirname(path), stated)
    return environment.get(variable, "").strip()


def settings_digest(policy: Policy) -> str:
    """Return 16 hexadecimal digits that distinguish these settings from any other, however their file writes them."""
    text = "\n".join(f"{knob.env}={knob.text(getattr(policy, knob.name))}" for knob in KNOBS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
