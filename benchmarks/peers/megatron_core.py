"""The benchmark's worker for megatron-core on CPU: its GPTModel, schedules, data parallelism and optimizer.

megatron-core is not made for CPUs: its makers do not support it, and its fused kernels are absent. `shim` replaces the
few places where it insists on CUDA; the arithmetic, the schedules and the communication are its own. Settings are the
fastest that run here: local layer spec, no recompute, gradient-accumulation fusion off (it needs a CUDA extension),
cross-entropy fusion off (it needs torch.compile of its jit path), overlaps on where the distributed optimizer is used.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from protocol import serve


def shim() -> None:
    """Redirects to the CPU what megatron-core does on CUDA whatever the device."""
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]  # device of parameters and buffers
    torch.cuda.synchronize = lambda *args: None  # type: ignore[assignment]  # after p2p
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    for name in ("zeros", "empty", "ones", "tensor", "full"):  # token counters and buffers on device="cuda"
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # the optimizer compares names of types
        answer = plain_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    torch.Tensor.type = cuda_type  # type: ignore[method-assign,assignment]


def _on_cpu(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return make(*args, **kwargs)

    return made


def sequence_parallel_norms() -> None:
    """The plain torch norm refuses sequence parallelism: built without it, its parameters marked by hand."""
    from megatron.core.transformer import torch_norm

    build = torch_norm.WrappedTorchNorm.__new__

    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        was, config.sequence_parallel = config.sequence_parallel, False
        norm = build(cls, config, *args, **kwargs)
        config.sequence_parallel = was
        for parameter in norm.parameters():
            parameter.sequence_parallel = was
        return norm

    torch_norm.WrappedTorchNorm.__new__ = new


def build(shape: dict[str, int], layout: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(config, model chunks wrapped in megatron's DistributedDataParallel, optimizer)."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import initialize_rng_tracker, model_parallel_cuda_manual_seed  # noqa: F401
    from megatron.core.transformer import TransformerConfig

    tp, pp, zero = layout.get("tp", 1), layout.get("pp", 1), bool(layout.get("zero", 0))
    parallel_state.initialize_model_parallel(tp, pp)
    initialize_rng_tracker(inference_rng_tracker=True)  # no dropout: its fork() is a no-op context
    config = TransformerConfig(
        num_layers=shape["layers"], hidden_size=shape["hidden"], ffn_hidden_size=shape["intermediate"],
        num_attention_heads=shape["heads"], num_query_groups=shape["kv_heads"], use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32, sequence_parallel=tp > 1 and layout.get("sequence_parallel", True),
        masked_softmax_fusion=False, persist_layer_norm=False, bias_dropout_fusion=False,
        apply_rope_fusion=False, deallocate_pipeline_outputs=True,
    )  # fmt: skip
    if config.sequence_parallel:
        sequence_parallel_norms()
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), shape["vocab"], shape["seq"],
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=zero, overlap_grad_reduce=zero, overlap_param_gather=zero
    )
    wrapped = DistributedDataParallel(config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0,
            use_distributed_optimizer=zero, overlap_param_gather=zero,
        ),
        [wrapped],
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if zero:
        config.no_sync_func = wrapped.no_sync
        config.param_sync_func = wrapped.start_param_sync
    return config, wrapped, optimizer


def main() -> None:
    """--folder of the protocol, --shape and --layout as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--layout", type=json.loads, default={})
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    shim()
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    shape = args.shape
    _, model, optimizer = build(shape, args.layout)
    generator = torch.Generator().manual_seed(1)
    rows = shape["micro_batch"] * shape["microbatches"]
    ids = torch.randint(0, shape["vocab"], (rows, shape["seq"] + 1), generator=generator)
    dp_size, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    ids = ids.chunk(dp_size)[dp_rank]
    microbatches = ids.chunk(shape["microbatches"] // dp_size)
    positions = torch.arange(shape["seq"]).expand(shape["micro_batch"], -1)
    mask = torch.ones(1, 1, shape["seq"], shape["seq"], dtype=torch.bool).triu(1)  # True = hidden
    run = get_forward_backward_func()

    def forward(data: Iterator[torch.Tensor], chunk: Any) -> tuple[torch.Tensor, Any]:
        part = next(data)
        losses = chunk(part[:, :-1].contiguous(), positions, mask, labels=part[:, 1:].contiguous())

        def reduce(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = output.mean()
            return loss, {"loss": loss.detach().clone()}

        return losses, reduce

    def step() -> float | None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(
            forward_step_func=forward, data_iterator=iter(microbatches), model=[model],
            num_microbatches=len(microbatches), seq_length=shape["seq"], micro_batch_size=shape["micro_batch"],
            forward_only=False,
        )  # fmt: skip
        optimizer.step()
        return sum(float(item["loss"]) for item in losses) / len(losses) if losses else None

    for _ in range(2):
        step()
    serve(args.folder, rank=dist.get_rank(), step=step, barrier=dist.barrier)


if __name__ == "__main__":
    main()
