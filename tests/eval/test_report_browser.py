"""report.html in headless Chromium: no errors, no requests, filters that filter, nothing that overflows, a keyboard."""

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swift_cl.report.files import write_reports
from tests.conftest import ROOT
from tests.eval.report_runs import RIGHT_TO_LEFT, answer, full_run, results, save, scored, write_jsonl

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install swift_cl[dev]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SCROLLERS = ".box, pre, .text, .bar nav"
"""What may be wider than the page inside: it scrolls in itself."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield started
        started.close()


class Opened:
    """A page with what it complained about and asked for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.url = path.resolve().as_uri()
        self.page.goto(self.url)

    def count(self) -> str:
        return str(self.page.inner_text("#count"))

    def ids(self) -> list[str]:
        """Ids of the questions on the page."""
        return [text.split(" · ")[1] for text in self.page.locator(".q .meta").all_inner_texts()]

    def choose(self, status: str) -> None:
        self.page.click(f"#status button[data-status={status}]")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = full_run(tmp_path_factory.mktemp("single") / "seq")
    write_reports([run])
    return run / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete runs, one of them with a long name, and one with a hole, one scorer and no answers on disk."""
    folder = tmp_path_factory.mktemp("comparison")
    hole = scored([[80.0, 30.0], [None, 90.0]], [10.0, 20.0])
    problems = [
        "stage_2_new x old: 1 of 4 answers missing (1 x HTTP 500 from http://127.0.0.1:8000/v1/" + "x" * 90 + ")"
    ]
    runs = [
        full_run(folder / "seq"),
        save(folder / "replay", results({"similarity": hole}, "replay", problems=problems)),
        full_run(folder / "a_method_with_a_long_name_that_wraps", "a_method_with_a_long_name_that_wraps"),
    ]
    _, out = write_reports(runs)
    return out / "report.html"


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    made: list[Opened] = []

    def open_page(path: Path, **context: Any) -> Opened:
        made.append(Opened(browser, path, **context))
        return made[-1]

    yield open_page
    for entry in made:
        entry.context.close()


@pytest.mark.parametrize("name", ["single", "comparison", "schema_1"])
def test_opens_without_errors_and_without_requests(name, request, opened, tmp_path):
    if name == "schema_1":
        shutil.copytree(ROOT / "tests" / "data" / "run_schema_1" / "seq", tmp_path / "seq")
        write_reports([tmp_path / "seq"])
        path = tmp_path / "seq" / "report.html"
    else:
        path = request.getfixturevalue(name)
    found = opened(path, offline=True)
    for summary in found.page.locator("main summary:visible").all()[:30]:
        summary.click()
    found.page.wait_for_load_state("networkidle")
    assert found.errors == []
    assert [url for url in found.requests if not url.startswith("data:")] == [found.url]
    assert found.page.locator("#list .q").count() == 20


def test_texts_are_shown_as_text_and_nothing_of_them_runs(single, opened):
    found = opened(single)
    first = found.page.locator(".q").first
    first.locator("summary").click()
    assert "</script><script>window.hacked = 1</script><img src=x" in first.locator(".ask").inner_text()
    assert first.locator(".answers .text").nth(1).inner_text().startswith("<b>bold</b></script>")
    assert first.locator("img, b").count() == 0
    assert found.page.evaluate("window.hacked") is None
    assert found.errors == []
    second = found.page.locator(".q .ask").nth(1)
    assert second.inner_text() == RIGHT_TO_LEFT
    assert second.evaluate("node => getComputedStyle(node).direction") == "rtl"


def test_long_and_empty_answers(single, opened):
    found = opened(single)
    for index in (2, 3):
        found.page.locator(".q > summary").nth(index).click()
    assert "[10000 characters, cut here]" in found.page.locator(".q").nth(2).inner_text()
    assert "Long texts are cut to 4000 characters" in found.page.inner_text("#questions")
    assert "empty answer" in found.page.locator(".q").nth(3).inner_text()


def test_groups_of_questions(single, opened):
    found = opened(single)
    assert found.count() == "30 of 30 questions"
    expected = {"forgotten": 8, "kept": 12 + 5, "never": 4, "late": 1, "all": 30}  # 7 ends at 60, below 80: forgotten
    for name, count in expected.items():
        found.choose(name)
        assert found.count() == f"{count} of 30 questions", name
        assert found.page.inner_text(f"#status button[data-status={name}]").endswith(f" {count}")
    found.choose("forgotten")
    assert found.ids() == [f"old-{index}" for index in range(8)]
    assert "forgotten after new" in found.page.locator(".q").first.inner_text()
    found.page.fill("#limit", "50")
    assert found.count() == "7 of 30 questions"
    found.choose("never")
    assert found.ids() == [f"old-{index}" for index in range(20, 24)]


def test_search_task_and_sort(single, opened):
    found = opened(single)
    found.page.fill("#search", "REFERENCE old-24")
    playwright.expect(found.page.locator("#count")).to_have_text("1 of 30 questions")
    assert found.ids() == ["old-24"]
    found.page.fill("#search", "")
    playwright.expect(found.page.locator("#count")).to_have_text("30 of 30 questions")
    found.page.select_option("#task", label="new")
    assert found.ids() == [f"new-{index}" for index in range(5)]
    found.page.select_option("#task", label="all")
    found.page.select_option("#sort", "low")
    assert set(found.ids()[:11]) == {f"old-{index}" for index in (*range(7), *range(20, 24))}
    found.page.select_option("#sort", "drop")
    assert found.ids()[:8] == [f"old-{index}" for index in range(8)]
    found.page.select_option("#sort", "long")
    assert found.ids()[0] == "old-2"


def test_pages(single, opened):
    found = opened(single)
    assert found.page.inner_text("#page") == "page 1 of 2"
    assert found.page.is_disabled("#previous")
    found.page.click("#next")
    assert found.ids() == [*(f"old-{index}" for index in range(20, 25)), *(f"new-{index}" for index in range(5))]
    assert found.page.is_disabled("#next")


def test_methods_side_by_side(comparison, opened):
    found = opened(comparison)
    found.page.locator(".q > summary").nth(4).click()
    rows = found.page.locator(".q").nth(4).locator(".answers tr").all_inner_texts()
    assert len(rows) == 4
    assert rows[2].split("\t")[0] == "after old"
    assert rows[2].count("reference old-4") == 2
    assert rows[2].count("not asked") == 1
    found.page.select_option("#run", label="replay")
    assert found.page.inner_text("#status button[data-status=unknown]") == "not scored 30"
    found.page.select_option("#run", label="seq")
    found.choose("forgotten")
    assert found.count() == "8 of 30 questions"


def test_holes_and_their_reasons_are_seen(comparison, opened):
    found = opened(comparison)
    assert "stage_2_new x old: 1 of 4 answers missing" in found.page.inner_text("#problems")
    found.page.click("#tabs button[data-scorer=similarity]")
    cell = found.page.locator("#scorer-similarity td.none:visible")
    assert "–1" in [text.strip().split("\n")[0] for text in cell.all_inner_texts()]
    assert "1 of 4 answers missing" in found.page.locator("#scorer-similarity .matrix .footnotes").inner_text()
    assert "needs R[2,1], not measured" in found.page.inner_text("#scorer-similarity")


def test_tabs_show_one_scorer_and_all_without_script(single, opened):
    found = opened(single)
    assert found.page.locator(".scorer:visible").count() == 1
    found.page.click("#tabs button[data-scorer=similarity]")
    assert found.page.locator("#scorer-similarity").is_visible()
    assert found.page.locator("#scorer-exact_match").is_hidden()
    plain = opened(single, java_script_enabled=False)
    assert plain.page.locator(".scorer:visible").count() == 2
    assert "needs JavaScript" in plain.page.inner_text("#questions")


OVERFLOWING = """(scrollers) => [...document.querySelectorAll("body *")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !node.closest(scrollers);
}).map((node) => node.tagName + "." + node.className)"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_overflows(comparison, opened, width, theme):
    found = opened(comparison, viewport={"width": width, "height": 800}, color_scheme=theme)
    for scorer in ("similarity", "exact_match"):
        found.page.click(f"#tabs button[data-scorer={scorer}]")
        found.page.evaluate("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
        playwright.expect(found.page.locator(".answers")).to_have_count(20)
        assert found.page.evaluate(OVERFLOWING, SCROLLERS) == []
        assert found.page.evaluate("document.documentElement.scrollWidth") == width


def test_fifteen_tasks_fit_a_phone(tmp_path, opened):
    order = [f"task_{index:02d}" for index in range(15)]
    run = tmp_path / "run"
    for name in ("base", *(f"stage_{index}_{task}" for index, task in enumerate(order, start=1))):
        answers = [answer("sample", "an answer")]
        write_jsonl(run / "answers" / name / "task_00.jsonl", answers)
        write_jsonl(run / "scores" / "exact_match" / name / "task_00.jsonl", [{"id": "sample", "turn": 0, "score": 50}])
    entry = {"higher_is_better": True, "base": [50.0] * 15, "matrix": [[50.0] * 15] * 15, "metrics": {}}
    save(run, results({"exact_match": entry}) | {"order": order})
    write_reports([run])
    found = opened(run / "report.html", viewport={"width": 360, "height": 800})
    found.page.locator(".q > summary").click()
    assert found.page.evaluate(OVERFLOWING, SCROLLERS) == []
    assert found.page.evaluate("document.documentElement.scrollWidth") == 360
    assert found.page.locator(".charts.large .chart").count() == 16


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  return [...document.querySelectorAll(".heat tbody td:not(.none)")].map((node) => {
    const style = getComputedStyle(node);
    const [a, b] = [light(style.color), light(style.backgroundColor)];
    return [node.textContent, Math.max(a, b) / Math.min(a, b)];
  });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_score_can_be_read_on_its_ground(tmp_path, opened, theme):
    """All shades of the scale, by WCAG's contrast of normal text (4.5)."""
    size = 10
    rows = [[100.0 * (size * row + column) / (size * size - 1) for column in range(size)] for row in range(size)]
    entry = {"higher_is_better": True, "base": None, "matrix": rows, "metrics": {}}
    order = [str(index) for index in range(size)]
    run = save(tmp_path / "run", results({"exact_match": entry}) | {"order": order, "answers": {}})
    write_reports([run])
    measured = opened(run / "report.html", color_scheme=theme).page.evaluate(CONTRAST)
    assert len(measured) == size * size
    assert [entry for entry in measured if entry[1] < 4.5] == []


def test_keyboard_reaches_and_uses_the_filters(single, opened):
    found = opened(single)
    seen: list[str] = []
    page = found.page
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("(document.activeElement.id || document.activeElement.dataset.status || '') + ''"))
        if seen[-1] == "search":
            page.keyboard.type("old-2")
            playwright.expect(page.locator("#count")).to_have_text("6 of 30 questions")
        if seen[-1] == "never":
            page.keyboard.press("Enter")
        if seen[-1] == "download":
            break
    wanted = ["theme", "search", "task", "scorer", "limit", "sort", "all", "forgotten", "never", "download"]
    assert [name for name in seen if name in wanted] == wanted
    assert found.count() == "4 of 30 questions"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(".q[open]").count() == 1
    page.locator("#scorer-exact_match .metrics thead a").first.focus()
    page.keyboard.press("Enter")
    assert "(1/T) sum_i R[T,i]" in page.inner_text("#scorer-exact_match .definitions dl")


