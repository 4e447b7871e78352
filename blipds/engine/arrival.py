"""Gradients of compiled layers come in an order of each rank's own, and DeepSpeed adds them up as they come."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def arrive_by_layer(optimizer: Any, layers: Sequence[nn.Module]) -> None:
    """Has DeepSpeed take the gradients of a layer all at once, in the order of its parameters.

    ZeRO-2, and ZeRO-1 with `overlap_comm`, fills buckets as gradients come and reduces them by their place in the
    bucket, so that every rank must bring them in one order (DeepSpeed#2343). Ranks whose captions differ in length
    compile a layer differently, and then its gradients come in another order on each; the layers' own order stays.
    Costs the gradients of one layer, kept until its last one is there. Other stages sort gradients themselves.
    """
    if not hasattr(optimizer, "process_gradients"):
        return
    places = {
        parameter: (number, place)
        for number, layer in enumerate(layers)
        for place, parameter in enumerate(filter(lambda parameter: parameter.requires_grad, layer.parameters()))
    }
    sizes = [sum(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    waiting: list[dict[int, tuple[nn.Parameter, int]]] = [{} for _ in layers]
    process = optimizer.process_gradients

    def process_gradients(parameter: nn.Parameter, group: int) -> None:
        number, place = places.get(parameter, (None, 0))
        if number is None:
            process(parameter, group)
            return
        waiting[number][place] = parameter, group
        if len(waiting[number]) == sizes[number]:
            for _, arrived in sorted(waiting[number].items()):
                process(*arrived)
            waiting[number].clear()

    optimizer.process_gradients = process_gradients
