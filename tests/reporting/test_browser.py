"""The page in headless Chromium: narrow and wide, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ssim_kd.reporting import write_report
from tests.reporting.made import config, rows, write_run, write_set

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome here")

# The page as it is, in a frame of the width: a window is never as narrow as a phone.
HARNESS = """<!doctype html><meta name="color-scheme" content="light dark">
<body><iframe srcdoc="{page}" style="width:{width}px;height:900px;border:0"></iframe>
<pre id="found"></pre><script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const style = frame.contentWindow.getComputedStyle(page.body);
  const text = page.querySelector("figure svg text");
  for (const details of page.querySelectorAll("details")) details.open = true;
  document.getElementById("found").textContent = JSON.stringify({{
    inner: page.documentElement.clientWidth,
    scroll: page.documentElement.scrollWidth,
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name),
    charts: page.querySelectorAll("figure svg").length,
    empty: [...page.querySelectorAll("figure svg")].filter(s => s.clientHeight < 20).length,
    ink: style.color, page: style.backgroundColor,
    fill: frame.contentWindow.getComputedStyle(text).fill,
    font: frame.contentWindow.getComputedStyle(text).fontFamily === style.fontFamily,
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three runs with long names and 30 classes."""
    folder = tmp_path_factory.mktemp("browser")
    names = tuple(f"a class with a long name {i}" for i in range(30))
    entry = write_set(folder / "data", names=names)
    cfg = config(entry, MODEL__LONG="value_" * 40)
    runs = [
        write_run(folder / f"a_run_with_a_long_name_{i}", cfg, rows(ap=20.0 + i, names=names))
        for i in range(3)
    ]
    write_report(runs, folder / "report.html", control=runs[2])
    return (folder / "report.html").read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    red, green, blue = (int(x) / 255 for x in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [380, 1400])
def test_page_in_chromium(report: str, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "harness.html"
    path.write_text(HARNESS.format(page=html.escape(report), width=width), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"]
    command += ["--window-size=1500,1000", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    shown = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert shown, done.stderr[-2000:]
    found = json.loads(html.unescape(shown[1]))
    assert width - 20 <= found["inner"] <= width
    assert found["scroll"] <= found["inner"]
    assert found["requests"] == []
    assert found["charts"] > 12 and found["empty"] == 0 and found["font"]
    page, ink, fill = (luminance(found[name]) for name in ("page", "ink", "fill"))
    assert (page < 0.05) == (scheme == "dark")
    for text in (ink, fill):  # readable: a contrast of 4.5 or more, as WCAG asks for
        assert (max(page, text) + 0.05) / (min(page, text) + 0.05) > 4.5
