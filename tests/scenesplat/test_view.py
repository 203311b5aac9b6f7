"""The page of a scene: what is in it, and what a person does with it in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from scenesplat import view
from scenesplat.export import SceneModel
from scenesplat.gaussians import Gaussians
from scenesplat.ply import write_scene
from scenesplat.query import PUBLISHED, ask
from scenesplat.rooms import make_room
from scenesplat.text import NEGATIVES
from scenesplat.view import best_words, page_data, queries_of, thinned
from tests.browser import Browser
from tests.refusals import refused

QUERIES = ["a toilet", "a chair"]
# The files as their authors made them; a change here is a new version there.
VENDORED = {
    "OrbitControls.js": "b97879c748170baa",
    "Pass.js": "444b409c235ead98",
    "spark.module.min.js": "96869fab4f2164d5",
    "three.core.min.js": "61ba0df005b05991",
    "three.module.min.js": "e2b5ee6bccd38fd6",
}


@pytest.fixture(scope="module")
def model() -> SceneModel:
    return SceneModel.load(PUBLISHED)


@pytest.fixture(scope="module")
def scene() -> Gaussians:
    return make_room(1_000_003, "test", density=60).gaussians


def test_what_travels_along_is_what_its_authors_published() -> None:
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in (view.VIEWER / "vendor").glob("*.js")
    }
    assert found == VENDORED
    licences = {file.name: file.read_text() for file in (view.VIEWER / "vendor").glob("LICENSE-*.txt")}
    assert set(licences) == {"LICENSE-fflate.txt", "LICENSE-spark.txt", "LICENSE-three.txt"}
    assert all("Permission is hereby granted" in text for text in licences.values())


def test_the_pages_columns_are_the_scene_its_scores_and_its_words(model: SceneModel, scene: Gaussians) -> None:
    import numpy as np

    facts, columns = page_data(model, scene, QUERIES, NEGATIVES, passes=1, title="a room")
    assert facts["count"] == facts["of"] == len(scene) and facts["grown"] == 1.0
    parts, at = {}, 0
    for name, kind, width in facts["columns"]:
        size = np.dtype(kind).itemsize * width * len(scene)
        parts[name] = torch.from_numpy(
            np.frombuffer(columns, kind, width * len(scene), at).reshape(width, -1).T.astype(np.float64)
        )
        at += size
    assert at == len(columns)
    places = parts["centre"] / 65535 * torch.tensor(facts["span"]) + torch.tensor(facts["low"])
    assert float((places - scene.means_N3).abs().max()) < 1e-4
    logs = facts["logScale"][0] + parts["scale"] / 255 * (facts["logScale"][1] - facts["logScale"][0])
    assert float((logs - scene.scales_N3).abs().max()) < 0.03
    scores, features = ask(model, scene, QUERIES, list(NEGATIVES), 1)
    assert float((parts["scores"] / 255 - scores.t()).abs().max()) < 0.003
    named = [name.removeprefix("a ") for name in QUERIES]
    assert facts["words"][:2] == named and len(facts["words"]) == len(set(facts["words"])) > 100
    nearest = (features @ model.texts(facts["words"]).t()).argmax(1)
    assert torch.equal(parts["words"][:, 0].long(), nearest)


def test_a_word_is_compared_with_the_hardest_negative_that_is_not_itself() -> None:
    names, negatives = torch.eye(3)[:2], torch.eye(3)[[1, 2]]
    words, scores = best_words(torch.eye(3)[:2], names, negatives, torch.tensor([-1, 0]), count=2)
    assert words.tolist() == [[0, 1], [1, 0]]
    best = 1 / (1 + 2.718281828**-10)
    assert scores.tolist()[0] == pytest.approx([best, 0.5], abs=1e-6)
    assert scores.tolist()[1] == pytest.approx([best, 1 - best], abs=1e-6)


def test_a_large_scene_is_thinned_evenly_by_area_and_grows_to_cover_the_same(scene: Gaussians) -> None:
    rows, grown = thinned(scene, 1000)
    assert len(rows) == len(set(rows.tolist())) == 1000 and 1 < grown <= 2
    assert torch.equal(rows, thinned(scene, 1000)[0])
    assert thinned(scene, len(scene))[1] == 1.0
    area = scene.scales_N3.exp().topk(2, 1).values.prod(1)
    assert float(area[rows].mean()) > float(area.mean())
    far = scene.means_N3[:, 0] > scene.means_N3[:, 0].median()
    share = float(area[far].sum() / area.sum())
    assert abs(float(far[rows].float().mean()) - share) < 0.12


def test_a_million_gaussians_are_thinned_in_a_moment_and_the_page_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 1_000_000
    many = Gaussians(
        torch.rand(count, 3, generator=generator),
        torch.full((count, 3), -5.0),
        torch.tensor([1.0, 0, 0, 0]).expand(count, 4),
        torch.zeros(count),
        torch.zeros(count, 3),
    )
    rows, grown = thinned(many, view.MOST)
    assert len(rows) == view.MOST and grown == pytest.approx((count / view.MOST) ** 0.5, rel=0.01)


@pytest.fixture(scope="module")
def page(scene: Gaussians, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    write_scene(folder / "room.ply", scene)
    words = [str(folder / "room.ply"), "--queries", ",".join(QUERIES), "--model", str(PUBLISHED), "--passes", "2"]
    return view.main([*words, "--most", "2500", "--title", "a <room>"])


def test_the_program_writes_one_page_of_a_few_megabytes(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert page.name == "room.html" and 1e6 < page.stat().st_size < 3e6
    assert "<title>a &lt;room&gt;</title>" in text and "MIT License" in text
    assert text.count("</script>") == 3 + len(view.MODULES)
    facts = json.loads(re.search(r'<script id="facts" type="application/json">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert facts["count"] == 2500 < facts["of"] and facts["queries"] == QUERIES
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and "http" not in policy[1]


def test_a_person_opens_moves_and_asks_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path, 900, 600) as browser:
        browser.open(page)
        browser.wait_for("window.viewer && viewer.state.ready")
        assert "2,500 of" in browser.ask("document.getElementById('count').textContent")
        assert browser.ask("document.getElementById('title').textContent") == "a <room>"
        first = shot(browser, tmp_path)
        assert first.getextrema() != ((first.getpixel((5, 5))[0],) * 2,) * 3  # something is drawn

        before = browser.ask("viewer.camera.position.toArray()")
        browser.drag((300, 300), (380, 330))
        browser.wait_for(f"JSON.stringify(viewer.camera.position.toArray()) !== '{json.dumps(before)}'")
        frames(browser)
        moved = shot(browser, tmp_path)
        assert different(first, moved) > 0.05

        browser.ask("document.querySelector('input[value=\"query 0\"]').click()")
        frames(browser)
        asked = shot(browser, tmp_path)
        assert red(asked) > red(moved)
        found = browser.ask("viewer.state.found")
        assert 0 < found < 2500
        slide = "const s = document.getElementById('threshold'); s.value = {}; s.dispatchEvent(new Event('input'))"
        browser.ask(f"(() => {{ {slide.format(0)} }})()")
        assert browser.ask("viewer.state.found") > found
        browser.ask(f"(() => {{ {slide.format(1)} }})()")
        frames(browser)
        assert browser.ask("viewer.state.found") == 0 and red(shot(browser, tmp_path)) < red(asked)

        browser.click(300, 300)
        browser.wait_for("viewer.state.picked")
        picked = browser.ask("viewer.state.picked")
        assert len(picked["words"]) == 5 and [name for name, _ in picked["queries"]] == QUERIES
        assert browser.ask("document.getElementById('picked-title').textContent") == picked["words"][0][0]
        assert browser.ask("document.querySelectorAll('#picked-words li').length") == 5

        browser.ask("document.querySelector('input[value=features]').click()")
        frames(browser)
        assert different(shot(browser, tmp_path), asked) > 0.05
        assert browser.said == []
        assert all(url.startswith(("file:", "blob:", "data:")) for url in browser.asked), browser.asked


def frames(browser: Browser) -> None:
    """Wait until some are drawn, the last ones with sorted Gaussians."""
    browser.wait_for(f"viewer.state.frames > {browser.ask('viewer.state.frames') + 4} && viewer.state.ready")


def shot(browser: Browser, folder: Path) -> Image.Image:
    """The picture of the scene, without the panel."""
    with Image.open(browser.screenshot(folder / "shot.png")) as image:
        return image.convert("RGB").crop((0, 0, 580, 600))


def different(one: Image.Image, two: Image.Image) -> float:
    """Share of the pixels that are plainly others."""
    apart = (pixels(one) - pixels(two)).abs().amax(-1)
    return float((apart > 24).float().mean())


def red(image: Image.Image) -> float:
    """Share of the pixels in the colour of what was found."""
    r, g, b = pixels(image).unbind(-1)
    return float(((r > g + 60) & (r > b + 60)).float().mean())


def pixels(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(image).astype(np.float32))


def test_what_cannot_be_shown_is_refused_by_name(page: Path, tmp_path: Path) -> None:
    words = [str(page.with_suffix(".ply")), "--queries"]
    refused('--queries " ,": expected 1 to 64 texts', view.main, [*words, " ,"])
    refused("--output x.png: expected a name that ends in .html", view.main, [*words, "a", "--output", "x.png"])
    refused("no such file|no config.json", view.main, [*words, "a", "--model", str(tmp_path)])
    assert queries_of("a chair, a lamp,a chair,") == ["a chair", "a lamp"]
