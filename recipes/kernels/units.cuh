// Tiles shared by depth: what blocks of threads do at once, in the order in which they take it. No CUDA here but
// `__device__`: tests/recipes/kernels/test_tiles.py compiles it for a CPU.

// What a block of threads does at once: a tile, over blocks of depth. `part`: which of those that share the tile.
// The first comes last: where it waits for the others, blocks of threads with lower numbers run, or have run.
struct Unit {
  int tile, begin, end, part;
};

// All tiles but those that would be left for fewer blocks of threads than there are: these are shared, `parts` to each.
struct Units {
  int whole, left, parts;  // tiles, and tiles, and how many share one of the latter

  __device__ int number() const { return whole + left * parts; }

  __device__ Unit at(int unit, int depth) const {
    if (unit < whole) return Unit{unit, 0, depth, 0};
    const int part = parts - 1 - (unit - whole) / left, tile = whole + (unit - whole) % left;
    return Unit{tile, depth * part / parts, depth * (part + 1) / parts, part};
  }
};
