/* What lies between an encoder's matrix products, for processors with AVX-512 BF16.

   A row of texts lies end to end; `ends` has where each begins, and where the last one ends. bfloat16 goes in
   and out, sums are float32. One thread, no allocation, no library: `kernels.py` compiles and checks. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { LANES = 16 /* of float32, or pairs of bfloat16 */, ROWS = 8 /* of queries at once */ };

/* Far below any score, and its exponential is 0. */
static const float UNSEEN = -1e30f, NOTHING = -200.0f;

typedef struct {
    const bf16 *states; /* (n_tokens, n_heads, dim) */
    int64_t token, head; /* strides, in numbers */
} Heads;

static inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

static inline __m512i widen(const bf16 *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

static inline void store_rounded(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

static inline __m512i columns(int64_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32((int)first));
}

/* 2^x: Taylor's coefficients ln(2)^k / k! on [-0.5, 0.5], error 2e-6; more than bfloat16 can tell. */
static inline __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(1.3333558e-3f);
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* Lay keys out as (block of 16 keys, pair of numbers, key); zeros after the last. */
static inline void lay_keys(const bf16 *keys, int64_t stride, int64_t n, int dim, uint32_t *out) {
    const __m512i places = _mm512_mullo_epi32(columns(0), _mm512_set1_epi32((int)(stride * sizeof(bf16))));
    for (int64_t first = 0; first < n; first += LANES) {
        __mmask16 real = n - first >= LANES ? 0xffff : (__mmask16)((1u << (n - first)) - 1);
        for (int pair = 0; pair < dim / 2; pair++, out += LANES) {
            const bf16 *from = keys + first * stride + 2 * pair;
            __m512i found = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), real, places, from, 1);
            _mm512_storeu_si512(out, found);
        }
    }
}

/* Lay values out as (pair of keys, number, key of the pair); zeros after the last. */
static inline void lay_values(const bf16 *values, int64_t stride, int64_t n, int dim, uint32_t *out) {
    for (int64_t key = 0; key < n; key += 2)
        for (int d = 0; d < dim; d += LANES, out += LANES) {
            const bf16 *even = values + key * stride + d;
            __m512i odd = key + 1 < n ? _mm512_slli_epi32(widen(even + stride), 16) : _mm512_setzero_si512();
            _mm512_storeu_si512(out, _mm512_or_si512(widen(even), odd));
        }
}

/* Attention of up to 8 neighbouring queries of one head, from `first` on, to a text's keys and values.

   `scale` has log2(e) in it. `window`, if not 0, is how many tokens away the nearest unseen one is. */
