// Runs the INT8 linear map of csrc/cuda on a CPU: the kernels' own loops (int8_pipeline.h), maps (gemm_maps.h) and
// epilogue (epilogue.h), over models of the instructions, written from the PTX ISA and not from the kernels:
//
// - mbarriers with phases, arrivals and bytes; a wait for a phase that cannot come any more is a deadlock;
// - TMA that writes swizzled boxes, zeros outside, some time after it was asked;
// - wgmma that reads shared memory through descriptors as late as its wait allows, so that a stage that was freed or
//   overwritten too early shows;
// - quads whose four lanes run in lock step from one exchange to the next.
//
// The loops of the producer and the consumers, and the lanes of a quad, are fibers, run in an order that a seed
// shuffles.
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "epilogue.h"
#include "int8_linear.h"
#include "int8_pipeline.h"

namespace {

using namespace qk;

// -- fibers ----------------------------------------------------------------------------------------------------------

class Fibers {
 public:
  explicit Fibers(unsigned seed) : random_(seed) {}

  void add(std::function<void()> body) { fibers_.push_back({std::move(body), std::vector<char>(1 << 18), {}, false}); }

  // Runs all to their ends. `idle` is called when each has had a turn without progress since the last one.
  void run(const std::function<void()>& stuck) {
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &main_;
      current_ = &fiber;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::enter), 2,
                  static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(this) >> 32),
                  static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(this)));
    }
    left_ = fibers_.size();
    fruitless_ = 0;
    while (left_ > 0) {
      Fiber& next = fibers_[random_() % fibers_.size()];
      if (next.done) continue;
      current_ = &next;
      progress_ = false;
      swapcontext(&main_, &next.context);
      if (failure_) std::rethrow_exception(failure_);
      if (next.done) --left_, progress_ = true;
      fruitless_ = progress_ ? 0 : fruitless_ + 1;
      if (fruitless_ > 200) stuck();
    }
  }

  void pause() { swapcontext(&current_->context, &main_); }
  void progress() { progress_ = true; }
  unsigned random() { return random_(); }

 private:
  struct Fiber {
    std::function<void()> body;
    std::vector<char> stack;
    ucontext_t context;
    bool done;
  };

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fibers*>(std::uintptr_t{high} << 32 | low);
    Fiber* fiber = self->current_;
    try {
      fiber->body();
    } catch (...) {
      self->failure_ = std::current_exception();
    }
    fiber->done = true;
  }

  std::vector<Fiber> fibers_;
  Fiber* current_ = nullptr;
  std::size_t left_ = 0;
  int fruitless_ = 0;
  ucontext_t main_;
  std::minstd_rand random_;
  bool progress_ = false;
  std::exception_ptr failure_;
};

void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}

// Whether only the first and the last two tiles are computed: for results too large to be gone through.
bool ends_only = false;
bool left_out(int tile, int tiles) { return ends_only && tile > 0 && tile + 2 < tiles; }

// -- the epilogue, quad by quad --------------------------------------------------------------------------------------

// What lane t passes in one exchange is there for the others when all four have passed theirs.
struct Exchange {
  Fibers& fibers;
  std::uint32_t words[4] = {};
  int passed = 0, taken = 0, rounds = 0;
};

struct Quad {
  Exchange& exchange;
  int t, rounds = 0;
  std::uint32_t operator()(std::uint32_t word, int mask) {
    Exchange& x = exchange;
    while (x.rounds != rounds) x.fibers.pause();
    x.words[t] = word;
    ++x.passed;
    while (x.passed < 4) x.fibers.pause();
    const std::uint32_t got = x.words[t ^ mask];
    x.fibers.progress();
    ++rounds;
    if (++x.taken == 4) {
      x.passed = x.taken = 0;
      ++x.rounds;
    } else {
      while (x.rounds != rounds) x.fibers.pause();
    }
    return got;
  }
};

// Finishes the accumulators of 128 threads; `sums(thread)` points at those of one. ROWS a warp's step, as in part_at.
template <int NI, int ROWS, int COUNT, class T, class Sums, class FirstRow>
void finish_threads(const Epilogue& e, int column, Sums sums, FirstRow first_row, unsigned seed) {
  for (int quad = 0; quad < 32; ++quad) {
    Fibers fibers(seed + static_cast<unsigned>(quad));
    Exchange exchange{fibers};
    for (int t = 0; t < 4; ++t)
      fibers.add([&, t] {
        T mine[COUNT];
        std::memcpy(mine, sums(4 * quad + t), sizeof mine);
        Quad lane{exchange, t};
        finish_all<NI, ROWS>(e, column, [&] { return Lane{first_row(4 * quad + t), t}; }, mine, lane);
      });
    fibers.run([] { throw std::logic_error("lanes of a quad wait for each other"); });
  }
}

