"""Reads the built site: it loads nothing from another host, and every link inside it leads somewhere."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parent.parent.parent / "build" / "site"
LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class Read(HTMLParser):
    """Links, what is loaded, and the places of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if (attribute := LOADING.get(tag)) and given.get(attribute):
            self.loaded.append(str(given[attribute]))


def main() -> None:
    pages = {path: Read(path.read_text(encoding="utf-8")) for path in SITE.rglob("*.html") if path.name != "404.html"}
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(SITE)
        wrong += [f"{name} loads {address}" for address in page.loaded if urlsplit(address).netloc]
        for link in (*page.links, *page.loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                wrong.append(f"{name} links to {link}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                wrong.append(f"{name} links to {link}, and that page has no such place")
    print(f"{len(pages)} pages, {sum(len(page.links) for page in pages.values())} links")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
