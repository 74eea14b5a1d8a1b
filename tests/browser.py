"""A headless Chromium for the tests of pages: the distribution's own, or a reason to skip."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Set in every page before its own scripts: what it was refused, and what ran that should not have.
WATCH = """
window.refused = [];
document.addEventListener("securitypolicyviolation", (e) => refused.push(`${e.violatedDirective} ${e.blockedURI}`));
"""
# Whatever a page does with these, nothing may run. Each would set `window.ran`.
HOSTILE = (
    "</script><script>window.ran=1</script>",
    '<img src=x onerror="window.ran=2">',
    "<svg onload='window.ran=3'><details open ontoggle=window.ran=4>",
    '"\' onmouseover="window.ran=5" autofocus onfocus=\'window.ran=6\' x="',
    "{{constructor.constructor('window.ran=7')()}} ${window.ran=8} <%= 1 %> {% raw %}",
    "<!--<script>window.ran=9//--></style></template></textarea></title><script>window.ran=10</script>",
    "<a href=\"javascript:window.ran=11\"><b>link</b></a><iframe srcdoc='<script>parent.ran=12</script>'></iframe>",
    "\u202ertl override\u202c \u2066isolate\u2069 שלום \u0000\u0007\u001b[31m \u2028window.ran=13\u2029 \ufeff\ufffe",
    "<base href=//evil.example/><meta http-equiv=refresh content=0;url=javascript:window.ran=14><form action=x>",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's; skips the test where Playwright or a Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a Chromium on the path, for example: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox cannot be set up by root, as tests in a container run.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, page: Path, address: str = "", **settings: Any) -> Iterator[Any]:
    """A tab with a page of the disk, watched: at the end nothing has run, been refused, failed, or been asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
    context.set_default_timeout(60_000)  # a busy machine is slow, not wrong
    tab = context.new_page()
    failed: list[str] = []
    tab.on("dialog", lambda dialog: (failed.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    tab.on("pageerror", lambda error: failed.append(f"error: {error}"))
    tab.on("console", lambda line: failed.append(f"console: {line.text}") if line.type == "error" else None)
    tab.on("request", lambda request: None if request.url.startswith(page.as_uri()) else failed.append(request.url))
    tab.add_init_script(WATCH)
    tab.goto(page.as_uri() + address)
    yield tab
    failed += map(str, tab.evaluate("refused"))
    ran = tab.evaluate("window.ran")
    context.close()
    assert failed == []
    assert ran is None
