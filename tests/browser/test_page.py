"""The page at ``/``, in a real browser, against the real gateway."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import support
from asking import ZOOM, picture, scripted
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped] # has no types
from PIL import Image
from playwright.sync_api import FilePayload, Locator, Page, expect
from visits import Visits

from ergo_server.api.playground import FOLDER
from ergo_server.engine.scripted import ScriptedEngine
from ergo_server.errors import EngineBusy, EngineFailed
from ergo_train.scenes import COLOURS, Scene

SAMPLES = runpy.run_path(str(support.ROOT / "docs" / "samples.py"))
QUESTION = "What is the code on the red circle?"
PHONE = {"width": 360, "height": 740}
KEY = "ergo-page"
KEYS = f"alice {hashlib.sha256(KEY.encode()).hexdigest()}"


@pytest.fixture(scope="module")
def shown() -> Scene:
    """A scene that is not among the page's own, wider than it is high."""
    return support.held_out(5, size=(1680, 1260))


@pytest.fixture
def engine() -> ScriptedEngine:
    """An engine that answers at once."""
    return scripted()


@pytest.fixture
def at_once(engine: ScriptedEngine) -> Iterator[str]:
    """URL of a gateway on it."""
    with support.gateway(engine) as url:
        yield url


# --- what a person does ---------------------------------------------------------------------------------------------------


def payload(data: bytes, name: str = "scene.jpg") -> FilePayload:
    """Return a file for the page's file field."""
    return {"name": name, "mimeType": "image/jpeg", "buffer": data}


def choose(page: Page, data: bytes, name: str = "scene.jpg") -> None:
    """Choose a file."""
    page.set_input_files("#file", payload(data, name))


def transfer(page: Page, event: str, data: bytes, name: str = "scene.jpg") -> None:
    """Drop or paste a file."""
    script = """([event, encoded, name]) => {
      const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name, { type: "image/jpeg" }));
      const made = event === "paste"
        ? new ClipboardEvent(event, { clipboardData: data, bubbles: true, cancelable: true })
        : new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true });
      document.body.dispatchEvent(made);
    }"""
    page.evaluate(script, [event, base64.b64encode(data).decode(), name])


def ask(page: Page, question: str = QUESTION) -> None:
    """Type a question and ask it."""
    page.fill("#question", question)
    page.click("#go")


def take_sample(page: Page, number: int = 0) -> None:
    """Take a sample scene, and wait until it is shown."""
    page.locator(".sample").nth(number).click()
    expect(page.locator("#image")).to_be_visible()


def answered(page: Page, where: str = "zoomed") -> Locator:
    """Return the answer, once it is whole."""
    expect(page.locator("#go")).to_have_text("Ask")
    expect(page.locator(f"#{where} .cost")).to_contain_text("visual tokens")
    return page.locator(f"#{where} .answer")


def told(page: Page, data: bytes, question: str, **fields: str | list[str]) -> dict[str, Any]:
    """Return what the interface answers, asked directly."""
    url = page.url.rstrip("/")
    fields = {"question": question, "include": ["overview", "crop", "replies"], **fields}
    response = httpx2.post(f"{url}/v1/vqa", files={"image": data}, data=fields, timeout=60, trust_env=False)
    answer: dict[str, Any] = response.raise_for_status().json()
    return answer


class Watch:
    """Keeps the responses to the page's own questions.

    Args:
        page: where they are asked.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self.asked: list[dict[str, Any]] = []
        page.on("request", lambda request: self.asked.append({"method": request.method, "path": request.url.split("/", 3)[3]}))

    def count(self, method: str, path: str) -> int:
        """Return how often a path was asked."""
        return self.asked.count({"method": method, "path": path})


# --- answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_an_image_comes_in_by_every_way(visit: Visits, embedded: str, shown: Scene, way: str) -> None:
    """An image that is chosen, dropped or pasted is shown at its size, and the question about it is answered rightly."""
    page, data = visit(embedded), support.encode(shown)
    choose(page, data) if way == "choose" else transfer(page, way, data)
    expect(page.locator("#facts")).to_contain_text("scene.jpg · 1680 × 1260")
    ask(page, shown.question)
    expect(answered(page)).to_have_text(shown.answer)


@pytest.mark.parametrize("number", range(len(SAMPLES["SAMPLES"])))
def test_the_samples_are_answered_rightly(visit: Visits, embedded: str, number: int) -> None:
    """Each sample brings its question with it, is the held-out scene that docs/samples.py draws, and gets the right answer."""
    page, scene = visit(embedded), SAMPLES["draw"](list(SAMPLES["SAMPLES"])[number])
    take_sample(page, number)
    expect(page.locator("#facts")).to_contain_text(f"{scene.image.width} × {scene.image.height}")
    name = page.input_value("#question").removesuffix("?").removesuffix(".")
    assert name.endswith(scene.target.name)
    page.click("#go")
    expect(answered(page)).to_have_text(scene.answer)


def test_the_samples_are_small() -> None:
    """No sample is larger than 200 kB, and the page's first is the one in the docs."""
    files = {path.name: path for path in (FOLDER / "static").glob("*.jpg")}
    assert set(files) == {f"{name}{small}.jpg" for name in SAMPLES["SAMPLES"] for small in ("", "-small")}
    assert max(path.stat().st_size for path in files.values()) <= 200_000
    assert files["scene.jpg"].read_bytes() == (support.ROOT / "docs" / "images" / "scene.jpg").read_bytes()


