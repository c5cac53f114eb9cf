// The fast CPU kernel, for AVX2 and F16C: compiled on the machine that runs it by native.py, with the numbers of prng.py.
//
// Rademacher sums: the words of four seeds are turned into four-bit numbers, one for each element, and a byte shuffle
// looks up the sum of those weights whose bit is set, for 32 elements at once. Sums have 28 bits, in four planes of
// seven, so that two of them can be added in bytes before they are widened. Everything is exact.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 8;               // Philox blocks in one strip
constexpr int STRIP = 128 * LANES;     // signs in one strip
constexpr int NORMALS = 4 * LANES;     // normal numbers in one strip
constexpr int BATCH = 16;              // seeds that are drawn together
constexpr int TOGETHER = 8;            // seeds whose normal numbers are made together
constexpr int PLANES = 4;              // of seven bits
constexpr int64_t OFFSET = 1 << 27;    // makes the sum of four weights of 25 bits positive
constexpr int BATCHES_TO_FLUSH = 128;  // 256 sums of two bytes below 128 fit into 16 bits
constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, W0 = 0x9E3779B9, W1 = 0xBB67AE85;

using Vec = __m256i;

inline Vec all(uint32_t x) { return _mm256_set1_epi32((int)x); }
inline Vec high(Vec x) { return _mm256_srli_epi64(x, 32); }

// Where a strip stands: blocks `first` to first + 7 of a parameter. What does not depend on the seed is done here.
struct Place {
    Vec high0[2], low0[2];  // of block * M0, blocks 0, 2, 4, 6 and 1, 3, 5, 7, in 64-bit lanes
    uint32_t high1, low1, block_high, parameter_high;

    Place(uint64_t parameter, uint64_t first) {
        uint64_t product = (uint64_t)(uint32_t)parameter * M1;
        high1 = (uint32_t)(product >> 32), low1 = (uint32_t)product;
        block_high = (uint32_t)(first >> 32), parameter_high = (uint32_t)(parameter >> 32);
        for (int odd = 0; odd < 2; odd++) {
            Vec block = _mm256_add_epi64(_mm256_set1_epi64x((uint32_t)first), _mm256_set_epi64x(6 + odd, 4 + odd, 2 + odd, odd));
            Vec of_block = _mm256_mul_epu32(block, all(M0));
            high0[odd] = _mm256_xor_si256(high(of_block), all(parameter_high)), low0[odd] = of_block;
        }
    }
};

// The four words of eight blocks: words[w] has word w of each block, in order.
inline void philox(const Place& at, uint64_t seed, Vec words[4]) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t first = at.high1 ^ at.block_high ^ k0;  // round 1: word 0 is the same for all blocks
    uint64_t of_first = (uint64_t)first * M0;
    Vec c0[2], c1[2], c2[2], c3[2];
    Vec key1 = all(k1);
    k0 += W0, k1 += W1;
    Vec key0 = all(at.low1 ^ k0), key2 = all((uint32_t)(of_first >> 32) ^ k1), low = all((uint32_t)of_first);
    for (int odd = 0; odd < 2; odd++) {  // round 2
        Vec product = _mm256_mul_epu32(_mm256_xor_si256(at.high0[odd], key1), all(M1));
        c0[odd] = _mm256_xor_si256(high(product), key0), c1[odd] = product;
        c2[odd] = _mm256_xor_si256(at.low0[odd], key2), c3[odd] = low;
    }
    for (int round = 2; round < 10; round++) {
        k0 += W0, k1 += W1;
        key0 = all(k0), key1 = all(k1);
        for (int odd = 0; odd < 2; odd++) {
            Vec p0 = _mm256_mul_epu32(c0[odd], all(M0)), p1 = _mm256_mul_epu32(c2[odd], all(M1));
            c0[odd] = _mm256_xor_si256(high(p1), _mm256_xor_si256(c1[odd], key0)), c1[odd] = p1;
            c2[odd] = _mm256_xor_si256(high(p0), _mm256_xor_si256(c3[odd], key1)), c3[odd] = p0;
        }
    }
    auto join = [](Vec even, Vec odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); };
    words[0] = join(c0[0], c0[1]), words[1] = join(c1[0], c1[1]);
    words[2] = join(c2[0], c2[1]), words[3] = join(c3[0], c3[1]);
}

// ---------------------------------------------------------------------------------------------- Rademacher sums

