"""Photos a second from JPEG files, against ONNX Runtime's bare forward pass and a plain torchvision loop.

Run it as `python tests/bench/bench_embed.py [PHOTOS]`; it prints one JSON object.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from fewshot_engine.__main__ import default_cache_dir, draw_photos, measure_embedding
from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import DEFAULT_ENCODER
from fewshot_engine.encoder import load_encoder


def torchvision_loop(paths):
    """What a tutorial does: open, transform, forward, in eager mode and batches of 16."""
    import torch
    from torchvision import transforms

    backbone = get_backbone(DEFAULT_ENCODER)
    module = backbone.build().eval()
    transform = transforms.Compose(
        [
            transforms.Resize(backbone.image_size),
            transforms.CenterCrop(backbone.image_size),
            transforms.ToTensor(),
            transforms.Normalize(backbone.mean, backbone.std),
        ]
    )
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(paths), 16):
            module(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[start : start + 16]]))
    return len(paths) / (time.perf_counter() - started)


def main(photos):
    encoder = load_encoder(DEFAULT_ENCODER, cache_dir=default_cache_dir(), threads=1, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), photos)
        figures = measure_embedding(encoder, paths)
        peer = torchvision_loop(paths[: max(32, photos // 8)])
    figures |= {"torchvision_loop_per_s": round(peer, 1), "times_torchvision": round(figures["photos_per_s"] / peer, 1)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 640)
