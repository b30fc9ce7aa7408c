"""Pages as a browser sees them: parsed without running anything, and loaded by headless Chromium."""

import subprocess
from html.parser import HTMLParser
from pathlib import Path

from tests.support.tools import require_tool

# A script that leaves a trace in the DOM.
RUN = "document.documentElement.setAttribute('data-ran','yes')"
# Text that a careless page would run, hide or reorder.
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</bdi></div><script>{RUN}</script>",
    f"<img src=x onerror={RUN}>",
    f'"><img src=x onerror="{RUN}">',
    f"'><svg onload={RUN}>",
    f'" onmouseover="{RUN}" autofocus onfocus="{RUN}" x="',
    f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    f'<a href="javascript:{RUN}">x</a>',
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<base href=javascript:{RUN}//>",
    f"<meta http-equiv=refresh content='0;url=javascript:{RUN}'>",
    "<style>* { display: none }</style>",
    "<form action=https://198.51.100.7/><input name=q autofocus>",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.exe \u2066hidden\u2069 \u200b\ufeff",
    "line one\nline two\r\x1b[31mred\x07\x00\u2028end",
    "&lt;script&gt; &#60;b&#62; <!-- --> ]]>",
]


class ParsedPage(HTMLParser):
    """Tags, attribute names, text and pictures of a page, as a browser's parser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def dom_in_browser(page: str, folder: Path) -> str:
    """The page's DOM after headless Chromium has loaded it and run what it would run."""
    chromium = require_tool("chromium", "chromium-browser", "google-chrome")
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    command = [str(chromium), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", path.as_uri()], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.decode("utf-8")
