"""Batches: labels by hand and by the oracle, and which samples meet in a global batch."""

import json
import multiprocessing
import resource
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packing import shards
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory
from torchvision import transforms

from blipds.data.annotations import annotations_of, read_annotations
from blipds.data.datasets import CaptionDataset, Sample
from blipds.data.images import Images
from blipds.data.loader import Collator, EpochOrder, EvalLoader, RankShare, derive_seed, epoch_loader
from blipds.data.processors import CLIP_MEAN, CLIP_STD, BlipImageEval, BlipImageTrain
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError

DEC, SEP, PAD = 30522, 102, 0
A, PICTURE, OF, DOG, DOGS, CAT = 1037, 3861, 1997, 3899, 6077, 4937
PROMPT = [DEC, A, PICTURE, OF]
WORDS = ["dog", "cat", "horse", "boy", "girl", "man", "woman", "bird", "boat", "car", "tree"]


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer()


class Noise:
    """A picture that no other number has."""

    def __init__(self, number):
        self.number = number

    def open(self, shrink=None):
        if self.number is None:
            raise OSError("broken")
        pixels = np.random.default_rng(self.number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def __str__(self):
        return f"noise {self.number}"


class Record:
    def __init__(self, number, captions):
        self.image, self.image_id = Noise(number), str(number)
        self.captions = tuple(f"a picture of {caption}" for caption in captions)


AUGMENTED = BlipImageTrain(8)


def noise_dataset(images=7, captions=3, processor=AUGMENTED, training=True, broken=()):
    """Seven images, three captions each: 21 pairs."""
    records = [
        Record(None if i in broken else i, [f"{WORDS[i]} {WORDS[k]}" for k in range(captions)]) for i in range(images)
    ]
    return CaptionDataset("noise", annotations_of(records), processor, str, 1, training)


def loader(tokenizer, datasets, micro_batch=8, accumulation=1, rank=0, world_size=1, **arguments):
    return epoch_loader(
        datasets, tokenizer, RankShare(micro_batch, accumulation, rank, world_size), seed=1, **arguments
    )


def contents(windows):
    """For each optimizer step its samples, fillers left out: (pixels, caption)."""
    steps = []
    for window in windows:
        samples = []
        for batch in window:
            rows = zip(batch.images.pixels, batch.captions.input_ids.tolist(), strict=True)
            found = [(pixels.numpy().tobytes(), tokens(row)) for pixels, row in rows]
            samples += [
                (pixels, ids) for pixels, ids in found if len(ids) > len(PROMPT)
            ]  # a filler is the prompt alone
        steps.append(samples)
    return steps


def tokens(row):
    return tuple(token for token in row if token != PAD)


def fed(tokenizer, caption):
    """The tokens that the model sees of a caption alone with its image: all but [SEP]."""
    return tuple(tokenizer.encode(caption)[:-1])


# --- labels ---


def blank(*captions):
    return Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), list(captions))


def test_a_batch_of_captions(tokenizer):
    """How they are packed is test_caption_rows.py's."""
    collate = Collator(tokenizer, SimpleNamespace(image_processor=BlipImageEval(4), features=None))
    batch = collate([blank("a picture of a dog", "a picture of dogs"), blank("a picture of cat")])
    assert batch.captions.input_ids.tolist() == [[*PROMPT, A, DOG, DOGS], [*PROMPT, CAT, PAD, PAD]]
    assert batch.captions.labels.tolist() == [A, DOG, SEP, DOGS, SEP, CAT, SEP]
    assert (batch.num_images, batch.num_captions, batch.errors) == (2, 3, [])


def test_fillers_and_unreadable_images_have_no_labels(tokenizer):
    collate = Collator(tokenizer, SimpleNamespace(image_processor=BlipImageEval(4), features=None))
    broken = Sample(None, [], "x.jpg: broken")
    batch = collate([blank("a picture of dogs"), Sample(None, []), broken])
    assert batch.images.pixels.shape == (3, 3, 4, 4)
    assert batch.captions.input_ids.tolist() == [[*PROMPT, DOGS], [*PROMPT, PAD], [*PROMPT, PAD]]
    assert batch.captions.label_positions.tolist() == [3, 4]
    assert (batch.num_images, batch.num_captions, batch.errors) == (1, 1, ["x.jpg: broken"])

    empty = collate([Sample(None, []), broken])
    assert (empty.captions.labels.numel(), empty.num_images, empty.num_captions) == (0, 0, 0)
    assert empty.captions.input_ids.tolist() == [PROMPT, PROMPT]


