"""The page and the figures of a run: what they show is what the run scored,
in a real browser and on real pixels."""

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from helpers import DEADLINE, seed_of, tiny, write_shard

import train_gpt
from record import checks, figures, view
from record.__main__ import main
from record.colors import RAMPS, THEMES
from record.fill import ENVIRONMENT
from record.folder import Folder
from record.log import RecordError

CHROME = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Browser:
    """A headless Chromium, driven over a pipe by the DevTools protocol: real keys, pointers,
    themes and pixels."""

    def __init__(self):
        self.folder, self.calls = tempfile.mkdtemp(), 0
        (theirs_in, self.send), (self.receive, theirs_out) = os.pipe(), os.pipe()
        script = f"exec {CHROME} {' '.join(self.flags())} 3<&{theirs_in} 4>&{theirs_out}"
        self.process = subprocess.Popen(
            ["bash", "-c", script],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.buffer, self.session = b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.errors = []
        self("Runtime.enable"), self("Page.enable"), self("Network.enable")

    def flags(self) -> list[str]:
        return [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-dev-shm-usage",
            f"--user-data-dir={self.folder}",
        ]

    def __call__(self, method: str, **params) -> dict:
        """The result of one call; errors and requests that happen meanwhile
        are kept in `errors`."""
        self.calls += 1
        session = dict(sessionId=self.session) if self.session else {}
        os.write(
            self.send,
            json.dumps(dict(id=self.calls, method=method, params=params, **session)).encode()
            + b"\0",
        )
        while True:
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.receive, 1 << 20)
            message, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(message)
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if message.get("method") == "Network.requestWillBeSent":
                self.errors.append(message["params"]["request"]["url"])

    def open(self, url: str, width: int = 1200, height: int = 800, theme: str = "light") -> None:
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self(
            "Emulation.setEmulatedMedia",
            features=[
                dict(name="prefers-color-scheme", value=theme),
                dict(name="prefers-reduced-motion", value="reduce"),
            ],
        )
        self("Page.navigate", url="about:blank")
        self.errors.clear()
        self("Page.navigate", url=url)
        end = time.monotonic() + DEADLINE
        while self.js("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, f"{url} was not loaded"
            time.sleep(0.02)
        self.errors = [e for e in self.errors if not str(e).startswith(("file:", "about:"))]

    def js(self, expression: str):
        result = self(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, key: str) -> None:
        shift = 8 if len(key) == 1 and key.isupper() else 0
        text = dict(text=key) if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=shift, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=shift)

    def point(self, selector: str, press: bool = False) -> None:
        """Move the pointer over an element, and click there with `press`."""
        x, y = self.js(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r})"
            ".getClientRects()[0])"
        )
        for kind in ("mouseMoved", *(["mousePressed", "mouseReleased"] if press else [])):
            button = "none" if kind == "mouseMoved" else "left"
            self(
                "Input.dispatchMouseEvent",
                type=kind,
                x=x,
                y=y,
                button=button,
                clickCount=int(press),
            )

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))
        return path

    def close(self) -> None:
        os.close(self.send)
        self.process.wait(10)
        os.close(self.receive)
        shutil.rmtree(self.folder, ignore_errors=True)


# --- a run's scores, made up: a hostile document, then the language reference ---

HOSTILE = (
    "</script><script>document.title='owned'</script><!-- &amp; \"'` <img src=x onerror=alert(1)> "
    "caf\u00e9 \U0001f600 \u4e2d"
)


@pytest.fixture(scope="session")
def sp(corpus):
    return sentencepiece.SentencePieceProcessor(model_file=corpus["TOKENIZER_PATH"])


@pytest.fixture(scope="session")
def run(corpus, sp, tmp_path_factory) -> Path:
    """The scores of a run of random quality;
    the text that it begins with tries to leave its place."""
    rng = np.random.default_rng(seed_of("a run of random quality"))
    folder = tmp_path_factory.mktemp("run")
    newline = sp.piece_to_id("<0x0A>")
    reference = train_gpt.load_validation(tiny(**corpus)).tokens[:1400]
    stream = np.concatenate([sp.encode(HOSTILE), [newline], sp.encode("after"), reference]).astype(
        np.uint16
    )
    write_shard(folder / "data/fineweb_val_000000.bin", stream)
    hp = tiny(**{**corpus, "DATA_PATH": folder / "data", "VE_LAYERS": "2,3"})
    nll = rng.gamma(2, 2, len(stream) - 1).astype(np.float32)
    gain = rng.normal(0.3, 1.5, len(nll))
    mixed = np.maximum(nll - gain, 0.01).astype(np.float32)
    path = folder / "logs/made_up_scores.npz"
    path.parent.mkdir()
    np.savez(
        path,
        nll=nll,
        mixed=mixed,
        entropy=rng.gamma(2, 2, len(nll)).astype(np.float32),
        settings=json.dumps(hp.as_env()),
    )
    return path