// -- sm_90 -----------------------------------------------------------------------------------------------------------

struct Barrier {
  int expected = 0, arrived = 0, bytes = 0, phase = 0;
  void settle() {
    if (arrived == expected && bytes == 0) arrived = 0, ++phase;
    require(arrived <= expected, "more arrivals at a barrier than it was made for");
  }
};

struct Matrix {
  const std::int8_t* data;
  std::int64_t rows, pitch;
  int k;
};

// A box of TMA on its way: each is `height` rows of 128 bytes, swizzled by XOR of address bits 4-6 with bits 7-9.
struct Box {
  Matrix from;
  int to, barrier, k, row, height;
};

// What a warp group asked wgmma for, until it is done.
struct Product {
  std::vector<std::uint64_t> a, b;  // descriptors, step by step and instruction by instruction
  std::vector<int> index, accumulate;
};

template <class C>
struct Block {
  Fibers fibers;
  std::vector<unsigned char> shared = std::vector<unsigned char>(C::stages * C::stage_bytes, 0xA5);
  Barrier barriers[C::barriers];
  std::vector<Box> boxes;
  std::set<std::pair<std::int64_t, int>>& finished;  // first row and column of what came to an epilogue
  Block(unsigned seed, std::set<std::pair<std::int64_t, int>>& done) : fibers(seed), finished(done) {
    for (int i = 0; i < C::barriers; ++i) barriers[i].expected = i < C::empty ? 1 : i < C::turn ? C::readers : 4;
  }

  // Lets one box that was asked for arrive.
  bool deliver() {
    if (boxes.empty()) return false;
    const std::size_t which = fibers.random() % boxes.size();
    const Box box = boxes[which];
    boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(which));
    for (int row = 0; row < box.height; ++row)
      for (int byte = 0; byte < 128; ++byte) {
        const std::int64_t r = box.row + row, k = box.k + byte;
        const int address = box.to + row * 128 + byte;
        const bool inside = r < box.from.rows && k < box.from.k;
        shared[address ^ (address >> 7 & 7) << 4] =
            inside ? static_cast<unsigned char>(box.from.data[r * box.from.pitch + k]) : 0;
      }
    barriers[box.barrier].bytes -= box.height * 128;
    barriers[box.barrier].settle();
    return true;
  }
};

template <class C>
struct Model {
  Block<C>& block;
  Matrix a, b;
  const Epilogue& epilogue;
  unsigned seed;
  std::vector<Product> flying = {};
  int first_row = 0;
  int sums[C::MI][64][C::NI] = {};
  float totals[64][C::NI] = {}, scales[64] = {};
  std::int64_t scale_groups = 0;

  void wait(int barrier, int parity) {
    // A barrier in phase p has finished the phases before: waiting for parity q returns when (p - 1) has it.
    while ((block.barriers[barrier].phase + 1) % 2 != parity) {
      if (block.fibers.random() % 2 == 0 && block.deliver()) block.fibers.progress();
      block.fibers.pause();
    }
    block.fibers.progress();
    if (block.fibers.random() % 3 == 0) block.fibers.pause();
  }

  void arrive(int barrier) {
    block.barriers[barrier].arrived += 4;  // lane 0 of each of four warps
    block.barriers[barrier].settle();
  }

  void load(int stage, int k, int row_a, int row_b) {
    Barrier& full = block.barriers[C::full + stage];
    full.bytes += C::stage_bytes;
    ++full.arrived;
    full.settle();
    const int to = stage * C::stage_bytes;
    block.boxes.push_back({a, to, C::full + stage, k, row_a, C::tile_m});
    block.boxes.push_back({b, to + C::a_bytes, C::full + stage, k, row_b, C::tile_n});
  }

  void begin(int row) {
    require(flying.empty(), "a tile begins while products of the last one are on their way");
    first_row = row;
    std::memset(totals, 0, sizeof totals);
  }

  void prepare(int k_step) {
    if (!C::groups) return;
    for (int row = 0; row < 64; ++row)
      scales[row] = first_row + row < epilogue.m ? epilogue.x_scale[(first_row + row) * scale_groups + k_step] : 0.0f;
  }

