// Linear layers in float8 (e4m3), or in int8 (INT8), on Hopper's tensor cores, whose result goes on in the registers where
// it came about: through GELU, and to float8. Of one input, or of two streams with a layer each, in one launch. Query, key and
// values can come before that: query and key are normed by heads of 128 (RMSNorm), turned (rotary embedding) and cast,
// the values are cast.
//
// A block of threads computes tiles of 128 rows and 192 columns: one warpgroup loads, two have 64 rows each. Operands
// come by TMA, 128 values of depth at a time, five such stages ahead. While the tensor cores multiply one tile, a
// warpgroup does, in pieces between its instructions for them, what is left to do of the tile before, whose results it
// holds beside the sums. A block of threads goes from tile to tile, as many blocks as there are multiprocessors.
//
// - Sums are float16, two in a register, of PROMOTED blocks of depth; then they are added to those of the tile, float16
//   as well. Of each product of 32 values of depth the tensor cores read and write half as much as in float32, which takes
//   power as what they multiply does. They align products to what is largest, the sum before it included, and cut off
//   what then lies too far down: the longer a sum in them, the more, in float32 too (PyTorch's fast accumulation).
//   None overflows, nor does any on the way there: a row of x is no longer than ROW and one of W than WEIGHT_ROW in float8
//   (`quantized_linear`), so that by Cauchy and Schwarz no sum exceeds their product; and times W's scale, at most 1
//   (`QuantizedLinear.limit`), it is none the larger.
// - Of int8 they are int32, and exact. Multiplying takes less power than in float8, which gives more than sums in half as
//   many registers do.
// - What is left to do costs more by its instructions than by its arithmetic: each is fetched once a tile, and takes
//   power from the tensor cores. So results are kept as pairs of float16, which one instruction works on (what is
//   beyond 65504 is cut to that); and there is one loop over tiles, not two with the sums in different registers, so
//   that its code fits into the caches.
// - A row's scale has to be known before the row is: it is a bound of its norm, |x| |W| + |b|, so that none of it is cut
//   off and the next Linear's sums hold. Of the attention's values it is that of the longest row, by heads: a mean of
//   values is no longer. Beside an attention a row's scale is both together. Such scales are some 40 to 90 times too
//   large for numbers that are normally distributed, which in float8, a floating-point format, costs next to no
//   precision. Where W stretches some x far more than others, the smallest numbers get lost: a result of 1/20 of the
//   values' deviation is 0.031 wrong if the bound is 1000 deviations, 0.05 if it is 2000 (400 are usual), GELU's 0.027.
// - The columns of a tile come in such an order (TMA's box has five dimensions for it) that a thread gets 16 of a row
//   side by side, which it stores at once. A tile of query or key is one head and 64 columns of the values, of which
//   there are half as many: so the four threads that have a row have its whole head.
// - Values are stored as the attention reads them, their tokens innermost. In its order of tokens, four side by side are
//   those of two threads: each gives the other half of its channels, and stores four bytes a channel.
//
// FLOPs: 2 x rows x columns x depth.
//
// Source: PTX ISA, asynchronous warpgroup matrix instructions; Ada/Hopper float8 GEMMs with a scale a row and column;
// FluxAttnProcessor and apply_rotary_emb of diffusers.

#include "hopper.cuh"

// In a GEMM's terms: tiles of M and N, blocks of K.
constexpr int ROWS = 128, COLUMNS = 192, DEPTH = 128, STAGES = 5, ALL = 384;
constexpr int PAIRS = COLUMNS / 4, SUMS = INT8 ? 2 * PAIRS : PAIRS;  // registers a thread
constexpr int PROMOTED = 2;
constexpr int X_TILE = ROWS * DEPTH, W_TILE = COLUMNS * DEPTH, UNIT = 32;  // rows of W that come at once
constexpr int SPANS = COLUMNS / 64, PIECES = 2 * SPANS;  // 16 of 64 columns are a thread's, in two rows
constexpr int HEAD = 128;
// LONGEST, of a row of query or key: `float8_heads.LONGEST`; ROW, of x: `quantized_linear.ROW`.
constexpr float SMALLEST = 0.007f;  // of bounds: ROW over one is to be a float16
static_assert(!(INT8 && UPDATE), "rows before a gated residual are results, with bounds as scales: too large for int8");
static_assert(ROW <= 448, "none of a row of results is larger than a float8");

