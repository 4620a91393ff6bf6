// The tiles of a GEMM's result in the order in which blocks of threads take them.
//
// All rows' tiles of a column after the other: those that run at once share their weights, and the rows are read anew
// for each column, from the L2 cache. Of so many rows that they don't fit into it, `group` tiles at once, all columns of
// them before the next. No CUDA here but `__device__`: tests/recipes/kernels/test_tiles.py compiles it for a CPU.

struct Place {
  int across, row;  // its number among those side by side; its first row in its stream
  bool second;      // which stream that is
};

// What a block of threads multiplies at once: a tile, over blocks of depth. `part`: which of those that share the tile.
// The first waits for the others, and comes last: blocks of threads with lower numbers run, or have run.
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

struct Tiles {
  int first, tall, wide;  // tiles of rows in the first stream and in both; of columns
  int group;              // of rows

  __device__ int number() const { return tall * wide; }

  __device__ Place operator[](int tile) const {
    const int before = tile / (group * wide) * group, within = tile - before * wide;
    const int height = tall - before < group ? tall - before : group, high = before + within % height;
    const bool second = high >= first;
    return Place{within / height, (second ? high - first : high) * ROWS, second};
  }
};
