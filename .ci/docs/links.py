"""Follow every link between the pages of a built site.   usage: python .ci/docs/links.py FOLDER"""
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    "What a page links to, and the places in it that can be linked to."
    def __init__(self, path):
        super().__init__()
        self.to, self.places = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value: self.to.add(value)
            if name == "id" or (tag == "a" and name == "name"): self.places.add(value)


def broken(
    folder, # of the built site
)->list: # "page: link", of those that lead nowhere, or out of the site
    "Links, images, scripts and anchors that are not there; other hosts are not asked."
    folder, wrong = Path(folder).resolve(), []
    pages = {p: Page(p) for p in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        for link in sorted(page.to):
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            to = (path.parent/unquote(url.path)).resolve() if url.path else path
            there = (to.is_relative_to(folder) and to.is_file()
                and (not url.fragment or to not in pages or unquote(url.fragment) in pages[to].places))
            if not there: wrong.append(f"{path.relative_to(folder)}: {link}")
    return wrong


if __name__ == "__main__":
    found = broken(sys.argv[1])
    print(*found, sep="\n", file=sys.stderr)
    sys.exit(bool(found))
