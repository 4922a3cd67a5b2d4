// Python module: addresses and sizes in, no arithmetic here. Tensors were checked by the caller; the GIL is released
// around every kernel, and std::invalid_argument arrives in Python as ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>

#include "cpu/isa.h"
#include "cpu/ops.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace nk::cpu;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

FloatTensor tensor(Address address, int dtype) { return {at<const void>(address), dtype}; }

void fold_scales(Address qweight, Address wscales, int wscales_dtype, int64_t padded_n, int64_t padded_k,
                 Address row_scales, Address multipliers, int64_t threads) {
    w4a8_fold_scales(at<const uint8_t>(qweight), tensor(wscales, wscales_dtype), padded_n, padded_k,
                     at<float>(row_scales), at<int16_t>(multipliers), threads);
}

void quantize(Address x, int x_dtype, int64_t tokens, int64_t channels, int64_t stride, int64_t padded_k,
              Address smooth, int smooth_dtype, double shift, Address proj_down, int proj_down_dtype, int64_t rank,
              Address codes, Address ascales, Address lora_act, int64_t threads, const std::string& isa) {
    w4a8_quantize({tensor(x, x_dtype), tokens, channels, stride, padded_k, tensor(smooth, smooth_dtype),
                   static_cast<float>(shift), tensor(proj_down, proj_down_dtype), rank, at<int8_t>(codes),
                   at<float>(ascales), at<float>(lora_act)},
                  threads, isa);
}

void accumulate(Address codes, Address qweight, Address multipliers, int64_t tokens, int64_t padded_n, int64_t padded_k,
                Address out, int64_t threads, const std::string& isa) {
    w4a8_accumulate({at<const int8_t>(codes), at<const uint8_t>(qweight), at<const int16_t>(multipliers), tokens,
                     padded_n, padded_k},
                    at<int32_t>(out), threads, isa);
}

void linear(Address codes, Address ascales, Address lora_act, int64_t rank, Address qweight, Address row_scales,
            Address multipliers, Address proj_up, int proj_up_dtype, Address rank_scale, Address wcscales,
            int wcscales_dtype, Address bias, int bias_dtype, int64_t tokens, int64_t padded_n, int64_t padded_k,
            int64_t out_features, int activation, Address gate, int gate_dtype, int64_t gate_rows, Address residual,
            int residual_dtype, Address out, int out_dtype, int64_t threads, const std::string& isa) {
    w4a8_linear({{at<const int8_t>(codes), at<const uint8_t>(qweight), at<const int16_t>(multipliers), tokens, padded_n,
                  padded_k},
                 at<const float>(ascales),
                 at<const float>(row_scales),
                 at<const float>(lora_act),
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
                 out_dtype},
                threads, isa);
}

void awq_linear(Address x, int x_dtype, int64_t tokens, int64_t in_features, int64_t stride, Address qweight,
                Address wscales, Address wzeros, int scales_dtype, Address bias, int bias_dtype, int64_t out_features,
                int64_t group_size, Address out, int out_dtype, int64_t threads, const std::string& isa) {
    w4a16_linear({tensor(x, x_dtype), tokens, in_features, stride, at<const uint16_t>(qweight), at<const void>(wscales),
                  at<const void>(wzeros), scales_dtype, tensor(bias, bias_dtype), out_features, group_size,
                  at<void>(out), out_dtype},
                 threads, isa);
}

}  // namespace

NB_MODULE(_C, module) {
    using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

    module.doc() = "CPU kernels of 4-bit linear layers on raw addresses; nunchaku_kernels.ops checks the tensors.";
    module.def("isas", &usable_isas, "Instruction sets this build has and this processor runs, best last.");
    module.def("w4a8_fold_scales", &fold_scales, "qweight"_a, "wscales"_a, "wscales_dtype"_a, "Np"_a, "Kp"_a,
               "row_scales"_a, "multipliers"_a, "threads"_a, ReleaseGil());
    module.def("w4a8_quantize", &quantize, "x"_a, "x_dtype"_a, "M"_a, "K"_a, "x_stride"_a, "Kp"_a, "smooth"_a,
               "smooth_dtype"_a, "shift"_a, "proj_down"_a, "proj_down_dtype"_a, "R"_a, "codes"_a, "ascales"_a,
               "lora_act"_a, "threads"_a, "isa"_a, ReleaseGil());
    module.def("w4a8_accumulate", &accumulate, "codes"_a, "qweight"_a, "multipliers"_a, "M"_a, "Np"_a, "Kp"_a, "out"_a,
               "threads"_a, "isa"_a, ReleaseGil());
    module.def("w4a8_linear", &linear, "codes"_a, "ascales"_a, "lora_act"_a, "R"_a, "qweight"_a, "row_scales"_a,
               "multipliers"_a, "proj_up"_a, "proj_up_dtype"_a, "rank_scale"_a, "wcscales"_a, "wcscales_dtype"_a,
               "bias"_a, "bias_dtype"_a, "M"_a, "Np"_a, "Kp"_a, "out_features"_a, "activation"_a, "gate"_a,
               "gate_dtype"_a, "gate_rows"_a, "residual"_a, "residual_dtype"_a, "out"_a, "out_dtype"_a, "threads"_a,
               "isa"_a, ReleaseGil());
    module.def("w4a16_linear", &awq_linear, "x"_a, "x_dtype"_a, "M"_a, "K"_a, "x_stride"_a, "qweight"_a, "wscales"_a,
               "wzeros"_a, "scales_dtype"_a, "bias"_a, "bias_dtype"_a, "N"_a, "group_size"_a, "out"_a, "out_dtype"_a,
               "threads"_a, "isa"_a, ReleaseGil());
}
