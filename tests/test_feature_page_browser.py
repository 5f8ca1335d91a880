"""The page of features in a real browser: what is seen, clicked, typed and fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Listener
from PIL import Image
from test_feature_page import page_data, page_vectors
from test_inputs import make_video

from brixel_cli.config.extract import ExtractOptions
from brixel_cli.engines.extracting.extraction import extract

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'brixel[browser]'")
skimage = pytest.importorskip("skimage", reason="needs photographs: pip install 'brixel[demo]'")

PHOTOGRAPHS = ("astronaut", "camera", "coffee", "chelsea", "brick", "coins")
HOSTILE = "<img src=x onerror=alert(1)>.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model: tuple[str, str]) -> Path:
    """A page of six photographs and three sources; the first has a name that is HTML."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "photos").mkdir()
    for name in PHOTOGRAPHS:
        (found,) = (Path(skimage.__file__).parent / "data").glob(f"{name}.*")
        path = folder / "photos" / (HOSTILE if name == "astronaut" else f"{name}.png")
        Image.open(found).convert("RGB").resize((256, 192)).save(path)
    options = ExtractOptions([str(folder / "photos")], res=96, checkpoint=model[0], device="cpu", precision="float32",
                             page=folder / "page.html", page_sources=("student", "backbone", "teacher"))  # fmt: skip
    extract(options, Listener())
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}: apt-get install chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, file: Path) -> Iterator[Any]:
    """Opens the page, with options of the browser's window; whatever it complains of or fetches fails the test."""
    contexts, complaints = [], []

    def open_page(link: str = "", path: Path = file, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 1000}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        own = ("blob:", path.as_uri())
        page.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
        page.goto(path.as_uri() + link)
        page.wait_for_selector("body[data-ready]")
        frames(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def frames(page: Any, count: int = 3) -> None:
    """Wait until the page has drawn."""
    for _ in range(count):
        page.evaluate("new Promise(requestAnimationFrame)")


def indices(page: Any, image: int, source: int) -> np.ndarray:
    """The heat map as it stands on a canvas, each pixel as its place in the colour bar; -1 where nothing is drawn."""
    found = page.evaluate(
        """([image, source]) => {
            const canvas = cards[image].views[source].canvas;
            const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            return [canvas.height, canvas.width, Array.from(data), RAMP];
        }""",
        [image, source],
    )
    height, width, values, ramp = found
    pixels = np.array(values).reshape(height, width, 4)
    places = {tuple(colour): place for place, colour in enumerate(ramp)}
    assert len(places) == 256
    return np.array([[places[tuple(pixel[:3])] if pixel[3] else -1 for pixel in row] for row in pixels])


def click(page: Any, image: int, y: float, x: float, source: int = 0, **options: Any) -> None:
    box = page.locator(".card").nth(image).locator(".view").nth(source + 1)  # the first is the image alone
    size = box.bounding_box()
    box.click(position={"x": x * size["width"], "y": y * size["height"]}, **options)
    frames(page)


@pytest.fixture(scope="module")
def data(file: Path) -> dict:
    return page_data(file.read_text())


@pytest.fixture(scope="module")
def vectors(data: dict) -> list[dict[str, np.ndarray]]:
    return page_vectors(data)


def heat_maps(vectors: list, source: str, query: np.ndarray) -> list[np.ndarray]:
    return [np.einsum("khw,k->hw", maps[source], query) for maps in vectors]


def as_indices(heat: np.ndarray, floor: float) -> np.ndarray:
    return 255 * ((heat - floor) / (1 - floor)).clip(0, 1)


def test_a_click_shows_numpys_heat_map_in_every_image_and_source(opened, data, vectors) -> None:
    page = opened()
    click(page, 2, 0.4, 0.7)
    page.locator("#size").evaluate("(slider) => { slider.value = 90; slider.oninput(); }")  # so that all are in view
    frames(page)
    for number, source in enumerate(data["sources"]):
        height, width = data["images"][2]["grids"][number]
        query = vectors[2][source][:, int(0.4 * height), int(0.7 * width)]
        for image, heat in enumerate(heat_maps(vectors, source, query)):
            assert np.abs(indices(page, image, number) - as_indices(heat, data["floor"])).max() <= 1
    assert page.locator(".mark.pin").count() == 3


def test_shift_click_pins_the_mean_of_the_connected_region(opened, data, vectors) -> None:
    page = opened()
    click(page, 1, 0.52, 0.52, modifiers=["Shift"])
    map_ = vectors[1]["student"]
    cell = (map_.shape[1] // 2, map_.shape[2] // 2)
    similar = np.einsum("khw,k->hw", map_, map_[:, *cell]) >= 0.6
    region, left = {cell}, [cell]
    while left:
        y, x = left.pop()
        for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= place[0] < map_.shape[1] and 0 <= place[1] < map_.shape[2]
            if inside and place not in region and similar[place]:
                region.add(place)
                left.append(place)
    assert len(region) > 1
    query = np.mean([map_[:, y, x] for y, x in region], axis=0)
    heat = heat_maps(vectors, "student", query / np.linalg.norm(query))[1]
    assert np.abs(indices(page, 1, 0) - as_indices(heat, data["floor"])).max() <= 1
    assert page.locator(".mark.pin.square").count() == 3
    assert "region=0.6" in page.url


def test_the_mask_hides_what_is_less_similar_and_is_outlined(opened, data, vectors) -> None:
    page = opened("#image=0&y=3&x=4")
    page.locator("#threshold").evaluate("(slider) => { slider.value = 70; slider.oninput(); }")
    frames(page)
    heat = heat_maps(vectors, "student", vectors[0]["student"][:, 3, 4])[0]
    sure = np.abs(heat - 0.7) > 0.001
    inside = indices(page, 0, 0) >= 0
    assert (inside == (heat >= 0.7))[sure].all()
    scale, pixels = page.evaluate(
        """(() => {
            const { line, map } = cards[0].views[0], { height, width } = line;
            const { data } = line.getContext('2d').getImageData(0, 0, width, height);
            return [width / map.width, Array.from({ length: height }, (_, y) => Array.from({ length: width },
                (_, x) => data[4 * (y * width + x) + 3] && (data[4 * (y * width + x)] ? 2 : 1)))];
        })()"""
    )
    expected = np.zeros_like(pixels := np.array(pixels))  # 1 black, within 2 pixels of a border; 2 white, within 1
    for colour, thick in ((1, 2), (2, 1)):
        for y, x in np.argwhere(inside[1:] != inside[:-1]):
            at = (y + 1) * scale
            expected[at - thick : at + thick, max(x * scale - thick, 0) : (x + 1) * scale + thick] = colour
        for y, x in np.argwhere(inside[:, 1:] != inside[:, :-1]):
            at = (x + 1) * scale
            expected[max(y * scale - thick, 0) : (y + 1) * scale + thick, at - thick : at + thick] = colour
    assert (expected == 2).any()
    np.testing.assert_array_equal(pixels, expected)
    page.keyboard.press("Escape")
    frames(page)
    assert not page.locator("canvas.line").first.is_visible()


def test_top_matches_are_the_best_places_of_other_images(opened, data, vectors) -> None:
    page = opened("#image=3&y=10&x=12")
    heats = heat_maps(vectors, "student", vectors[3]["student"][:, 10, 12])
    height, width = heats[3].shape
    y, x = np.mgrid[0:height, 0:width]
    near = np.hypot((y - 10) / height, (x - 12) / width) < 0.15
    best = sorted(
        (np.where(near, -1, heat).max() if n == 3 else heat.max() for n, heat in enumerate(heats)), reverse=True
    )
    shown = page.evaluate("cards.map((card) => card.views[0].match).filter((m) => !m.hidden).map((m) => m.textContent)")
    assert sorted(shown) == [f"{rank + 1} · {value:.2f}" for rank, value in enumerate(best[:5])]
    page.keyboard.press("m")
    frames(page)
    assert page.evaluate("cards.every((card) => card.views.every((view) => view.match.hidden))")


def test_labels_of_matches_are_never_cut_off(opened) -> None:
    page = opened()
    page.locator("#size").evaluate("(slider) => { slider.value = 90; slider.oninput(); }")
    for left in (0.001, 0.999):  # as if the best place of every image were at the edge
        page.evaluate(f"findMatches = () => cards.map((_, image) => ({{ image, value: 0.5, y: {left}, x: {left} }}))")
        page.evaluate(f"moveTo(pointAt(0, 0.5, {left}))")
        frames(page)
        outside = page.evaluate(
            """cards.flatMap((card) => card.views).filter(({ match, box }) => {
                const [inner, outer] = [match.getBoundingClientRect(), box.getBoundingClientRect()];
                return match.hidden || inner.width < 20 || inner.left < outer.left - 1 || inner.right > outer.right + 1
                    || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
            }).length"""
        )
        assert outside == 0


def test_several_pins_share_the_map_by_colour(opened, vectors) -> None:
    page = opened("#image=0&y=3&x=4&image=1&y=8&x=9")
    first, second = (
        heat_maps(vectors, "student", query)[0]
        for query in (vectors[0]["student"][:, 3, 4], vectors[1]["student"][:, 8, 9])
    )
    found = np.array(page.evaluate("Array.from(cards[0].maps[0].owner)")).reshape(first.shape)
    sure = np.abs(first - second) > 1e-4
    np.testing.assert_array_equal(found[sure], (second > first)[sure])
    page.locator("#pins button").first.click()
    frames(page)
    assert "image=1&y=8&x=9" in page.url
    assert page.locator("#pins button").count() == 1


def test_a_deep_link_pins_its_point_and_the_address_follows(opened, data) -> None:
    page = opened("#image=3&y=14&x=9")
    assert (
        page.locator("#pins button").get_attribute("title")
        == f"Remove the pin at {data['images'][3]['name']}, row 14, column 9"
    )
    page.evaluate("location.hash = '#image=1&y=2&x=3'")
    page.wait_for_function("state.pins.length === 1 && state.pins[0].image === 1")
    opened("#image=99&y=x")  # nonsense is left alone


def test_keys_move_pin_enlarge_and_clear(opened, data) -> None:
    page = opened()
    page.locator(".card").nth(1).focus()
    height, width = data["images"][1]["grids"][data["finest"]]
    for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
        page.keyboard.press(key)
    frames(page)
    where = f"row {height // 2 - 2}, column {width // 2 + 1}"
    assert page.locator("#status").inner_text() == f"{data['images'][1]['name']}, {where}"
    page.keyboard.press("Enter")
    assert f"image=1&y={height // 2 - 2}&x={width // 2 + 1}" in page.url
    page.keyboard.press("f")
    assert page.locator(".card.large .photo img").is_visible()
    page.keyboard.press("o")
    original = page.locator(".card.original .photo .view")
    assert original.evaluate("(box) => [box.offsetWidth, box.offsetHeight]") == [256, 192]  # as large as it is
    assert page.locator(".card.original .view:visible").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".card.large, .card.original").count() == 0
    page.keyboard.press("Escape")
    assert page.locator(".mark.pin").count() == 0
    page.keyboard.press("c")
    assert page.locator("#components").evaluate("(list) => list.selectedIndex") == 1
    page.keyboard.press("]")
    assert page.locator("#threshold-value").inner_text() == "0.02"


def test_without_a_pin_equal_features_have_equal_colours(opened, data) -> None:
    page = opened()
    for chosen in range(3):  # components 1-3, 4-6, 7-9
        page.locator("#components").select_option(index=chosen)
        frames(page)
        shown = page.evaluate("Array.from(cards[0].views[0].canvas.getContext('2d').getImageData(0, 0, 1, 1).data)")
        assert shown == pytest.approx([*colours(page, data, 3 * chosen)[0], 255], abs=1)


def test_names_are_text(opened) -> None:
    page = opened()
    assert HOSTILE in page.locator(".card figcaption span").all_inner_texts()
    assert page.locator("img:not([src^='blob:'])").count() == 0


def test_what_is_pointed_at_is_shown_and_goes_with_the_pointer(opened, data, vectors) -> None:
    page = opened()
    box = page.locator(".card").nth(1).locator(".view").nth(1).bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.6 * box["height"])
    frames(page)
    height, width = data["images"][1]["grids"][0]
    cell = int(0.6 * height), int(0.3 * width)
    for image, heat in enumerate(heat_maps(vectors, "student", vectors[1]["student"][:, *cell])[:2]):
        assert np.abs(indices(page, image, 0) - as_indices(heat, data["floor"])).max() <= 1
    assert page.evaluate("cards[1].views.map((view) => view.value.textContent)") == ["1.00"] * 3
    assert page.locator("i.mark:visible").count() == 3
    page.mouse.move(2, 2)
    frames(page)
    assert page.locator("i.mark:visible").count() == 0
    assert page.evaluate("cards[1].views[0].canvas.getContext('2d').getImageData(0, 0, 1, 1).data[0]") == pytest.approx(
        colours(page, data, 0)[1][0], abs=1
    )


