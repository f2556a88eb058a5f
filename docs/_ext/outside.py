"""Looks at a built site as a browser would: a page that loads anything from elsewhere, and a link that is no link.

Internal links and anchors are followed in the files; addresses elsewhere are looked at, never opened, so that the check
works without a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, and in which attribute it says so.
LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
_IN_CSS = re.compile(r"@import\s+[\"']([^\"']+)|url\(\s*[\"']?([^\"')]+)", re.IGNORECASE)


class _Page(HTMLParser):
    """`loads` and `links`: addresses in the order in which they stand; `ids`: what can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        at = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        if "id" in at:
            self.ids.add(at["id"])
        for name in LOADS.get(tag, ()):
            for each in at.get(name, "").split(",") if name == "srcset" else [at.get(name, "")]:
                self.loads += each.split()[:1]
        if tag == "link" and FETCHED & set(at.get("rel", "").lower().split()):
            self.loads.append(at.get("href", ""))
        if tag == "a" and "href" in at:
            self.links.append(at["href"])
        self.loads += in_css(at.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.loads += in_css(data)


def in_css(text: str) -> list[str]:
    """The addresses that a style sheet loads."""
    return [first or second for first, second in _IN_CSS.findall(text)]


def is_elsewhere(address: str) -> bool:
    """Whether a browser would have to leave the site's own folder for it."""
    parts = urlsplit(address.strip())
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def is_sound(link: str) -> bool:
    """Whether an address elsewhere is one at all: http(s) with a host that has a dot or is this machine, or mail."""
    parts = urlsplit(link)
    if parts.scheme == "mailto":
        return "@" in parts.path
    host = parts.hostname or ""
    return parts.scheme in ("http", "https") and ("." in host or host == "localhost") and not re.search(r"\s", link)


def faults(site: Path) -> Iterator[str]:
    """What is wrong with a site, one line for each."""
    pages: dict[Path, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        page = pages[path.resolve()] = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    for path, page in pages.items():
        name = path.relative_to(site.resolve()).as_posix()
        yield from (f"{name}: loads {address}" for address in page.loads if is_elsewhere(address))
        for link in page.links:
            yield from (f"{name}: {fault}" for fault in _of_link(link, path, pages))
    for path in sorted(site.rglob("*.css")):
        name = path.relative_to(site).as_posix()
        yield from (f"{name}: loads {a}" for a in in_css(path.read_text(encoding="utf-8")) if is_elsewhere(a))


def _of_link(link: str, page: Path, pages: dict[Path, _Page]) -> Iterator[str]:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        if not is_sound(link):
            yield f"no address: {link}"
        return
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.exists():
        yield f"leads nowhere: {link}"
    elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
        yield f"no such place on that page: {link}"
