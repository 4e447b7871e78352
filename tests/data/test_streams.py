"""Streamed tar shards: what they give, who reads which, where a resumed run goes on, and what can go wrong."""

import gzip
import io
import json
import os
import random
import tarfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from packing import add
from PIL import Image
from serving import Handler, serving

from blipds.config.run import load_run_config
from blipds.data.annotations import read_annotations
from blipds.data.loader import RankShare, TrainLoader
from blipds.data.processors import BlipImageTrain, CaptionProcessor
from blipds.data.streams import CaptionStream, piped, read_ahead, shards_of, shuffled, stream_loader, streams_of
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError

IMAGES = 12  # in three shards of four


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Image n has two captions, "n" and "n again"; captions as text and as JSON in turn."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(4 * shard, 4 * shard + 4):
                captions = [f"number {number}", f"number {number} again"]
                add(tar, f"{number:03d}.png", picture(number))
                if number % 2:
                    add(tar, f"{number:03d}.txt", "\n".join(captions).encode())
                else:
                    add(tar, f"{number:03d}.json", json.dumps({"caption": captions}).encode())
    return folder


def stream(*storages, captions_per_image="all", buffer=1, say=print):
    processors = BlipImageTrain(8), CaptionProcessor(prompt="a picture of ")
    return CaptionStream("custom_caption", storages, *processors, captions_per_image, buffer, say)


def pipe(shards, name="{000..002}.tar"):
    return f"pipe:cat {shards}/{name}"


def numbers(share):
    return [int(record.image_id) for record, _ in share]


# --- what a stream gives ---


def test_the_same_records_as_indexed_shards(shards):
    expected = read_annotations([shards / "{000..002}.tar"], None, captions_needed=True)
    found = [record for record, _ in stream(pipe(shards)).share(0, 1)]
    assert [(record.image_id, record.captions) for record in found] == [
        (record.image_id, record.captions) for record in expected.records
    ]
    for record, indexed in zip(found, expected.records, strict=True):
        assert record.image.open().tobytes() == indexed.image.open().tobytes()
    assert str(found[5].image) == f"pipe:cat {shards}/001.tar/005.png"


def test_compressed_and_joined_shards(shards, tmp_path):
    joined = b"".join((shards / f"{shard:03d}.tar").read_bytes() for shard in range(3))
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress(joined))
    assert numbers(stream(f"pipe:cat {tmp_path}/all.tar.gz").share(0, 1)) == list(range(IMAGES))


def test_captions_of_a_sample(shards):
    pairs = [(record.image_id, captions) for record, captions in stream(pipe(shards), captions_per_image=1).share(0, 1)]
    assert pairs[:3] == [("000", (0,)), ("000", (1,)), ("001", (0,))] and len(pairs) == 2 * IMAGES
    (together, *_) = stream(pipe(shards)).share(0, 1)
    assert together[1] == (0, 1)