  void multiply(int stage, int row, int k_step) {
    const std::uint32_t from = static_cast<std::uint32_t>(stage) * C::stage_bytes;
    Product product;
    for (int step = 0; step < k_block / 32; ++step)
      for (int i = 0; i < C::MI; ++i) {
        product.a.push_back(descriptor(from + row * k_block) + (step * 32 + i * 64 * k_block) / 16);
        product.b.push_back(descriptor(from + C::a_bytes) + step * 32 / 16);
        product.index.push_back(i);
        product.accumulate.push_back(step > 0 || (k_step > 0 && !C::groups));
      }
    flying.push_back(product);
  }

  // Byte k (0..31) of row `row` of the operand behind a descriptor, by its fields.
  int operand(std::uint64_t d, int row, int k) const {
    require(d >> 62 == 1, "the descriptor's swizzle is not 128 bytes");
    require((d >> 49 & 7) == 0, "the descriptor has a base offset");
    const int start = static_cast<int>(d & 0x3FFF) * 16, stride = static_cast<int>(d >> 32 & 0x3FFF) * 16;
    int address = start + row / 8 * stride + row % 8 * 128 + k;
    address ^= (address >> 7 & 7) << 4;
    return static_cast<std::int8_t>(block.shared.at(static_cast<std::size_t>(address)));
  }

  template <int PENDING>
  void settle() {
    while (flying.size() > PENDING) {
      const Product product = flying.front();
      flying.erase(flying.begin());
      for (std::size_t step = 0; step < product.a.size(); ++step) {
        static thread_local int left[64][32], right[C::NI][32];
        for (int k = 0; k < 32; ++k) {
          for (int row = 0; row < 64; ++row) left[row][k] = operand(product.a[step], row, k);
          for (int n = 0; n < C::NI; ++n) right[n][k] = operand(product.b[step], n, k);
        }
        for (int row = 0; row < 64; ++row)
          for (int n = 0; n < C::NI; ++n) {
            int& sum = sums[product.index[step]][row][n];
            if (!product.accumulate[step]) sum = 0;
            for (int k = 0; k < 32; ++k) sum += left[row][k] * right[n][k];
          }
      }
    }
    block.fibers.progress();
    block.fibers.pause();
  }

  void promote(int) {
    for (int row = 0; row < 64; ++row)
      for (int n = 0; n < C::NI; ++n)
        totals[row][n] = std::fma(static_cast<float>(sums[0][row][n]), scales[row], totals[row][n]);
  }

  // Hands each thread its registers, in the order of "Register Fragments for wgmma", and runs the real epilogue.
  void finish(int row, int column) {
    require(flying.empty(), "the epilogue begins while products are on their way");
    require(block.finished.insert({row, column}).second, "a tile is finished twice");
    require(row == first_row, "the epilogue's rows are not those that were multiplied");
    using T = std::conditional_t<C::groups, float, int>;
    static thread_local T registers[128][C::sums];
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < C::MI; ++i)
        for (int d = 0; d < C::NI / 2; ++d) {
          const int r = thread / 32 * 16 + thread % 32 / 4 + d % 4 / 2 * 8, n = d / 4 * 8 + thread % 4 * 2 + d % 2;
          if constexpr (C::groups)
            registers[thread][d] = totals[r][n];
          else
            registers[thread][i * C::NI / 2 + d] = sums[i][r][n];
        }
    finish_threads<C::NI, 64, C::sums, T>(
        epilogue, column, [&](int thread) { return registers[thread]; },
        [&](int thread) { return row + thread / 32 * 16 + fragment_row(thread % 32, 0); }, seed);
    block.fibers.progress();
  }
};

template <class C>
void run_sm90(const Matrix& x, const Matrix& codes, const Epilogue& epilogue, int processors, unsigned seed) {
  const int rows = static_cast<int>(ceil_div(epilogue.m, C::tile_m)),
            columns = static_cast<int>(ceil_div(epilogue.n, C::tile_n));
  const int blocks = rows * columns < processors ? rows * columns : processors;
  std::set<std::pair<std::int64_t, int>> finished;
  for (int b = 0; b < blocks; ++b) {
    if (left_out(b, blocks)) continue;
    Block<C> block(seed + static_cast<unsigned>(b), finished);
    const Grid grid{rows, columns, static_cast<int>(ceil_div(x.k, k_block)), b, blocks};
    std::vector<std::unique_ptr<Model<C>>> models;
    for (int agent = 0; agent < 3; ++agent) {
      models.push_back(std::make_unique<Model<C>>(Model<C>{block, x, codes, epilogue, seed}));
      models.back()->scale_groups = ceil_div(x.k, 128);
    }
    block.fibers.add([&] { produce<C>(*models[0], grid); });
    block.fibers.add([&] { consume<C>(*models[1], grid, 0); });
    block.fibers.add([&] { consume<C>(*models[2], grid, 1); });
    block.fibers.run([&] {
      if (!block.deliver()) throw std::logic_error("the producer and the consumers wait for each other");
    });
    require(block.boxes.empty(), "boxes were loaded that nobody used");
  }
  const std::size_t shares = static_cast<std::size_t>(rows) * columns * (C::pingpong ? 1 : 2);
  require(finished.size() == shares || ends_only, "a tile is not finished");
}

