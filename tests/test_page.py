"""The page of a run: what is in its file, and what a browser makes of it.

The second half needs playwright and a Chromium on the PATH, and is skipped where they are missing:

    python3 -m uv run --group browser pytest tests/test_page.py
"""

import base64
import functools
import json
import math
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fake_reports import fake_reports

from snr_adam import History
from snr_adam.telemetry.page import OVER_FLOOR, page

HOSTILE = "</script><img src=x onerror=alert(1)><!--&\u2028\"'"


def data(text: str) -> dict:
    """What the script of the page is given."""
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def matrix(kept: dict, layers: int) -> np.ndarray:
    """A quantity of the layers, (L, T)."""
    return kept["scale"] * np.frombuffer(base64.b64decode(kept["data"]), "<f2").astype(float).reshape(layers, -1)


@functools.cache
def large() -> History:
    return History(fake_reports(1000, 300))


def run(times=6, layers=3, **page_options) -> dict:
    return data(page(History(fake_reports(times, layers)), title="run", **page_options))


def test_it_holds_the_numbers_of_the_history():
    history = History(fake_reports(9, 12))
    found = data(page(history, title="a run"))
    assert found["steps"] == history.steps.tolist()
    assert found["names"] == list(history.names)
    assert (found["title"], found["reports"], found["refresh"]) == ("a run", 9, None)
    for key, values in history.total.items():
        if key != "size":
            np.testing.assert_allclose(np.array(found["total"][key], float), values, rtol=5e-4)
    for key, kept in found["layers"].items():
        x = history.columns
        values = x["pseudo_snr"] / x["floor"] if key == OVER_FLOOR else x[key]
        np.testing.assert_allclose(matrix(kept, 12), values.T, rtol=2**-11)
    assert set(found["layers"]) >= {OVER_FLOOR, "snr", "persistence", "noise_scale"}
    assert "param_rms" not in found["layers"]  # it is nan everywhere
    assert found["says"]["snr"].startswith("The power of the true gradient")


def test_what_is_no_number_stays_none():
    awkward = [math.nan, math.inf, -math.inf, 0.0, -1e-3, 1e30]
    names = tuple("abcdef")
    seen = [SimpleNamespace(step=t, names=names, columns={"x": awkward}, total={"x": awkward[t]}) for t in range(6)]
    found = data(page(History(seen), title=""))
    assert found["total"]["x"][0] is None
    assert found["total"]["x"][1:] == awkward[1:]
    np.testing.assert_allclose(matrix(found["layers"]["x"], 6)[:, 0], [math.nan, math.inf, -math.inf, 0, 0, 1e30])


def test_names_cannot_leave_their_place():
    seen = SimpleNamespace(step=1, names=(HOSTILE, "b"), columns={"snr": [1.0, 2.0]}, total={HOSTILE: 1.0})
    text, plain = page(History([seen]), title=HOSTILE), page(History(fake_reports(1, 2)), title="x")
    for tag in ("</script", "<script", "<img", "<!--"):
        assert text.count(tag) == plain.count(tag)
    found = data(text)
    assert found["names"][0] == found["title"] == HOSTILE
    assert HOSTILE in found["total"]