struct Tables {  // of sixteen seeds: for each four of them and each plane, the seven bits of each of the sixteen sums
    uint8_t bits[4][PLANES][16];
};

void fill(Tables& tables, const int32_t* weights, int count) {
    for (int group = 0; group < 4; group++) {
        for (int subset = 0; subset < 16; subset++) {
            int64_t sum = OFFSET;
            for (int k = 0; k < 4; k++)
                if (subset >> k & 1 && 4 * group + k < count) sum += weights[4 * group + k];
            for (int plane = 0; plane < PLANES; plane++) tables.bits[group][plane][subset] = sum >> 7 * plane & 127;
        }
    }
}

// Swaps the bits of a that `mask` << shift names with those of b that mask names.
template <int shift>
inline void swap_bits(Vec& a, Vec& b, Vec mask) {
    Vec difference = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(a, shift), b), mask);
    b = _mm256_xor_si256(b, difference);
    a = _mm256_xor_si256(a, _mm256_slli_epi16(difference, shift));
}

// From words of four seeds to numbers below 16: bit k of byte i of numbers[p] is bit p of byte i of words k.
inline void numbers_of(Vec w0, Vec w1, Vec w2, Vec w3, Vec numbers[8]) {
    const Vec ones = _mm256_set1_epi8(0x55), twos = _mm256_set1_epi8(0x33), nibble = _mm256_set1_epi8(15);
    swap_bits<1>(w0, w1, ones);
    swap_bits<1>(w2, w3, ones);
    swap_bits<2>(w0, w2, twos);
    swap_bits<2>(w1, w3, twos);
    const Vec mixed[4] = {w0, w1, w2, w3};
    for (int p = 0; p < 4; p++) {
        numbers[p] = _mm256_and_si256(mixed[p], nibble);
        numbers[p + 4] = _mm256_and_si256(_mm256_srli_epi16(mixed[p], 4), nibble);
    }
}

struct Sums {  // of one strip: per word, plane and bit, 32 bytes' sums, all of them and the odd ones
    Vec total[4][PLANES][8], odd[4][PLANES][8];
};

inline void add(Sums& sums, int word, const Tables& tables, const Vec numbers[4][8]) {
    for (int plane = 0; plane < PLANES; plane++) {
        Vec table[4];
        for (int group = 0; group < 4; group++)
            table[group] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)tables.bits[group][plane]));
        for (int bit = 0; bit < 8; bit++) {
            Vec a = _mm256_add_epi8(_mm256_shuffle_epi8(table[0], numbers[0][bit]), _mm256_shuffle_epi8(table[1], numbers[1][bit]));
            Vec b = _mm256_add_epi8(_mm256_shuffle_epi8(table[2], numbers[2][bit]), _mm256_shuffle_epi8(table[3], numbers[3][bit]));
            Vec& total = sums.total[word][plane][bit];
            Vec& odd = sums.odd[word][plane][bit];
            total = _mm256_add_epi16(total, _mm256_add_epi16(a, b));
            odd = _mm256_add_epi16(odd, _mm256_add_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)));
        }
    }
}

// Adds the sums to `out`, one number for each element, and starts them again.
void flush(Sums& sums, int64_t* out) {
    for (int word = 0; word < 4; word++)
        for (int plane = 0; plane < PLANES; plane++)
            for (int bit = 0; bit < 8; bit++) {
                uint16_t total[16], odd[16];
                std::memcpy(total, &sums.total[word][plane][bit], 32);
                std::memcpy(odd, &sums.odd[word][plane][bit], 32);
                for (int pair = 0; pair < 16; pair++) {
                    int64_t* at = out + 128 * (pair / 2) + 32 * word + 16 * (pair % 2) + bit;
                    at[0] += (int64_t)(uint16_t)(total[pair] - (odd[pair] << 8)) << 7 * plane;
                    at[8] += (int64_t)odd[pair] << 7 * plane;
                }
            }
    std::memset(&sums, 0, sizeof sums);
}

