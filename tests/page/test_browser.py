"""The page in a real browser: it opens from disk, says nothing on the console, fits its window, and can be read.

Needs Chromium and its driver: `pip install playwright`, and a `chromium` on the PATH or named by CHROMIUM.
"""

import os
import shutil

import pytest

from dpo_jax.page.render import write_comparison, write_page
from tests.support.run_folders import HOSTILE, make_run

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CONTRAST = 4.5
"""Least contrast of text that is not large (WCAG 2.2, 1.4.3)."""
CONTRASTS = """() => {
  const parse = text => {
    const found = text.match(/rgba?\\(([^)]*)\\)/);
    const [r, g, b, a = 1] = found ? found[1].split(',').map(Number) : [0, 0, 0, 0];
    return [r, g, b, a];
  };
  const over = (top, under) => top.slice(0, 3).map((c, i) => c * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, style = getComputedStyle(element);
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
    const under = ground(element);
    const ink = over(parse(element.ownerSVGElement ? style.fill : style.color), under);
    const [high, low] = [light(ink), light(under)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.textContent.trim().slice(0, 60)]);
  }
  return found;
}"""
"""Of each text that can be seen: its contrast against what is under it, and how it begins."""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: install it (apt install chromium), or name it by CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as driver:
        # a container has no user namespaces to make a sandbox of; the page is our own
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    calm, hostile = make_run(folder / "calm"), make_run(folder / "hostile", text=HOSTILE + "x" * 400)
    compared = write_comparison([calm, hostile], folder / "several.html", names=["calm", HOSTILE + "y" * 200])
    return {"calm": write_page(calm), "hostile": write_page(hostile), "several": compared}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("name", ["calm", "hostile", "several"])
def test_it_opens_from_disk_fits_and_can_be_read(browser, pages, name, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide')"
    assert page.evaluate(f"[...document.querySelectorAll('body *')].filter({beyond}).length") == 0
    texts = page.evaluate(CONTRASTS)
    assert len(texts) > 200
    assert [text for text in texts if text[0] < CONTRAST] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    drawn = page.evaluate("[...document.querySelectorAll('figure > svg')].map(e => e.getBoundingClientRect().width)")
    assert len(drawn) > 10 and min(drawn) > 250  # so that letters of 11 px at 360 are at least 7.6 px
    page.close()
