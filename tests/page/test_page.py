"""The page in a real Chromium, on a running service: what a visitor does there, and what they see."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Route, expect

from service.access.keys import digest, made, written
from tests.page.conftest import Visit
from tests.page.visitor import NARROW, Visitor
from tests.service.pictures import file, pixels
from tests.service.processes import ApiProcess, ServerProcess, stopped, wait_until

STATIC = Path(__file__).parents[2] / "service" / "page" / "static"
MODEL = "fashion-mnist"
BLOCKS = 4
NOWHERE = "redis://127.0.0.1:1/0"


def result_of(stream: str) -> dict[str, Any]:
    """The answer in a stream of events."""
    last = [line for line in stream.splitlines() if line.startswith("data:")][-1]
    result: dict[str, Any] = json.loads(last.removeprefix("data:"))["result"]
    return result


def run(command: str) -> str:
    """What a command that was copied from the page prints."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    return done.stdout


def shown(visitor: Visitor, selector: str) -> bytes:
    """The file of a picture on the page."""
    source = visitor[selector].get_attribute("src") or ""
    return base64.b64decode(source.partition(",")[2])


# Drawing


def test_images_appear_block_by_block(visitor: Visitor, client: httpx.Client) -> None:
    assert visitor.faults() == []
    visitor.draw(label="Sneaker", count=4, seed=7)
    said = visitor.said
    told = [text for text in said if text.startswith("Block")]
    assert told == [f"Block {n} of {BLOCKS} is done." for n in range(1, BLOCKS)], said
    assert re.fullmatch(r"4 images of “Sneaker”, seeds 7 to 10, in [\d.]+ m?s\.", said[-1]), said
    expect(visitor["#draw-strip img"]).to_have_count(BLOCKS)
    images = client.post("/v1/sample", json={"class": "Sneaker", "num_images": 4, "seed": 7}).json()["images"]
    for index, image in enumerate(images):
        assert shown(visitor, f".tile >> nth={index} >> img") == base64.b64decode(image["b64"])
    # Any image, and any of its states, can be looked at.
    visitor[".tile >> nth=2"].click()
    visitor.says("#draw-facts dl", "9")
    with visitor.page.expect_download() as download:
        visitor["#draw-facts a"].click()
    assert download.value.suggested_filename == "fashion-mnist-sneaker-9.png"
    assert Path(download.value.path()).read_bytes() == base64.b64decode(images[2]["b64"])
    visitor["#draw-strip button >> nth=0"].click()
    assert shown(visitor, ".tile >> nth=2 >> img") == shown(visitor, "#draw-strip img >> nth=0")
    assert visitor.faults() == []


def test_what_was_asked_can_be_copied_and_asked_again(visitor: Visitor) -> None:
    visitor.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor["#certify"].check()
    visitor.draw(label="no class")
    expect(visitor["#fresh"]).to_be_checked()
    visitor.says("#draw-facts", "certified: backward error")
    visitor["#draw-facts summary"].click()
    visitor["#draw-facts .command button"].click()
    expect(visitor["#draw-facts .command button"]).to_have_text("Copied")
    command = visitor.page.evaluate("navigator.clipboard.readText()")
    body = json.loads(shlex.split(command)[-1])
    assert (body["class"], body["num_images"], body["certify"]) == (None, 1, True)
    answer = result_of(run(command))
    assert base64.b64decode(answer["images"][0]["b64"]) == shown(visitor, ".tile img")
    visitor["#draw-facts dd button >> nth=0"].click()
    wait_until(lambda: visitor.page.evaluate("navigator.clipboard.readText()") == str(body["seed"]), "it is copied")
    # The next one is another.
    visitor["#draw-go"].click()
    expect(visitor["#seed"]).not_to_have_value(str(body["seed"]))


def test_a_job_that_waits_says_so_and_can_be_canceled(
    visitor: Visitor, server: ServerProcess, client: httpx.Client
) -> None:
    with stopped(server.worker()):
        # Two that the worker has no time for, and which go first.
        ahead = [
            client.post("/v1/sample", json={"num_images": 16}, headers={"prefer": "respond-async"}).json()["links"]
            for _ in range(2)
        ]
        visitor["#draw-go"].click()
        visitor.says("#draw-state", re.compile(r"\d jobs? goe?s? first"))
        expect(visitor["#draw-cancel"]).to_be_focused()
        visitor.says("#queue", "queued")
        assert visitor.faults() == []
        visitor["#draw-cancel"].click()
        visitor.says("#draw-state", "Canceled.")
        expect(visitor["#draw-go"]).to_be_focused()
        for links in ahead:
            client.delete(links["self"])

    def all_are_canceled() -> bool:
        jobs = client.get("/v1/jobs", params={"limit": 3}).json()["data"]
        return {job["state"] for job in jobs} == {"canceled"}

    wait_until(all_are_canceled, "the worker has heard of it, too")


