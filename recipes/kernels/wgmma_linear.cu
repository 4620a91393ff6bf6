// Linear layers in float8 (e4m3) on Hopper's tensor cores, whose result goes on in the registers where it came about:
// through GELU, and back to float8. Of one input, or of two streams with a layer each, in one launch.
//
// A block of threads computes tiles of 128 rows and 192 columns: one warpgroup loads, two have 64 rows each. Operands
// come by TMA, 128 values of depth at a time, five such stages ahead. While the tensor cores multiply one tile, a
// warpgroup does, in portions between its instructions for them, what is left to do of the tile before, whose sums it
// holds in other registers. A block of threads goes from tile to tile, as many blocks as there are multiprocessors.
//
// - A row's scale has to be known before the row is: it is a bound. No value of x W + b exceeds |x| |w| + |b|, for the
//   largest |w| and |b| of all columns; so none is cut off. Such a scale is some 13 times too large for numbers that are
//   normally distributed, which in float8, a floating-point format, costs next to no precision. With `beside` every row's
//   is also at least the values' bound in the row of the largest norm. Where norms of rows or columns lie far apart, the
//   smallest numbers get lost: a result of 1/20 of the values' deviation is 0.031 wrong if the bound is 1000 deviations,
//   0.05 if it is 2000 (55 are usual), GELU's still 0.027.
// - The columns of a tile come in such an order (TMA's box has five dimensions for it) that a thread gets 16 of a row
//   side by side, which it stores at once.
//
// FLOPs: 2 x rows x columns x depth.
//
// Source: PTX ISA, asynchronous warpgroup matrix instructions; Ada/Hopper float8 GEMMs with a scale a row and column.

#include "hopper.cuh"

// In a GEMM's terms: tiles of M and N, blocks of K.
constexpr int ROWS = 128, COLUMNS = 192, DEPTH = 128, STAGES = 5, ALL = 384, SUMS = COLUMNS / 2;
constexpr int X_TILE = ROWS * DEPTH, W_TILE = COLUMNS * DEPTH, UNIT = 32;  // rows of W that come at once
constexpr int SPANS = COLUMNS / 64, PIECES = 4 * SPANS;                   // 16 of 64 columns are a thread's
constexpr float LARGEST = 448, SMALLEST = 1e-12f;                         // of e4m3; of what a scale is taken of

struct Stream {
  const float* scale;         // [rows]
  const float* norm;          // [rows]: no less than a row's norm
  const float* weight_scale;  // [columns]
  const u16* bias;            // [columns] bfloat16
  const float* bounds;        // largest norm of a row of W and largest bias: of GELU's columns; of the values'
  u16* plain;                 // [rows, plain] bfloat16
  u8* activated;              // [rows, beside + columns - plain] float8
  float* activated_scale;     // [rows]
  long long rows;
};
// The columns before `plain` stay as they are, in bfloat16; the others go through GELU. `beside` columns in front of
// these are left to the attention, a mean of values, which are the last third of the plain columns.
struct Arguments {
  Stream streams[2];
  int first, tall, wide;  // tiles of rows in the first stream and in both; of columns
  int depth;              // blocks of it
  int columns, plain, beside;
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

__device__ __forceinline__ void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// ---- products: 64 x 192 in float32 a warpgroup, laid out as in wgmma_attention.cu.

#define ACCUMULATORS \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define NUMBERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

// d (+)= a b^T, of 32 bytes of the operands' rows; from zero if not `add`.
__device__ __forceinline__ void wgmma(float (&d)[SUMS], u64 a, u64 b, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {" NUMBERS "}, %96, %97, add, 1, 1;\n}\n"
               : ACCUMULATORS
               : "l"(a), "l"(b), "r"((int)add));
}

// The compiler is to have these values now, and take them to be others afterwards.
__device__ __forceinline__ void hold(float (&d)[SUMS]) { asm volatile("" : ACCUMULATORS::"memory"); }

// ---- after the products

__device__ __forceinline__ u32 bfloat16(float a, float b) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}

// GELU's tanh form of x, times twice `half`; exact to |x| / 4096, by the tanh.
__device__ __forceinline__ float gelu(float x, float half) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * (0.7978845608f + 0.0356774081f * (x * x))));
  const float h = x * half;
  return h * t + h;
}

