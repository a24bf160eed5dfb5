"""The page of ddpm.compare report= in a real browser; skipped where there is none.

It opens, sorts, filters, hovers and picks without a message on the console.
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from synthetic_runs import write_run

from ddpm.compare import report, tables
from ddpm.runs.folder import RunFolder
from ddpm.runs.reader import read

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("plotly")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here"),
]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1280,900"),
]
EVIL = (
    "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
)
LRS = [1e-4, 1e-3, 1e-2]
RUNS = int(os.environ.get("DDPM_REPORT_RUNS", "150"))  # of the page that must open and scroll


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(120)
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def made(runs: Path, to: Path) -> Path:
    found = [read(run) for run in tables.find(str(runs), "outputs")[0]]
    report.write(to, tables.sort_runs(found), str(runs))
    return to


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    """Three learning rates x two seeds x two batch sizes, plus three odd runs.

    One is called <script> and failed with a script as its error, one has a NaN, one is damaged.
    """
    folder, template = tmp_path_factory.mktemp("runs"), RunFolder(run_folder)
    for lr in LRS:
        for batch in (8, 16):
            for seed in (0, 1):
                write_run(
                    template,
                    folder / f"{lr}_{batch}_{seed}",
                    {"optimizer.lr": lr, "training.batch_size": batch, "seed": seed},
                    level=1 + lr * 10 + seed / 9,
                    figures={200: 90.0, 400: 40 + 3 * LRS.index(lr) + batch / 8 + seed},
                    previews={100: 4, 400: 4},
                    costs=lr < 1e-2,
                    num_records=40,
                )
    write_run(template, folder / "<script>alert(1)<", {"optimizer.lr": 1.0, "training.precision": EVIL}, record={"status": "failed", "error": EVIL}, figures={400: 39.0})  # fmt: skip
    nan = write_run(template, folder / "nan", {"optimizer.lr": 2.0, "training.grad_clip": None})
    with (nan / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "train/loss": NaN, "train/grad_norm": Infinity}\n')
    half = write_run(template, folder / "half", {"optimizer.lr": 3.0})
    (half / "run.json").write_text('{"status": "comp')
    return made(folder, folder / "report.html")


@pytest.fixture
def opened(browser, page):
    """The page, freshly opened; after each test the console must be empty."""
    browser.get_log("browser")
    browser.get(page.as_uri())
    yield browser
    # no script of a run folder has changed it
    assert browser.title == "ddpm: runs side by side"
    assert browser.get_log("browser") == []


def column(browser, name):
    """The texts of a table column, from top to bottom."""
    return browser.execute_script(
        "const at = [...document.querySelectorAll('#rows thead tr:nth-child(2) th')].findIndex("
        "th => th.firstChild.dataset.sort === arguments[0]);"
        "return [...document.querySelectorAll('#rows tbody tr')].map(row => row.children[at].innerText)",
        name,
    )


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)
    settle(browser)


def enter(browser, selector, value):
    """Sets an input or a select as a user would."""
    browser.execute_script(
        "const e = document.querySelector(arguments[0]);"
        "if (e.type === 'checkbox') e.checked = arguments[1]; else e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}));"
        "e.dispatchEvent(new Event('change', {bubbles: true}))",
        selector,
        value,
    )
    settle(browser)


def settle(browser):
    """Waits until the browser has drawn what is pending."""
    browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)))"
    )


def show(browser, section):
    browser.execute_script("document.querySelector(arguments[0]).scrollIntoView()", section)
    browser.execute_async_script(
        "const [section, done] = arguments; let left = 100;"
        "const look = () => document.querySelector(section + ' .main-svg') || !--left ? setTimeout(done, 100) : setTimeout(look, 50);"
        "look()",
        section,
    )


FIGURE = "fid@1k:train:inception:ddim50:ema"


def test_every_column_sorts_up_and_down_with_nothing_last(opened):
    enter(opened, "#together", False)
    keys = opened.execute_script("return [...document.querySelectorAll('#rows button[data-sort]')].map(b => b.dataset.sort)")  # fmt: skip
    assert {"optimizer.lr", "training.grad_clip", "status", "loss", "loss best", FIGURE} <= set(
        keys
    )
    for key in keys:
        values = [
            opened.execute_script(
                'document.querySelector(`button[data-sort="${CSS.escape(arguments[0])}"]`).click();'
                "return [...document.querySelectorAll('#rows tbody tr')].map(row => arguments[0] === 'label' ? RUNS[row.dataset.run].label : valueOf(row.dataset.run, arguments[0]))",
                key,
            )
            for _ in ("up", "down")
        ]
        for down, found in enumerate(values):
            numbers = [value for value in found if isinstance(value, int | float)]
            assert numbers == sorted(numbers, reverse=bool(down)), key
            assert found[: len(numbers)] == numbers, key
            nothing = [value for value in found if value is None]
            assert found[len(found) - len(nothing) :] == nothing, key
        assert sorted(map(str, values[0])) == sorted(map(str, values[1])), key


def test_seeds_are_a_row_with_mean_and_deviation_that_unfolds(opened):
    # two of the odd runs have no second seed, and the damaged one cannot be read
    assert column(opened, "seed").count("0") == 2
    means = [text for text in column(opened, FIGURE) if "±" in text]
    assert means[0] == "41.5 ± 0.71"
    before = len(column(opened, "seed"))
    # a key press must keep the focus
    opened.find_element("css selector", "#rows .fold").send_keys(" ")
    settle(opened)
    assert len(column(opened, "seed")) == before + 2
    assert opened.execute_script("return document.activeElement.className") == "fold"


def test_filters_take_text_and_comparisons_and_the_charts_follow(opened):
    enter(opened, "#together", False)
    enter(opened, "input[data-filter='optimizer.lr']", "<=0.001")
    assert set(column(opened, "optimizer.lr")) == {"0.0001", "0.001"}
    enter(opened, "input[data-filter='training.batch_size']", "=8")
    assert len(column(opened, "seed")) == 4
    assert opened.execute_script("return drawn().length") == 4
    enter(opened, "input[data-filter='optimizer.lr']", "")
    enter(opened, "input[data-filter='training.batch_size']", "")
    enter(opened, "input[data-filter='status']", "failed|unreadable")
    assert len(column(opened, "status")) == 2
    click(opened, "#clear-filters")
    assert len(column(opened, "status")) == 15


def test_picked_rows_are_what_curves_pictures_and_runs_show(opened):
    show(opened, "#curves")
    drawn = "return [...new Set(document.querySelector('#panels .chart').data.flatMap(t => t.customdata || []))].filter(r => r !== null)"
    enter(opened, "#band", False)
    assert len(opened.execute_script(drawn)) == 14  # the damaged run has no curve
    enter(opened, "#together", False)
    box = opened.find_element("css selector", "#rows tbody tr:nth-child(2) input")
    box.send_keys(" ")  # a key press must keep the focus
    settle(opened)
    assert opened.execute_script("const a = document.activeElement; return [a.type, a.checked]") == ["checkbox", True]  # fmt: skip
    assert len(opened.execute_script(drawn)) == 1
    assert opened.execute_script("return [document.querySelectorAll('#strips img').length, document.querySelectorAll('#each > details').length]") == [1, 1]  # fmt: skip
    click(opened, "#pick-none")
    assert len(opened.execute_script(drawn)) == 14


def test_hovering_a_curve_names_the_run_and_the_value_and_marks_its_row(opened):
    show(opened, "#curves")
    enter(opened, "#together", False)
    enter(opened, "#band", False)
    place = opened.execute_script(
        "const chart = document.querySelector('#panels .chart'), box = chart.getBoundingClientRect();"
        "const {xaxis, yaxis} = chart._fullLayout, {x, y} = chart.data.at(-1);"
        "return {x: box.left + xaxis._offset + xaxis.d2p(x[3]), y: box.top + yaxis._offset + yaxis.d2p(y[3])}"
    )
    for shift in (-1, 0):
        opened.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": place["x"] + shift, "y": place["y"]})  # fmt: skip
        settle(opened)
    said = opened.execute_script("return document.querySelector('#panels .hoverlayer').textContent")
    (marked,) = opened.execute_script("return [...document.querySelectorAll('#rows tr.pointed')].map(row => +row.dataset.run)")  # fmt: skip
    label, value = opened.execute_script("const curve = panels[0].curves.get(arguments[0]); return [RUNS[arguments[0]].label, curve.y[3]]", marked)  # fmt: skip
    assert label[:40] in said
    assert f"step 40{value:.5g}" in said
    # every visible panel marks the curve
    assert (
        opened.execute_script(
            "return panels.filter(panel => panel.visible && !panel.over.firstChild).length"
        )
        == 0
    )


def test_curves_over_cost_smoothed_and_in_bands(opened):
    show(opened, "#curves")
    x = "return document.querySelector('#panels .chart').data.flatMap(t => t.x).filter(v => v !== null)"
    assert max(opened.execute_script(x)) == 410
    enter(opened, "#over", "seconds")
    assert max(opened.execute_script(x)) == pytest.approx(4.0)  # hours: 36 s per step
    assert "have no costs.jsonl" in opened.find_element("id", "curves-said").text
    enter(opened, "#over", "flops")
    assert max(opened.execute_script(x)) == pytest.approx(4e11)
    enter(opened, "#smoothing", 20)
    enter(opened, "#log-x", True)
    fills = opened.execute_script("return document.querySelector('#panels .chart').data.filter(t => t.fill === 'toself').length")  # fmt: skip
    assert fills == 2  # one per learning rate with costs and several seeds


def test_a_setting_against_a_figure_in_three_ways(opened):
    show(opened, "#settings")
    enter(opened, "#figure", FIGURE)
    enter(opened, "#view", "scatter")
    enter(opened, "#first", "optimizer.lr")
    chart = "const c = document.getElementById('against');"
    assert opened.execute_script(f"{chart} return c.layout.xaxis.type") == "log"
    bars = opened.execute_script(f"{chart} return c.data.at(-1).error_y.array")
    assert bars == pytest.approx([0.5**0.5] * 6)
    enter(opened, "#view", "map")
    enter(opened, "#second", "training.batch_size")
    z = opened.execute_script(f"{chart} return c.data[0].z")
    assert z[0][0] == pytest.approx(41.5)
    enter(opened, "#view", "parallel")
    # one line per run, also where a setting is missing
    assert (
        opened.execute_script(
            f"{chart} return c.data.flatMap(t => t.x).filter(v => v === 0).length"
        )
        == 13
    )


def test_the_slider_shows_earlier_previews_with_one_noise_in_each_column(opened):
    show(opened, "#samples")
    steps = "return [...document.querySelectorAll('#strips .strip .at')].map(e => e.textContent).filter(t => t.startsWith('step'))"
    assert set(opened.execute_script(steps)) == {"step 400"}
    enter(opened, "#when", 0)
    assert set(opened.execute_script(steps)) == {"step 100"}
    heads = [head.text for head in opened.find_elements("css selector", "#strips h3")]
    assert heads == ["noise of seed 0, 16 x 16", "noise of seed 1, 16 x 16"]


def test_a_run_opens_with_its_history_and_nothing_of_it_is_html(opened):
    opened.execute_script(
        "document.querySelectorAll('#each > details').forEach(d => { d.open = true })"
    )
    settle(opened)
    text = opened.find_element("id", "each").text
    for said in (EVIL, "<script>alert(1)<", "recipe: model=quickstart data=digits", "ddpm.train", "fingerprint", "It cannot be read."):  # fmt: skip
        assert said in text
    assert (
        opened.execute_script(
            "return document.querySelectorAll('main script, main img[src=x]').length"
        )
        == 0
    )
    opened.execute_script("const more = document.createElement('script'); more.textContent = \"document.title = 'ran'\"; document.body.append(more)")  # fmt: skip
    # had a script got in all the same, the page's policy would refuse it
    (refused,) = opened.get_log("browser")
    assert "Content Security Policy" in refused["message"]


@pytest.mark.parametrize("width", [1280, 400])
def test_no_part_is_wider_than_the_window(opened, width):
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600})  # fmt: skip
    try:
        for section in ("#curves", "#settings"):
            show(opened, section)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("count", [1, 3])
def test_few_runs_are_a_page_too(browser, run_folder, tmp_path, count):
    for seed in range(count):
        write_run(
            RunFolder(run_folder), tmp_path / str(seed), {"seed": seed}, num_records=count - 1
        )
    browser.get_log("browser")
    browser.get(made(tmp_path, tmp_path / "r.html").as_uri())
    show(browser, "#settings")
    assert len(column(browser, "steps")) == 1  # several seeds share one row
    assert browser.get_log("browser") == []


def test_many_runs_open_and_scroll(browser, run_folder, tmp_path, capsys):
    template = RunFolder(run_folder)
    first = write_run(template, tmp_path / "first", {}, figures={400: 50.0}, previews={400: 4}, num_records=100)  # fmt: skip
    config = (first / "config.yaml").read_text()
    for index in range(RUNS):
        folder = shutil.copytree(first, tmp_path / "runs" / str(index))
        lr, seed = f"lr: {1e-5 * 1.1 ** (index // 5):.3e}", f"\nseed: {index % 5}\n"
        (folder / "config.yaml").write_text(
            config.replace("lr: 0.001", lr).replace("\nseed: 0\n", seed)
        )
    page = made(tmp_path / "runs", tmp_path / "r.html")
    browser.get_log("browser")
    began = time.perf_counter()
    browser.get(page.as_uri())
    opened = time.perf_counter()
    for section in ("#curves", "#settings"):
        show(browser, section)
    for section in ("#samples", "#runs"):
        browser.execute_script("document.querySelector(arguments[0]).scrollIntoView()", section)
        settle(browser)
    scrolled = time.perf_counter()
    enter(browser, "#together", False)
    assert len(column(browser, "seed")) == RUNS
    sorted_at = time.perf_counter()
    with capsys.disabled():
        print(f"\n{RUNS} runs, {page.stat().st_size / 1e6:.1f} MB: opened in {opened - began:.1f} s, scrolled through in {scrolled - opened:.1f} s, all rows in {sorted_at - scrolled:.1f} s")  # fmt: skip
    assert page.stat().st_size < 20e6
    assert browser.get_log("browser") == []