def test_a_stream_is_taken_up_again_where_it_broke(visitor: Visitor, client: httpx.Client) -> None:
    """As when the replica that answers leaves: what it says last is played here, what follows is real."""

    def leave(route: Route) -> None:
        request = route.request.post_data_json
        job = client.post("/v1/sample", json=request, headers={"prefer": "respond-async"}).json()
        links = json.dumps({"job": job["id"], "message": "this process is shutting down", "links": job["links"]})
        route.fulfill(content_type="text/event-stream", body=f"event: reconnect\ndata: {links}\nretry: 1\n\n")

    visitor.page.route("**/v1/sample", leave)
    visitor.draw(label="Bag", seed=3)
    visitor.says("#draw-state", "1 image of “Bag”, seed 3")
    assert f"Block 1 of {BLOCKS} is done." in visitor.said


# Judging


def test_an_upload_is_judged_and_it_is_shown_where_and_why(visitor: Visitor, client: httpx.Client) -> None:
    noise = file(pixels(40))
    visitor.upload(noise, "noise.png")
    visitor.is_judged()
    fields = {"alpha": "0.01", "maps": "overlay"}
    [result] = client.post("/v1/score", files={"files": ("noise.png", noise)}, data=fields).json()["images"]
    assert result["is_anomaly"]
    visitor.says("#judge-state", f"Unusual: p-value {result['p_value']:.2g}, at a level of 1%.")
    assert base64.b64decode(result["map"]["b64"]) == shown(visitor, "#judge-stage .map")
    expect(visitor["#judge-stage .map"]).to_be_visible()
    visitor["#verdict .switch button >> nth=0"].click()
    expect(visitor["#judge-stage .map"]).to_be_hidden()
    visitor.says("#verdict", f"{result['bits_per_dim']:.3f} bits per dimension")
    visitor.says("#verdict", f"{len(result['regions'])} region")
    visitor.says("#verdict .warning", result["warnings"][0]["message"])
    rows = visitor["#verdict tbody th"].all_inner_texts()
    named = [row.partition("\n")[0].replace(" ", "_") for row in rows]
    assert named[0] == "combined"
    assert set(named) == set(result["features"]) - {"combined_without_codes"}
    assert visitor.faults() == []


def test_examples_need_no_file_and_the_level_is_a_choice(visitor: Visitor) -> None:
    visitor["[data-example='example-patched.png']"].click()
    visitor.says("#judge-state", "Unusual")
    visitor["[data-example='example-boot.png']"].click()
    visitor.says("#judge-state", "Normal")
    visitor["#alpha"].select_option("0.1")
    visitor.says("#judge-state", "at a level of 10%")
    visitor["#score"].select_option("latent")
    visitor.says("#verdict tbody th >> nth=0", "latent")
    command = visitor["#verdict code"].text_content()
    assert command is not None
    answer = json.loads(run(command.replace("@boot.png", f"@{STATIC / 'example-boot.png'}")))
    assert (answer["calibration"]["score"], answer["images"][0]["alpha"]) == ("latent", 0.1)
    visitor["#verdict >> text=Which class?"].click()
    expect(visitor["#verdict meter"]).to_have_count(5)
    assert "boot" in visitor[".bar-row >> nth=0"].inner_text()
    assert visitor.faults() == []


def test_the_keyboard_alone_is_enough(visitor: Visitor) -> None:
    keyboard = visitor.page.keyboard
    keyboard.press("Tab")
    expect(visitor[".skip"]).to_be_focused()
    keyboard.press("Enter")

    def walk_to(selector: str) -> None:
        for _ in range(40):
            if visitor.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            keyboard.press("Tab")
        pytest.fail(f"no key leads to {selector}")

    walk_to("#class")
    keyboard.type("Trouser")
    walk_to("#draw-go")
    keyboard.press("Enter")
    visitor.says("#draw-state", "1 image of “Trouser”")
    walk_to("#draw-facts div > button")
    keyboard.press("Enter")
    visitor.is_judged()
    visitor.says("#judge-state", "p-value")
    expect(visitor["#judge-stage .picture"]).to_have_attribute("alt", re.compile("trouser"))
    walk_to("#verdict .switch button")
    walk_to("#verdict .command summary")


