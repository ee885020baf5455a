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
    assert result["measured_on"] == "validation"  # ten classes are too few for a third part that leaves base its half
    assert result["optimistic"]
    assert result["validation"]["accuracy"] == result["accuracy"]
    assert result["baseline"] == result["validation_baseline"]
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
    assert 0.2 < result["untrained"] != result["accuracy"]
    assert "frozen" not in result


def test_mistakes_are_a_sentence_and_a_code(bars, tmp_path, capsys):
    assert main(["evaluate", str(bars), "--way", "5", "--shot", "9", "--cache-dir", str(tmp_path)]) == 2
    assert "5-way needs 5 classes with at least 10 photos; this collection has 0" in capsys.readouterr().err
    assert main(["train", str(bars), "--out", str(tmp_path / "m"), "--epochs", "0"]) == 2
    assert "epochs is 0" in capsys.readouterr().err


def test_every_option_reaches_the_run(bars, tmp_path, capsys):
    """A short run with pretraining, a curriculum, rotations and all that, then one that starts from its model."""
    out = tmp_path / "model"
    common = "--kind full --backbone conv4 --image-size 28 --eval-episodes 20 --device cpu --threads 1 --colour 0"
    course = "--episodes 4 --epochs 1 --episodes-per-step 2 --eval-every-episodes 2 --patience 5 --query 2 --way 3"
    rest = (
        "--curriculum 0:2:3,0.5:3:1 --optimiser sgd --schedule step --warmup 1 --clip 1 --ema 0.9 "
        "--label-smoothing 0.1 --rotations --class-weights size --no-flips --rotation 5 --pretrain-epochs 1 "
        "--validation-share 0.3 --test-share 0 --no-near-copies"
    )
    arguments = f"train {bars} {common} {course} --shot 1 {rest} --out {out}".split()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "Curriculum, by share of the episodes: from 0% 2-way 3-shot, then from 50% 3-way 1-shot" in captured.err
    assert "base classes, epoch 1 of 1" in captured.err
    config = json.loads((out / "model.json").read_text())["config"]
    assert config["optimiser"] == "sgd"
    assert config["augmentation"] == {"flips": False, "rotation": 5.0, "crop": 0.1, "colour": 0.0}
    assert config["weight_decay"] == 5e-4
    capsys.readouterr()
    tuned = f"train {bars} {common} {course} --shot 1 --init-from {out} --vary-shots 1-2 --out {tmp_path / 'tuned'}"
    assert main(tuned.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["validation"]["accuracy"] >= result["validation_baseline"]["accuracy"]


def test_given_folders_are_the_parts(bars, tmp_path, capsys):
    odd = bars / "odd"
    held = tmp_path / "held"
    held.mkdir()
    for name in ("c1", "c3", "c5"):
        (odd / name).rename(held / name)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("c7", "c9"):
        (odd / name).rename(other / name)
    arguments = (
        f"train {bars} --val {held} --test {other} --kind full --backbone conv4 --image-size 28 --episodes 2 "
        f"--epochs 1 --eval-episodes 20 --device cpu --threads 1 --way 3 --shot 1 --query 2 --out {tmp_path / 'model'}"
    )
    assert main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["measured_on"] == "test"
    assert result["way"] == 2
    assert result["validation"]["way"] == 3
    card = json.loads((tmp_path / "model/model.json").read_text())
    assert sorted(card["validation_classes"]) == ["c1", "c3", "c5"]
    assert sorted(card["test_classes"]) == ["c7", "c9"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--curriculum 0:5", "'0:5' is no curriculum"),
        ("--curriculum 0:5:1,0.5:5:5", "ways go up and shots go down"),
        ("--vary-ways 5", "'5' is no range"),
    ],
)
def test_options_that_cannot_be_read_say_what_they_look_like(bars, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit):
        main(["train", str(bars), "--out", str(tmp_path / "m"), *option.split()])
    assert message in capsys.readouterr().err
