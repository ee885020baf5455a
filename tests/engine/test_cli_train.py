import json

import numpy as np
import pytest
from PIL import Image

from fewshot_engine.__main__ import main


@pytest.fixture
def bars(tmp_path):
    """Ten classes of bars at an angle, eight pictures each, in two alphabets; one file is no picture."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] - 16
    for label in range(10):
        folder = tmp_path / "bars" / ("even" if label % 2 == 0 else "odd") / f"c{label}"
        folder.mkdir(parents=True)
        for number in range(8):
            angle, shift = np.pi * label / 10, rng.uniform(-5, 5)
            bar = np.abs(x * np.sin(angle) - y * np.cos(angle) - shift) < 2
            pixels = np.where(bar[..., None], rng.integers(0, 120, 3), rng.integers(150, 255, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "bars/even/c0/text.png").write_text("not a picture")
    return tmp_path / "bars"


EPISODE = ["--way", "3", "--shot", "1", "--query", "5"]


def test_full_training_then_evaluation_of_its_model(bars, tmp_path, capsys):
    out = tmp_path / "model"
    train = f"train {bars} --kind full --backbone conv4 --image-size 28 --episodes 20 --epochs 1 --eval-episodes 50"
    assert main([*train.split(), *EPISODE, "--out", str(out), "--threads", "1", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["way"], result["shot"], result["query"], result["chance"]) == (3, 1, 5, 1 / 3)
    assert [refusal["path"] for refusal in result["refused"]] == [str(bars / "even/c0/text.png")]
    assert "validation:" in captured.err
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "model.safetensors", "run.safetensors"]

    evaluate = [
        "evaluate",
        str(bars),
        *EPISODE,
        "--episodes",
        "50",
        "--encoder",
        str(out),
        "--cache-dir",
        str(tmp_path),
    ]
    assert main([*evaluate, "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] > 0.4
    assert {"ci95", "episodes", "encoder", "intra_class", "inter_class"} <= result.keys()


def test_mistakes_are_a_sentence_and_a_code(bars, tmp_path, capsys):
    assert main(["evaluate", str(bars), "--way", "5", "--shot", "9", "--cache-dir", str(tmp_path)]) == 2
    assert "5-way needs 5 classes with at least 10 photos; this collection has 0" in capsys.readouterr().err
    assert main(["train", str(bars), "--out", str(tmp_path / "m"), "--epochs", "0"]) == 2
    assert "epochs is 0" in capsys.readouterr().err