def test_images_can_be_dropped_and_pasted(visitor: Visitor) -> None:
    give = """(place, [kind, name, data]) => {
      const transfer = new DataTransfer();
      const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
      transfer.items.add(new File([bytes], name, {type: "image/png"}));
      const how = {bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer};
      place.dispatchEvent(kind === "drop" ? new DragEvent(kind, how) : new ClipboardEvent(kind, how));
    }"""
    data = base64.b64encode((STATIC / "example-boot.png").read_bytes()).decode()
    for place, kind in (("#judge-stage", "drop"), ("body", "paste")):
        visitor[place].evaluate(give, [kind, f"{kind}.png", data])
        expect(visitor["#judge-stage .picture"]).to_have_attribute("alt", f"To judge: {kind}.png")
        visitor.is_judged()


def test_a_model_without_classes_and_calibration_draws_and_scores(visitor: Visitor) -> None:
    visitor.choose_model("tiny")
    assert visitor["#class"].inner_text().strip() == "no class"
    visitor.draw(count=1, seed=5)
    visitor.says("#draw-state", "1 image without a class, seed 5")
    visitor.says("#calibration-note", "no calibration")
    visitor["#draw-facts div > button"].click()
    visitor.says("#judge-state", "bits per dimension")
    expect(visitor["#verdict .headline"]).to_have_count(0)
    expect(visitor["#verdict >> text=Which class?"]).to_have_count(0)


def test_a_command_names_the_very_file(visitor: Visitor, tmp_path: Path) -> None:
    """Whatever its name means to a shell or to curl."""
    name = """it's "a", b;type=c \\.png"""
    picture = (STATIC / "example-boot.png").read_bytes()
    (tmp_path / name).write_bytes(picture)
    visitor.upload(picture, name)
    visitor.says("#judge-state", "Normal")
    command = visitor["#verdict code"].text_content()
    assert command is not None
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["images"][0]["is_anomaly"] is False
    curl_of = "import(document.querySelector('link[href$=\"curl.js\"]').href).then(({curlOf}) => curlOf(%s, false))"
    asked = {"path": "v1/score", "form": [["calibration", "@<it's;type=x"]]}
    words = shlex.split(visitor.page.evaluate(curl_of % json.dumps(asked)))
    assert words[-2:] == ["--form-string", "calibration=@<it's;type=x"]


def test_a_copy_without_tls_keeps_the_focus(visitor: Visitor) -> None:
    visitor.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    visitor.draw(seed=4)
    button = visitor["#draw-facts dd button >> nth=0"]
    button.click()
    expect(button).to_have_text("Copied")
    expect(button).to_be_focused()
    visitor.page.evaluate("document.execCommand = () => false")
    expect(button).to_have_text("Copy")
    button.click()
    expect(button).to_contain_text("Could not copy")


# What can go wrong


def test_an_answer_of_others_does_not_end_the_watch(visitor: Visitor) -> None:
    visitor.says("#health", "Ready")
    visitor.page.route("**/readyz", lambda route: route.fulfill(body="<p>Sign in</p>", content_type="text/html"))
    visitor.says("#health", "No answer")
    visitor.page.unroute("**/readyz")
    visitor.says("#health", "Ready")


