"""The table of kernel names, on names as libraries give them."""

from __future__ import annotations

import ast
import re
import time

import pytest

from trace_analysis.kinds import KINDS, kind_of, with_dtype
from utils.files import ROOT

NAMES: dict[str, list[str]] = {
    "gemm bf16": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNN",
        "nvjet_tss_64x8_64x16_2x1_v_bz_splitK_TNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x4_tn_align8>(...)",
        "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_32x6_tn",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "void gemvx::kernel<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, false, true>(...)",
    ],
    "gemm fp16": [
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT",
        "ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_64x4_tn",
        "turing_h1688gemm_128x128_ldg8_tn",
        "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_cublas",
    ],
    "gemm fp8": [
        "nvjet_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT",
        "nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_cublas",
        "sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n_tilesize64x64x64_stage4_warpsize2x2x1_cublas",
        "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm90<cutlass::gemm::kernel::GemmUniversal<"
        "cute::tuple<int, int, int>, cutlass::float_e4m3_t>>>",
    ],
    "gemm int8": [
        "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize128x64x64_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16>",
        "ampere_int8_i16832gemm_int8_128x128_ldg16_stages_64x3_tn",
    ],
    "gemm fp32": [
        "ampere_sgemm_128x64_tn",
        "cutlass_80_tensorop_s1688gemm_tf32_256x128_16x3_tn_align4_f32",
        "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_warpsize2x2x1_ffma_cublas",
        "nvjet_sss_128x128_32x4_1x1_h_bz_TNN",
    ],
    "gemm": [
        "triton_tem_fused_addmm_3",
        "triton_tem_fused__softmax_bmm_1",
        "triton_mm",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
    ],
    "attention": [
        "void flash::flash_fwd_kernel<flash::Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass::bfloat16_t>>",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>(Flash_fwd_params)",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop"
        "<2, cute::tuple<cute::C<1>>, cutlass::float_e4m3_t>>>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "triton_tem_fused_flex_attention_0",
    ],
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cudnn",
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true, (cudnnKernelDataType_t)0>",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>",
        "triton_tem_fused_convolution_4",
        "triton_tem_fused_add_convolution_2",
    ],
    "norm and pointwise": [
        "triton_poi_fused_add_gelu_mul_3",
        "triton_poi_fused_convolution_silu_5",
        "triton_red_fused_add_convolution_native_group_norm_7",
        "triton_poi_fused__scaled_mm_add_3",
        "triton_poi_fused_mm_4",
        "triton_per_fused__softmax_2",
        "triton_poi_fused_cat_mul_1",
        "triton_for_fused_3",
        "triton_red_fused_add_mul_native_layer_norm_0",
        "triton_per_fused__to_copy_add_mean_mul_pow_rsqrt_2",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float>>>",
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel_GroupNorm",
    ],
    "quantize and cast": [
        "triton_red_fused__to_copy_abs_amax_clamp_div_1",
        "void at::native::unrolled_elementwise_kernel<at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::float8_copy_kernel_cuda(...)>",
        "triton_poi_fused__to_copy_7",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
        "{lambda()#3}, std::array<char*, 2ul>, 4, at::native::memory::LoadWithCast<1>, "
        "at::native::memory::StoreWithCast<1>>",
    ],
    "copy": [
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3>",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)>",
        "triton_poi_fused_cat_2",
        "triton_poi_fused_clone_11",
        "triton_poi_fused_cat_clone_3",
    ],
    "other": ["", "my_own_thing", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_names(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_every_kind_is_tested() -> None:
    assert set(NAMES) == set(KINDS)


def test_a_gemm_whose_name_is_silent_takes_the_operators_dtype() -> None:
    assert with_dtype("gemm", "bf16") == "gemm bf16"
    assert with_dtype("gemm", None) == with_dtype("gemm", "int64") == "gemm"
    assert with_dtype("attention", "bf16") == "attention"


def test_a_hostile_name_takes_no_time() -> None:
    started = time.perf_counter()
    assert kind_of("gemm" * 1_000_000) == "gemm"
    kind_of("triton_" + "_" * 1_000_000)
    assert time.perf_counter() - started < 1


OWN = {
    "_adaln_kernel": "norm and pointwise",
    "_attention_kernel": "attention",
    "wgmma_attention": "attention",
    "wgmma_linear": "gemm fp8",
    "wgmma_linear_int8": "gemm int8",
    "_concat_gelu_kernel": "norm and pointwise",
    "_gated_residual_kernel": "norm and pointwise",
    "_group_norm_moments_kernel": "norm and pointwise",
    "_group_norm_normalize_kernel": "norm and pointwise",
    "_group_norm_together_kernel": "norm and pointwise",
    "_qkv_kernel": "norm and pointwise",
    "_rows_float8_kernel": "quantize and cast",
    "_value_to_float8_kernel": "quantize and cast",
}


def own_kernels() -> set[str]:
    """Those in recipes/kernels that are launched: jitted functions that no other one calls, and CUDA C++'s kernels."""
    folder = ROOT / "recipes" / "kernels"
    jitted = [
        node
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    called = {
        call.func.id
        for function in jitted
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    in_cuda = {
        name
        for path in folder.glob("*.cu")
        for name in re.findall(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(", path.read_text())
    }
    return {function.name for function in jitted} - called | in_cuda


def test_every_kernel_of_the_recipes_has_its_kind() -> None:
    assert own_kernels() == set(OWN)
    for name, kind in OWN.items():
        assert kind_of(name) == kind_of(f"{name}_0") == kind, name
