"""The HTML page: what it embeds, and how it behaves in a real browser.

The browser is the system's Chromium with its driver. The page is opened as a file, as a user would open it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from offload.debug.page import contents, page
from offload.debug.record import Cause, Frame, Kind, LoopRecord, Numbers, Report, Stall, Verdict
from offload.debug.report import write

HERE = __file__
HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><!--"


def handler() -> None:
    _ = "the blamed line of the page"


LINE = handler.__code__.co_firstlineno + 1


def make(stalls: int = 12, loops: int = 3, name: str = "handler") -> Report:
    """A session of a minute with that many stalls of every cause, on that many loops."""
    run = Frame("/usr/lib/python3/asyncio/events.py", 80, "Handle._run")
    blamed = Frame(HERE, LINE, name)
    causes = list(Cause)
    made = []
    for number in range(1, stalls + 1):
        cause = causes[number % len(causes)]
        stack = (run, Frame(HERE, 1, f"task_{number % 5}"), blamed)
        duration = 0.06 + number % 9 / 10
        made.append(
            Stall(
                number=number,
                loop=f"loop-{number % loops}",
                began=1_700_000_000.0 + 58 * number / stalls,
                duration=duration,
                threshold=0.05,
                cause=cause,
                kind=Kind.SATURATED if number == 2 else Kind.SLOW,
                verdict=Verdict.FAIL if cause.by_code else Verdict.UNMEASURED,
                frame=blamed,
                innermost=blamed,
                stack=stack,
                stacks=((stack, 3), (stack[:2], 1)),
                task=f"{name}-{number}",
                chain=(stack[1], blamed),
                context={"request": f"r-{number}"},
                syscall="fsync(7)",
                contributors=(("push", 0.05),),
                samples=4,
                numbers=Numbers(cpu=duration * 0.03, wait=duration * 0.9, gc=0.01),
                advice="use `asyncio.sleep`",
            )
        )
    records = tuple(
        LoopRecord(
            name=f"loop-{n}",
            thread=f"thread-{n}",
            iterations=1_000,
            busy=20.0,
            watched=60.0,
            longest=0.9,
            histogram=(0,) * 14 + (900, 90, 9) + (0,) * 10 + (1,),
            timeline=tuple((float(second), second % 10 / 10) for second in range(1, 61)),
        )
        for n in range(loops)
    )
    return Report(1_700_000_000.0, 60.0, 0.05, "3.12.1", "Linux-x86_64", tuple(made), records)


class Reader(HTMLParser):
    """Collects the page's elements, and the texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.get_starttag_text():
            self.scripts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


# ---- without a browser ----


