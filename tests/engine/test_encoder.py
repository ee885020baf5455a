import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import ENCODERS
from fewshot_engine.encoder import (
    Encoder,
    embed_files,
    export_onnx,
    fuse,
    load_encoder,
    load_untrained,
    with_normalisation,
)
from fewshot_engine.errors import CheckpointError, ConfigError
from fewshot_engine.framing import Square, preprocess
from fewshot_engine.prototypes import Rule
from fewshot_engine.recipes import load_recipe, save_model

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


@pytest.fixture(scope="module")
def accurate(exported):
    return load_encoder("accurate", cache_dir=exported, threads=1, device="cpu")


@pytest.fixture(scope="module")
def photos():
    """Three of different shapes."""
    rng = np.random.default_rng(1)
    return [
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size)
        for size in ((400, 300), (300, 400), (270, 270))
    ]


def embed(encoders, photos):
    return [encoder.encode_images(photos) for encoder in encoders]


def random_pixels(n, side):
    return np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def by_torch(backbone, module, pixels):
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        return module.eval()((x - mean) / std).numpy()


@pytest.mark.parametrize(("name", "side"), [("conv4", 32), ("conv4", 84), ("resnet12", 42)])
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


@pytest.mark.parametrize("name", ENCODERS["accurate"])
def test_the_pretrained_encoders_agree_with_torch(name, accurate, exported):
    backbone = get_backbone(name.partition("@")[0])
    encoder = load_encoder(name, cache_dir=exported, threads=1, device="cpu")
    pixels = random_pixels(2, backbone.image_size)
    expected = by_torch(backbone, backbone.build(), pixels)
    np.testing.assert_allclose(encoder.encode(pixels), expected, atol=1e-3 * np.abs(expected).max())


def test_the_accurate_encoder_is_its_members_side_by_side(accurate, exported, photos):
    members = [load_encoder(name, cache_dir=exported, threads=1, device="cpu") for name in ENCODERS["accurate"]]
    expected = np.concatenate(
        [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) / 3**0.5 for vectors in embed(members, photos)],
        axis=1,
    )
    fused = accurate.encode_images(photos)
    assert (accurate.name, accurate.dim, fused.shape) == ("accurate", 3840, (3, 3840))
    np.testing.assert_allclose(fused, expected, atol=1e-5)
    np.testing.assert_allclose(fuse(embed(members, photos)), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(fused, axis=1), 1, atol=1e-5)


def test_a_row_holds_the_squares_one_after_another(accurate, photos):
    row = accurate.prepare(photos[0])
    assert row.shape == accurate.input_shape == (3 * (224**2 + 240**2 + 260**2),)
    np.testing.assert_array_equal(row[-3 * 260**2 :].reshape(260, 260, 3), preprocess(photos[0], 260))
    assert accurate.squares == (Square(224, 0.8), Square(240, padded=True), Square(260))
    assert accurate.needs_side == 280


def test_a_view_that_frames_replaces_the_backbones_own_and_a_mirror_keeps_it(accurate, exported):
    mirrored = load_encoder("accurate", cache_dir=exported, threads=1, device="cpu", views=("mirror",))
    cropped = load_encoder("accurate", cache_dir=exported, threads=1, device="cpu", views=("crop:0.5",))
    assert [square.padded for square in mirrored.squares] == [False, True, False]
    assert all(square.mirrored for square in mirrored.squares)
    assert [square.share for square in cropped.squares] == [0.5, 0.5, 0.5]
    with pytest.raises(ConfigError, match="4 squares"):
        load_encoder("efficientnet-lite0@corners", cache_dir=exported)


@pytest.mark.parametrize(
    ("views", "squares"),
    [
        (("whole", "mirror"), [Square(32), Square(32, mirrored=True)]),
        (("whole", "crop"), [Square(32), Square(32, 0.8)]),
        (("crop:0.5",), [Square(32, 0.5)]),
        (("whole", "pad"), [Square(32), Square(32, padded=True)]),
        (("corners:0.6",), [Square(32, 0.6, across, down) for down in (0.0, 1.0) for across in (0.0, 1.0)]),
    ],
)
def test_views_are_averaged(views, squares, encoder, checkpoint, exported, photos):
    seeing = load_encoder(str(checkpoint), cache_dir=exported, threads=1, device="cpu", views=views)
    parts = [encoder.encode(np.stack([square.cut(photo) for photo in photos])) for square in squares]
    if len(parts) > 1:
        parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    np.testing.assert_allclose(seeing.encode_images(photos), np.mean(parts, axis=0), atol=1e-4)


def test_a_model_adapted_over_the_accurate_encoder_loads(accurate, exported, photos, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "centre": rng.standard_normal(3840).astype(np.float32) / 100,
        "basis": np.linalg.qr(rng.standard_normal((3840, 6)))[0].astype(np.float32),
        "core": 9 * rng.standard_normal((6, 6)).astype(np.float32),
        "class_means": np.eye(2, 3840, dtype=np.float32),
    }
    card = {"kind": "adapt", "backbone": "accurate", "dim": 7680, "share": 0.75, "familiar_from": 0.5}
    save_model(tmp_path / "fitted", tensors, card)
    encoder = load_encoder(str(tmp_path / "fitted"), cache_dir=exported, threads=1, device="cpu")
    assert (encoder.name, encoder.dim, encoder.input_shape) == ("fitted", 7680, accurate.input_shape)
    expected = load_recipe(tmp_path / "fitted").apply(accurate.encode_images(photos))
    np.testing.assert_allclose(encoder.encode_images(photos), expected, atol=1e-4)


def test_a_checkpoint_encodes_as_its_weights_say(encoder, checkpoint):
    from safetensors.torch import load_file

    backbone, pixels = get_backbone("conv4"), random_pixels(5, 32)
    module = backbone.build(32)
    module.load_state_dict(load_file(checkpoint / "model.safetensors"))
    assert (encoder.name, encoder.dim, encoder.image_size) == ("tiny", 256, 32)
    expected = by_torch(backbone, module, pixels)
    np.testing.assert_allclose(encoder.encode(pixels), expected, atol=1e-3 * np.abs(expected).max())


def test_a_network_before_its_training_is_that_of_the_runs_seed(checkpoint, tmp_path):
    described = json.loads((checkpoint / "model.json").read_text()) | {"config": {"seed": 7}}
    run = shutil.copytree(checkpoint, tmp_path / "run")
    (run / "model.json").write_text(json.dumps(described))
    untrained = load_untrained(str(run), cache_dir=tmp_path, threads=1, device="cpu")
    torch.manual_seed(7)
    module = with_normalisation(get_backbone("conv4").build(32).eval(), get_backbone("conv4"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(untrained.encode(pixels), expected, atol=1e-4)
    assert untrained.rule == Rule.usual(is_full=True)
    assert load_untrained("fast", cache_dir=tmp_path) is None


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
    with pytest.raises(ConfigError, match="upside-down"):
        load_encoder("fast", cache_dir=tmp_path, views=["upside-down"])
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


def test_files_come_back_in_order_and_the_bad_ones_with_a_reason(tmp_path):
    """An encoder that only says the mean colour, so that order can be seen."""
    encoder = Encoder(
        "mean", dim=3, squares=[Square(8)], forward=lambda p: p.mean(axis=(1, 2), dtype=np.float32), batch_size=4
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
