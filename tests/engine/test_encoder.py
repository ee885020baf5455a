import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_engine.backbones import get_backbone
from fewshot_engine.encoder import Encoder, embed_files, export_onnx, load_encoder, preprocess
from fewshot_engine.errors import CheckpointError, ConfigError

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as training makes it: a small Conv-4 with random weights."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("run") / "tiny"
    folder.mkdir()
    torch.manual_seed(0)
    save_file(get_backbone("conv4").build(32).state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"kind": "full", "backbone": "conv4", "image_size": 32}))
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint, tmp_path_factory):
    return load_encoder(str(checkpoint), cache_dir=tmp_path_factory.mktemp("cache"), threads=1, device="cpu")


def random_pixels(n, side):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def by_torch(backbone, module, pixels):
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        return module.eval()((x - mean) / std).numpy()


@pytest.mark.parametrize(("name", "side"), [("conv4", 32), ("conv4", 84), ("efficientnet-lite0", 224)])
def test_the_export_agrees_with_torch(name, side, tmp_path):
    import onnxruntime

    backbone = get_backbone(name)
    module, pixels = backbone.build(side).train(), random_pixels(3, side)
    export_onnx(module, tmp_path / "model.onnx", side, backbone=backbone)
    assert module.training  # left as it was
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"pixels": pixels})
    expected = by_torch(backbone, module, pixels)
    np.testing.assert_allclose(exported, expected, atol=1e-3 * np.abs(expected).max())


def test_a_checkpoint_encodes_as_its_weights_say(encoder, checkpoint):
    from safetensors.torch import load_file

    backbone, pixels = get_backbone("conv4"), random_pixels(5, 32)
    module = backbone.build(32)
    module.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert (encoder.name, encoder.dim, encoder.image_size) == ("tiny", 256, 32)
    expected = by_torch(backbone, module, pixels)
    np.testing.assert_allclose(encoder.encode(pixels), expected, atol=1e-3 * np.abs(expected).max())


def test_batches_do_not_change_embeddings(encoder):
    pixels = random_pixels(2 * encoder.batch_size + 3, 32)
    one_by_one = np.concatenate([encoder.encode(pixels[i : i + 1]) for i in range(len(pixels))])
    np.testing.assert_allclose(encoder.encode(pixels), one_by_one, atol=1e-4)
    assert encoder.encode(pixels[:0]).shape == (0, 256)


def test_wrong_pixels_are_refused(encoder):
    for pixels in (random_pixels(1, 33), random_pixels(1, 32).astype(np.float32), random_pixels(1, 32)[0]):
        with pytest.raises(ValueError, match="tiny takes uint8"):
            encoder.encode(pixels)


def test_a_cached_encoder_loads_without_torch(encoder, checkpoint, tmp_path):
    load_encoder(str(checkpoint), cache_dir=tmp_path, device="cpu")
    script = (
        "import sys; from pathlib import Path; from fewshot_engine.encoder import load_encoder;"
        f"e = load_encoder({str(checkpoint)!r}, cache_dir=Path({str(tmp_path)!r}), device='cpu');"
        "print(e.dim, 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == ["256", "False"]


def test_the_first_load_exports_in_a_process_of_its_own(checkpoint, tmp_path):
    script = (
        "import sys; from pathlib import Path; from fewshot_engine.encoder import load_encoder;"
        f"load_encoder({str(checkpoint)!r}, cache_dir=Path({str(tmp_path / 'new')!r}), device='cpu');"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".onnx"]


def test_loading_at_once_leaves_one_file(checkpoint, tmp_path):
    threads = [
        threading.Thread(target=load_encoder, args=(str(checkpoint),), kwargs={"cache_dir": tmp_path, "device": "cpu"})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_encoder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="efficientnet-lite0"):
        load_encoder("nonsense", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="train it first"):
        load_encoder("conv4", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_encoder(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "model.json").write_text('{"kind": "full", "backbone": "conv4", "image_size": 84}')
    with pytest.raises(CheckpointError, match="safetensors"):
        load_encoder(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_encoder(str(tmp_path), cache_dir=tmp_path, device="cpu")


def test_preprocessing_cuts_out_the_centre():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    square = preprocess(image, 16)
    assert (square.shape, square.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(square[8, 2:14], [[0, 0, 255]] * 12)
    assert preprocess(image.rotate(90, expand=True), 16).shape == (16, 16, 3)
    assert preprocess(Image.new("RGB", (1, 500)), 16).shape == (16, 16, 3)


def test_files_come_back_in_order_and_the_bad_ones_with_a_reason(tmp_path):
    """An encoder that only says the mean colour, so that order can be seen."""
    encoder = Encoder(
        "mean", dim=3, image_size=8, forward=lambda p: p.mean(axis=(1, 2), dtype=np.float32), batch_size=4
    )
    paths = []
    for number in range(23):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (20, 10), (number * 10, 0, 0)).save(paths[-1])
    paths[5].write_text("<html>")
    paths[6].unlink()
    done = list(embed_files(paths, encoder, workers=3))
    assert [one.index for one in done] == list(range(23))
    assert [one.index for one in done if one.embedding is None] == [5, 6]
    assert "web page" in done[5].refused
    assert "cannot be opened" in done[6].refused
    assert [round(float(one.embedding[0])) for one in done if one.embedding is not None] == [
        number * 10 for number in range(23) if number not in (5, 6)
    ]
