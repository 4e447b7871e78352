"""What an arch offers: all that the rest of blipds asks of a model. Adding an arch is a folder and a registry line.

An arch is a class registered in `ARCHS` under the name that `model.arch` gives it:

    @ARCHS.register("my_captioner")
    class MyArch(Arch):
        config = MyConfig                      # a dataclass: ModelConfig and keys of its own

        def build(self, config, checkpoint_fn):
            return MyCaptioner(...)            # a CaptioningModel

What is not abstract below suits an arch that reads and writes only its own checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blipds.config.sections import ModelConfig
from blipds.errors import UserError
from blipds.models.adapters import Adapters, own_name
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.checkpoints import Checkpoint, CheckpointFormat
from blipds.models.generation import (
    Drawn,
    GenerationConfig,
    Lockstep,
    SamplingConfig,
    StepDecoder,
    draw_samples,
    search,
)
from blipds.models.initialisation import RandomWeight, default_random_weights

# checkpoint_fn(function, *inputs) runs a layer, and may keep only its inputs for the backward pass (the engine's)
CheckpointFn = Callable[..., Any]


def keep_activations(function: Callable[..., Any], *inputs: Any) -> Any:
    """The `checkpoint_fn` that recomputes nothing."""
    return function(*inputs)


class CaptioningModel(nn.Module, ABC):
    """A captioner. Submodules are entered only by calling them: ZeRO-3 gathers their weights by hooks on `__call__`."""

    max_positions: int | None = None  # tokens of a text, the prompt's included; None: any number
    vocab_size: int | None = None  # rows of the embedding; None: not checked against the tokenizer
    # What the names of frozen weights begin with that a file elsewhere holds: checkpoints leave them out; None: no such
    elsewhere: str | None = None
    reads_rows = False  # whether `forward` tells the captions of a row apart; if not, candidates get a row each
    # Patterns of linear layers that `model.lora` adapts, and of parameters that learn beside, where it names none
    lora_targets: ClassVar[Sequence[str]] = ()
    lora_train_also: ClassVar[Sequence[str]] = ()
    lora: Adapters | None = None
    freeze_vit = False
    compiled = False

    @property
    @abstractmethod
    def image_encoder(self) -> nn.Module:
        """Called with pixel_values (I, 3, H, W), it gives image_embeds (I, N, width)."""

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor:
        """The sum (not the mean) of the loss over the labelled positions, a scalar in fp32.

        pixel_values (I, 3, H, W), or their image_embeds (I, N, width); input_ids, position_ids, segment_ids (I, L):
        a row for all captions of an image, as data/caption_rows.py makes it; label_positions (P,) indices into the
        flattened I x L whose next token is `labels` (P,). P may be 0: the loss is then 0 and has a gradient of 0.
        label_weights (P,): the loss is the sum of weight x -log p(label); without, that of training on captions.
        """

    @abstractmethod
    def step_decoder(self, image_embeds: Tensor, max_len: int) -> StepDecoder:
        """The decoder as generation sees it, for captions of at most `max_len` tokens, the prompt's included."""

    def layers(self) -> Sequence[nn.Module]:
        """The blocks of the model, for `run.compile`: layers of a kind share what is compiled for the first."""
        return []

    def encoder_layer(self, name: str) -> int | None:
        """Where a parameter stands in the image encoder, for `run.lr_layer_decay`.

        0: what comes before the first block; n: the n-th block; None: behind the blocks, or not in the encoder.
        """
        return None

    def random_weights(self) -> Iterator[RandomWeight]:
        """How each weight is drawn that a new model starts with; what is not named keeps what its module set."""
        return default_random_weights(self)

    def checkpoint_format(self) -> CheckpointFormat:
        """How files name and lay out these weights."""
        return CheckpointFormat()

    def completed(self, stored: StoredTensors, open_other: Callable[[str], StoredTensors]) -> StoredTensors:
        """A checkpoint with what such files leave to others (a frozen part) or split (biases): `open_other(source)`."""
        return stored

    def check_geometry(self, checkpoint: Checkpoint) -> tuple[list[str], str]:
        """UserError where a checkpoint states sizes that are not the model's, and that no tensor shows (heads).

        Returns patterns of the model's names that a part therefore cannot fill, and a line that says why.
        """
        return [], ""

    def load_parts(self, config: Any, load: Callable[[str | StoredTensors, str], None]) -> None:
        """Loads what `config` names beside whole checkpoints (an image encoder, a BERT) over the random weights.

        load(source, kind): where it is, and what kind of file it must be (`CheckpointFormat.parts`).
        """

    def identity(self) -> str:
        """What tells models apart whose weights alone do not (the number of heads)."""
        return ""

    def constants(self) -> dict[str, Any]:
        """What a file of the weights must say beside them, as JSON: what no tensor shows and no run config sets."""
        return {}

    def take_constants(self, checkpoint: Checkpoint) -> str | None:
        """Sets what `constants` wrote; a line where that changes the model."""
        return None

    def cross_attention(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """How much each token (T,) of a text looks at each patch of one image (1, 3, H, W): (T, rows, columns)."""
        raise UserError(f"{type(self).__name__} does not show where it looks: no heat maps")

    # --- what follows from the above

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Names are those of the model without adapters; theirs are LAYER.lora_A.weight and LAYER.lora_B.weight."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name if self.lora is None else own_name(name), parameter

    def get_parameter(self, target: str) -> nn.Parameter:
        return super().get_parameter(target if self.lora is None else self.lora.injected_names[target])

    def is_elsewhere(self, name: str) -> bool:
        """Whether a file elsewhere holds a frozen weight, so that checkpoints leave it out; beside adapters: all."""
        if self.lora is not None:
            return not self.get_parameter(name).requires_grad
        return self.elsewhere is not None and name.startswith(self.elsewhere)

    def checkpoint_config(self) -> dict[str, Any]:
        """What a run's checkpoints carry beside the weights, as JSON."""
        return self.constants() | (self.lora.facts() if self.lora else {})

    def freeze_image_encoder(self) -> None:
        """The encoder neither learns nor drops (`model.freeze_vit`)."""
        self.freeze_vit = True
        self.image_encoder.requires_grad_(False)
        self.image_encoder.eval()

    def train(self, mode: bool = True) -> "CaptioningModel":
        super().train(mode)
        if self.freeze_vit:
            self.image_encoder.eval()
        return self

    def encode(self, pixel_values: Tensor | None, image_embeds: Tensor | None) -> Tensor:
        """image_embeds as they are, else those of pixel_values; a frozen encoder keeps no activations."""
        if image_embeds is not None:
            return image_embeds
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vit):
            return self.image_encoder(pixel_values)

    def compile_layers(self) -> None:
        """Has torch.compile fuse what lies between the matrix products of a layer.

        Layer by layer, since all layers of a kind share what is compiled for the first: seconds instead of minutes.
        Captions are generated without: they grow by the token, and each length would be compiled.
        """
        layers = self.layers()
        if not layers:
            raise UserError(f"run.compile: {type(self).__name__} names no layers to compile")
        self.compiled = True
        for layer in layers:
            layer.compile()

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
        log_probs: list[list[float]] | None = None,
    ) -> list[list[int]]:
        """Token ids of captions, prompt (P,) included, closing token not: `config.num_captions` an image from beams,
        one image after the other; one an image else.

        `uniform` (I, max_len): the random numbers of nucleus sampling, unused otherwise. `log_probs`, where given, is
        told the log-probabilities of each caption's tokens (generation.py says which). Under ZeRO-3 the parameters
        must be gathered around the call, or all ranks make it together and give `any_rank` (generation.Lockstep).
        """
        with self.generating():
            image_embeds = self.encode(pixel_values, image_embeds)
            with self.stepping(image_embeds, config.max_len, any_rank) as decoder:
                return search(decoder, prompt_ids, len(image_embeds), eos_token_id, config, uniform, log_probs)

    def draw(
        self,
        image_embeds: Tensor,
        prompt_ids: Tensor,
        eos_token_id: int,
        config: SamplingConfig,
        uniform: Tensor,
        take: Callable[[int, list[Drawn]], None],
        any_rank: Callable[[bool], bool] | None = None,
    ) -> None:
        """Draws `config.samples` captions of each image (generation.draw_samples). Under ZeRO-3 as `generate`."""
        with self.generating(), self.stepping(image_embeds, config.max_len, any_rank) as decoder:
            draw_samples(decoder, prompt_ids, eos_token_id, config, uniform, take)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Without gradients, and without what `compile_layers` compiled."""
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with torch.no_grad(), eager:
            yield

    @contextmanager
    def stepping(
        self, image_embeds: Tensor, max_len: int, any_rank: Callable[[bool], bool] | None
    ) -> Iterator[StepDecoder]:
        """The step decoder, with `any_rank` in step with those of the other ranks; then it is collective."""
        decoder = self.step_decoder(image_embeds, max_len)
        if any_rank is None:
            yield decoder
            return
        lockstep = Lockstep(decoder, any_rank)
        yield lockstep
        lockstep.finish()

    def log_probs(self, captions: Mapping[str, Tensor], image_embeds: Tensor) -> Tensor:
        """Log-probability (P,) of every label in fp32, as generation counts it; of any arch.

        captions: the arguments of `forward` that say which; image_embeds (I, N, width): of each row. Keeps the
        activations of layers whose parameters require a gradient.
        """
        weights = torch.zeros(len(captions["labels"]), device=image_embeds.device, requires_grad=True)
        with torch.enable_grad():
            loss = self(**captions, image_embeds=image_embeds, label_weights=weights)
        # the loss is the sum of weight x -log p: its derivative by a weight is that token's -log p
        return -torch.autograd.grad(loss, weights)[0]


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model: how to build it, and what belongs to it in front and behind.

    config: image size, tokenizer and prompt are right in it. build: as `Arch.build`, of such a config. mean, std: of
    the images, None: CLIP's. decoding: values of `run` keys.
    """

    config: ModelConfig
    build: Callable[[Any, CheckpointFn], CaptioningModel]
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    decoding: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Export:
    """A checkpoint on its way out: fp32 tensors under our names, and all that other tools need beside them.

    model: built without memory for its weights. tokenizer: of transformers. generation: arguments of transformers'
    `generate`. card: Markdown (metrics, run config). overwrite: an earlier export may be replaced.
    hub_name: OWNER/NAME where it will be found on the Hugging Face hub.
    """

    model: CaptioningModel
    tensors: Mapping[str, Tensor]
    config: ModelConfig
    tokenizer: Any
    image_mean: Sequence[float]
    image_std: Sequence[float]
    generation: Mapping[str, Any]
    card: str
    overwrite: bool
    hub_name: str | None = None


class Arch(ABC):
    """What is registered in `ARCHS`."""

    dtype = torch.float32  # of the run: frozen weights that only a file sets may be built in it
    config: ClassVar[type[ModelConfig]] = ModelConfig
    model_types: ClassVar[Mapping[str, Path]] = {}  # name -> packaged defaults, a YAML file
    exports: ClassVar[Mapping[str, Callable[[Path, Export], None]]] = {}  # --format -> what writes it

    @abstractmethod
    def build(self, config: Any, checkpoint_fn: CheckpointFn) -> CaptioningModel:
        """The bare model of `config` (of the class above), weights random."""

    def image_statistics(self, config: Any) -> tuple[list[float], list[float]] | None:
        """(mean, std) of images, where the parts that the config names decide."""
        return None

    def describe(self, stored: StoredTensors) -> Description | None:
        """How the model of a checkpoint is built, where the file or folder says so in a way that this arch knows."""
        return None
