"""The studio as a whole, as a person meets it: start, upload, first answer, memory.

Everything goes through HTTP and the socket to a studio of its own on 127.0.0.1, started as `make run` does.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from tests.studio import Studio, Visitor

PHOTOS = 2000
PARALLEL = 4  # PUTs at a time, as the page has them
DROPS = 40
CLASSES = 20


def main() -> None:
    studio = Studio()
    try:
        print(f"cold start to /healthz/ 200: {studio.start():.1f} s", flush=True)
        visitor = Visitor(studio)
        visitor.sign_up()
        _upload(studio, visitor)
        label_set = _label_set(visitor)
        _show("drop of a photo -> its answer, warm workers", _drops(visitor, label_set), budget=0.5)
        _train(visitor)
        time.sleep(3)
        _show("the same while a training runs", _drops(visitor, label_set), budget=1.5)
        print(f"web process: {_memory_mb(studio):.0f} MB (budget 250)", flush=True)
        print(f"torch in the web process: {_has_torch(studio)}", flush=True)
        assert studio.process is not None
        studio.process.terminate()
        studio.process.wait(60)
        print(f"second start to /healthz/ 200: {studio.start():.1f} s (budget 10)", flush=True)
    finally:
        studio.stop()


def photo(kind: int, seed: int, size: int = 224) -> bytes:
    """A picture of `size` px with soft structure, so that its JPEG weighs what a small photo's does (about 12 KB)."""
    random = np.random.default_rng(kind * 100_003 + seed)
    coarse = random.integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).filter(ImageFilter.SMOOTH)
    hue = np.array([(kind * 37) % 255, (kind * 91) % 255, (kind * 53) % 255])
    mixed = (np.asarray(image) * 0.6 + hue * 0.4).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(mixed).save(out, "JPEG", quality=88)
    return out.getvalue()


def _upload(studio: Studio, visitor: Visitor) -> None:
    each = PHOTOS // CLASSES
    files = {f"class {k:02}/{n:04}.jpg": photo(k, n) for k in range(CLASSES) for n in range(each)}
    size = sum(map(len, files.values())) / 1e6
    begun = time.monotonic()
    answer = _open(visitor, files)
    rows = [row for row in answer["files"] if row["url"]]
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda part: _put(visitor, part, files), [rows[n::PARALLEL] for n in range(PARALLEL)]))
    sent = time.monotonic() - begun
    visitor.post_json(answer["closeUrl"], {})
    report = visitor.wait_for_import(answer)
    took = time.monotonic() - begun
    print(f"{PHOTOS} photos of 224 px ({size:.0f} MB): sent in {sent:.1f} s, embedded in {took:.1f} s (budget 60)")
    print(f"  {report['counts']}")
    print(
        "  CPU seconds since the start:", ", ".join(f"{k} {v:.0f}" for k, v in cpu_seconds(studio).items()), flush=True
    )


def _open(visitor: Visitor, files: dict[str, bytes]) -> dict[str, Any]:
    entries = [{"path": path, "size": len(data)} for path, data in files.items()]
    answer = visitor.post_json("/collections/imports/", {"name": "Bench", "files": entries[:500]})
    for start in range(500, len(entries), 500):
        answer["files"] += visitor.post_json(answer["manifestUrl"], {"files": entries[start : start + 500]})["files"]
    return answer


def _put(visitor: Visitor, rows: list[dict[str, Any]], files: dict[str, bytes]) -> None:
    own = Visitor(visitor.studio)  # a connection a thread
    own.cookies, own.token = visitor.cookies, visitor.token
    own.put_files(rows, files)


def _label_set(visitor: Visitor) -> str:
    """A label set of five labels with five examples each; its id."""
    visitor.get("/label-sets/")
    _status, where = visitor.post("/label-sets/new/", name="Bench")
    label_set = where.strip("/").split("/")[-1]
    script = (
        "from webapp.labelsets import services as s; from webapp.labelsets.models import LabelSet;"
        "from webapp.library.models import Photo;"
        f"ls=LabelSet.objects.get(pk='{label_set}');"
        "[s.add_examples(s.add_label(ls, f'label {k}'), "
        "Photo.objects.filter(category__path=f'class {k:02}')[:5]) for k in range(5)]"
    )
    visitor.studio.manage("shell", "-c", script)
    time.sleep(3)
    return label_set


def _drops(visitor: Visitor, label_set: str) -> list[float]:
    return asyncio.run(_timed_drops(visitor, label_set))


async def _timed_drops(visitor: Visitor, label_set: str) -> list[float]:
    """Seconds from the first request of a drop until the page has the fragment with the answer, one photo a drop."""
    from websockets.asyncio.client import connect

    cookie = "; ".join(f"{k}={v}" for k, v in visitor.cookies.items())
    times = []
    address = visitor.studio.url.replace("http", "ws") + "/ws/"
    async with connect(address, additional_headers={"Cookie": cookie}, origin=visitor.studio.url) as socket:
        for n in range(DROPS):
            data = photo(n % 5, 50_000 + n + int(time.time()))
            begun = time.monotonic()
            opening = {"files": [{"path": f"{n}.jpg", "size": len(data)}], "topK": 3}
            answer = visitor.post_json(f"/label-sets/{label_set}/drop/", opening)
            visitor.put_files(answer["files"], {f"{n}.jpg": data})
            visitor.post_json(answer["closeUrl"], {})
            await socket.send(json.dumps({"subscribe": {answer["classificationJob"]: 0}}))
            await _until_answered(socket, answer["classificationJob"])
            status, fragment = visitor.get(answer["resultsUrl"])
            times.append(time.monotonic() - begun)
            assert status == 200 and b"label" in fragment
    return times


async def _until_answered(socket: Any, job: str) -> None:
    while True:
        message = json.loads(await asyncio.wait_for(socket.recv(), 30))
        if message.get("job") == job and any(e["type"] == "predictions" for e in message["events"]):
            return


def _train(visitor: Visitor) -> None:
    script = (
        "from webapp.training import services as s; from webapp.library.models import Collection;"
        "from fewshot_engine.config import TrainConfig;"
        "c=Collection.objects.get(name='Bench', purpose='library');"
        "s.start_run(c.owner, c, TrainConfig(kind='full', backbone='conv4', epochs=50, episodes_per_epoch=1000))"
    )
    visitor.studio.manage("shell", "-c", script)


def _show(what: str, times: list[float], *, budget: float) -> None:
    ordered = sorted(times)
    p95 = ordered[max(0, round(0.95 * len(ordered)) - 1)]
    print(
        f"{what}: median {statistics.median(times) * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms "
        f"(budget {budget * 1000:.0f}), n={len(times)}",
        flush=True,
    )


def _web_pids(studio: Studio) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if b"uvicorn" in command and str(studio.data_dir).encode() in environment:
            yield int(folder.name)


def cpu_seconds(studio: Studio) -> dict[str, float]:
    """What each part of the studio has used of the processors, children included."""
    parts: dict[str, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes()
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if str(studio.data_dir).encode() in environment:
            name = next((q for q in ("interactive", "ingest", "training") if q.encode() in command), "")
            name = name or ("site" if b"uvicorn" in command else "other")
            parts[name] = parts.get(name, 0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return parts


def _memory_mb(studio: Studio) -> float:
    def resident(pid: int) -> int:
        words = Path(f"/proc/{pid}/status").read_text().split()
        return int(words[words.index("VmRSS:") + 1])

    return max(resident(pid) for pid in _web_pids(studio)) / 1024


def _has_torch(studio: Studio) -> bool:
    return any("libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in _web_pids(studio))


if __name__ == "__main__":
    main()