def page_data(page: str) -> dict:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


# --- the page ---


@pytest.fixture(scope="module")
def counter(corpus):
    return train_gpt.ByteCounter(tiny(**corpus))


def test_token_texts_are_the_exact_text(sp, rng, counter):
    pool = [*"abc xyz \u00e9\u00df\u4e2d\U0001f600\u0416\u2014<&>", "the ", "with "]
    documents = [
        " ".join("".join(rng.choice(pool, rng.integers(1, 30))).split()) or "x" for _ in range(30)
    ]
    tokens = np.array(sum(([1, *sp.encode(text)] for text in documents), [1]))
    texts = view.token_texts(tokens[1:], counter, at_start=True)
    assert "".join(texts) == "".join(sp.decode(sp.encode(text)) for text in documents)
    counted = counter(tokens).sum()
    assert len("".join(texts).encode()) == counted, (
        "the text shown has the bytes that the score divides by"
    )


def test_bytes_that_are_no_utf8_are_replaced_as_a_decoder_would(sp, rng, counter):
    raw = bytes(
        rng.choice(np.frombuffer("\u00e9\u4e2d\U0001f600a\n".encode() + b"\xff", np.uint8), 200)
    )
    texts = view.token_texts([sp.piece_to_id(f"<0x{b:02X}>") for b in raw], counter, False)
    assert len(texts) == len(raw) and "".join(texts) == raw.decode(errors="replace")
    cut = view.token_texts([sp.piece_to_id("<0xE4>"), sp.piece_to_id("a")], counter, False)
    assert "".join(cut) == "\ufffda"


def test_what_is_embedded_cannot_end_its_element(rng):
    hostile = [
        "</script>",
        "<!--<script>",
        "\u2028",
        HOSTILE,
        "".join(map(chr, rng.integers(1, 0xD7FF, 200))),
    ]
    text = str(ENVIRONMENT.from_string("{{ data|tojson }}").render(data=hostile))
    assert json.loads(text) == hostile and not set("<>&\u2028") & set(text)


def test_the_stretch_is_the_one_that_gains_most(run, corpus):
    scores, count = view.load_scores(run), 100
    counter = train_gpt.ByteCounter(scores.hp)
    best, gain = None, -np.inf
    for a in range(len(scores.nll) - count + 1):
        token = scores.tokens[a + 1]
        saved = scores.gain[a : a + count].sum()
        if (counter.opens_word[token] or not counter.length[token]) and saved > gain + 1e-9:
            best, gain = a, saved
    assert view.choose_stretch(scores, None, count) == (best, best + count)
    assert view.choose_stretch(scores, 1300, 10_000) == (1300, len(scores.nll))


def test_the_page_states_what_was_scored(run, tmp_path):
    out = view.view(run, tmp_path / "page.html", start=100, tokens=700).path
    assert (
        view.view(run, tmp_path / "again.html", start=100, tokens=700).path.read_bytes()
        == out.read_bytes()
    )
    page, scores = out.read_text(encoding="utf-8"), view.load_scores(run)
    data, size = page_data(page), slice(100, 800)
    for name in ("nll", "mixed", "entropy"):
        assert np.allclose(data[name], getattr(scores, name)[size] / np.log(2), atol=6e-5)
    for part in (size, slice(None)):
        for nats in (scores.nll, scores.mixed):
            assert f"{train_gpt.bits_per_byte(nats[part], scores.bytes[part]):.4f}" in page
    tokens, longest = scores.tokens.tolist(), scores.hp.ngram_order
    for k in range(0, 700, 41):  # recounted by scanning
        t = 101 + k
        seen = {
            n: [
                tokens[j] for j in range(n - 1, t) if tokens[j - n + 1 : j] == tokens[t - n + 1 : t]
            ]
            for n in range(2, longest + 1)
        }
        longest_known = max((n for n in seen if seen[n]), default=0)
        found = seen.get(longest_known, [])
        assert (data["n"][k], data["context_count"][k], data["ngram_count"][k]) == (
            longest_known,
            len(found),
            found.count(tokens[t]),
        )


