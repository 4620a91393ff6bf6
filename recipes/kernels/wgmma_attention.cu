// Attention in float8 (e4m3) on Hopper's tensor cores, forward, not causal: FlashAttention-3's way, for heads of 128.
//
// A block of threads computes 128 rows of one head: one warpgroup loads, two have 64 rows each. Keys and values come by
// TMA, 128 tokens at a time, four such stages ahead; a block of threads goes from tile to tile, as many blocks as there
// are multiprocessors. While the tensor cores add one block of values, a warpgroup computes the next block's softmax.
//
// In float8 the tensor cores are so fast that every instruction beside them counts. So
// - the values come with their tokens innermost, which is how wgmma reads its right operand, and with tokens and
//   channels in such an order (`float8_heads.for_wgmma`) that a thread's probabilities are, as they lie in its
//   registers, wgmma's left operand, and that what it computes of a row of the result is 32 channels side by side;
// - scores are float16, two in a register: the tensor cores write half as much, and one instruction works on two. Even
//   of the largest score that rounds off a tenth of what rounding query and key to e4m3 does; and none overflows, for
//   no row of theirs is longer than `float8_heads.LONGEST`;
// - no exponential is computed: it took as long as the products. The bits of a positive e4m3 are, read as an integer,
//   8 times its logarithm but for a straight line between powers of two. So one multiplication and addition gives a
//   probability's bits, up to 6 % too large between powers of two: 1.8 % in the root mean square, once the mean is
//   divided out by their sum, beside 2.6 % of rounding to e4m3;
// - the probabilities' sums come from the tensor cores, by eight more channels of the values, which are ones;
// - the running maximum isn't taken. Scores are held against the first block's maximum. Only where a block has a
//   probability that e4m3 can't hold is the maximum looked for, and the block computed anew.
//
// The tensor cores cut off what lies far below the largest of what they add up in float8: of 5000 probabilities, which
// are all positive, 7 % are lost. So their sum is taken out each block, and the values' each PERIOD blocks, and added up
// in float32. Of values with a mean as large as their deviation that still loses 0.4 %; taken out each block 0.1 %, which
// takes 2 % of a whole step, for each instruction takes power from the tensor cores.
//
// FLOPs: 4 x tokens^2 x 128 a head; 24 heads at 4608 tokens: 261 GFLOP.
//
// Source: Shah et al., arXiv 2407.08608 (FlashAttention-3); PTX ISA, asynchronous warpgroup matrix instructions.

#include "hopper.cuh"
#include "units.cuh"

constexpr int DIM = 128, ROWS = 128, KEYS = 128, STAGES = 4, TILE = KEYS * DIM, ALL = 384;
constexpr int ONES = 8 * KEYS, VALUES = TILE + ONES;  // bytes of a stage: a row of ones for each of eight more channels
constexpr float SHIFT = 3.5;           // log2 of what the first block's largest probability is scaled to, at most
constexpr float LARGEST = 1024 + 126;  // as `Softmax` has it, of a probability that e4m3 holds: 448
constexpr u32 NOTHING = 0xFC00FC00;    // two float16: minus infinity
constexpr float NO_OFFSET = 65504;     // beside which nothing counts
constexpr int SUMS = 68;               // of a thread: 64 of values; of ones four, which are two rows' and each twice
constexpr int PERIOD = 4;              // blocks of keys whose values the tensor cores add up
constexpr int OF_PART = 17;            // 64 sums of values; two of probabilities, two offsets

struct Arguments {
  u8* out;                // [batch, tokens, heads, DIM], of which a token begins `stride` values after the last one
  const float* descales;  // [3, batch, heads]: of query, key and value
  const float* scales;    // [batch, tokens] of a result in float8; null: the values' descale
  long long stride;
  float4* partial;  // [tiles that are shared, parts, OF_PART, threads]: what a thread has of the result
  int* given;       // [tiles that are shared, warps]: how many parts are there; zeros, before and after
  Units units;
  int tokens, keys, heads, batch;
  float scale;  // of the scores, times log2(e)
};

static_assert(sizeof(Arguments) == 80, "as `wgmma_attention._Arguments`");

// ---- loads

