import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fewshot_engine import __main__ as cli
from fewshot_engine.encoder import Encoder
from fewshot_engine.framing import Square
from fewshot_engine.recipes import Recipe


def test_embed_writes_arrays_that_belong_together(colours, mean_colour_encoder, tmp_path, capsys):
    (colours / "red" / "9.jpg").write_text("just words")
    assert cli.main(["embed", str(colours), "--out", str(tmp_path / "out.npz")]) == 0
    said = json.loads(capsys.readouterr().out)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["embeddings"].shape == (12, 3)
        assert list(arrays["classes"]) == ["blue", "green", "red"]
        for label, path in zip(arrays["labels"], arrays["paths"], strict=True):
            assert f"/{arrays['classes'][label]}/" in path
    assert said["photos"] == 12
    assert [one["reason"] for one in said["refused"]] == ["This is a text file, not a photo."]


@pytest.mark.parametrize("mode", ["inductive", "pool", "batch"])
def test_classify_says_a_line_for_each_photo(colours, mean_colour_encoder, capsys, mode):
    (colours / "red" / "9.jpg").write_text("just words")
    arguments = [
        "classify",
        "--support",
        str(colours),
        "--query",
        str(colours),
        "--top-k",
        "2",
        "--mode",
        mode,
        "--json",
    ]
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


def test_an_adapted_model_is_told_once_how_familiar_the_examples_are(colours, use_encoder, mean_colour, capsys):
    eye = np.eye(3, dtype=np.float32)
    recipe = Recipe(np.zeros(3, np.float32), eye[:, :1], eye[:1, :1], eye, share=0.5, familiar_from=0.1, card={})
    use_encoder(mean_colour, recipe)
    (colours / "red" / "9.jpg").write_text("just words")
    assert cli.main(["classify", "--support", str(colours), "--query", str(colours)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("100% familiar: the photos are near what the model was adapted to") == 1
    assert "has 50% of the say in answers, the encoder that it began with 50%" in captured.err
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert all(answer["label"] in (None, answer["path"].split("/")[-2]) for answer in answers)


@pytest.fixture
def stripes(tmp_path, use_encoder):
    """Pictures of three labels whose prototypes lie close, and an encoder that sees them pixel by pixel.

    Of what a picture is made, one direction is wide in each label, and the labels lie side by side across it.
    """
    rng = np.random.default_rng(0)
    patterns = np.linalg.qr(rng.normal(size=(192, 24)))[0].T
    for folder, each in (("support", 101), ("query", 40)):
        for label in range(3):
            (tmp_path / folder / f"stripe{label}").mkdir(parents=True)
            rows, along = rng.normal(scale=0.1, size=(each, 24)), rng.normal(size=each)
            rows[:, :3] += np.stack([np.full(each, 2.0), along, along + 0.6 * (label - 1)], axis=1)
            pixels = np.clip(128 + 250 * rows @ patterns, 0, 255).astype(np.uint8).reshape(each, 8, 8, 3)
            for number, picture in enumerate(pixels):
                Image.fromarray(picture).save(tmp_path / folder / f"stripe{label}" / f"{number}.png")
    see = Encoder("pixels", dim=192, squares=[Square(8)], forward=lambda p: p.reshape(len(p), -1).astype("f4") - 128)
    use_encoder(see)
    return ["classify", "--support", str(tmp_path / "support"), "--query", str(tmp_path / "query")]


def sorted_by(capsys, arguments):
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    answers = {line["path"]: line for line in map(json.loads, captured.out.splitlines())}
    return answers, np.mean([line["label"] in path for path, line in answers.items()]), captured.err


def test_many_examples_are_answered_by_a_linear_head(stripes, capsys):
    by_prototypes, few_right, why_prototypes = sorted_by(capsys, [*stripes, "--classifier", "prototypes"])
    by_head, right, why_head = sorted_by(capsys, stripes)
    assert right > max(0.9, few_right + 0.08)
    assert "Prototypes answer, as asked for. Each of 3 labels has 101 examples or more" in why_prototypes
    assert "A linear head answers. Each of 3 labels has 101 examples or more" in why_head
    assert "The head recognises" in why_head and "leave-one-out" not in why_head
    assert np.mean([line["confidence"] for line in by_head.values()]) == pytest.approx(right, abs=0.05)
    for path, line in by_head.items():
        other = by_prototypes[path]
        assert line.keys() == other.keys()
        assert line["stranger"] == other["stranger"]
        distances = [{one["label"]: one["distance"] for one in answer["top_k"]} for answer in (line, other)]
        assert distances[0] == distances[1]
        assert line["top_k"][0] == {key: line[key] for key in ("label", "confidence", "distance")}


def test_what_looks_at_all_photos_is_left_to_prototypes(stripes, colours, mean_colour_encoder, capsys):
    _, _, why = sorted_by(capsys, [*stripes, "--mode", "pool"])
    assert "Prototypes answer, as --mode pool needs them." in why
    for mode in ("batch", "pool"):
        assert cli.main([*stripes, "--mode", mode, "--classifier", "linear"]) == 2
        assert f"--mode {mode} goes with prototypes" in capsys.readouterr().err
    few = ["classify", "--support", str(colours), "--query", str(colours)]
    _, right, why = sorted_by(capsys, [*few, "--classifier", "linear"])
    assert right == 1
    assert "A linear head answers, as asked for. blue has 4 examples" in why
    assert "Prototypes answer. blue has 4 examples" in sorted_by(capsys, few)[2]


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


def test_a_label_whose_photos_are_all_unreadable_is_named(colours, mean_colour_encoder, capsys):
    (colours / "grey").mkdir()
    (colours / "grey" / "a.jpg").write_text("no photo")
    assert cli.main(["classify", "--support", str(colours), "--query", str(colours)]) == 2
    assert "grey" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "figure"), [("embed", "ratio"), ("classify", "one_photo_ms"), ("train", "episodes_per_s")]
)
def test_bench_prints_a_figure(mean_colour_encoder, what, figure, capsys):
    assert cli.main(["bench", "--what", what, "--photos", "30"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["what"] == what
    assert said[figure] > 0


def test_the_encoder_and_its_views_are_asked_for_by_name(colours, mean_colour_encoder, tmp_path):
    embed = ["embed", str(colours), "--out", str(tmp_path / "x.npz")]
    cli.main(embed)
    cli.main([*embed, "--encoder", "fast", "--views", "whole,crop:0.6"])
    assert mean_colour_encoder == [("accurate", ("whole",)), ("fast", ("whole", "crop:0.6"))]


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


def test_the_parser_of_all_commands_is_there_without_torch():
    code = "import sys; from fewshot_engine.__main__ import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
