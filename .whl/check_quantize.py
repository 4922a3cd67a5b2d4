"""GPU check and timing of w4a8_quantize (and w4a8_quantize_norm where it exists): python check_quantize.py [--no-time]"""
import itertools, os, statistics, sys, time
import torch
import nunchaku_kernels
from nunchaku_kernels import _C
from nunchaku_kernels.formats import pack_lowrank_down, pack_vector
from nunchaku_kernels.ops import SCHEMAS, _native
from nunchaku_kernels.reference import w4a8 as ref

START = time.time()
OPS = torch.ops.nunchaku_kernels
GPU = torch.device("cuda", 0)
BF, HF, FP = torch.bfloat16, torch.float16, torch.float32
bad = 0


def code_position(kp):
    k = torch.arange(kp)
    rank = k % 4 * 2 + k % 8 // 4
    return k // 64 * 64 + k % 64 // 32 * 32 + rank // 4 * 16 + k % 32 // 8 * 4 + rank % 4


def raw(x, kp, smooth, shift, down):
    """The bare kernel, into poisoned outputs with guards on both sides."""
    m, k = x.shape
    rank = 0 if down is None else down.shape[1]
    G = 4096

    def out(n, dtype):
        size = n * dtype.itemsize
        buffer = torch.full((size + 2 * G + (-size % 16),), 0xFF, dtype=torch.uint8, device=GPU)
        return buffer, buffer[G : G + size].view(dtype)

    buffers, views = zip(out(m * kp, torch.int8), out(m, FP), out(m * rank, FP))
    _C.cuda.w4a8_quantize(
        x.data_ptr(), _native.dtype_code(x), m, k, x.stride(0), kp, _native.pointer(smooth), _native.dtype_code(smooth),
        shift, _native.pointer(down), _native.dtype_code(down), rank, views[0].data_ptr(), views[1].data_ptr(),
        views[2].data_ptr() if rank else 0, *_native.place(GPU, 0))
    torch.cuda.synchronize()
    for buffer, view in zip(buffers, views):
        size = view.numel() * view.dtype.itemsize
        assert (buffer[:G] == 0xFF).all() and (buffer[G + size :] == 0xFF).all(), "wrote outside an output"
    return views[0].view(m, kp), views[1], views[2].view(m, rank)


