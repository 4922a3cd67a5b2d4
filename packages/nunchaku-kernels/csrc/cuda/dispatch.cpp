// Which kernel set serves an operator on a device.
#include <algorithm>

#include "../check.h"
#include "kernels.h"
#include "ops.h"

namespace nk::cuda {
namespace {

// Makes a device current, and the former one again.
class DeviceGuard {
public:
    explicit DeviceGuard(int64_t device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        changed_ = device != before_;
        if (changed_) check(cudaSetDevice(static_cast<int>(device)), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

int attribute(int64_t device, cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, static_cast<int>(device)), "device");
    return value;
}

// The kernel set asked for, or the best one.
std::string select(const Launch& launch) {
    const std::vector<std::string> usable = usable_isas(launch.device);
    if (launch.isa.empty() && !usable.empty()) return usable.back();
    if (std::find(usable.begin(), usable.end(), launch.isa) != usable.end()) return launch.isa;
    std::string names;
    for (const std::string& name : usable) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("isa: expected one of " + (names.empty() ? "none on this device" : names) +
                                ", given '" + launch.isa + "'");
}

}  // namespace

std::vector<std::string> usable_isas(int64_t device) {
    const int capability = 10 * attribute(device, cudaDevAttrComputeCapabilityMajor) +
                           attribute(device, cudaDevAttrComputeCapabilityMinor);
    std::vector<std::string> isas;
    if (capability >= 80) isas.push_back("sm80");
    if (capability == 90) isas.push_back("sm90");  // wgmma exists on sm_90a alone
    return isas;
}

void w4a8_fold_scales(const FoldArguments& arguments, const Launch& launch) {
    validate(arguments);
    select(launch);
    const DeviceGuard guard(launch.device);
    sm80::w4a8_fold_scales(arguments, launch.stream);
}

void w4a8_quantize(const QuantizeArguments& arguments, const Launch& launch) {
    validate(arguments);
    const std::string isa = select(launch);
    const DeviceGuard guard(launch.device);
    if (!arguments.tokens) return;
    if (isa == "sm90")
        sm90::w4a8_quantize(arguments, launch.stream);
    else
        sm80::w4a8_quantize(arguments, launch.stream);
}

bool w4a8_quantize_norm(const QuantizeNormArguments& arguments, const Launch& launch) {
    validate(arguments);
    const std::string isa = select(launch);
    const DeviceGuard guard(launch.device);
    if (!arguments.quantize.tokens) return true;
    return isa == "sm90" && sm90::w4a8_quantize_norm(arguments, launch.stream);
}

void w4a8_accumulate(const ProductArguments& product, int32_t* sums, const Launch& launch) {
    validate(product);
    if (product.tokens) require_pointer(sums, "out");
    const std::string isa = select(launch);
    const DeviceGuard guard(launch.device);
    if (!product.tokens) return;
    if (isa == "sm90" && sm90::serves(product))
        sm90::w4a8_accumulate(product, sums, launch.stream);
    else
        sm80::w4a8_accumulate(product, sums, launch.stream);
}

void w4a8_linear(const LinearArguments& arguments, const Launch& launch) {
    validate(arguments);
    const std::string isa = select(launch);
    const DeviceGuard guard(launch.device);
    if (!arguments.product.tokens) return;
    if (isa == "sm90" && sm90::serves(arguments))
        sm90::w4a8_linear(arguments, launch.stream);
    else
        sm80::w4a8_linear(arguments, launch.stream);
}

bool w4a8_linear_heads(const HeadArguments& arguments, const Launch& launch) {
    validate(arguments);
    const std::string isa = select(launch);
    const DeviceGuard guard(launch.device);
    if (!arguments.linear.product.tokens) return true;
    if (isa != "sm90" || !sm90::serves(arguments)) return false;
    sm90::w4a8_linear_heads(arguments, launch.stream);
    return true;
}

void w4a16_linear(const AwqArguments& arguments, const Launch& launch) {
    validate(arguments);
    const std::string isa = select(launch);
    const DeviceGuard guard(launch.device);
    if (!arguments.tokens) return;
    if (isa == "sm90" && sm90::serves(arguments))
        sm90::w4a16_linear(arguments, launch.stream);
    else
        sm80::w4a16_linear(arguments, launch.stream);
}

void l1_change(const L1ChangeArguments& arguments, const Launch& launch) {
    validate(arguments);
    select(launch);
    const DeviceGuard guard(launch.device);
    if (arguments.samples && arguments.tokens && arguments.channels) sm80::l1_change(arguments, launch.stream);
}

}  // namespace nk::cuda
