"""Class names and prompt templates as plain lists."""

from __future__ import annotations

import open_clip

CIFAR10: list[str] = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

#: The 1,000 names that OpenAI curated for ImageNet-1k, in label order.
IMAGENET: list[str] = list(open_clip.IMAGENET_CLASSNAMES)

#: Prompt templates with one `{}` for the class name; "openai" are the 80 of CLIP's ImageNet ensemble.
TEMPLATES: dict[str, list[str]] = {
    "simple": [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES],
    "openai": [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES],
}

CLASS_NAMES: dict[str, list[str]] = {"cifar10": CIFAR10, "imagenet": IMAGENET}