def test_theme_button(single, opened):
    found = opened(single, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    before = found.page.evaluate(ground)
    found.page.click("#theme")
    assert (found.page.inner_text("#theme"), found.page.evaluate(ground)) == ("Light", before)
    found.page.click("#theme")
    assert found.page.inner_text("#theme") == "Dark"
    dark = found.page.evaluate(ground)
    assert dark != before
    found.page.reload()
    assert found.page.evaluate(ground) == dark
    found.page.click("#theme")
    assert (found.page.inner_text("#theme"), found.page.evaluate(ground)) == ("Auto", before)


def _download(found: Opened, selector: str) -> str:
    with found.page.expect_download() as waiting:
        found.page.locator(selector).first.click()
    return Path(waiting.value.path()).read_text(encoding="utf-8-sig")


def test_csv_buttons(single, opened):
    found = opened(single)
    matrix = _download(found, "#scorer-exact_match .matrix a.button")
    assert matrix == (single.parent / "matrix-exact_match.csv").read_text()
    assert _download(found, "#scorer-exact_match h3 a.button").startswith("run,avg_acc,forgetting,")
    found.page.select_option("#task", label="new")
    rows = list(csv.DictReader(io.StringIO(_download(found, "#download"))))
    assert len(rows) == 5 * 3
    assert rows[2]["model"] == "after new"
    assert (rows[2]["answer"], rows[2]["exact_match"]) == ("reference new-0", "100")


def test_a_large_grid_stays_small(tmp_path, opened):
    """4 tasks x 100 questions x 5 models x 3 methods: 20 questions are drawn, whatever there are."""
    order = ["2022", "2023", "2024", "2025"]
    runs = []
    for method in ("seq", "replay", "ewc"):
        run = tmp_path / method
        for row, name in enumerate(["base", *(f"stage_{i}_{task}" for i, task in enumerate(order, start=1))]):
            for task in order:
                answers = [
                    answer(f"{task}-{i}", f"{method} says {row} to {i} of {task} " + "word " * 12) for i in range(100)
                ]
                write_jsonl(run / "answers" / name / f"{task}.jsonl", answers)
                scores = [{"id": a["id"], "turn": 0, "score": 40.125 + i / 3} for i, a in enumerate(answers)]
                write_jsonl(run / "scores" / "similarity" / name / f"{task}.jsonl", scores)
        entry = {"higher_is_better": True, "base": [50.0] * 4, "matrix": [[50.0] * 4] * 4, "metrics": {}}
        runs.append(save(run, results({"similarity": entry}, method) | {"order": order}))
    _, folder = write_reports(runs)
    assert (folder / "report.html").stat().st_size < 1_500_000
    found = opened(folder / "report.html")
    assert found.count() == "400 of 400 questions"
    assert found.page.locator(".q").count() == 20
    assert found.errors == []


def test_the_page_may_load_nothing_and_run_no_other_script(single, opened):
    """Were a text to slip through as HTML, the page's policy still stops it."""
    found = opened(single)
    failures: list[str] = []
    found.page.on("requestfailed", lambda request: failures.append(f"{request.url} {request.failure}"))
    found.page.evaluate(
        """() => {
          document.body.insertAdjacentHTML("beforeend", "<img src='http://127.0.0.1:9/x' onerror='window.hacked = 3'>");
          const script = document.createElement("script");
          script.textContent = "window.hacked = 4";
          document.body.append(script);
        }"""
    )
    playwright.expect(found.page.locator("body > img")).to_have_count(1)
    found.page.wait_for_timeout(200)
    assert failures == ["http://127.0.0.1:9/x csp"]
    assert found.page.evaluate("window.hacked") is None
    assert sum("Content Security Policy" in error for error in found.errors) >= 2