#include "tiles.cuh"
#include "units.cuh"

struct Stream {
  const float* scale;         // [rows]; of float8 ROW times it is no less than a row's norm
  const float* norm;          // [rows]: no less than a row's, of int8
  const float* weight_scale;  // [columns]
  const u16* bias;            // [columns] bfloat16
  const float* bounds;        // of the norm of W x and of b: of GELU's columns; of the values', by heads
  u8* activated;              // [rows, heads * HEAD + GELU's columns] float8
  float* activated_scale;     // [rows]
  long long rows;
};
// A stream's query and key. Its tokens are `tokens` of each image's, from `first` on.
struct Heads {
  const u16* norms[2];  // of query and key [HEAD] bfloat16
  const u16* turns;     // [tokens, HEAD] float16, of each pair of columns cosine and sine
  int first, tokens;
};
// UPDATE: the result times a gate is added to what a stream was before. Of each image's tokens the first are the text's.
struct Update {
  const u16 *text, *image;  // of the stream [batch, tokens, columns] bfloat16
  const u16* gate;          // [batch, columns] bfloat16
  u16* out;                 // [batch, tokens, columns] bfloat16
  long long text_batch, text_row, image_batch, image_row, gate_batch;  // values from one to the next
  int text_tokens, tokens;
};
// Query, key and value are the first 3 * heads * HEAD columns; those after them go through GELU. In its result heads *
// HEAD columns are left in front to the attention, a mean of values.
struct Arguments {
  Stream streams[2];
  Heads of_heads[2];
  Update updates[2];
  u8* query_key;    // [batch, tokens, 2, heads, HEAD] float8, of both streams
  u8* value;        // [batch, heads, HEAD, tokens] float8, as `float8_heads.for_wgmma`; or [batch, tokens, heads, HEAD]
  float* descales;  // [3, batch, heads]: of query, key and value
  int heads, tokens, batch, laid_out;  // whether the values are: each stream's tokens are a multiple of 16 then
  float eps;
  u32* partial;    // [tiles that are shared, parts but the first, a thread's sums by fours, threads, 4]
  int* given;      // [tiles that are shared, warps]: how many parts are there; zeros, before and after
  Tiles tiles;
  Units units;
  int depth, columns;  // blocks of 128; of W's rows
};

// ---- loads

__device__ __forceinline__ void load_rows(u32 to, const TensorMap* map, u32 barrier, int depth, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(depth), "r"(row)
      : "memory");
}

// 32 rows of W, half of those of 64 columns: see `wgmma_linear._order`.
__device__ __forceinline__ void load_unit(u32 to, const TensorMap* map, u32 barrier, int depth, int unit) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %6, %6, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(depth), "r"(unit % 2 * 4), "r"(unit / 2), "r"(0)
      : "memory");
}

// ---- products: 64 x 192 a warpgroup, in float16 laid out as the scores in wgmma_attention.cu, in int32 as its result is.

#define FIRST_REGISTERS \
  "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), \
  "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), \
  "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), \
  "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), \
  "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), \
  "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47])
#define FIRST_NUMBERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#if INT8
#define SHAPE "m64n192k32.s32.s8.s8"
#define SIGNS ""
#define A "%96"
#define B "%97"
#define ADD "%98"
#define ACCUMULATORS \
  FIRST_REGISTERS, \
  "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), \
  "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63]), \
  "+r"(d[64]), "+r"(d[65]), "+r"(d[66]), "+r"(d[67]), "+r"(d[68]), "+r"(d[69]), "+r"(d[70]), "+r"(d[71]), \
  "+r"(d[72]), "+r"(d[73]), "+r"(d[74]), "+r"(d[75]), "+r"(d[76]), "+r"(d[77]), "+r"(d[78]), "+r"(d[79]), \
  "+r"(d[80]), "+r"(d[81]), "+r"(d[82]), "+r"(d[83]), "+r"(d[84]), "+r"(d[85]), "+r"(d[86]), "+r"(d[87]), \
  "+r"(d[88]), "+r"(d[89]), "+r"(d[90]), "+r"(d[91]), "+r"(d[92]), "+r"(d[93]), "+r"(d[94]), "+r"(d[95])
