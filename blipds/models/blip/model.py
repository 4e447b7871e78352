"""BLIP's captioner: image encoder, text decoder, loss and generation (BLIP paper, arXiv 2201.12086, section 3)."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blipds.models.blip.text_decoder import TextDecoder
from blipds.models.generation import GenerationConfig, Lockstep, StepDecoder, beam_search, single_search
from blipds.models.loss import smoothed_cross_entropy


class BlipCaption(nn.Module):
    """`label_smoothing`: 0.1 in the paper's code. `freeze_vit`: the encoder neither learns nor drops."""

    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_decoder: TextDecoder,
        *,
        label_smoothing: float = 0.1,
        freeze_vit: bool = False,
    ) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_decoder = text_decoder
        self.label_smoothing = label_smoothing
        self.freeze_vit = freeze_vit
        self.compiled = False
        if freeze_vit:
            self.visual_encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> "BlipCaption":
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        return self

    def constants(self) -> dict[str, float]:
        """Constants that no tensor of a checkpoint shows."""
        from blipds.models.blip.geometry import constants_of

        return constants_of(self)

    def compile_layers(self) -> None:
        """Has torch.compile fuse what lies between the matrix products of a layer.

        Layer by layer, since all layers of a kind share what is compiled for the first: seconds instead of minutes.
        Captions are generated without: they grow by the token, and each length would be compiled.
        """
        self.compiled = True
        for layer in (*self.visual_encoder.blocks, *self.text_decoder.bert.encoder.layer):
            layer.compile()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
    ) -> Tensor:
        """The sum (not the mean) of the smoothed cross-entropy over the labelled positions, a scalar in fp32.

        pixel_values (I, 3, H, W), or their image_embeds (I, N, width); input_ids, position_ids, segment_ids (I, L):
        a row for all captions of an image, as data/caption_rows.py makes it; label_positions (P,) indices into the
        flattened I x L whose next token is `labels` (P,). P may be 0: the loss is then 0 and has a gradient of 0.
        """
        if image_embeds is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
                image_embeds = self.visual_encoder(pixel_values)
        logits = self.text_decoder(
            input_ids,
            image_embeds,
            position_ids=position_ids,
            segment_ids=segment_ids,
            label_positions=label_positions,
        )
        return smoothed_cross_entropy(logits, labels, self.label_smoothing)

    def generate(
        self,
        prompt_ids: Tensor,
        eos_token_id: int,
        config: GenerationConfig,
        uniform: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        any_rank: Callable[[bool], bool] | None = None,
    ) -> list[list[int]]:
        """Token ids of captions, prompt (P,) included, closing token not: `config.num_captions` an image from beams,
        one image after the other; one an image else.

        `uniform` (I, max_len): the random numbers of nucleus sampling, unused otherwise. The images: pixel_values
        (I, 3, H, W), or their image_embeds (I, N, width). Under ZeRO-3 the parameters must be gathered around the call,
        or all ranks make it together and give `any_rank` (generation.Lockstep).
        """
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with torch.no_grad(), eager:
            if image_embeds is None:
                image_embeds = self.visual_encoder(pixel_values)
            decoder: StepDecoder = CachedDecoder(self.text_decoder, image_embeds, config.max_len)
            if any_rank is not None:
                decoder = Lockstep(decoder, any_rank)
            if config.use_nucleus_sampling:
                assert uniform is not None
                sequences = single_search(decoder, prompt_ids, len(image_embeds), eos_token_id, config, uniform)
            else:
                search = single_search if config.num_beams == 1 else beam_search
                sequences = search(decoder, prompt_ids, len(image_embeds), eos_token_id, config)
            if isinstance(decoder, Lockstep):
                decoder.finish()
            return sequences


class CachedDecoder:
    """The text decoder as generation sees it (`generation.StepDecoder`), with the caches of all its layers."""

    def __init__(self, text_decoder: TextDecoder, image_embeds: Tensor, max_length: int) -> None:
        self.text_decoder = text_decoder
        self.images = len(image_embeds)
        self.beams = 1
        self.caches = text_decoder.start_caches(image_embeds, max_length)

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        logits = self.text_decoder(prompt_ids.expand(self.images, -1), caches=self.caches)
        self.beams = beams
        for cache in self.caches:
            cache.expand(beams)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self.text_decoder(tokens.reshape(-1, 1), caches=self.caches).view(*tokens.shape, -1)

    def rows(self, images: Tensor) -> Tensor:
        """Rows of text (I * K) that belong to some images."""
        return (images.unsqueeze(-1) * self.beams + torch.arange(self.beams, device=images.device)).flatten()

    def reorder(self, parents: Tensor) -> None:
        first = torch.arange(self.images, device=parents.device).unsqueeze(-1) * self.beams
        for cache in self.caches:
            cache.reorder((first + parents).flatten())

    def keep(self, images: Tensor) -> None:
        rows = self.rows(images)
        self.images = len(images)
        for cache in self.caches:
            cache.keep(images, rows)
