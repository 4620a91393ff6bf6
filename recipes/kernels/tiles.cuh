// The tiles of a GEMM's result in the order in which blocks of threads take them.
//
// All rows' tiles of a column after the other: those that run at once share their weights, and the rows are read anew
// for each column, from the L2 cache. Of so many rows that they don't fit into it, `group` tiles at once, all columns of
// them before the next. No CUDA here but `__device__`: tests/recipes/kernels/test_tiles.py compiles it for a CPU.

struct Place {
  int across, row;  // its number among those side by side; its first row in its stream
  bool second;      // which stream that is
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