void rademacher_strip(const Place& at, const uint64_t* seeds, int64_t count, const Tables* tables, int64_t models,
                      std::vector<Sums>& sums, int64_t* out) {
    const int64_t batches = (count + BATCH - 1) / BATCH;
    std::memset(out, 0, sizeof(int64_t) * models * STRIP);
    for (int64_t batch = 0; batch < batches; batch++) {
        Vec words[BATCH][4];
        for (int k = 0; k < BATCH; k++) philox(at, seeds[std::min(batch * BATCH + k, count - 1)], words[k]);
        for (int word = 0; word < 4; word++) {
            Vec numbers[4][8];
            for (int group = 0; group < 4; group++) {
                const auto* w = words + 4 * group;
                numbers_of(w[0][word], w[1][word], w[2][word], w[3][word], numbers[group]);
            }
            for (int64_t m = 0; m < models; m++) add(sums[m], word, tables[m * batches + batch], numbers);
        }
        if ((batch + 1) % BATCHES_TO_FLUSH == 0 || batch + 1 == batches)
            for (int64_t m = 0; m < models; m++) flush(sums[m], out + m * STRIP);
    }
}

// ---------------------------------------------------------------------------------------------- normal numbers

inline __m256 real(float x) { return _mm256_set1_ps(x); }
inline __m256 times(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
inline __m256 plus(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }

template <int n>
inline __m256 polynomial(__m256 x, const float (&coefficients)[n]) {
    __m256 sum = real(coefficients[n - 1]);
    for (int k = n - 2; k >= 0; k--) sum = plus(times(sum, x), real(coefficients[k]));
    return sum;
}

// Two normal numbers in units of 2^-20 from two words, operation by operation as in prng.py.
inline void normals(Vec first, Vec second, Vec& one, Vec& other) {
    static const float LOG[] = {LOG_COEFFICIENTS}, SIN[] = {SIN_COEFFICIENTS}, COS[] = {COS_COEFFICIENTS};
    Vec odd = _mm256_or_si256(_mm256_slli_epi32(_mm256_srli_epi32(first, 9), 1), all(1));
    Vec u = _mm256_castps_si256(times(_mm256_cvtepi32_ps(odd), real(0x1p-24f)));
    Vec exponent = _mm256_srai_epi32(_mm256_sub_epi32(u, all(0x3F3504F3)), 23);
    __m256 x = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(exponent, 23))), real(1));
    __m256 square = times(x, x);
    __m256 log = plus(times(times(square, x), polynomial(x, LOG)), times(square, real(-0.5f)));
    log = plus(plus(log, x), times(_mm256_cvtepi32_ps(exponent), real(0.693147180559945309f)));
    __m256 length = times(_mm256_sqrt_ps(times(log, real(-2))), real(0x1p20f));

    Vec quarter = _mm256_srli_epi32(_mm256_add_epi32(second, all(1u << 29)), 30);
    __m256 angle = times(_mm256_cvtepi32_ps(_mm256_sub_epi32(second, _mm256_slli_epi32(quarter, 30))),
                         real(1.46291807926715968e-9f));  // 2 pi / 2^32
    square = times(angle, angle);
    __m256 sine = plus(times(times(square, angle), polynomial(square, SIN)), angle);
    __m256 cosine = plus(plus(times(times(square, square), polynomial(square, COS)), times(square, real(-0.5f))), real(1));
    __m256 swap = _mm256_castsi256_ps(_mm256_slli_epi32(quarter, 31));
    __m256 a = _mm256_blendv_ps(cosine, sine, swap), b = _mm256_blendv_ps(sine, cosine, swap);
    Vec sign_a = _mm256_slli_epi32(_mm256_srli_epi32(_mm256_add_epi32(quarter, all(1)), 1), 31);
    Vec sign_b = _mm256_slli_epi32(_mm256_srli_epi32(quarter, 1), 31);
    one = _mm256_cvtps_epi32(_mm256_xor_ps(times(length, a), _mm256_castsi256_ps(sign_a)));
    other = _mm256_cvtps_epi32(_mm256_xor_ps(times(length, b), _mm256_castsi256_ps(sign_b)));
}

// The strip's normal numbers for some seeds: z[k][j] has number j of each of the eight blocks. Several seeds at a time
// keep the processor busy, where the operations of one wait for each other.
template <int seeds_together>
inline void gaussian_strip(const Place& at, const uint64_t* seeds, Vec z[][4]) {
    Vec words[seeds_together][4];
    for (int k = 0; k < seeds_together; k++) philox(at, seeds[k], words[k]);
    for (int k = 0; k < seeds_together; k++) {
        normals(words[k][0], words[k][1], z[k][0], z[k][1]);
        normals(words[k][2], words[k][3], z[k][2], z[k][3]);
    }
}

