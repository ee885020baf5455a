import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewshot_engine.config import Curriculum, EpisodeConfig, Stage, TrainConfig
from fewshot_engine.datasets import (
    LabelledImages,
    check_episode,
    count_photos,
    from_folder,
    one_class_per_group,
    split_classes,
    split_for,
)
from fewshot_engine.errors import ConfigError, DataError


def draw(path, colour, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@given(n=st.integers(2, 60), way=st.integers(2, 12), share=st.floats(0.05, 0.5), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_split_never_leaks(n, way, share, seed):
    if n < way:
        with pytest.raises(DataError, match=f"{way}-way needs {way} classes; this collection has {n}"):
            split_classes(range(n), share=share, way=way, seed=seed)
        return
    split = split_classes(range(n), share=share, way=way, seed=seed)
    assert len(split.base) >= way
    assert split == split_classes(range(n), share=share, way=way, seed=seed)
    if split.optimistic:
        assert n - way < 2
        assert split.notes
        return
    assert not set(split.base) & set(split.validation)
    assert set(split.base) | set(split.validation) == set(range(n))
    assert 2 <= split.way <= len(split.validation)
    assert (split.way == way) == (n >= 2 * way)
    assert bool(split.notes) == (n < 2 * way)


def test_split_depends_on_the_seed():
    splits = {split_classes(range(30), share=0.2, way=5, seed=seed).validation for seed in range(5)}
    assert len(splits) == 5
    assert all(len(validation) == 6 for validation in splits)


def test_too_few_classes_say_how_they_fall_back():
    fewer = split_classes(range(8), share=0.2, way=5, seed=0)
    assert (len(fewer.base), fewer.way, fewer.optimistic) == (5, 3, False)
    assert "3-way (chance 33 %) while training is 5-way; 10 classes" in fewer.notes[0]
    repeated = split_classes(range(6), share=0.2, way=5, seed=0)
    assert repeated.optimistic
    assert "optimistic" in repeated.notes[0]


def test_episode_plan_names_the_left_out_and_shrinks_query():
    counts = {"a": 5, "b": 12, "c": 30, "d": 16}
    plan = check_episode(counts, EpisodeConfig(way=3, shot=5, query=15))
    assert (plan.way, plan.shot, plan.query) == (3, 5, 7)
    assert plan.left_out == (("a", 5),)
    assert plan.notes == (
        "Left out, with fewer than 6 photos: a (5).",
        "Query images a class are 7 instead of 15: b has 12 photos, of which 5 are support.",
    )


def test_too_few_classes_for_an_episode_raise_with_the_numbers():
    message = "5-way needs 5 classes with at least 6 photos; this collection has 3"
    with pytest.raises(DataError, match=message):
        check_episode({"a": 6, "b": 7, "c": 20, "d": 5}, EpisodeConfig())


def test_split_for_passes_over_classes_that_are_too_small():
    counts = {f"c{i}": 20 for i in range(12)} | {"tiny": 2}
    split = split_for(counts, TrainConfig())
    assert 12 not in split.base + split.validation
    assert len(split.validation) == 5


def test_a_group_stays_with_the_class_that_has_most_of_it():
    labels = np.array([0, 0, 1, 1, 1, 0])
    groups = np.array([7, 7, 7, 8, 9, 9])
    # group 7: two of class 0, one of class 1; group 9: a tie, which goes to the lower class
    assert one_class_per_group(labels, groups).tolist() == [True, True, False, True, False, True]
    assert count_photos(("a", "b"), labels, groups) == {"a": 2, "b": 1}
    assert count_photos(("a", "b"), labels) == {"a": 3, "b": 3}


def test_folder_levels(tmp_path):
    draw(tmp_path / "Latin/a/1.png", "red")
    draw(tmp_path / "Latin/b/1.png", "green")
    draw(tmp_path / "Greek/alpha/1.png", "blue")
    draw(tmp_path / "stray.png", "white")
    draw(tmp_path / "__MACOSX/x/1.png", "black")
    (tmp_path / "Latin/notes.txt").write_text("not a photo")
    assert from_folder(tmp_path).classes == ("Greek/alpha", "Latin/a", "Latin/b")
    assert from_folder(tmp_path, "top").counts() == {"Greek": 1, "Latin": 2}
    assert from_folder(tmp_path, 2).classes == ("Greek/alpha", "Latin/a", "Latin/b")
    with pytest.raises(ConfigError, match="level is '0'"):
        from_folder(tmp_path, "0")


def test_identical_files_form_a_group(tmp_path):
    for name, colour in (("a/1", "red"), ("a/2", "red"), ("b/1", "blue"), ("b/2", "red")):
        draw(tmp_path / f"{name}.png", colour)
    found = from_folder(tmp_path)
    assert found.groups is not None
    assert found.groups[0] == found.groups[1] == found.groups[3] != found.groups[2]
    assert found.counts() == {"a": 1, "b": 1}


def test_empty_folder_raises(tmp_path):
    with pytest.raises(DataError, match="holds no photos"):
        from_folder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        from_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 2], "run from 0 to 2: there are 2 classes"), ([0.5, 1], "they are integers")]
)
def test_bad_labels_raise(labels, message):
    with pytest.raises(ConfigError, match=message):
        LabelledImages(("a", "b"), np.array(labels), ("x", "y"))


def test_importing_it_loads_no_torch():
    modules = "fewshot_engine.datasets, fewshot_engine.near_copies, fewshot_engine.pixel_cache, fewshot_engine.recipes"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(n=st.integers(2, 80), way=st.integers(2, 10), extra=st.integers(0, 5), seed=st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_three_way_split_never_leaks(n, way, extra, seed):
    base_way = way + extra
    if n < base_way:
        return
    split = split_classes(range(n), share=0.2, test_share=0.1, way=way, base_way=base_way, seed=seed)
    assert len(split.base) >= base_way
    assert not set(split.test) & (set(split.base) | set(split.validation))
    if split.optimistic:
        assert split.base == split.validation
        assert not split.test
        return
    assert sorted(split.base + split.validation + split.test) == list(range(n))
    if split.test:
        assert len(split.test) >= way
        assert 2 * len(split.base) >= n
    else:
        assert "nothing but the final figure" in split.notes[-1]


def test_nothing_is_held_out_when_nobody_wants_it():
    split = split_classes(range(30), share=0, test_share=0.1, way=5, seed=0)
    assert split.base == split.validation == tuple(range(30))
    assert split.optimistic
    assert "as was asked" in split.notes[0]


def test_a_curriculum_and_rotations_change_what_base_needs():
    counts = {f"c{i}": 20 for i in range(12)}
    harder = TrainConfig(curriculum=Curriculum((Stage(0, 5, 5), Stage(0.5, 9, 1))))
    assert len(split_for(counts, harder).base) >= 9
    turned = TrainConfig(kind="full", backbone="conv4", episode=EpisodeConfig(30, 1, 5), rotations_as_classes=True)
    split = split_for(counts, turned)  # 30 ways of 8 classes, each turned four times
    assert len(split.base) >= 8
    assert split.way == len(split.validation)
