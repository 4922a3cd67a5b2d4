// Python module: addresses and sizes in, no arithmetic here. Tensors were checked by the caller; the GIL is released
// around every kernel, and std::invalid_argument arrives in Python as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"
#ifdef NK_CUDA
#include "cuda/ops.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;
using namespace nk;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

FloatTensor tensor(Address address, int dtype) { return {at<const void>(address), dtype}; }

FoldArguments fold_scales(Address qweight, Address wscales, int wscales_dtype, int64_t padded_n, int64_t padded_k,
                          Address row_scales, Address multipliers) {
    return {at<const uint8_t>(qweight), tensor(wscales, wscales_dtype), padded_n, padded_k,
            at<float>(row_scales),      at<int16_t>(multipliers)};
}

QuantizeArguments quantize(Address x, int x_dtype, int64_t tokens, int64_t channels, int64_t stride, int64_t padded_k,
                           Address smooth, int smooth_dtype, double shift, Address proj_down, int proj_down_dtype,
                           int64_t rank, Address codes, Address ascales, Address lora_act) {
    return {tensor(x, x_dtype),
            tokens,
            channels,
            stride,
            padded_k,
            tensor(smooth, smooth_dtype),
            static_cast<float>(shift),
            tensor(proj_down, proj_down_dtype),
            rank,
            at<int8_t>(codes),
            at<float>(ascales),
            at<void>(lora_act)};
}

#ifdef NK_CUDA
QuantizeNormArguments quantize_norm(Address x, int x_dtype, int64_t tokens, int64_t channels, int64_t stride,
                                    int64_t padded_k, Address scale, Address shift, int64_t rows, double eps,
                                    Address smooth, int smooth_dtype, Address proj_down, int proj_down_dtype,
                                    int64_t rank, Address codes, Address ascales, Address lora_act) {
    return {quantize(x, x_dtype, tokens, channels, stride, padded_k, smooth, smooth_dtype, 0, proj_down,
                     proj_down_dtype, rank, codes, ascales, lora_act),
            {tensor(scale, x_dtype), tensor(shift, x_dtype), rows, static_cast<float>(eps)}};
}
#endif

struct AccumulateArguments {
    ProductArguments product;
    int32_t* sums;
};

AccumulateArguments accumulate(Address codes, Address qweight, Address multipliers, int64_t tokens, int64_t padded_n,
                               int64_t padded_k, Address out) {
    return {{at<const int8_t>(codes), at<const uint8_t>(qweight), at<const int16_t>(multipliers), tokens, padded_n,
             padded_k},
            at<int32_t>(out)};
}

LinearArguments linear(Address codes, Address ascales, Address lora_act, int64_t rank, Address qweight,
                       Address row_scales, Address multipliers, Address proj_up, int proj_up_dtype, Address rank_scale,
                       Address wcscales, int wcscales_dtype, Address bias, int bias_dtype, int64_t tokens,
                       int64_t padded_n, int64_t padded_k, int64_t out_features, int activation, Address gate,
                       int gate_dtype, int64_t gate_rows, Address residual, int residual_dtype, Address out,
                       int out_dtype) {
    return {accumulate(codes, qweight, multipliers, tokens, padded_n, padded_k, 0).product,
            at<const float>(ascales),
            at<const float>(row_scales),
            at<const void>(lora_act),
            rank,
            tensor(proj_up, proj_up_dtype),
            at<const float>(rank_scale),
            tensor(wcscales, wcscales_dtype),
            tensor(bias, bias_dtype),
            out_features,
            activation,
            tensor(gate, gate_dtype),
            gate_rows,
            tensor(residual, residual_dtype),
            at<void>(out),
            out_dtype};
}

#ifdef NK_CUDA
HeadArguments linear_heads(Address codes, Address ascales, Address lora_act, int64_t rank, Address qweight,
                           Address row_scales, Address multipliers, Address proj_up, int proj_up_dtype,
                           Address rank_scale, Address wcscales, int wcscales_dtype, Address bias, int bias_dtype,
                           int64_t tokens, int64_t padded_n, int64_t padded_k, int64_t samples, int64_t heads,
                           Address norm_q, int norm_q_dtype, Address norm_k, int norm_k_dtype, float eps,
                           Address rotary, int64_t first_token, int64_t out_tokens, Address out, int out_dtype) {
    return {linear(codes, ascales, lora_act, rank, qweight, row_scales, multipliers, proj_up, proj_up_dtype, rank_scale,
                   wcscales, wcscales_dtype, bias, bias_dtype, tokens, padded_n, padded_k, 3 * 128 * heads, 0, 0, 0, 0,
                   0, 0, out, out_dtype),
            samples,
            heads,
            tensor(norm_q, norm_q_dtype),
            tensor(norm_k, norm_k_dtype),
            eps,
            at<const float>(rotary),
            first_token,
            out_tokens};
}
#endif