def lines(page: Page, box: list[int], size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Return where the canvas has white lines between black ones, in pixels of the image.

    Looked for along the row and the column through the middle of the box, so that its four edges should be found.
    """
    script = """([box, width, height]) => {
      const canvas = document.getElementById("image");
      const context = canvas.getContext("2d");
      const scale = [canvas.width / width, canvas.height / height];
      const at = [Math.round((box[0] + box[2]) / 2 * scale[0]), Math.round((box[1] + box[3]) / 2 * scale[1])];
      const found = [context.getImageData(0, at[1], canvas.width, 1), context.getImageData(at[0], 0, 1, canvas.height)];
      return found.map(({ data }, axis) => {
        const is = (i, test) => i >= 0 && 4 * i < data.length && [0, 1, 2].every((c) => test(data[4 * i + c]));
        const white = (i) => is(i, (value) => value >= 250);
        const black = (i) => is(i, (value) => value <= 5);
        const centres = [];
        for (let i = 0; 4 * i < data.length; i++) {
          if (!white(i) || white(i - 1)) continue;
          let end = i;
          while (white(end)) end++;
          if ([1, 2].some((d) => black(i - d)) && [0, 1].some((d) => black(end + d))) centres.push((i + end) / 2 / scale[axis]);
        }
        return centres;
      });
    }"""
    across, down = page.evaluate(script, [box, *size])
    return across, down


@pytest.mark.parametrize(("orientation", "density"), [(1, 2), (6, 1)])
def test_the_box_is_where_it_should_be(visit: Visits, embedded: str, shown: Scene, orientation: int, density: int) -> None:
    """The four lines on the canvas are within a pixel of the display of the interface's box, on what was asked for, upright."""
    with io.BytesIO() as file:
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = shown.image if orientation == 1 else shown.image.transpose(Image.Transpose.ROTATE_90)
        stored.save(file, "JPEG", quality=92, exif=exif)
        data = file.getvalue()
    page = visit(embedded, device_scale_factor=density)
    visit.expected.append("willReadFrequently")  # the browser's advice to who reads a canvas, which only this test does
    choose(page, data)
    ask(page, shown.question)
    expect(answered(page)).to_have_text(shown.answer)
    box = told(page, data, shown.question)["regions"][0]["box"]
    expect(page.locator("#image")).to_have_attribute(
        "aria-label",
        f"The image, 1680 by 1260 pixels; the model looked closer at the region from {box[0]}, {box[1]} to {box[2]}, {box[3]}",
    )
    across, down = lines(page, box, (1680, 1260))
    display = page.locator("#image").bounding_box()
    assert display is not None
    a_pixel = 1680 / display["width"]
    assert across == pytest.approx([box[0], box[2]], abs=a_pixel)
    assert down == pytest.approx([box[1], box[3]], abs=a_pixel)
    colour = page.evaluate(
        """([x, y]) => { const canvas = document.getElementById("image");
        return [...canvas.getContext("2d").getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3); }""",
        [shown.target.x / 1680, (shown.target.y + 0.25 * shown.target.diameter) / 1260],
    )
    assert colour == pytest.approx(COLOURS[shown.target.colour], abs=25)


def test_what_the_interface_says_is_shown(visit: Visits, embedded: str, shown: Scene) -> None:
    """Tokens, views, timings and raw replies on the page are those of the response, and the views have its sizes."""
    page, data = visit(embedded), support.encode(shown)
    choose(page, data)
    with page.expect_response("**/v1/vqa") as caught:
        ask(page, shown.question)
    answered(page)
    done = json.loads(re.findall(r"^event: done\ndata: (.*)$", caught.value.text(), re.MULTILINE)[0])
    tokens, region = done["visual_tokens"], done["regions"][0]
    saved = round(100 * tokens["saved_ratio"])
    assert (tokens["overview"], tokens["crop"], tokens["baseline"]) == tuple(
        told(page, data, shown.question)["visual_tokens"][name] for name in ("overview", "crop", "baseline")
    )
    parts = f"{tokens['overview']} overview + {tokens['crop']} crop"
    spent = f"{tokens['total']} ({parts}) instead of {tokens['baseline']:,}: {saved} % saved."
    expect(page.locator("#saving")).to_have_text(spent)
    widths = {
        kind: page.locator(f"#bars .{kind}").evaluate("(piece) => parseFloat(piece.style.width)")
        for kind in ("overview", "crop", "baseline")
    }
    assert widths == pytest.approx({kind: 100 * tokens[kind] / tokens["baseline"] for kind in widths}, abs=0.01)
    for name, view in (("overview", done["overview"]), ("crop", region["crop"])):
        size = page.locator(f"#{name}").evaluate("(image) => [image.naturalWidth, image.naturalHeight, image.src]")
        assert size == [view["width"], view["height"], view["data"]]
        expect(page.locator(f"#{name}-size")).to_have_text(f"{view['width']} × {view['height']}")
    rows = dict(
        zip(
            page.locator("#timings th[scope=row]").all_text_contents(),
            page.locator("#timings td").all_text_contents(),
            strict=True,
        )
    )
    stages = {"Zoom turn": "zoom_turn_ms", "Answer turn": "answer_turn_ms", "Total": "total_ms"}
    for title, stage in stages.items():
        assert rows[title] == milliseconds(done["timings"][stage])
    expect(page.locator("#replies pre").first).not_to_be_visible()
    page.click("#replies summary")
    assert page.locator("#replies pre").all_text_contents() == done["replies"]
    assert all(re.fullmatch(r"(?s).*</(zoom|answer)>.*", reply) for reply in done["replies"])


def milliseconds(value: float) -> str:
    """Return a time as the page writes it."""
    if value < 10:
        return f"{value:.1f} ms" if value >= 0.1 else "< 0.1 ms"
    return f"{round(value)} ms" if value < 1000 else f"{value / 1000:.2f} s"


def test_the_answer_streams_and_can_be_stopped(visit: Visits) -> None:
    """Box, crop and the beginning of the answer are on the page while the engine goes on; Stop ends its work."""
    engine = scripted(answer="<answer>" + "one two three " * 500 + "</answer>", seconds_per_token=0.02)
    with support.gateway(engine) as url:
        page = visit(url)
        choose(page, picture())
        ask(page)
        expect(page.locator("#zoomed .answer")).to_contain_text("one two three")
        expect(page.locator("#image")).to_have_attribute("aria-label", re.compile("looked closer"))
        expect(page.locator("#crop")).to_be_visible()
        assert engine.running == 1
        page.click("text=Stop")
        expect(page.get_by_role("status")).to_have_text("Stopped.")
        support.wait_until(lambda: engine.running == 0, "the engine has stopped")
        expect(page.locator("#zoomed .cost")).to_be_empty()
        expect(page.locator("#history")).not_to_be_visible()


def test_with_and_without_zoom(visit: Visits, embedded: str) -> None:
    """The switch shows both answers with their tokens side by side for one upload, also when it is turned on afterwards."""
    page = visit(embedded)
    watch = Watch(page)
    page.check("#compare")
    take_sample(page)
    page.click("#go")
    expect(answered(page)).to_have_text("434")
    data = (FOLDER / "static" / "scene.jpg").read_bytes()
    single = told(page, data, QUESTION, zoom="never")
    expect(answered(page, "single")).to_have_text(single["answer"])
    expect(page.locator("#single .cost")).to_contain_text(f"{single['visual_tokens']['total']} visual tokens")
    first, second = (page.locator(name).bounding_box() for name in ("#zoomed", "#single"))
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    assert page.locator("#timings thead th").all_text_contents() == ["Stage", "With zoom", "Without zoom"]
    assert page.locator(".bar-title").all_text_contents() == ["With zoom", "Without zoom", "Baseline"]
    page.uncheck("#compare")
    expect(page.locator("#single")).not_to_be_visible()
    page.check("#compare")
    expect(answered(page, "single")).to_have_text(single["answer"])
    assert (watch.count("POST", "v1/images"), watch.count("POST", "v1/vqa")) == (1, 3)


def test_no_zoom_is_said(visit: Visits, embedded: str) -> None:
    """An image that fits the budget is answered without a region: no crop is shown, no box drawn, and the reason is said."""
    page = visit(embedded)
    choose(page, picture(112, 112))
    ask(page)
    answered(page)
    expect(page.locator("#zoomed .note")).to_contain_text("fits the budget")
    expect(page.locator("#crop-figure")).not_to_be_visible()
    expect(page.locator("#image")).to_have_attribute("aria-label", "The image, 112 by 112 pixels")


@pytest.mark.parametrize(("zoom", "said"), [("no idea", "named no region"), ("<zoom>[9, 9, 9, 9]</zoom>", "region that is none")])
def test_a_region_that_is_none_is_said(visit: Visits, zoom: str, said: str) -> None:
    """Where the model names no usable region the page says so, and draws no box."""
    with support.gateway(scripted(zoom=zoom)) as url:
        page = visit(url)
        choose(page, picture())
        ask(page)
        answered(page)
        expect(page.locator("#zoomed .note")).to_contain_text(said)
        expect(page.locator("#image")).to_have_attribute("aria-label", "The image, 800 by 600 pixels")


def test_an_image_the_browser_cannot_show_can_be_asked_about(visit: Visits, at_once: str) -> None:
    """The page says that it cannot show the file, asks nevertheless, and shows the views that the server made."""
    page = visit(at_once, before="window.createImageBitmap = () => Promise.reject(new Error('unknown format'));")
    choose(page, picture())
    expect(page.locator("#unshown")).to_be_visible()
    expect(page.locator("#facts")).to_contain_text("800 × 600")
    ask(page)
    expect(answered(page)).to_have_text("seven")
    expect(page.locator("#overview")).to_be_visible()
    expect(page.locator("#crop")).to_be_visible()


def test_an_image_that_is_slow_to_show_gets_its_box(visit: Visits, at_once: str) -> None:
    """Where the answer is there before the browser has decoded the image, the box is drawn as soon as the image is shown."""
    slow = """const make = window.createImageBitmap;
      window.createImageBitmap = (...given) => new Promise((go) => (window.go = go)).then(() => make(...given));"""
    page = visit(at_once, before=slow)
    choose(page, picture())
    ask(page)
    answered(page)
    expect(page.locator("#image")).not_to_be_visible()
    page.evaluate("go()")
    expect(page.locator("#image")).to_have_attribute("aria-label", re.compile("looked closer"))


# --- uploads --------------------------------------------------------------------------------------------------------------


def test_many_questions_cost_one_upload(visit: Visits, at_once: str) -> None:
    """The image is sent when it is chosen, once; questions name it; another image has the server forget it."""
    page = visit(at_once)
    watch = Watch(page)
    with page.expect_response("**/v1/images") as kept:
        choose(page, picture())
    for question in ("What is it?", "And what is that?"):
        ask(page, question)
        answered(page)
    assert (watch.count("POST", "v1/images"), watch.count("POST", "v1/vqa")) == (1, 2)
    name = kept.value.json()["id"]
    with page.expect_response(f"**/v1/images/{name}") as forgotten:
        choose(page, picture(red=True))
    assert (forgotten.value.request.method, forgotten.value.status) == ("DELETE", 200)


def test_a_forgotten_upload_is_sent_again(visit: Visits, at_once: str) -> None:
    """Where the server does not know the upload any more, the page sends the image again by itself, and has its answer."""
    page = visit(at_once)
    watch = Watch(page)
    visit.expected.append("404")
    with page.expect_response("**/v1/images") as kept:
        choose(page, picture())
    httpx2.delete(f"{at_once}/v1/images/{kept.value.json()['id']}", trust_env=False).raise_for_status()
    ask(page)
    expect(answered(page)).to_have_text("seven")
    assert watch.count("POST", "v1/images") == 2


def test_a_server_that_keeps_no_images_is_asked_with_the_image(visit: Visits, engine: ScriptedEngine) -> None:
    """With the store switched off the image goes with each question."""
    with support.gateway(engine, image_store_bytes=0) as url:
        page = visit(url)
        watch = Watch(page)
        visit.expected.append("503")
        choose(page, picture())
        for question in ("What is it?", "And what is that?"):
            ask(page, question)
            expect(answered(page)).to_have_text("seven")
        expect(page.locator("#error")).not_to_be_visible()
        assert (watch.count("POST", "v1/images"), watch.count("POST", "v1/vqa")) == (1, 2)


@pytest.mark.parametrize("store", [1 << 30, 0])
def test_a_large_file_shows_its_progress(visit: Visits, engine: ScriptedEngine, store: int) -> None:
    """While a large file is on its way the page shows how much of it has gone, be it uploaded or sent with the question."""
    data = support.encode(support.held_out(5, size=(1400, 1050)), "BMP")
    with support.gateway(engine, image_store_bytes=store) as url:
        page = visit(url)
        visit.expected.append("503")
        # Recorded in the page: it passes in a moment.
        page.evaluate("""() => {
          window.seen = [];
          const bar = document.getElementById("progress");
          new MutationObserver(() => seen.push(bar.value)).observe(bar, { attributes: true });
        }""")
        page.context.new_cdp_session(page).send(
            "Network.emulateNetworkConditions",
            {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 8_000_000},
        )
        choose(page, data, "scene.bmp")
        expect(page.locator("#progress-text")).to_contain_text("of 4.4 MB")
        expect(page.locator("#sending")).not_to_be_visible()
        page.evaluate("seen.length = 0") if store == 0 else None
        ask(page)
        expect(answered(page)).to_have_text("seven")
        seen = page.evaluate("seen")
        assert any(0 < value < 1 for value in seen)
        assert seen == sorted(seen)


# --- the same from elsewhere, and what was asked before --------------------------------------------------------------------


def test_the_code_runs(visit: Visits, embedded: str, tmp_path: Path) -> None:
    """The curl command and the Python code on the page give the answer on the page, whatever file and question are called."""
    name = """it's a "scene"; of 1,$x.jpg"""
    question = QUESTION.replace("What is", "What's")
    page = visit(embedded)
    data = (FOLDER / "static" / "scene.jpg").read_bytes()
    (tmp_path / name).write_bytes(data)
    choose(page, data, name)
    ask(page, question)
    answer = answered(page).text_content()
    page.click("#code summary")
    shell, code = (page.locator(f"#{which}").text_content() or "" for which in ("curl", "python"))
    assert json.loads(run(["bash", "-c", shell], tmp_path))["answer"] == answer
    assert run([sys.executable, "-c", code], tmp_path).strip() == answer


def test_the_code_for_a_sample_fetches_it(visit: Visits, embedded: str, tmp_path: Path) -> None:
    """For a sample scene the curl command needs no file that is not there."""
    page = visit(embedded)
    take_sample(page)
    page.click("#go")
    answered(page)
    shell = page.locator("#curl").text_content() or ""
    assert json.loads(run(["bash", "-c", shell], tmp_path))["answer"] == "434"


def run(command: list[str], folder: Path) -> str:
    """Return what a command prints."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_code_can_be_copied(visit: Visits, at_once: str) -> None:
    """Copy puts the code on the clipboard, and says so."""
    page = visit(at_once, permissions=["clipboard-read", "clipboard-write"])
    choose(page, picture())
    ask(page)
    answered(page)
    page.click("#code summary")
    for which, title in (("curl", "Copy the curl command"), ("python", "Copy the Python code")):
        page.get_by_role("button", name=title).click()
        expect(page.get_by_role("status")).to_have_text("Copied.")
        assert page.evaluate("navigator.clipboard.readText()") == page.locator(f"#{which}").text_content()


def test_the_history_lasts(visit: Visits, embedded: str, shown: Scene) -> None:
    """What was asked is still listed after a reload, the newest first; choosing it brings back the question, and what is known
    of the image; Clear forgets it."""
    page = visit(embedded)
    choose(page, support.encode(shown), "mine.jpg")
    ask(page, shown.question)
    answered(page)
    take_sample(page)
    page.click("#go")
    answered(page)
    entries = page.locator("#entries button")
    expect(entries).to_have_count(2)
    entries.nth(1).click()  # in the same visit the image itself is still known
    expect(page.locator("#facts")).to_contain_text("mine.jpg")
    expect(page.locator("#question")).to_have_value(shown.question)
    page.reload()
    expect(entries).to_have_count(2)
    expect(entries.nth(0)).to_contain_text(QUESTION)
    expect(entries.nth(0)).to_contain_text("434")
    expect(entries.nth(0)).to_contain_text("91 of 5,041 visual tokens")
    assert all(entries.nth(number).locator("img").evaluate("(image) => image.naturalWidth") == 112 for number in (0, 1))
    entries.nth(0).click()
    expect(page.locator("#facts")).to_contain_text("scene.jpg")
    expect(page.locator("#question")).to_have_value(QUESTION)
    entries.nth(1).click()
    expect(page.get_by_role("status")).to_contain_text("choose mine.jpg again")
    expect(page.locator("#question")).to_have_value(shown.question)
    page.click("#clear")
    expect(page.locator("#history")).not_to_be_visible()
    page.reload()
    expect(page.locator("#history")).not_to_be_visible()


def test_a_history_of_another_making_does_no_harm(visit: Visits, at_once: str) -> None:
    """Whatever stands in the browser's storage under the page's name, the page works."""
    page = visit(at_once, before="localStorage.setItem('ergo-vqa.history', '[null, {\"question\": 1}');")
    choose(page, picture())
    ask(page)
    answered(page)
    expect(page.locator("#entries button")).to_have_count(1)


# --- what goes wrong ------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_image(visit: Visits, at_once: str) -> None:
    """The server's own words are shown with the request's id, at once; there is nothing to try again, and another image works."""
    page = visit(at_once)
    visit.expected.append("422")
    with page.expect_response("**/v1/images") as refused:
        choose(page, b"Dear diary", "diary.txt")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text(refused.value.json()["error"]["message"][1:])
    expect(alert).to_contain_text(refused.value.headers["x-request-id"])
    expect(page.locator("#unshown")).to_be_visible()
    expect(page.locator("#again")).not_to_be_visible()
    ask(page)
    expect(alert).to_be_visible()
    expect(page.locator("#go")).to_have_text("Ask")
    choose(page, picture())
    expect(alert).not_to_be_visible()
    ask(page)
    expect(answered(page)).to_have_text("seven")


def test_a_question_that_is_refused(visit: Visits, engine: ScriptedEngine) -> None:
    """A question that is too long is refused in words; a shorter one then works."""
    with support.gateway(engine, max_text_chars=20) as url:
        page = visit(url)
        visit.expected.append("400")
        choose(page, picture())
        ask(page, "Would you be so kind as to read it to me?")
        expect(page.get_by_role("alert")).to_contain_text("at most 20 characters")
        expect(page.locator("#again")).not_to_be_visible()
        ask(page, "What is it?")
        expect(answered(page)).to_have_text("seven")
        expect(page.get_by_role("alert")).not_to_be_visible()


def test_nothing_is_asked_without_an_image_or_a_question(visit: Visits, at_once: str) -> None:
    """The page says what is missing, and puts the focus there."""
    page = visit(at_once)
    page.click("#go")
    expect(page.get_by_role("status")).to_have_text("Choose an image first.")
    expect(page.locator("#file")).to_be_focused()
    choose(page, picture())
    page.click("#go")
    expect(page.get_by_role("status")).to_have_text("Type a question first.")
    expect(page.locator("#question")).to_be_focused()


def test_a_busy_server(visit: Visits) -> None:
    """The page says when to try again, lets it be tried then and not before, and goes on from there."""
    replies: list[str | EngineBusy] = [EngineBusy("the engine's queue is full", retry_after=2), ZOOM]
    engine = ScriptedEngine(lambda conversation, sampling: replies.pop(0) if replies else "<answer>seven</answer>")
    with support.gateway(engine) as url:
        page = visit(url)
        visit.expected.append("503")
        choose(page, picture())
        ask(page)
        again = page.locator("#again")
        expect(page.get_by_role("alert")).to_contain_text("queue is full")
        expect(again).to_have_text(re.compile(r"Try again in [12] s"))
        expect(again).to_be_disabled()
        expect(again).to_be_enabled()
        again.click()
        expect(answered(page)).to_have_text("seven")
        expect(page.get_by_role("alert")).not_to_be_visible()


def test_a_share_that_is_used_up(visit: Visits, engine: ScriptedEngine) -> None:
    """A key with one request a minute, spent on the upload, is told how long to wait."""
    with support.gateway(engine, api_keys=f"{KEYS} requests_per_minute=1") as url:
        page = visit(url, before=f"sessionStorage.setItem('ergo-vqa.key', '{KEY}');")
        visit.expected.append("429")
        with page.expect_response("**/v1/images"):
            choose(page, picture())
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("requests a minute for this key")
        expect(page.locator("#again")).to_have_text(re.compile(r"Try again in \d+ s"))


def test_an_engine_that_breaks_amid_the_answer(visit: Visits) -> None:
    """What fails after the box was shown is said like any other error, with the request's id."""
    with support.gateway(scripted(answer=EngineFailed("the engine broke"))) as url:
        page = visit(url)
        choose(page, picture())
        with page.expect_response("**/v1/vqa") as response:
            ask(page)
        expect(page.get_by_role("alert")).to_contain_text("The engine broke.")
        expect(page.get_by_role("alert")).to_contain_text(response.value.headers["x-request-id"])
        expect(page.locator("#again")).to_be_enabled()


def test_a_server_that_is_gone(visit: Visits) -> None:
    """When the server cannot be reached the page says so, for the upload as for the question."""
    visit.expected.append("ERR_CONNECTION_REFUSED")
    with support.gateway(scripted()) as url:
        page = visit(url)
        with page.expect_response("**/v1/images"):
            choose(page, picture())
    ask(page)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("cannot be reached")
    expect(page.locator("#again")).to_be_enabled()
    choose(page, picture(red=True))
    expect(alert).to_contain_text("cannot be reached")


def test_an_answer_that_is_no_stream_of_events(visit: Visits, at_once: str) -> None:
    """A connection that ends before the answer is whole, and an error of a proxy, are told as what they are."""
    page = visit(at_once)
    visit.expected.append("502")
    choose(page, picture())
    page.route("**/v1/vqa", lambda route: route.fulfill(body='event: answer.delta\ndata: {"text": "sev'))
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("ended before the answer was complete")
    page.unroute("**/v1/vqa")
    page.route("**/v1/vqa", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("status 502")


def test_a_server_with_keys(visit: Visits, engine: ScriptedEngine) -> None:
    """The page opens without a key, asks for one when the server does, says when it is wrong, and goes on where it was; the key
    is kept for the tab alone, hidden as it is typed, and in no code on the page."""
    with support.gateway(engine, api_keys=KEYS) as url:
        page = visit(url)
        visit.expected.append("401")
        choose(page, picture())
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("type", "password")
        page.keyboard.type("ergo-wrong\n")
        expect(page.locator("#key-message")).to_contain_text("does not know this API key")
        expect(field).to_have_value("")
        page.keyboard.type("schlüssel\n")
        expect(page.locator("#key-message")).to_contain_text("ASCII")
        field.fill(KEY)
        with page.expect_response(lambda response: response.url.endswith("/v1/images") and response.status == 201):
            page.get_by_role("button", name="Use key").click()
        expect(field).not_to_be_visible()
        ask(page)
        expect(answered(page)).to_have_text("seven")
        assert KEY not in page.content()
        assert "ERGO_API_KEY" in (page.locator("#curl").text_content() or "")
        assert page.evaluate("JSON.stringify(localStorage)").count(KEY) == 0
        assert page.evaluate("sessionStorage.getItem('ergo-vqa.key')") == KEY


# --- for everybody ---------------------------------------------------------------------------------------------------------


def violations(page: Page) -> list[str]:
    """Return what axe finds wrong."""
    found = Axe().run(page).response["violations"]
    return [f"{rule['id']}: {node['html']}: {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize(
    "options",
    [{"color_scheme": "light"}, {"color_scheme": "dark"}, {"viewport": PHONE}],
    ids=["light", "dark", "phone"],
)
def test_axe_finds_nothing(visit: Visits, embedded: str, options: dict[str, Any]) -> None:
    """Neither empty, nor with both answers and everything unfolded, nor with an error does axe find a violation."""
    page = visit(embedded, **options)
    visit.expected.append("422")
    assert violations(page) == []
    page.check("#compare")
    take_sample(page)
    page.click("#go")
    answered(page, "single")
    page.click("#replies summary")
    page.click("#code summary")
    assert violations(page) == []
    choose(page, b"Dear diary", "diary.txt")
    expect(page.get_by_role("alert")).to_be_visible()
    assert violations(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_where_a_key_is_asked_for(visit: Visits, engine: ScriptedEngine, scheme: str) -> None:
    """Nor does it with the field for the key, or with a wait before trying again."""
    with support.gateway(engine, api_keys=f"{KEYS} requests_per_minute=1") as url:
        page = visit(url, color_scheme=scheme)
        visit.expected.append("401|429")
        choose(page, picture())
        expect(page.get_by_label("API key")).to_be_visible()
        assert violations(page) == []
        page.get_by_label("API key").fill(KEY)
        with page.expect_response(lambda response: response.url.endswith("/v1/images") and response.status == 201):
            page.get_by_role("button", name="Use key").click()
        ask(page)
        expect(page.locator("#again")).to_be_disabled()
        assert violations(page) == []


def test_the_keyboard_is_enough(visit: Visits, embedded: str) -> None:
    """Tab reaches every control; with Tab, Enter and Space a sample is taken, both answers are had, the replies unfolded."""
    page = visit(embedded)

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to(".sample")
    page.keyboard.press("Enter")
    expect(page.locator("#image")).to_be_visible()
    tab_to("#compare")
    page.keyboard.press("Space")
    tab_to("#go")
    page.keyboard.press("Enter")
    expect(answered(page)).to_have_text("434")
    answered(page, "single")
    tab_to("#replies summary")
    page.keyboard.press("Enter")
    expect(page.locator("#replies pre").first).to_be_visible()
    tab_to("#code summary")
    page.keyboard.press("Enter")

    reachable = "a[href], button, input, select, textarea, summary, [tabindex='0']"
    script = """(selector) => {
      const seen = [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility() && !one.disabled);
      seen.forEach((one, number) => (one.dataset.tab = number));
      document.activeElement.blur();
      return seen.length;
    }"""
    count = page.evaluate(script, reachable)
    reached = set()
    for _ in range(count + 2):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.tab"))
    assert {str(number) for number in range(count)} <= reached


def test_what_happens_is_announced(visit: Visits) -> None:
    """A screen reader hears of each step, and of the answer once, when it is whole."""
    engine = scripted(seconds_per_token=0.05)
    with support.gateway(engine) as url:
        page = visit(url)
        page.evaluate("""() => {
          window.heard = [];
          const status = document.querySelector("[role=status]");
          new MutationObserver(() => heard.push(status.textContent)).observe(status, { childList: true });
        }""")
        with page.expect_response("**/v1/images"):
            choose(page, picture())
        ask(page)
        answered(page)
        expect(page.get_by_role("status")).to_contain_text("seven")
        heard = [text for text in page.evaluate("heard") if text]
        steps = ["Looking at the whole", "Looking for the place", "Looking closer, at", "With zoom: seven. "]
        assert [next(text for text in heard if text.startswith(step)) for step in steps] == heard[-4:]
        assert page.locator("#zoomed .answer").get_attribute("aria-live") is None


def test_a_narrow_phone_scrolls_down_only(visit: Visits) -> None:
    """At 360 pixels nothing is wider than the window, not even long names, answers and code."""
    word = "Donaudampfschifffahrtsgesellschaft" * 4
    with support.gateway(scripted(answer=f"<think>{word}</think><answer>{word}</answer>")) as url:
        page = visit(url, viewport=PHONE, has_touch=True, is_mobile=True)
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == PHONE["width"]
        page.check("#compare")
        choose(page, picture(), f"{word}.png")
        ask(page, word)
        answered(page, "single")
        page.click("#replies summary")
        page.click("#code summary")
        assert page.evaluate(wide) == PHONE["width"]


def test_light_and_dark(visit: Visits, at_once: str) -> None:
    """The page follows the system, unless told otherwise, which lasts."""
    page = visit(at_once, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert light != dark
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    page.get_by_label("Colours").select_option("auto")
    assert page.evaluate(ground) == light


# --- how it is served ------------------------------------------------------------------------------------------------------


def test_files_are_served_strictly_and_by_what_is_in_them(embedded: str) -> None:
    """Every file has the strict policy, is asked about each time, and has an ETag that is made of its content alone."""
    files = {f"/static/{path.name}": path for path in (FOLDER / "static").iterdir()} | {"/": FOLDER / "index.html"}
    with httpx2.Client(base_url=embedded, trust_env=False) as http:
        for name, path in files.items():
            first = http.get(name)
            assert first.status_code == 200
            assert first.content == path.read_bytes()
            policy = first.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert (first.headers["cache-control"], first.headers["x-content-type-options"]) == ("no-cache", "nosniff")
            assert first.headers["etag"] == f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'
            again = http.get(name, headers={"if-none-match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert http.get(name, headers={"if-none-match": '"another"'}).status_code == 200


def test_the_page_has_no_inline_script_or_style() -> None:
    """Nothing in the page's HTML would need a laxer policy."""
    text = (FOLDER / "index.html").read_text()
    assert re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text) is None
