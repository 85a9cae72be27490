/* An encoder in bfloat16, for CPUs with AVX-512 BF16: attention, and the whole encoder of the BERT family.

   A row of texts lies end to end; `ends` has where each text begins, and where the last one ends. Factors of
   products are bfloat16, sums are float32. One thread, no allocation, no library. `hatch_build.py` compiles this
   file, `c_kernels.py` checks what it is called with. */

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;
typedef int32_t __attribute__((may_alias)) Pair; /* of bfloat16 */

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum {
    LANES = 16,  /* float32 of a vector, or pairs of bfloat16 */
    KEYS = 8,    /* at once */
    ROWS = 6,    /* of a product at once, */
    VECTORS = 4, /* each this wide: 24 sums, 4 vectors of weights and a state are 29 of 32 registers */
    PANEL = VECTORS * LANES,
    BLOCK = 192 /* rows from one layer's attention to the next one's: what lies between stays in the cache */
};

/* Far below any score, and its exponential is 0. */
static const float UNSEEN = -1e30f;

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

INLINE __m512i pair(const bf16 *states, int64_t which) {
    return _mm512_set1_epi32(((const Pair *)states)[which]);
}

INLINE __m512i widen(const bf16 *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

INLINE void store_rounded(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

INLINE __m512i lanes_from(int64_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32((int)first));
}

/* 2^x: Taylor's coefficients ln(2)^k / k! on [-0.5, 0.5], error 2e-6; more than bfloat16 can tell. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 part = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(1.3333558e-3f);
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
}

/* GELU, x Phi(x): Phi(x) - 1/2 as x times a polynomial of x^2 on [-4.5, 4.5], fitted so that the largest error
   of GELU is least, 6e-5 as computed, and that nothing jumps at the ends. */
INLINE __m512 gelu(__m512 x) {
    static const float of[] = {3.00000779e-11f, -3.28391299e-9f, 1.58025742e-7f, -4.43168509e-6f, 8.12097173e-5f,
                               -1.03625333e-3f, 9.58065364e-3f, -6.59772702e-2f, 3.98708574e-1f};
    const __m512 end = _mm512_set1_ps(4.5f);
    __m512 near = _mm512_max_ps(_mm512_min_ps(x, end), _mm512_sub_ps(_mm512_setzero_ps(), end));
    __m512 square = _mm512_mul_ps(near, near), sum = _mm512_set1_ps(of[0]);
    UNROLL for (int i = 1; i < 9; i++) sum = _mm512_fmadd_ps(sum, square, _mm512_set1_ps(of[i]));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(sum, near, _mm512_set1_ps(0.5f)));
}