AwqArguments awq_linear(Address x, int x_dtype, int64_t tokens, int64_t in_features, int64_t stride, Address qweight,
                        Address wscales, Address wzeros, int scales_dtype, Address bias, int bias_dtype,
                        int64_t out_features, int64_t group_size, Address out, int out_dtype) {
    return {tensor(x, x_dtype),
            tokens,
            in_features,
            stride,
            at<const uint16_t>(qweight),
            at<const void>(wscales),
            at<const void>(wzeros),
            scales_dtype,
            tensor(bias, bias_dtype),
            out_features,
            group_size,
            at<void>(out),
            out_dtype};
}

L1ChangeArguments l1_change(Address current, int64_t current_sample_stride, int64_t current_token_stride,
                            Address origin, int64_t origin_sample_stride, int64_t origin_token_stride, Address previous,
                            int64_t previous_sample_stride, int64_t previous_token_stride, int dtype, int64_t samples,
                            int64_t tokens, int64_t channels, Address counted, int64_t block_tokens, Address blocks,
                            Address sums) {
    return {{at<const void>(current), current_sample_stride, current_token_stride},
            {at<const void>(origin), origin_sample_stride, origin_token_stride},
            {at<const void>(previous), previous_sample_stride, previous_token_stride},
            dtype,
            samples,
            tokens,
            channels,
            at<const int64_t>(counted),
            block_tokens,
            at<double>(blocks),
            at<double>(sums)};
}

// The arguments of every operator, under the names Python gives them; what says where to run comes behind them.
const auto fold_names =
    std::make_tuple("qweight"_a, "wscales"_a, "wscales_dtype"_a, "Np"_a, "Kp"_a, "row_scales"_a, "multipliers"_a);
const auto quantize_names =
    std::make_tuple("x"_a, "x_dtype"_a, "M"_a, "K"_a, "x_stride"_a, "Kp"_a, "smooth"_a, "smooth_dtype"_a, "shift"_a,
                    "proj_down"_a, "proj_down_dtype"_a, "R"_a, "codes"_a, "ascales"_a, "lora_act"_a);
#ifdef NK_CUDA
const auto quantize_norm_names = std::make_tuple(
    "x"_a, "x_dtype"_a, "M"_a, "K"_a, "x_stride"_a, "Kp"_a, "scale"_a, "shift"_a, "rows"_a, "eps"_a, "smooth"_a,
    "smooth_dtype"_a, "proj_down"_a, "proj_down_dtype"_a, "R"_a, "codes"_a, "ascales"_a, "lora_act"_a);
#endif
const auto accumulate_names = std::make_tuple("codes"_a, "qweight"_a, "multipliers"_a, "M"_a, "Np"_a, "Kp"_a, "out"_a);
const auto linear_names =
    std::make_tuple("codes"_a, "ascales"_a, "lora_act"_a, "R"_a, "qweight"_a, "row_scales"_a, "multipliers"_a,
                    "proj_up"_a, "proj_up_dtype"_a, "rank_scale"_a, "wcscales"_a, "wcscales_dtype"_a, "bias"_a,
                    "bias_dtype"_a, "M"_a, "Np"_a, "Kp"_a, "out_features"_a, "activation"_a, "gate"_a, "gate_dtype"_a,
                    "gate_rows"_a, "residual"_a, "residual_dtype"_a, "out"_a, "out_dtype"_a);
#ifdef NK_CUDA
const auto linear_heads_names = std::make_tuple(
    "codes"_a, "ascales"_a, "lora_act"_a, "R"_a, "qweight"_a, "row_scales"_a, "multipliers"_a, "proj_up"_a,
    "proj_up_dtype"_a, "rank_scale"_a, "wcscales"_a, "wcscales_dtype"_a, "bias"_a, "bias_dtype"_a, "M"_a, "Np"_a,
    "Kp"_a, "samples"_a, "heads"_a, "norm_q"_a, "norm_q_dtype"_a, "norm_k"_a, "norm_k_dtype"_a, "eps"_a, "rotary"_a,
    "first_token"_a, "out_tokens"_a, "out"_a, "out_dtype"_a);