def test_scores_that_do_not_fit_are_refused_in_one_line(run, tmp_path):
    arrays, hp = dict(np.load(run)), view.load_scores(run).hp
    bad = arrays["mixed"].copy()
    bad[7] = np.nan
    for changes, message in (
        (dict(nll=arrays["nll"][:-1]), "expected the data of that run"),
        (dict(mixed=bad), "not finite"),
        (dict(mixed=None), "holds no mixed"),
        (dict(settings=None), "holds no settings"),
        (dict(settings=json.dumps(replace(hp, data_path="nowhere").as_env())), "DATA_PATH=nowhere"),
    ):
        path = tmp_path / "bad_scores.npz"
        np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        with pytest.raises(RecordError, match=message) as caught:
            view.view(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes(run.read_bytes()[:5000])
    np.savez(tmp_path / "odd.npz", **{**arrays, "settings": "[1]"})
    for path in (tmp_path / f"{name}.npz" for name in ("text", "cut", "odd", "none")):
        with pytest.raises(RecordError, match=path.name):
            view.view(path)
    for asked in (dict(start=-1), dict(start=10**6), dict(tokens=0)):
        with pytest.raises(RecordError, match="asked for"):
            view.view(run, **asked)
    assert not list(tmp_path.glob("*.html"))


def test_the_scores_of_the_last_run_are_viewed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["view"]) == 1
    assert "no scores of a run; `make demo` saves them" in capsys.readouterr().err
    (tmp_path / "logs").mkdir()
    for age, name in ((50, "older"), (0, "last"), (90, "oldest")):
        path = shutil.copy(run, tmp_path / f"logs/{name}_scores.npz")
        os.utime(path, (1_000_000_000 - age,) * 2)
    assert main(["view", "--tokens", "30"]) == 0
    address, shown = capsys.readouterr().out.splitlines()
    assert address == (tmp_path / "logs/last_view.html").as_uri()
    assert re.fullmatch(
        r"It shows targets [0-9,]+ to [0-9,]+ of [0-9,]+, where counting saved most; "
        r"--start N shows others\.",
        shown,
    )
    assert main(["view", "--start", "40", "--tokens", "30"]) == 0
    assert "It shows targets 40 to 69 of" in capsys.readouterr().out  # as the page says