/* Turn 16 rows of 16 numbers into its columns. */
INLINE void transpose(__m512i rows[LANES]) {
    __m512i two[LANES], four[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        two[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
        four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        const __m512i a = four[j], b = four[4 + j], c = four[8 + j], d = four[12 + j];
        const __m512i even = _mm512_shuffle_i32x4(a, b, 0x88), odd = _mm512_shuffle_i32x4(a, b, 0xdd);
        const __m512i even_too = _mm512_shuffle_i32x4(c, d, 0x88), odd_too = _mm512_shuffle_i32x4(c, d, 0xdd);
        rows[j] = _mm512_shuffle_i32x4(even, even_too, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(odd, odd_too, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(even, even_too, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(odd, odd_too, 0xdd);
    }
}

/* Attention */

typedef struct {
    const bf16 *states; /* (n_tokens, n_heads, dim) */
    int64_t token, head; /* strides, in numbers */
} Heads;

/* Lay 16 queries out as (pair of numbers, query); after the last comes the last again. */
INLINE void lay_queries(const bf16 *queries, int64_t stride, int64_t n, const int dim, __m512i *out) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        const int n_pairs = dim - d < 2 * LANES ? (dim - d) / 2 : LANES;
        const __mmask16 real = (__mmask16)((1u << n_pairs) - 1);
        __m512i rows[LANES];
        for (int r = 0; r < LANES; r++)
            rows[r] = _mm512_maskz_loadu_epi32(real, queries + (r < n ? r : n - 1) * stride + d);
        transpose(rows);
        for (int i = 0; i < n_pairs; i++) *out++ = rows[i];
    }
}

/* Lay values out as (pair of keys, number, key of the pair); zeros after the last. */
INLINE void lay_values(const bf16 *values, int64_t stride, int64_t n, const int dim, uint32_t *out) {
    for (int64_t key = 0; key < n; key += 2)
        for (int d = 0; d < dim; d += LANES, out += LANES) {
            const bf16 *even = values + key * stride + d;
            __m512i odd = key + 1 < n ? _mm512_slli_epi32(widen(even + stride), 16) : _mm512_setzero_si512();
            _mm512_storeu_si512(out, _mm512_or_si512(widen(even), odd));
        }
}

/* Attention of up to 16 neighbouring queries of one head, from `first` on, to a text's keys and values.

   A vector has one number of each query, so that largest scores and sums need no steps across it. `scale` has
   log2(e) in it. `window`, if not 0, is how many tokens away the nearest unseen one is. */
INLINE void attend_queries(
    const int dim, const __m512i *queries, int64_t first, int64_t n_queries, int64_t n, const bf16 *keys,
    int64_t stride, const uint32_t *values, float scale, int64_t window, int is_causal, __m512 *scores, bf16 *out,
    int64_t out_stride
) {
    const int64_t last = first + n_queries - 1;
    /* What no query here sees is not computed. */
    const int64_t start = window && first >= window ? (first - window + 1) / 2 * 2 : 0;
    int64_t stop = is_causal ? last + 1 : n;
    if (window && last + window < stop) stop = last + window;

    __m512 most = _mm512_set1_ps(UNSEEN);
    for (int64_t key = start; key < stop; key += KEYS) {
        const bf16 *states[KEYS];
        __m512 sum[KEYS];
        UNROLL for (int k = 0; k < KEYS; k++) {
            states[k] = keys + (key + k < n ? key + k : n - 1) * stride;
            sum[k] = _mm512_setzero_ps();
        }
        for (int i = 0; i < dim / 2; i++)
            UNROLL for (int k = 0; k < KEYS; k++) sum[k] = dot(sum[k], queries[i], pair(states[k], i));
        for (int k = 0; k < KEYS && key + k < stop; k++) {
            if (is_causal || window) {
                const __m512i ahead = _mm512_sub_epi32(lanes_from(first), _mm512_set1_epi32((int)(key + k)));
                const int64_t reach = window ? window : n, back = is_causal ? 1 : reach;
                __mmask16 seen = _mm512_cmplt_epi32_mask(ahead, _mm512_set1_epi32((int)reach)) &
                                 _mm512_cmpgt_epi32_mask(ahead, _mm512_set1_epi32((int)-back));
                sum[k] = _mm512_mask_mov_ps(_mm512_set1_ps(UNSEEN), seen, sum[k]);
            }
            most = _mm512_max_ps(most, sum[k]);
            scores[key + k] = sum[k];
        }
    }

    const __m512 by = _mm512_set1_ps(scale), top = _mm512_mul_ps(most, by);
    const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                               22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i *weights = (__m512i *)scores; /* of two keys each, so nothing is written before it was read */
    __m512 total = _mm512_setzero_ps();
    for (int64_t key = start; key < stop; key += 2) {
        __m512 even = power_of_two(_mm512_fmsub_ps(scores[key], by, top)), odd = _mm512_setzero_ps();
        if (key + 1 < stop) odd = power_of_two(_mm512_fmsub_ps(scores[key + 1], by, top));
        total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
        weights[key / 2] = _mm512_permutexvar_epi16(alternate, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }

    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
    for (int d = 0; d < dim; d += LANES) {
        __m512 sum[LANES];
        UNROLL for (int i = 0; i < LANES; i++) sum[i] = _mm512_setzero_ps();
        for (int64_t two = start / 2; two < (stop + 1) / 2; two++) {
            const uint32_t *value = values + two * dim + d;
            const __m512i weight = weights[two];
            UNROLL for (int i = 0; i < LANES; i++)
                sum[i] = dot(sum[i], weight, _mm512_set1_epi32((int)value[i]));
        }
        __m512i columns[LANES];
        UNROLL for (int i = 0; i < LANES; i++) columns[i] = (__m512i)_mm512_mul_ps(sum[i], inverse);
        transpose(columns);
        for (int r = 0; r < n_queries; r++) store_rounded(out + r * out_stride + d, (__m512)columns[r]);
    }
}

INLINE void attend_texts(
    const int dim, Heads query, Heads key, Heads value, const int32_t *ends, int64_t n_texts, int64_t n_heads,
    int64_t n_sharing, float scale, int64_t window, int is_causal, bf16 *out, void *space
) {
    __m512i queries[64];
    for (int64_t text = 0; text < n_texts; text++) {
        const int64_t start = ends[text], n = ends[text + 1] - start;
        __m512 *scores = space;
        uint32_t *values = (uint32_t *)(scores + n);
        for (int64_t head = 0; head < n_heads; head++) {
            const int64_t shared = head / n_sharing;
            if (head % n_sharing == 0)
                lay_values(value.states + start * value.token + shared * value.head, value.token, n, dim, values);
            for (int64_t row = 0; row < n; row += LANES) {
                const int64_t n_queries = n - row < LANES ? n - row : LANES;
                lay_queries(query.states + (start + row) * query.token + head * query.head, query.token, n_queries,
                            dim, queries);
                attend_queries(dim, queries, row, n_queries, n,
                               key.states + start * key.token + shared * key.head, key.token, values, scale,
                               window, is_causal, scores, out + ((start + row) * n_heads + head) * dim,
                               n_heads * dim);
            }
        }
    }
}

static void attend_heads(
    int64_t dim, Heads query, Heads key, Heads value, const int32_t *ends, int64_t n_texts, int64_t n_heads,
    int64_t n_sharing, float scale, int64_t window, int is_causal, bf16 *out, void *space
) {
    switch (dim) {
#define OF(size)                                                                                                \
    case size:                                                                                                  \
        attend_texts(size, query, key, value, ends, n_texts, n_heads, n_sharing, scale, window, is_causal, out, \
                     space);                                                                                    \
        break;
        OF(16) OF(32) OF(48) OF(64) OF(80) OF(96) OF(128)
    }
}

/* Attention in which each text sees itself; out is (n_tokens, n_heads, dim).

   `dim` is one of the sizes above. `space` is for (2 dim + 64) * (n + 1) bytes, n the longest text's tokens, from a
   multiple of 64 on. */
void attend(
    int64_t dim, const bf16 *query, int64_t query_token, int64_t query_head, const bf16 *key, int64_t key_token,
    int64_t key_head, const bf16 *value, int64_t value_token, int64_t value_head, const int32_t *ends,
    int64_t n_texts, int64_t n_heads, int64_t n_sharing, float scale, int64_t window, int is_causal, bf16 *out,
    void *space
) {
    const Heads q = {query, query_token, query_head}, k = {key, key_token, key_head};
    const Heads v = {value, value_token, value_head};
    attend_heads(dim, q, k, v, ends, n_texts, n_heads, n_sharing, scale, window, is_causal, out, space);
}

/* The BERT family's encoder; all widths are multiples of 16. */

typedef struct {
    const uint32_t *weight; /* (panel of 64 outputs, pair of inputs, output), zeros after the last output */
    const float *bias;      /* for whole panels */
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

typedef enum { ROUND, GELU, ADD } Then;

/* Some rows' 64 outputs. */
INLINE void multiply_panel(
    const int n_rows, const Then then, const bf16 *states, const Linear *by, int64_t column, bf16 *rounded,
    float *added
) {
    const uint32_t *weight = by->weight + column * (by->n_in / 2);
    __m512 sum[ROWS][VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) {
        sum[0][v] = _mm512_loadu_ps(by->bias + column + v * LANES);
        UNROLL for (int r = 1; r < n_rows; r++) sum[r][v] = sum[0][v];
    }
    for (int64_t i = 0; i < by->n_in / 2; i++) {
        __m512i weights[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++)
            weights[v] = _mm512_loadu_si512(weight + i * PANEL + v * LANES);
        UNROLL for (int r = 0; r < n_rows; r++) {
            const __m512i state = pair(states + r * by->n_in, i);
            UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = dot(sum[r][v], state, weights[v]);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const int64_t at = column + v * LANES;
        if (at < by->n_out)
            UNROLL for (int r = 0; r < n_rows; r++) {
                if (then == ADD) {
                    float *to = added + r * by->n_out + at;
                    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]));
                } else
                    store_rounded(rounded + r * by->n_out + at, then == GELU ? gelu(sum[r][v]) : sum[r][v]);
            }
    }
}

/* What a Linear layer does, and then: rounded, GELU and rounded, or added to what is there. */
INLINE void multiply(
    const Then then, const bf16 *states, int64_t n_rows, const Linear *by, bf16 *rounded, float *added
) {
    for (int64_t column = 0; column < by->n_out; column += PANEL)
        for (int64_t row = 0; row < n_rows; row += ROWS) {
            const bf16 *from = states + row * by->n_in;
            bf16 *to = then == ADD ? 0 : rounded + row * by->n_out;
            float *on = then == ADD ? added + row * by->n_out : 0;
            switch (n_rows - row) {
#define OF_ROWS(number) multiply_panel(number, then, from, by, column, to, on); break;
                case 1: OF_ROWS(1)
                case 2: OF_ROWS(2)
                case 3: OF_ROWS(3)
                case 4: OF_ROWS(4)
                case 5: OF_ROWS(5)
                default: OF_ROWS(ROWS)
            }
        }
}

/* LayerNorm of rows, in place, and rounded. */
static void normalize(float *rows, const Norm *norm, int64_t n_rows, int64_t dim, bf16 *rounded) {
    for (float *row = rows; row < rows + n_rows * dim; row += dim, rounded += dim) {
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += LANES) sum = _mm512_add_ps(sum, _mm512_loadu_ps(row + d));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)dim);
        for (int64_t d = 0; d < dim; d += LANES) {
            __m512 off = _mm512_sub_ps(_mm512_loadu_ps(row + d), mean);
            squares = _mm512_fmadd_ps(off, off, squares);
        }
        const __m512 variance = _mm512_set1_ps(_mm512_reduce_add_ps(squares) / (float)dim + norm->eps);
        const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(variance));
        for (int64_t d = 0; d < dim; d += LANES) {
            __m512 unit = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + d), mean), factor);
            const __m512 weight = _mm512_loadu_ps(norm->weight + d), bias = _mm512_loadu_ps(norm->bias + d);
            __m512 found = _mm512_fmadd_ps(unit, weight, bias);
            _mm512_storeu_ps(row + d, found);
            store_rounded(rounded + d, found);
        }
    }
}