def test_page_refers_to_nothing_outside() -> None:
    """No element loads anything, and the page's policy forbids it."""
    html = page(make())
    for tag, attributes in read(html).elements:
        assert tag not in {"img", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_page_embeds_data_that_cannot_end_its_element() -> None:
    """Hostile names stay data: the page has its two scripts, and the data reads back as it was."""
    html = page(make(name=HOSTILE))
    reader = read(html)
    assert [tag for tag, _ in reader.elements].count("script") == 2
    data = json.loads(reader.scripts[0])
    assert data["stalls"][0]["task"] == f"{HOSTILE}-1"
    assert re.search("<title>[^<]*</title>", html)


def test_page_holds_each_frame_once() -> None:
    """Frames and stacks are numbered, so that their number does not grow with the stalls'."""
    few, many = contents(make(50)), contents(make(1_000))
    assert many["frames"] == few["frames"]
    assert many["stacks"] == few["stacks"]
    assert len(page(make(1_000, 30))) < 1_500_000
    shown = few["stalls"][0]
    assert few["frames"][shown["frame"]][2:] == ("handler", '_ = "the blamed line of the page"')
    assert shown["outside"] == 1


def test_times_of_a_stall_are_kept_from_zero() -> None:
    """A stall at the very beginning, in the first frame, keeps its zeros."""
    frame = Frame(HERE, LINE, "handler")
    stall = Stall(1, "main", 5.0, 0.1, 0.05, frame=frame, stack=(frame,))
    (shown,) = contents(Report(5.0, 1.0, 0.05, "3.12.1", "Linux", (stall,)))["stalls"]
    assert (shown["at"], shown["frame"], shown["stack"]) == (0, 0, 0)


# ---- in a browser ----


class Browser:
    """The system's Chromium; `open` waits until the page has drawn itself."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        flags = "headless no-sandbox disable-gpu no-first-run disable-dev-shm-usage disable-background-networking"
        for flag in [*flags.split(), "disable-component-update", "disable-sync", f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver: Any = webdriver.Chrome(options=options, service=service)

    def open(self, path: Path, fragment: str = "", *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        cdp = self.driver.execute_cdp_cmd
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        cdp("Emulation.setDeviceMetricsOverride", metrics)
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        cdp("Emulation.setEmulatedMedia", {"features": features})
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # what came before is another page's
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + fragment)
        self.settle()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str) -> None:
        """Wait until the script returns what is true; TimeoutException if it never does."""
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 30).until(lambda driver: driver.execute_script(script))

    def settle(self) -> None:
        """Let the page hear of its size and of scrolling, as it does once a frame."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def show(self, element: Any) -> None:
        """Scroll to the element; scrolling hides the hint under the pointer, so not later."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        self.settle()

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def press(self, selector: str, *keys: str) -> None:
        self.driver.find_element("css selector", selector).send_keys(*keys)

    def text(self, selector: str) -> str:
        return str(self.driver.find_element("css selector", selector).text)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements("css selector", selector))

    def requests(self) -> list[str]:
        """Addresses of all that was asked for since `open`."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


def browser_test(function: Any) -> Any:
    """Marks a test that needs the system's Chromium."""
    return pytest.mark.slow(pytest.mark.peer("chromium", "chromedriver")(function))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    pytest.importorskip("selenium")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages on disk: a usual one, one with a thousand stalls, one without any, and one with hostile names."""
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "usual": make(),
        "large": make(1_000, 30),
        "empty": Report(1_700_000_000.0, 60.0, 0.05, "3.12.1", "Linux", (), make().loops),
        "nothing": Report(1_700_000_000.0, 60.0, 0.05, "3.12.1", "Linux"),
        "hostile": make(name=HOSTILE),
    }
    for name, report in reports.items():
        write(report, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in reports}


@browser_test
@pytest.mark.parametrize("name", ["usual", "large", "empty", "nothing", "hostile"])
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_drawn_without_a_complaint(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    """The console is silent, nothing but the file is asked for, nothing sticks out, the colours are the theme's."""
    browser.open(pages[name], width=width, dark=dark)
    assert browser.text("h1")
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "about:"))] == [pages[name].as_uri()]
    assert browser.run("return innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    ground = browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(ground) < 60) if dark else (min(ground) > 200)
    assert browser.run("return window.pwned === undefined")


@browser_test
def test_page_shows_the_session(browser: Browser, pages: dict[str, Path]) -> None:
    """Verdict, causes, each loop's timeline, offenders with source and fix, tree, loops and stalls are there."""
    browser.open(pages["usual"])
    assert browser.text("h1") == "12 stalls, 4.92 s in all"
    assert browser.text(".facts .verdict") == "Fail"
    assert browser.count("#lanes .lane svg") == 3
    assert browser.count("#lanes .stall") == 12
    assert browser.count("#lanes path.busy[d*=M]") == 3
    assert browser.count("#causes-list button") == len(Cause)
    assert "the blamed line of the page" in browser.text("#offenders .code .blamed")
    assert browser.text("#offenders .fix code") == "asyncio.sleep"
    assert browser.count("#tree details[open]") >= 1
    assert browser.count("#loops-body tr") == 3
    assert browser.count("#stalls-body tr") == 12


@browser_test
def test_empty_page_says_that_all_is_well(browser: Browser, pages: dict[str, Path]) -> None:
    """Without stalls the page says so, still shows how busy the loops were, and has no empty sections."""
    browser.open(pages["empty"])
    assert browser.text("h1") == "No stall over 50 ms in 60.0 s"
    assert browser.text(".facts .verdict") == "Pass"
    assert "Nothing blocked a loop" in browser.text("#empty")
    shown = browser.run("return [...document.querySelectorAll('section')].filter(s => !s.hidden).map(s => s.id)")
    assert shown == ["empty", "timeline", "loops"]


@browser_test
def test_details_open_and_close(browser: Browser, pages: dict[str, Path]) -> None:
    """A click on an offender opens the stall's details; the arrows go on to the next; Escape closes them."""
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["usual"])
    browser.click("#offenders [data-open]")
    assert browser.run("return document.getElementById('detail').open")
    number = browser.run("return Number(location.hash.replace('#stall-', ''))")
    detail = browser.text("#detail-body")
    for words in (
        f"Stall {number}",
        "the blamed line of the page",
        f"handler-{number}",
        f"r-{number}",
        "asyncio.sleep",
    ):
        assert words in detail
    browser.press("#close", Keys.ARROW_RIGHT if number < 12 else Keys.ARROW_LEFT)
    assert f"Stall {number + 1 if number < 12 else number - 1}" in browser.text("#detail-title")
    browser.press("#close", Keys.ESCAPE)
    assert not browser.run("return document.getElementById('detail').open")
    browser.until("return location.hash === ''")  # a dialog tells that it was closed a little later
    assert browser.complaints() == []


