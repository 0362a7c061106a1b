#!/usr/bin/env python
"""Makes the pages: tiles of rendered documentation with a box around each element of the layout.

    apt-get install chromium chromium-driver fonts-dejavu-core fonts-liberation
    pip install selenium
    studies/pages/make_pages.py output/pages

Downloads the Debian packages of packages.yaml, renders their HTML in headless Chromium at several
widths and styles, and cuts it into tiles of SIZE x SIZE pixels that show a whole screen. The boxes
are those of the page's own elements. Writes train/, val/ and test/, each with images/ and
annotations.json (COCO), data.yaml (for --data), samples_*.png and sha256.txt. That is of the tiles'
names and boxes, the same for the same versions of packages, fonts and Chromium. Chromium draws a
few pixels of one tile in twenty differently each time: a line at the seam of two raster tiles.
"""

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
HERE = Path(__file__).resolve().parent
RECORDED = HERE / "sha256.txt"
CLASSES = ("heading", "paragraph", "list", "table", "code", "figure", "navigation")
#: Of a tile in pixels, each side; and widths of the window in CSS pixels, which a tile shows whole.
SIZE, WIDTHS = 160, (320, 400, 480)
#: Style sheets that are added to a page: as it is, another font and size, dark.
STYLES = (
    "",
    "body { font-family: 'Liberation Serif', serif !important; font-size: 19px; line-height: 1.5 }",
    "html { filter: invert(1) hue-rotate(180deg); background: #eee }",
)
#: At most, of a package; and of a page.
PAGES, TILES = 60, 4
#: Of a page: smaller ones are stubs, larger ones whole books.
BYTES = (4_000, 2_000_000)
#: A box is cut at the border of its tile; one of which less is left is ignored (iscrowd).
LEAST_SHARE, LEAST_SIDE = 0.3, 3


