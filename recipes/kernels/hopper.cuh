// What the kernels for Hopper's tensor cores share: barriers, asynchronous products, float8.
//
// Source: PTX ISA, mbarrier and wgmma instructions.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u8 bytes[128];
};
// ---- barriers

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}\n" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

// Which of several buffers is next, and how often all were used, modulo 2.
template <int N>
struct Turn {
  int index = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++index == N) {
      index = 0;
      phase ^= 1;
    }
  }
};

// ---- products

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_but_for() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The same in all threads of a warp. Told so, the compiler keeps what follows from it where it takes none of the
// registers' time, which the tensor cores need.
__device__ __forceinline__ int of_warp(int value) { return __shfl_sync(~0u, value, 0); }

// Of rows of 128 bytes, swizzled over 128 bytes, in groups of 8, the lower half; the upper is always DESCRIPTOR. Of a tile
// n bytes further on it is n / 16 more.
#define DESCRIPTOR "0x40000040"
__device__ __forceinline__ u32 descriptor(u32 tile) { return (tile & 0x3FFFF) >> 4 | 1 << 16; }

// ---- float8

__device__ __forceinline__ u32 e4m3(float a, float b, float c, float d) {
  u32 packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}
__device__ __forceinline__ u32 e4m3(u32 a, u32 b) {
  u32 packed;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f16x2 low, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(packed)
      : "r"(a), "r"(b));
  return packed;
}

// ---- float16, two at once, and 8 times more exact than a float8

__device__ __forceinline__ u32 mul(u32 a, u32 b) {
  u32 c;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 add(u32 a, u32 b) {
  u32 c;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 fma(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 float16(float a, float b) {
  u32 packed;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}
__device__ __forceinline__ float2 floats(u32 pair) {
  float2 x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
      : "=f"(x.x), "=f"(x.y)
      : "r"(pair));
  return x;
}
