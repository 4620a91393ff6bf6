"""What a kernel does, by its name: the table that sorts kernels into kinds.

Names: cuBLAS and cuBLASLt (nvjet, xmma, cutlass_*), cuDNN, CUTLASS, FlashAttention 2 and 3, Triton and Inductor
(triton_<poi|per|red|for|tem>_fused_<operators>), PyTorch's own (at::native::...), and those in recipes/kernels.
"""

from __future__ import annotations

import re
from functools import lru_cache

GEMM, ATTENTION, CONVOLUTION = "gemm", "attention", "convolution"
POINTWISE, QUANTIZE, COPY, OTHER = "norm and pointwise", "quantize and cast", "copy", "other"
DTYPES = ("bf16", "fp16", "fp8", "int8", "fp32")
# The order of tables and charts.
KINDS = (
    *(f"{GEMM} {dtype}" for dtype in DTYPES), GEMM, ATTENTION, CONVOLUTION, POINTWISE, QUANTIZE, COPY, OTHER,
)  # fmt: skip

# Kernels that Inductor generates by itself: pointwise, reductions and lists of those. Their names hold the operators
# that their inputs come from, too, GEMMs and convolutions among them; Inductor's templates for those are triton_tem_.
FUSED = re.compile(r"triton_(poi|per|red|for)_")

# The first row whose pattern is found in the name decides. A dtype is part of a GEMM's kind.
_TABLE: tuple[tuple[str, str], ...] = (
    (r"^Memcpy|^Memset", COPY),
    (rf"^{FUSED.pattern}fused(_cat|_clone)+_\d", COPY),
    (rf"^{FUSED.pattern}(.*(amax|quantize|float8|e4m3|e5m2)|fused(__to_copy)+_\d)", QUANTIZE),
    (rf"^{FUSED.pattern}", POINTWISE),
    # Of recipes/kernels; Inductor appends a number.
    (r"^(_attention_kernel|wgmma_attention)(_\d+)?$", ATTENTION),
    (r"^wgmma_linear(_\d+)?$", "gemm fp8"),
    (r"^wgmma_linear_int8(_\d+)?$", "gemm int8"),
    (r"^_(rows|value_to)_float8_kernel(_\d+)?$", QUANTIZE),
    (r"^_(adaln|concat_gelu|gated_residual|qkv)_kernel(_\d+)?$", POINTWISE),
    # Attention before GEMM: FlashAttention-3 is a CUTLASS kernel, and cuDNN's names its GEMMs.
    (r"flash_(fwd|bwd)|flash::|FlashAttn|fmha|mha_fwd|_attention_fwd|sdpa|_sdp_|flex_attention", ATTENTION),
    (r"PyTorchMemEffAttention|AttentionKernel|attention_kernel|cunn_SoftMax|softmax_warp", ATTENTION),
    (r"implicit_gemm|implicit_convolve|wgrad|dgrad|fprop|cudnn.*conv|conv2d|conv3d|winograd|nchwToNhwc", CONVOLUTION),
    (r"nhwcToNchw|nhwcAddPadding|im2col|triton_tem_.*convolution|cudnn::ops::", CONVOLUTION),
    # The letters after nvjet_ are the dtypes of A, B and the rest: t bf16, h fp16, q or o fp8, s fp32 (TF32), i int8.
    (r"nvjet_(sm\d+_)?[qo]", "gemm fp8"),
    (r"nvjet_(sm\d+_)?t", "gemm bf16"),
    (r"nvjet_(sm\d+_)?h", "gemm fp16"),
    (r"nvjet_(sm\d+_)?i", "gemm int8"),
    (r"nvjet_(sm\d+_)?s", "gemm fp32"),
    (r"gemm.*(e4m3|e5m2)|(e4m3|e5m2).*gemm|float_e4m3|float_e5m2|gemm.*fp8|fp8.*gemm|f8f8|_scaled_mm", "gemm fp8"),
    (r"gemm.*(s8|int8)|(s8|int8).*gemm|i8i8|imma|_int_mm", "gemm int8"),
    (r"gemm.*(bf16|bfloat16)|(bf16|bfloat16).*gemm|gemvx?.*__nv_bfloat16|s\d+16\d*bf16", "gemm bf16"),
    (r"gemm.*(f16|fp16|half)|(f16|fp16|half).*gemm|hgemm|h\d+gemm|gemv.*__half", "gemm fp16"),
    (r"sgemm|gemm.*(tf32|f32|float)|(tf32|f32).*gemm|gemv.*float", "gemm fp32"),
    (r"gemm|gemv|splitK_?[Rr]educe|cublasLt|triton_(tem|mm)|cutlass", GEMM),
    (r"copy_kernel.*(LoadWithCast|StoreWithCast)|_cast_kernel", QUANTIZE),
    (r"CatArray|copy_device_to_device|direct_copy_kernel", COPY),
    (r"amax|quantize|float8|e4m3|e5m2|(bfloat16|float16|float8)_copy_kernel", QUANTIZE),
    (r"elementwise|norm|Norm|reduce_kernel|Functor|gelu|silu|rope|rotary", POINTWISE),
    (r"index|gather|arange|[Ff]ill|scan|upsample|where", POINTWISE),
)
_COMPILED = tuple((re.compile(pattern), kind) for pattern, kind in _TABLE)


@lru_cache(maxsize=65536)
def kind_of(kernel: str) -> str:
    """One of KINDS."""
    text = kernel[:4096]  # C++ templates are long, no more than that; a hostile name is
    return next((kind for pattern, kind in _COMPILED if pattern.search(text)), OTHER)


def with_dtype(kind: str, dtype: str | None) -> str:
    """A GEMM whose name doesn't say its dtype gets the operator's, where that is known."""
    return f"{GEMM} {dtype}" if kind == GEMM and dtype in DTYPES else kind