def check(isa, m, k, kp, dtype, rank, smooth_dtype, shift, view="plain", special=False):
    global bad
    g = torch.Generator().manual_seed(m * 7919 + k * 31 + rank)
    if view == "plain":
        x = torch.randn(m, k, generator=g).to(dtype).to(GPU)
    elif view == "odd":
        x = torch.randn(m * (k + 3) + 1, generator=g).to(dtype).to(GPU)[1:].view(m, k + 3)[:, :k]
    elif view == "wide":
        x = torch.randn(m, k + 64, generator=g).to(dtype).to(GPU)[:, 16 : 16 + k]
    else:
        x = torch.randn(1, k, generator=g).to(dtype).to(GPU).expand(m, k)
    if special:
        x = x.clone()
        for row, value in enumerate((0.0, 1e-38 if dtype != HF else 0.0, 6e-8)):
            if row < m:
                x[row] = value
        for row, value in ((3, float("nan")), (4, float("inf")), (5, -float("inf")), (6, 3e38 if dtype != HF else 6e4)):
            if row < m:
                x[row, (row * 37) % k] = value
    smooth = None if smooth_dtype is None else torch.rand(kp, generator=g).add(0.25).to(smooth_dtype)
    down = torch.randn(rank, kp, generator=g).mul(0.1).to(dtype) if rank else None
    pad = torch.nn.functional.pad
    packed_smooth = None if smooth is None else pack_vector(pad(smooth, (0, -kp % 128), value=1.0))[:kp].contiguous().to(GPU)
    packed_down = pack_lowrank_down(pad(down, (0, -kp % 128)))[:kp].contiguous().to(GPU) if rank else None
    os.environ["NUNCHAKU_CUDA_ISA"] = isa
    name = f"{isa} M={m} K={k}/{kp} {dtype} R={rank} smooth={smooth_dtype} shift={shift} {view}{' special' if special else ''}"
    try:
        codes, ascales, lora = raw(x, kp, packed_smooth, shift, packed_down)
    except Exception as error:  # noqa: BLE001
        print("FAIL", name, repr(error), flush=True)
        bad += 1
        if isinstance(error, RuntimeError) and "CUDA" in str(error):
            sys.exit(1)
        return
    again = raw(x, kp, packed_smooth, shift, packed_down)
    same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip((codes, ascales, lora), again) if a.numel())
    host = x.cpu()
    want, want_a = ref.quantize_tokens(host, None if smooth is None else smooth[:k], shift)
    codes, ascales = codes.cpu()[:, code_position(kp)], ascales.cpu()
    problems = []
    if not same:
        problems.append("differs from run to run")
    wrong = (codes[:, :k] != want).nonzero()
    if len(wrong):
        i, j = wrong[0].tolist()
        problems.append(f"{len(wrong)} codes differ, first ({i},{j}): {codes[i, j]} expected {want[i, j]}")
    if codes[:, k:].any():
        problems.append("codes of padding are not 0")
    nan = want_a.isnan()
    if not torch.equal(ascales.isnan(), nan) or not torch.equal(ascales[~nan].view(torch.int32), want_a[~nan].view(torch.int32)):
        problems.append("ascales differ")
    if rank:
        exact = x.double() @ down[:, :k].to(GPU).double().t()
        good = exact.isfinite().all(1) & (exact.abs().amax(1) < 1e30)
        if good.any():
            error = float((lora[good] - exact[good]).norm() / exact[good].norm().clamp_min(1e-30))
            if not error <= 1e-5:
                problems.append(f"lora_act relative error {error:.2e}")
            check.worst = max(check.worst, error if error == error else 9)
        if lora[x.double().isfinite().all(1) & (x.double().abs().amax(1) < 1e30)].isnan().any():
            problems.append("NaN in lora_act of a finite token")
    check.count += 1
    if problems:
        bad += 1
        print("FAIL", name, "; ".join(problems), flush=True)


check.count, check.worst = 0, 0.0


def correctness():
    for isa in _C.cuda.isas(0):
        for m, k, dtype, rank in itertools.product((1, 7, 33, 130), (64, 320, 3072), (BF, HF), (0, 16, 32)):
            check(isa, m, k, k, dtype, rank, BF, 0.0, special=m == 7)
        for m, k, kp in ((5, 1, 64), (9, 317, 384), (40, 3000, 3072), (40, 3001, 3072), (17, 2968, 3072)):
            for dtype, rank in ((BF, 32), (HF, 16), (FP, 0)):
                check(isa, m, k, kp, dtype, rank, HF, 0.171875, special=True)
                check(isa, m, k, kp, dtype, rank, FP, 0.0, view="odd")
                check(isa, m, k, kp, dtype, rank, None, -0.5, view="wide")
                check(isa, m, k, kp, dtype, rank, BF, 0.0, view="zero")
        for rank in (48, 64, 80, 128, 208, 1024):
            check(isa, 37, 3072, 3072, BF, rank, BF, 0.1)
            check(isa, 520, 1024, 1024, HF, rank, BF, 0.1)
        for m, k, rank in ((4608, 3072, 32), (1100, 12288, 32), (700, 15360, 32), (1400, 15360, 0), (300, 12288, 96),
                           (1030, 15360, 48), (70, 40000, 32), (9, 132992, 16), (512, 3072, 32), (3, 12288, 32),
                           (100001, 64, 16), (1025, 3072, 0), (4608, 3072, 128)):
            check(isa, m, k, k, BF, rank, BF, 0.0, special=True)
        # quantize_resident: every number of 8-token tiles, tiles that are not full, clusters, padding, F16, shift, long rows
        for m in (4096, 4620, 5120, 3900, 2000, 1056, 900, 264, 133, 132):
            check(isa, m, 3072, 3072, BF, 32, BF, 0.0, special=True)
            check(isa, m, 768, 768, HF, 16, FP, 0.25, special=True)
        for m, k, kp, dtype, rank, shift in ((4608, 12288, 12288, BF, 32, 0.0), (4608, 15360, 15360, BF, 32, 0.0),
                (1500, 12288, 12288, HF, 0, 0.171875), (512, 12288, 12288, BF, 32, 0.0), (512, 15360, 15360, BF, 16, 0.0),
                (600, 12248, 12288, HF, 32, 0.171875), (1, 12288, 12288, BF, 32, 0.0), (20, 3136, 3136, BF, 32, 0.0),
                (30, 4032, 4032, HF, 16, 0.0), (900, 6144, 6144, BF, 32, 0.0), (300, 9216, 9216, BF, 0, 0.0), (257, 40000, 40000, BF, 0, 0.0)):
            check(isa, m, k, kp, dtype, rank, BF, shift, special=True)
            if m < 1000:
                check(isa, m, k, kp, dtype, rank, None, shift, view="wide")
        check(isa, 600, 12288, 12288, FP, 0, BF, 0.0)
        check(isa, 4608, 3072, 3072, FP, 0, BF, 0.0)
        print(f"{isa}: {check.count} cases so far, {bad} bad, worst lora_act error {check.worst:.1e}, {time.time() - START:.1f} s", flush=True)