# --- pixels ---


def test_normalised_pixels_equal_torchvisions():
    image = Noise(0).open()
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CLIP_MEAN, CLIP_STD)])(image)
    images = Images(BlipImageEval(12)(image).unsqueeze(0), CLIP_MEAN, CLIP_STD)
    assert torch.equal(images.to(torch.device("cpu"), torch.float32)[0], expected)
    assert images.to(torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16


def test_normalising_leaves_the_bytes_alone():
    images = Images(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8), CLIP_MEAN, CLIP_STD)
    images.to(torch.device("cpu"), torch.float32)
    assert images.pixels.unique().tolist() == [7]


# --- global batches ---


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "accumulation", "num_workers"),
    [(1, 8, 1, 2), (2, 4, 1, 0), (2, 2, 2, 1), (1, 2, 4, 0), (8, 1, 1, 0)],
)
def test_global_batches_do_not_depend_on_ranks_and_workers(
    tokenizer, world_size, micro_batch, accumulation, num_workers
):
    """The same pairs with the same augmented pixels; the last of three global batches holds 21 - 16 = 5."""
    dataset = noise_dataset()
    expected = contents(loader(tokenizer, [dataset]).windows(epoch=1))
    assert [len(step) for step in expected] == [8, 8, 5]

    steps = [[], [], []]
    for rank in range(world_size):
        mine = loader(tokenizer, [dataset], micro_batch, accumulation, rank, world_size, num_workers=num_workers)
        windows = list(mine.windows(epoch=1))
        assert len(windows) == mine.steps_per_epoch == 3
        assert all(len(window) == accumulation for window in windows)
        assert all(len(batch.images.pixels) == micro_batch for window in windows for batch in window)
        for step, samples in zip(steps, contents(windows), strict=True):
            step += samples
    assert [sorted(step) for step in steps] == [sorted(step) for step in expected]


def test_each_pair_once_an_epoch(tokenizer):
    mine = loader(tokenizer, [noise_dataset()])
    epochs = [contents(mine.windows(epoch)) for epoch in (0, 1)]
    pairs = {fed(tokenizer, c) for record in noise_dataset().records for c in record.captions}
    assert len(pairs) == 21
    for steps in epochs:
        assert Counter(caption for step in steps for _, caption in step) == dict.fromkeys(pairs, 1)
    # in another order, with other pixels
    captions = [[caption for step in steps for _, caption in step] for steps in epochs]
    assert captions[0] != captions[1]
    assert not {pixels for pixels, _ in epochs[0][0]} & {pixels for step in epochs[1] for pixels, _ in step}


def test_the_counts_leave_fillers_out(tokenizer):
    ranks = [loader(tokenizer, [noise_dataset()], 2, 2, rank, 2) for rank in (0, 1)]
    last = [batch for rank in ranks for batch in list(rank.windows(0))[-1]]
    assert sum(batch.num_images for batch in last) == sum(batch.num_captions for batch in last) == 5
    assert sum(len(batch.captions.labels) for batch in last) == 5 * 3  # two words and the end


def test_without_shuffling_the_order_is_the_files(tokenizer):
    dataset = noise_dataset(processor=BlipImageEval(8))
    captions = [fed(tokenizer, c) for record in dataset.records for c in record.captions]
    for epoch in (0, 1):
        steps = contents(loader(tokenizer, [dataset], shuffle=False).windows(epoch))
        assert [[caption for _, caption in step] for step in steps] == [captions[:8], captions[8:16], captions[16:]]


def test_resuming_gives_the_same_batches(tokenizer):
    mine = loader(tokenizer, [noise_dataset()], micro_batch=2, accumulation=2)
    whole = contents(mine.windows(epoch=3))
    assert len(whole) == 6
    for first_step in (0, 2, 5):
        assert contents(mine.windows(epoch=3, first_step=first_step)) == whole[first_step:]
    with_workers = loader(tokenizer, [noise_dataset()], micro_batch=2, accumulation=2, num_workers=1)
    next(with_workers.windows(epoch=0))  # left in the middle, as a crash or a limit does
    assert contents(with_workers.windows(epoch=3, first_step=4)) == whole[4:]


