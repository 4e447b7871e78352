"""`model.cache_image_embeds`: what a frozen image encoder makes of every image, computed once and kept on disk."""

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn
from tqdm import tqdm

from blipds import distributed
from blipds.config.sections import Config, RunConfig
from blipds.data.datasets import CaptionDataset
from blipds.data.images import EmbedStore, embeds_key
from blipds.data.loader import EvalLoader
from blipds.engine import Engine
from blipds.errors import UserError
from blipds.files.paths import user_path
from blipds.models.parameters import fingerprint


def cache_image_embeds(
    engine: Engine, config: Config, datasets: Sequence[CaptionDataset], say: Callable[[str], None]
) -> None:
    """From here on the datasets read features instead of pixels; missing ones are computed. Collective.

    They are bf16, whatever the precision of the engine.
    """
    given = config.model.cache_image_embeds
    folder = user_path(given if isinstance(given, str) else f"{config.env.cache_root}/image_embeds")
    with engine.evaluating() as model:
        encoder: nn.Module = model.image_encoder
        constants = model.constants().values()
        # the name tells encoders apart whose weights alone do not (the number of heads)
        encoder_hash = fingerprint(encoder, config.model.encoder_name, engine.precision, *constants)
        for dataset in datasets:
            side = dataset.image_processor.image_size
            blank = torch.zeros(1, 3, side, side, device=engine.device, dtype=engine.dtype)
            _, tokens, width = encoder(blank).shape
            key = embeds_key(encoder_hash, dataset.records, dataset.image_processor)
            store = EmbedStore(folder, key, len(dataset.records), tokens, width)
            missing = my_share(store)
            size = f"{store.images:,} images x {tokens} x {width}, {store.images * store.row_bytes / 1e9:.1f} GB"
            if missing:
                say(f"features   {dataset.name}: {len(missing):,} images a rank to compute, of {size}")
            fill(store, dataset, missing, encoder, engine, config.run)
            say(f"features   {dataset.name}: {size}, in {store.rows_path}")
            dataset.features = store


def refuse_random_processors(datasets: Sequence[CaptionDataset]) -> None:
    for dataset in datasets:
        if dataset.image_processor.is_random:
            raise UserError(
                f"model.cache_image_embeds keeps one encoding an image, but the processor of datasets.{dataset.name} "
                "draws at random: give vis_processor.train.name=blip_image_eval"
            )


def my_share(store: EmbedStore) -> list[int]:
    """Allocates the store and returns which of its missing images this rank computes. Collective.

    Where all machines see one folder, all ranks share the work; otherwise the ranks of each machine fill its own.
    """
    folder = store.rows_path.parent
    token = folder / f"{distributed.broadcast(uuid.uuid4().hex)}.tmp"
    with distributed.raising_together():
        if distributed.local_rank() == 0:
            store.allocate()
        if distributed.is_main():
            token.touch()
    one_folder = all(distributed.gather(token.exists()))
    if distributed.is_main():
        token.unlink()
    rank, ranks = distributed.local_rank(), distributed.local_world_size()
    if one_folder:
        rank, ranks = distributed.rank(), distributed.world_size()
    missing = store.missing()
    distributed.barrier()  # nobody writes before all have read what is missing
    return missing[rank::ranks]


def fill(
    store: EmbedStore,
    dataset: CaptionDataset,
    missing: Sequence[int],
    encoder: nn.Module,
    engine: Engine,
    run: RunConfig,
) -> None:
    """Computes and stores the features of some images. Collective.

    An image that cannot be read stays missing: training and evaluation report it by name.
    """
    loader = EvalLoader(dataset, missing, batch_size=run.batch_size_eval, num_workers=run.num_workers)
    shown = None if distributed.is_main() and missing else True
    bar = tqdm(desc=f"features of {dataset.name}", total=len(missing), unit="image", leave=False, disable=shown)
    # a thread writes, so that the disk has a batch while the encoder has the next
    with distributed.raising_together(), bar, ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[None] = writer.submit(lambda: None)
        try:
            for batch in loader:
                if batch.indices:
                    pixel_values = batch.images.model_inputs(engine.device, engine.dtype)["pixel_values"]
                    embeds = encoder(pixel_values).to("cpu", torch.bfloat16)
                    writing.result()
                    writing = writer.submit(store.write, batch.indices, embeds)
                bar.update(len(batch.indices) + len(batch.errors))
            writing.result()
        except OSError as error:
            raise UserError(f"model.cache_image_embeds: cannot write to {store.rows_path}: {error}") from error
