"""The page in a real Chromium (`make test-page`): two widths, two colour schemes, empty, under load, by keyboard."""

import asyncio
import dataclasses
import json
import shutil
import urllib.request

import pytest

from antefix_console.cli import main
from antefix_console.deployment import Deployment, DeploymentConfig
from tests.gateway.scripted import MODEL

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed: make test-page")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)"),
]
WIDTHS = (390, 1440)


@pytest.fixture
def config(tmp_path):
    return DeploymentConfig(model=MODEL, data_dir=tmp_path / "data", http_address="127.0.0.1:0")


async def pages(browser, url, **options):
    """One page per width and colour scheme, with its console's messages."""
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            context = await browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, **options
            )
            page, said = await context.new_page(), []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            await page.goto(url)
            yield page, width, scheme, said
            await context.close()


async def ask(url, prompt):
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with await asyncio.to_thread(urllib.request.urlopen, request, timeout=120) as answer:
        return json.loads(answer.read())


async def test_empty_and_under_load_at_both_widths(config, tmp_path):
    async with Deployment(config) as deployment, playwright.async_playwright() as driver:
        url = f"http://{deployment.one('router').http_address}"
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        # 1. Empty: each part of the page says that it is empty, and nothing fails.
        async for page, width, scheme, said in pages(browser, f"{url}/ui"):
            await page.wait_for_selector("#all:not([hidden])")
            assert "No request has ended" in await page.inner_text("#t-requests")
            assert await page.locator("#t-roles tbody tr").count() == 2
            assert "No request in this span had a price" in await page.inner_text("#c-saved")
            assert said == [], (width, scheme, said)
        # 2. Under load.
        shared = "to be or not to be, that is the question " * 8
        for number in range(4):
            await ask(url, f"{shared}{number} the canary sings at midnight {number}")
        async for page, width, scheme, said in pages(browser, f"{url}/ui"):
            await page.wait_for_selector("#t-requests tbody tr")
            assert await page.locator("#t-requests tbody tr").count() == 4
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert "canary" not in await page.content()
            assert await contrasts(page) == [], (width, scheme)
            # 3. By keyboard only: go to the first request, open it, read why it missed, close it.
            await page.locator("#t-requests button").first.focus()
            await page.keyboard.press("Enter")
            one = page.locator("#one")
            await one.wait_for(state="visible")
            assert "prompt tokens hit" in await one.inner_text()
            assert await page.evaluate("document.activeElement.id") == "one"
            await page.locator("#t-requests button[aria-expanded=true]").press("Enter")
            assert await one.is_hidden()
            # 4. For screen readers every picture and control has a name, and tables have heads.
            assert await page.evaluate(UNNAMED) == []
            assert said == [], (width, scheme, said)
            await page.screenshot(path=tmp_path / f"page-{width}-{scheme}.png", full_page=True)
        await browser.close()


async def test_a_router_that_goes_away_is_told_and_found_again(config):
    async with Deployment(config) as deployment, playwright.async_playwright() as driver:
        router = deployment.one("router")
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.goto(f"http://{router.http_address}/ui")
        await page.wait_for_selector("#all:not([hidden])")
        await page.route("**/data*", lambda route: route.abort())
        await playwright.expect(page.locator("#state")).to_contain_text("No news", timeout=30_000)
        await page.unroute("**/data*")
        await playwright.expect(page.locator("#state")).to_be_empty(timeout=30_000)
        await browser.close()


async def test_it_asks_for_a_key_and_keeps_it_in_the_tab(config, tmp_path, capsys):
    file = str(tmp_path / "api-keys.json")
    keys = {}
    for name, scopes in (("usual", "generate,usage"), ("admin", "admin")):
        assert (
            await asyncio.to_thread(main, ["keys", "create", name, "--scopes", scopes, "--file", file, "--json"]) == 0
        )
        keys[name] = json.loads(capsys.readouterr().out)[0]["key"]
    async with (
        Deployment(dataclasses.replace(config, api_keys_file=file)) as deployment,
        playwright.async_playwright() as driver,
    ):
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.goto(f"http://{deployment.one('router').http_address}/ui")
        await page.wait_for_selector("#ask:not([hidden])")
        assert await page.evaluate("document.activeElement.id") == "key"
        for wrong, said in (("wrong", "not known"), (keys["usual"], "scope admin")):
            await page.fill("#key", wrong)
            await page.keyboard.press("Enter")
            await playwright.expect(page.locator("#refused")).to_contain_text(said)
        await page.fill("#key", keys["admin"])
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#all:not([hidden])")
        assert await page.evaluate("localStorage.length") == 0 and "key" not in page.url
        await browser.close()


# Pictures, buttons, fields and selects without a name; tables without a head.
UNNAMED = """() => {
  const named = (element) => element.getAttribute("aria-label") || element.textContent.trim()
    || (element.labels && element.labels.length) || element.getAttribute("aria-labelledby");
  const all = [...document.querySelectorAll("svg[role=img], button, input, select, a")];
  const wrong = all.filter((each) => !named(each));
  const bare = [...document.querySelectorAll("table")].filter((each) => !each.querySelector("th[scope=col]"));
  return [...wrong, ...bare].map((each) => each.outerHTML.slice(0, 80));
}"""

# Text whose contrast with the page's background is below 4.5 (WCAG 2.2, level AA).
CONTRASTS = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const low = new Set();
  for (const element of document.querySelectorAll("#all *, header *, footer *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg") || element.offsetParent === null) continue;
    const [one, other] = [light(getComputedStyle(element).color), light(back(element))].sort((a, b) => b - a);
    const text = element.textContent.slice(0, 30);
    if ((one + 0.05) / (other + 0.05) < 4.5) low.add(`${element.tagName} ${element.className}: ${text}`);
  }
  return [...low];
}"""


async def contrasts(page):
    return await page.evaluate(CONTRASTS)
