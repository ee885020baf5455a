import json

import numpy as np
import pytest
from PIL import Image

from fewshot_engine import __main__ as cli
from fewshot_engine.encoder import Encoder
from fewshot_engine.errors import ConfigError
from fewshot_engine.framing import Square
from fewshot_engine.recipes import Recipe


@pytest.fixture(autouse=True)
def mean_colour_encoder(monkeypatch):
    """Pictures differ in colour alone here, so an encoder that sees nothing else will do."""
    encoder = Encoder("mean", dim=3, squares=[Square(8)], forward=lambda p: p.mean(axis=(1, 2), dtype=np.float32) + 1)
    monkeypatch.setattr(cli, "load_with_recipe", lambda *args, **kwargs: (encoder, None))


@pytest.fixture
def folder(tmp_path):
    shades = np.random.default_rng(0).integers(150, 256, 8)
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            colour = [number * 9, number * 5, 12]
            colour[channel] = int(shades[number])
            Image.new("RGB", (12, 10), tuple(colour)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_embed_writes_arrays_that_belong_together(folder, tmp_path, capsys):
    (folder / "red" / "9.jpg").write_text("just words")
    assert cli.main(["embed", str(folder), "--out", str(tmp_path / "out.npz")]) == 0
    said = json.loads(capsys.readouterr().out)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["embeddings"].shape == (12, 3)
        assert list(arrays["classes"]) == ["blue", "green", "red"]
        for label, path in zip(arrays["labels"], arrays["paths"], strict=True):
            assert f"/{arrays['classes'][label]}/" in path
    assert said["photos"] == 12
    assert [one["reason"] for one in said["refused"]] == ["This is a text file, not a photo."]


@pytest.mark.parametrize("mode", ["inductive", "pool", "batch"])
def test_classify_says_a_line_for_each_photo(folder, capsys, mode):
    (folder / "red" / "9.jpg").write_text("just words")
    arguments = ["classify", "--support", str(folder), "--query", str(folder), "--top-k", "2", "--mode", mode, "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    answers = [line for line in lines if line["verdict"] != "refused"]
    assert (len(lines), len(answers)) == (13, 12)
    for line in answers:
        assert f"/{line['label']}/" in line["path"]
        assert line.keys() == {"path", "label", "confidence", "distance", "stranger", "top_k", "verdict"}
        assert line["top_k"][0]["label"] == line["label"]
        assert len(line["top_k"]) == 2
    assert "13 of 13 photos" in captured.err


def test_an_adapted_model_is_told_once_how_familiar_the_examples_are(folder, monkeypatch, capsys):
    eye = np.eye(3, dtype=np.float32)
    recipe = Recipe(np.zeros(3, np.float32), eye[:, :1], eye[:1, :1], eye, share=0.5, familiar_from=0.1, card={})
    encoder, _ = cli.load_with_recipe()
    monkeypatch.setattr(cli, "load_with_recipe", lambda *args, **kwargs: (encoder, recipe))
    (folder / "red" / "9.jpg").write_text("just words")
    assert cli.main(["classify", "--support", str(folder), "--query", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("100% familiar") == 1
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert all(answer["label"] in (None, answer["path"].split("/")[-2]) for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["embed", "nowhere", "--out", "x.npz"], "not a folder"),
        (["classify", "--support", "nowhere", "--query", "nowhere"], "not a folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert "Traceback" not in captured.err


def test_a_label_whose_photos_are_all_unreadable_is_named(folder, capsys):
    (folder / "grey").mkdir()
    (folder / "grey" / "a.jpg").write_text("no photo")
    assert cli.main(["classify", "--support", str(folder), "--query", str(folder)]) == 2
    assert "grey" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "figure"), [("embed", "ratio"), ("classify", "one_photo_ms"), ("train", "episodes_per_s")]
)
def test_bench_prints_a_figure(what, figure, capsys):
    assert cli.main(["bench", "--what", what, "--photos", "30"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["what"] == what
    assert said[figure] > 0


def test_the_encoder_and_its_views_are_asked_for_by_name(folder, tmp_path, monkeypatch):
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        raise ConfigError("seen enough")

    monkeypatch.setattr(cli, "load_with_recipe", load)
    assert cli.main(["embed", str(folder), "--out", str(tmp_path / "x.npz")]) == 2
    assert (asked["name"], asked["views"]) == ("accurate", ("whole",))
    cli.main(["embed", str(folder), "--out", str(tmp_path / "x.npz"), "--encoder", "fast", "--views", "whole,crop:0.6"])
    assert (asked["name"], asked["views"]) == ("fast", ("whole", "crop:0.6"))


def test_weights_are_listed_and_taken_from_a_file(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    from torchvision.models import resnet18

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "r.pth")
    assert cli.main(["weights", "resnet18", "--from", str(tmp_path / "r.pth")]) == 0
    taken = json.loads(capsys.readouterr().out)
    assert taken.keys() == {"name", "file", "sha256", "source", "source_sha256"}
    assert cli.main(["weights", "--list"]) == 0
    listed = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert [listed[name]["weights"] for name in ("resnet18", "resnet50", "efficientnet-lite0", "conv4")] == [
        "kept",
        "to be fetched",
        "in its package",
        "none: trained from scratch",
    ]
    assert cli.main(["weights"]) == 2
    assert "--list" in capsys.readouterr().err


def test_export_prints_what_the_bundle_says(tmp_path, exported, capsys):
    pytest.importorskip("torch")
    assert cli.main(["export", "fast", "--out", str(tmp_path / "fast.zip"), "--cache-dir", str(exported)]) == 0
    assert json.loads(capsys.readouterr().out)["dim"] == 1280
    assert (tmp_path / "fast.zip").is_file()


@pytest.mark.parametrize("command", ["embed", "classify", "weights", "export", "bench"])
def test_help_teaches_by_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m fewshot_engine {command}" in said.split("\n\n", 1)[1]
    assert command == "bench" or "prints" in said