def test_what_cannot_be_viewed_is_one_line(run, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros(9))
    for command, said in (
        ([tmp_path / "x.npy"], f"{tmp_path}/x.npy: no scores of a run"),
        ([run, "--out", tmp_path / "nowhere/x.html"], f"{tmp_path}/nowhere/x.html: No such file"),
        ([run, "--out", tmp_path], f"{tmp_path}: Is a directory"),
    ):
        assert main(["view", *map(str, command)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"record: error: {said}") and error.count("\n") == 1


def luminance(color: str) -> float:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float(
        np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        @ (0.2126, 0.7152, 0.0722)
    )


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_on_every_colour(theme):
    colors = THEMES[theme]
    ramps = {
        name: ramp.replace("transparent", colors["paper"]).split()
        for name, ramp in RAMPS[theme].items()
    }
    assert len(ramps["gain"]) == len(view.GAIN_EDGES) + 1
    assert len(ramps["cost"]) == len(view.COST_EDGES) + 1
    for color in (*ramps["gain"], *ramps["cost"], colors["paper"], colors["card"]):
        assert contrast(color, colors["ink"]) >= 4.5, color
    for name in ("soft", "saved", "lost"):
        assert min(contrast(colors[name], colors[ground]) for ground in ("paper", "card")) >= 4.5, (
            name
        )
    # further from nothing: further from the page
    for side in (ramps["gain"][6:], ramps["gain"][6::-1], ramps["cost"]):
        steps = [contrast(color, colors["paper"]) for color in side]
        assert steps == sorted(steps) and steps[-1] > 1.8


# --- the page in a browser ---


@pytest.fixture(scope="module")
def browser():
    if not CHROME:
        pytest.skip("no chromium or chrome on this machine (apt-get install chromium)")
    browser = Browser()
    yield browser
    browser.close()


def test_a_browser_shows_the_text_exactly_and_asks_for_nothing(browser, run, tmp_path):
    url = view.view(run, tmp_path / "page.html", start=0, tokens=5000).path.as_uri()
    browser.open(url)
    data = page_data((tmp_path / "page.html").read_text(encoding="utf-8"))
    shown = browser.js("[...document.querySelectorAll('#text > span')].map(e => e.textContent)")
    assert shown == data["text"] and len(shown) == len(data["nll"])
    assert "".join(shown).startswith(HOSTILE + "\n after")
    assert browser.js("document.title").startswith("test:")
    assert browser.errors == []


def test_keys_pointer_and_lists_lead_to_the_same_card(browser, run, tmp_path):
    browser.open(view.view(run, tmp_path / "page.html", tokens=600).path.as_uri())
    data = page_data((tmp_path / "page.html").read_text(encoding="utf-8"))
    gain = np.subtract(data["nll"], data["mixed"])
    ranked = np.argsort(-gain, kind="stable")

    def state():
        focus = int(browser.js("document.activeElement.id").removeprefix("t")) - data["start"]
        return focus, browser.js("document.querySelector('#card').innerText")

    browser.js("document.querySelector('.skip').focus()")
    for key, i in (
        ("n", ranked[0]),
        ("n", ranked[1]),
        ("p", ranked[0]),
        ("N", ranked[-1]),
        ("Home", 0),
        ("ArrowRight", 1),
        ("End", 599),
        ("ArrowRight", 599),
    ):
        browser.key(key)
        focus, card = state()
        assert focus == i, key
        verdict = f"{'saved' if gain[i] > 0 else 'lost'} {abs(gain[i]):.2f} bits"
        assert all(
            part in card
            for part in (
                verdict,
                f"{data['nll'][i]:.2f}",
                f"{data['mixed'][i]:.2f}",
                f"{data['entropy'][i]:.2f}",
                f"target {data['start'] + i:,}",
            )
        ), card
        if data["n"][i]:
            assert f"order {data['n'][i]}" in card
            assert f"{data['context_count'][i]:,} \u00d7" in card
    assert browser.js("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1, (
        "one stop for Tab"
    )
    browser.key("ArrowUp")
    up = browser.js("document.activeElement.getBoundingClientRect().top")
    browser.key("ArrowDown")
    assert browser.js("document.activeElement.getBoundingClientRect().top") > up
    before = state()[0]
    over = browser.js("""[...document.querySelectorAll('#text > span')].find(e => {
        const r = e.getClientRects()[0];
        return r && r.top > 300
            && e === document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2);
    }).id""")
    browser.point(f"#{over}")
    assert f"target {int(over[1:]):,}" in state()[1] and state()[0] == before, (
        "the pointer shows, focus stays"
    )
    browser.point(f"#{over}", press=True)
    assert state()[0] == int(over[1:]) - data["start"]
    browser.js("document.querySelector('#losses button').click()")
    assert state()[0] == ranked[-1]
    assert browser.js("location.hash") == f"#t{ranked[-1] + data['start']}"
    browser.key("c")
    assert (
        browser.js("getComputedStyle(document.querySelector('.legend[data-for=model]')).display")
        == "block"
    )
    assert browser.errors == []


@pytest.mark.slow  # what a software renderer draws
@pytest.mark.parametrize("width, height", [(1000, 700), (390, 844)])
def test_screenshots_light_and_dark_wide_and_narrow(browser, run, tmp_path, width, height):
    from matplotlib.image import imread

    url, light = view.view(run, tmp_path / "page.html").path.as_uri(), []
    for theme in THEMES:
        browser.open(url, width, height, theme)
        browser.key("n")
        browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        pixels = imread(browser.screenshot(tmp_path / f"{theme}.png"))[..., :3]
        assert pixels.shape[:2] == (height, width)
        light.append(np.median(pixels))
        shades = len(np.unique((pixels * 15).astype(int).reshape(-1, 3), axis=0))
        assert shades > 25 and pixels.std() > 0.05, "not blank"
        assert browser.js("document.documentElement.scrollWidth") <= width, (
            "nothing to scroll sideways"
        )
        card = browser.js(
            "(r => [r.top, r.bottom])(document.querySelector('#card').getBoundingClientRect())"
        )
        focus = browser.js(
            "(r => [r.top, r.bottom])(document.activeElement.getBoundingClientRect())"
        )
        assert card[0] >= 0 and card[1] <= height and focus[0] > 0 and focus[1] < height
        if width < 500:
            assert focus[1] < card[0], "the sheet does not cover the token"
    assert light[0] > 0.8 and light[1] < 0.3
    browser.key("t"), browser.key("t")
    assert browser.js("document.documentElement.dataset.theme") == "dark"
    browser.key("t")


# --- the figures ---


def log_text(seed: int, rng, drop: str = "") -> str:
    """A log with all that the figures read; lines that start with `drop` are left out."""
    lines = [f"SEED={seed}", "QUANT_BITS=6"]
    for step in range(10, 310, 10):
        loss = 3 + 4 * np.exp(-step / 60) + rng.normal(0, 0.03)
        lines.append(
            f"step:{step}/300 train_loss:{loss:.4f} train_time:{step * 210 + rng.integers(9)}ms "
            f"step_avg:210.00ms tok/s:9000 lr_scale:{min(1, (300 - step) / 150):.4f}"
        )
    lines.append("step:300/300 val_loss:3.1000 val_bpb:2.0500 train_time:63000ms step_avg:210.00ms")
    for name, bpb in (
        ("float", 2.04),
        ("int6_roundtrip", 2.06),
        ("int6_sliding_window", 2.01),
        ("ngram", 1.51),
    ):
        lines.append(f"final_{name}_exact val_loss:3.0 val_bpb:{bpb + rng.normal(0, 0.003):.8f}")
    side = 30_000 + rng.integers(99)
    lines.append(
        f"artifact_bytes code:92459 side:{side} embeddings:170000 attention:201000 mlp:484000"
    )
    lines += [
        f"ngram_order order:{n} targets:{1000 + 100 * n} gain:{0.08 * (n > 0) - 0.1 * (n == 2):.8f}"
        for n in (0, *range(2, 8))
    ]
    lines += [
        f"calibration entropy:{a}-{a + 1} targets:{500 + 100 * a} expected:{a + 0.5} "
        f"nll:{a + 0.6 + rng.normal(0, 0.03):.4f} mixed:{0.7 * a + 0.4:.4f}"
        for a in range(6)
    ]
    lines.append("calibration entropy:6-7 targets:0 expected:nan nll:nan mixed:nan")
    return "".join(f"{line}\n" for line in lines if not (drop and line.startswith(drop)))


def record(folder: Path, rng, seeds=(42, 1337, 2024), drop: str = "") -> Path:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        (folder / f"logs/seed{seed}.txt").write_text(log_text(seed, rng, drop))
    rows = "".join(f"| [{seed}](logs/seed{seed}.txt) |\n" for seed in seeds)
    results = f"<!-- results:begin -->\n{rows}<!-- results:end -->\n"
    (folder / "README.md").write_text(f"{results}<!-- figures:begin -->\n<!-- figures:end -->\n")
    return folder


PAGES = figures.README, figures.MEASUREMENTS


def a_pixel(draw, theme: str, path: Path) -> None:
    """Stands in for what takes matplotlib a quarter of a second."""
    from PIL import Image

    Image.new("RGB", (1, 1), 0 if theme == "dark" else 255).save(path)


@pytest.fixture
def drawn(tmp_path, rng, monkeypatch):
    """A folder of which every figure is drawn, and README shows three of them."""
    monkeypatch.setattr(figures, "saved_as_png", a_pixel)
    folder = record(tmp_path, rng)
    figures.plot(folder), figures.show(folder)
    return folder


def test_figures_show_the_numbers_of_the_logs(drawn):
    assert "; 6 show the numbers of the logs" in checks.check_figures(Folder(drawn))


def test_figures_of_older_logs_are_refused(drawn):
    path = drawn / "logs/seed42.txt"
    path.write_text(re.sub(r"(mlp:)\d+", r"\g<1>484001", path.read_text()))
    with pytest.raises(RecordError) as refused:
        checks.check_figures(Folder(drawn))
    faults = str(refused.value).split("; ")[::2]
    assert [fault.split("/")[-1] for fault in faults] == [
        f"fig_bytes_{theme}.png: shows other numbers than the logs" for theme in ("dark", "light")
    ]


def wider(png: bytes) -> bytes:
    """The picture claims another width."""
    return png.replace(b"\x00\x00\x00\x01", b"\x00\x00\x00\x02", 1)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (wider, "was changed after it had been drawn"),
        (lambda png: png[:-20], "is cut short"),
        (lambda png: b"no picture", "found no PNG"),
        (lambda png: png.replace(b"Numbers\0", b"Nothing\0"), "does not say which numbers"),
    ],
    ids=["painted over", "cut short", "no PNG", "drawn by others"],
)
def test_figures_that_were_changed_are_refused(drawn, spoil, said):
    path = drawn / "figures/fig_bytes_dark.png"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(RecordError, match=f"fig_bytes_dark.png: .*{said}"):
        checks.check_figures(Folder(drawn))


