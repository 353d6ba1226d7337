"""AdamW as it is launched: each dtype of gradients, with and without low-precision copies."""

from __future__ import annotations

import triton.language as tl

from megallm.testing.compiled_kernel import CompileCase
from megallm_kernels import adamw, adamw_plan

_FLOATS = ("log_beta1", "log_beta2", "weight1", "weight2", "eps", "weight_decay")
_SCALARS = ("step", "learning_rate", "grad_divisor", "is_bad")


def cases() -> list[CompileCase]:
    """A set of a billion elements on 132 multiprocessors, where the chunks are largest."""
    launch = adamw_plan.plan(10**9, arch=90, num_sms=132)
    out = []
    for gradient in (tl.float32, tl.bfloat16):
        for copy in (None, tl.bfloat16):
            out.append(
                CompileCase(
                    name=f"grad {gradient} copy {copy}",
                    kernel=adamw.adamw_kernel,
                    signature={
                        "table": "*i64", "chunks": "*i32", "ticket": "*i32",
                        **{name: "*fp32" for name in _SCALARS}, **{name: "fp32" for name in _FLOATS},
                    },
                    constexprs={
                        "GRADIENT": gradient, "COPY": copy, "COLUMNS": adamw_plan.COLUMNS, "CHUNK": launch.chunk,
                        "BLOCK": launch.block,
                    },
                    num_warps=launch.num_warps,
                )
            )  # fmt: skip
    return out