def test_shards_shuffle_split_and_resume_as_files_do(tokenizer, tmp_path):
    """90 pictures in three shards: two ranks with two workers each, an epoch, and again from its fourth step."""
    images = []
    for number in range(90):
        images.append((tmp_path / f"{number:02d}.png", [f"a picture of {WORDS[number % 11]} {WORDS[number // 11]}"]))
        Noise(number).open().save(images[-1][0])
    (tmp_path / "shards").mkdir()
    braces = shards(images, tmp_path / "shards")
    from_shards = read_annotations([braces], None, captions_needed=True)
    listed = [{"image": path.name, "caption": captions} for path, captions in images]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    from_files = read_annotations([tmp_path / "list.json"], None, captions_needed=True)

    def steps(annotations, first_step, num_workers):
        dataset = CaptionDataset("shards", annotations, BlipImageEval(12), str, 1, training=True)
        found = []
        for rank in (0, 1):
            mine = loader(tokenizer, [dataset], 8, 1, rank, 2, num_workers=num_workers)
            found.append(contents(mine.windows(epoch=1, first_step=first_step)))
        return [sorted(first + second) for first, second in zip(*found, strict=True)]

    epoch = steps(from_shards, 0, num_workers=2)
    pixels = {BlipImageEval(12)(Noise(number).open()).numpy().tobytes() for number in range(90)}
    assert Counter(seen for step in epoch for seen, _ in step) == dict.fromkeys(pixels, 1)
    assert epoch == steps(from_files, 0, num_workers=0)
    assert epoch[3:] == steps(from_shards, 3, num_workers=2)


def test_a_large_window_needs_few_open_files(tokenizer):
    """The batches of a step are held together: 80 x 6 tensors, each of which would keep a file open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 150, before[1]))
    try:
        mine = loader(tokenizer, [noise_dataset()], micro_batch=1, accumulation=80, num_workers=1)
        (window,) = mine.windows(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert sum(batch.num_captions for batch in window) == 21 and len(window) == 80


def test_too_little_shared_memory_is_named(tokenizer, monkeypatch):
    """As torch says it, in the worker, where /dev/shm is docker's 64 MB."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    for mine in (
        loader(tokenizer, [noise_dataset()], num_workers=1).windows(0),
        EvalLoader(noise_dataset(training=False), range(3), batch_size=2, num_workers=1),
    ):
        with pytest.raises(UserError, match=r"/dev/shm \([\d,]+ MiB\) is too small .* --shm-size"):
            next(iter(mine))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_started_early_give_the_same_batches(tokenizer, num_workers):
    """As building does it; what was started for another place (an evaluation's, a resumed run's) is left."""
    whole = contents(loader(tokenizer, [noise_dataset()], micro_batch=4).windows(epoch=3))
    mine = loader(tokenizer, [noise_dataset()], micro_batch=4, num_workers=num_workers)
    state = torch.get_rng_state()
    mine.start(epoch=3, first_step=2)
    assert torch.equal(torch.get_rng_state(), state)  # the model's random weights are drawn after it
    assert contents(mine.windows(epoch=3, first_step=2)) == whole[2:]
    mine.start(epoch=1)
    assert contents(mine.windows(epoch=3, first_step=4)) == whole[4:]
    assert contents(mine.windows(epoch=3, first_step=5)) == whole[5:]


def test_datasets_share_mean_and_std(tokenizer):
    other = noise_dataset(processor=replace(AUGMENTED, std=(0.5, 0.5, 0.5)))
    other.name = "other"
    with pytest.raises(UserError, match=r"^datasets\.other: mean and std differ from those of noise$"):
        loader(tokenizer, [noise_dataset(), other])


# --- orders ---


def samples(order, epoch):
    return [(dataset, sample) for dataset, sample, _ in order.keys(epoch)]


def test_datasets_are_concatenated():
    order = EpochOrder([2, 3], None, seed=1, shuffle=False)
    assert samples(order, 0) == samples(order, 5) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    shuffled = EpochOrder([2, 3], None, seed=1, shuffle=True)
    assert sorted(samples(shuffled, 0)) == samples(order, 0)


def test_ratios_without_shuffling():
    """Nine samples an epoch, 1 : 2: three of dataset 0 and six of dataset 1, each from where it stopped."""
    order = EpochOrder([6, 3], [1, 2], seed=1, shuffle=False)
    assert len(order) == 9
    twice = [(1, 0), (1, 1), (1, 2)] * 2
    assert samples(order, 0) == [(0, 0), (0, 1), (0, 2), *twice]
    assert samples(order, 1) == [(0, 3), (0, 4), (0, 5), *twice]


