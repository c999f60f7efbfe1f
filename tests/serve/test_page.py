"""The page: its routes, and the page itself in a real browser."""

import base64
import io
import json
import os
import shutil
import time
from dataclasses import replace

import httpx
import numpy as np
import pytest
import small_runs
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tinyfm import generate
from tinyfm.calc import __main__ as calc
from tinyfm.calc import systems
from tinyfm.common import sheets
from tinyfm.common.seeds import row_generators
from tinyfm.generate import Sampling
from tinyfm.gpt import GPT
from tinyfm.serve import costs, drawing, run_views, text_views
from tinyfm.serve.__main__ import about_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "no browser is installed here: apt install chromium chromium-driver"
HTML = "<img src=x onerror=alert(1)>"  # in a sample: it must stay text
PATIENCE = 30  # seconds for a change of the page


def make_run(folder, losses):
    """A folder as training writes it."""
    (folder / "samples").mkdir(parents=True)
    record = {"preset": "gpt", "family": "gpt", "train": {"steps": 100}}
    (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [{"step": 10 * i, "val_loss": loss, "time": 1000.0 + i} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8"
    )
    (folder / "samples" / "step-000010.txt").write_text("first", encoding="utf-8")
    (folder / "samples" / "step-000020.txt").write_text(HTML, encoding="utf-8")
    (folder / "samples" / "secret.txt").write_text("not a sample", encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pictures = tmp_path_factory.mktemp("pictures")
    for name, colour in {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}.items():
        Image.new("RGB", (8, 8), colour).save(pictures / f"{name}.png")
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "one", [4.0, 3.0, 2.5])
    make_run(folder / "two", [4.0, 3.5, 3.25])
    names = ("gpt", "chat", "soft", "clip", "ddpm", "text2image")
    runs = small_runs.build_runs(tmp_path_factory.mktemp("served"), names)
    more = {"pictures": str(pictures), "runs_folder": str(folder), "about": lambda path: ["good"]}
    with small_runs.serving(runs, **more) as server:
        server.runs_folder = folder
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client


def events_of(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def pixels_of(url):
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def as_pixels(image):
    """(C, H, W) in [-1, 1] -> as pixels_of gives them."""
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def as_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- what the routes compute ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"position": "learned"}, {"window": 3, "n_kv_head": 1}, {"position": "alibi"}]
)
@torch.inference_mode()
def test_attention_is_that_of_the_block(changes):
    model = small_runs.random_weights(lambda: GPT(replace(small_runs.TEXT, n_layer=2, **changes)))
    ids = list(range(40, 52))
    seen = []
    attend = model.blocks[1].attention.attend

    def watched(q, k, v, mask):
        seen.append((v, attend(q, k, v, mask)))
        return seen[-1][1]

    model.blocks[1].attention.attend = watched
    model.hidden(torch.tensor([ids]))
    v, expected = seen[0]
    v = v.repeat_interleave(2 // v.size(1), dim=1)
    for head in (0, 1):
        weights = text_views.attention(model, ids, 1, head)
        assert weights.shape == (12, 12)
        assert torch.allclose(weights @ v[0, head], expected[0, head], atol=1e-5)
    with pytest.raises(ValueError, match=r"layer is 2.*0 to 1"):
        text_views.attention(model, ids, 2, 0)


def test_a_soft_prompt_is_shown_before_the_text(server, client):
    run = server.runs["soft"]
    asked = {"model": "soft", "text": "It"}
    tokens = client.post("/api/tokens", json=asked).json()["tokens"]
    assert [token["id"] for token in tokens] == [*run.front, *b"It"]
    assert [token["shown"] for token in tokens] == [False] * len(run.front) + [True, True]
    weights = client.post("/api/attention", json=asked).json()["weights"]
    assert [len(row) for row in weights] == [1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:past 64 tokens")
def test_next_logits_are_those_that_sampling_draws_from(server, client):
    run = server.runs["gpt"]
    text = "It was " * 20  # longer than the context
    answer = client.post("/api/next", json={"model": "gpt", "text": text}).json()
    logits = torch.frombuffer(bytearray(base64.b64decode(answer["logits"])), dtype=torch.float32)
    ids = run.tokenizer.encode(text)
    for seed in range(3):
        drawn = generate.complete(run.model, [ids], Sampling(max_new_tokens=1, seed=seed))
        generator = torch.Generator().manual_seed(seed * 1_000_003)
        assert generate.choose(logits[None], Sampling(), [generator]).tolist() == drawn[0]
    assert answer["likeliest"][0]["id"] == logits.argmax()


def test_a_film_ends_with_the_picture_of_sample_py(server, client):
    asked = {"model": "text2image", "prompt": "red", "steps": 4, "guidance": 2.0, "seed": 3}
    moments = events_of(client.post("/api/draw", json=asked))
    model = server.runs["text2image"].model
    (expected,) = sheets.illustrate(model, ["red"], 3, steps=4, guidance=2.0, sampler="dpm++")
    assert [moment["step"] for moment in moments] == [0, 1, 2, 3, 4]
    assert np.array_equal(pixels_of(moments[-1]["state"]), as_pixels(expected))
    asked = {"model": "ddpm", "steps": 3, "seed": 3}
    moments = events_of(client.post("/api/draw", json=asked))
    states = server.runs["ddpm"].model.sample(
        1, 3, "dpm++", generators=row_generators(3, 0, range(1)), film=True
    )
    for moment, state in zip(moments, states, strict=True):
        assert np.array_equal(pixels_of(moment["state"]), as_pixels(state[0].clamp(-1, 1)))


def test_a_masked_picture_keeps_the_rest(client):
    size = small_runs.DRAWING.autoencoder.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[:, : size // 2] = 255
    image, painted = as_url(Image.fromarray(pixels)), as_url(Image.fromarray(mask))
    asked = {"model": "text2image", "prompt": "red", "steps": 2, "image": image, "mask": painted}
    drawn = pixels_of(events_of(client.post("/api/draw", json=asked))[-1]["state"])
    assert np.array_equal(drawn[:, size // 2 :], pixels[:, size // 2 :])
    assert not np.array_equal(drawn[:, : size // 2], pixels[:, : size // 2])


@torch.inference_mode()
def test_a_walk_goes_from_one_reconstruction_to_the_other(server):
    model = server.runs["text2image"].model
    ends = torch.rand(2, 3, 8, 8) * 2 - 1
    found = drawing.walk(model, ends[:1], ends[1:], 5)
    rebuilt = model.decode(model.encode_images(ends))
    assert torch.allclose(found[[0, -1]], rebuilt, atol=1e-5)
    assert len(found) == 5


def test_mistakes_are_answered_before_a_stream_starts(client):
    cases = [
        ("/api/draw", {"model": "text2image", "prompt": " "}, "prompt"),
        ("/api/draw", {"model": "ddpm", "sampler": "none"}, "none"),
        ("/api/draw", {"model": "ddpm", "steps": 10**9}, "steps"),
        ("/api/draw", {"model": "ddpm", "image": "data:,"}, "image"),
        ("/api/draw", {"model": "text2image", "prompt": "a", "strength": 0.5}, "image"),
        ("/api/draw", {"model": "gpt"}, "gpt"),
        ("/api/walk", {"model": "text2image", "first": "x", "last": "x"}, "first"),
        ("/api/attention", {"model": "gpt", "text": "a", "layer": 9}, "layer is 9"),
        ("/api/costs", {"system": "llama9"}, "llama9"),
        ("/api/costs", {"system": "resnet50", "layers": 3}, "resnet50"),
        ("/api/costs", {"system": "gpt2", "rows": 10**9}, "rows"),
    ]
    for route, body, word in cases:
        answer = client.post(route, json=body)
        assert answer.status_code == 400, (route, body)
        assert word in answer.json()["error"]["message"], (route, body)


def test_only_listed_runs_and_samples_can_be_read(client):
    assert [run["name"] for run in client.get("/api/runs").json()] == ["one", "two"]
    found = client.get("/api/samples", params={"run": "one"}).json()
    assert [sample["step"] for sample in found] == [10, 20]
    for after in ("x", "--3", "9" * 5000):
        answer = client.get("/api/metrics", params={"run": "one", "after": after})
        assert answer.status_code == 400 and "a step" in answer.text
    for run in ("..", "one/..", "/etc", ""):
        assert client.get("/api/metrics", params={"run": run}).status_code == 404
    for file in ("secret.txt", "../config.json", "/etc/passwd", "step-000030.txt"):
        answer = client.get("/api/sample", params={"run": "one", "file": file})
        assert answer.status_code == 400, file
    answer = client.get("/api/sample", params={"run": "one", "file": "step-000020.txt"})
    assert answer.headers["content-type"].startswith("text/plain")
    rows = client.get("/api/metrics", params={"run": "one", "after": 0}).json()["rows"]
    assert rows == [{"step": 10, "val_loss": 3.0}, {"step": 20, "val_loss": 2.5}]


def test_losses_are_read_again_only_when_the_file_has_changed(tmp_path):
    make_run(tmp_path / "run", [4.0])
    before = run_views.read_rows(tmp_path / "run")
    assert run_views.read_rows(tmp_path / "run") is before
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 10}\n', encoding="utf-8")
    os.utime(path, (1, 1))
    assert [row["step"] for row in run_views.read_rows(tmp_path / "run")] == [0, 10]


@pytest.mark.parametrize(("text", "word"), [("{", "JSON"), ("[1]", "train.steps")])
def test_a_broken_run_is_named_with_its_file(tmp_path, text, word):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json.*{word}"):
        run_views.describe(tmp_path, 0)


def test_costs_are_those_of_the_calculator():
    words = "llama3-8b --gpu h100 --gpus 64 --tokens 1e12 --rows 2 --json"
    expected = json.loads(calc.answer(words.split()))
    found = costs.calculate(costs.Job("llama3-8b", gpus=64, units=1e12, rows=2, zero=3))
    assert int(found["total"]) == expected["train_bytes_per_gpu"]
    assert found["days"] == expected["days"]
    assert found["cost_usd"] == expected["cost_usd"]
    for name, layers, heads in (("gpt2-medium", 24, 16), ("gpt2-xl", 48, 25)):
        like = systems.get("gpt2", layers=layers, heads=heads)
        assert like.parameters == systems.get(name).parameters


def test_what_a_run_costs_and_what_it_reached(tiny_run):
    cost, verdict = about_run(tiny_run)
    assert "parameters" in cost
    assert "untrained" in verdict


# ---- the page in a browser -----------------------------------------------------------------------


class Page:
    """The page in a browser, with what a person does to it."""

    def __init__(self, url):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.add_argument("--window-size=1280,900")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.url = url

    def show(self, tab):
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}/#{tab}")
        self.wait(lambda: self.find(f"#{tab}").is_displayed())

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return self.run(
            f"return [...document.querySelectorAll('{selector}')].map(e => e.textContent)"
        )

    def click(self, selector):
        self.find(selector).click()

    def run(self, script, *given):
        return self.driver.execute_script(script, *given)

    def set(self, selector, value):
        script = """
            arguments[0].value = arguments[1];
            arguments[0].dispatchEvent(new Event("input", {bubbles: true}));
            arguments[0].dispatchEvent(new Event("change", {bubbles: true}));
        """
        self.run(script, self.find(selector), value)

    def requests(self, route):
        """How often the page has asked a route."""
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        return sum(name.endswith(route) for name in self.run(script))

    def wait(self, done):
        end = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < end, f"nothing happened: {self.texts('[role=status]')}"
            time.sleep(0.03)


@pytest.fixture(scope="module")
def browser(server):
    if not (BROWSER and DRIVER):
        pytest.skip(MISSING)
    page = Page(server.url)
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser):
    yield browser
    said = browser.driver.get_log("browser")
    assert not said, said


def test_the_sliders_filter_as_generate_does(page):
    page.show("text")
    generator = torch.Generator().manual_seed(0)
    cases = []
    expected = []
    for case in range(24):
        logits = 3 * torch.randn(1, 60, generator=generator)
        s = Sampling(
            temperature=(0.3, 0.8, 1.0, 1.7)[case % 4],
            top_k=(0, 1, 5, 60, 100)[case % 5],
            top_p=(1.0, 0.2, 0.9)[case % 3],
            min_p=(0.0, 0.05)[case % 2],
        )
        cases.append({
            "logits": base64.b64encode(logits.numpy().tobytes()).decode(),
            "temperature": s.temperature, "topK": s.top_k, "topP": s.top_p, "minP": s.min_p,
        })  # fmt: skip
        kept = generate.filter_logits(logits / s.temperature, s.top_k, s.top_p, s.min_p)
        expected.append(kept.softmax(-1)[0].tolist())
    script = """
        const done = arguments[1];
        import("/sampling.js").then(({ fromBase64, probabilities }) => done(
            arguments[0].map((c) => [...probabilities(fromBase64(c.logits), c)])));
    """
    found = page.driver.execute_async_script(script, cases)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.array_equal(np.array(found) == 0, np.array(expected) == 0)


def test_text(page, server):
    page.show("text")
    prompt = page.find("#prompt")
    prompt.clear()
    prompt.send_keys("It wäs")
    page.wait(lambda: page.texts(".count") == ["7 tokens"])
    assert page.texts(".token .id") == [str(i) for i in "It wäs".encode()]
    page.wait(lambda: page.requests("/api/next") == page.requests("/api/tokens"))
    assert len(page.all(".next li")) == 10

    # Sliders filter without another forward pass.
    asked = page.requests("/api/next")
    page.set("[name=topK]", 3)
    assert page.texts(".next .share").count("left out") == 7
    assert page.requests("/api/next") == asked
    page.set("[name=topK]", 0)

    # Attention of a focused token.
    page.click("#show-attention")
    page.wait(lambda: page.requests("/api/attention"))
    page.wait(lambda: page.run(
        "document.querySelectorAll('.token')[3].focus();"
        "return document.querySelectorAll('.token.attended').length") == 7)  # fmt: skip
    found = page.run("""
        const tokens = [...document.querySelectorAll(".token")];
        return tokens.map((token) => Number(token.style.getPropertyValue("--weight")));
    """)
    assert max(found) == 1 and found[4:] == [0, 0, 0]
    assert page.find(".attention .hint").text.count("%") == 3

    # The text is that of sample.py.
    page.set("[name=maxTokens]", 12)
    page.click("#write")
    page.wait(lambda: len(page.all(".written .text button")) == 12)
    run = server.runs["gpt"]
    settings = Sampling(max_new_tokens=12, seed=0)
    expected = generate.complete(run.model, [list("It wäs".encode())], settings)[0]
    branch_at = next(i for i in range(3, 12) if expected[i] < 128)
    labels = page.texts(".written .text button")
    assert labels[branch_at] == run.tokenizer.decode([expected[branch_at]]).replace("\n", "↵")

    # Another token in its place: what stands before stays.
    page.wait(lambda: page.find("#write-stop").get_attribute("disabled"))
    page.all(".written .text button")[branch_at].click()
    choice = page.find(".branch li button:not(:disabled):not([aria-current])")
    name = choice.find_element(By.CSS_SELECTOR, ".name").text
    choice.click()
    page.wait(lambda: len(page.all(".written .text button")) == branch_at + 13)
    after = page.texts(".written .text button")
    assert after[:branch_at] == labels[:branch_at]
    assert page.texts(".written .text .chosen") == [after[branch_at]]
    assert name.strip("·") == after[branch_at].strip(" ")


def test_two_runs_side_by_side_and_a_chat(page):
    page.show("text")
    page.set("#text-other", "chat")
    page.wait(lambda: len(page.all(".pane .next li")) == 20)
    assert page.texts(".pane h2") == ["gpt", "chat"]
    page.click("#mode-chat")
    page.set("[name=maxTokens]", 8)
    page.find("#chat-input").send_keys(f"{HTML}\n")
    page.wait(lambda: len(page.all(".message")) == 2 and not page.find("#chat-stop").is_enabled())
    assert page.texts(".message.user span") == [HTML]

    # A conversation that is started again while an answer is written knows nothing of it.
    page.run("""
        const send = window.fetch;
        window.bodies = [];
        window.fetch = (url, given) => {
            window.bodies.push(JSON.parse(given.body));
            return send(url, given);
        };
    """)
    page.set("[name=maxTokens]", 400)
    page.find("#chat-input").send_keys("a\n")
    page.wait(lambda: page.texts(".message span")[-1])
    page.click("#chat-clear")
    page.wait(lambda: not page.find("#chat-stop").is_enabled())
    assert not page.all(".message")
    page.set("[name=maxTokens]", 1)
    page.find("#chat-input").send_keys("b\n")
    page.wait(lambda: len(page.run("return window.bodies")) == 2)
    said = page.run("return window.bodies[1].messages")
    assert said == [{"role": "user", "content": "b"}]
    page.wait(lambda: not page.find("#chat-stop").is_enabled())


def test_tabs_by_keyboard(page):
    page.show("text")
    page.find("#tab-text").send_keys(Keys.ARROW_LEFT)
    page.wait(lambda: page.find("#costs").is_displayed())
    assert page.driver.switch_to.active_element.get_attribute("aria-selected") == "true"
    assert not page.find("#text").is_displayed()


def test_pictures(page):
    page.show("pictures")
    page.set("#draw-settings [name=steps]", 4)
    for n in (1, 2):
        page.click("#draw-form .main")
        page.wait(lambda n=n: len(page.all("#gallery li")) == n)
    film = page.find("#film-step")
    assert film.get_attribute("max") == film.get_attribute("value") == "4"
    last = page.find("#film-state").get_attribute("src")
    assert page.find("#gallery img").get_attribute("src") == last
    page.set("#film-step", 0)
    assert page.find("#film-state").get_attribute("src") != last

    page.click("#gallery li:nth-child(1) .walks:nth-of-type(3)")
    page.click("#gallery li:nth-child(2) .walks:nth-of-type(4)")
    page.click("#walk")
    page.wait(lambda: len(page.all("#walk-strip img")) == 12)

    # Paint over a picture, then draw it again: by the run that reads a prompt.
    assert page.find("#draw-model").get_attribute("value") == "ddpm"
    page.click("#gallery li:nth-child(1) button:nth-of-type(2)")
    page.wait(lambda: page.find("#mask").is_displayed())
    move = ActionChains(page.driver).move_to_element(page.find("#mask"))
    move.click_and_hold().move_by_offset(30, 20).release().perform()
    assert page.find("#edit [name=strength]").get_attribute("value") == "1"
    assert page.find("#draw-model").get_attribute("value") == "text2image"
    page.click("#draw-form .main")
    page.wait(lambda: len(page.all("#gallery li")) == 3)


def test_search(page):
    page.show("search")
    page.click("#search-form .main")
    page.wait(lambda: len(page.all("#found li")) == 3)
    page.click("#found .picture")
    page.wait(lambda: "like" in page.find("#search-status").text)
    page.click("#found .bar button")
    labels = page.find("#labels")
    labels.clear()
    labels.send_keys("red\ngreen\nblue")
    page.click("#name-form .main")
    page.wait(lambda: len(page.all("#named li")) == 3)
    assert sorted(page.texts("#named .name")) == ["blue", "green", "red"]


def test_runs_and_costs(page, server):
    page.show("runs")
    page.wait(lambda: len(page.all("#curves polyline")) == 2)
    page.wait(lambda: page.texts("#samples pre") == [HTML])  # text, no picture
    assert not page.requests("step-000010.txt")  # not before it is shown
    assert not page.all("#samples img")
    page.wait(lambda: "good" in page.find("#verdict").text)
    page.set("#samples-step", 0)
    page.wait(lambda: page.texts("#samples pre") == ["first"])
    # A run that trains: its curve grows.
    with (server.runs_folder / "one" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 30, "val_loss": 2.25}\n')
    page.wait(lambda: "step 30" in page.texts("#run-list .hint"))
    page.wait(lambda: len(page.all("#curves circle")) == 4 + 3)
    page.wait(lambda: "step 30" in page.find("#description").text)
    page.click("#log-scale")
    assert {"2.5", "3", "3.5", "4"} <= set(page.texts("#curves text"))  # no 1, 2 or 5 x 10^n
    page.click("#run-list input")
    page.wait(lambda: len(page.all("#curves polyline")) == 1)

    page.show("costs")
    page.wait(lambda: page.texts("#bill dd")[:1] == ["8.03 billion"])
    assert page.texts("#job label:has([name=units]) output") == ["15 trillion tokens"]
    page.set("#job [name=layers]", 16)
    page.wait(lambda: page.texts("#bill dd")[0] == "4.54 billion")


def test_nothing_is_fetched_from_elsewhere(page, server):
    page.show("text")
    names = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith(server.url) for name in names)
    sizes = [1280, 400]
    for width in sizes:
        page.driver.set_window_size(width, 900)
        for tab in ("text", "pictures", "search", "runs", "costs"):
            page.click(f"#tab-{tab}")
            assert page.run("return document.documentElement.scrollWidth <= innerWidth"), (
                width,
                tab,
            )
    page.driver.set_window_size(1280, 900)