#define NUMBERS \
  FIRST_NUMBERS ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#else
#define SHAPE "m64n192k32.f16.e4m3.e4m3"
#define SIGNS ", 1, 1"
#define A "%48"
#define B "%49"
#define ADD "%50"
#define ACCUMULATORS FIRST_REGISTERS
#define NUMBERS FIRST_NUMBERS
#endif

// d (+)= a b^T, of 32 bytes of the operands' rows; from zero if not `add`.
__device__ __forceinline__ void wgmma(u32 (&d)[SUMS], u32 a, u32 b, bool add) {
  asm volatile("{\n.reg .pred add;\n.reg .b64 a, b;\nsetp.ne.b32 add, " ADD ", 0;\n"
               "mov.b64 a, {" A ", " DESCRIPTOR "};\nmov.b64 b, {" B ", " DESCRIPTOR "};\n"
               "wgmma.mma_async.sync.aligned." SHAPE " {" NUMBERS "}, a, b, add" SIGNS ";\n}\n"
               : ACCUMULATORS
               : "r"(a), "r"(b), "r"((int)add));
}

// The compiler is to have these values now, and take them to be others afterwards.
__device__ __forceinline__ void hold(u32 (&d)[SUMS]) { asm volatile("" : ACCUMULATORS::"memory"); }

// ---- after the products

#if INT8
typedef float WeightScale;
__device__ __forceinline__ WeightScale weight_scale(float x) { return x; }
#else
typedef u16 WeightScale;  // float16
__device__ __forceinline__ WeightScale weight_scale(float x) { return (u16)float16(x, 0); }
#endif

// No less than the norm of a row of x.
__device__ __forceinline__ float norm(const Stream& stream, int row) {
  return INT8 ? stream.norm[row] : ROW * stream.scale[row];
}

