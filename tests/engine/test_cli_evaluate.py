import json

import numpy as np
import pytest
from PIL import Image

from fewshot_engine.__main__ import main
from fewshot_engine.evaluation import Protocol, evaluate, report

KEYS = {"accuracy", "ci95", "way", "shot", "episodes", "encoder", "intra_class", "inter_class", "chance", "class_means"}


@pytest.fixture
def palette(tmp_path):
    """Six classes of a colour each, nine pictures a class; one file is no picture, one class has two."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "palette" / f"c{number}"
        folder.mkdir(parents=True)
        mean = rng.integers(60, 200, 3)
        for picture in range(9):
            colour = np.clip(mean + rng.normal(0, 18, 3), 0, 255).astype(np.uint8)
            Image.new("RGB", (12, 12), tuple(map(int, colour))).save(folder / f"{picture}.png")
    (tmp_path / "palette/c0/text.png").write_text("not a picture")
    small = tmp_path / "palette/small"
    small.mkdir()
    Image.new("RGB", (12, 12)).save(small / "0.png")
    return tmp_path / "palette"


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


def test_it_prints_what_a_report_says(palette, mean_colour_encoder, capsys):
    found, said = run(capsys, palette, "--episodes", "30", "--seed", "3", "--json")
    assert found.keys() >= KEYS
    expected = report(*embedded(palette), Protocol(3, 1, 4, episodes=30, seed=3), n_classes=6)
    assert found["accuracy"] == pytest.approx(expected.score.accuracy)
    assert found["intra_class"] != expected.quality.intra_class  # the small class counts there
    assert (found["encoder"], found["mode"], found["views"]) == ("accurate", "inductive", ["whole"])
    assert found["left_out"] == [["small", 1]] and "small" in said
    assert [refusal["path"] for refusal in found["refused"]] == [str(palette / "c0/text.png")]
    assert not found.keys() & {"frozen", "familiarity"} and "grid" not in found and "advice" not in found
    assert mean_colour_encoder == [("accurate", ("whole",))]


@pytest.mark.parametrize("method", ["ridge", "bd-cspn"])
def test_a_batch_with_unequal_shares(palette, mean_colour_encoder, capsys, method):
    found, _ = run(
        capsys, palette, "--episodes", "20", "--mode", "batch", "--imbalance", "2", "--method", method, "--views",
        "whole,mirror", "--encoder", "fast",
    )  # fmt: skip
    protocol = Protocol(3, 1, 4, episodes=20, mode="batch", imbalance=2.0, method=method)
    rows, labels = embedded(palette)
    with_small = np.concatenate([rows, [[-128.0, -128, -128]]]).astype(np.float32)  # it counts in the pool's mean
    expected = report(with_small, np.append(labels, 6), protocol, n_classes=7)
    assert found["accuracy"] == pytest.approx(expected.score.accuracy)
    assert (found["inductive"], found["changed"]) == pytest.approx((expected.inductive, expected.changed))
    assert mean_colour_encoder == [("fast", ("whole", "mirror"))]


def test_a_grid_is_one_call(palette, mean_colour_encoder, capsys):
    found, said = run(capsys, palette, "--episodes", "20", "--grid", "2,3x1,6")
    assert [(cell["way"], cell["shot"], cell["query"]) for cell in found["grid"]] == [
        (2, 1, 4), (2, 6, 3), (3, 1, 4), (3, 6, 3)
    ]  # fmt: skip
    assert found["grid"][2]["accuracy"] == evaluate(*embedded(palette), way=3, shot=1, query=4, episodes=20).accuracy
    assert found["grid"][0]["chance"] == 0.5
    assert "3-way 6-shot" in said


def test_advice_says_why(palette, mean_colour_encoder, capsys):
    (palette / "small/0.png").unlink()
    found, _ = run(capsys, palette, "--episodes", "2", "--advise")
    assert found["advice"]["classifier"] == "prototypes"
    assert len(found["advice"]["reasons"]) == 3
    assert "c0 has 9 examples" in found["advice"]["reasons"][0]


def test_the_frozen_encoder_stands_beside_an_adapted_one(palette, use_encoder, mean_colour, capsys):
    class Blur:
        """A map that leaves nothing to tell classes by."""

        share = 0.4

        def familiarity(self, embeddings):
            return 0.5

        def apply(self, embeddings, *, familiarity):
            assert familiarity == 0.5
            return np.ones_like(embeddings) + 1e-3 * np.random.default_rng(0).normal(size=embeddings.shape)

    use_encoder(mean_colour, Blur())
    found, said = run(capsys, palette, "--episodes", "20", "--encoder", "model")
    assert found["frozen"] > found["accuracy"] + 0.2
    assert found["familiarity"] == 0.5
    assert "50% familiar: the photos are some way from what the model was adapted to" in said
    assert "has 20% of the say in answers, the encoder that it began with 80%" in said


def test_mistakes_are_a_sentence_and_a_code(palette, mean_colour_encoder, tmp_path, capsys):
    for arguments, said in (
        (["--way", "5", "--shot", "10"], "5-way needs 5 classes with at least 11 photos; this collection has 0"),
        (["--episodes", "1"], "episodes is 1"),
        (["--imbalance", "-1", "--mode", "batch"], "imbalance is -1.0"),
        (["--method", "magic"], "method is 'magic'"),
        (["--grid", "5x1", "--mode", "pool"], "--grid is inductive"),
    ):
        assert main(["evaluate", str(palette), "--way", "3", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert mean_colour_encoder == []  # all of it before the minutes that embedding takes
    with pytest.raises(SystemExit):
        main(["evaluate", str(palette), "--grid", "5by1"])
    assert "is not ways x shots" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    for word in ("stranger_auroc", "--imbalance 2", "inductive looks at", "--grid 5,10,20x1,5"):
        assert word in said
