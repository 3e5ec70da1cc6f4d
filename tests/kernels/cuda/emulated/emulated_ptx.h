// csrc/cuda/ptx.h for the emulated GPU: the same functions, from the tables of the PTX ISA. Asynchronous copies spoil
// their target at once and bring the bytes only when they are waited for, the latest moment that a GPU allows.
#pragma once

namespace qk {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline float to_float(f16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const unsigned u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<std::uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  f16 y;
  std::memcpy(&y.bits, &half, 2);
  return y;
}

template <class T>
inline unsigned pair_of(float low, float high, T) {
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}

inline float max_or_nan(float a, float b) { return a != a || b != b ? __uint_as_float(0x7fffffff) : std::max(a, b); }

template <class V>
inline V load(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(V)) emulated::fail("a misaligned load");
  return *static_cast<const V*>(p);
}
template <class V>
inline void store(void* p, V v) {
  if (reinterpret_cast<std::uintptr_t>(p) % alignof(V)) emulated::fail("a misaligned store");
  *static_cast<V*>(p) = v;
}
template <class V>
inline void store_global(void* p, V v) {
  store(p, v);
}
inline uint4 load16_once(const void* p) { return load<uint4>(p); }
inline uint4 load16_of_blocks(const void* p) { return load<uint4>(p); }
inline unsigned char* shared_memory() { return emulated::shared(); }

inline void copy_later(void* to, const void* from, int size, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(to) % size) emulated::fail("a misaligned target of a copy");
  if (bytes && reinterpret_cast<std::uintptr_t>(from) % size) emulated::fail("a misaligned source of a copy");
  std::memset(to, 0xff, size);
  emulated::block.fibers[emulated::block.current].groups.back().push_back({to, from, size, bytes});
}
inline void copy16(void* to, const void* from, int bytes) { copy_later(to, from, 16, bytes); }
inline void copy4(void* to, const void* from, int bytes) { copy_later(to, from, 4, bytes); }
inline void close_copies() { emulated::block.fibers[emulated::block.current].groups.emplace_back(); }
template <int Newest>
inline void wait_copies() {
  auto& groups = emulated::block.fibers[emulated::block.current].groups;
  while (groups.size() > Newest + 1) {
    for (const emulated::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

// One product of 16 x 8. A register holds `Wide` neighbours in k; `number` gives one of them.
template <int Wide, class Sum, class Number>
inline void multiply_tile(Sum (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], Number number) {
  struct Fragments {
    Sum a[4][Wide], b[2][Wide];
  } mine;
  for (int i = 0; i < Wide; ++i) {
    for (int reg = 0; reg < 4; ++reg) mine.a[reg][i] = number(a[reg], i);
    for (int reg = 0; reg < 2; ++reg) mine.b[reg][i] = number(b[reg], i);
  }
  const Fragments* all = emulated::exchange(mine);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half)
      for (int owner = 0; owner < 4; ++owner) {
        const Sum* left = all[lane / 4 * 4 + owner].a[(i >> 1) + 2 * half];
        const Sum* right = all[(lane % 4 * 2 + (i & 1)) * 4 + owner].b[half];
        for (int at = 0; at < Wide; ++at) c[i] += left[at] * right[at];
      }
  emulated::release();
}
template <class T>
inline void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], T) {
  multiply_tile<2>(c, a, b,
                   [](unsigned reg, int i) { return to_float(T{static_cast<std::uint16_t>(reg >> (16 * i))}); });
}
inline void multiply(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], std::int8_t) {
  multiply_tile<4>(c, a, b, [](unsigned reg, int i) -> int { return static_cast<std::int8_t>(reg >> (8 * i)); });
}

template <class T>
inline unsigned fma2(unsigned a, unsigned b, unsigned c, T) {
  unsigned d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto part = [&](unsigned v) { return to_float(T{static_cast<std::uint16_t>(v >> shift)}); };
    d |= static_cast<unsigned>(from_float<T>(std::fma(part(a), part(b), part(c))).bits) << shift;
  }
  return d;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, void*, A... arguments) {
  emulated::run(grid, threads, shared_bytes, [=] { kernel(arguments...); });
  return 0;
}

}  // namespace qk