// Of a tile: where it lies, and of this thread's two rows what is known before the products are.
struct Tile {
  int row, column;  // the first row of the two; the tile's first column
  bool second;
  float scale[2], half[2];  // half of 1 over the scale of the result
};

extern "C" __global__ void __launch_bounds__(ALL, 1)
    wgmma_linear(const __grid_constant__ TensorMap x0, const __grid_constant__ TensorMap x1,
                 const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1,
                 const __grid_constant__ Arguments args) {
  extern __shared__ u8 memory[];
  __shared__ u64 barriers[2 * STAGES + 4];
  __shared__ alignas(16) float weight_scales[2][COLUMNS];
  __shared__ alignas(16) u16 biases[2][COLUMNS];
  __shared__ float norms[8];
  const u32 x_at = (shared_address(memory) + 1023) & ~1023u, w_at = x_at + STAGES * X_TILE;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 full_columns = empty + 8 * STAGES, empty_columns = full_columns + 16;
  const int warps = 8;  // that compute
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init(full + 8 * i, 1);
      init(empty + 8 * i, warps);
    }
    for (int i = 0; i < 2; i++) {
      init(full_columns + 8 * i, 1);
      init(empty_columns + 8 * i, warps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const int tiles = args.tall * args.wide;
  Turn<STAGES> at;
  Turn<2> of_columns;

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != 0) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int high = tile % args.tall, column = tile / args.tall * COLUMNS;
      const bool second = high >= args.first;
      const TensorMap *x = second ? &x1 : &x0, *w = second ? &w1 : &w0;
      const Stream& stream = args.streams[second];
      const int row = (second ? high - args.first : high) * ROWS, width = min(COLUMNS, args.columns - column);
      const u32 barrier = full_columns + 8 * of_columns.index;
      wait(empty_columns + 8 * of_columns.index, of_columns.phase ^ 1);
      expect(barrier, width * 6);
      load_bytes(shared_address(weight_scales[of_columns.index]), stream.weight_scale + column, width * 4, barrier);
      load_bytes(shared_address(biases[of_columns.index]), stream.bias + column, width * 2, barrier);
      of_columns.next();
      for (int i = 0; i < args.depth; i++) {
        const u32 stage = full + 8 * at.index;
        wait(empty + 8 * at.index, at.phase ^ 1);
        expect(stage, X_TILE + W_TILE);
        load_rows(x_at + at.index * X_TILE, x, stage, i * DEPTH, row);
#pragma unroll
        for (int unit = 0; unit < COLUMNS / UNIT; unit++)
          load_unit(w_at + at.index * W_TILE + unit * UNIT * DEPTH, w, stage, i * DEPTH, column / UNIT + unit);
        at.next();
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int lane = threadIdx.x % 32, quad = lane % 4, group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
  auto release = [&](u32 barrier) {
    if (lane == 0) arrive(barrier);
  };

  float floor = 0;  // what none of the attention's values exceeds
  if (args.beside) {
    const Stream& stream = args.streams[0];
    float longest = 0;
    for (int i = threadIdx.x - 128; i < stream.rows; i += 256) longest = fmaxf(longest, stream.norm[i]);
#pragma unroll
    for (int i = 16; i; i >>= 1) longest = fmaxf(longest, __shfl_xor_sync(~0u, longest, i));
    if (lane == 0) norms[warp] = longest;
    asm volatile("bar.sync 1, 256;" ::: "memory");
    for (int i = 0; i < 8; i++) longest = fmaxf(longest, norms[i]);
    floor = longest * stream.bounds[2] + stream.bounds[3];
  }

  auto begin = [&](int number) {
    Tile tile;
    const int high = number % args.tall;
    tile.column = number / args.tall * COLUMNS;
    tile.second = high >= args.first;
    tile.row = (tile.second ? high - args.first : high) * ROWS + warp * 16 + lane / 4;
    const Stream& stream = args.streams[tile.second];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = tile.row + 8 * r;
      const bool inside = row < stream.rows;
      tile.scale[r] = inside ? stream.scale[row] : 0;
      tile.half[r] = 1;
      if (tile.column >= args.plain) {
        const float bound = inside ? stream.norm[row] * stream.bounds[0] + stream.bounds[1] : 1;
        const float scale = fmaxf(fmaxf(bound, floor), SMALLEST) / LARGEST;
        if (tile.column == args.plain && quad == 0 && inside) stream.activated_scale[row] = scale;
        tile.half[r] = 0.5f / scale;
      }
    }
    return tile;
  };

  // 8 of a thread's columns in one of its rows: first or second half of 16, which in float8 are stored together.
  u32 packed[4];
  auto piece = [&](float (&d)[SUMS], const Tile& tile, int number) {
    const int span = number / 4, r = number / 2 % 2, half = number % 2, from = span * 64 + quad * 16;
    const Stream& stream = args.streams[tile.second];
    const int row = tile.row + 8 * r, column = tile.column + from;
    const bool inside = row < stream.rows && column < args.columns;
    const uint4 words = *(const uint4*)(biases[of_columns.index] + from + 8 * half);
    const u32 bias[4] = {words.x, words.y, words.z, words.w};
    float y[8];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 four = *(const float4*)(weight_scales[of_columns.index] + from + 8 * half + 4 * i);
      const float scales[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int k = 8 * half + 4 * i + j;
        const u32 pair = bias[2 * i + j / 2];
        y[4 * i + j] = d[32 * span + k / 2 * 4 + 2 * r + k % 2] * tile.scale[r] * scales[j] +
                       __uint_as_float(j % 2 ? pair & 0xffff0000u : pair << 16);
      }
    }
    if (tile.column < args.plain) {
      uint4* to = (uint4*)(stream.plain + (long long)row * args.plain + column + 8 * half);
      if (inside)
        *to = make_uint4(bfloat16(y[0], y[1]), bfloat16(y[2], y[3]), bfloat16(y[4], y[5]), bfloat16(y[6], y[7]));
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = gelu(y[i], tile.half[r]);
    packed[2 * half] = e4m3(y[0], y[1], y[2], y[3]);
    packed[2 * half + 1] = e4m3(y[4], y[5], y[6], y[7]);
    const long long stride = args.beside + args.columns - args.plain;
    u8* to = stream.activated + row * stride + args.beside + column - args.plain;
    if (half && inside) *(uint4*)to = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  };

  // One block of depth. A warpgroup has two of them under way; `last` is the stage of the one before.
  int last = 0;
  auto start = [&](float (&d)[SUMS], bool add) {
    wait(full + 8 * at.index, at.phase);
    const u64 a = descriptor(x_at + at.index * X_TILE + group * 64 * DEPTH), b = descriptor(w_at + at.index * W_TILE);
    hold(d);
    fence();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(d, a + 2 * k, b + 2 * k, add || k > 0);
    commit();
  };
  auto finish = [&](float (&d)[SUMS]) {  // the one before the last
    wait_but_for<1>();
    hold(d);
    release(empty + 8 * last);
    last = at.index;
    at.next();
  };
  // All products of a tile into d, and meanwhile what is left to do of the one before, `done`.
  auto multiply = [&](float (&d)[SUMS], float (&done)[SUMS], const Tile& before) {
    start(d, false);
    finish(done);
    wait(full_columns + 8 * of_columns.index, of_columns.phase);
#pragma unroll
    for (int i = 0; i < PORTIONS; i++) {
      start(d, true);
#pragma unroll
      for (int j = i * PIECES / PORTIONS; j < (i + 1) * PIECES / PORTIONS; j++) piece(done, before, j);
      finish(d);
    }
    release(empty_columns + 8 * of_columns.index);
    of_columns.next();
    for (int i = 1 + PORTIONS; i < args.depth; i++) {
      start(d, true);
      finish(d);
    }
  };
  auto end = [&](float (&done)[SUMS], const Tile& before) {
    wait_but_for<0>();
    hold(done);
    wait(full_columns + 8 * of_columns.index, of_columns.phase);
#pragma unroll
    for (int i = 0; i < PIECES; i++) piece(done, before, i);
  };

  float even[SUMS], odd[SUMS];
  int tile = blockIdx.x;
  Tile of_even = begin(tile), of_odd;
  start(even, false);
  last = at.index;
  at.next();
  for (int i = 1; i < args.depth; i++) {
    start(even, true);
    finish(even);
  }
  while (true) {
    if ((tile += gridDim.x) >= tiles) return end(even, of_even);
    of_odd = begin(tile);
    multiply(odd, even, of_even);
    if ((tile += gridDim.x) >= tiles) return end(odd, of_odd);
    of_even = begin(tile);
    multiply(even, odd, of_odd);
  }
}