#endif
const auto awq_names =
    std::make_tuple("x"_a, "x_dtype"_a, "M"_a, "K"_a, "x_stride"_a, "qweight"_a, "wscales"_a, "wzeros"_a,
                    "scales_dtype"_a, "bias"_a, "bias_dtype"_a, "N"_a, "group_size"_a, "out"_a, "out_dtype"_a);
const auto l1_change_names = std::make_tuple(
    "current"_a, "current_sample_stride"_a, "current_token_stride"_a, "origin"_a, "origin_sample_stride"_a,
    "origin_token_stride"_a, "previous"_a, "previous_sample_stride"_a, "previous_token_stride"_a, "dtype"_a, "B"_a,
    "T"_a, "C"_a, "counted"_a, "block_tokens"_a, "blocks"_a, "sums"_a);

template <class Function, class Names, class... Where>
void define(nb::module_& module, const char* name, Function function, const Names& names, const Where&... where) {
    std::apply(
        [&](const auto&... argument) {
            module.def(name, function, argument..., where..., nb::call_guard<nb::gil_scoped_release>());
        },
        names);
}

// Functions of addresses, sizes and where to run, from one that makes an operator's arguments and one that runs it.
template <class Arguments, class... Plain, class Run>
auto on_cpu(Arguments (*make)(Plain...), Run run) {
    return [=](Plain... plain, int64_t threads, const std::string& isa) { run(make(plain...), threads, isa); };
}

void define_cpu(nb::module_& module) {
    module.def("isas", &cpu::usable_isas, "Instruction sets this build has and this processor runs, best last.");
    define(module, "w4a8_fold_scales", on_cpu(fold_scales, cpu::w4a8_fold_scales), fold_names, "threads"_a, "isa"_a);
    define(module, "w4a8_quantize", on_cpu(quantize, cpu::w4a8_quantize), quantize_names, "threads"_a, "isa"_a);
    define(module, "w4a8_accumulate",
           on_cpu(accumulate, [](const AccumulateArguments& a, int64_t threads,
                                 const std::string& isa) { cpu::w4a8_accumulate(a.product, a.sums, threads, isa); }),
           accumulate_names, "threads"_a, "isa"_a);
    define(module, "w4a8_linear", on_cpu(linear, cpu::w4a8_linear), linear_names, "threads"_a, "isa"_a);
    define(module, "w4a16_linear", on_cpu(awq_linear, cpu::w4a16_linear), awq_names, "threads"_a, "isa"_a);
    define(module, "l1_change", on_cpu(l1_change, cpu::l1_change), l1_change_names, "threads"_a, "isa"_a);
}

#ifdef NK_CUDA
template <class Arguments, class... Plain, class Run>
auto on_cuda(Arguments (*make)(Plain...), Run run) {
    return [=](Plain... plain, int64_t device, Address stream, const std::string& isa) {
        return run(make(plain...), cuda::Launch{device, at<CUstream_st>(stream), isa});
    };
}

void define_cuda(nb::module_ module) {
    const auto define_op = [&](const char* name, auto function, const auto& names) {
        define(module, name, function, names, "device"_a, "stream"_a, "isa"_a);
    };
    module.doc() = "The same operators on NVIDIA GPUs, launched on a stream.";
    module.def("isas", &cuda::usable_isas, "device"_a, "Kernel sets of this build that run on a device, best last.");
    define_op("w4a8_fold_scales", on_cuda(fold_scales, cuda::w4a8_fold_scales), fold_names);
    define_op("w4a8_quantize", on_cuda(quantize, cuda::w4a8_quantize), quantize_names);
    define_op("w4a8_quantize_norm", on_cuda(quantize_norm, cuda::w4a8_quantize_norm), quantize_norm_names);
    define_op("w4a8_accumulate",
              on_cuda(accumulate, [](const AccumulateArguments& a,
                                     const cuda::Launch& launch) { cuda::w4a8_accumulate(a.product, a.sums, launch); }),
              accumulate_names);
    define_op("w4a8_linear", on_cuda(linear, cuda::w4a8_linear), linear_names);
    define_op("w4a8_linear_heads", on_cuda(linear_heads, cuda::w4a8_linear_heads), linear_heads_names);
    define_op("w4a16_linear", on_cuda(awq_linear, cuda::w4a16_linear), awq_names);
    define_op("l1_change", on_cuda(l1_change, cuda::l1_change), l1_change_names);
}
#endif

}  // namespace

NB_MODULE(_C, module) {
    module.doc() = "Kernels of 4-bit linear layers on raw addresses; nunchaku_kernels.ops checks the tensors.";
    define_cpu(module);
#ifdef NK_CUDA
    define_cuda(module.def_submodule("cuda"));
#endif
}