def test_a_figure_in_the_place_of_another_is_refused(drawn):
    shutil.copy(drawn / "figures/fig_bpb_dark.png", drawn / "figures/fig_bytes_dark.png")
    with pytest.raises(RecordError, match="fig_bytes_dark.png: shows other numbers"):
        checks.check_figures(Folder(drawn))


def test_plot_draws_every_figure_in_both_themes(tmp_path, rng):
    from matplotlib.image import imread

    folder = record(tmp_path, rng)
    paths, skipped = figures.plot(folder)
    assert not skipped
    assert {p.name for p in paths} == {
        f"{name}_{theme}.png" for name in figures.FIGURES for theme in ("light", "dark")
    }
    for path in paths:
        pixels = imread(path)[..., :3]
        assert pixels.shape[1] == 1660 and pixels.std() > 0.05, path.name
        background = figures.BACKGROUNDS[path.stem.split("_")[-1]]
        assert np.allclose(
            pixels[0, 0] * 255, [int(background[i : i + 2], 16) for i in (1, 3, 5)], atol=1
        )
        for edge in (pixels[:6], pixels[-6:], pixels[:, :6], pixels[:, -6:]):
            assert np.ptp(edge.reshape(-1, 3), axis=0).max() < 0.01, (
                f"{path.name}: something is cut off"
            )
        assert b"Date" not in path.read_bytes() and b"Software" not in path.read_bytes()
    markup = {page: figures.pictures(folder, page) for page in PAGES}
    assert all(f"figures/{path.name}" in "".join(markup.values()) for path in paths)
    assert [text.count("prefers-color-scheme: dark") for text in markup.values()] == [3, 2]
    again = tmp_path / "again.png"
    for name in ("fig_training",):
        data = figures.FIGURES[name].collect(Folder(folder).logs)
        figures.draw(name, data, "dark", again)
        assert again.read_bytes() == (folder / f"figures/{name}_dark.png").read_bytes(), (
            "same logs, same pixels"
        )