// -- sm_80 -----------------------------------------------------------------------------------------------------------

// One block's stages one after another: the loops of int8_linear_sm80.cu, with its maps, over models of ldmatrix and
// mma.
template <int MI, bool GROUPS>
void run_sm80(const Matrix& x, const Matrix& codes, const Epilogue& epilogue, unsigned seed) {
  constexpr int depth = 64, tile_m = 64 * MI;
  const int rows = static_cast<int>(ceil_div(epilogue.m, tile_m)),
            columns = static_cast<int>(ceil_div(epilogue.n, 128));
  const int width = (x.k + 15) / 16 * 16, steps = static_cast<int>(ceil_div(x.k, depth));
  std::vector<unsigned char> shared((tile_m + 128) * depth);
  for (int tile = 0; tile < rows * columns; ++tile) {
    if (left_out(tile, rows * columns)) continue;
    const Place at = tile_at(tile, rows, columns);
    std::vector<int> sums(128 * MI * 64);
    std::vector<float> totals(128 * MI * 64);
    for (int step = 0; step < steps; ++step) {
      std::fill(shared.begin(), shared.end(), 0xA5);
      const auto copy = [&](const Matrix& from, std::int64_t first, int count, int base) {
        for (int number = 0; number < count * 4; ++number) {
          const int row = number / 4, chunk = number % 4;
          const bool inside = first + row < from.rows && step * depth + 16 * chunk < width;
          unsigned char* to = &shared.at(static_cast<std::size_t>(base + swizzle64(row, chunk)));
          if (inside)
            std::memcpy(to, from.data + (first + row) * from.pitch + step * depth + 16 * chunk, 16);
          else
            std::memset(to, 0, 16);
        }
      };
      copy(x, std::int64_t{at.row} * tile_m, tile_m, 0);
      copy(codes, std::int64_t{at.column} * 128, 128, tile_m * depth);
      for (int warp = 0; warp < 4; ++warp)
        for (int half = 0; half < 2; ++half) {
          // ldmatrix: matrix i's row r is the 16 bytes that lane 8i + r points at.
          std::int8_t a[MI][4][8][16], b[8][4][8][16];
          for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < MI; ++i) {
              const Chunk from = operand_a(lane);
              std::memcpy(a[i][lane / 8][lane % 8],
                          &shared.at(static_cast<std::size_t>(
                              swizzle64((warp * MI + i) * 16 + from.row, half * 2 + from.chunk))),
                          16);
            }
            for (int pair = 0; pair < 8; ++pair) {
              const Chunk from = operand_b(lane);
              std::memcpy(b[pair][lane / 8][lane % 8],
                          &shared.at(static_cast<std::size_t>(tile_m * depth +
                                                              swizzle64(pair * 16 + from.row, half * 2 + from.chunk))),
                          16);
            }
          }
          // mma.m16n8k32: A registers are (rows 0-7, K 0-15), (8-15, 0-15), (0-7, 16-31), (8-15, 16-31); B (K 0-15),
          // (K 16-31); C c0, c1: row lane / 4, columns 2 (lane % 4) and next; c2, c3: 8 rows further.
          for (int i = 0; i < MI; ++i)
            for (int n8 = 0; n8 < 16; ++n8)
              for (int lane = 0; lane < 32; ++lane)
                for (int c = 0; c < 4; ++c) {
                  const int row = lane / 4 + c / 2 * 8, n = lane % 4 * 2 + c % 2;
                  int sum = 0;
                  for (int k = 0; k < 32; ++k)
                    sum += a[i][row / 8 + k / 16 * 2][row % 8][k % 16] * b[n8 / 2][n8 % 2 * 2 + k / 16][n][k % 16];
                  sums[static_cast<std::size_t>(((warp * 32 + lane) * MI + i) * 64 + n8 * 4 + c)] += sum;
                }
        }
      if (GROUPS && (step % 2 == 1 || step == steps - 1))
        for (int thread = 0; thread < 128; ++thread)
          for (int i = 0; i < MI * 64; ++i) {
            const std::int64_t row =
                std::int64_t{at.row} * tile_m + thread / 32 * 16 * MI + fragment_row(thread % 32, i);
            const float scale = row < epilogue.m ? epilogue.x_scale[row * ceil_div(x.k, 128) + step / 2] : 0.0f;
            const std::size_t where = static_cast<std::size_t>(thread * MI * 64 + i);
            totals[where] = std::fma(static_cast<float>(sums[where]), scale, totals[where]);
            sums[where] = 0;
          }
    }
    using T = std::conditional_t<GROUPS, float, int>;
    const auto registers = [&](int thread) {
      if constexpr (GROUPS)
        return &totals[static_cast<std::size_t>(thread * MI * 64)];
      else
        return &sums[static_cast<std::size_t>(thread * MI * 64)];
    };
    finish_threads<128, 16, MI * 64, T>(
        epilogue, at.column * 128, registers,
        [&](int thread) { return at.row * tile_m + thread / 32 * 16 * MI + fragment_row(thread % 32, 0); }, seed);
  }
}

