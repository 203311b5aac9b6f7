"""The results page: everything measured is on it, text is escaped, and a real browser shows it without complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.ledger import Claim, Condition, PaperValue, Target, bench_row, record, write_claims, write_rows
from report.build import build, load
from report.papers import all_papers
from report.plots import number, ratio_plot, seed_plot, spread
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
    (figures / "captions.json").write_text(json.dumps({"first.png": f"First {HOSTILE}"}), encoding="utf-8")
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


def test_page_refers_to_nothing_outside_itself(results: Path) -> None:
    for tag, attributes in _Tags(_page(results)).seen:
        for name in ("src", "href"):
            value = attributes.get(name)
            if value is None:
                continue
            if tag == "a":  # a link is followed by the reader, not by the page
                assert value.startswith(("#", "https://arxiv.org/abs/")), value
            else:
                assert value.startswith("data:"), value
    assert "@import" not in _page(results) and not re.search(r"url\((?!data:)", _page(results))


def test_figures_follow_the_order_of_captions_and_then_their_names(results: Path) -> None:
    captions = [caption for _, caption in load(results)["ldm"].figures]
    assert captions == [f"First {HOSTILE}", "loss curve", "samples"]


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


def _open(browser: list[str], page: Path) -> tuple[str, list[str]]:
    """(the document after its scripts ran, what the console said)"""
    done = subprocess.run([*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


PROBE = """<script>addEventListener("load", () => {
  document.querySelector(".zoom").click();
  const box = document.getElementById("lightbox");
  const first = box.querySelector("img").src;
  box.querySelector(".next").click();
  document.documentElement.dataset.box = `${box.open} ${box.querySelector("img").src !== first}`;
  box.close();
  document.getElementById("theme").click();
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.documentElement.dataset.probe = `${document.documentElement.dataset.theme} ${wide} ${document.title}`;
});</script></body>"""


@pytest.mark.parametrize("window", ["1280,900", "500,900"])
def test_a_real_browser_shows_the_page_from_a_file(results: Path, browser: list[str], window: str) -> None:
    page = build(results, results.parent / "site" / "index.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", PROBE), encoding="utf-8")  # the probe clicks what a person would
    dom, console = _open([*browser, f"--window-size={window}"], page)
    assert console == []
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None
    assert 'data-images="3"' in root[0] and 'data-broken-images="0"' in root[0]
    assert 'data-box="true true"' in root[0], "the enlarged view did not open or did not advance"
    assert 'data-probe="dark false Less compute' in root[0], "theme switch, page wider than the window, or title"
    assert dom.count('<circle class="seed"') >= 3 * 2


def test_the_browser_check_notices_errors_and_broken_pictures(results: Path, browser: list[str]) -> None:
    (results / "figures" / "ldm" / "samples.png").write_bytes(b"not a picture")
    page = build(results, results.parent / "site" / "index.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", "<script>nothing.here()</script></body>"), encoding="utf-8")
    dom, console = _open(browser, page)
    assert any("ReferenceError" in line for line in console)
    assert 'data-broken-images="1"' in dom
