import numpy as np
import torch
from PIL import Image

from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.datasets import from_folder, one_class_per_group, split_for
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.near_copies import group_near_copies, near_copies


def textured(seed, size=(120, 90)):
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def test_near_copies_are_found_by_their_pixels(tmp_path):
    """Other sizes, encodings and brightness join a group over class folders; other pictures and plain ones do not."""
    original = textured(1)
    save(original, tmp_path / "a/original.png")
    save(original.resize((61, 45)), tmp_path / "a/small.png")
    save(original, tmp_path / "b/again.jpg", quality=40)
    save(original.point(lambda value: int(value * 0.8)), tmp_path / "b/dark.png")
    for seed in (2, 3):
        save(textured(seed), tmp_path / f"b/other{seed}.png")
    for colour in ("red", "blue"):
        save(Image.new("RGB", (20, 10), colour), tmp_path / f"c/{colour}.png")
    (tmp_path / "c/text.png").write_text("not a picture")
    images = group_near_copies(from_folder(tmp_path))
    copies = dict(zip(images.paths, images.groups.tolist(), strict=True))
    found = {
        group: {path.rsplit("/", 1)[1] for path, other in copies.items() if other == group} for group in copies.values()
    }
    assert sorted(map(len, found.values())) == [1, 1, 1, 1, 1, 4]
    assert {"original.png", "small.png", "again.jpg", "dark.png"} in found.values()
    assert images.counts() == {"a": 1, "b": 2, "c": 3}  # the tie goes to the lower class


def test_near_copies_equal_the_comparison_of_all_pairs_and_keep_known_groups():
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 255, (30, 20, 20, 3))
    noise = rng.integers(-30, 30, (60, 20, 20, 3)) * (np.arange(60) % 4 / 3)[:, None, None, None]
    small = np.clip(originals[np.arange(60) % 30] + noise, 0, 255).astype(np.uint8)
    groups = near_copies(small, groups=np.arange(60) // 2 * 2)
    rows = small.reshape(60, -1).astype(float)
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for i in range(60):
        assert groups[i] == groups[i // 2 * 2]
        for j in range(i):
            if np.linalg.norm(rows[i] - rows[j]) <= 0.2:
                assert groups[i] == groups[j]
    assert 10 < len(set(groups.tolist())) < 30


def test_no_near_copy_crosses_a_split_or_stands_on_both_sides_of_an_episode(tmp_path):
    """From files on disk to episodes: each picture is there three times, now and then under another class."""
    rng = np.random.default_rng(0)
    for picture in range(60):
        copied = textured(picture)
        for copy in range(3):
            name = picture % 10 if copy < 2 or picture % 3 else rng.integers(10)
            save(
                copied.resize((120 - 20 * copy, 90 - 15 * copy)), tmp_path / f"c{name}/{picture}-{copy}.jpg", quality=70
            )
    images = group_near_copies(from_folder(tmp_path))
    picture_of = np.array([int(path.rsplit("/", 1)[1].split("-")[0]) for path in images.paths])
    config = TrainConfig(episode=EpisodeConfig(2, 1, 2))
    split = split_for(images.counts(), config)
    seen = []
    for part in (split.base, split.validation, split.test):
        labels = np.where(np.isin(images.labels, part), images.labels, -1)
        labels[~one_class_per_group(images.labels, images.groups)] = -1
        sampler = EpisodeSampler(
            labels, episode=config.episode, generator=torch.Generator().manual_seed(0), groups=images.groups
        )
        drawn = sampler.sample(300)
        for episode in drawn.indices():
            pictures = picture_of[episode.numpy()]
            assert len(set(pictures.flatten().tolist())) == pictures.size  # none twice, on whichever side
        seen.append(set(picture_of[drawn.indices().flatten().numpy()].tolist()))
    assert all(seen)
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]