def colours(page: Any, data: dict, first: int) -> list[list[float]]:
    """Red, green and blue of the first location of each image, of the components from `first` on."""
    planes = page.evaluate(
        "cards.map((card) => [...Array(K).keys()].map((k) => card.maps[0].planes[k * card.maps[0].heat.length]))"
    )
    parts = range(first + 1, first + 4)
    return [
        [np.clip(255 * (values[k] - data["low"][k]) / (data["high"][k] - data["low"][k]), 0, 255) for k in parts]
        for values in planes
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scheme_of_the_reader_is_followed(opened, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 19, 24)"}[scheme]


def test_on_a_telephone_it_fits_and_a_second_tap_pins(opened) -> None:
    page = opened(viewport={"width": 400, "height": 850}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    view = page.locator(".card").first.locator(".view").nth(1)
    view.tap(position={"x": 50, "y": 40})
    frames(page)
    assert page.locator(".mark.pin").count() == 0
    assert page.locator("#status").inner_text().startswith(HOSTILE)
    view.tap(position={"x": 51, "y": 40})
    frames(page)
    assert page.locator(".mark.pin").count() == 3


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory, model: tuple[str, str]) -> Path:
    """A page of five frames of a video."""
    folder = tmp_path_factory.mktemp("film")
    clip = make_video(folder / "clip.mp4")
    options = ExtractOptions([str(clip)], res=96, checkpoint=model[0], device="cpu", precision="float32", every=2,
                             page=folder / "film.html", page_sources=("student", "backbone"))  # fmt: skip
    extract(options, Listener())
    return folder / "film.html"


def test_the_heat_map_of_a_pin_follows_over_the_frames_of_a_video(opened, film: Path) -> None:
    data = page_data(film.read_text())
    vectors = page_vectors(data)
    page = opened("#image=1&y=9&x=20", path=film)
    assert page.locator(".card:visible").count() == 1
    assert page.locator("#frame-value").inner_text() == "clip.mp4#02"  # the pin's
    heats = heat_maps(vectors, "student", vectors[1]["student"][:, 9, 20])
    slider = page.locator("#frame")
    for number, heat in enumerate(heats):
        slider.evaluate(f"(slider) => {{ slider.value = {number}; slider.oninput(); }}")
        frames(page)
        assert page.locator(".card:visible figcaption > span").first.inner_text() == f"clip.mp4#{2 * number:02}"
        assert np.abs(indices(page, number, 0) - as_indices(heat, data["floor"])).max() <= 1
        assert page.locator(".card:visible .mark.pin").count() == (2 if number == 1 else 0)
    assert slider.evaluate("(slider) => [slider.min, slider.max, slider.value]") == ["0", "4", "4"]


def test_a_video_plays_and_stops(opened, film: Path) -> None:
    page = opened(path=film)
    page.keyboard.press(" ")
    assert page.locator("#play").inner_text() == "Pause"
    for number in (2, 0):  # it begins again after the last
        shown = f"document.querySelector('.current') === cards[{number}].element"
        page.evaluate(
            f"new Promise((done) => {{ const look = () => {shown} ? done() : setTimeout(look, 10); look(); }})"
        )
    page.keyboard.press(" ")
    assert page.locator("#play").inner_text() == "Play"
    stopped = page.locator("#frame-value").inner_text()
    page.wait_for_timeout(400)
    assert page.locator("#frame-value").inner_text() == stopped


def test_opacity_and_frame_time(opened) -> None:
    page = opened()
    assert not page.locator("#time").is_visible()  # the slider is for videos
    page.locator("#opacity").evaluate("(slider) => { slider.value = 30; slider.oninput(); }")
    assert page.locator("canvas.map").first.evaluate("(canvas) => canvas.style.opacity") == "0.3"
    page.evaluate("measure(20)")
    milliseconds = page.evaluate("measure(30)")
    print(f"{milliseconds:.1f} ms from frame to frame, six images of 24x32 in three sources")  # noqa: T201
    assert milliseconds < 200  # a machine with other work; the aim is 33
