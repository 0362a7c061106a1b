"""Small data sets in COCO's format, for the tests of this folder."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def content(num_images=3, num_classes=2, sizes=((32, 24),)):
    """A faultless file: each image has one box of each class."""
    images, annotations = [], []
    for i in range(num_images):
        width, height = sizes[i % len(sizes)]
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": width, "height": height})
        for k in range(num_classes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": k + 1,
                    "bbox": [1 + k, 2, 5, 6],
                    "area": 30,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": f"class{k}"} for k in range(num_classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, data, *, pictures=True):
    """Write the file and its images. Returns the paths of the json file and the image folder."""
    root = folder / "images"
    root.mkdir(parents=True, exist_ok=True)
    if pictures:
        for number, image in enumerate(data["images"]):
            shade = np.full(
                (int(image["height"]), int(image["width"]), 3), 10 + number, dtype=np.uint8
            )
            Image.fromarray(shade).save(root / image["file_name"])
    json_file = folder / "annotations.json"
    json_file.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(json_file), str(root)


def edited(**changes):
    """A faultless file with some fields of its first annotation changed (None: removed)."""
    data = content()
    for key, value in changes.items():
        data["annotations"][0][key] = value
        if value is None:
            del data["annotations"][0][key]
    return data
