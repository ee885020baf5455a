"""Photos a second from JPEG files, against ONNX Runtime's bare forward pass and a torchvision DataLoader with eager torch.

`python -m tests.bench.bench_embed [PHOTOS]` prints a JSON object for each encoder and each size of photo. All of one
line is measured in one run, in turns, and is the median of the rounds.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from PIL import Image

from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import ENCODERS
from fewshot_engine.encoder import load_encoder
from fewshot_engine.measuring import draw_photos, measure_embedding
from fewshot_engine.weights import default_cache_dir

ROUNDS = 3
SIZES = {"small": {"width": 300, "height": 225}, "12 megapixels": {"width": 4000, "height": 3000}}
BUDGET = {"small": 0.85, "12 megapixels": 0.30}
BUDGET_TIMES_TORCHVISION = 5
PEER_BATCHES = 3  # of 16, for each worker


class Photos:
    """What a tutorial gives to a DataLoader: a picture for each backbone, by torchvision's transforms."""

    def __init__(self, paths, transforms):
        self.paths, self.transforms = paths, transforms

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        photo = Image.open(self.paths[index]).convert("RGB")
        return [transform(photo) for transform in self.transforms]


def measure_torchvision(names, paths):
    """Photos a second of DataLoader(num_workers=2, batch_size=16) and the same backbones in eager mode."""
    import torch
    from torch.nn.functional import normalize
    from torch.utils.data import DataLoader
    from torchvision import transforms

    backbones = [get_backbone(name) for name in names]
    modules = [backbone.build().eval() for backbone in backbones]
    shown = [
        transforms.Compose(
            [
                transforms.Resize(backbone.image_size),
                transforms.CenterCrop(backbone.image_size),
                transforms.ToTensor(),
                transforms.Normalize(backbone.mean, backbone.std),
            ]
        )
        for backbone in backbones
    ]
    loader = DataLoader(Photos(paths, shown), batch_size=16, num_workers=2)
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in loader:
            parts = [module(pictures) for module, pictures in zip(modules, batch, strict=True)]
            torch.cat([normalize(part, dim=1) for part in parts], dim=1)
    return len(paths) / (time.perf_counter() - started)


def measure(name, size, photos):
    encoder = load_encoder(name, cache_dir=default_cache_dir(), threads=1, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), photos, **SIZES[size])
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(measure_embedding(encoder, paths))
            theirs.append(measure_torchvision(ENCODERS[name], paths[: 2 * 16 * PEER_BATCHES]))
        kilobytes = median(path.stat().st_size for path in paths) / 1000
    rates = {key: median(one[key] for one in ours) for key in ("photos_per_s", "bare_forward_per_s", "ratio")}
    return {
        "what": "embed",
        "encoder": name,
        "photos": f"{photos} of {SIZES[size]['width']} x {SIZES[size]['height']}, {kilobytes:.0f} kB",
        "cores": os.cpu_count(),
        **rates,
        "ratio_wanted": BUDGET[size],
        "torchvision_per_s": round(median(theirs), 1),
        "times_torchvision": round(
            median(one["photos_per_s"] / peer for one, peer in zip(ours, theirs, strict=True)), 1
        ),
        "times_torchvision_wanted": BUDGET_TIMES_TORCHVISION,
        "load": round(os.getloadavg()[0], 1),
    }


def main(photos):
    for size in SIZES:
        for name in ENCODERS:
            few = photos if size == "small" else max(32, photos // 4)
            print(json.dumps(measure(name, size, few)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 320)