@browser_test
def test_link_to_a_stall_opens_it(browser: Browser, pages: dict[str, Path]) -> None:
    """An address that ends in #stall-7 shows that stall."""
    browser.open(pages["usual"], "#stall-7")
    assert "Stall 7" in browser.text("#detail-title")


@browser_test
def test_click_on_a_bar_opens_its_stall(browser: Browser, pages: dict[str, Path]) -> None:
    """A bar of the timeline opens the stall that it stands for."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open(pages["usual"])
    bar = browser.driver.find_element("css selector", "#lanes .stall[data-stall='6']")
    browser.show(bar)
    ActionChains(browser.driver).move_to_element(bar).perform()
    assert not browser.run("return document.getElementById('tip').hidden")
    assert "handler" in browser.text("#tip")
    ActionChains(browser.driver).click().perform()
    assert "Stall 6" in browser.text("#detail-title")


@browser_test
def test_timeline_works_with_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    """Arrows walk along the stalls and announce them, Enter opens one, + and 0 zoom."""
    from selenium.webdriver.common.keys import Keys

    browser.open(pages["usual"])
    lane = "#lanes svg[data-loop='loop-0']"
    browser.press(lane, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.run("return document.getElementById('live').textContent").startswith("Stall 6, ")
    wide = "return document.querySelector('#lanes .stall[data-stall=\"6\"]').getBoundingClientRect().width"
    before = browser.run(wide)
    browser.press(lane, "+", "+", "+")
    assert browser.run(wide) != before
    assert browser.run("return document.getElementById('zoom-all').disabled") is False
    browser.press(lane, "0")
    assert browser.run(wide) == before
    browser.press(lane, Keys.ENTER)
    assert "Stall 6" in browser.text("#detail-title")


@browser_test
def test_drag_zooms_into_the_timeline(browser: Browser, pages: dict[str, Path]) -> None:
    """Dragging across a lane zooms to that stretch; the button shows the whole session again."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.open(pages["usual"])
    lane = browser.driver.find_element("css selector", "#lanes svg[data-loop='loop-1']")
    browser.show(lane)
    ActionChains(browser.driver).move_to_element_with_offset(lane, 0, 0).click_and_hold().move_by_offset(
        120, 0
    ).release().perform()
    assert browser.count("#lanes .stall") < 12
    browser.click("#zoom-all")
    assert browser.count("#lanes .stall") == 12


