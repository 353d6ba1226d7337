"""Point-to-point transfers between pipeline ranks.

The rule: all transfers of one slot that involve this rank are posted as one batch, in an order both sides agree on.
NCCL matches messages of a pair in order and knows no tags; gloo is given tags as well. A receive is waited for only
when its tensor is needed, a send only when its memory is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megallm.parallel.mesh import Axis


@dataclass(frozen=True)
class Message:
    """One tensor to send to or receive from a place on the axis."""

    tensor: torch.Tensor
    peer: int
    """Place on the axis, 0 .. size-1."""
    is_send: bool
    tag: int


def post(messages: list[Message], axis: Axis) -> list[Any]:
    """Starts all messages at once; returns one waitable per message."""
    if not messages:
        return []
    operations = []
    for message in messages:
        if message.is_send:
            axis.recorder.add(axis.name, "send", message.tensor.numel(), message.tensor.element_size(), axis.size)
        call = dist.isend if message.is_send else dist.irecv
        operations.append(dist.P2POp(call, message.tensor, axis.ranks[message.peer], axis.group, message.tag))
    works = dist.batch_isend_irecv(operations)
    # A backend that coalesces a batch returns one work for all of it.
    return works if len(works) == len(messages) else works * len(messages)
