"""The page of `elm chat` on a real server, over HTTP and in headless Chromium. Skipped without the extra `chat`."""

import os
import re
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer.chat import ErasureChat, load_chat_concept
from elm_trainer.chat_page import HOST, answer_html, make_page, serve
from elm_trainer.evaluation.fluency import as_prompt


pytestmark = [
    pytest.mark.chat,
    pytest.mark.skipif(find_spec("gradio") is None, reason="the extra `chat` is not installed"),
]
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUESTION = "What is the capital of Ghana?"


@pytest.fixture(scope="module")
def page(tokenizer, tmp_path_factory):
    """A served page of a tiny model with two adapters, the first of which has a picture."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    chat = ErasureChat(model.eval(), tokenizer, {"first": "default", "second": "other"})
    concept, folder = load_chat_concept("capitals"), tmp_path_factory.mktemp("run")
    (folder / "report.png").write_bytes(b"\x89PNG\r\n\x1a\n picture")
    for name in ("first/adapter", "second"):
        (folder / name).mkdir(parents=True)
    (folder / "report.png").rename(folder / "first" / "report.png")
    folders = {"first": folder / "first" / "adapter", "second": folder / "second"}
    blocks = make_page(chat, concept, folders, max_new_tokens=4)
    address = serve(blocks)
    yield SimpleNamespace(address=address, chat=chat, concept=concept)
    blocks.close()


def expected(page, prompt, adapter="first", count=4):
    *_, state = page.chat.answer(prompt, page.concept.terms(QUESTION), adapter=adapter, max_new_tokens=count)
    return [answer_html(answer) for answer in state.values()]


def test_the_server_streams_both_answers_to_a_question_and_to_an_attack(page):
    from gradio_client import Client

    client = Client(page.address, verbose=False)
    given = (QUESTION, "second", 0, 4, 0)
    job = client.submit(*given, api_name="/ask")
    prompt, note, *answers = job.result(timeout=60)
    assert prompt == as_prompt(page.chat.processing_class, QUESTION) and "Accra" in note
    assert answers == expected(page, prompt, "second") != expected(page, prompt, "first")
    assert [out[2].count("elm-token") for out in job.outputs()] == [1, 1, 2, 2, 3, 3, 4, 4]
    prompt, note, *answers = client.predict(*given[:2], 0, 3, 0, api_name="/translation_german")
    assert "Hauptstadt von Ghana" in prompt and "translation.german" in note
    assert answers == expected(page, prompt, "second", 3)
    with pytest.raises(Exception, match="names a subject"):
        client.predict("How are you?", "first", 0, 3, 0, api_name="/translation_german")
    assert "No report.json" in client.predict("second", api_name="/report")


def test_only_this_machine_is_answered_and_the_browser_is_to_fetch_nothing_elsewhere(page):
    import gradio
    import httpx2

    assert page.address.startswith(f"http://{HOST}:") and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    found = httpx2.get(page.address)
    assert found.status_code == 200 and "default-src 'self'" in found.headers["content-security-policy"]
    assert httpx2.get(page.address, headers={"host": "elsewhere.example"}).status_code == 400
    assert not gradio.context.Context.root_block and "fonts.googleapis" not in found.text
    with pytest.raises(OSError, match="`port` is"):
        serve(
            make_page(page.chat, page.concept, dict.fromkeys(page.chat.adapters, ".")),
            int(page.address.split(":")[2].strip("/")),
        )


@pytest.mark.skipif(not (BROWSER and DRIVER and find_spec("selenium")), reason="no Chromium, its driver, or selenium")
def test_a_user_asks_and_attacks_in_a_browser(page, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for switch in (
        "headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1400", f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{switch}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.set_page_load_timeout(120)
        browser.get(page.address)
        wait = WebDriverWait(browser, 120)
        box = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#question textarea, #question input"))
        box.clear()
        box.send_keys(QUESTION)
        browser.find_element(By.ID, "ask").click()

        def shown(side):
            return browser.find_element(By.ID, side).get_attribute("textContent")

        def tokens(side):
            return len(browser.find_elements(By.CSS_SELECTOR, f"#{side} .elm-token"))

        wait.until(lambda _: all("cut off, 4 tokens" in shown(side) for side in ("reference", "erased")))
        assert (tokens("reference"), tokens("erased")) == (4, 4)
        before = shown("erased")
        browser.find_element(By.ID, "attack-prefilling.plain").click()
        wait.until(lambda _: "prefilling.plain" in shown("note") and "cut off, 4 tokens" in shown("erased"))
        assert shown("erased") != before
        browser.save_screenshot(str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 10_000
        log = "".join(entry["message"] for entry in browser.get_log("performance"))
        asked = set(re.findall(r'"Network.responseReceived".*?"url":"(https?://[^/"]+)', log))
        assert asked == {page.address.rstrip("/")}
    finally:
        browser.quit()