def main() -> None:
    """Make the data set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", type=Path, default=HERE / "packages.yaml")
    args = parser.parse_args()
    total = hashlib.sha256()
    driver = browser()
    try:
        for split, packages in yaml.safe_load(args.packages.read_text()).items():
            folder = args.output / split
            (folder / "images").mkdir(parents=True, exist_ok=True)
            coco = make_split(driver, packages, args.output / "packages", folder)
            text = json.dumps(coco)
            (folder / "annotations.json").write_text(text)
            total.update(text.encode())
            print(split, f"{len(coco['images'])} tiles", counts(coco), flush=True)
            sheet(folder, coco).save(args.output / f"samples_{split}.png")
    finally:
        driver.quit()
    found = f"{total.hexdigest()}  chromium {driver.capabilities['browserVersion']}\n"
    (args.output / "sha256.txt").write_text(found)
    data = {
        split: {"json": f"{split}/annotations.json", "images": f"{split}/images"}
        for split in ("train", "val", "test")
    }
    (args.output / "data.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    print(found, "as recorded" if found == RECORDED.read_text() else f"other than {RECORDED}")


def browser() -> Any:
    """Headless Chromium of the system, without anything that changes from run to run.

    Raises:
        SystemExit: Chromium, its driver or selenium is not installed.
    """
    lacking = [path for path in (CHROMIUM, DRIVER) if not Path(path).is_file()]
    lacking += [] if importlib.util.find_spec("selenium") else ["selenium"]
    if lacking:
        sys.exit(f"Not found: {', '.join(lacking)}. The head of {__file__} says how to install it.")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless=new no-sandbox hide-scrollbars disable-gpu disable-lcd-text"
    flags += " force-color-profile=srgb font-render-hinting=none"
    for flag in [*flags.split(), "host-resolver-rules=MAP * ~NOTFOUND"]:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    return driver


def unpacked(package: str, cache: Path) -> Path:
    """The folder of a package "name=version", downloaded once.

    Raises:
        SystemExit: the version is not available any more.
    """
    folder = cache / package.replace(":", "_")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        got = subprocess.run(["apt-get", "download", package], cwd=cache, check=False)
        if got.returncode:
            sys.exit(f"{package} cannot be downloaded: take another version into packages.yaml.")
        name = package.split("=")[0]
        (archive,) = cache.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
        archive.unlink()
    return folder


def make_split(driver: Any, packages: list[str], cache: Path, folder: Path) -> dict[str, Any]:
    """The COCO content of a split, whose images are written."""
    coco: dict[str, Any] = {"info": {}, "images": [], "annotations": []}
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    for package in packages:
        for page in pages(unpacked(package, cache)):
            for picture, boxes in tiles(driver, page):
                number = len(coco["images"])
                name = f"{package.split('=')[0]}_{number:05d}.png"
                picture.save(folder / "images" / name)
                coco["images"].append(
                    {"id": number, "file_name": name, "width": SIZE, "height": SIZE}
                )
                for box in boxes:
                    coco["annotations"].append(
                        {"id": len(coco["annotations"]) + 1, "image_id": number, **box}
                    )
    return coco


def pages(folder: Path) -> list[Path]:
    """HTML files of a package: a draw that its name decides, for there are thousands."""
    found = sorted(
        path
        for path in folder.rglob("*.html")
        if not path.is_symlink() and BYTES[0] < path.stat().st_size < BYTES[1]
    )
    random.Random(folder.name).shuffle(found)
    return found[:PAGES]


def tiles(driver: Any, page: Path) -> Iterator[tuple[Image.Image, list[dict[str, Any]]]]:
    """Pictures of a page with their boxes."""
    draw = random.Random(page.name)
    width, style = draw.choice(WIDTHS), draw.choice(STYLES)
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": width, "deviceScaleFactor": 1, "mobile": False},
    )
    driver.get(page.as_uri())
    driver.execute_script(
        "const s = document.createElement('style'); s.textContent = arguments[0];"
        "document.head.append(s)",
        style,
    )
    layout = driver.execute_script((HERE / "boxes.js").read_text(), width)
    # A tile begins at the top of an element, so that its first lines are whole.
    tops = sorted({max(0, round(box[2]) - 8) for box in layout["boxes"]})
    bottom, made = -1, 0
    for top in tops:
        if top < bottom or made == TILES:
            continue
        boxes = [cut(*box, top, width) for box in layout["boxes"]]
        inside = [box for box in boxes if box is not None]
        if sum(not box["iscrowd"] for box in inside) < 2:
            continue
        bottom, made = top + width, made + 1
        clip = {"x": 0, "y": top, "width": width, "height": width, "scale": SIZE / width}
        shot = driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
        picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
        yield picture.resize((SIZE, SIZE)) if picture.size != (SIZE, SIZE) else picture, inside


def cut(
    name: str, x: float, y: float, w: float, h: float, top: int, width: int
) -> dict[str, Any] | None:
    """A box in the pixels of a tile, or None if it is outside."""
    scale = SIZE / width
    left, upper = max(0.0, x) * scale, max(0.0, y - top) * scale
    right, lower = min(x + w, width) * scale, min(y + h - top, width) * scale
    box = [round(v, 2) for v in (left, upper, right - left, lower - upper)]
    if min(box[2:]) <= 0:
        return None
    share = box[2] * box[3] / max(w * h * scale**2, 1e-6)
    crowd = share < LEAST_SHARE or min(box[2:]) < LEAST_SIDE
    return {
        "category_id": CLASSES.index(name) + 1,
        "bbox": box,
        "area": round(box[2] * box[3], 2),
        "iscrowd": int(crowd),
    }


def counts(coco: dict[str, Any]) -> dict[str, int]:
    """Boxes of each class that count."""
    kept = [a["category_id"] for a in coco["annotations"] if not a["iscrowd"]]
    return {name: kept.count(i) for i, name in enumerate(CLASSES, start=1)}


def sheet(folder: Path, coco: dict[str, Any], side: int = 6, zoom: int = 2) -> Image.Image:
    """A draw of tiles with their boxes, to look at."""
    colours = ("red", "blue", "green", "orange", "purple", "deeppink", "teal")
    chosen = random.Random(0).sample(coco["images"], min(side * side, len(coco["images"])))
    step = SIZE * zoom
    picture = Image.new("RGB", (side * step, side * step), "white")
    draw = ImageDraw.Draw(picture)
    for place, image in enumerate(chosen):
        x, y = place % side * step, place // side * step
        with Image.open(folder / "images" / image["file_name"]) as tile:
            picture.paste(tile.resize((step, step)), (x, y))
        for found in coco["annotations"]:
            if found["image_id"] == image["id"] and not found["iscrowd"]:
                left, top, w, h = (zoom * v for v in found["bbox"])
                box = (x + left, y + top, x + left + w, y + top + h)
                draw.rectangle(box, outline=colours[found["category_id"] - 1], width=2)
    return picture


if __name__ == "__main__":
    main()
