"""For mkdocs: what lies outside docs/ becomes pages of the site, so that links into the repository lead somewhere.

A link to a plugin's README leads to its first backend's page, which ends with that README; a link to any other file
leads to a page that shows the file.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(#[^)]*)?(?=\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
}
PLUGINS = {plugin: list(project["entry-points"]["polyquant.backends"]) for plugin, project in PROJECTS.items()}
"""folder of a plugin -> the backends that it brings."""
NAMES = sorted(path.stem for path in ROOT.glob("docs/backends/*.md") if path.stem != "index")


def on_config(config: Any) -> Any:
    """The backends' pages, as they are there."""
    pages = [{"All": "backends/index.md"}, *({name: f"backends/{name}.md"} for name in NAMES)]
    config.nav = [{"Backends": pages} if "Backends" in entry else entry for entry in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file that a page links to."""
    wanted: set[str] = set()
    for file in files.documentation_pages():
        home, text = place(file.src_uri), expanded(file.src_uri, file.content_string)
        wanted |= {target for found in LINK.finditer(text) if (target := outside(home, found[1]))}
    for target in sorted(wanted):
        files.append(File.generated(config, page_of(target), content=shown(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The page's text with links that lead to pages of the site."""
    uri = page.file.src_uri
    home, text = place(uri), expanded(uri, markdown)
    return re.sub(LINK, lambda found: relative(uri, home, found[1]) + (found[2] or ""), text)


def place(uri: str) -> str:
    """The folder of the repository that a page's links start from."""
    if uri.startswith("source/"):
        return ""
    return posixpath.dirname(f"docs/{uri}")


def expanded(uri: str, text: str) -> str:
    """A backend's page with its README at the end, headings one level down and links as seen from the page."""
    folder, _, name = uri.removesuffix(".md").partition("/")
    if folder != "backends" or name not in NAMES:
        return text
    (plugin,) = (plugin for plugin, backends in PLUGINS.items() if name in backends)
    readme = (ROOT / "plugins" / plugin / "README.md").read_text(encoding="utf-8").partition("\n")[2]
    parts = FENCE.split(readme)
    for index in range(0, len(parts), 2):
        text_part = re.sub(r"^#", "##", parts[index], flags=re.MULTILINE)
        parts[index] = re.sub(LINK, lambda found: f"../../plugins/{plugin}/{found[0]}", text_part)
    head = text.partition("<!-- notes -->")[0]
    return f"{head}\n## The package\n{''.join(parts)}"


def outside(home: str, link: str) -> str:
    """The file of the repository that a link leads to, where the site has no page for it; else empty."""
    target = posixpath.normpath(posixpath.join(home, link))
    inside = target.startswith("docs/") and target.endswith((".md", ".svg", ".png"))
    return "" if inside or readme_of(target) or not (ROOT / target).exists() else target


def readme_of(target: str) -> str:
    """The first backend of the plugin whose README it is, or the empty string."""
    found = re.fullmatch(r"plugins/([^/]+)(?:/README\.md)?", target)
    return PLUGINS[found[1]][0] if found else ""


def page_of(target: str) -> str:
    return f"source/{target}.md"


def relative(uri: str, home: str, link: str) -> str:
    """The link as seen from the page `uri` of the site."""
    if uri.startswith("source/"):
        return link
    target = posixpath.normpath(posixpath.join(home, link))
    if target == "README.md":
        page = "index.md"
    elif name := readme_of(target):
        page = f"backends/{name}.md"
    elif outside(home, link):
        page = page_of(target)
    else:
        page = target.removeprefix("docs/")
    return posixpath.relpath(page, posixpath.dirname(uri) or ".")


def shown(path: Path) -> str:
    """A page that shows a file, or lists a folder."""
    name = path.relative_to(ROOT).as_posix()
    head = f"---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n# {name}\n\n"
    if path.is_dir():
        inside = sorted(each.relative_to(path).as_posix() for each in path.rglob("*")
                        if each.is_file() and "__pycache__" not in each.parts)  # fmt: skip
        return head + "".join(f"- `{each}`\n" for each in inside)
    language = {".py": "python", ".toml": "toml", ".md": "markdown", ".json": "json"}.get(path.suffix, "text")
    text = path.read_text(encoding="utf-8")
    return f'{head}````{language} linenums="1"\n{text.rstrip()}\n````\n'
