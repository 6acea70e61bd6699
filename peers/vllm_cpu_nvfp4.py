"""NVFP4 compute for an unmodified vLLM 0.32 on a CPU, for acceptance tests.

`register()` supplies, in this process: for dense W4A4 vLLM's own emulation kernel, listed for the
CPU; for dense W4A16, where vLLM insists on Marlin, a kernel that dequantises after loading; for
experts a per-expert loop over vLLM's reference functions. Configuration parsing, scheme choice,
create_weights, weight loaders and the handling of scales after loading stay vLLM's.
"""

import importlib

import torch

USERS_OF_SELECT = (
    "vllm.model_executor.layers.quantization.modelopt",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    ".compressed_tensors_moe_w4a4_nvfp4",
)


def register() -> None:
    register_dense()
    register_experts()


def register_dense() -> None:
    import vllm.model_executor.kernels.linear as kernels
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
    )
    from vllm.platforms.interface import PlatformEnum

    class DequantizedLinear(NvFp4LinearKernel):
        @classmethod
        def is_supported(cls, compute_capability=None):
            return True, None

        @classmethod
        def can_implement(cls, config):
            return True, None

        def process_weights_after_loading(self, layer):
            packed = layer.weight.data.view(torch.uint8)
            dtype = getattr(layer, "params_dtype", torch.bfloat16)
            scale, tensor_scale = layer.weight_scale.data, layer.weight_global_scale.data
            dense = dequantize_to_dtype(packed, scale, tensor_scale, dtype, 16, swizzle=False)
            layer.weight = torch.nn.Parameter(dense, requires_grad=False)

        def apply_weights(self, layer, x, bias=None):
            return torch.nn.functional.linear(x, layer.weight.to(x.dtype), bias)

    kernels.register_linear_kernel(kernels.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    kernels.MarlinNvFp4LinearKernel = DequantizedLinear


def register_experts() -> None:
    import vllm.model_executor.layers.fused_moe.oracle.nvfp4 as oracle

    w4a4, w4a16 = expert_kernels()
    emulation = oracle.NvFp4MoeBackend.EMULATION
    kernel_of, select = oracle.backend_to_kernel_cls, oracle.select_nvfp4_moe_backend

    def kernel_or_ours(backend):
        return [w4a4, w4a16] if backend == emulation else kernel_of(backend)

    # vLLM's own choice walks GPU-only backends, which do not even import on a CPU.
    def select_emulation(config, weight_key, activation_key):
        return emulation, (w4a16 if activation_key is None else w4a4)

    oracle.backend_to_kernel_cls = kernel_or_ours
    oracle.select_nvfp4_moe_backend = select_emulation
    for name in USERS_OF_SELECT:
        module = importlib.import_module(name)
        if getattr(module, "select_nvfp4_moe_backend", None) is select:
            module.select_nvfp4_moe_backend = select_emulation


def expert_kernels() -> tuple[type, type]:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
        ref_nvfp4_quant_dequant,
    )
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kNvfp4Dynamic,
        kNvfp4Static,
    )

    class Experts(CPUUnquantizedExperts):
        weight_only = False

        @property
        def quant_dtype(self):
            return "nvfp4"

        @staticmethod
        def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
            wanted = None if cls.weight_only else kNvfp4Dynamic
            supported = weight_key == kNvfp4Static and activation_key == wanted
            return supported, None if supported else "quant scheme"

        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key):
            return weight_key == kNvfp4Static

        def process_weights_after_loading(self, layer):
            pass

        def rounded(self, x, tensor_scale):
            return (
                x
                if self.weight_only
                else ref_nvfp4_quant_dequant(x, tensor_scale.reshape(()).float(), 16)
            )

        def apply(
            self,
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            expert_tokens_meta,
            apply_router_weight_on_input,
        ):
            config, dtype = self.quant_config, hidden_states.dtype
            silu = "silu" in str(activation.value)
            act = torch.nn.functional.silu if silu else torch.nn.functional.gelu
            x = self.rounded(hidden_states, config.a1_gscale)
            total = torch.zeros(hidden_states.shape, dtype=torch.float32)
            for e in torch.unique(topk_ids).tolist():
                token, slot = (topk_ids == e).nonzero(as_tuple=True)
                first = dequantize_to_dtype(
                    w1[e], config.w1_scale[e], config.g1_alphas[e], dtype, 16, swizzle=False
                )
                second = dequantize_to_dtype(
                    w2[e], config.w2_scale[e], config.g2_alphas[e], dtype, 16, swizzle=False
                )
                gate, up = (x[token] @ first.t()).chunk(2, -1)
                y = (self.rounded(act(gate) * up, config.a2_gscale) @ second.t()).float()
                gain = (
                    1.0
                    if apply_router_weight_on_input
                    else topk_weights[token, slot].float()[:, None]
                )
                total.index_add_(0, token, y * gain)
            output.copy_(total.to(output.dtype))

    class WeightOnlyExperts(Experts):
        weight_only = True

    return Experts, WeightOnlyExperts
