"""YAML files that a user writes for a run (`pools.yaml`, `prices.yaml`), read with complaints that name the line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from governor.model.errors import BadInput, quoted
from governor.model.estimate import kind_of


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. BadInput where it cannot be read, is not YAML (with the line), or is no mapping.

    A key that stands twice is an error: one of its two values would be lost without a word.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    problem = f"{quoted(key.value)} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput("there is no such file", name) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"not UTF-8 text: {error.reason}", name) from None
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror or error}", name) from None
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"not YAML: {problem}", name, mark.line + 1 if mark else 0) from None
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise BadInput(f"not YAML that can be read: {error}".splitlines()[0], name) from None
    if not isinstance(data, dict):
        raise BadInput("the file is empty" if data is None else f"{kind_of(data)} where a mapping should be", name)
    return data


def only_keys(data: dict[str, Any], allowed: tuple[str, ...], place: str, name: str) -> None:
    """BadInput for a key that is not one of `allowed`: a misspelt setting that is ignored is worse than none."""
    for key in data:
        if key not in allowed:
            raise BadInput(f"{place}there is no key {quoted(key)}: use {', '.join(allowed)}", name)
