"""What an operator sees in a browser: state, map, alarms, a broken sensor, the past, a restart; on a wall, a phone."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
from bundles import along, make_bundle, reading
from servers import body, running, start

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: pip install playwright")
pytest.importorskip("uvicorn", reason="the monitor's server is not installed: pip install 'fem_diffusion[monitor]'")
LOW, HIGH = np.array([-1.0, 0.5, -0.3, 0.2]), np.array([2.5, 0.5, -0.3, 0.2])
PATIENCE = 60_000   # milliseconds
PIXEL = ("(c => [...c.getContext('2d').getImageData(c.width / 3, c.height / 3, 1, 1).data])"
         "(document.getElementById('canvas'))")


def _page(browser, server, asked=None):
    """The page, whose errors fail the test; the addresses that it asks for are added to a list."""
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    if asked is not None:
        page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{server.port}/")
    return page, errors


def _word(page, word):
    """Wait until the page says so."""
    playwright.expect(page.locator("#word")).to_have_text(word, timeout=PATIENCE)


def _pixel(page):
    """A colour in the middle of the map."""
    return page.evaluate(PIXEL)


def test_a_day_of_an_operator(browser, tmp_path):
    server = start(tmp_path, bundle=make_bundle(exponential=True))
    try:
        asked = []
        page, errors = _page(browser, server, asked)
        _word(page, "No reading")
        server.ask("POST", "/api/readings", body(0, reading(LOW, 1)))
        _word(page, "All in order")
        page.wait_for_selector(".card svg .dot")
        playwright.expect(page.locator("#scale")).to_be_visible()
        assert page.locator("#map h2").text_content() == "Emission, mean"
        quiet, number = _pixel(page), page.locator(".number").first.text_content()
        assert quiet[3] == 255 and number.endswith("g/s")

        for i in (1, 2):
            server.ask("POST", "/api/readings", body(60 * i, reading(HIGH, 1 + i)))
        _word(page, "Alarm")      # by itself, within seconds
        playwright.expect(page.locator("#sentences li").first).to_contain_text("Close the valve.")
        playwright.expect(page.locator(".number").first).not_to_have_text(number)
        end = time.monotonic() + PATIENCE / 1000
        while _pixel(page) == quiet and time.monotonic() < end:
            page.wait_for_timeout(200)
        assert _pixel(page) != quiet
        page.get_by_label("Your name").fill("Ada <i>Lovelace</i>")
        page.get_by_role("button", name="Acknowledge").click()
        playwright.expect(page.locator("#alarms li")).to_contain_text("acknowledged by Ada <i>Lovelace</i>")

        broken = reading(HIGH, 4)
        broken[1], broken[3] = np.nan, broken[3] + 30
        for i in (3, 4):
            server.ask("POST", "/api/readings", body(60 * i, broken))
        playwright.expect(page.locator(".number").first).to_have_text("No number")
        playwright.expect(page.locator("#sensors tr").nth(1)).to_contain_text("reports nothing")
        playwright.expect(page.locator("#sensors tr").nth(3)).to_contain_text("unlike the training")
        playwright.expect(page.locator("#alarms li").first).to_contain_text("Do not trust the page")
        playwright.expect(page.locator(".card").first.locator("rect.none")).not_to_have_count(0)

        page.locator(".card svg").first.click(position={"x": 85, "y": 100})     # the first reading
        page.wait_for_selector("#past:not([hidden])")
        _word(page, "All in order")
        with browser.expect_page() as opened:
            page.locator("#report").click()
        assert "State at the reading of" in opened.value.locator(".question").text_content()
        opened.value.close()
        page.locator("#now").click()
        _word(page, "Alarm")

        server.kill()
        playwright.expect(page.locator("#lost")).to_contain_text("does not answer", timeout=PATIENCE)
        _word(page, "No connection")
        assert all(address.startswith((f"http://127.0.0.1:{server.port}/", "data:")) for address in asked)
        assert not [text for text in errors if "ERR_CONNECTION" not in text and "Failed to load" not in text], errors
    finally:
        server.kill()
    with running(tmp_path, "--port", server.port) as server:
        _word(page, "Alarm")      # the page finds the monitor again, and the history is there
        playwright.expect(page.locator("#alarms li").nth(1)).to_contain_text("Ada")
        page.close()


def test_wall_and_phone(browser, tmp_path):
    """Text of the state is 2 cm high from three metres on a wall's screen; nothing runs off a phone's."""
    bundle = make_bundle(exponential=True)
    long = replace(bundle.sensors[0], name="x" * 60)
    with running(tmp_path, bundle=replace(bundle, sensors=(long, *bundle.sensors[1:]))) as server:
        data = body(0, reading(LOW, 1))
        data["values"]["x" * 60] = data["values"].pop("gauge 0")
        server.ask("POST", "/api/readings", data)
        page, errors = _page(browser, server)
        _word(page, "All in order")
        page.wait_for_selector(".card svg .dot")
        size = "parseFloat(getComputedStyle(document.getElementById('{}')).fontSize)"
        page.set_viewport_size({"width": 1920, "height": 1080})
        assert page.evaluate(size.format("word")) >= 90 and page.evaluate(size.format("sentences")) >= 30
        for width in (1920, 390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.locator("#word").bounding_box()["y"] < 400
        assert not errors
        page.close()


def test_lines_have_bands_and_slices_say_where_they_are(browser, tmp_path):
    (tmp_path / "line").mkdir()
    with running(tmp_path / "line", bundle=along(make_bundle())) as server:
        server.ask("POST", "/api/readings", body(0, reading(LOW, 1)))
        page, errors = _page(browser, server)
        page.wait_for_selector("#bands svg .most")
        assert page.locator("#map h2").text_content() == "Flux" and not page.locator("#canvas").is_visible()
        # The line is in two parts, and all sensors stand below it.
        assert page.locator("#bands .middle").count() == 2 and page.locator("#bands .mark").count() == 5
        heights = page.locator("#bands .middle").first.get_attribute("points")
        broken = reading(LOW, 2)
        broken[1] += 30
        server.ask("POST", "/api/readings", body(60, broken))
        playwright.expect(page.locator("#nothing")).to_contain_text("not to be trusted")
        assert page.locator("#bands .most").count() == 0
        server.ask("POST", "/api/readings", body(120, reading(HIGH, 3)))
        page.wait_for_selector("#bands svg .most")
        assert page.locator("#bands .middle").first.get_attribute("points") != heights
        page.set_viewport_size({"width": 360, "height": 800})
        playwright.expect(page.locator("#bands svg")).to_have_attribute("viewBox", re.compile("^0 0 3[0-5]"))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.set_viewport_size({"width": 1280, "height": 900})
        assert not errors
        page.close()
    bundle = make_bundle()
    (tmp_path / "slice").mkdir()
    with running(tmp_path / "slice", bundle=replace(bundle, area=replace(bundle.area, where="at z = 2 m"))) as server:
        server.ask("POST", "/api/readings", body(0, reading(LOW, 1)))
        page, errors = _page(browser, server)
        playwright.expect(page.locator("#scale")).to_be_visible()
        assert page.locator("#map h2").text_content() == "Emission at z = 2 m, mean"
        assert "slice at z = 2 m" in page.locator("#slice").text_content()
        assert not errors
        page.close()


def test_lights_have_shapes_of_their_own_and_contrast():
    """Who sees no colours tells the lights by shape and word; words stand out from the light."""
    from fem_diffusion.monitor import server
    style = (server._ASSETS / "page.css").read_text()
    shapes = re.findall(r'<g class="on-(\w+)">(.*?)</g>', (server._ASSETS / "page.html").read_text(), re.DOTALL)
    assert len(shapes) == 4 and len({shape for _, shape in shapes}) == 4

    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return np.dot([x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055)**2.4 for x in parts],
                      [0.2126, 0.7152, 0.0722])
    pairs = re.findall(r"#state\.(\w+) { --light: (#\w{6}); --on: (#\w{6})", style)
    assert len(pairs) == 4
    for name, back, front in pairs:
        low, high = sorted(map(luminance, (back, front)))
        assert (high + 0.05) / (low + 0.05) > 7, name     # the strictest level of the web's guidelines