__device__ __forceinline__ u32 bfloat16(float a, float b) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}
__device__ __forceinline__ u32 fma_bfloat16(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// GELU's tanh form of x, times twice `half`; exact to |x| / 2048, by the tanh.
__device__ __forceinline__ u32 gelu(u32 x, u32 half) {
  const u32 linear = float16(0.7978845608f, 0.7978845608f), cubic = float16(0.0356774081f, 0.0356774081f);
  u32 t;
  asm("tanh.approx.f16x2 %0, %1;" : "=r"(t) : "r"(mul(x, fma(mul(x, x), cubic, linear))));
  const u32 h = mul(x, half);
  return fma(h, t, h);
}

// A pair of columns (a, b) turned by an angle, of which `turn` are cosine and sine: (a c - b s, b c + a s).
__device__ __forceinline__ u32 turned(u32 pair, u32 turn) {
  const u32 crossed = __byte_perm(pair, 0, 0x1032) ^ 0x8000;
  return fma(pair, __byte_perm(turn, 0, 0x1010), mul(crossed, __byte_perm(turn, 0, 0x3232)));
}

#if INT8
extern "C" __global__ void __launch_bounds__(ALL, 1) wgmma_linear_int8(
#else
extern "C" __global__ void __launch_bounds__(ALL, 1) wgmma_linear(
#endif
    const __grid_constant__ TensorMap x0, const __grid_constant__ TensorMap x1,
    const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1,
    const __grid_constant__ Arguments args) {
  extern __shared__ u8 memory[];
  __shared__ u64 barriers[2 * STAGES + 4];
  // Of the tile that is multiplied and the next, by columns and by rows. Bounds: GELU's, the values' not yet looked at.
  __shared__ alignas(16) WeightScale weight_scales[2][COLUMNS];
  __shared__ alignas(16) float biases[2][COLUMNS], scales[2][ROWS], bounds[2][ROWS];
  __shared__ float norms[2][8], weights[8];  // by warps: largest norms of rows; largest weight of a head's norm
  __shared__ alignas(16) u32 head_norms[2][2][HEAD / 2];  // by streams, of query and key, in units of their scale
  const u32 x_at = (shared_address(memory) + 1023) & ~1023u, w_at = x_at + STAGES * X_TILE;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 known = empty + 8 * STAGES, used = known + 16;
  const int warps = 8;  // that compute
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init(full + 8 * i, 1);
      init(empty + 8 * i, warps);
    }
    for (int i = 0; i < 2; i++) {
      init(known + 8 * i, 1);
      init(used + 8 * i, warps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // Tiles are shared where the gated residual follows: with what follows elsewhere, that costs more than it gives.
  const Units shared = UPDATE ? args.units : Units{args.tiles.number(), 0, 1};
  const int units = shared.number(), of_heads = 2 * args.heads;  // columns of tiles: of query and key
  const int lane = threadIdx.x % 32;
  Turn<STAGES> at;
  Turn<2> of_tile;
  // A tile's columns are two runs of W's rows: a head, and 64 of the values; elsewhere one run.
  auto first_run = [&](int across) { return across < of_heads ? across * HEAD : across * COLUMNS; };
  auto second_run = [&](int across) {
    return across < of_heads ? of_heads * HEAD + across * 64 : across * COLUMNS + HEAD;
  };

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x / 32 == 1) {
      for (int i = blockIdx.x; i < units; i += gridDim.x) {
        const Unit unit = shared.at(i, args.depth);
        if (unit.part) continue;
        const Place place = args.tiles[unit.tile];
        const Stream& stream = args.streams[place.second];
        const int from = first_run(place.across), then = second_run(place.across);
        wait(used + 8 * of_tile.index, of_tile.phase ^ 1);
#pragma unroll 2
        for (int i = lane; i < COLUMNS; i += 32) {
          const int column = i < HEAD ? from + i : then + i - HEAD;
          if (column >= args.columns) continue;
          weight_scales[of_tile.index][i] = weight_scale(stream.weight_scale[column]);
          biases[of_tile.index][i] = __uint_as_float((u32)stream.bias[column] << 16);
        }
#pragma unroll 2
        for (int i = lane; i < ROWS; i += 32) {
          const int row = place.row + i;
          const bool inside = row < stream.rows;
          scales[of_tile.index][i] = inside ? stream.scale[row] : 0;
          if (!UPDATE)
            bounds[of_tile.index][i] = inside ? norm(stream, row) * stream.bounds[0] + stream.bounds[1] : 1;
        }
        __syncwarp();
        if (lane == 0) arrive(known + 8 * of_tile.index);
        of_tile.next();
      }
    }
    if (threadIdx.x != 0) return;
    for (int number = blockIdx.x; number < units; number += gridDim.x) {
      const Unit unit = shared.at(number, args.depth);
      const Place place = args.tiles[unit.tile];
      const TensorMap *x = place.second ? &x1 : &x0, *w = place.second ? &w1 : &w0;
      const int from = first_run(place.across) / UNIT, then = second_run(place.across) / UNIT;
      for (int i = unit.begin; i < unit.end; i++) {
        const u32 stage = full + 8 * at.index;
        wait(empty + 8 * at.index, at.phase ^ 1);
        expect(stage, X_TILE + W_TILE);
        load_rows(x_at + at.index * X_TILE, x, stage, i * DEPTH, place.row);
#pragma unroll
        for (int unit = 0; unit < COLUMNS / UNIT; unit++)
          load_unit(w_at + at.index * W_TILE + unit * UNIT * DEPTH, w, stage, i * DEPTH,
                    unit < HEAD / UNIT ? from + unit : then + unit - HEAD / UNIT);
        at.next();
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int quad = lane % 4, group = of_warp(threadIdx.x / 128) - 1, warp = threadIdx.x / 32 - 4;
  const int row_of_tile = warp * 16 + lane / 4;
  auto release = [&](u32 barrier) {
    if (lane == 0) arrive(barrier);
  };

  float floor = 0;  // what no row of an attention's result is longer than
  auto know_scales = [&] {
    const int thread = threadIdx.x - 128, part = thread / HEAD, all = args.batch * args.heads;
    const int streams = args.tiles.first < args.tiles.tall ? 2 : 1;
    float weight[2] = {0, 0}, largest = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i >= streams) continue;
      float longest = 0;
      const Stream& stream = args.streams[i];
#pragma unroll 8
      for (int row = thread; row < stream.rows; row += 256) longest = fmaxf(longest, norm(stream, row));
#pragma unroll
      for (int j = 16; j; j >>= 1) longest = fmaxf(longest, __shfl_xor_sync(~0u, longest, j));
      if (lane == 0) norms[i][warp] = longest;
      weight[i] = __uint_as_float((u32)args.of_heads[i].norms[part][thread % HEAD] << 16);
      largest = fmaxf(largest, fabsf(weight[i]));
    }
#pragma unroll
    for (int j = 16; j; j >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, j));
    if (lane == 0) weights[warp] = largest;
    asm volatile("bar.sync 1, 256;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (i >= streams) continue;
      float longest = 0;
      for (int j = 0; j < 8; j++) longest = fmaxf(longest, norms[i][j]);
      const float of_values = longest * args.streams[i].bounds[2] + args.streams[i].bounds[3];
      floor = sqrtf(floor * floor + of_values * of_values);  // some heads may take one stream's, others the other's
    }
    floor = fmaxf(floor, SMALLEST);
    // No normed head is longer than sqrt(HEAD) times the largest weight, turned or not.
    float of_parts[2];
    for (int i = 0; i < 2; i++) {
      const float* of = weights + 4 * i;
      const float of_part = fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3]));
      of_parts[i] = fmaxf(of_part * sqrtf(HEAD), SMALLEST) / LONGEST;
    }
    for (int i = 0; i < 2; i++) {
      const float own = weight[i] / (part ? of_parts[1] : of_parts[0]), next = __shfl_down_sync(~0u, own, 1);
      if (thread % 2 == 0) head_norms[i][part][thread % HEAD / 2] = float16(own, next);
    }
    if (blockIdx.x == 0)
      for (int i = thread; i < all; i += 256) {
        args.descales[i] = of_parts[0];
        args.descales[all + i] = of_parts[1];
        args.descales[2 * all + i] = floor / ROW;
      }
    asm volatile("bar.sync 1, 256;" ::: "memory");
  };

  u32 parts[SUMS];     // the tensor cores' sums: of PROMOTED blocks of depth, int32's of all
  u32 sums[PAIRS];     // of the tile that is multiplied, in float16
  u32 results[PAIRS];  // x W + b of the one before it, by spans and pairs of columns, one row and then the other
  Place of;               // that one's, of a thread's two rows the first
  u32 factor[2];          // by rows, twice in float16: half of 1 over GELU's scale, or 1 over a head's root mean square

  const u16 *before[2], *gates[2];  // UPDATE: of a thread's two rows

  // Of a tile that is shared: its sums to memory, for the block of threads that has the first part, which adds them up.
  auto partial = [&](const Unit& unit) {
    const int of_shared = unit.tile - shared.whole;
    return (uint4*)args.partial + (of_shared * (shared.parts - 1) + unit.part) * (PAIRS / 4 * 256) + threadIdx.x - 128;
  };
  auto given = [&](const Unit& unit) { return args.given + (unit.tile - shared.whole) * warps + warp; };
  auto give = [&](Unit unit) {
    unit.part--;
    uint4* to = partial(unit);
#pragma unroll
    for (int i = 0; i < PAIRS / 4; i++)
      to[256 * i] = make_uint4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    __threadfence();
    __syncwarp();
    if (lane == 0) asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(given(unit)) : "memory");
  };
  auto gather = [&](Unit unit) {
    int there;
    do
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(given(unit)) : "memory");
    while (__any_sync(~0u, there < shared.parts - 1));  // of the whole warp: see `of_warp`
    if (lane == 0) *given(unit) = 0;
    for (; unit.part < shared.parts - 1; unit.part++) {
      const uint4* from = partial(unit);
#pragma unroll
      for (int i = 0; i < PAIRS / 4; i++) {
        const uint4 four = __ldcg(from + 256 * i);
        sums[4 * i] = add(sums[4 * i], four.x);
        sums[4 * i + 1] = add(sums[4 * i + 1], four.y);
        sums[4 * i + 2] = add(sums[4 * i + 2], four.z);
        sums[4 * i + 3] = add(sums[4 * i + 3], four.w);
      }
    }
  };

  // Results from sums.
  auto take = [&](int tile) {
    of = args.tiles[tile];
    of.row += row_of_tile;
    wait(known + 8 * of_tile.index, of_tile.phase);
    const float scale[2] = {scales[of_tile.index][row_of_tile], scales[of_tile.index][row_of_tile + 8]};
    auto convert = [&](float (&squares)[2], bool of_head) {
#pragma unroll
      for (int i = 0; i < 4 * SPANS; i++) {
        const int from = i / 4 * 64 + quad * 16 + i % 4 * 4;
        const float4 b = *(const float4*)(biases[of_tile.index] + from);
#pragma unroll
        for (int r = 0; r < 2; r++) {
#if INT8
          const float4 w = *(const float4*)(weight_scales[of_tile.index] + from);
          const int* four = (const int*)parts + 8 * i + 2 * r;
          const float y[4] = {four[0] * (scale[r] * w.x) + b.x, four[1] * (scale[r] * w.y) + b.y,
                              four[4] * (scale[r] * w.z) + b.z, four[5] * (scale[r] * w.w) + b.w};
#else
          const uint2 w = *(const uint2*)(weight_scales[of_tile.index] + from);
          const float2 two = floats(mul(sums[4 * i + r], w.x)), next = floats(mul(sums[4 * i + 2 + r], w.y));
          const float y[4] = {two.x * scale[r] + b.x, two.y * scale[r] + b.y, next.x * scale[r] + b.z,
                              next.y * scale[r] + b.w};
#endif
          results[4 * i + r] = UPDATE ? bfloat16(y[0], y[1]) : float16(y[0], y[1]);
          results[4 * i + 2 + r] = UPDATE ? bfloat16(y[2], y[3]) : float16(y[2], y[3]);
          if (of_head && i < 8) squares[r] += y[0] * y[0] + y[1] * y[1] + y[2] * y[2] + y[3] * y[3];
        }
      }
    };
    float of_rows[2] = {0, 0};
    if (UPDATE) {
      convert(of_rows, false);
      const Update& update = args.updates[of.second];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = min(of.row + 8 * r, (int)args.streams[of.second].rows - 1), image = row / update.tokens;
        const int token = row - image * update.tokens, of_image = token - update.text_tokens;
        before[r] = of_image < 0 ? update.text + image * update.text_batch + token * update.text_row
                                 : update.image + image * update.image_batch + of_image * update.image_row;
        gates[r] = update.gate + image * update.gate_batch;
      }
    } else if (of.across < of_heads) {
      convert(of_rows, true);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        of_rows[r] += __shfl_xor_sync(~0u, of_rows[r], 1);
        of_rows[r] += __shfl_xor_sync(~0u, of_rows[r], 2);
        of_rows[r] = rsqrtf(of_rows[r] * (1.f / HEAD) + args.eps);
      }
    } else {
      convert(of_rows, false);
      const Stream& stream = args.streams[of.second];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float of_gelu = bounds[of_tile.index][row_of_tile + 8 * r];
        const float bound = sqrtf(of_gelu * of_gelu + floor * floor);  // of the whole row's norm
        const float of_result = fmaxf(bound, SMALLEST) / ROW;
        const int row = of.row + 8 * r;
        if (of.across == of_heads && quad == 0 && row < stream.rows) stream.activated_scale[row] = of_result;
        of_rows[r] = 0.5f / of_result;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) factor[r] = float16(of_rows[r], of_rows[r]);
    __syncwarp();  // all of it have read
    release(used + 8 * of_tile.index);
    of_tile.next();
  };

  // What is left to do of the results, in pieces: 16 columns in a row. `prepare`: what that takes from memory.
  uint4 turns[2], stream[2], gate[2];
  int token;  // the row's, among all
  auto prepare = [&](int piece) {
    const int span = piece / 2, r = piece % 2;
    if (UPDATE) {
      const int column = of.across * COLUMNS + span * 64 + quad * 16;
      if (column >= args.columns) return;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        stream[i] = ((const uint4*)(before[r] + column))[i];
        gate[i] = ((const uint4*)(gates[r] + column))[i];
      }
      return;
    }
    if (of.across >= of_heads) return;
    const Heads& own = args.of_heads[of.second];
    const int row = of.row + 8 * r, image = row / own.tokens, of_image = row - image * own.tokens;
    token = image * args.tokens + own.first + of_image;
    if (span == HEAD / 64) return;
    const uint4* table = (const uint4*)(own.turns + of_image * HEAD + span * 64 + quad * 16);
    turns[0] = table[0];
    turns[1] = table[1];
  };
  // The values of a warp's 16 tokens, in an attention's order: of a channel, four tokens side by side are those of two
  // threads that have neighbouring rows. Each takes half of their 16 channels.
  auto lay_out = [&](u32 over, bool inside) {
    const u32* x = results + 16 * (HEAD / 64);
    const bool odd = lane & 4;
    u32 even_rows[2][2], odd_rows[2][2];  // by rows and four channels
#pragma unroll
    for (int r = 0; r < 2; r++) {
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = e4m3(mul(x[4 * i + r], over), mul(x[4 * i + 2 + r], over));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 own = odd ? w[2 + i] : w[i], others = __shfl_xor_sync(~0u, odd ? w[i] : w[2 + i], 4);
        even_rows[r][i] = odd ? others : own;
        odd_rows[r][i] = odd ? own : others;
      }
    }
    if (!inside) return;
    const int image = token / args.tokens, of_image = token - image * args.tokens - 8 - lane / 4;
    const int channel = of.across % 2 * 64 + quad * 16 + odd * 8;  // the first of 8
    const int line = (image * args.heads + of.across / 2) * HEAD + channel % 32 / 2 * 8 + channel / 32 * 2;
    u8* to = args.value + (long long)line * args.tokens + of_image + lane / 8 * 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 a = __byte_perm(even_rows[0][i], odd_rows[0][i], 0x5140);
      const u32 b = __byte_perm(even_rows[0][i], odd_rows[0][i], 0x7362);
      const u32 c = __byte_perm(even_rows[1][i], odd_rows[1][i], 0x5140);
      const u32 d = __byte_perm(even_rows[1][i], odd_rows[1][i], 0x7362);
      const u32 words[4] = {__byte_perm(a, c, 0x5410), __byte_perm(a, c, 0x7632), __byte_perm(b, d, 0x5410),
                            __byte_perm(b, d, 0x7632)};
