"""The page that shows attention maps and kept tokens: its embedded data, and its display in a browser."""

import base64
import io
import json
import re
import shutil
from copy import deepcopy
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
from PIL import Image

from ssmcompress.errors import InputError
from ssmcompress.jobs.explore_page import render_page

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER and find_spec("selenium")), reason="no chromium, chromedriver or selenium"
)
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
NAMES = ("dense", "naive", "aligned", "reconstructed")
AFTER = (5, 11)
COLOURS = ((200, 60, 40), (40, 90, 200), (60, 160, 50))
MARKUP = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!-- {{ 7*7 }}"


def draw(colour) -> str:
    """A picture of one colour, as a data: URL."""
    file = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def make_stages(rows: int, columns: int, seed: int) -> list[dict]:
    """Two stages that each keep half of the patches, by scores that are all different."""
    alive, stages = set(range(rows * columns)), []
    for s in range(len(AFTER)):
        score = {p: (7 * p + 5 * seed + 3 * s) % (rows * columns) for p in alive}
        order = sorted(alive, key=score.get, reverse=True)
        rank = {p: i + 1 for i, p in enumerate(order)}
        alive = set(order[: len(order) // 2])
        grids = ({p: int(p in alive) for p in range(rows * columns)}, score, rank)
        table = [[[grid.get(r * columns + c) for c in range(columns)] for r in range(rows)] for grid in grids]
        stages.append(dict(zip(("kept", "scores", "ranks"), table, strict=True)))
    return stages


def make_value(grid=(4, 6), names=NAMES, labelled=True) -> dict:
    """The data of the page for three images; the first variant is dense.

    The map of variant k is k + 1 times a ramp, but 0.5 at the first patch and 0.25 at the second of all variants.
    """
    rows, columns = grid
    images = []
    for i, colour in enumerate(COLOURS):
        variants = {}
        for k, name in enumerate(names):
            stages = make_stages(rows, columns, k + i) if k else []
            ramp = [[(k + 1) * (r * columns + c) / (rows * columns) for c in range(columns)] for r in range(rows)]
            ramp[0][:2] = [0.5, 0.25]
            if k:
                kept = stages[-1]["kept"]
                ramp = [[x if kept[r][c] else None for c, x in enumerate(row)] for r, row in enumerate(ramp)]
            variants[name] = {
                "predicted": f"class {k}", "probability": 0.5 + k / 10, "right": k != 1 if labelled else None,
                "correlation": 0.6 + k / 10 if k else None, "map": ramp, "stages": stages,
            }  # fmt: skip
        images.append(
            {"name": f"image {i}.png", "group": "first group" if i < 2 else "second group",
             "label": f"label {i}" if labelled else None, "picture": draw(colour), "scale": [0, len(names)],
             "variants": variants}
        )  # fmt: skip
    empty = {"accuracy": None, "correlation": None, "correlation_low": None, "correlation_high": None}
    figures = [empty | ({"accuracy": 90.1 - k} if labelled else {}) for k in range(len(names))]
    for k in range(1, len(names)):
        figures[k] |= {"correlation": 0.71, "correlation_low": 0.65, "correlation_high": 0.83}
    tokens = rows * columns + 1
    return {
        "title": "vim-f0.60", "architecture": "vim", "method": "row", "layers": [6, 7, 8], "reader": "the class token",
        "grid": list(grid),
        "stages": [
            {"after": after, "kept": (tokens - 1) // 2 ** (s + 1) + 1, "of": tokens, "importance": "clip"}
            for s, after in enumerate(AFTER if len(names) > 1 else ())
        ],
        "variants": [{"name": name, "figures": f} for name, f in zip(names, figures, strict=True)],
        "data": {"name": "test data", "images": 1000, "labelled": labelled}, "rule": "The first three.",
        "kept_share": {name: [[0.25] * columns for _ in range(rows)] for name in names[1:]}, "images": images,
    }  # fmt: skip


def make_hostile(text: str, own_property: str = "__proto__") -> dict:
    """A value in which every text is `text`; one variant has the name of a property that all objects have."""
    value = make_value(names=(text + "0", text + "1", text + "2", own_property))
    for key in ("title", "architecture", "method", "reader", "rule"):
        value[key] = text
    value["data"]["name"] = text
    for stage in value["stages"]:
        stage["importance"] = text
    for image in value["images"]:
        image["name"] = image["group"] = image["label"] = text
        for variant in image["variants"].values():
            variant["predicted"] = text
    return value


# ---- Without a browser


class Scripts(HTMLParser):
    """The contents of the <script> elements of a page, by id."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open = {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.open = dict(attrs).get("id", "") if tag == "script" else None
        if self.open is not None:
            assert self.open not in self.found
            self.found[self.open] = ""

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open is not None:
            self.found[self.open] += data


@pytest.mark.parametrize(
    "text", ["plain", MARKUP, "control \x00\x1b\n\u2028\u202e", "half a pair \udc80", "שלום مرحبا", "x" * 10_000]
)
def test_what_is_embedded_parses_back_to_the_value(text):
    value = make_hostile(text)
    page = render_page(value)
    scripts = Scripts(page).found
    assert json.loads(scripts["value"]) == value
    assert set(scripts) == {"", "value"}
    page.encode()  # no half of a surrogate pair is left to fail when the page is written


def test_the_page_names_no_address_and_allows_none():
    page = render_page(make_value())
    assert not re.search(r"https?:|src=|url\(|@import|<base", page)
    assert re.search(r"""http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;""", page)
    assert 'rel="icon" href="data:,"' in page
    assert re.search("<noscript>.*JavaScript", page)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_by_place(number):
    value = make_value()
    value["images"][1]["variants"]["naive"]["map"][2][3] = number
    with pytest.raises(InputError, match=rf"images\[1\]\.variants\.naive\.map\[2\]\[3\]: found {number}, expected"):
        render_page(value)


# ---- In a browser


class Page:
    """A page in a browser, with the queries and actions of the tests."""

    def __init__(self, driver):
        self.driver = driver

    def ask(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def resize(self, width: int, height: int = 900) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        # Observers of sizes have run before the second frame.
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def text(self, selector: str) -> str:
        return self.ask("return document.querySelector(arguments[0]).textContent", selector)

    def check(self, group: str, text: str) -> None:
        """Click the radio button of a group by its text; one that is covered or not shown cannot be clicked."""
        self.driver.find_element(
            "xpath", f"//fieldset//label[.//input[@name='{group}'] and normalize-space(.)='{text}']"
        ).click()

    def checked(self, group: str) -> str:
        return self.ask(f"return document.querySelector('input[name={group}]:checked').value")

    def set_stage(self, stage: int) -> None:
        self.ask(
            "const s = document.getElementById('stage'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            stage,
        )

    def panels(self) -> list[str]:
        """The names of the variants that are shown."""
        return self.ask(
            "return [...document.querySelectorAll('.panel')].filter(p => p.offsetWidth).map(p => p.dataset.variant)"
        )

    def readout(self, variant: str) -> list[str]:
        return self.ask(
            "return [...document.querySelectorAll(`.panel[data-variant=${arguments[0]}] .readout span`)]"
            ".map(e => e.textContent)",
            variant,
        )

    def colour(self, variant: str, r: int, c: int) -> list[float]:
        """The mean colour of the middle of a patch, as drawn: the outline of the patch is no part of the canvas."""
        return self.ask(
            """const [variant, r, c, rows, columns] = arguments;
            const canvas = document.querySelector(`.panel[data-variant=${variant}] canvas`);
            const w = canvas.width / columns, h = canvas.height / rows;
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [.6 * w, .6 * h];
            copy.getContext("2d").drawImage(canvas, (-c - .2) * w, (-r - .2) * h);
            const data = copy.getContext("2d").getImageData(0, 0, copy.width, copy.height).data;
            const sum = [0, 0, 0];
            data.forEach((x, i) => { if (i % 4 < 3) sum[i % 4] += x; });
            return sum.map(x => x / (data.length / 4));""",
            *(variant, r, c, 4, 6),
        )

    def brightness_by(self, variant: str, grid, kept) -> list[float]:
        """Of the patches that are kept, sorted by their values in a grid."""
        patches = sorted((grid[r][c], r, c) for r in range(4) for c in range(6) if kept[r][c])
        return [sum(w * x for w, x in zip((3, 6, 1), self.colour(variant, r, c), strict=True)) for _, r, c in patches]

    def hover(self, variant: str, r: int, c: int, grid=(4, 6)) -> None:
        from selenium.webdriver import ActionChains

        frame = self.driver.find_element("css selector", f".panel[data-variant={variant}] .frame")
        width, height = frame.size["width"], frame.size["height"]
        x, y = ((c + 0.5) / grid[1] - 0.5) * width, ((r + 0.5) / grid[0] - 0.5) * height
        ActionChains(self.driver, duration=0).move_to_element_with_offset(frame, round(x), round(y)).perform()

    def press(self, *keys: str, held: str = "") -> None:
        from selenium.webdriver import ActionChains

        actions = ActionChains(self.driver, duration=0)
        if held:
            actions.key_down(held)
        actions.send_keys(*keys)
        if held:
            actions.key_up(held)
        actions.perform()

    def overflow(self) -> int:
        """How many pixels the page is wider than the window."""
        return self.ask("return document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for option in [*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def open_page(driver, tmp_path):
    """Show a value in the browser; afterwards, the console is empty and nothing but the file was requested."""
    file = tmp_path / "index.html"

    def open_page(value: dict, width: int = 1280, fragment: str = "") -> Page:
        file.write_text(render_page(value), encoding="utf-8")
        page = Page(driver)
        page.resize(width)
        driver.get("about:blank")
        driver.get(file.as_uri() + fragment)
        return page

    for log in ("browser", "performance"):
        driver.get_log(log)
    yield open_page
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # Chromium asks for pages of its own, such as the one of a new tab.
    urls = {each["request"]["url"] for each in sent if each["documentURL"].startswith("file:")}
    assert {url for url in urls if not url.startswith("data:")} == {file.as_uri()}
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in loaded if not url.startswith("data:")] == []


def is_grey(colour) -> bool:
    return max(colour) - min(colour) < 4


def find_patches(value: dict, name: str, stage: int, image: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
    """A patch that is kept by a stage and has a value, and one that the stage itself drops."""
    variant = value["images"][image]["variants"][name]
    kept = variant["stages"][stage - 1]["kept"]
    before = variant["stages"][stage - 2]["kept"] if stage > 1 else [[1] * 6] * 4
    patches = [(r, c) for r in range(4) for c in range(6)]
    left = next((r, c) for r, c in patches if variant["map"][r][c] is not None)
    return left, next((r, c) for r, c in patches if before[r][c] and not kept[r][c])


@needs_browser
def test_switches_change_what_is_shown(open_page):
    value = make_value()
    page = open_page(value)
    assert page.panels() == list(NAMES)
    assert [page.checked(group) for group in ("image", "variant", "overlay")] == ["0", "-1", "attention"]
    assert page.text("#stage-text").startswith("after layer 11: 7 of 25 kept")
    (r, c), (gone_r, gone_c) = find_patches(value, "naive", 2)

    naive = value["images"][0]["variants"]["naive"]
    kept, scores = naive["stages"][1]["kept"], naive["stages"][1]["scores"]
    assert not is_grey(page.colour("naive", r, c))
    brightness = page.brightness_by("naive", naive["map"], kept)
    assert brightness == sorted(brightness)
    assert brightness[-1] > brightness[0] + 100
    assert is_grey(page.colour("naive", gone_r, gone_c))
    assert not is_grey(page.colour("dense", gone_r, gone_c))

    page.check("overlay", "kept tokens")
    assert page.colour("naive", r, c) == list(COLOURS[0])
    assert is_grey(page.colour("naive", gone_r, gone_c))
    page.set_stage(1)
    assert page.text("#stage-text").startswith("after layer 5: 13 of 25 kept")
    assert page.colour("naive", gone_r, gone_c) == list(COLOURS[0])
    page.set_stage(0)
    assert page.text("#stage-text") == "all tokens"
    assert all(page.colour("naive", r, c) == list(COLOURS[0]) for r in range(4) for c in range(6))

    page.check("overlay", "score")
    assert "Scores begin with the first stage" in page.text(".panel[data-variant=naive] .note")
    page.set_stage(2)
    brightness = page.brightness_by("naive", scores, kept)
    assert brightness == sorted(brightness)
    assert brightness[-1] > brightness[0] + 100
    assert str(max(x for row in scores for x in row if x is not None)) in page.text("#legend")

    page.check("variant", "aligned")
    assert page.panels() == ["aligned"]
    assert "class 2 70.0% ✓ right" in page.text(".panel[data-variant=aligned] figcaption")
    page.check("variant", "naive")
    assert page.panels() == ["naive"]
    assert "class 1 60.0% ✗ wrong" in page.text(".panel[data-variant=naive] figcaption")
    assert "0.70" in page.text(".panel[data-variant=naive] figcaption")

    page.check("overlay", "kept tokens")
    page.driver.find_element("css selector", "#images label:has(input[value='1'])").click()
    assert page.text("#name") == "image 1.png"
    assert page.text("#label") == "label: label 1"
    (r, c), _ = find_patches(value, "naive", 2, image=1)
    assert page.colour("naive", r, c) == list(COLOURS[1])

    page.driver.refresh()
    assert page.text("#name") == "image 1.png"
    assert page.panels() == ["naive"]
    assert page.checked("overlay") == "kept"


@needs_browser
def test_pointing_at_a_patch_tells_its_values(open_page):
    value = make_value()
    page = open_page(value)
    variant = value["images"][0]["variants"]["aligned"]
    (r, c), (gone_r, gone_c) = find_patches(value, "aligned", 2)
    for stage, of in ((1, 24), (2, 12)):
        page.set_stage(stage)
        page.hover("aligned", r, c)
        grids = variant["stages"][stage - 1]
        assert page.readout("aligned") == [
            f"row {r + 1}, column {c + 1}",
            f"attention {variant['map'][r][c]:.3g}",
            f"score {grids['scores'][r][c]}, rank {grids['ranks'][r][c]} of {of}",
            "kept to the end",
        ]
    assert page.readout("dense")[::2] == [f"row {r + 1}, column {c + 1}", "kept: nothing is dropped"]
    page.hover("naive", gone_r, gone_c)
    assert page.readout("aligned")[1] == "attention: none"
    assert page.readout("aligned")[3] == "dropped after layer 11"
    early = next((r, c) for r in range(4) for c in range(6) if not variant["stages"][0]["kept"][r][c])
    page.hover("naive", *early)
    assert page.readout("aligned")[2:] == ["not scored: dropped before", "dropped after layer 5"]
    assert page.text("#announce") == ""  # pointer movements are not announced


@needs_browser
def test_the_keyboard_alone_does_all_of_it(open_page):
    from selenium.webdriver import Keys

    page = open_page(make_value())

    def tab() -> str:
        """Go on to the next control, which shows that it is in focus; return its name, id or role."""
        page.press(Keys.TAB)
        return page.ask("""
            const e = document.activeElement, outlined = x => x && parseFloat(getComputedStyle(x).outlineWidth) >= 2
              && getComputedStyle(x).outlineStyle !== "none";
            if (!outlined(e) && !outlined(e.nextElementSibling)) throw new Error("no visible focus: " + e.outerHTML);
            return e.name || e.id || e.getAttribute("role") || e.className;""")

    assert tab() == "skip"
    assert tab() == "image"
    page.press(Keys.ARROW_RIGHT)
    assert page.text("#name") == "image 1.png"
    assert tab() == "variant"
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.panels() == ["naive"]
    assert tab() == "overlay"
    page.press(Keys.ARROW_RIGHT)
    assert page.checked("overlay") == "kept"
    assert tab() == "stage"
    page.press(Keys.ARROW_LEFT)
    assert page.text("#stage-text").startswith("after layer 5")
    assert page.ask("return document.activeElement.ariaValueText").startswith("after layer 5")
    assert tab() == "gridcell"
    page.press(Keys.HOME, held=Keys.CONTROL)
    assert page.readout("naive")[0] == "row 1, column 1"
    for keys, place in (
        ((Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT), "row 2, column 3"),
        ((Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_LEFT), "row 1, column 2"),
        ((Keys.END, Keys.ARROW_RIGHT), "row 1, column 6"),
        ((Keys.PAGE_DOWN, Keys.ARROW_DOWN), "row 4, column 6"),
        ((Keys.HOME,), "row 4, column 1"),
    ):
        page.press(*keys)
        assert page.readout("naive")[0] == place
        # What is announced, and what the cell in focus is called, is what can be read.
        assert page.text("#announce") == "; ".join(page.readout("naive"))
        assert page.ask("return document.activeElement.ariaLabel") == page.text("#announce")
    assert page.ask("return [document.activeElement.ariaColIndex, document.activeElement.parentNode.ariaRowIndex]") == [
        "1",
        "4",
    ]
    box = page.ask("""const box = e => e.getBoundingClientRect(), cell = box(document.activeElement);
        const frame = box(document.activeElement.closest(".frame"));
        return [(cell.left - frame.left) / frame.width, (frame.bottom - cell.bottom) / frame.height]""")
    assert box == pytest.approx([0, 0], abs=0.01)
    assert tab() == "region"


@needs_browser
@pytest.mark.parametrize("text", ["plain", "long " + "x" * 10_000, MARKUP])
def test_nothing_is_wider_than_a_phone_or_a_screen(open_page, text):
    value = make_hostile(text, own_property="constructor")
    page = open_page(value, width=360)
    assert len(page.panels()) == 1
    for overlay in ("attention map", "kept tokens", "score"):
        page.check("overlay", overlay)
        assert page.overflow() == 0
    assert page.ask("return document.querySelector('.panel:not([hidden]) .frame').clientWidth") > 300
    page.resize(1280)
    assert len(page.panels()) == 4
    assert page.overflow() == 0
    boxes = page.ask("""return [...document.querySelectorAll('.panel .frame')].map(e => e.getBoundingClientRect())
        .map(b => [b.top, b.width, b.left])""")
    tops, widths, lefts = zip(*boxes, strict=True)
    assert len(set(tops)) == 1
    assert min(widths) > 180
    assert list(lefts) == sorted(set(lefts))
    assert max(page.ask("return [...document.querySelectorAll('h1, h2, h3')].map(e => e.clientHeight)")) < 80
    long = text.startswith("long")
    assert page.driver.find_element("id", "whole").is_displayed() == long
    if long:
        page.driver.find_element("id", "whole").click()
        assert page.ask("return document.getElementById('name').clientHeight") > 150
        assert page.overflow() == 0


@needs_browser
def test_hostile_texts_are_shown_as_text(open_page):
    page = open_page(make_hostile(MARKUP))
    assert page.ask("return document.scripts.length") == 2
    assert page.ask("return document.querySelectorAll('img').length") == len(COLOURS)
    shown = {
        "h1": MARKUP, "#name": MARKUP, "#label": f"label: {MARKUP}", "#rule": MARKUP, "#images legend": MARKUP,
        ".panel h3": f"{MARKUP}0", "#image-table td": MARKUP, "#set-table tbody th": f"{MARKUP}0",
        "#variants label:nth-child(2)": f"{MARKUP}0", ".panel:last-child h3": "__proto__",
    }  # fmt: skip
    assert {selector: page.text(selector) for selector in shown} == shown
    assert all(MARKUP in page.text(selector) for selector in ("#about", "#set-text", "#panels", "#shares"))
    assert page.driver.title == MARKUP
    assert "80.0% ✓ right" in page.text(".panel:last-child figcaption")

    text = "a\x1b[31m\u202egnp.exe\nשלום"
    page = open_page(make_hostile(text))
    assert page.text("#name") == page.text("#image-table td") == "a\\x1b[31m\\u202egnp.exe\\x0aשלום"
    assert "\u202e" not in page.ask("return document.body.innerText + document.title")


@needs_browser
def test_one_scale_of_colours_for_all_variants(open_page):
    value = make_value()
    for image in value["images"]:
        for variant in image["variants"].values():
            variant["map"][0][:2] = [0.5, 0]
            for stage in variant["stages"]:
                stage["kept"][0][:2] = [1, 1]
    page = open_page(value)
    colours = [[page.colour(name, 0, c) for name in NAMES] for c in (0, 1)]
    assert all(colour == row[0] for row in colours for colour in row)
    assert colours[0][0] != colours[1][0]
    assert page.text("#legend").startswith("04attention")  # the ends of the scale of the image
    assert "white" not in page.text("#legend")

    page = open_page({**value, "scale": [-1, 0.5]})
    assert page.text("#legend").startswith("-1≥ 1attention")  # values up to 3 are there
    assert "white is 0" in page.text("#legend")
    assert is_grey(page.colour("naive", 0, 1))
    assert page.colour("naive", 0, 0)[0] > page.colour("naive", 0, 0)[2] + 50


@needs_browser
def test_a_dense_model_and_images_without_labels(open_page):
    value = make_value(names=("dense",), labelled=False)
    page = open_page(value)
    assert page.panels() == ["dense"]
    page.hover("dense", 1, 2)
    assert page.readout("dense") == ["row 2, column 3", "attention 0.333", "kept: nothing is dropped"]
    for hidden in ("variant-set", "stage-set", "overlays", "set-table", "shares-set"):
        assert not page.driver.find_element("id", hidden).is_displayed(), hidden
    shown = page.ask("return document.body.innerText")
    assert "no label" in shown
    assert not re.search("right|wrong|dropped$|null|undefined|NaN", shown.replace("copyright", ""))

    value = make_value(labelled=False)
    value["images"][0]["variants"]["naive"]["right"] = False  # compared with the dense model
    value["judged"] = "images with the same class"
    value["variants"][1]["figures"]["accuracy"] = 71.5
    page = open_page(value)
    assert "✗ not as dense" in page.text(".panel[data-variant=naive] figcaption")
    assert "images with the same class" in page.text("#set-table")
    assert "71.5%" in page.text("#set-table")
    assert not re.search("right|wrong|null|undefined|NaN", page.ask("return document.body.innerText"))
    assert "0.65 to 0.83" in page.text("#set-table")
    assert "accuracy" not in page.text("#set-table")


@needs_browser
def test_a_large_grid_that_is_not_square(open_page):
    from selenium.webdriver import Keys

    value = make_value(grid=(40, 30))
    page = open_page(value)
    page.driver.find_element("css selector", ".panel[data-variant=naive] .frame").click()
    page.press(Keys.END, held=Keys.CONTROL)
    assert page.readout("naive")[0] == "row 40, column 30"
    page.hover("naive", 39, 0, grid=(40, 30))
    assert page.readout("naive")[0] == "row 40, column 1"
    assert page.overflow() == 0
    page.resize(360)
    assert page.overflow() == 0


def test_values_are_not_changed():
    value = make_hostile("a\x1b")
    before = deepcopy(value)
    render_page(value)
    assert value == before
