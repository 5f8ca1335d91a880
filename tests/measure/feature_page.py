"""Measure a page of `brixel extract --page` in Chromium, and take its picture.

    brixel extract --input photos --res 224 --fit centre --page features.html --page-sources student,backbone,teacher
    python tests/measure/feature_page.py features.html --link 'image=3&y=14&x=9' --picture docs/page.jpg

Prints one line of JSON: bytes, seconds from opening to drawn, and of a frame while the point moves, with the mask as given:
milliseconds from one to the next, and of processor time of the page's thread, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from playwright.sync_api import CDPSession, sync_playwright

FRAMES = 60


def busy_seconds(thread: CDPSession) -> float:
    (found,) = (
        one["value"] for one in thread.send("Performance.getMetrics")["metrics"] if one["name"] == "TaskDuration"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--link", default="", help="what follows # in the address")
    parser.add_argument("--mask", type=int, default=0, help="of the slider, 0 to 100")
    parser.add_argument("--pane", type=int, default=190, help="pixels of a map's width; small enough, all are in view")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--size", type=int, nargs=2, default=(1400, 1000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        width, height = chosen.size
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if chosen.dark else "light"
        )
        began = time.perf_counter()
        page.goto(f"{chosen.page.resolve().as_uri()}")
        page.wait_for_selector("body[data-ready]")
        page.evaluate("new Promise(requestAnimationFrame)")
        opened = time.perf_counter() - began
        page.evaluate(f"element('size').value = {chosen.pane}; element('size').oninput()")
        page.evaluate(f"element('threshold').value = {chosen.mask}; element('threshold').oninput()")
        page.evaluate("measure(20)")
        thread = page.context.new_cdp_session(page)
        thread.send("Performance.enable", {"timeDomain": "threadTicks"})
        before = busy_seconds(thread)
        frame = page.evaluate(f"measure({FRAMES})")
        busy = (busy_seconds(thread) - before) * 1000 / FRAMES
        in_view = page.evaluate("cards.filter((card) => card.visible).length")
        found = {"in_view": in_view, "busy_ms": round(busy, 1)} | {
            "bytes": chosen.page.stat().st_size,
            "images": page.locator(".card").count(),
            "opened_s": opened,
        }
        page.evaluate("moveTo(null)")
        page.evaluate(f"location.hash = {json.dumps(chosen.link)}")
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(500)
        if chosen.picture:
            page.screenshot(path=chosen.picture, **({"quality": 80} if chosen.picture.suffix == ".jpg" else {}))
        note = page.locator("#note").inner_text()
        print(json.dumps({**found, "opened_s": round(opened, 2), "frame_ms": round(frame, 1), "note": note}))  # noqa: T201
        browser.close()


if __name__ == "__main__":
    main()
