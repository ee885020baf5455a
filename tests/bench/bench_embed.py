"""Photos a second from JPEG files, against ONNX Runtime's bare forward pass, and a DataLoader with eager torch.

`python -m tests.bench.bench_embed [PHOTOS]` prints a JSON object for each encoder and each size of photo. All of one
line is measured in one run, in turns, and is the median of the rounds.
"""

import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import ENCODERS
from fewshot_engine.encoder import embed_files, load_encoder, read_plan
from fewshot_engine.measuring import WORKERS, draw_photos, seconds
from fewshot_engine.weights import default_cache_dir

ROUNDS = 3
SIZES = {"small": {"width": 300, "height": 225}, "12 megapixels": {"width": 4000, "height": 3000}}
SHARE_WANTED = {"small": 0.85, "12 megapixels": 0.30}
TIMES_WANTED = 5
BATCH = 16
PEER_PHOTOS = {"fast": 96, "accurate": 32}  # it is slow


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

    backbones = [get_backbone(name.partition("@")[0]) for name in names]
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
    loader = DataLoader(Photos(paths, shown), batch_size=BATCH, num_workers=2)
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in loader:
            parts = [module(pictures) for module, pictures in zip(modules, batch, strict=True)]
            torch.cat([normalize(part, dim=1) for part in parts], dim=1)
    return len(paths) / (time.perf_counter() - started)


def bare_forward(name):
    """ONNX Runtime and nothing else: a batch of 16 that is in memory, a thread on each core, no views, no fusion."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions, batches = [], []
    for member in read_plan(name).members:
        sessions.append(
            onnxruntime.InferenceSession(member.onnx(default_cache_dir()), options, providers=["CPUExecutionProvider"])
        )
        batches.append(np.zeros((BATCH, member.image_size, member.image_size, 3), dtype=np.uint8))

    def run(_):
        for session, batch in zip(sessions, batches, strict=True):
            session.run(None, {"pixels": batch})

    def measure():
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(run, range(WORKERS)))  # the first passes allocate
            return BATCH * 8 * WORKERS / seconds(lambda: list(pool.map(run, range(8 * WORKERS))))

    return measure


def measure(name, size, photos):
    encoder = load_encoder(name, cache_dir=default_cache_dir(), threads=1, device="cpu")
    bare = bare_forward(name)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), photos, **SIZES[size])
        ours, bares, theirs = [], [], []
        for _ in range(ROUNDS):
            bares.append(bare())
            ours.append(len(paths) / seconds(lambda: list(embed_files(paths, encoder, workers=WORKERS))))
            theirs.append(measure_torchvision(ENCODERS[name], paths[: PEER_PHOTOS[name]]))
        kilobytes = median(path.stat().st_size for path in paths) / 1000
    return {
        "what": "embed",
        "encoder": name,
        "photos": f"{photos} of {SIZES[size]['width']} x {SIZES[size]['height']}, {kilobytes:.0f} kB",
        "cores": WORKERS,
        "photos_per_s": round(median(ours), 1),
        "bare_onnxruntime_per_s": round(median(bares), 1),
        "share_of_bare": round(median(our / one for our, one in zip(ours, bares, strict=True)), 3),
        "share_wanted": SHARE_WANTED[size],
        "torchvision_per_s": round(median(theirs), 1),
        "times_torchvision": round(median(our / one for our, one in zip(ours, theirs, strict=True)), 1),
        "times_wanted": TIMES_WANTED,
        "load": round(os.getloadavg()[0], 1),
    }


def main(photos):
    for size in SIZES:
        for name in ENCODERS:
            few = photos if size == "small" else max(32, photos // 4)
            print(json.dumps(measure(name, size, few)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 320)
