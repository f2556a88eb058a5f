"""The README stays true: its table of settings is the policy's own, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from governor.model.policy import knob_table

README = Path(__file__).parents[1] / "README.md"


def test_the_table_of_settings_is_the_policys_own() -> None:
    text = README.read_text(encoding="utf-8")
    begin = text.index("-->", text.index("<!-- knobs")) + len("-->")
    assert text[begin : text.index("<!-- /knobs -->")].strip() == knob_table().strip()


def test_every_make_target_named_exists() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:`|^    )make ([a-z]+)", text, re.MULTILINE))
    assert {"demo", "test", "check", "bench"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_picture_and_file_linked_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (README.parent / link).exists(), link