/* The last hidden states of a row of texts, (n_tokens, dim).

   Words, positions and types are entries of the tables, one of each for a token. `space` is, from a multiple of 64
   on, for 8 * n_tokens * dim bytes, 384 for each output of `up`, 64, and what `attend` needs. Returns whether all
   entries are in their tables; nothing is computed else. */
int encode(
    const Encoder *encoder, const int64_t *words, const int64_t *positions, const int64_t *types,
    const int32_t *ends, int64_t n_texts, float scale, float *hidden, void *space
) {
    const int64_t n = ends[n_texts], dim = encoder->dim, size = dim / encoder->n_heads;
    const int64_t *indices[] = {words, positions, types};
    for (int table = 0; table < 3; table++)
        for (int64_t i = 0; i < n; i++)
            if (indices[table][i] < 0 || indices[table][i] >= encoder->n_entries[table]) return 0;

    bf16 *heads = space, *rounded = heads + 3 * n * dim, *inner = rounded + n * dim;
    void *rest = inner + BLOCK * encoder->layers->up.n_out;
    rest = (void *)(((uintptr_t)rest + 63) / 64 * 64);
    const Heads query = {heads, 3 * dim, size}, key = {heads + dim, 3 * dim, size};
    const Heads value = {heads + 2 * dim, 3 * dim, size};
    for (int64_t row = 0; row < n; row++) {
        const float *word = encoder->tables[0] + words[row] * dim;
        const float *position = encoder->tables[1] + positions[row] * dim;
        const float *type = encoder->tables[2] + types[row] * dim;
        for (int64_t d = 0; d < dim; d++) hidden[row * dim + d] = word[d] + type[d] + position[d];
    }
    normalize(hidden, &encoder->norm, n, dim, rounded);
    for (const Layer *layer = encoder->layers; layer < encoder->layers + encoder->n_layers; layer++) {
        for (int64_t row = 0; row < n; row += BLOCK) {
            const int64_t n_rows = n - row < BLOCK ? n - row : BLOCK;
            multiply(ROUND, rounded + row * dim, n_rows, &layer->heads, heads + 3 * row * dim, 0);
        }
        attend_heads(size, query, key, value, ends, n_texts, encoder->n_heads, 1, scale, 0, 0, rounded, rest);
        for (int64_t row = 0; row < n; row += BLOCK) {
            const int64_t n_rows = n - row < BLOCK ? n - row : BLOCK;
            float *states = hidden + row * dim;
            bf16 *now = rounded + row * dim;
            multiply(ADD, now, n_rows, &layer->output, 0, states);
            normalize(states, &layer->output_norm, n_rows, dim, now);
            multiply(GELU, now, n_rows, &layer->up, inner, 0);
            multiply(ADD, inner, n_rows, &layer->down, 0, states);
            normalize(states, &layer->down_norm, n_rows, dim, now);
        }
    }
    return 1;
}
