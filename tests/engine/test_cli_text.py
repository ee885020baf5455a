import argparse
import csv
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fewshot_engine import cli_text
from fewshot_engine.errors import ConfigError, DataError


def run(*arguments):
    parser = argparse.ArgumentParser()
    cli_text.add_parsers(parser.add_subparsers())
    options = parser.parse_args(list(map(str, arguments)))
    options.run(options)


def draw_web(draw, spin):
    angles = spin + np.arange(12) * np.pi / 6
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for ray in rays:
        draw.line((112, 112, *(112 + 150 * ray)), fill="white")
    for radius in range(10, 150, 10):
        draw.polygon([tuple(112 + radius * ray) for ray in rays], outline="white")


def draw_clock(draw, spin):
    draw.ellipse((20, 20, 204, 204), fill="white", outline="black", width=8)
    for angle in np.arange(12) * np.pi / 6:
        ray = np.array([np.cos(angle), np.sin(angle)])
        draw.line((*(112 + 70 * ray), *(112 + 84 * ray)), fill="black", width=5)
    for length, angle in ((62, spin), (42, spin + 2)):
        draw.line((112, 112, 112 + length * np.cos(angle), 112 + length * np.sin(angle)), fill="black", width=6)


@pytest.fixture
def things(tmp_path):
    """Drawings that a network which knows photos recognises."""
    for name, ground, draw_on in (("cobweb", (40, 60, 40), draw_web), ("Wall_clock", (120, 90, 60), draw_clock)):
        (tmp_path / "things" / name / "more").mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (224, 224), ground)
            draw_on(ImageDraw.Draw(image), number / 5)
            image.save(tmp_path / "things" / name / ("more" if number == 2 else "") / f"{number}.png")
    return tmp_path / "things"


def test_drawings_are_sorted_by_the_names_of_labels_alone(things, exported, tmp_path, capsys):
    """With the real encoder, its classifier and the real sentence model."""
    (things / "cobweb" / "9.jpg").write_text("just words")
    labels, machine = ["cobweb: made by a spider", "wall clock", "teapot"], ["--cache-dir", exported, "--device", "cpu"]
    run("zero-shot", things, "--labels", *labels, "--top-k", 2, *machine, "--json")
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    answers = [line for line in lines if line["verdict"] != "refused"]
    assert (len(lines), len(answers)) == (7, 6)
    for line in answers:
        assert line["label"] == ("cobweb" if "cobweb" in line["path"] else "wall clock")
        assert line.keys() == {"path", "label", "confidence", "distance", "stranger", "top_k", "verdict"}
        assert line["top_k"][0] == {key: line[key] for key in ("label", "confidence", "distance")}
        assert len(line["top_k"]) == 2
    assert "Accuracy 100.0% on 6 photos" in captured.err
    assert "chance 33.3%" in captured.err

    by_both = ["zero-shot", things, "--support", things, "--labels", *labels[:2], *machine]
    run(*by_both)
    captured = capsys.readouterr()
    assert "the 6 examples" in captured.err
    assert "Accuracy 100.0% on 6 photos" in captured.err

    for photo in (things / "cobweb").rglob("*.png"):
        photo.write_text("just words")
    with pytest.raises(DataError, match="no example of cobweb can be read"):
        run(*by_both)


@pytest.mark.parametrize(
    ("more", "error", "sentence"),
    [
        ([], DataError, "nowhere is not a folder"),
        (["--labels", "a", ": b"], DataError, "a label has no name"),
        (["--support", "nowhere", "--mode", "batch"], ConfigError, "from names alone"),
    ],
)
def test_what_cannot_be_sorted_is_said_in_a_sentence(more, error, sentence):
    with pytest.raises(error, match=sentence):
        run("zero-shot", "nowhere", "--labels", "a", "b", *more)


def test_a_label_without_examples_is_named(colours):
    with pytest.raises(DataError, match="no folder of examples for violet"):
        run("zero-shot", colours, "--labels", "Red", "violet", "--support", colours)


@pytest.mark.usefixtures("mean_colour_encoder")
def test_a_folder_becomes_a_map(colours, tmp_path, capsys):
    run("project", colours, "--out", tmp_path / "map.json")
    drawn = json.loads((tmp_path / "map.json").read_text())
    assert (drawn["method"], drawn["seed"], len(drawn["points"])) == ("pca", 0, 12)
    for point in drawn["points"]:
        assert f"/{point['class']}/" in point["path"]
        assert max(abs(point["x"]), abs(point["y"])) <= 1
    assert json.loads(capsys.readouterr().out)["photos"] == 12


def test_what_embed_wrote_becomes_a_table(tmp_path, capsys):
    arrays = {
        "labels": np.array([0, 1, 1]),
        "classes": np.array(["a", "b"]),
        "paths": np.array(["x.png", "ü.png", "z"]),
    }
    np.savez(tmp_path / "photos.npz", embeddings=np.eye(3, dtype=np.float32), **arrays)
    run("project", tmp_path / "photos.npz", "--method", "tsne", "--out", tmp_path / "map.csv")
    with open(tmp_path / "map.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["class"]) for row in rows] == [("x.png", "a"), ("ü.png", "b"), ("z", "b")]
    assert json.loads(capsys.readouterr().out)["out"].endswith("map.csv")


def test_a_file_that_embed_did_not_write_is_said_so(tmp_path):
    (tmp_path / "words.npz").write_text("just words")
    np.savez(tmp_path / "other.npz", numbers=np.ones(3))
    for name, sentence in (("words.npz", "not what"), ("other.npz", "not what"), ("none.npz", "there is no file")):
        with pytest.raises(DataError, match=sentence):
            run("project", tmp_path / name, "--out", tmp_path / "map.json")
    with pytest.raises(ConfigError, match=r"written as \.json or \.csv"):
        run("project", tmp_path / "words.npz", "--out", tmp_path / "map.png")


def test_help_shows_an_example_of_each_command(capsys):
    for command in ("zero-shot", "project"):
        with pytest.raises(SystemExit):
            run(command, "--help")
        assert f"python -m fewshot_engine {command}" in capsys.readouterr().out
