"""Numbers worked by hand."""

import json

import pytest

from blipds.config.run import load_run_config
from blipds.errors import UserError
from blipds.evaluation.diversity import TrainingCaptions, diversity


def test_diversity():
    found = diversity(["A dog runs.", "a dog; runs", "a cat"])
    assert found == {
        "distinct_1": 4 / 8,  # a, dog, runs, cat of eight words
        "distinct_2": 3 / 5,  # a dog, dog runs, a cat of five pairs
        "vocabulary": 4,
        "words_per_caption": pytest.approx(8 / 3),
    }


def test_of_nothing():
    nothing = {"distinct_1": 0, "distinct_2": 0, "vocabulary": 0, "words_per_caption": 0}
    assert diversity([]) == diversity(["", "..."]) == nothing


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"datasets: {{custom_caption: {{build_info: {{annotations: {{train: {tmp_path}/train.json}}}}}}}}"
    )
    return load_run_config(tmp_path / "run.yaml")[0]


def test_captions_that_were_trained_on(config, tmp_path):
    rows = [{"image": "a.jpg", "caption": ["A dog runs.", "two cats"]}, {"image": "b.jpg", "caption": "a bird"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    generated = ["a dog runs", "a dog", "a bird", "Two cats!"]
    assert TrainingCaptions(config).share(generated) == 3 / 4
    config.run.limit_train = 1
    assert TrainingCaptions(config).share(generated) == 2 / 4


def test_training_captions_that_are_not_at_hand(config):
    with pytest.raises(UserError, match=r"train\.json"):
        TrainingCaptions(config).share(["a dog"])
    config.run.train_splits = ["other"]
    with pytest.raises(UserError, match="no annotation file for split 'other'"):
        TrainingCaptions(config).share(["a dog"])
