"""Gradients in one order on every rank, for stages that add them up by their place in a bucket."""

from typing import Any

from torch import nn


def keep_gradients_in_order(optimizer: Any, model: nn.Module) -> None:
    """Has DeepSpeed take gradients in the reverse order of the model's parameters, whenever they come.

    ZeRO-2, and ZeRO-1 with `overlap_comm`, copies gradients into buckets as they come and adds up the buckets of all
    ranks. Where a rank's gradients come in another order, those of different parameters are added up, silently
    (DeepSpeed#2343). So may those of compiled layers: ranks whose captions differ in length compile them differently.
    Here a gradient waits until its turn, or for the end of the backward pass where one before it never comes. The order
    is roughly that of the backward pass, so that few wait.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return  # of a stage that sorts gradients itself
    order = [parameter for parameter in reversed(list(model.parameters())) if parameter.requires_grad]
    places = {parameter: place for place, parameter in enumerate(order)}
    process, end = optimizer.process_gradients, optimizer.overlapping_partition_gradients_reduce_epilogue
    waiting: dict[int, tuple[nn.Parameter, int]] = {}
    turn = 0

    def process_in_order(parameter: nn.Parameter, group: int) -> None:
        nonlocal turn
        waiting[places[parameter]] = parameter, group
        while turn in waiting:
            process(*waiting.pop(turn))
            turn += 1

    def process_the_rest() -> None:
        nonlocal turn
        for place in sorted(waiting):
            process(*waiting.pop(place))
        turn = 0
        end()

    optimizer.process_gradients = process_in_order
    optimizer.overlapping_partition_gradients_reduce_epilogue = process_the_rest