def test_what_is_left_out_is_said_once(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            add(tar, f"{number}.png", picture(number))
            add(tar, f"{number}.mask.png", b"")  # another key's, `number` being up to the first dot: a second image
        add(tar, "7.png", picture(7))
        add(tar, "7.json", b'{"caption": 7}')
        add(tar, "8.png", picture(8))
        add(tar, "8.txt", b"a good one\n...")
        add(tar, "../9.png", picture(9))
        add(tar, "10.txt", b"no image")
    said = []
    assert numbers(stream(f"pipe:cat {tmp_path}/a.tar", say=said.append).share(0, 1)) == [8]
    shard = f"pipe:cat {tmp_path}/a.tar"
    assert said == [
        f"custom_caption: a second image under one key are left out; the first: 0.mask.png (of {shard})",
        f"custom_caption: images without a caption beside them are left out; the first: {shard}/0.png (of {shard})",
        f"custom_caption: captions that cannot be read are left out; the first: {shard}/7.png: 'caption' is neither a "
        f"text nor a list of texts (of {shard})",
        "custom_caption: names that lead out of the archive or hold control characters are left out; the first: "
        f"../9.png (of {shard})",
        f"custom_caption: captions without a word are left out; the first: {shard}/8.png (of {shard})",
    ]


@pytest.mark.parametrize("names", ["0.png 0.txt 1.png 2.png 1.txt", "1.txt 2.txt 1.png", "1.json 0.png 0.txt 1.png"])
def test_members_of_a_key_must_stand_together(tmp_path, names):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names.split():
            add(tar, name, picture(1) if name.endswith("png") else b'"one"')
    with pytest.raises(UserError, match=r"a\.tar: image and captions of '1' do not stand together, .* tar --sort=name"):
        list(stream(f"pipe:cat {tmp_path}/a.tar").share(0, 1))


# --- who reads which ---


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_go_round_all_shards(shards, world_size):
    """Two ranks read shards 0, 2, 1 and 1, 0, 2: after as many turns each, each shard was read as often."""
    shares = [numbers(stream(pipe(shards)).share(rank, world_size)) for rank in range(world_size)]
    if world_size == 2:
        assert [[share[at] // 4 for at in (0, 4, 8)] for share in shares] == [[0, 2, 1], [1, 0, 2]]
    times = 2 if world_size == 2 else 1
    assert Counter(number for share in shares for number in share) == dict.fromkeys(range(IMAGES), times)


def test_fewer_shards_than_ranks(shards):
    shares = [numbers(stream(pipe(shards)).share(rank, 4)) for rank in range(4)]
    assert shares == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_a_shard_is_opened_when_its_turn_comes(shards, tmp_path):
    logged = stream(f"pipe:echo {{0..2}} >> {tmp_path}/opened; cat {shards}/000.tar")
    assert len(list(islice(logged.share(0, 1), 5))) == 5
    assert (tmp_path / "opened").read_text().split() == ["0", "1"]


# --- the order, and where a resumed run goes on ---


def test_shuffle_buffer():
    """Nothing is lost; nothing comes more than the buffer's size too early; and not in order."""
    items = list(shuffled(range(1000), 50, random.Random(0)))
    assert sorted(items) == list(range(1000)) and items != list(range(1000))
    assert all(item <= place + 50 for place, item in enumerate(items))
    assert list(shuffled(range(9), 1, random.Random(0))) == list(range(9))
    assert sorted(shuffled(range(3), 50, random.Random(0))) == [0, 1, 2]


def loader(shards, rank=0, world_size=1, num_workers=0, accumulation=1) -> TrainLoader:
    share = RankShare(5, accumulation, rank, world_size)
    streamed = stream(pipe(shards), buffer=6)
    return stream_loader(streamed, CaptionTokenizer(), share, seed=1, num_workers=num_workers)


def contents(windows, count):
    """(image names, pixels, input ids) of the micro-batches of `count` steps."""
    found = [batch for window in islice(windows, count) for batch in window]
    return [
        ([Path(name).name for name in b.names], b.images.pixels.tolist(), b.captions.input_ids.tolist()) for b in found
    ]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("first_step", [1, 2, 3, 8])
def test_a_resumed_run_goes_on_where_it_was(shards, rank, world_size, first_step):
    """Passes of 12 samples in batches of 5: within the first pass, across its end, and several passes later."""
    whole = contents(loader(shards, rank, world_size).windows(0), 10)
    resumed = contents(loader(shards, rank, world_size).windows(0, first_step), 10 - first_step)
    assert resumed == whole[first_step:]


def test_workers_change_nothing(shards):
    expected = contents(loader(shards, accumulation=2).windows(0), 3)
    assert len(expected) == 6
    for num_workers in (1, 2):
        assert contents(loader(shards, num_workers=num_workers, accumulation=2).windows(0), 3) == expected


def test_a_pass_holds_every_image_once_in_another_order(shards):
    batches = contents(loader(shards).windows(0), 12)  # 60 samples: five passes
    names = [name for images, *_ in batches for name in images]
    passes = [names[start : start + IMAGES] for start in range(0, 60, IMAGES)]
    for one in passes:
        assert sorted(one) == [f"{number:03d}.png" for number in range(IMAGES)]
    assert len(set(map(tuple, passes))) == 5
    pairs = (pair for images, pixels, _ in batches for pair in zip(images, pixels, strict=True))
    drawn = [pixels for name, pixels in pairs if name == "000.png"]
    assert len(drawn) == 5 and drawn[0] != drawn[1]  # augmented anew each time


def test_an_unreadable_image_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(2):
            add(tar, f"{number}.png", picture(number) if number else b"no image")
            add(tar, f"{number}.txt", b"a word")
    loading = stream_loader(
        stream(f"pipe:cat {tmp_path}/a.tar"), CaptionTokenizer(), RankShare(2, 1, rank=0, world_size=1), seed=1
    )
    ((batch,),) = islice(loading.windows(0), 1)
    assert (batch.num_images, batch.num_captions) == (1, 1)
    assert batch.errors[0].startswith(f"pipe:cat {tmp_path}/a.tar/0.png: cannot read the image")
    assert torch.equal(batch.images.pixels[0], torch.zeros(3, 8, 8, dtype=torch.uint8))


# --- what can go wrong ---


def drain(*storages):
    return numbers(stream(*storages).share(0, 1))


def test_a_command_that_fails(shards):
    with pytest.raises(UserError, match=r"^pipe:cat .*nowhere\.tar ended with exit status 1$"):
        drain(pipe(shards, "nowhere.tar"))
    with pytest.raises(UserError, match=r"ended with exit status 3$"):
        drain(f"pipe:cat {shards}/000.tar; exit 3")
    with pytest.raises(UserError, match=r"ended with exit status 3$"):  # what comes is cut short, but that is not why
        drain(f"pipe:head -c 2000 {shards}/000.tar; exit 3")


@pytest.mark.parametrize("size", [700, 1000, 1536 + 100])
def test_a_shard_that_is_cut_short(shards, size):
    with pytest.raises(UserError, match=r"is damaged or no tar file: "):
        drain(f"pipe:head -c {size} {shards}/000.tar")


def test_a_damaged_header(shards, tmp_path):
    content = bytearray((shards / "000.tar").read_bytes())
    content[2048 : 2048 + 100] = b"x" * 100
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged or no tar file: bad checksum at byte 2048"):
        drain(f"pipe:cat {tmp_path}/a.tar")
    with pytest.raises(UserError, match=r"is damaged or no tar file: "):
        drain("pipe:echo no tar")


def test_a_stream_without_an_image():
    empty = stream("pipe:head -c 10240 /dev/zero")
    mine = stream_loader(empty, CaptionTokenizer(), RankShare(2, 1, rank=0, world_size=1), seed=1)
    with pytest.raises(UserError, match="a stream without an image that has captions"):
        next(mine.windows(0))


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("s3://bucket/a.tar", "only http(s):// and pipe: can be streamed, as in pipe:aws s3 cp s3://bucket/a.tar -"),
        ("https://example.org/coco.json?x=1", "only tar shards can be streamed; download it, and give the path"),
    ],
)
def test_what_cannot_be_streamed(storage, message):
    with pytest.raises(UserError) as caught:
        shards_of(storage)
    assert message in str(caught.value)


def test_leaving_early_ends_the_command(tmp_path):
    """The thread is waiting to hand on its next item; the command would go on for ever."""
    items = stream(f"pipe:while true; do cat {tmp_path}/a.tar; done; touch {tmp_path}/ended")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", picture(1))
        add(tar, "1.txt", b"a word")
        add(tar, "2.png", picture(2))
        add(tar, "2.txt", b"a word")
    ahead = read_ahead(items.share(0, 1), 1)
    assert len(list(islice(ahead, 3))) == 3
    ahead.close()
    for _ in range(100):
        if not running(str(tmp_path)):
            break
        time.sleep(0.1)
    assert not running(str(tmp_path))


def test_a_command_is_out_of_reach_of_a_ctrl_c():
    """Which a terminal sends to the training's process group."""
    group = int(b"".join(piped("cut -d' ' -f5 /proc/$$/stat")))
    assert group != os.getpgrp()


def running(text):
    commands = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())
    return any(text.encode() in command and b"while true" in command for command in commands)


