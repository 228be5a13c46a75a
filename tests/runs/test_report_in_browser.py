"""The report in a real browser: charts are drawn, nothing is wrong on the console, nothing is too wide."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from rlhf.runs import read_run
from rlhf.runs.report import report_page

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LISTEN = "<script>window.faults = []; window.onerror = (message) => faults.push(message);</script>"
PROBE = """<script>addEventListener("load", () => setTimeout(() => {
  const drawn = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean);
  const canvases = [...document.querySelectorAll("canvas")];
  const plot = document.querySelector(".plot");
  plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  const legend = document.querySelector(".u-legend .u-series:nth-child(2) th");
  legend.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true}));
  const text = document.createElement("pre");
  text.id = "probe";
  setTimeout(() => {
    text.textContent = JSON.stringify({
      faults, plots: document.querySelectorAll(".plot").length, drawn: canvases.filter(drawn).length,
      page: document.documentElement.scrollWidth, window: innerWidth,
      dark: matchMedia("(prefers-color-scheme: dark)").matches, paper: getComputedStyle(document.body).backgroundColor,
      step: document.querySelector(".u-legend .u-value").textContent, pressed: legend.getAttribute("aria-pressed"),
      room: [...document.querySelectorAll(".plot")].every((plot) => plot.scrollHeight <= plot.clientHeight + 1),
    });
    document.body.append(text);
  }, 50);
}, 50));</script>"""


def probe(page: Path, width: int, dark: bool, profile: Path) -> tuple[dict, str]:
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom",
        f"--window-size={width},900", "--virtual-time-budget=2000", "--enable-logging=stderr",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), page.as_uri(),
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="probe">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stderr[-2000:]
    return json.loads(unescape(found[1])), ran.stderr


@pytest.mark.skipif(BROWSER is None, reason=f"no browser found: {', '.join(BROWSERS)}")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (400, True), (400, False), (1400, True)])
def test_the_page_works_in_a_browser(width, dark, tmp_path):
    runs = [read_run(ROOT / "docs/runs/one-sentence/ppo_state.json")]
    text = report_page(runs).replace("<head>", f"<head>{LISTEN}").replace("</body>", f"{PROBE}</body>")
    (tmp_path / "page.html").write_text(text)
    found, log = probe(tmp_path / "page.html", width, dark, tmp_path / "profile")
    assert found["faults"] == [] and "CONSOLE" not in log
    assert found["plots"] == found["drawn"] >= 10
    assert found["page"] <= found["window"]
    assert found["room"], "a chart is higher than its place: the page would move"
    assert found["dark"] is dark and found["paper"] == ("rgb(21, 21, 21)" if dark else "rgb(255, 255, 255)")
    # Keys move the cursor and switch lines off.
    assert found["step"] not in ("", "--") and found["pressed"] == "false"
