"""The results page: everything measured is on it, text is escaped, and a real browser shows it without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.ledger import (
    Claim,
    Condition,
    PaperValue,
    Target,
    bench_row,
    read_notes,
    record,
    write_claims,
    write_rows,
)
from common.paths import RESULTS, papers
from report.build import build, load
from report.front_picture import draw, search
from report.papers import all_papers
from report.pictures import read_pictures
from report.plots import number, ratio_plot, rung_plot, seed_plot, spread
from report.words import conditions, few_images, in_words, time_taken
from tests.refusals import refused

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"> & <b>bold</b>"


def _claim(claim_id: str, statement: str, bar: float, tier: str = "small") -> Claim:
    target = Target("at least 15 % lower", "fd_drop", ">=", bar, (Condition("speedup", ">", 4.0),))
    return Claim(claim_id, statement, PaperValue("38 lower", "Fig. 6"), target, tier)  # type: ignore[arg-type]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A made-up results folder: two claims that hold and one that does not, rows, three pictures."""
    folder = tmp_path / "results"
    seeds = [{"fd_drop": 0.21, "speedup": 18.0}, {"fd_drop": 0.25, "speedup": 21.0}, {"fd_drop": 0.26, "speedup": 22.0}]

    def rec(claim: Claim, rows: list[dict[str, float]]) -> dict[str, object]:
        return record(claim, rows, seconds=754.0, peak_memory_bytes=3 * 2**29)

    write_claims(
        folder / "ldm.json",
        [
            rec(_claim("L1", "Latent beats pixel diffusion.", 0.15), seeds),
            rec(_claim("L1", "Latent beats pixel diffusion.", 0.1, "smoke"), seeds[:1]),
            rec(_claim("L2", HOSTILE, 0.9), seeds),
            rec(_claim("L3", "A seed diverged.", 0.1), [*seeds[:2], {"fd_drop": float("nan"), "speedup": 1.0}]),
        ],
    )
    write_rows(
        folder / "bench_ldm.json",
        [
            bench_row("training", 148.0, 102.0, "images/s", target=1.3),
            bench_row("memory <peak>", 3.0, 2.0, "GiB", target=1.0, higher_is_better=False),
        ],
    )
    write_rows(folder / "bench_kernels.json", [bench_row("GroupNorm+SiLU", 1.0, 2.0, "ms", higher_is_better=False)])
    figures = folder / "figures" / "ldm"
    figures.mkdir(parents=True)
    Image.new("RGB", (40, 30), "teal").save(figures / "samples.png")
    Image.new("RGB", (30, 30), "red").save(figures / "first.png")
    square = '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="10"><rect width="20" height="10"/></svg>'
    (figures / "loss_curve.svg").write_text(square, encoding="utf-8")
    captions = {"first.png": f"First {HOSTILE}", "loss_curve.svg": "What `train.py` logs."}
    (figures / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


class _Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def _page(results: Path) -> str:
    return build(results, results.parent / "site" / "index.html", rooms=results.parent).read_text(encoding="utf-8")


def test_every_paper_is_listed_and_those_without_results_are_shown_as_not_built(results: Path) -> None:
    page = _page(results)
    assert len(all_papers()) >= 13
    for paper in all_papers():
        assert paper.title in page
    assert page.count("not built yet") == len(all_papers()) - 1
    (results.parent / "pixart").mkdir()
    (results.parent / "pixart" / "model.py").touch()
    page = _page(results)
    assert (page.count("not built yet"), page.count("built, not yet measured")) == (len(all_papers()) - 2, 1)


def test_claims_rows_and_verdicts_are_on_the_page(results: Path) -> None:
    page = _page(results)
    assert "1 of 3 claims hold" in page
    assert page.count("does not hold</span>") == 2
    assert "Also at the smoke tier: holds" in page
    assert "0.240 ± 0.026" in page  # mean and deviation of L1's headline
    assert "12.6" not in page and "13 min" in page  # 754 seconds
    assert "1.45×" in page and "0.667×" in page
    assert "Shared parts and comparisons" in page and "GroupNorm+SiLU" in page
    assert "not finite" in page  # the diverged seed


def test_text_from_results_is_escaped(results: Path) -> None:
    page = _page(results)
    assert HOSTILE not in page
    assert "memory &lt;peak&gt;" in page
    assert not [attrs for tag, attrs in _Tags(page).seen if tag == "img" and attrs.get("src") == "x"]


def test_page_refers_to_nothing_outside_itself_but_links_and_its_pictures(results: Path) -> None:
    (results.parent / "ldm").mkdir()
    (results.parent / "ldm" / "README.md").touch()
    page = _page(results)
    links = []
    for tag, attributes in _Tags(page).seen:
        for name in ("src", "href"):
            value = attributes.get(name)
            if value is None or value.startswith(("#", "data:", "https://arxiv.org/abs/")):
                continue
            assert tag in ("a", "img") and (results.parent / "site" / value).exists(), value
            links.append(value)
    assert {"../ldm/README.md", "../ldm", "figures/ldm/first.png"} <= set(links)
    assert "@import" not in page and not re.search(r"url\((?!data:)", page)


def test_pictures_are_files_beside_the_page_of_their_own_shape_and_loaded_late(results: Path) -> None:
    page = _page(results)
    images = [attributes for tag, attributes in _Tags(page).seen if tag == "img" and attributes.get("src")]
    assert [(i["src"], i["width"], i["height"], i["loading"]) for i in images] == [
        ("figures/ldm/first.png", "30", "30", "lazy"),
        ("figures/ldm/loss_curve.svg", "20", "10", "lazy"),
    ]
    assert "What <code>train.py</code> logs.</figcaption>" in page
    assert "base64" not in page
    (results / "figures" / "ldm" / "captions.json").write_text('{"samples.png": "Samples."}', encoding="utf-8")
    _page(results)
    shown = results.parent / "site" / "figures"
    assert [path.name for path in shown.rglob("*.*")] == ["samples.png"]  # those of earlier pages go


def test_a_picture_without_a_caption_is_named_and_left_out(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [picture.path.name for picture in load(results)["ldm"].pictures]
    assert pictures == ["first.png", "loss_curve.svg"]  # in the order of captions.json
    assert "left out ldm/samples.png: it has no caption" in capsys.readouterr().out


def test_page_is_the_same_for_the_same_results(results: Path) -> None:
    assert _page(results) == _page(results)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ldm.json", "{", r"ldm\.json cannot be read as JSON"),
        ("ldm.json", '{"claims": [{"id": "L1"}]}', r'ldm\.json: entry 1 of "claims" lacks "statement"'),
        ("bench_ldm.json", '{"claims": []}', r"bench_ldm\.json: expected"),
        ("figures/ldm/captions.json", '{"gone.png": "x"}', r"names gone\.png"),
    ],
)
def test_malformed_results_are_named(results: Path, name: str, text: str, message: str) -> None:
    (results / name).write_text(text, encoding="utf-8")
    refused(message, _page, results)


def test_empty_results_make_a_page_and_a_missing_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    assert _page(tmp_path / "results").count("not built yet") == 13
    refused("does not exist", load, tmp_path / "absent")


def test_numbers_are_written_for_people() -> None:
    assert [number(v) for v in (3, 0.12345678, 1234567.0, 12345.6, -0.5, None, 2.0)] == [
        "3", "0.1235", "1.23e+06", "12\u202f346", "−0.5", "not finite", "2",
    ]  # fmt: skip
    assert spread(0.24, 0.0265) == "0.240 ± 0.026"
    assert spread(21.3, 2.5) == "21.3 ± 2.5"


def test_seed_plot_tints_the_side_on_which_the_claim_holds() -> None:
    def tint(op: str) -> tuple[float, float]:
        found = re.search(r'class="pass" x="([\d.]+)" y="6" width="([\d.]+)"', seed_plot("m", [1, 3], op, 2, 2.0))
        assert found is not None
        return float(found[1]), float(found[1]) + float(found[2])

    assert tint(">=") == (180.0, 346.0)
    assert tint("<") == (14.0, 180.0)
    assert seed_plot("m", [1, 2, None], ">", 0, None).count("<circle") == 2
    assert seed_plot("m", [0.0], ">", 0.0, 0.0).count("<circle") == 1  # no spread at all


def test_ratio_bar_grows_right_when_we_are_better() -> None:
    assert 'class="better" x="94.0"' in ratio_plot(2.0, 1.0, 2.0)
    assert 'class="worse" x="6.0"' in ratio_plot(0.5, 1.0, 2.0)


def test_budgets_stand_against_the_metric_with_the_target_as_a_line() -> None:
    plot = rung_plot("FID", [(1, [1.0, 3.0], 2.0), (4, [5.0, None], None), (16, [6.0, 8.0], 7.0)], ">=", 4.0)
    assert plot.count("<circle") == 5 and plot.count('class="tick"') == 3
    assert 'aria-label="FID against the budget: 1x: 2; 4x: not finite; 16x: 7; target ≥ 4"' in plot
    line = re.search(r'class="target" x1="14.0" x2="346.0" y1="([\d.]+)"', plot)
    tint = re.search(r'class="pass" x="14.0" y="8.0" width="332.0" height="([\d.]+)"', plot)
    assert line and tint and float(tint[1]) == pytest.approx(float(line[1]) - 8, abs=0.1)


def test_rungs_and_machines_of_a_record_are_on_the_page(results: Path) -> None:
    content = json.loads((results / "ldm.json").read_text())
    first = next(claim for claim in content["claims"] if claim["tier"] == "small")
    own = {key: first[key] for key in ("seconds", "hardware", "versions", "commit", "peak_memory_bytes")}
    rung = {**own, "rung": 4, "measured": [{"seed": 0, "fd_drop": 0.1, "speedup": 9.0}], "mean": 0.1, "std": 0.0}
    first["rungs"] = [{**rung, "holds": False}]
    first["machines"] = [{**own, "hardware": "another CPU", "measured": first["measured"], "mean": 0.24, "holds": True}]
    (results / "ldm.json").write_text(json.dumps(content))
    page = _page(results)
    assert "At multiples of the budget: 1x holds, 4x does not hold" in page
    assert "Also measured on another CPU: 0.240 ± 0.026, holds" in page
    assert "0 (4x budget)" in page


def _record(bar: float, values: list[float | None], op: str = ">=", **kept: object) -> dict[str, object]:
    rows = [{"seed": seed, "m": value} for seed, value in enumerate(values)]
    finite = [value for value in values if value is not None]
    passing = len(finite) == len(values) and (sum(finite) / len(finite) >= bar)
    return {
        "target": {"metric": "m", "op": op, "value": bar, "conditions": []},
        "measured": rows,
        "holds": passing,
        **kept,
    }


def test_numbers_have_the_digits_that_the_verdict_needs() -> None:
    assert conditions(_record(1.03, [1.0302, 1.0302, 1.0303], "<="))[0].text == "1.030233 ± 0.000058"
    assert conditions(_record(1.03, [1.01, 1.03, 1.0505], "<="))[0].text == "1.0302 ± 0.020"
    (three,) = conditions(_record(0.2, [0.2, 0.2, 0.2], "<="))
    assert three.met and three.text == "0.2 ± 0"  # a mean of equal numbers is that number
    (asked,) = conditions(_record(1.0, [1.0, 0.0, 1.0]))
    assert (asked.yes, asked.met) == (2, False)


def test_times_images_and_commits_are_said_as_they_are() -> None:
    shared = [{"seed": 0, "m": 1.0, "cpu_seconds_a": 300.0, "cpu_seconds_b": 420.0}]
    assert time_taken({"seconds": 0.2, "measured": shared}).startswith("12 min of CPU time for its arms, shared")
    assert time_taken({"seconds": 0.0, "measured": [{"m": 1.0}]}).startswith("time not on record")
    assert time_taken({"seconds": 754.0, "measured": [{"m": 1.0}]}) == "13 min"
    assert few_images({"measured": [{"fid_a": 1.0, "images_a": 3}]}, None).startswith("Frechet distances of 3 images")
    assert few_images({"measured": [{"fid_a": 1.0}]}, 5000) == few_images({"measured": [{"psnr": 1.0}]}, 3) == ""
    assert in_words("kid_x1000_f4") == "KID × 1000 f = 4"


def test_every_picture_of_the_repository_says_in_words_what_it_shows() -> None:
    folders = [path for path in (RESULTS / "figures").rglob("*") if path.is_dir()] + [RESULTS / "figures"]
    for folder in folders:
        captions = {picture.path.name: picture.caption for picture in read_pictures(folder)}
        assert set(captions) == {path.name for path in folder.iterdir() if path.suffix in (".png", ".svg")}, folder
        for name, caption in captions.items():
            assert len(caption.split()) >= 4 and caption.endswith("."), name


@pytest.mark.parametrize("paper", papers())
def test_what_misses_says_why_and_what_targets_name_has_words(paper: str) -> None:
    file = RESULTS / f"{paper}.json"
    records = json.loads(file.read_text(encoding="utf-8"))["claims"] if file.is_file() else []
    outcomes, words = read_notes(paper)
    assert not [claim["id"] for claim in records if not claim["holds"] and claim["id"] not in outcomes]
    for claim in records:
        assert {one.metric for one in conditions(claim)} <= set(words[claim["id"]]), claim["id"]


def test_a_page_of_its_own_is_copied_beside_the_report_and_linked(results: Path) -> None:
    folder = results / "pages" / "ldm"
    folder.mkdir(parents=True)
    (folder / "room.html").write_text("<p>a room</p>")
    (folder / "captions.json").write_text(json.dumps({"room.html": "A <room> to walk through."}))
    page = build(results, results.parent / "site" / "index.html")
    text = page.read_text(encoding="utf-8")
    assert '<li><a href="pages/ldm/room.html">A &lt;room&gt; to walk through.</a></li>' in text
    assert (page.parent / "pages" / "ldm" / "room.html").read_text() == "<p>a room</p>"
    (folder / "captions.json").write_text("{}")
    (folder / "room.html").unlink()
    build(results, page)
    assert not (page.parent / "pages" / "ldm" / "room.html").exists()


def test_the_front_pictures_are_drawn_from_what_is_on_record(tmp_path: Path) -> None:
    for part in ("pc_darts.json", "figures/pc_darts/default_run_normal.svg"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RESULTS / part, tmp_path / part)
    (path,) = draw(tmp_path, {"front_architecture_search": search})
    with Image.open(path) as image:
        assert image.width == 1199
    assert "(claim PC1)" in read_pictures(tmp_path / "figures")[0].caption
    (tmp_path / "figures/pc_darts/default_run_normal.svg").unlink()
    refused("default_run_normal.svg is missing", search, tmp_path)


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    program = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        pytest.skip("no chromium on PATH: install the package `chromium` to open the page in a real browser")
    return [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000",
    ]  # fmt: skip


def _open(browser: list[str], page: Path, width: int = 1200) -> tuple[str, list[str]]:
    """(the document after its scripts ran, what the console said), the page in a frame of that many pixels."""
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(width=width, page=page.name), encoding="utf-8")
    done = subprocess.run([*browser, "--dump-dom", frame.as_uri()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# A window has a least width, a frame has none.
FRAME = """<!doctype html><iframe src="{page}" style="width:{width}px;height:900px;border:0"></iframe><pre></pre>
<script>addEventListener("message", (event) => document.querySelector("pre").textContent = event.data)</script>"""
# Does what a person does, and tells the frame what came of it.
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement, box = document.getElementById("lightbox"), said = {};
  const images = [...document.querySelectorAll(".gallery img")];
  said.wide = root.scrollWidth > root.clientWidth;
  document.querySelectorAll("details").forEach((part) => part.open = true);
  said.images = images.length;
  said.broken = images.filter((image) => image.naturalWidth === 0).map((image) => image.getAttribute("src"));
  const off = (image) => Math.abs(image.width / image.height - image.naturalWidth / image.naturalHeight) > .03;
  said.misshapen = images.filter((image) => image.naturalWidth && off(image)).map((image) => image.getAttribute("src"));
  said.captionless = images.filter((image) => !image.closest("figure").querySelector("figcaption").innerText).length;
  said.wideOpened = root.scrollWidth > root.clientWidth;
  document.querySelector(".zoom").click();
  const first = box.querySelector("img").src;
  box.querySelector(".next").click();
  said.box = [box.open, box.querySelector("img").src !== first];
  box.close();
  document.getElementById("theme").click();
  said.theme = root.dataset.theme;
  said.title = document.title;
  scrollTo({ top: root.scrollHeight / 2, behavior: "instant" });
  said.contents = Math.round(document.querySelector(".contents").getBoundingClientRect().top);
  parent.postMessage(JSON.stringify(said), "*");
});</script></body>"""


def _probed(page: Path, browser: list[str], width: int) -> tuple[dict[str, object], str, list[str]]:
    text = page.read_text(encoding="utf-8")
    copy = page.with_name("probed.html")
    seen = text.replace('loading="lazy"', 'loading="eager"')  # as if one had scrolled past all of them
    copy.write_text(seen.replace("</body>", PROBE), encoding="utf-8")
    dom, console = _open(browser, copy, width)
    said = re.search(r"<pre>(.+?)</pre>", dom)
    assert said is not None, (dom, console)
    return json.loads(unescape(said[1])), text, console


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page of the repository's own results."""
    yield build(RESULTS, tmp_path_factory.mktemp("site") / "index.html")