def test_a_likelihood_that_is_not_finite_is_said_so(visitor: Visitor) -> None:
    def lose(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        body["images"][0] |= {"log_likelihood": None, "bits_per_dim": None}
        route.fulfill(response=answer, json=body)

    visitor.choose_model("tiny")
    visitor.page.route("**/v1/score", lose)
    visitor["[data-example='example-boot.png']"].click()
    visitor.says("#judge-state", "Scored: the likelihood is not finite.")


def test_what_can_be_no_key_is_not_taken_for_one(visitor: Visitor) -> None:
    visitor["#key"].evaluate("node => node.hidden = false")
    visitor["#key-value"].fill("ключ")
    visitor["#key-value"].press("Enter")
    assert visitor["#key-value"].evaluate("node => node.validity.patternMismatch")
    assert visitor.page.evaluate("sessionStorage.length") == 0


def test_a_file_that_is_no_image_is_refused_kindly(visitor: Visitor) -> None:
    visitor.upload(b"not an image", "letter.txt", "text/plain")
    alert = visitor["#judge-failure [role=alert]"]
    expect(alert).to_contain_text("That cannot be done as asked")
    expect(alert).to_contain_text("letter.txt")
    assert visitor.faults() == []
    visitor["[data-example='example-boot.png']"].click()
    visitor.says("#judge-state", "Normal")
    expect(alert).to_have_count(0)


def test_a_wish_that_the_service_refuses_can_be_changed(visitor: Visitor) -> None:
    visitor["#seed"].fill("9007199254740991")
    visitor["#count"].select_option("16")
    visitor["#draw-go"].click()
    visitor.says("#draw-failure", "seed: got")
    visitor["#seed"].fill("1")
    visitor["#draw-failure button"].click()
    visitor.says("#draw-state", "seeds 1 to 16")
    expect(visitor["#draw-failure [role=alert]"]).to_have_count(0)


def test_a_key_is_asked_for_and_what_is_missing_is_said(tmp_path: Path, open_page: Visit) -> None:
    secrets = {"infer": "tarflow_a-secret", "metrics": "tarflow_another-secret"}
    keys = "\n".join(
        written(scope, made(sha256=digest(secret).hex(), scopes=[scope])) for scope, secret in secrets.items()
    )
    # Without a queue and without workers: what it can say is who may ask.
    api = ApiProcess(tmp_path / "log", NOWHERE, TARFLOW_KEYS_INLINE=keys)
    try:
        visitor = open_page(api.url)
        alert = visitor["#model-failure [role=alert]"]
        expect(alert).to_contain_text("A key is needed")
        expect(visitor["#key-value"]).to_be_visible()
        assert visitor.faults() == []
        for key, title in (
            ("wrong", "A key is needed"),
            (secrets["metrics"], "This is not allowed"),
            (secrets["infer"], "Not ready just now"),
        ):
            visitor["#key-value"].fill(key)
            visitor["#key-value"].press("Enter")
            expect(alert).to_contain_text(title)
            if key == "wrong":
                expect(visitor["#key-value"]).to_have_attribute("aria-invalid", "true")
        expect(visitor["#model-failure button"]).to_have_text(re.compile(r"Try again in \d+ s"))
        expect(visitor["#model-failure button"]).to_be_disabled()
        expect(visitor["#model-failure button"]).to_have_text("Try again")
        expect(visitor["#model-failure button"]).to_be_enabled()
        visitor.says("#health", "Not ready yet")
        assert visitor.faults() == []
        # The key is kept in the tab, and nowhere else.
        assert visitor.page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
        visitor.page.reload()
        expect(alert).to_contain_text("Not ready just now")
        visitor["#key-forget"].click()
        expect(alert).to_contain_text("A key is needed")
        assert secrets["infer"] not in api.log
        visitor.may_lose_service = True
    finally:
        api.kill()


def test_a_service_that_is_gone_is_no_riddle(tmp_path: Path, open_page: Visit) -> None:
    api = ApiProcess(tmp_path / "log", NOWHERE)
    try:
        visitor = open_page(api.url)
        visitor.says("#model-failure", "Not ready just now")
        visitor.may_lose_service = True
    finally:
        api.kill()
    visitor["[data-example='example-boot.png']"].focus()
    expect(visitor["#model-failure button"]).to_be_enabled()
    visitor["#model-failure button"].click()
    visitor.says("#model-failure", "The service does not answer")


# Looks


def test_colours_follow_the_system_and_the_choice(visitor: Visitor) -> None:
    def ground() -> int:
        colour = visitor["body"].evaluate("node => getComputedStyle(node).backgroundColor")
        return int(re.findall(r"\d+", colour)[0])

    light = ground()
    visitor.page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light > 200 > 50 > dark
    visitor["#theme"].click()
    assert ground() == light
    visitor.page.reload()
    assert ground() == light
    visitor["#theme"].click()
    visitor.page.emulate_media(color_scheme="light")
    assert ground() == dark
    visitor["#theme"].click()
    assert ground() == light


def test_a_narrow_window_shows_everything(server: ServerProcess, open_page: Visit) -> None:
    visitor = open_page(server.url, viewport=NARROW).is_ready()
    assert visitor.overflow() <= 0
    visitor.draw(count=4)
    visitor["[data-example='example-patched.png']"].click()
    visitor.is_judged()
    for summary in visitor["main details > summary"].all():
        summary.click()
    assert visitor.overflow() <= 0
    assert visitor.faults() == []


def test_the_service_is_described_and_left_alone_when_nobody_looks(visitor: Visitor) -> None:
    visitor.says("#health", "Ready · 1 worker")
    visitor.says("#workers", "cpu")
    visitor.says("#queue", "waiting")
    visitor.says("#models", "tiny")
    page, asked = visitor.page, []
    page.clock.install()
    page.reload()
    visitor.is_ready().says("#workers", "cpu")
    with page.expect_request("**/readyz"):
        page.clock.fast_forward(60_000)
    hidden = "is => Object.defineProperty(document, 'hidden', {get: () => is, configurable: true})"
    page.evaluate(hidden, True)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.on("request", lambda request: asked.append(request.url))
    page.clock.fast_forward(600_000)
    assert page.evaluate("fetch('readyz').then((answer) => answer.ok)")
    assert [url for url in asked if url.endswith("/readyz")] == [f"{visitor.url}/readyz"], "but for the test's own"
    page.evaluate(hidden, False)
    with page.expect_request("**/readyz"):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