def test_plot_shows_on_each_page_what_it_drew_of_it(tmp_path, rng, capsys, monkeypatch):
    folder = record(tmp_path, rng, drop="calibration")
    monkeypatch.setattr(figures, "saved_as_png", a_pixel)
    empty = "# x\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nrest\n"
    (folder / "docs").mkdir()
    for page in PAGES:
        links = "[more](docs/measurements.md)\n" if page == figures.README else ""
        (folder / page).write_text(f"{links}{empty}")
    for _ in range(2):
        assert main(["plot", str(folder)]) == 0 and not capsys.readouterr().err
        for page in PAGES:
            expected = empty.replace("old", figures.pictures(folder, page))
            assert (folder / page).read_text().endswith(expected)
    assert "../figures/fig_training_dark.png" in (folder / figures.MEASUREMENTS).read_text()
    assert checks.check_figures(Folder(folder)) == (
        "8 shown by README, all here; 8 show the numbers of the logs"
    )


def test_a_readme_without_markers_is_left_as_it_is(tmp_path, rng, capsys, monkeypatch):
    folder, readme = record(tmp_path, rng), tmp_path / "README.md"
    monkeypatch.setattr(figures, "draw", lambda name, data, theme, path: path.write_bytes(b"PNG"))
    readme.write_text("# x\n")
    assert main(["plot", str(folder)]) == 0
    error = capsys.readouterr().err.splitlines()
    assert f"{readme}: found 0 x <!-- figures:begin -->" in error[0] and len(error) == 2
    assert readme.read_text() == "# x\n" and len(list(folder.glob("figures/*.png"))) == 10
    with pytest.raises(RecordError, match="README.md: shows no figures"):
        checks.check_figures(Folder(folder))