// [128 tokens, DIM] of query or key, in rows of 128 bytes.
__device__ __forceinline__ void load_tokens(u32 to, const TensorMap* map, u32 barrier, int token, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(0), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// [DIM, 128 tokens] of the values.
__device__ __forceinline__ void load_values(u32 to, const TensorMap* map, u32 barrier, int token, int program) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(token), "r"(0), "r"(program)
      : "memory");
}

// ---- products: 64 x 136 in float32 a warpgroup. Of its warp's 16 rows a thread has two, lane / 4 and 8 more; of both
// the columns 8 i + 2 (lane % 4) and the next: d[4 i] and d[4 i + 1] of the first row, d[4 i + 2] and d[4 i + 3].

#define ACCUMULATORS \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), \
  "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), \
  "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
  "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), \
  "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), \
  "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define NUMBERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67"

// d (+)= a b^T, of 32 bytes of the operands' rows: a in registers; from zero if not `add`.
__device__ __forceinline__ void wgmma(float (&d)[SUMS], const u32* a, u32 b, bool add) {
  asm volatile("{\n.reg .pred add;\n.reg .b64 b;\nsetp.ne.b32 add, %73, 0;\nmov.b64 b, {%72, " DESCRIPTOR "};\n"
               "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" NUMBERS
               "}, {%68, %69, %70, %71}, b, add, 1, 1;\n}\n"
               : ACCUMULATORS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"((int)add));
}

#define SCORES \
  "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), \
  "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), \
  "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), \
  "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])

// The same in float16, d[2 i] of the first row, d[2 i + 1] of the second, a in shared memory; from zero if not `add`.
__device__ __forceinline__ void wgmma(u32 (&d)[32], u32 a, u32 b, bool add) {
  asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, %34, 0;\n"
               "mov.b64 a, {%32, " DESCRIPTOR "};\nmov.b64 b, {%33, " DESCRIPTOR "};\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
               "}, a, b, add, 1, 1;\n}\n"
               : SCORES
               : "r"(a), "r"(b), "r"((int)add));
}

// The compiler is to have these values now, and take them to be others afterwards.
__device__ __forceinline__ void hold(float (&d)[SUMS]) { asm volatile("" : ACCUMULATORS::"memory"); }
__device__ __forceinline__ void hold(u32 (&d)[32]) { asm volatile("" : SCORES::"memory"); }

__device__ __forceinline__ void start_scores(u32 (&s)[32], u32 a, u32 b) {
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma(s, a + 2 * k, b + 2 * k, k > 0);
  commit();
}

__device__ __forceinline__ void start_values(float (&sums)[SUMS], const u32 (&p)[16], u32 b, bool add) {
#pragma unroll
  for (int k = 0; k < 4; k++) wgmma(sums, p + 4 * k, b + 2 * k, add || k > 0);
  commit();
}