def test_the_page_is_small_before_pictures_are_asked_for(site: Path) -> None:
    assert site.stat().st_size < 1.5e6
    assert site.read_text(encoding="utf-8").count("<img src=") == sum(1 for _ in (site.parent / "figures").rglob("*.*"))


@pytest.mark.parametrize("width", [1200, 390])
def test_a_real_browser_shows_the_repositorys_page_to_desktop_and_telephone(
    site: Path, browser: list[str], width: int
) -> None:
    said, text, console = _probed(site, browser, width)
    assert console == []
    assert said["images"] == text.count("<img src=")
    assert (said["broken"], said["misshapen"], said["captionless"]) == ([], [], 0)
    assert (said["wide"], said["wideOpened"]) == (False, False)
    assert said["box"] == [True, True], "the enlarged view did not open or did not advance"
    assert said["theme"] == "dark" and said["contents"] == 0


def test_the_browser_check_notices_errors_broken_pictures_and_text_that_is_code(
    results: Path, browser: list[str]
) -> None:
    (results / "figures" / "ldm" / "first.png").write_bytes(b"not a picture")
    page = build(results, results.parent / "site" / "index.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", "<script>nothing.here()</script></body>"), encoding="utf-8")
    said, _, console = _probed(page, browser, 390)
    assert any("ReferenceError" in line for line in console)
    assert said["broken"] == ["figures/ldm/first.png"]
    assert str(said["title"]).startswith("Less compute")  # the hostile claim was not run
    assert said["wide"] is False