// Tiles each once, for any grid; and no two of the eight rows that ldmatrix reads at once in the same banks.
void check_maps() {
  for (int rows = 1; rows < 30; ++rows)
    for (int columns = 1; columns < 8; ++columns) {
      std::set<std::pair<int, int>> seen;
      for (int tile = 0; tile < rows * columns; ++tile) {
        const Place at = tile_at(tile, rows, columns);
        require(at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns, "a tile lies outside");
        require(seen.insert({at.row, at.column}).second, "a tile comes twice");
      }
    }
  for (int first = 0; first < 64; first += 8)
    for (int chunk = 0; chunk < 4; ++chunk) {
      std::set<int> banks;
      for (int row = first; row < first + 8; ++row) banks.insert(swizzle64(row, chunk) % 128 / 16);
      require(banks.size() == 8, "ldmatrix meets a bank twice");
    }
}

std::string message;

}  // namespace

extern "C" {

const char* emulator_message() { return message.c_str(); }

void emulator_ends_only(int on) { ends_only = on != 0; }

int emulator_check_maps() try {
  check_maps();
  return 0;
} catch (const std::exception& error) {
  message = error.what();
  return 1;
}

// The arguments of qk_cuda_int8_linear without device and stream, for `chip` 80 or 90 with `processors` blocks at once.
// 0, or 1 with the reason in emulator_message().
int emulate_int8_linear(int chip, int processors, unsigned seed, const void* x, std::int64_t m, int k,
                        std::int64_t x_pitch, const float* x_scale, int x_scale_kind, const void* codes,
                        std::int64_t code_pitch, const float* w_scale, int n, const float* bias, int activation,
                        const void* residual, int residual_type, void* out, int out_type, const float* out_scale,
                        int out_scale_per_channel, const float* out_zero_point, float* group_scales,
                        int configuration) try {
  Epilogue e{static_cast<int>(m),
             n,
             x_scale,
             x_scale_kind,
             w_scale,
             bias,
             activation,
             residual,
             residual_type,
             out,
             out_type,
             out_scale,
             out_scale_per_channel,
             out_zero_point,
             group_scales,
             false};
  e.wide = rows_are_aligned(e);
  if (configuration < 0) configuration = choose_configuration(m, n, k, processors);
  const Matrix a{static_cast<const std::int8_t*>(x), m, x_pitch, k};
  const Matrix b{static_cast<const std::int8_t*>(codes), n, code_pitch, k};
  if (chip == 90) {
    if (x_scale_kind == 2)
      run_sm90<Grouped>(a, b, e, processors, seed);
    else if (configuration == 0)
      run_sm90<Narrow>(a, b, e, processors, seed);
    else if (configuration == 1)
      run_sm90<Square>(a, b, e, processors, seed);
    else
      run_sm90<Deep>(a, b, e, processors, seed);
  } else if (x_scale_kind == 2) {
    run_sm80<1, true>(a, b, e, seed);
  } else if (configuration == 0) {
    run_sm80<1, false>(a, b, e, seed);
  } else {
    run_sm80<2, false>(a, b, e, seed);
  }
  return 0;
} catch (const std::exception& error) {
  message = error.what();
  return 1;
}
}