// ---- softmax, in pairs of float16

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
  u32 c;
  asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 larger_or_nan(u32 a, u32 b) {
  u32 c;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// Of a thread's two rows. From 1024 to 2048 a float16 counts in ones, so its lower byte is what it exceeds 1024 by: of
// score * factor + offset, the bits of a probability, 8 times its logarithm. Offsets are multiples of 8: probabilities
// that are held against another maximum differ by powers of two, and by no rounding.
struct Softmax {
  float factor, offset[2];  // exact in float16
  float correction[2];      // what sums before the last block have to be multiplied by

  // A row's largest, of all its columns.
  __device__ __forceinline__ float largest(const u32 (&s)[32], int r) {
    u32 both = s[r];
#pragma unroll
    for (int i = 2 + r; i < 32; i += 2) both = larger(both, s[i]);
    const float2 of_pair = floats(both);
    float x = fmaxf(of_pair.x, of_pair.y);
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  }

  // So that a row's largest probability of these scores is 2 ^ SHIFT or down to half of it, as far as float16 can tell.
  __device__ __forceinline__ float fitting(const u32 (&s)[32], int r) {
    const float eighths = 1024 + 56 + 8 * SHIFT - largest(s, r) * factor;
    return floats(float16(8 * floorf(eighths / 8), 0)).x;
  }

  __device__ __forceinline__ void begin(const u32 (&first)[32], float scale) {
    // Of scores next to nothing the factor may be as coarse as it is then; times minus infinity it isn't to be zero.
    // Of scores up to 7000 powers of two apart a softmax is a maximum, and offsets are still exact to 4 of them: by a
    // larger factor they might be no float16, and all probabilities zero.
    factor = floats(float16(fminf(fmaxf(8 * scale, 0x1p-21f), 1), 0)).x;
#pragma unroll
    for (int r = 0; r < 2; r++) offset[r] = fitting(first, r);
  }

  // A block's scores to its probabilities' bits, in lower bytes; whether the warp has corrections.
  __device__ __forceinline__ bool step(u32 (&p)[32], const u32 (&s)[32]) {
    const u32 by = float16(factor, factor);
    u32 most = NOTHING;
    auto probabilities = [&] {
      const u32 from[2] = {float16(offset[0], offset[0]), float16(offset[1], offset[1])};
      // Below some 2 ^ -6 an e4m3's own bits grow with it, not with its logarithm; a flatter line follows them to zero.
      const u32 slope = float16(0.2f, 0.2f), start = float16(823.5f, 823.5f), zero = float16(1024, 1024);
#pragma unroll
      for (int i = 0; i < 32; i++) {
        const u32 line = fma(s[i], by, from[i % 2]);
        most = larger(most, line);
        p[i] = larger_or_nan(larger_or_nan(line, fma(line, slope, start)), zero);
      }
    };
    probabilities();
    correction[0] = correction[1] = 1;
    const float2 mosts = floats(most);
    const bool grown = __any_sync(~0u, fmaxf(mosts.x, mosts.y) > LARGEST);
    if (__builtin_expect(grown, 0)) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float lower = fminf(offset[r], fitting(s, r));
        correction[r] = power_of_two((lower - offset[r]) / 8);
        offset[r] = lower;
      }
      probabilities();
    }
    return grown;
  }
};

// wgmma's left operand: of 32 columns a thread has four words, each row's in turn; see `float8_heads.for_wgmma`.
__device__ __forceinline__ void pack(u32 (&packed)[16], const u32 (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 16; i++) packed[i] = __byte_perm(p[4 * (i / 2) + i % 2], p[4 * (i / 2) + 2 + i % 2], 0x6420);
}

// ---- the kernel. BFLOAT16: the result in that; else in float8, in units of the values' descale or of `scales`.

