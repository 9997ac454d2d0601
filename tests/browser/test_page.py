"""The page in a real browser: chat, stop, edit, parameters, side by side, plain text, failures, the key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from browsing import ask, ended, expect, figure, prompts, texts, until
from serve_names import models_of, write_model
from served import SAYS, SAYS_SMALL, WAIT_S

from fewbit.serve import create_app
from fewbit.serve.app import Manner
from fewbit.serve.auth import Gate, Keys
from fewbit.text import Tokenizer

SPEED, TIME = re.compile(r"^\d+(\.\d)?$"), re.compile(r"^(\d+ ms|\d+\.\d\d s)$")


def test_a_chat_streams_and_goes_on(visit, url, engines, tokenizer):
    engine = engines["storyteller"]
    engine.hold_after = 4  # until all is seen that is only there while it answers
    page = visit(url)
    expect(page.locator("#greeted")).to_have_text("storyteller")
    assert page.locator("#model option").all_text_contents() == list(engines)
    expect(page.locator("#prompt")).to_be_focused()
    ask(page, "Count!", wait=False)
    expect(page.locator(".answer .text")).to_contain_text("un,")
    assert SAYS.startswith(part := texts(page)[0])
    assert part != SAYS, "it should come piece by piece"
    expect(figure(page, "count")).to_have_text(re.compile(r"~\d"))
    expect(page.locator("#welcome")).to_be_hidden()
    expect(page.locator("#send")).to_be_hidden()
    engine.hold_after = None
    ended(page)
    assert texts(page) == [SAYS]
    expect(figure(page, "count")).to_have_text(str(len(engine.says)))
    expect(figure(page, "prompt")).to_have_text(f"{len(engine.seen[0].prompt)}, 3 of them cached")
    expect(figure(page, "end")).to_have_text("ended by itself")
    expect(figure(page, "speed")).to_have_text(SPEED)
    expect(figure(page, "ttft")).to_have_text(TIME)
    expect(page.locator("#status")).to_contain_text(f"Answer complete: {len(engine.says)} tokens")
    ask(page, "And\nthen?")
    assert prompts(engine, tokenizer)[1] == f"<|user|>Count!\n<|assistant|>{SAYS}\n<|user|>And\nthen?\n<|assistant|>"
    expect(page.locator(".again")).to_have_count(1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["button", "key"])
def test_stop(visit, url, engines, how):
    engine = engines["storyteller"]
    engine.hold_after = 4
    page = visit(url)
    ask(page, "Count!", wait=False)
    expect(page.locator(".answer .text")).to_contain_text("un")
    expect(page.get_by_role("button", name="Edit")).to_be_disabled()
    page.click("#stop-button") if how == "button" else page.keyboard.press("Escape")
    ended(page)
    until(lambda: len(engine.aborted) == 1)
    expect(figure(page, "end")).to_have_text("stopped by you")
    expect(page.locator("#status")).to_contain_text("Stopped")
    expect(page.locator("#prompt")).to_be_focused()
    assert texts(page)[0] in SAYS


@pytest.mark.slow
def test_edit_ask_again_copy_clear(visit, url, engines, tokenizer):
    page, engine = visit(url, permissions=["clipboard-read", "clipboard-write"]), engines["storyteller"]
    ask(page, "First")
    ask(page, "Second")
    page.get_by_role("button", name="Ask again").click()
    ended(page)
    assert prompts(engine, tokenizer)[2] == prompts(engine, tokenizer)[1]
    expect(page.locator(".turn")).to_have_count(2)
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == SAYS
    edit = page.get_by_role("button", name="Edit").first
    edit.click()
    page.keyboard.press("Escape")
    expect(edit).to_be_focused()
    edit.click()
    page.keyboard.press("End")
    page.keyboard.type(" things first")
    page.keyboard.press("Enter")
    ended(page)
    assert prompts(engine, tokenizer)[3] == "<|user|>First things first\n<|assistant|>", "what came later is gone"
    expect(page.locator(".turn")).to_have_count(1)
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Anew")
    assert prompts(engine, tokenizer)[4] == "<|user|>Anew\n<|assistant|>"


@pytest.mark.slow
def test_parameters_reach_the_engine_and_wrong_ones_the_servers_words(visit, url, engines, tokenizer):
    page, engine = visit(url), engines["storyteller"]
    given = {"temperature": "0.25", "top_p": "0.5", "top_k": "7", "max_tokens": "5", "seed": "9007199254740991"}
    for name, value in given.items():
        page.fill(f"#{name}", value)
    page.fill("#system", "Be brief.")
    ask(page, "Count!")
    params = engine.seen[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.25, 0.5, 7)
    assert (params.max_tokens, params.seed) == (5, 2**53 - 1)
    assert prompts(engine, tokenizer)[0].startswith("<|system|>Be brief.\n<|user|>")
    expect(figure(page, "end")).to_have_text("cut at max tokens")
    for name in given:
        page.fill(f"#{name}", "")
    page.fill("#stop", "never\n\\ncin")
    ask(page, "Count!")
    assert texts(page)[1] == SAYS.partition("\ncin")[0]
    assert figure(page, "end", 1).text_content() == "stopped at “\ncin”"
    params = engine.seen[1].params
    assert params.seed is None
    assert params.max_tokens > 100, "what is left empty is the server's to decide"
    visit.expected.append("400")
    for name, value, words in (
        ("temperature", "-1", "temperature must be"),
        ("top_k", "1.5", "top_k must be a valid integer"),
        ("max_tokens", "many", "max_tokens must be a valid integer"),
        ("seed", "9007199254740993", "more than a browser holds exactly"),
    ):
        page.fill(f"#{name}", value)
        ask(page, "Count!")
        expect(page.locator(".problem").last).to_contain_text(words)
        page.fill(f"#{name}", "")
    assert len(engine.seen) == 2
    ask(page, "Count!")
    assert prompts(engine, tokenizer)[-1].count("<|user|>") == 3, "turns that were refused are not told"


def test_two_models_side_by_side(visit, url, engines):
    for engine in engines.values():
        engine.delay_s = 0.02
    page = visit(url)
    page.select_option("#second", "storyteller-small")
    ask(page, "Count!")
    assert texts(page) == [SAYS, SAYS_SMALL]
    one, two = (engine.seen[0] for engine in engines.values())
    assert one.prompt == two.prompt
    assert one.params == two.params
    expect(page.locator(".seed")).to_have_text(f"Both with seed {one.params.seed}.")
    a, b = (page.locator(".answer").nth(i) for i in (0, 1))
    assert "".join(a.locator(".differs").all_text_contents()) == " troiscinq"
    assert "".join(b.locator(".differs").all_text_contents()) == " sixneuf"
    for answer in (a, b):
        expect(answer.locator(".parting")).to_have_count(1)
        assert "▸" in answer.locator(".parting").evaluate("e => getComputedStyle(e, '::before').content")
        assert "underline" in answer.locator(".differs").first.evaluate("e => getComputedStyle(e).textDecorationLine")
    expect(page.locator(".verdict")).to_contain_text(", then “ trois” (61 %) against “ six” (61 %).")
    expect(page.locator(".legend")).to_be_visible()
    for i in (0, 1):
        expect(figure(page, "speed", i)).to_have_text(SPEED)
        expect(figure(page, "ttft", i)).to_have_text(TIME)
    ask(page, "More!")
    assert engines["storyteller-small"].seen[1].prompt == engines["storyteller"].seen[1].prompt
    page.select_option("#second", "storyteller")
    page.fill("#seed", "7")
    ask(page, "Count!")
    expect(page.locator(".verdict").last).to_have_text(f"The same {len(engines['storyteller'].says)} tokens.")
    expect(page.locator(".legend").last).to_be_hidden()
    assert [request.params.seed for request in engines["storyteller"].seen[-2:]] == [7, 7]
    page.get_by_label("Plain text").check()
    page.select_option("#second", "storyteller-small")
    ask(page, "Count!")
    expect(page.locator(".verdict").last).to_contain_text(", then “ trois” (61 %) against “ six” (61 %).")


@pytest.mark.slow
def test_one_of_two_is_slow_and_one_fails(visit, url, engines):
    engines["storyteller"].hold_after = 4
    engines["storyteller-small"].fail_after = 2
    page = visit(url)
    page.select_option("#second", "storyteller-small")
    ask(page, "Count!", wait=False)
    expect(page.locator(".answer.failed .problem")).to_have_text("a step of the engine failed: out of memory")
    expect(page.locator(".answer.running")).to_have_count(1)
    engines["storyteller"].hold_after = 6
    expect(page.locator(".verdict")).to_contain_text("The same so far")
    page.keyboard.press("Escape")
    ended(page)


@pytest.mark.slow
def test_a_model_without_a_chat_template(visit, serve, engines, tmp_path):
    config = json.loads((write_model(tmp_path) / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    visit.expected.append("400")
    page = visit(serve(create_app(models_of(tokenizer, storyteller=engines["storyteller"]))))
    ask(page, "un, ")
    expect(page.locator(".problem")).to_contain_text("this model has no chat template")
    page.get_by_role("button", name="Send it as plain text").click()
    ended(page)
    assert texts(page) == [SAYS]
    expect(page.locator("#system")).to_be_disabled()
    page.fill("#stop", "quatre")
    ask(page, "deux")
    assert prompts(engines["storyteller"], tokenizer) == ["un, ", "deux"], "each text stands alone"
    assert texts(page)[1] == "un, deux, trois 🙂 "


@pytest.mark.slow
def test_the_live_view_moves(visit, url, engines):
    engine, page = engines["storyteller"], visit(url)
    views = page.locator(".engine")
    expect(views).to_have_count(2)
    assert views.locator("h3").all_text_contents() == list(engines)

    def shown(name, model=0):
        return views.nth(model).locator(f"[data-figure={name}]")

    expect(shown("blocks")).to_have_text("0 of 64")
    engine.delay_s, engine.says = 0.1, engine.says * 60  # longer than a look at everything takes
    page.fill("#max_tokens", "900")
    ask(page, "Count!", wait=False)
    expect(shown("running")).to_have_text("1")
    expect(shown("blocks")).to_have_text("1 of 64")
    expect(shown("speed")).to_have_text(re.compile(r"[1-9]"))
    assert views.nth(0).locator("meter").evaluate("e => e.value") == pytest.approx(1 / 64)
    heights = re.findall(r",([\d.]+)", views.nth(0).locator(".line").get_attribute("d"))
    assert len(set(heights)) > 1, "the curve should leave the ground"
    expect(shown("running", 1)).to_have_text("0")
    expect(shown("speed", 1)).to_have_text("0.0")
    page.keyboard.press("Escape")
    expect(shown("running")).to_have_text("0")
    page.click("#engine summary")
    expect(page.locator("#engine-brief")).to_have_text(re.compile(r"^[\d.]+ tokens/s, 0 running$"))
    page.click("#engine summary")
    engine.down = True
    expect(shown("running")).to_have_text("–")
    expect(shown("running", 1)).to_have_text("0")


@pytest.mark.slow
def test_failures_in_the_servers_words(visit, url, engines):
    engine, page = engines["storyteller"], visit(url)
    visit.expected += ["429", "ERR_CONNECTION_REFUSED"]
    chat, problem = "**/v1/chat/completions", page.locator(".problem")
    engine.fail_after = 3
    ask(page, "Count!")
    expect(problem.last).to_have_text("a step of the engine failed: out of memory")
    assert texts(page)[0].startswith("un,"), "what came before stays"
    engine.fail_after, engine.full = None, True
    ask(page, "Count!")
    expect(problem.last).to_contain_text("requests are waiting; retry later")
    engine.full = False
    page.route(chat, lambda route: route.abort("connectionrefused"))
    ask(page, "Count!")
    expect(problem.last).to_have_text("The server cannot be reached.")
    page.unroute(chat)
    half = 'data: {"choices": [{"index": 0, "delta": {"content": "hal"}, "finish_reason": null}]}\n\n'
    page.route(chat, lambda route: route.fulfill(body=half, content_type="text/event-stream"))
    ask(page, "Count!")
    expect(problem.last).to_have_text("The connection ended before the answer was complete.")
    assert texts(page)[-1] == "hal"


@pytest.mark.slow
def test_a_server_that_asks_for_a_key(visit, serve, engines, tokenizer):
    """The page itself needs none; what it asks for does."""
    gate = Gate(Keys(["open-sesame"]), hosts=[])
    app = create_app(models_of(tokenizer, **engines), manner=Manner(gate=gate))
    visit.expected.append("401")
    page = visit(url := serve(app))
    notice, key = page.locator("#notice"), page.locator("#key")
    expect(notice).to_have_text(re.compile("^an API key is needed"))
    expect(key).to_be_focused()
    expect(page.locator("#engine-brief")).to_have_text(re.compile("^an API key is needed"))
    page.keyboard.type("wrong")
    with page.expect_response("**/v1/models"):
        page.keyboard.press("Enter")
    expect(notice).to_have_text("the API key is wrong")
    expect(key).to_be_focused()
    page.keyboard.type("open-sesame")
    page.keyboard.press("Enter")
    expect(notice).to_be_hidden()
    expect(page.locator(".engine")).to_have_count(2)
    ask(page, "Count!")
    assert texts(page) == [SAYS]
    page.reload()
    expect(page.locator("#model option")).to_have_count(2)
    ask(page, "Count!")
    assert texts(page) == [SAYS]
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.click("#key-toggle")
    page.click("#key-forget")
    expect(notice).to_have_text(re.compile("^an API key is needed"))
    assert page.evaluate("sessionStorage.length") == 0
    expect(visit(url).locator("#notice")).to_have_text(re.compile("^an API key is needed"))


@pytest.mark.slow
def test_the_end_of_the_text_is_followed_until_the_reader_goes_up(visit, url, engines):
    engine, page = engines["storyteller"], visit(url)
    engine.hold_after, engine.says = 500, engine.says * 80
    measure = "[document.documentElement.scrollHeight, innerHeight, scrollY]"

    def height():
        return page.evaluate(measure)[0]

    def left():
        whole, window, above = page.evaluate(measure)
        return whole - window - above

    def grows():
        was = height()
        engine.hold_after += 100
        until(lambda: height() > was + 100)

    page.fill("#max_tokens", "900")
    ask(page, "Count!", wait=False)
    until(lambda: height() > 1200)
    until(lambda: left() < 80)
    page.mouse.move(700, 300)
    page.mouse.wheel(0, -500)
    until(lambda: left() > 400)
    grows()
    assert left() > 500
    page.mouse.wheel(0, 9000)
    until(lambda: left() < 80)
    grows()
    until(lambda: left() < 80)
    page.keyboard.press("Escape")
    ended(page)


@pytest.mark.slow
def test_thoughts_stand_apart(visit, url, engines, tokenizer):
    deltas = [{"reasoning": "Let me "}, {"reasoning": "count."}, {"content": "un,"}, {"content": " deux"}]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    blocks = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
    page = visit(url)
    chat, body = "**/v1/chat/completions", "".join([*blocks, "data: [DONE]\n\n"])
    page.route(chat, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "Count!")
    assert page.locator(".thoughts").all_text_contents() == ["Let me count."]
    assert texts(page) == ["un, deux"]
    page.unroute(chat)
    ask(page, "And?")
    assert "<|assistant|>un, deux\n" in prompts(engines["storyteller"], tokenizer)[0], "thoughts are not told again"
    expect(page.locator(".thoughts").last).to_be_hidden()


@pytest.mark.slow
def test_what_a_model_says_is_text(visit, url, engines, tokenizer):
    page, engine = visit(url), engines["storyteller"]
    evil = "<img src=x onerror=alert(1)><script>1</script> & &amp;"
    engine.says = tokenizer.encode(evil, add_special_tokens=False)
    page.select_option("#second", "storyteller-small")
    ask(page, evil)
    assert texts(page)[0] == evil
    assert page.locator(".prompt").text_content() == evil
    assert page.locator("#turns :is(img, script)").count() == 0


@pytest.mark.slow
def test_the_real_engine(visit):
    """The bundled model beside itself: the same seed, the same text."""
    model = Path(__file__).parents[2] / "models" / "storyteller"
    command = [Path(sys.executable).with_name("fewbit"), "serve", model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = next(found[0] for line in server.stdout if (found := re.findall(r"http://[\d.:]+", line)))
        threading.Thread(target=server.stdout.read, daemon=True).start()  # a pipe that is full would stop it
        page = visit(url)
        page.select_option("#second", "storyteller")
        page.fill("#max_tokens", "40")
        ask(page, "Tell me a story about a bear.")
        assert len(texts(page)[0]) > 40
        expect(page.locator(".verdict")).to_have_text(re.compile(r"^The same \d+ tokens\.$"))
        assert re.match("[1-9]", figure(page, "speed").text_content())
        visit.leave()
    finally:
        server.terminate()
        try:
            server.wait(WAIT_S)
        finally:
            server.kill()