static inline __attribute__((always_inline)) void attend_rows(
    const int dim, const bf16 *queries, int64_t stride, int64_t first, int64_t n_rows, int64_t n,
    const uint32_t *keys, const uint32_t *values, float scale, int64_t window, int is_causal,
    float *scores, bf16 *out, int64_t out_stride
) {
    const int n_pairs = dim / 2, n_vectors = dim / LANES;
    const int64_t width = (n + LANES - 1) / LANES * LANES, last = first + n_rows - 1;
    /* What no query here sees is not computed. */
    const int64_t start = window && first >= window ? (first - window + 1) / LANES * LANES : 0;
    int64_t stop = is_causal ? last + 1 : n;
    if (window && last + window < stop) stop = last + window;

    const uint32_t *query[ROWS];
    __m512 most[ROWS];
    for (int r = 0; r < ROWS; r++) {
        query[r] = (const uint32_t *)(queries + (r < n_rows ? r : n_rows - 1) * stride);
        most[r] = _mm512_set1_ps(UNSEEN);
    }
    for (int64_t column = start; column < stop; column += LANES) {
        __m512 sum[ROWS];
        for (int r = 0; r < ROWS; r++) sum[r] = _mm512_setzero_ps();
        for (int pair = 0; pair < n_pairs; pair++) {
            __m512i key = _mm512_loadu_si512(keys + column * n_pairs + pair * LANES);
            for (int r = 0; r < ROWS; r++) sum[r] = dot(sum[r], key, _mm512_set1_epi32((int)query[r][pair]));
        }
        for (int r = 0; r < ROWS; r++) {
            int64_t row = first + r, low = window ? row - window : -1, high = is_causal ? row + 1 : n;
            if (window && row + window < high) high = row + window;
            __mmask16 seen = _mm512_cmpgt_epi32_mask(columns(column), _mm512_set1_epi32((int)low)) &
                             _mm512_cmplt_epi32_mask(columns(column), _mm512_set1_epi32((int)high));
            sum[r] = _mm512_mask_mul_ps(_mm512_set1_ps(UNSEEN), seen, sum[r], _mm512_set1_ps(scale));
            most[r] = _mm512_max_ps(most[r], sum[r]);
            _mm512_storeu_ps(scores + r * width + column, sum[r]);
        }
    }

    float inverse[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[r])), least = _mm512_set1_ps(NOTHING);
        float *row = scores + r * width;
        bf16 *weights = (bf16 *)row; /* half as wide, so nothing is written before it was read */
        __m512 total = _mm512_setzero_ps();
        for (int64_t column = start; column < stop; column += LANES) {
            __m512 below = _mm512_sub_ps(_mm512_loadu_ps(row + column), top);
            __m512 weight = power_of_two(_mm512_max_ps(below, least));
            total = _mm512_add_ps(total, weight);
            store_rounded(weights + column, weight);
        }
        inverse[r] = 1.0f / _mm512_reduce_add_ps(total);
    }

    const int n_together = n_vectors <= 2 ? 8 : n_vectors <= 4 ? 4 : 2; /* as many sums as registers hold */
    for (int begin = 0; begin < ROWS && begin < n_rows; begin += n_together) {
        __m512 sum[ROWS][8];
        for (int r = 0; r < n_together; r++)
            for (int v = 0; v < n_vectors; v++) sum[r][v] = _mm512_setzero_ps();
        for (int64_t key = start; key < stop; key += 2) {
            __m512i value[8];
            for (int v = 0; v < n_vectors; v++)
                value[v] = _mm512_loadu_si512(values + key / 2 * dim + v * LANES);
            for (int r = 0; r < n_together; r++) {
                uint32_t pair;
                memcpy(&pair, (const bf16 *)(scores + (begin + r) * width) + key, sizeof pair);
                __m512i weight = _mm512_set1_epi32((int)pair);
                for (int v = 0; v < n_vectors; v++) sum[r][v] = dot(sum[r][v], weight, value[v]);
            }
        }
        for (int r = 0; r < n_together && begin + r < n_rows; r++)
            for (int v = 0; v < n_vectors; v++)
                store_rounded(out + (begin + r) * out_stride + v * LANES,
                              _mm512_mul_ps(sum[r][v], _mm512_set1_ps(inverse[begin + r])));
    }
}

static inline __attribute__((always_inline)) void attend_texts(
    const int dim, Heads query, Heads key, Heads value, const int32_t *ends, int64_t n_texts, int64_t n_heads,
    int64_t n_sharing, float scale, int64_t window, int is_causal, bf16 *out, void *space
) {
    for (int64_t text = 0; text < n_texts; text++) {
        const int64_t start = ends[text], n = ends[text + 1] - start, width = (n + LANES - 1) / LANES * LANES;
        uint32_t *keys = space, *values = keys + width * dim / 2;
        float *scores = (float *)(values + width * dim / 2);
        for (int64_t head = 0; head < n_heads; head++) {
            const int64_t shared = head / n_sharing;
            if (head % n_sharing == 0) {
                lay_keys(key.states + start * key.token + shared * key.head, key.token, n, dim, keys);
                lay_values(value.states + start * value.token + shared * value.head, value.token, n, dim, values);
            }
            for (int64_t row = 0; row < n; row += ROWS)
                attend_rows(dim, query.states + (start + row) * query.token + head * query.head, query.token, row,
                            n - row < ROWS ? n - row : ROWS, n, keys, values, scale, window, is_causal, scores,
                            out + ((start + row) * n_heads + head) * dim, n_heads * dim);
        }
    }
}

/* Attention in which each text sees itself; out is (n_tokens, n_heads, dim).

   `space` is for (4 dim + 32) * width bytes, width the longest text's tokens rounded up to 16. Returns whether
   there is code for heads of this size. */
