"""The web page with the real service, in a real browser."""

import pytest
from chromium import ARGS, CHROMIUM
from served import Reasoner

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 360)])
def test_a_question_is_typed_submitted_and_answered_with_ranked_candidates(
    reasoner: Reasoner, scheme, width, tmp_path_factory
):
    errors, elsewhere = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: request.url.startswith(reasoner.url) or elsewhere.append(request.url))
        page.goto(reasoner.url)
        page.locator("#key").fill(reasoner.key)
        page.locator("#key").press("Enter")
        page.locator("#examples button").first.wait_for()
        page.locator("#question").fill(reasoner.problems[0] + " <script>alert(1)</script>")
        page.locator("#settings > summary").click()
        page.locator("#n").fill("6")
        page.locator("#seed").fill("11")
        page.locator("#ask").click()
        page.locator("#candidates .winner").wait_for(timeout=60_000)
        ranked = page.locator("#candidates > li")
        scores = [float(text.split()[-1]) for text in page.locator("#candidates .score").all_inner_texts()]
        assert 3 <= ranked.count() <= 6
        assert len(scores) == ranked.count()
        assert "candidates" in page.locator("#explanation").inner_text()
        assert "<script>alert(1)</script>" in page.locator("#asked").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(",")) < 200
        assert dark == (scheme == "dark")
        page.screenshot(path=str(tmp_path_factory.mktemp("page") / f"{scheme}.png"), full_page=True)
        browser.close()
    assert not errors
    assert not elsewhere
