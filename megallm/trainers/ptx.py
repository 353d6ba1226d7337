"""Text that is trained on beside the policy's own answers, so that it forgets less (PPO-ptx, arXiv 2203.02155)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallm.data.finetune import SftDataset
from megallm.parallel.logprobs import IGNORE_INDEX
from megallm.trainers.losses import Batch


@dataclass(frozen=True, kw_only=True)
class PretrainingRows:
    """As many rows of text as a minibatch has answers."""

    dataset: SftDataset
    """Not packed."""
    coefficient: float

    def add_to(self, minibatch: Batch, *, number: int, count: int) -> Batch:
        """The minibatch with its rows of text behind; `number`: of the minibatch in the run.

        count: what the policy's loss is divided by; their tokens weigh so much that their mean counts `coefficient`.
        """
        size = len(minibatch["input_ids"])
        indices = range(number * size, (number + 1) * size)
        rows = {name: torch.as_tensor(array) for name, array in self.dataset.collate(
            indices, num_samples=size, whole=indices).items()}  # fmt: skip
        labels = rows["labels"]
        trained = labels != IGNORE_INDEX
        weight = self.coefficient * max(count, 1) / max(int(trained.sum()), 1)  # never 0, which means no text
        weights = torch.where(trained, weight, 0.0)
        width = max(minibatch["input_ids"].size(1), labels.size(1))
        wide = {name: tensor for name, tensor in minibatch.items() if tensor.dim() == 2}
        joined = {
            name: torch.cat([_padded(tensor, width, name), _padded(rows[name], width, name) if name in rows
                             else tensor.new_zeros(size, width)])
            for name, tensor in wide.items()
        }  # fmt: skip
        joined["lengths"] = torch.cat([minibatch["lengths"], rows["lengths"]])
        policy = torch.zeros(size, width)
        joined["ptx_weights"] = torch.cat([policy, _padded(weights, width, "ptx_weights")])
        return joined


def _padded(tensor: torch.Tensor, width: int, name: str) -> torch.Tensor:
    fill = IGNORE_INDEX if name == "labels" else 0
    return torch.nn.functional.pad(tensor, (0, width - tensor.size(1)), value=fill)
