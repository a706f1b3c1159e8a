"""The page answers as the dialogue does, also to what a visitor asks again or takes back."""

from __future__ import annotations

import shutil
import sys

import pytest
from mixed_data import write_image

from megatron_vl.ask.answerer import Answerer, Sampling
from megatron_vl.ask.dialogue import Dialogue
from megatron_vl.ask.web import page
from megatron_vl.cli.main import run
from megatron_vl.errors import printable

BOT = "[data-testid=bot]"


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    """A model of which every word that is asked counts in an answer."""
    hf_dir = tmp_path_factory.mktemp("model") / "tiny"
    assert run(["tiny", str(hf_dir), "--hidden-size", "64", "--ffn-size", "96", "--ranks", "1500",
                "--init-std", "0.5", "--dtype", "float32"]) == 0
    return hf_dir


@pytest.fixture(scope="module")
def answerer(hf_dir):
    return Answerer.from_hf_dir(hf_dir)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return write_image(tmp_path_factory.mktemp("shown") / "a.png", (90, 64))


@pytest.fixture(scope="module")
def url(answerer):
    served = page(lambda: dialogue(answerer), title="tiny")
    _, where, _ = served.launch(prevent_thread_lock=True, quiet=True)
    yield where
    served.close()


def dialogue(answerer) -> Dialogue:
    return Dialogue(answerer, sampling=Sampling(max_new_tokens=12))


def answers(answerer, image, *questions: str) -> list[str]:
    """The dialogue's own to questions of which the first shows the image."""
    one = dialogue(answerer)
    one.show("image", image)
    return [printable("".join(one.ask(question))) for question in questions]


def test_over_its_interface(url, answerer, image):
    from gradio_client import Client, handle_file

    message = {"text": "what?", "files": [handle_file(image)]}
    said = Client(url, verbose=False).predict(message=message, api_name="/chat")
    assert [one["text"] for one in said["content"]] == answers(answerer, image, "what?")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright drives a browser")
    binary = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        started = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield started
        started.close()


def test_in_a_browser(url, browser, answerer, image):
    sync_api = pytest.importorskip("playwright.sync_api")
    first, second = answers(answerer, image, "what?", "and then?")
    assert answers(answerer, image, "what?", "and?") != [first, second]
    outside = []
    tab = browser.new_page()
    tab.on("request", lambda one: outside.append(one.url)
           if one.url.startswith("http") and not one.url.startswith(url) else None)
    tab.goto(url)

    def ask(question: str) -> None:
        tab.fill("textarea", question)
        tab.press("textarea", "Enter")

    def expect(*said: str) -> None:
        # Each to the letter, line ends and all, when it is whole.
        tab.wait_for_function(
            f"said => JSON.stringify([...document.querySelectorAll('{BOT}')]"
            ".map(one => one.textContent)) === JSON.stringify(said)", arg=[*said],
        )
        sync_api.expect(tab.locator("textarea")).to_be_enabled()

    tab.set_input_files("input[type=file]", image)
    sync_api.expect(tab.locator(".thumbnail-image, .thumbnail-item").first).to_be_visible()
    ask("what?")
    expect(first)
    ask("and then?")
    expect(first, second)
    tab.get_by_role("button", name="Retry").click()
    expect(first, second)
    tab.get_by_role("button", name="Undo").click()
    expect(first)
    ask("and?")
    expect(first, answers(answerer, image, "what?", "and?")[1])
    assert not outside  # nothing is asked of another machine


def test_without_gradio_it_is_a_sentence(hf_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run(["chat", str(hf_dir), "--web"]) == 2
    assert "--web needs gradio, which cannot be imported" in capsys.readouterr().err
