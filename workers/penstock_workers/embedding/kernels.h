/* What all variants of the encoder share: the types that callers fill, and float32 in vector registers.

   A variant is one source file compiled for one kind of CPU (`hatch_build.py` says with which flags). It includes
   this file, defines its own attention and products, and then includes `kernels_encoder.h`, which calls them. All
   variants lie in one shared library; `c_kernels.py` chooses by what the CPU says. */

#include <immintrin.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define JOINED(variant, name) variant##_##name
#define NAMED(variant, name) JOINED(variant, name)
/* What the library shows of a variant: `avx2_encode` and its like. */
#define SHOWN(name) __attribute__((visibility("default"))) NAMED(VARIANT, name)

#ifdef BFLOAT16
typedef uint16_t Number; /* what products read and write: bfloat16, */
#else
typedef float Number; /* or float32 */
#endif

/* The model */

typedef struct {
    const Number *weight; /* in panels, see the variant; zeros after the last output */
    const float *bias;    /* for whole panels */
    int64_t n_in, n_out;
} Linear;

typedef struct {
    const float *weight, *bias;
    float eps;
} Norm;

typedef struct {
    Linear heads /* of queries, keys and values, one after the other */, output, up, down;
    Norm output_norm, down_norm;
} Layer;

typedef struct {
    const float *tables[3]; /* of words, positions and types */
    int64_t n_entries[3];
    Norm norm;
    const Layer *layers;
    int64_t n_layers, n_heads, dim;
} Encoder;

/* What happens to a product's sums: they are stored, or their GELU, or they are added to what is there. */
typedef enum { STORE, GELU, ADD } Then;

/* The keys and values of one text and one head. */
typedef struct {
    const Number *keys, *values;
    int64_t key_stride, value_stride; /* in numbers */
    int64_t n;
} Text;

/* Which keys a query sees, and what its scores are multiplied by: log2(e) is in `scale`, so that powers of two
   are taken. `window`, if not 0, is how many tokens away the nearest unseen key is. */
typedef struct {
    float scale;
    int64_t window;
    int is_causal;
} Mask;

/* The queries of one head that are computed together: `n` of a text's from `first` on. */
typedef struct {
    const Number *states;
    int64_t stride, first, n;
} Queries;

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* The first key that a query from `first` on sees, down to a multiple of `step`: what none sees is not computed. */
INLINE int64_t first_seen(Queries queries, Mask mask, int64_t step) {
    if (!mask.window || queries.first < mask.window) return 0;
    return (queries.first - mask.window + 1) / step * step;
}

/* One past the last key that any of the queries sees. */
INLINE int64_t last_seen(Queries queries, Text text, Mask mask) {
    const int64_t last = queries.first + queries.n - 1;
    const int64_t stop = mask.is_causal ? last + 1 : text.n;
    return mask.window ? least_of(stop, last + mask.window) : stop;
}

/* Vectors of float32. Sums, products and comparisons are the compiler's own operators. */

#ifdef __AVX512F__

enum { LANES = 16 };
typedef __m512 Floats;

INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, Floats x) { _mm512_storeu_ps(to, x); }
INLINE Floats all(float x) { return _mm512_set1_ps(x); }
INLINE Floats plus_product(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
INLINE Floats most_of(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats root(Floats x) { return _mm512_sqrt_ps(x); }
INLINE float total(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE Floats clamped(Floats x, float end) {
    return _mm512_max_ps(_mm512_min_ps(x, all(end)), all(-end));
}

INLINE Floats nearest(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* x * 2^whole */
INLINE Floats times_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }

/* Turn 16 rows of 16 numbers into its columns. */
INLINE void transpose(Floats rows[LANES]) {
    __m512i two[LANES], four[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        two[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
        four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512i a = four[j], b = four[4 + j], c = four[8 + j], d = four[12 + j];
        const __m512i even = _mm512_shuffle_i32x4(a, b, 0x88), odd = _mm512_shuffle_i32x4(a, b, 0xdd);
        const __m512i even_too = _mm512_shuffle_i32x4(c, d, 0x88), odd_too = _mm512_shuffle_i32x4(c, d, 0xdd);
        rows[j] = (Floats)_mm512_shuffle_i32x4(even, even_too, 0x88);
        rows[4 + j] = (Floats)_mm512_shuffle_i32x4(odd, odd_too, 0x88);
        rows[8 + j] = (Floats)_mm512_shuffle_i32x4(even, even_too, 0xdd);
        rows[12 + j] = (Floats)_mm512_shuffle_i32x4(odd, odd_too, 0xdd);
    }
}

#else

enum { LANES = 8 };
typedef __m256 Floats;

INLINE Floats load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, Floats x) { _mm256_storeu_ps(to, x); }
INLINE Floats all(float x) { return _mm256_set1_ps(x); }
INLINE Floats plus_product(Floats sum, Floats a, Floats b) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Floats most_of(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats root(Floats x) { return _mm256_sqrt_ps(x); }
INLINE Floats clamped(Floats x, float end) {
    return _mm256_max_ps(_mm256_min_ps(x, all(end)), all(-end));
}

INLINE float total(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

INLINE Floats nearest(Floats x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* x * 2^whole; 0 where `whole` is below -126. The power is made of its exponent's bits. */
INLINE Floats times_power(Floats x, Floats whole) {
    const __m256 enough = _mm256_max_ps(all(-127.0f), whole);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(enough), _mm256_set1_epi32(127));
    return x * (Floats)_mm256_slli_epi32(exponent, 23);
}

/* Turn 8 rows of 8 numbers into its columns. */
INLINE void transpose(Floats rows[LANES]) {
    Floats two[LANES], four[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        two[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        two[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        four[i + 2 * j] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0x44);
        four[i + 2 * j + 1] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0xee);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        rows[j] = _mm256_permute2f128_ps(four[j], four[4 + j], 0x20);
        rows[4 + j] = _mm256_permute2f128_ps(four[j], four[4 + j], 0x31);
    }
}

#endif

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

/* Far below any score, and its exponential is 0. */
static const float UNSEEN = -1e30f;

/* 2^x: Taylor's coefficients ln(2)^k / k! on [-0.5, 0.5]. The error is 2e-6 with 5 of them, more than bfloat16 can
   tell, and 1e-7 with 6. */
INLINE Floats power_of_two(const int degree, Floats x) {
    static const float of[] = {1.0f,          6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f,
                               9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f};
    const Floats whole = nearest(x), part = x - whole;
    Floats sum = all(of[degree]);
    UNROLL for (int i = degree - 1; i >= 0; i--) sum = plus_product(all(of[i]), sum, part);
    return times_power(sum, whole);
}

/* The scores of `LANES` queries from `first` on with one key; those that do not see it get `UNSEEN`. */
INLINE Floats seen_only(Floats scores, int64_t first, int64_t key, int64_t n, Mask mask) {
    static const int32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int32_t reach = (int32_t)(mask.window ? mask.window : n), back = mask.is_causal ? 1 : reach;
    Ints lanes;
    __builtin_memcpy(&lanes, LANE, sizeof lanes);
    const Ints ahead = lanes + (int32_t)(first - key), seen = (ahead < reach) & (ahead > -back);
    return (Floats)((seen & (Ints)scores) | (~seen & (Ints)all(UNSEEN)));
}
