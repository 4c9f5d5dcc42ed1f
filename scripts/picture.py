"""Takes the picture of a report that README and docs show: python scripts/picture.py [REPORT]     (or: make picture)

REPORT is what `make demo` wrote (runs/demo/report.html). Needs Chromium or Chrome on the PATH. The date and what was
photographed are kept in the picture itself; tests/test_docs.py compares them with the line below it in docs/report.md.
"""

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mentalglm_jax

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "report.png"
PAGE = ROOT / "docs" / "report.md"
SIZE = (1280, 1272)  # CSS pixels: headline, maps, verdicts
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CAPTION = re.compile(r"\(`make picture`, \d{4}-\d\d-\d\d, version [\d.]+\)")


def take(report: Path, picture: Path) -> None:
    """Writes the head of ``report`` to ``picture``.

    Raises:
        SystemExit: there is no browser, or it failed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("picture: no Chromium on the PATH (Debian: apt-get install chromium)")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "shot.png"
        window = f"--window-size={SIZE[0]},{SIZE[1] + 200}"  # the headless window is lower than it says
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={scratch}/profile",
        ]
        command = [browser, *flags, window, f"--screenshot={shot}", report.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode or not shot.exists():
            sys.exit(f"picture: {browser} failed: {done.stderr.strip().splitlines()[-1:]}")
        kept = PngInfo()
        kept.add_text("Creation Time", date)
        kept.add_text("Software", f"mentalglm-jax {mentalglm_jax.__version__}, scripts/picture.py")
        image = Image.open(shot).convert("RGB").crop((0, 0, *SIZE))
        image.save(picture, optimize=True, pnginfo=kept)
    if picture == PICTURE:
        text, count = CAPTION.subn(
            f"(`make picture`, {date}, version {mentalglm_jax.__version__})", PAGE.read_text("utf-8")
        )
        if count != 1:
            sys.exit(f"picture: {PAGE} has no line that says when the picture was taken")
        PAGE.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path, default=ROOT / "runs" / "demo" / "report.html")
    parser.add_argument("--out", type=Path, default=PICTURE, help="picture to write (default: docs/report.png)")
    given = parser.parse_args()
    if not given.report.is_file():
        sys.exit(f"picture: {given.report}: no such report; run `make demo` first")
    take(given.report, given.out)


if __name__ == "__main__":
    main()