@browser_test
def test_cause_filters_all_sections(browser: Browser, pages: dict[str, Path]) -> None:
    """Choosing a cause keeps only its stalls in the list and the offenders, and fades the others on the timeline."""
    browser.open(pages["usual"])
    browser.click("#causes-list [data-cause=wait]")
    expected = sum(stall.cause is Cause.WAIT for stall in make().stalls)
    assert browser.count("#stalls-body tr") == expected
    assert browser.count("#lanes .stall:not(.dim)") == expected
    assert browser.run("return document.querySelector('[data-cause=wait]').getAttribute('aria-pressed')") == "true"
    browser.click("#all")
    assert browser.count("#stalls-body tr") == 12


@browser_test
def test_tree_opens_to_the_source_line(browser: Browser, pages: dict[str, Path]) -> None:
    """A branch of the stall tree opens with the keyboard, down to the blamed line."""
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    browser.open(pages["usual"])
    (branch, *_) = browser.driver.find_elements("css selector", "#tree details:not([open])")
    assert branch.find_elements("css selector", ".leaf") == []
    branch.find_element("css selector", "summary").send_keys(Keys.ENTER)
    WebDriverWait(browser.driver, 30).until(lambda _: branch.find_elements("css selector", ".leaf code"))
    assert "the blamed line of the page" in branch.find_element("css selector", ".leaf code").text


@browser_test
def test_large_page_is_shown_in_parts(browser: Browser, pages: dict[str, Path]) -> None:
    """A thousand stalls on thirty loops: the first lanes, offenders and rows, and the rest on demand."""
    browser.open(pages["large"], width=375)
    assert browser.count("#lanes .lane") == 12
    browser.click("#more-lanes")
    assert browser.count("#lanes .lane") == 30
    assert browser.count("#lanes .stall") == 1_000
    rows = browser.count("#stalls-body tr")
    browser.click("#more-stalls")
    assert browser.count("#stalls-body tr") == rows + 500
    browser.click("[data-sort=for]")
    assert browser.text("#stalls-body tr:first-child .for") == "860 ms"
    assert browser.run("return document.documentElement.scrollWidth") == 375
    assert browser.complaints() == []


@browser_test
def test_page_passes_basic_rules_of_access(browser: Browser, pages: dict[str, Path]) -> None:
    """Controls have names, ids are unique, headings do not skip a level, and text keeps a contrast of 4.5 to 1."""
    script = """
      const luminance = c => { const v = c.map(x => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; }); return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const parse = text => text.match(/[\\d.]+/g).map(Number);
      const ground = node => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor); if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
      const low = [];
      for (const node of document.querySelectorAll('main *, header *, footer *')) {
        const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
        if (!own || node.closest('svg, [disabled], .verdict') || !node.checkVisibility()) continue;
        const a = luminance(parse(getComputedStyle(node).color)), b = luminance(ground(node));
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) low.push([node.className, node.textContent, ratio]);
      }
      const ids = [...document.querySelectorAll('[id]')].map(node => node.id);
      const levels = [...document.querySelectorAll('h1, h2, h3')].filter(node => node.checkVisibility()).map(node => Number(node.tagName[1]));
      return {
        low, repeated: ids.filter((id, n) => ids.indexOf(id) !== n),
        unnamed: [...document.querySelectorAll('button')].filter(b => b.checkVisibility() && !(b.textContent.trim() || b.getAttribute('aria-label'))).length,
        skips: levels.filter((level, n) => n && level > levels[n - 1] + 1).length, first: levels[0],
        language: document.documentElement.lang,
      };
    """  # noqa: E501
    for dark in (False, True):
        browser.open(pages["usual"], dark=dark)
        found = browser.run(script)
        assert found == {"low": [], "repeated": [], "unnamed": 0, "skips": 0, "first": 1, "language": "en"}


def test_assets_are_part_of_the_package() -> None:
    """The page's template, looks and behaviour are found as the package's data."""
    for name in ("page.html", "page.css", "page.js"):
        assert resources.files("offload.debug").joinpath(name).is_file()