inline void add_normals(const Vec z[4], Vec weight, Vec* sums) {
    for (int j = 0; j < 4; j++) {
        sums[2 * j] = _mm256_add_epi64(sums[2 * j], _mm256_mul_epi32(z[j], weight));
        sums[2 * j + 1] = _mm256_add_epi64(sums[2 * j + 1], _mm256_mul_epi32(high(z[j]), weight));
    }
}

void gaussian_sums(const Place& at, const uint64_t* seeds, int64_t count, const int32_t* weights, int64_t models,
                   std::vector<Vec>& sums, int64_t* out) {
    std::fill(sums.begin(), sums.end(), _mm256_setzero_si256());
    for (int64_t k = 0; k < count; k += TOGETHER) {
        Vec z[TOGETHER][4];
        const int64_t now = std::min<int64_t>(TOGETHER, count - k);
        if (now == TOGETHER)
            gaussian_strip<TOGETHER>(at, seeds + k, z);
        else
            for (int64_t i = 0; i < now; i++) gaussian_strip<1>(at, seeds + k + i, z + i);
        for (int64_t i = 0; i < now; i++)
            for (int64_t m = 0; m < models; m++) add_normals(z[i], all((uint32_t)weights[m * count + k + i]), &sums[8 * m]);
    }
    for (int64_t m = 0; m < models; m++)
        for (int j = 0; j < 4; j++)
            for (int odd = 0; odd < 2; odd++) {
                int64_t four[4];
                std::memcpy(four, &sums[(m * 4 + j) * 2 + odd], 32);
                for (int lane = 0; lane < 4; lane++) out[m * NORMALS + 4 * (2 * lane + odd) + j] = four[lane];
            }
}

// ---------------------------------------------------------------------------------------------- one direction

// Writes the strip's numbers to z, as floats, times scale.
void draw(int gaussian, const Place& at, uint64_t seed, float scale, float* z) {
    if (gaussian) {
        Vec units[1][4];
        gaussian_strip<1>(at, &seed, units);
        alignas(32) int32_t each[4][LANES];
        std::memcpy(each, units, sizeof each);
        for (int lane = 0; lane < LANES; lane++)
            for (int j = 0; j < 4; j++) z[4 * lane + j] = (float)each[j][lane] * 0x1p-20f * scale;
        return;
    }
    alignas(32) uint32_t words[4][LANES];
    philox(at, seed, (Vec*)words);
    const Vec bits = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256 plain = real(scale), sign = real(-0.0f);
    for (int lane = 0; lane < LANES; lane++)
        for (int word = 0; word < 4; word++)
            for (int byte = 0; byte < 4; byte++) {
                Vec chosen = _mm256_and_si256(all(words[word][lane] >> 8 * byte), bits);
                __m256 off = _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, _mm256_setzero_si256()));
                _mm256_storeu_ps(z + 128 * lane + 32 * word + 8 * byte, _mm256_xor_ps(plain, _mm256_and_ps(off, sign)));
            }
}

struct Bfloat16 {
    uint16_t bits;
    explicit Bfloat16(float x) {
        uint32_t whole;
        std::memcpy(&whole, &x, 4);
        bits = x != x ? 0x7FC0 : (whole + 0x7FFF + (whole >> 16 & 1)) >> 16;
    }
    explicit operator float() const {
        uint32_t whole = (uint32_t)bits << 16;
        float x;
        std::memcpy(&x, &whole, 4);
        return x;
    }
};

struct Half {  // not _Float16, which compilers have in C++ only since GCC 12
    uint16_t bits;
};

template <typename T>
inline void add(const T* from, const float* z, int64_t count, T* to) {
    for (int64_t i = 0; i < count; i++) to[i] = T((float)from[i] + z[i]);
}

inline void add(const Half* from, const float* z, int64_t count, Half* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256 sum = _mm256_add_ps(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))), _mm256_loadu_ps(z + i));
        _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < count; i++) to[i].bits = _cvtss_sh(_cvtsh_ss(from[i].bits) + z[i], _MM_FROUND_TO_NEAREST_INT);
}