# --- over the network ---


def test_shards_of_a_server_that_breaks_off(shards):
    with serving() as server:
        server.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
        server.plan = [Handler.break_off, Handler.busy, Handler.hang_up, Handler.proper]
        assert drain(server.address("/{000..002}.tar")) == list(range(IMAGES))


# --- what a run may ask of a stream ---


STEPS = ["run.runner=runner_iter", "run.max_iters=9", "run.iters_per_inner_epoch=3"]


def configured(tmp_path, *options):
    run_config = tmp_path / "run.yaml"
    run_config.write_text("model: {model_type: tiny}\ndatasets: {custom_caption: {}}\n")
    key = "datasets.custom_caption.build_info.annotations.train"
    config, _ = load_run_config(run_config, [f"{key}=pipe:cat a.tar", *options])
    return config


def test_a_stream_needs_steps(tmp_path):
    assert streams_of(configured(tmp_path, *STEPS)) == ["pipe:cat a.tar"]
    for options in ([], STEPS[:2]):
        with pytest.raises(UserError, match=r"it has no length: give run\.runner=runner_iter, run\.max_iters and"):
            streams_of(configured(tmp_path, *options))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.limit_train=5", "run.limit_train needs files"),
        ("datasets.shapes_caption={}", "nothing else can be trained on beside it"),
        ("run.train_splits=[train,val]", "nothing else can be trained on beside it"),
    ],
)
def test_what_needs_files(tmp_path, option, message):
    val = "datasets.custom_caption.build_info.annotations.val=val.json"
    config = configured(tmp_path, *STEPS, val, option)
    with pytest.raises(UserError, match=f"^pipe:cat a.tar is a stream: {message}"):
        streams_of(config)
