import hashlib
import http.server
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewshot_engine import weights
from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import TrainData
from fewshot_engine.encoder import load_encoder
from fewshot_engine.errors import CheckpointError, ConfigError, WeightsMissing
from fewshot_engine.networks import Network

torch = pytest.importorskip("torch")

NAME = "mobilenet-v3-small"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fewshot-studio" / "weights"


@pytest.fixture(scope="module")
def mobilenet():
    """torchvision's network with random weights, its classifier and all."""
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(0)
    network = mobilenet_v3_small(weights=None).eval()
    for name, values in network.named_buffers():  # fresh batch norms would hide a buffer that is not loaded
        if name.endswith("running_mean"):
            values.normal_()
    return network


@pytest.fixture(scope="module")
def file(mobilenet, tmp_path_factory):
    path = tmp_path_factory.mktemp("given") / "mobilenet.pth"
    torch.save(mobilenet.state_dict(), path)
    return path


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((300, 400), Image.Resampling.BICUBIC)


def silent(text):
    pass


def features_of(network, pixels):
    with torch.no_grad():
        return network.eval()(pixels)


@pytest.mark.parametrize("kind", [".pth", ".safetensors", "wrapped"])
def test_weights_from_a_file_are_the_ones_that_later_loads_use(kind, mobilenet, file, cache, tmp_path):
    from safetensors.torch import save_file

    path = file
    if kind == ".safetensors":
        path = tmp_path / "m.safetensors"
        save_file(mobilenet.state_dict(), path)
    if kind == "wrapped":
        path = tmp_path / "checkpoint.pt"
        prefixed = {f"module.{name}": value for name, value in mobilenet.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": prefixed}, path)
    record = get_backbone(NAME).take_weights(path, say=silent)
    assert record.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {found.name for found in cache.iterdir()} == {record.file, f"{NAME}.json"}
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mobilenet.avgpool(mobilenet.features(pixels)).flatten(1)
    torch.testing.assert_close(features_of(get_backbone(NAME).build(), pixels), expected)


def test_an_encoder_of_kept_weights_sees_what_torchvision_would_show(mobilenet, file, photo, tmp_path):
    from torchvision.models import MobileNet_V3_Small_Weights

    get_backbone(NAME).take_weights(file, say=silent)
    encoder = load_encoder(NAME, cache_dir=tmp_path / "onnx", threads=1, device="cpu")
    assert (encoder.dim, encoder.image_size, encoder.needs_side) == (576, 224, 256)
    shown = MobileNet_V3_Small_Weights.DEFAULT.transforms()(photo)[None]
    with torch.no_grad():
        expected = mobilenet.avgpool(mobilenet.features(shown)).flatten(1).numpy()
    got = encoder.encode_images([photo])
    assert float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected)) > 0.999


def test_newer_weights_replace_the_older_ones(mobilenet, file, cache, tmp_path):
    older = get_backbone(NAME).take_weights(file, say=silent)
    torch.save({name: value + 1 for name, value in mobilenet.state_dict().items()}, tmp_path / "newer.pth")
    newer = get_backbone(NAME).take_weights(tmp_path / "newer.pth", say=silent)
    assert newer.sha256 != older.sha256
    assert {found.name for found in cache.iterdir()} == {newer.file, f"{NAME}.json"}