template <typename T>
void move_part(int gaussian, uint64_t seed, float scale, uint64_t parameter, int64_t start, int64_t count, const T* base,
               T* out) {
    const int64_t strip = gaussian ? NORMALS : STRIP;
    alignas(32) float z[STRIP];
    for (int64_t at = start / strip * strip; at < start + count; at += strip) {
        draw(gaussian, Place(parameter, (uint64_t)(at / strip * LANES)), seed, scale, z);
        const int64_t first = std::max(at, start), last = std::min(at + strip, start + count);
        add(base + (first - start), z + (first - at), last - first, out + (first - start));
    }
}

template <typename T>
void move_all(int gaussian, uint64_t seed, float scale, uint64_t parameter, int64_t start, int64_t count, const int64_t* rows,
              int64_t row_count, const T* base, T* out, int threads) {
    if (rows) {
        for (int64_t row = 0; row < row_count; row++)
            move_part(gaussian, seed, scale, parameter, start + rows[row] * count, count, base + rows[row] * count,
                      out + row * count);
        return;
    }
    const int64_t piece = 32 * STRIP, first = start / piece, last = (start + count + piece - 1) / piece;
#pragma omp parallel for num_threads(threads) schedule(static) if (last - first > 3 && threads > 1)
    for (int64_t p = first; p < last; p++) {
        const int64_t begin = std::max(start, p * piece), end = std::min(start + count, (p + 1) * piece);
        move_part(gaussian, seed, scale, parameter, begin, end - begin, base + (begin - start), out + (begin - start));
    }
}

}  // namespace

extern "C" {

// out[m][i] += sum over k of weights[m][k] * z(seeds[k])[start + i], in units of the mode.
void seeds_sums(int gaussian, const uint64_t* seeds, int64_t seed_count, const int32_t* weights, int64_t models,
                uint64_t parameter, int64_t start, int64_t count, int64_t* out, int threads) {
    const int64_t strip = gaussian ? NORMALS : STRIP, batches = (seed_count + BATCH - 1) / BATCH;
    const int64_t first = start / strip, last = (start + count + strip - 1) / strip;
    std::vector<Tables> tables;
    std::vector<int64_t> correction(models, 0);  // from the sums over bits that are set to the sums over signs
    if (!gaussian) {
        tables.resize(models * batches);
        for (int64_t m = 0; m < models; m++) {
            for (int64_t k = 0; k < seed_count; k++) correction[m] -= weights[m * seed_count + k];
            correction[m] -= 2 * 4 * batches * OFFSET;
            for (int64_t b = 0; b < batches; b++)
                fill(tables[m * batches + b], weights + m * seed_count + b * BATCH, (int)std::min<int64_t>(BATCH, seed_count - b * BATCH));
        }
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<Sums> sums(gaussian ? 0 : models);
        for (Sums& one : sums) std::memset(&one, 0, sizeof one);
        std::vector<Vec> wide(gaussian ? models * 8 : 0);
        std::vector<int64_t> found(models * strip);
#pragma omp for schedule(dynamic, 4)
        for (int64_t s = first; s < last; s++) {
            const Place at(parameter, (uint64_t)s * LANES);
            if (gaussian)
                gaussian_sums(at, seeds, seed_count, weights, models, wide, found.data());
            else
                rademacher_strip(at, seeds, seed_count, tables.data(), models, sums, found.data());
            const int64_t begin = std::max(start, s * strip), end = std::min(start + count, (s + 1) * strip);
            for (int64_t m = 0; m < models; m++)
                for (int64_t i = begin; i < end; i++) {
                    const int64_t value = found[m * strip + i - s * strip];
                    out[m * count + i - start] += gaussian ? value : 2 * value + correction[m];
                }
        }
    }
}

// out = base + scale * z(seed), each element rounded to float and then to its type (0: float, 1: bfloat16, 2: half).
// With rows, base has rows of `count` elements, out those that are named; without, count is that of all.
void seeds_move(int gaussian, int type, uint64_t seed, float scale, uint64_t parameter, int64_t start, int64_t count,
                const int64_t* rows, int64_t row_count, const void* base, void* out, int threads) {
    if (type == 0)
        move_all(gaussian, seed, scale, parameter, start, count, rows, row_count, (const float*)base, (float*)out, threads);
    else if (type == 1)
        move_all(gaussian, seed, scale, parameter, start, count, rows, row_count, (const Bfloat16*)base, (Bfloat16*)out, threads);
    else
        move_all(gaussian, seed, scale, parameter, start, count, rows, row_count, (const Half*)base, (Half*)out, threads);
}
}
