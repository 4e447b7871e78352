"""launch/caption.py --rank and --scores: the same captions get the same log-probabilities, generated or given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blipds.captioning.captioner import Captioner
from blipds.captioning.ranking import Ranker
from blipds.data.images import Images
from blipds.data.processors import BlipImageEval
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.models.generation import GenerationConfig
from tests.plugin_captioner import GruCaptioner

Command = Callable[..., str]
PHOTOGRAPHS = 16
SCORES = ("log_prob", "mean_log_prob", "words")


def test_ranking_gives_captions_the_scores_that_they_were_generated_with(
    caption: Command, photographs: Path, oracle: list[object], tmp_path: Path
) -> None:
    """Three beams of each image, given back as candidates in the opposite order, one image alone with two."""
    caption(photographs, *oracle, "--scores", "--num-captions", 3, "--output", tmp_path / "scores.jsonl")
    generated = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    given = [{"image": line["image"], "captions": line["captions"][::-1]} for line in generated]
    given[0]["captions"] = given[0]["captions"][:2]
    (tmp_path / "candidates.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in given))

    rank = (photographs, *oracle, "--rank", tmp_path / "candidates.jsonl", "--batch-size", 3)
    printed = caption(*rank, "--output", tmp_path / "ranked.jsonl")
    assert f"{PHOTOGRAPHS} images ranked, 0 skipped (they cannot be read), 0 already ranked" in printed
    ranked = [json.loads(line) for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    assert [len(line["captions"]) for line in ranked] == [2] + [3] * (PHOTOGRAPHS - 1)
    for before, after in zip(generated, ranked, strict=True):
        assert after["image"] == before["image"]
        assert after["mean_log_prob"] == sorted(after["mean_log_prob"], reverse=True)
        for text, total, mean, words in zip(*(after[key] for key in ("captions", *SCORES)), strict=True):
            place = before["captions"].index(text)
            assert total == pytest.approx(before["log_prob"][place], abs=1e-4)
            assert mean == pytest.approx(before["mean_log_prob"][place], abs=1e-4)
            assert [word for word, _ in words] == text.split()
            expected = [log_prob for _, log_prob in before["words"][place]]
            assert [log_prob for _, log_prob in words] == pytest.approx(expected, abs=1e-4)
            assert total < sum(log_prob for _, log_prob in words)  # and the closing token's

    assert f"{PHOTOGRAPHS} already ranked" in caption(*rank, "--output", tmp_path / "ranked.jsonl")
    (tmp_path / "candidates.jsonl").write_text(json.dumps(given[1]))
    with pytest.raises(UserError, match=r"other settings \(candidates "):
        caption(*rank, "--output", tmp_path / "ranked.jsonl")


def test_candidates_that_cannot_be_ranked(
    caption: Command, photographs: Path, oracle: list[object], golden: dict[str, Any], tmp_path: Path
) -> None:
    first, third = golden["images"][0], golden["images"][2]
    file = tmp_path / "candidates.json"

    def rank(*entries: tuple[str, list[str]], folder: Path = photographs) -> str:
        file.write_text(json.dumps([{"image": name, "captions": captions} for name, captions in entries]))
        return caption(folder, *oracle, "--rank", file)

    missing = rf"^--rank {file}: 2 of 3 images are not there; the first is {photographs}/none\.jpg$"
    with pytest.raises(UserError, match=missing):
        rank((first, ["a dog"]), ("none.jpg", ["a dog"]), ("neither.jpg", ["a dog"]))
    with pytest.raises(UserError, match=rf"^--rank {file}: 1 of 2 images have no caption; the first is .*/{third}$"):
        rank((first, ["a dog"]), (third, []))
    with pytest.raises(UserError, match=rf"^--rank {file}: .*lies outside of .*; .* give a folder above it as IMAGE$"):
        rank((str(photographs / first), ["a dog"]), folder=tmp_path)
    with pytest.raises(UserError, match=rf"^--rank {tmp_path}/none\.csv: no such file$"):
        caption(*oracle, "--rank", tmp_path / "none.csv")

    longest, too_long = " ".join(["dog"] * 508), " ".join(["dog"] * 509)  # with the prompt 512 positions, and 513
    printed = rank((first, [too_long, longest, "a dog"]), (third, ["a dog", ""]))
    assert (
        "1 of 4 candidates have more tokens than the text decoder has positions (512): they come last, without scores; "
        f"the first is of {photographs}/{first}" in printed
    )
    assert f"--rank {file}: 1 captions without a word left out" in printed
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert sorted(lines[0]["captions"][:2]) == ["a dog", longest] and lines[0]["captions"][2] == too_long
    assert [log_prob is None for log_prob in lines[0]["log_prob"]] == [False, False, True]
    assert lines[1]["captions"] == ["a dog"]

    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8")
    shown = rank(("torn.jpg", ["a dog"]), ("whole.jpg", ["a dog"]), folder=links(tmp_path, photographs / first))
    assert "1 images ranked, 1 skipped (they cannot be read)" in shown and f"skipped {tmp_path}/torn.jpg: " in shown


def links(folder: Path, image: Path) -> Path:
    (folder / "whole.jpg").symlink_to(image.resolve())
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rank", "x.json", "--num-beams", "5"], "--rank generates nothing: leave out --num-beams"),
        (["--rank", "x.json", "--num-captions", "2"], "--rank generates nothing: leave out --num-captions"),
        (["--rank", "x.json", "--sidecar"], "--sidecar has no place for scores; give --output"),
        (["image.jpg", "--scores", "--sidecar"], "--sidecar has no place for scores; give --output"),
        (["image.jpg", "--rank", "x.json"], "--rank takes at most one folder"),
        ([], "give images to caption"),
    ],
)
def test_options_that_contradict_each_other(
    caption: Command, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        caption(*arguments, "--checkpoint", "none")
    assert said in capfd.readouterr().err


def test_an_arch_that_reads_one_caption_a_row_ranks_them_one_by_one(tmp_path: Path) -> None:
    """The plugin's GRU, against its own steps."""
    tokenizer, model = CaptionTokenizer(), GruCaptioner(8).eval()
    texts = ["a dog", "two skateboarders jump", "snow"]
    parts = {"captioner": Captioner(tokenizer, GenerationConfig(), 0), "image_processor": BlipImageEval(16)}
    ranker = Ranker(
        model=model, device=torch.device("cpu"), dtype=torch.float32, weights="", candidates={"x": texts}, **parts
    )
    pixels = torch.rand(1, 3, 16, 16)
    (ranked,) = ranker.captions(Images(pixels, (0.0,) * 3, (1.0,) * 3), ["x"])
    assert sorted(found.text for found in ranked) == sorted(texts)
    for text, confidence in ranked:
        ids = tokenizer.encode(tokenizer.prompt + text)
        steps = model.step_decoder(model.image_encoder(pixels), 20)
        logits = [steps.start(torch.tensor(tokenizer.prompt_ids), 1)]
        logits += [steps.step(torch.tensor([[token]]))[:, 0] for token in ids[len(tokenizer.prompt_ids) : -1]]
        chosen = torch.cat(logits).log_softmax(-1)[range(len(logits)), ids[len(tokenizer.prompt_ids) :]]
        assert confidence is not None
        assert confidence.log_prob == pytest.approx(chosen.sum().item(), abs=1e-4)
        assert confidence.mean_log_prob == pytest.approx(chosen.mean().item(), abs=1e-5)
