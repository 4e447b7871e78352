"""What a step learns from: an objective turns a batch into weights on the log-probabilities of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from blipds.config.sections import Config
from blipds.data.datasets import CaptionDataset
from blipds.data.loader import Batch
from blipds.data.tokenizer import CaptionTokenizer
from blipds.engine import Engine
from blipds.registry import OBJECTIVES


class Objective(ABC):
    """The training loop asks the objective, and the objective asks the model.

    The gradient of a step is that of the micro-batches' losses, summed over the global batch and divided by the sum of
    their weights. To weight single tokens, give the model `label_weights` beside the inputs of the batch.
    """

    shown: ClassVar[tuple[str, ...]] = ()  # which of `metrics` stand behind the progress bar

    def __init__(self, config: Config) -> None:
        self.config = config

    def open(self, datasets: Sequence[CaptionDataset], tokenizer: CaptionTokenizer) -> list[str]:
        """Takes what it needs of the training data (none where they are streamed); returns lines about it.

        Called once on every rank, before the model is built. UserError where they do not suit.
        """
        return []

    def facts(self) -> dict[str, Any]:
        """What the "start" line of metrics.jsonl says of it."""
        return {}

    def prepare(self, engine: Engine, window: list[Batch], step: int) -> list[Batch]:
        """The micro-batches to learn from in the step after `step`, in place of those that were loaded. Collective."""
        return window

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """What a micro-batch counts for in the average; 0: it has nothing to learn from. Costs no device sync."""

    @abstractmethod
    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch, a scalar on the device. Collective under ZeRO-3."""

    def metrics(self) -> dict[str, float]:
        """What else happened since the last call, for the log, over all ranks. Collective."""
        return {}

    def examples(self) -> list[dict[str, Any]]:
        """What was learnt from a few images of this rank in the newest step, as JSON, for the report."""
        return []


@OBJECTIVES.register("cross_entropy")
class CrossEntropy(Objective):
    """The mean of the cross-entropy over all labelled tokens, smoothed by `model.label_smoothing`."""

    def weight(self, batch: Batch) -> float:
        return len(batch.captions.labels)

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        return engine.loss(batch.model_inputs(engine.device, engine.dtype))
