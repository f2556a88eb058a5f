"""The command `paceline profiles`: list the profiles of providers, print one, or check a user's own."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from governor.cli.run import AsJson

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def profiles(
    named: Annotated[
        str, typer.Argument(metavar="[NAME|FILE.yaml]", help="A shipped profile, or your own.", show_default=False)
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List the profiles of providers, print one, or check your own.

    A profile says how a provider counts, charges and refuses, and what it costs. The base URL chooses it, or --profile,
    or PACELINE_PROFILE. With a name, prints the file; with a file, checks it and says what it holds.

    Example: paceline profiles groq > mine.yaml
    """
    from governor.model.pools import is_name
    from governor.profiles.loader import FOLDER, all_profiles, read_profile
    from governor.profiles.schema import summary

    found = [read_profile(named)] if named else list(all_profiles())
    if as_json:
        whole = [each.model_dump(mode="json", exclude_unset=True) for each in found]
        print(json.dumps(whole[0] if named else whole, indent=2))
    elif named and is_name(named):
        print((FOLDER / f"{named}.yaml").read_text(encoding="utf-8"), end="")
    elif named:
        print(f"{named}: sound\n{summary(found[0])}")
    else:
        width = max(len(each.name) for each in found)
        for each in found:
            print(f"{each.name:<{width}}  {summary(each)}")