#pragma unroll
      for (int j = 0; j < 4; j++) *(u32*)(to + ((4 * i + j) / 2 * 8 + j % 2) * args.tokens) = words[j];
    }
  };
  auto complete = [&](int piece) {
    const int span = piece / 2, r = piece % 2, from = span * 64 + quad * 16;
    const u32* x = results + 16 * span + r;
    const Stream& own = args.streams[of.second];
    bool inside = of.row + 8 * r < own.rows;
    u32 y[8];
    if (UPDATE) {
      const int column = of.across * COLUMNS + from;
      uint4* to = (uint4*)(args.updates[of.second].out + (long long)(of.row + 8 * r) * args.columns + column);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 g[4] = {gate[i].x, gate[i].y, gate[i].z, gate[i].w};
        const u32 old[4] = {stream[i].x, stream[i].y, stream[i].z, stream[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) y[4 * i + j] = fma_bfloat16(x[8 * i + 2 * j], g[j], old[j]);
        if (inside && column < args.columns)
          to[i] = make_uint4(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
      }
      return;
    }
    u8* to;
    if (of.across >= of_heads) {
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = gelu(x[2 * i], factor[r]);
      const int stride = args.columns - of_heads * HEAD, column = of.across * COLUMNS + from;
      inside = inside && column < args.columns;
      to = own.activated + (long long)(of.row + 8 * r) * stride + column - of_heads * HEAD;  // the values' are free
    } else if (span < HEAD / 64) {
      const uint4* weights = (const uint4*)(head_norms[of.second][of.across >= args.heads] + from / 2);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint4 four = weights[i];
        const u32 weight[4] = {four.x, four.y, four.z, four.w};
        const u32 turn[4] = {turns[i].x, turns[i].y, turns[i].z, turns[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++)
          y[4 * i + j] = turned(mul(mul(x[8 * i + 2 * j], factor[r]), weight[j]), turn[j]);
      }
      to = args.query_key + ((long long)token * of_heads + of.across) * HEAD + from;
    } else {
      const u32 over = float16(ROW / floor, ROW / floor);
      if (args.laid_out) {
        if (r == 1) lay_out(over, inside);  // both rows
        return;
      }
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = mul(x[2 * i], over);
      to = args.value + (long long)token * args.heads * HEAD + of.across * 64 + quad * 16;
    }
    if (inside) *(uint4*)to = make_uint4(e4m3(y[0], y[1]), e4m3(y[2], y[3]), e4m3(y[4], y[5]), e4m3(y[6], y[7]));
  };

  const u32 first_x = descriptor(x_at + group * 64 * DEPTH), first_w = descriptor(w_at);

  // One block of depth. A warpgroup has two of them under way; `last` is the stage of the one before, `blocks` are in
  // `parts`.
  int last = 0, blocks = 0;
  auto start = [&](bool add) {
    wait(full + 8 * at.index, at.phase);
    const u32 a = first_x + at.index * (X_TILE / 16), b = first_w + at.index * (W_TILE / 16);
    hold(parts);
    fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(parts, a + 2 * k, b + 2 * k, add || k > 0);
    commit();
  };
  auto advance = [&] {
    last = at.index;
    at.next();
    blocks++;
  };
  auto begin = [&] {  // with nothing under way
    start(false);
    blocks = 0;
    advance();
  };
  auto finish = [&] {  // all that is under way
    wait_but_for<0>();
    hold(parts);
    release(empty + 8 * last);
    if (!INT8) {
#pragma unroll
      for (int i = 0; i < PAIRS; i++) sums[i] = add(sums[i], parts[i]);
    }
  };
  auto step = [&] {
    if (!INT8 && blocks == PROMOTED) {
      finish();
      begin();
    } else {
      start(true);
      wait_but_for<1>();
      hold(parts);
      release(empty + 8 * last);
      advance();
    }
  };

  bool pending = false;
  for (int number = blockIdx.x; number < units; number += gridDim.x) {
    const Unit unit = shared.at(number, args.depth);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) sums[i] = 0;
    begin();
    int i = unit.begin + 1;
    if (!pending) {
      if (of_heads) know_scales();  // the first tile's products are under way
    } else {
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++) {
        prepare(piece);
        if (DEEP) step();
        complete(piece);
      }
      if (DEEP) i += PIECES;
    }
    for (; i < unit.end; i++) step();
    finish();
    pending = unit.part == 0;
    if (!pending) {
      give(unit);
      continue;
    }
    if (number >= shared.whole && shared.parts > 1) gather(unit);
    take(unit.tile);
  }
  if (!pending) return;
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    prepare(piece);
    complete(piece);
  }
}