def test_it_asks_no_network_for_anything():
    text = page(History(fake_reports(2, 2)), title="")
    assert set(re.findall(r"\w+://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_layers_are_in_the_order_of_the_network_and_rounding_is_told():
    names = ("layers_0", "layers_10", "layers_2")
    columns = {"gradient_norm": [1.0, 1e-8, 2.0], "size": [4.0, 4.0, 4.0], "snr_low": [0.1, -1.0, 0.1]}
    seen = [SimpleNamespace(step=t, names=names, columns=columns, total={}) for t in range(5)]
    found = data(page(History(seen), title=""))
    assert found["names"] == ["layers_0", "layers_2", "layers_10"]
    np.testing.assert_allclose(matrix(found["layers"]["gradient_norm"], 3)[:, 0], [1, 2, 1e-8], rtol=1e-2)
    assert found["rounding"] == [2]
    assert [text.split(" in ")[0] for text in found["alarms"]] == [
        "In the last 5 reports (steps 0 to 4) the gradient was nothing but rounding"
    ]


def test_the_batch_is_that_of_the_reports_or_as_told():
    reports = list(fake_reports(3, 2))
    assert (run(3)["batch"], run(3)["unit"]) == ([None] * 3, "batches")
    assert (run(3, batch_size=64)["batch"], run(3, batch_size=64)["unit"]) == ([64] * 3, "examples")
    for report, batch in zip(reports, (8, 8, 16), strict=True):
        report.batch_size = batch
    assert data(page(History(reports), title=""))["batch"] == [8, 8, 16]


def test_a_long_run_of_many_layers_stays_below_3_mb(monkeypatch):
    """It keeps the first and the last report, and at least one quantity."""
    text = page(large(), title="large")
    assert len(text.encode()) < 3e6
    assert {OVER_FLOOR, "snr"} <= set(data(text)["layers"])
    found = run(2500, 2)
    assert (found["reports"], len(found["steps"])) == (2500, 1000)
    assert found["steps"][0::999] == [10, 25_000]
    monkeypatch.setattr("snr_adam.telemetry.page.ROOM", 800)
    found = run(200, 10)
    assert (len(found["layers"]), len(found["steps"]), found["steps"][-1]) == (1, 30, 2000)


def test_the_file_appears_at_once(tmp_path, monkeypatch):
    history, path = History(fake_reports(2, 2)), tmp_path / "runs" / "first.html"
    history.page(path)
    first = path.read_text()
    assert data(first)["title"] == "first"
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        history.page(path, title="second")
    assert path.read_text() == first
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("refresh", [0, -1, math.nan, math.inf])
def test_what_cannot_be_shown_is_refused(refresh, tmp_path):
    with pytest.raises(ValueError, match=r"refresh=.*give a number of seconds"):
        History(fake_reports(1, 1)).page(tmp_path / "x.html", refresh=refresh)
    with pytest.raises(ValueError, match="the history has no reports"):
        History().page(tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is not drawn: playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("the page is not drawn: there is no Chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """Opens the page of a history; at the end nothing may have been complained of, and nothing else been fetched."""
    said, contexts = [], []

    def opened(history, width=1280, scheme="light", **options):
        history.page(tmp_path / "run.html", **options)
        contexts.append(chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}))
        view = contexts[-1].new_page()
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on(
            "request", lambda request: "/run.html" in request.url or request.url == "data:," or said.append(request.url)
        )
        view.goto((tmp_path / "run.html").as_uri())
        return view

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def point(view, layer: int, share: float, layers: int) -> dict:
    """Moves the pointer to a layer of the heat map, so far along its steps."""
    canvas = view.locator("#heat")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    left, height = view.evaluate("[heat.left, heat.H]")
    at = box["x"] + left + share * (box["width"] - left), box["y"] + (layer + 0.5) * height / layers
    view.mouse.move(*at)
    return at


def test_what_is_drawn(show):
    history = History(fake_reports(40, 12))
    view = show(history)
    keys = view.eval_on_selector_all("#charts path[data-key]", "paths => paths.map(path => path.dataset.key)")
    assert {"pseudo_snr", "floor", "snr", "limit", "persistence", "noise_scale", "batch", "effective_step"} <= set(keys)
    assert view.locator("#charts path.band").count() == 3
    assert view.locator("#charts path.least").count() == int(np.isinf(history.total["noise_scale"]).sum())
    assert view.locator("#about").text_content().startswith("40 reports, steps 10 to 400, 12 layers")
    assert view.locator("#alarms").text_content() == "No alarm."
    line = view.locator("path[data-key=pseudo_snr]").get_attribute("d")
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line)]
    np.testing.assert_array_equal(np.argsort(ys), np.argsort(-history.total["pseudo_snr"]))  # higher is above
    row = view.evaluate("[...$('heat').getContext('2d').getImageData(heat.left, heat.H - 4, heat.w, 1).data]")
    brightness = np.array(row).reshape(-1, 4)[:, :3].sum(-1)
    assert brightness[90] > 250 > brightness[-90]  # signal is bright, none is dark


def test_what_the_pointer_shows(show):
    history = History(fake_reports(40, 12))
    view = show(history)
    point(view, 10, 0.51, 12)
    tip = view.locator("#tip")
    assert tip.is_visible()
    shown = tip.inner_text()
    assert shown.startswith("layers/10/kernel\nstep 210\n")
    x = {key: values[20, 10] for key, values in history.columns.items()}
    told = [float(x) for x in re.search(r"floor\t(\S+)\nsnr\t(\S+) \((\S+) to (\S+)\)\n", shown).groups()]
    expected = x["pseudo_snr"] / x["floor"], x["snr"], x["snr_low"], x["snr_high"]
    np.testing.assert_allclose(told, expected, rtol=6e-3)  # three digits
    assert f"pseudo_snr {history.total['pseudo_snr'][20]:.3g}" in view.locator(".legend").first.inner_text()
    assert view.locator("svg text", has_text="step 210").count() == view.locator("#charts svg").count()
    view.mouse.move(2, 2)
    assert not tip.is_visible()
    assert f"pseudo_snr {history.total['pseudo_snr'][-1]:.3g}" in view.locator(".legend").first.inner_text()


def test_a_layer_is_marked_by_click_or_by_keys(show):
    view = show(History(fake_reports(20, 12)))
    view.mouse.click(*point(view, 3, 0.5, 12))
    assert "pseudo_snr of layers/3/kernel" in view.locator(".legend").first.inner_text()
    view.locator("#heat").press("ArrowDown")
    view.locator("#heat").press("Enter")
    assert view.locator("#pinned").inner_text().startswith("in the charts: layers/4/kernel")
    view.locator("#heat").press("Enter")
    assert "layers/4" not in view.locator("#charts").inner_text()
    view.select_option("#quantity", "snr")
    assert view.locator("#high").inner_text().endswith("(logarithmic)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_its_window_in_light_and_dark(show, width, scheme):
    view = show(History(fake_reports(20, 5)), width, scheme)
    assert view.evaluate("document.documentElement.scrollWidth") == width
    back = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_hostile_name_is_text(show):
    seen = SimpleNamespace(step=1, names=(HOSTILE, "b"), columns={"snr": [1.0, 2.0]}, total={"snr": 1.0})
    view = show(History([seen]), title=HOSTILE)
    assert view.locator("h1").text_content() == HOSTILE
    point(view, 0, 0.5, 2)
    assert view.locator("#tip b").text_content() == HOSTILE
    assert view.locator("img").count() == 0


def test_an_open_page_takes_up_what_is_new(show, tmp_path):
    """From a file, without a reload: where one was and what was marked stay."""
    reports = list(fake_reports(40, 12))
    history = History(reports[:20])
    view = show(history, refresh=0.2)
    view.set_viewport_size({"width": 1280, "height": 500})
    view.mouse.click(*point(view, 3, 0.5, 12))
    scroll = view.evaluate("window.mark = scrollY")
    for report in reports[20:]:
        history.append(report)
    history.page(tmp_path / "run.html")
    view.locator("#about", has_text="40 reports").wait_for(timeout=20_000)
    assert view.evaluate("[window.mark, scrollY]") == [scroll, scroll]
    assert view.locator("#pinned").inner_text().startswith("in the charts: layers/3/kernel")
    assert view.locator("iframe").count() == 0  # and it has stopped


def test_300_layers_in_1000_reports_are_drawn_within_2_s(show):
    view = show(large())
    assert view.evaluate("[heat.L, heat.T]") == [300, 1000]
    again = "start => { take($('data').textContent); draw(); return performance.now() - start; }"
    assert view.evaluate(again, view.evaluate("performance.now()")) < 2000


def test_one_report_is_drawn(show):
    view = show(History(fake_reports(1, 1)))
    assert view.locator("#charts svg").count() >= 6
    start = time.monotonic()
    point(view, 0, 0.5, 1)
    assert view.locator("#tip").inner_text().startswith("layers/0/kernel\nstep 10")
    assert time.monotonic() - start < 5
