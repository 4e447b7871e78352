"""What a step learns from: an objective turns a batch into weights on the log-probabilities of tokens."""

from abc import ABC, abstractmethod

from torch import Tensor

from blipds.config.sections import Config
from blipds.data.loader import Batch
from blipds.engine import Engine
from blipds.registry import OBJECTIVES


class Objective(ABC):
    """The training loop asks the objective, and the objective asks the model.

    The gradient of a step is that of the micro-batches' losses, summed over the global batch and divided by the sum of
    their weights. To weight single tokens, give the model `label_weights` beside the inputs of the batch.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def weight(self, batch: Batch) -> float:
        """What a micro-batch counts for in the average; 0: it has nothing to learn from. Costs no device sync."""

    @abstractmethod
    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch, a scalar on the device. Collective under ZeRO-3."""


@OBJECTIVES.register("cross_entropy")
class CrossEntropy(Objective):
    """The mean of the cross-entropy over all labelled tokens, smoothed by `model.label_smoothing`."""

    def weight(self, batch: Batch) -> float:
        return len(batch.captions.labels)

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        return engine.loss(batch.model_inputs(engine.device, engine.dtype))
