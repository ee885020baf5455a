import json
import subprocess
import sys

import numpy as np
import pytest

from fewshot_engine import __main__ as cli
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