def test_ratios_with_shuffling():
    order = EpochOrder([6, 3], [1, 2], seed=1, shuffle=True)
    epochs = [samples(order, epoch) for epoch in range(4)]
    for first, second in (epochs[:2], epochs[2:]):
        assert Counter(first + second) == {(0, s): 1 for s in range(6)} | {(1, s): 4 for s in range(3)}
    assert [s for s in epochs[0] if s[0] == 0] != [s for s in epochs[2] if s[0] == 0]


def test_the_seed_decides():
    orders = [EpochOrder([50], None, seed, shuffle=True) for seed in (1, 1, 2)]
    keys = [list(order.keys(epoch=0)) for order in orders]
    assert keys[0] == keys[1]
    assert samples(orders[0], 0) != samples(orders[2], 0)
    seeds = [seed for epoch in range(3) for *_, seed in orders[0].keys(epoch)]
    assert len(set(seeds)) == 150  # each sample is augmented anew in each epoch


def test_an_epoch_of_twelve_million_pairs_takes_megabytes():
    """6 bytes a pair are kept: Conceptual Captions 12M in 72 MB. The order is that of torch's 64-bit permutations."""
    pairs = 12_000_000
    tracemalloc.start()
    keys = EpochOrder([pairs], None, seed=1, shuffle=True).keys(epoch=3)
    kept, _ = tracemalloc.get_traced_memory()  # of numpy
    tracemalloc.stop()
    assert keys.samples.nbytes + keys.datasets.nbytes == 6 * pairs and kept < 7 * pairs
    order, of_pass = (
        torch.randperm(pairs, generator=torch.Generator().manual_seed(derive_seed(*parts)))
        for parts in ((1, "epoch", 3), (1, "pass", 0, 3))
    )
    for place in (0, 1, 5_000_000, pairs - 1):
        sample = of_pass[order[place]].item()
        assert keys[place] == (0, sample, derive_seed(1, 3, 0, sample))


def test_derived_seeds():
    """The first eight bytes of BLAKE2b, without the sign bit."""
    assert 0 <= derive_seed(1, "x", 2) < 2**63
    assert derive_seed(1, "x", 2) == derive_seed("1", "x", "2")
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed(123), derive_seed(1, 2, 3)}) == 4


# --- evaluation ---


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_gives_the_images_of_a_share(tokenizer, workers):
    dataset = noise_dataset(images=10, processor=BlipImageEval(8), training=False)
    loader = EvalLoader(dataset, range(1, 10, 2), batch_size=2, num_workers=workers)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [batch.indices for batch in batches] == [[1, 3], [5, 7], [9]]
    for batch in batches:
        for index, pixels in zip(batch.indices, batch.images.pixels, strict=True):
            assert torch.equal(pixels, dataset[index].image)


def test_workers_get_datasets_without_pickling_them(tokenizer, monkeypatch):
    """Python 3.14's default start method would pickle the records, a gigabyte of them, into each worker."""
    monkeypatch.setattr(CaptionDataset, "__getstate__", lambda self: pytest.fail("pickled"), raising=False)
    dataset = noise_dataset(processor=BlipImageEval(8), training=False)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        evaluated = list(EvalLoader(dataset, range(7), batch_size=4, num_workers=2))
        trained = list(loader(tokenizer, [noise_dataset()], num_workers=2).windows(epoch=0))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert [batch.indices for batch in evaluated] == [[0, 1, 2, 3], [4, 5, 6]] and len(trained) == 3


def test_pinned_memory_reaches_every_tensor(tokenizer, monkeypatch):
    """torch pins what named tuples hold; without it the copies of an evaluation would make the host wait."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: pinned.append(self) or self)
    (batch,) = EvalLoader(noise_dataset(2, 1, BlipImageEval(8), False), range(2), batch_size=2, num_workers=0)
    again = pin_memory(batch)
    assert type(again) is type(batch) and again.indices == [0, 1]
    assert [tensor.data_ptr() for tensor in pinned] == [batch.images.pixels.data_ptr()]


def test_evaluation_names_unreadable_images(tokenizer):
    dataset = noise_dataset(images=4, processor=BlipImageEval(8), training=False, broken={0, 2, 3})
    first, second = EvalLoader(dataset, range(4), batch_size=2, num_workers=0)
    assert (first.indices, first.errors) == ([1], ["noise None: broken"])
    assert (second.indices, len(second.errors)) == ([], 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_without_images(tokenizer, workers):
    loader = EvalLoader(noise_dataset(images=1, training=False), range(1, 1, 2), batch_size=2, num_workers=workers)
    assert (len(loader), list(loader)) == (0, [])