int attend(
    int64_t dim, const bf16 *query, int64_t query_token, int64_t query_head, const bf16 *key, int64_t key_token,
    int64_t key_head, const bf16 *value, int64_t value_token, int64_t value_head, const int32_t *ends,
    int64_t n_texts, int64_t n_heads, int64_t n_sharing, float scale, int64_t window, int is_causal, bf16 *out,
    void *space
) {
    const Heads q = {query, query_token, query_head}, k = {key, key_token, key_head};
    const Heads v = {value, value_token, value_head};
    switch (dim) {
#define OF(size)                                                                                              \
    case size:                                                                                                \
        attend_texts(size, q, k, v, ends, n_texts, n_heads, n_sharing, scale, window, is_causal, out, space); \
        return 1;
        OF(16) OF(32) OF(48) OF(64) OF(80) OF(96) OF(128)
    }
    return 0;
}

/* LayerNorm of one row, in place, and rounded; `sum` has the row's numbers in 16 parts. */
static inline void norm_row(
    float *row, bf16 *rounded, __m512 sum, const float *weight, const float *bias, float eps, int64_t dim
) {
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)dim);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES) {
        __m512 off = _mm512_sub_ps(_mm512_loadu_ps(row + d), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    const __m512 variance = _mm512_set1_ps(_mm512_reduce_add_ps(squares) / (float)dim + eps);
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(variance));
    for (int64_t d = 0; d < dim; d += LANES) {
        __m512 unit = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + d), mean), factor);
        __m512 found = _mm512_fmadd_ps(unit, _mm512_loadu_ps(weight + d), _mm512_loadu_ps(bias + d));
        _mm512_storeu_ps(row + d, found);
        store_rounded(rounded + d, found);
    }
}

/* LayerNorm of states + residual, each (n_rows, dim), dim a multiple of 16; as float32, and rounded. */
void add_norm(
    const bf16 *states, const float *residual, const float *weight, const float *bias, float eps, int64_t n_rows,
    int64_t dim, float *out, bf16 *rounded
) {
    for (int64_t row = 0; row < n_rows; row++, states += dim, residual += dim, out += dim, rounded += dim) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += LANES) {
            __m512 state = (__m512)_mm512_slli_epi32(widen(states + d), 16);
            __m512 both = _mm512_add_ps(state, _mm512_loadu_ps(residual + d));
            _mm512_storeu_ps(out + d, both);
            sum = _mm512_add_ps(sum, both);
        }
        norm_row(out, rounded, sum, weight, bias, eps, dim);
    }
}

static int is_within(const int64_t *indices, int64_t n, int64_t n_entries) {
    for (int64_t i = 0; i < n; i++)
        if (indices[i] < 0 || indices[i] >= n_entries) return 0;
    return 1;
}

/* LayerNorm of the sum of each row's entries in three tables, as float32, and rounded.

   Returns whether all indices are within their tables; nothing is written else. */
int embed_norm(
    const int64_t *words, const int64_t *positions, const int64_t *types, const float *word_table,
    const float *position_table, const float *type_table, int64_t n_words, int64_t n_positions, int64_t n_types,
    const float *weight, const float *bias, float eps,
    int64_t n_rows, int64_t dim, float *out, bf16 *rounded
) {
    if (!is_within(words, n_rows, n_words) || !is_within(positions, n_rows, n_positions)) return 0;
    if (!is_within(types, n_rows, n_types)) return 0;
    for (int64_t row = 0; row < n_rows; row++, out += dim, rounded += dim) {
        const float *word = word_table + words[row] * dim, *type = type_table + types[row] * dim;
        const float *position = position_table + positions[row] * dim;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += LANES) {
            __m512 both = _mm512_add_ps(_mm512_loadu_ps(word + d), _mm512_loadu_ps(type + d));
            both = _mm512_add_ps(both, _mm512_loadu_ps(position + d));
            _mm512_storeu_ps(out + d, both);
            sum = _mm512_add_ps(sum, both);
        }
        norm_row(out, rounded, sum, weight, bias, eps, dim);
    }
    return 1;
}