extern "C" __global__ void __launch_bounds__(ALL, 1)
    wgmma_attention(const __grid_constant__ TensorMap query, const __grid_constant__ TensorMap key,
                    const __grid_constant__ TensorMap value, const __grid_constant__ Arguments args) {
  extern __shared__ u8 memory[];
  __shared__ u64 barriers[4 * STAGES + 4];
  const u32 keys_at = (shared_address(memory) + 1023) & ~1023u, values_at = keys_at + STAGES * TILE;
  const u32 queries_at = values_at + STAGES * VALUES;
  const u32 full_k = shared_address(barriers), empty_k = full_k + 8 * STAGES, full_v = empty_k + 8 * STAGES;
  const u32 empty_v = full_v + 8 * STAGES, full_q = empty_v + 8 * STAGES, empty_q = full_q + 16;
  const int warps = 8;  // that compute
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init(full_k + 8 * i, 1);
      init(full_v + 8 * i, 1);
      init(empty_k + 8 * i, warps);
      init(empty_v + 8 * i, warps);
    }
    for (int i = 0; i < 2; i++) {
      init(full_q + 8 * i, 1);
      init(empty_q + 8 * i, warps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < STAGES * ONES / 4; i += ALL) {
    const u32 to = values_at + i / (ONES / 4) * VALUES + TILE + i % (ONES / 4) * 4;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(0x38383838) : "memory");  // four ones in e4m3
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma is to see them
  __syncthreads();

  const int blocks = (args.keys + KEYS - 1) / KEYS, of_head = (args.tokens + ROWS - 1) / ROWS;
  const int programs = args.heads * args.batch, units = args.units.number();
  Turn<STAGES> at;
  Turn<2> of_query;

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x != 0) return;
    for (int number = blockIdx.x; number < units; number += gridDim.x) {
      const Unit unit = args.units.at(number, blocks);
      const int tile = unit.tile, program = tile / of_head, head = program % args.heads, batch = program / args.heads;
      const u32 barrier_q = full_q + 8 * of_query.index;
      wait(empty_q + 8 * of_query.index, of_query.phase ^ 1);
      expect(barrier_q, ROWS * DIM);
      load_tokens(queries_at + of_query.index * ROWS * DIM, &query, barrier_q, tile % of_head * ROWS, head, batch);
      of_query.next();
      for (int block = unit.end - 1; block >= unit.begin; block--) {
        const int token = block * KEYS;
        const u32 barrier_k = full_k + 8 * at.index, barrier_v = full_v + 8 * at.index;
        wait(empty_k + 8 * at.index, at.phase ^ 1);
        expect(barrier_k, TILE);
        load_tokens(keys_at + at.index * TILE, &key, barrier_k, token, head, batch);
        wait(empty_v + 8 * at.index, at.phase ^ 1);
        expect(barrier_v, TILE);
        load_values(values_at + at.index * VALUES, &value, barrier_v, token, program);
        at.next();
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  const int lane = threadIdx.x % 32, quad = lane % 4;
  const int row_of_tile = (threadIdx.x - 128) / 32 * 16 + lane / 4;
  auto release = [&](u32 barrier) {
    if (lane == 0) arrive(barrier);
  };
  const u32 first_key = descriptor(keys_at), first_value = descriptor(values_at);
  const u32 first_query = descriptor(queries_at + (of_warp(threadIdx.x / 128) - 1) * 64 * DIM);
  u32 s[32], p[32], packed[16];
  // `recent`: what isn't in `o` yet, of values, and in `sum`, of probabilities. `late`: what `o` is yet to be scaled by.
  float o[64], late[2], recent[SUMS], sum[2];
  auto take_sums = [](float (&sum)[2], float (&recent)[SUMS]) {
    sum[0] += recent[64];
    sum[1] += recent[66];
    // Not as a constant, which the compiler would put there between the products.
    asm volatile("mov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\nmov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;"
                 : "=f"(recent[64]), "=f"(recent[65]), "=f"(recent[66]), "=f"(recent[67]));
  };
  auto take_values = [&] {
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = o[i] * late[i / 2 % 2] + recent[i];
    late[0] = late[1] = 1;
  };
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    const Unit unit = args.units.at(number, blocks);
    const int tile = unit.tile, program = tile / of_head;
    Softmax softmax;
    const u32 rows = first_query + of_query.index * (ROWS * DIM / 16);
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0;
    sum[0] = sum[1] = 0;
    late[0] = late[1] = 1;
    int blocks_of_recent = 0;

    // The last block of keys comes first, for it may be short.
    wait(full_q + 8 * of_query.index, of_query.phase);
    wait(full_k + 8 * at.index, at.phase);
    hold(s);
    fence();
    start_scores(s, rows, first_key + at.index * (TILE / 16));
    wait_but_for<0>();
    hold(s);
    release(empty_k + 8 * at.index);
    const int left = args.keys - (unit.end - 1) * KEYS;
    if (left < KEYS) {
#pragma unroll
      for (int i = 0; i < 32; i++) {
        const int column = i / 2 * 8 + quad * 2;
        if (column >= left) s[i] = NOTHING;
        if (column + 1 == left) s[i] = __byte_perm(s[i], NOTHING, 0x7610);
      }
    }
    softmax.begin(s, args.scale * args.descales[program] * args.descales[programs + program]);
    softmax.step(p, s);
    pack(packed, p);

    for (int block = unit.begin + 1; block < unit.end; block++) {
      const Turn<STAGES> before = at;
      at.next();
      wait(full_k + 8 * at.index, at.phase);
      hold(s);
      hold(recent);
      fence();
      start_scores(s, rows, first_key + at.index * (TILE / 16));
      wait(full_v + 8 * before.index, before.phase);
      fence();
      start_values(recent, packed, first_value + before.index * (VALUES / 16), blocks_of_recent > 0);
      wait_but_for<1>();
      hold(s);
      const bool grown = softmax.step(p, s);
      // + 0, for no probability has a sign. Without it ptxas waits for the values before it computes them.
      release(empty_k + 8 * at.index + ((p[28] | p[29] | p[30] | p[31]) >> 31));
      wait_but_for<0>();
      hold(recent);
      release(empty_v + 8 * before.index);
      pack(packed, p);
      take_sums(sum, recent);
      blocks_of_recent = blocks_of_recent == PERIOD - 1 ? 0 : blocks_of_recent + 1;
      if (blocks_of_recent == 0) take_values();
      if (grown) {
#pragma unroll
        for (int i = 0; i < 64; i++) recent[i] *= softmax.correction[i / 2 % 2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          sum[r] *= softmax.correction[r];
          late[r] *= softmax.correction[r];
        }
      }
    }

    release(empty_q + 8 * of_query.index);
    of_query.next();
    wait(full_v + 8 * at.index, at.phase);
    hold(recent);
    fence();
    start_values(recent, packed, first_value + at.index * (VALUES / 16), blocks_of_recent > 0);
    wait_but_for<0>();
    hold(recent);
    release(empty_v + 8 * at.index);
    take_sums(sum, recent);
    take_values();
    at.next();

    // Of a tile that is shared: into memory, and whoever comes last adds all parts up, in their order. Nobody waits.
    if (number >= args.units.whole && args.units.parts > 1) {
      const int shared = tile - args.units.whole, parts = args.units.parts;
      float4* part = args.partial + (shared * parts * OF_PART * 256 + threadIdx.x - 128);
      float4* own = part + unit.part * OF_PART * 256;
#pragma unroll
      for (int i = 0; i < 16; i++) own[256 * i] = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
      own[256 * 16] = make_float4(sum[0], sum[1], softmax.offset[0], softmax.offset[1]);
      __threadfence();
      __syncwarp();
      int before = 0;
      if (lane == 0)
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"  // from parts - 1 on it is zero again
                     : "=r"(before)
                     : "l"(args.given + shared * warps + threadIdx.x / 32 - 4), "r"(parts - 1)
                     : "memory");
      __syncwarp();
      if (!__any_sync(~0u, before == parts - 1)) continue;
      softmax.offset[0] = softmax.offset[1] = NO_OFFSET;
      for (int i = 0; i < parts; i++, part += OF_PART * 256) {
        const float4 of_rows = __ldcg(part + 256 * 16);
        const float sums[2] = {of_rows.x, of_rows.y}, offsets[2] = {of_rows.z, of_rows.w};
        float ours[2], its[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float lower = fminf(softmax.offset[r], offsets[r]);
          ours[r] = power_of_two((lower - softmax.offset[r]) / 8);
          its[r] = power_of_two((lower - offsets[r]) / 8);
          sum[r] = sum[r] * ours[r] + sums[r] * its[r];
          softmax.offset[r] = lower;
        }
#pragma unroll
        for (int i = 0; i < 16; i++) {
          const float4 four = __ldcg(part + 256 * i);
          o[4 * i] = o[4 * i] * ours[0] + four.x * its[0];
          o[4 * i + 1] = o[4 * i + 1] * ours[0] + four.y * its[0];
          o[4 * i + 2] = o[4 * i + 2] * ours[1] + four.z * its[1];
          o[4 * i + 3] = o[4 * i + 3] * ours[1] + four.w * its[1];
        }
      }
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = tile % of_head * ROWS + row_of_tile + 8 * r;
      if (row >= args.tokens) continue;
      const long long token = (long long)(program / args.heads) * args.tokens + row;
      const long long first = token * args.stride + program % args.heads * DIM + quad * 32;
#if BFLOAT16
      const float unit = args.descales[2 * programs + program] / sum[r];
      uint4* to = (uint4*)(args.out + 2 * first);
      u32 w[16];
#pragma unroll
      for (int i = 0; i < 16; i++)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(w[i])
            : "f"(o[4 * i + 2 * r + 1] * unit), "f"(o[4 * i + 2 * r] * unit));
#pragma unroll
      for (int i = 0; i < 4; i++) to[i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
#else
      const float unit =
          args.scales ? args.descales[2 * programs + program] / (sum[r] * args.scales[token]) : 1 / sum[r];
      uint4* to = (uint4*)(args.out + first);
      u32 w[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int from = 8 * i + 2 * r;
        w[i] = e4m3(o[from] * unit, o[from + 1] * unit, o[from + 4] * unit, o[from + 5] * unit);
      }
      to[0] = make_uint4(w[0], w[1], w[2], w[3]);
      to[1] = make_uint4(w[4], w[5], w[6], w[7]);
#endif
    }
  }
}