def test_the_figures_are_of_the_logs_that_readme_links_to(tmp_path, rng, monkeypatch):
    """Whatever else lies beside them: the same run scored again, a file that is no text."""
    folder = record(tmp_path, rng, seeds=(7, 8))
    (folder / "logs/again.txt").write_text((folder / "logs/seed7.txt").read_text())
    (folder / "logs/odd.txt").write_bytes(b"\xff\xfe")
    seen = []

    def collect(logs) -> dict:
        seen.append(logs)
        return {}

    one = replace(figures.FIGURES["fig_bytes"], collect=collect, draw=lambda *args: None)
    monkeypatch.setattr(figures, "FIGURES", {"fig_bytes": one})
    figures.plot(folder)
    assert [log.path.name for log in seen[0]] == ["seed7.txt", "seed8.txt"]


def test_the_figures_numbers_are_the_logs_numbers(tmp_path, rng):
    logs = Folder(record(tmp_path, rng)).logs
    assert [log.setting("SEED") for log in logs] == ["42", "1337", "2024"]
    orders = figures.collect_orders(logs)
    assert orders["orders"] == [0, 2, 3, 4, 5, 6, 7] and np.allclose(orders["gain"].sum(1), 0.38)
    assert np.allclose(orders["share"].sum(1), 1)
    sizes = [int(p.split(":")[1]) for p in logs[0].find("artifact_bytes").text.split()[1:]]
    assert figures.collect_bytes(logs)["bytes"][0].sum() == sum(sizes)
    mixed = figures.collect_bpb(logs)["stages"]["mixed with counts"]
    assert mixed == [log.find("final_ngram_exact").number("val_bpb") for log in logs]
    calibration = figures.collect_calibration(logs)
    assert calibration["nll"].shape == (3, 6), "the empty bin is left out"
    assert np.allclose(calibration["share"].sum(1), 1)
    path = tmp_path / "logs/seed42.txt"
    path.write_text(
        "".join(
            line
            for line in path.read_text().splitlines(True)
            if not line.startswith(("calibration entropy:5-6", "ngram_order order:0"))
        )
    )
    logs = Folder(tmp_path).logs
    assert figures.collect_calibration(logs)["nll"].shape == (3, 5), (
        "a bin that one seed lacks is left out"
    )
    share = figures.collect_orders(logs)["share"]
    assert np.flatnonzero(share[:, 0] == 0).tolist() == [0], "an order that a seed lacks counts 0"
    training = figures.collect_training(logs)
    assert training["loss"].shape == (3, len(training["seconds"]))
    assert training["steps"] == [300] * 3


@pytest.mark.parametrize(
    "name, drop",
    [
        ("fig_orders", "ngram_order"),
        ("fig_bytes", "artifact_bytes"),
        ("fig_calibration", "calibration"),
        ("fig_training", "step:10/"),
        ("fig_bpb", "final_float"),
    ],
)
def test_a_log_that_lacks_a_line_costs_only_that_figure(tmp_path, rng, monkeypatch, name, drop):
    record(tmp_path, rng, seeds=(1, 2))
    path = tmp_path / "logs/seed2.txt"
    lines = path.read_text().splitlines()
    if name == "fig_training":  # an older log: its lines have no lr_scale
        lines = [line.split(" lr_scale")[0] for line in lines]
    path.write_text("\n".join(line for line in lines if not line.startswith(drop)) + "\n")
    stale = tmp_path / f"figures/{name}_dark.png"
    stale.parent.mkdir()
    stale.write_bytes(b"from an earlier call")
    monkeypatch.setattr(figures, "draw", lambda name, data, theme, path: path.write_bytes(b""))
    paths, (said,) = figures.plot(tmp_path)
    drawn = {p.name.rsplit("_", 1)[0] for p in paths}
    assert drawn == set(figures.FIGURES) - {name} and not stale.exists()
    assert said.startswith(f"{name}: skipped: ") and "seed2.txt" in said


def test_one_seed_is_drawn_too(tmp_path, rng, monkeypatch):
    folder = record(tmp_path, rng, seeds=(7,))
    monkeypatch.setattr(figures, "THEMES", {"light": THEMES["light"]})
    assert len(figures.plot(folder)[0]) == 5


def test_a_folder_without_logs_has_no_figures(tmp_path):
    with pytest.raises(RecordError, match="has no logs, expected one per seed"):
        figures.plot(tmp_path)
