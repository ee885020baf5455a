import json

import numpy as np
import pytest
from PIL import Image

from fewshot_engine import cli_evaluate
from fewshot_engine.__main__ import main
from fewshot_engine.encoder import Encoder
from fewshot_engine.evaluation import Protocol, evaluate, report
from fewshot_engine.framing import Square

KEYS = {"accuracy", "ci95", "way", "shot", "episodes", "encoder", "intra_class", "inter_class", "chance", "class_means"}


@pytest.fixture
def colours(tmp_path):
    """Six classes of a colour each, nine pictures a class; one file is no picture, one class has two."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "colours" / f"c{number}"
        folder.mkdir(parents=True)
        mean = rng.integers(60, 200, 3)
        for picture in range(9):
            colour = np.clip(mean + rng.normal(0, 18, 3), 0, 255).astype(np.uint8)
            Image.new("RGB", (12, 12), tuple(map(int, colour))).save(folder / f"{picture}.png")
    (tmp_path / "colours/c0/text.png").write_text("not a picture")
    small = tmp_path / "colours/small"
    small.mkdir()
    Image.new("RGB", (12, 12)).save(small / "0.png")
    return tmp_path / "colours"


@pytest.fixture
def colour_encoder(monkeypatch):
    """Sees the mean colour alone: the pictures here have nothing else."""
    encoder = Encoder("mean", dim=3, squares=[Square(8)], forward=lambda p: p.mean(axis=(1, 2), dtype=np.float32) - 128)
    asked = []

    def load(name, **options):
        asked.append((name, options["views"]))
        return encoder, None

    monkeypatch.setattr(cli_evaluate, "load_with_recipe", load)
    return asked


def run(capsys, folder, *arguments, tmp=None):
    assert main(["evaluate", str(folder), "--way", "3", "--query", "4", *arguments]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def embedded(folder):
    names = [f"c{number}" for number in range(6)]
    rows = [
        np.asarray(Image.open(folder / name / f"{picture}.png"), dtype=np.float32).mean((0, 1)) - 128
        for name in names
        for picture in range(9)
    ]
    return np.stack(rows), np.repeat(np.arange(6), 9)


def test_it_prints_what_a_report_says(colours, colour_encoder, capsys):
    found, said = run(capsys, colours, "--episodes", "30", "--seed", "3", "--json")
    assert found.keys() >= KEYS
    expected = report(*embedded(colours), Protocol(3, 1, 4, episodes=30, seed=3), n_classes=6)
    assert found["accuracy"] == pytest.approx(expected.score.accuracy)
    assert found["intra_class"] != expected.quality.intra_class  # the small class counts there
    assert (found["encoder"], found["mode"], found["views"]) == ("accurate", "inductive", ["whole"])
    assert found["left_out"] == [["small", 1]] and "small" in said
    assert [refusal["path"] for refusal in found["refused"]] == [str(colours / "c0/text.png")]
    assert "frozen" not in found and "grid" not in found and "advice" not in found
    assert colour_encoder == [("accurate", ("whole",))]


@pytest.mark.parametrize("method", ["ridge", "bd-cspn"])
def test_a_batch_with_unequal_shares(colours, colour_encoder, capsys, method):
    found, _ = run(
        capsys, colours, "--episodes", "20", "--mode", "batch", "--imbalance", "2", "--method", method, "--views",
        "whole,mirror", "--encoder", "fast",
    )  # fmt: skip
    protocol = Protocol(3, 1, 4, episodes=20, mode="batch", imbalance=2.0, method=method)
    rows, labels = embedded(colours)
    with_small = np.concatenate([rows, [[-128.0, -128, -128]]]).astype(np.float32)  # it counts in the pool's mean
    expected = report(with_small, np.append(labels, 6), protocol, n_classes=7)
    assert found["accuracy"] == pytest.approx(expected.score.accuracy)
    assert (found["inductive"], found["changed"]) == pytest.approx((expected.inductive, expected.changed))
    assert colour_encoder == [("fast", ("whole", "mirror"))]


def test_a_grid_is_one_call(colours, colour_encoder, capsys):
    found, said = run(capsys, colours, "--episodes", "20", "--grid", "2,3x1,6")
    assert [(cell["way"], cell["shot"], cell["query"]) for cell in found["grid"]] == [
        (2, 1, 4), (2, 6, 3), (3, 1, 4), (3, 6, 3)
    ]  # fmt: skip
    assert found["grid"][2]["accuracy"] == evaluate(*embedded(colours), way=3, shot=1, query=4, episodes=20).accuracy
    assert found["grid"][0]["chance"] == 0.5
    assert "3-way 6-shot" in said


def test_advice_says_why(colours, colour_encoder, capsys):
    (colours / "small/0.png").unlink()
    found, _ = run(capsys, colours, "--episodes", "2", "--advise")
    assert found["advice"]["classifier"] == "prototypes"
    assert len(found["advice"]["reasons"]) == 3
    assert "c0 has 9 examples" in found["advice"]["reasons"][0]


def test_the_frozen_encoder_stands_beside_an_adapted_one(colours, monkeypatch, capsys):
    class Blur:
        """A map that leaves nothing to tell classes by."""

        def familiarity(self, embeddings):
            return 0.5

        def apply(self, embeddings, *, familiarity):
            assert familiarity == 0.5
            return np.ones_like(embeddings) + 1e-3 * np.random.default_rng(0).normal(size=embeddings.shape)

    encoder = Encoder("mean", dim=3, squares=[Square(8)], forward=lambda p: p.mean(axis=(1, 2), dtype=np.float32) - 128)
    monkeypatch.setattr(cli_evaluate, "load_with_recipe", lambda name, **options: (encoder, Blur()))
    found, _ = run(capsys, colours, "--episodes", "20", "--encoder", "model")
    assert found["frozen"] > found["accuracy"] + 0.2


def test_mistakes_are_a_sentence_and_a_code(colours, colour_encoder, tmp_path, capsys):
    for arguments, said in (
        (["--way", "5", "--shot", "10"], "5-way needs 5 classes with at least 11 photos; this collection has 0"),
        (["--episodes", "1"], "episodes is 1"),
        (["--imbalance", "-1", "--mode", "batch"], "imbalance is -1.0"),
        (["--method", "magic"], "method is 'magic'"),
        (["--grid", "5x1", "--mode", "pool"], "--grid is inductive"),
    ):
        assert main(["evaluate", str(colours), "--way", "3", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert colour_encoder == []  # all of it before the minutes that embedding takes
    with pytest.raises(SystemExit):
        main(["evaluate", str(colours), "--grid", "5by1"])
    assert "is not ways x shots" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    for word in ("stranger_auroc", "--imbalance 2", "inductive looks at", "--grid 5,10,20x1,5"):
        assert word in said