def test_a_run_starts_from_kept_weights_and_names_missing_ones(mobilenet, file):
    config = TrainConfig(kind="full", backbone=NAME, image_size=64)
    data = TrainData(("a", "b"), np.arange(4) % 2, pixels=np.zeros((4, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(WeightsMissing, match=f"weights {NAME}"):
        Network(config, data, torch.device("cpu"))
    get_backbone(NAME).take_weights(file, say=silent)
    network = Network(config, data, torch.device("cpu"))
    assert torch.equal(network.net.features[0][0].weight, mobilenet.features[0][0].weight)
    assert network.frozen_statistics  # those of the pretrained network stay


def test_a_kept_file_that_changed_is_not_used(file, cache):
    record = get_backbone(NAME).take_weights(file, say=silent)
    content = bytearray((cache / record.file).read_bytes())
    content[-1] ^= 1
    (cache / record.file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"weights {NAME}` again"):
        get_backbone(NAME).build()
    (cache / f"{NAME}.json").write_text("{}")
    with pytest.raises(CheckpointError, match="record"):
        get_backbone(NAME).build()


def test_tensors_that_do_not_fit_are_named(mobilenet, cache, tmp_path):
    state = dict(mobilenet.state_dict())
    state["features.0.0.weight"] = torch.zeros(2, 3, 3, 3)
    state["features.99.weight"] = state.pop("features.0.1.bias")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError) as caught:
        get_backbone(NAME).take_weights(tmp_path / "odd.pth", say=silent)
    for part in ("odd.pth", "1 missing (features.0.1.bias)", "1 unknown (features.99.weight)", "(2, 3, 3, 3) instead"):
        assert part in str(caught.value)
    assert not cache.exists()


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("/tmp/never-to-be-made-by-fewshot"),)


def test_nothing_in_a_file_is_executed(tmp_path):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"weight": Malicious()}))
    torch.save({"weight": Malicious()}, tmp_path / "worse.pth")
    for name in ("bad.pth", "worse.pth", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            get_backbone(NAME).take_weights(tmp_path / name, say=silent)
    assert not Path("/tmp/never-to-be-made-by-fewshot").exists()
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        get_backbone(NAME).take_weights(tmp_path / "list.pth", say=silent)


def test_weights_that_are_nowhere_name_both_ways_out(tmp_path):
    with pytest.raises(WeightsMissing) as caught:
        load_encoder("resnet50", cache_dir=tmp_path, device="cpu")
    for part in ("resnet50 are not on this machine", "fewshot_engine weights resnet50`", "--from FILE"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("name", "sentence"), [("conv4", "from scratch"), ("efficientnet-lite2", "install")])
def test_what_cannot_be_fetched_says_why(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        get_backbone(name).take_weights(say=silent)


@pytest.fixture
def site(tmp_path):
    """A web server on this machine, its folder and its address."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

        def end_headers(self):
            wanted = folder / self.path.lstrip("/")
            if wanted.is_file():  # what the hub says of a large file
                self.send_header("ETag", f'"{hashlib.sha256(wanted.read_bytes()).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def fetching_from(url):
    return replace(get_backbone(NAME), _fetch=lambda folder, say: weights.download(url, folder, say=say))


def test_fetched_weights_are_checked_against_the_hash_in_their_name(site, file, cache):
    folder, address = site
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    for name in (f"m-{digits}.pth", "m-01234567.pth"):
        (folder / name).write_bytes(file.read_bytes())
    record = fetching_from(f"{address}/m-{digits}.pth").take_weights(say=silent)
    assert record.source_sha256.startswith(digits)
    with pytest.raises(CheckpointError, match="01234567"):
        fetching_from(f"{address}/m-01234567.pth").take_weights(say=silent)
    assert weights.find_record(NAME) == record
    assert not list(cache.glob(".fetching-*"))


def test_an_address_that_cannot_be_reached_names_both_ways_out(site):
    _, address = site
    for url in (f"{address}/gone-01234567.pth", "http://127.0.0.1:1/m-01234567.pth"):
        with pytest.raises(WeightsMissing) as caught:
            fetching_from(url).take_weights(say=silent)
        for part in (url, f"weights {NAME}`", "--from FILE"):
            assert part in str(caught.value)


def test_the_hub_is_asked_for_one_name_after_another(site, tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder, address = site
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("https://huggingface.co", address))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (folder / "some/model/resolve/main").mkdir(parents=True)
    (folder / "some/model/resolve/main/second.bin").write_bytes(b"weights")
    path = weights.download_from_hub("some/model", ["first.safetensors", "second.bin"], tmp_path)
    assert path.read_bytes() == b"weights"
    with pytest.raises(WeightsMissing, match="some/model on the Hugging Face hub"):
        weights.download_from_hub("some/model", ["third.bin"], tmp_path)


def test_a_model_of_timm_loads_from_a_file_with_its_classifier(photo, tmp_path):
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("test_vit", pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "vit.pth")
    get_backbone("timm:test_vit").take_weights(tmp_path / "vit.pth", say=silent)
    encoder = load_encoder("timm:test_vit", cache_dir=tmp_path / "onnx", threads=1, device="cpu")
    shown = timm.data.create_transform(**timm.data.resolve_data_config(model=whole))(photo)[None]
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(shown), pre_logits=True).numpy()
    got = encoder.encode_images([photo])
    assert (encoder.dim, encoder.image_size) == (64, 160)
    assert float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected)) > 0.999
    torch.save({"head.weight": torch.zeros(1000, 64)}, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match="missing"):
        get_backbone("timm:test_vit").take_weights(tmp_path / "head.pth", say=silent)


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}


def test_the_image_tower_of_open_clip_loads_from_a_file_of_both_towers(photo, tmp_path):
    import open_clip

    (tmp_path / "Tiny-CLIP.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "Tiny-CLIP.json")
    torch.manual_seed(0)
    whole, _, transform = open_clip.create_model_and_transforms("Tiny-CLIP")
    torch.save(whole.state_dict(), tmp_path / "clip.pt")
    name = "open_clip:Tiny-CLIP/mine"
    get_backbone(name).take_weights(tmp_path / "clip.pt", say=silent)
    encoder = load_encoder(name, cache_dir=tmp_path / "onnx", threads=1, device="cpu")
    with torch.no_grad():
        expected = whole.eval().encode_image(transform(photo)[None]).numpy()
    got = encoder.encode_images([photo])
    assert (encoder.dim, encoder.image_size) == (16, 64)
    assert float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected)) > 0.999
    # Now that all is kept, another process needs neither the library, which knows no Tiny-CLIP there, nor torch.
    script = (
        "import sys; from pathlib import Path; from fewshot_engine.encoder import load_encoder;"
        f"e = load_encoder({name!r}, cache_dir=Path({str(tmp_path / 'onnx')!r}), device='cpu');"
        "print(e.dim, 'torch' in sys.modules, 'open_clip' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == ["16", "False", "False"]
    torch.save({"visual.proj": torch.zeros(64, 16)}, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=r"part\.pt do not fit"):
        get_backbone(name).take_weights(tmp_path / "part.pt", say=silent)