def median_us(calls, rounds=30):
    for call in calls:
        call()
    torch.cuda.synchronize()
    samples = []
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda._sleep(3_000_000)  # the host queues everything meanwhile
    for i, (begin, end) in enumerate(events):
        begin.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    samples = [b.elapsed_time(e) * 1e3 for b, e in events]
    # back to back: no gaps between launches, as inside a graph
    graph_calls = max(len(calls), 20)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(graph_calls):
            calls[i % len(calls)]()
    graph.replay()
    torch.cuda.synchronize()
    totals = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        totals.append(begin.elapsed_time(end) * 1e3 / graph_calls)
    return statistics.median(samples), statistics.median(totals)


def timing():
    isas = _C.cuda.isas(0)
    print(f"{'M':>6} {'K':>6} {'R':>3} {'what':>10} {'event us':>9} {'graph us':>9} {'GB/s(graph)':>11} {'of copy':>8}")
    for m, k in itertools.product((4608, 512), (3072, 12288, 15360)):
        total = m * k * 3
        sets = min(24, max(2, -(-320_000_000 // total)))
        half = total // 2 // 16 * 16
        buffers = [(torch.zeros(half, dtype=torch.uint8, device=GPU), torch.zeros(half, dtype=torch.uint8, device=GPU)) for _ in range(sets)]
        _, copy = median_us([lambda a=a, b=b: b.copy_(a) for a, b in buffers])
        print(f"{m:6} {k:6} {'':3} {'copy':>10} {'':9} {copy:9.1f} {total / copy / 1e3:11.0f}")
        del buffers
        smooth = torch.ones(k, dtype=BF, device=GPU)
        for rank in (0, 32):
            down = torch.randn(k, rank, device=GPU).to(BF)
            xs = [torch.randn(m, k, dtype=BF, device=GPU) for _ in range(sets)]
            outs = [(torch.empty(m, k, dtype=torch.int8, device=GPU), torch.empty(m, device=GPU), torch.empty(m, rank, device=GPU)) for _ in range(sets)]
            for isa in isas:
                def call(x, o, isa=isa, rank=rank, down=down):
                    _C.cuda.w4a8_quantize(x.data_ptr(), 2, m, k, k, k, smooth.data_ptr(), 2, 0.0, down.data_ptr() if rank else 0, 2, rank,
                                          o[0].data_ptr(), o[1].data_ptr(), o[2].data_ptr() if rank else 0, 0, torch.cuda.current_stream().cuda_stream, isa)
                event, graph = median_us([lambda x=x, o=o, call=call: call(x, o) for x, o in zip(xs, outs)])
                print(f"{m:6} {k:6} {rank:3} {isa:>10} {event:9.1f} {graph:9.1f} {total / graph / 1e3:11.0f} {copy / graph:8.2f}", flush=True)
            if "w4a8_quantize_norm" in SCHEMAS and k == 3072:
                os.environ["NUNCHAKU_CUDA_ISA"] = ""
                scale, shift = (torch.randn(1, k, dtype=BF, device=GPU) for _ in range(2))
                event, graph = median_us([lambda x=x, rank=rank, down=down: OPS.w4a8_quantize_norm(x, scale, shift, 1e-6, smooth, down if rank else None) for x in xs])
                print(f"{m:6} {k:6} {rank:3} {'norm':>10} {event:9.1f} {graph:9.1f} {total / graph / 1e3:11.0f} {copy / graph:8.2f}", flush=True)
            if time.time() - START > 80:
                print("out of time")
                return


def norm_correctness():
    """Layer norm in fp32 may differ in its last bits, so the modulated value in one ulp of its 16-bit dtype."""
    global bad
    os.environ["NUNCHAKU_CUDA_ISA"] = ""
    for isa, (m, k, kp, batch, dtype, rank) in itertools.product(_C.cuda.isas(0), (
        (6, 320, 384, 2, BF, 32), (33, 3072, 3072, 1, BF, 32), (4608, 3072, 3072, 1, BF, 32), (1200, 3072, 3072, 3, HF, 16),
        (40, 12288, 12288, 2, BF, 48), (9, 3001, 3072, 1, BF, 0), (8, 3072, 3072, 8, HF, 128), (70, 40000, 40064, 1, BF, 32))):
        os.environ["NUNCHAKU_CUDA_ISA"] = isa
        g = torch.Generator().manual_seed(m + k)
        kp128 = kp + -kp % 128
        x = (torch.randn(m, k, generator=g) * 3 + 0.5).to(dtype)
        scale, shift = (torch.randn(batch, k, generator=g).mul(0.3).to(dtype) for _ in range(2))
        smooth = torch.rand(kp128, generator=g).add(0.25).to(dtype)
        down = torch.randn(rank, kp128, generator=g).mul(0.1).to(dtype) if rank else None
        packed = (pack_vector(smooth), pack_lowrank_down(down) if rank else None)
        want, want_a, want_l = OPS.w4a8_quantize_norm(x, scale, shift, 1e-6, *packed)
        got, got_a, got_l = OPS.w4a8_quantize_norm(*(t.to(GPU) for t in (x, scale, shift)), 1e-6, *(None if t is None else t.to(GPU) for t in packed))
        again = OPS.w4a8_quantize_norm(*(t.to(GPU) for t in (x, scale, shift)), 1e-6, *(None if t is None else t.to(GPU) for t in packed))
        native = got.cpu()[:, code_position(kp128)]
        step = (native.int() - want.int()).abs()
        lost = 2.0**-8 if dtype == BF else 2.0**-11
        a_error = float(((got_a.cpu() - want_a) / want_a).abs().max())
        l_error = float((got_l.cpu() - want_l).norm() / want_l.norm()) if rank else 0.0
        ok = step.max() <= 1 and (step > 0).float().mean() < 0.01 and a_error <= 2 * lost and l_error < lost and torch.equal(got, again[0]) and torch.equal(got_l, again[2])
        bad += not ok
        print("ok  " if ok else "FAIL", "norm", isa, m, k, batch, dtype, rank, f"codes off by one {(step > 0).float().mean():.1e} (max {int(step.max())}), ascales {a_error:.1e}, lora {l_error:.1e}", flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, nunchaku_kernels.__file__, _C.cuda.isas(0))
    correctness()
    if "w4a8_quantize_norm" in SCHEMAS:
        norm_correctness()
    if "--no-time" not in sys.argv:
        os.environ["NUNCHAKU_CUDA_ISA"] = ""
        timing()
    print(f"{'ALL OK' if not bad else f'{bad} BAD'}; {time.time() - START:.1f} s")
    sys.exit(bool(bad))
