/* The encoder in bfloat16: compiled once for CPUs with AVX-512 BF16, and once for those with tiles (AMX) too.

   Factors of products are bfloat16, sums are float32. With `TILES`, products and attention are those of
   `kernels_tiles.h`; all else is the same. */

#define BFLOAT16
#include "kernels.h"

typedef Number bf16;
typedef int32_t __attribute__((may_alias)) Pair; /* of bfloat16 */

enum {
    BLOCK = 192, /* rows from one layer's attention to the next one's: what lies between stays in the cache */
    QUERIES = LANES,
    MOST_NUMBERS = 128 /* of the largest head */
};

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

INLINE __m512i pair(const bf16 *states, int64_t which) {
    return _mm512_set1_epi32(((const Pair *)states)[which]);
}

INLINE __m512i widen(const bf16 *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
}

INLINE void store_number(bf16 *to, Floats x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

INLINE bf16 *products_read(float *hidden, bf16 *rounded) {
    (void)hidden;
    return rounded;
}

/* GELU, x Phi(x): Phi(x) - 1/2 as x times a polynomial of x^2 on [-4.5, 4.5], fitted so that the largest error
   of GELU is least, 6e-5 as computed, and that nothing jumps at the ends. */
INLINE Floats gelu(Floats x) {
    static const float of[] = {3.00000779e-11f, -3.28391299e-9f, 1.58025742e-7f, -4.43168509e-6f, 8.12097173e-5f,
                               -1.03625333e-3f, 9.58065364e-3f, -6.59772702e-2f, 3.98708574e-1f};
    const Floats near = clamped(x, 4.5f), square = near * near;
    Floats sum = all(of[0]);
    UNROLL for (int i = 1; i < 9; i++) sum = plus_product(all(of[i]), sum, square);
    return x * plus_product(all(0.5f), sum, near);
}

/* Attention: a vector has one number, or a pair, of each query, so that largest scores and sums need no steps
   across it. */

/* Lay 16 queries out as (pair of numbers, query); after the last comes the last again. */
INLINE void lay_queries(int dim, Queries queries, __m512i *out) {
    for (int d = 0; d < dim; d += 2 * LANES) {
        const int n_pairs = dim - d < 2 * LANES ? (dim - d) / 2 : LANES;
        const __mmask16 real = (__mmask16)((1u << n_pairs) - 1);
        Floats rows[LANES];
        for (int r = 0; r < LANES; r++) {
            const bf16 *from = queries.states + least_of(r, queries.n - 1) * queries.stride + d;
            rows[r] = (Floats)_mm512_maskz_loadu_epi32(real, from);
        }
        transpose(rows);
        for (int i = 0; i < LANES; i++) *out++ = (__m512i)rows[i]; /* zeros after the last pair */
    }
}

/* Make weights of scores, (key, query), not yet divided by their sums: pairs of two keys' lie where their scores
   lay, half as long, so nothing is written before it was read. Returns the sums' inverses. */
INLINE Floats weigh_keys(Mask mask, int64_t start, int64_t stop, Floats most, Floats *scores) {
    const Floats by = all(mask.scale), top = most * by;
    const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                               22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i *weights = (__m512i *)scores;
    Floats sum = all(0);
    for (int64_t key = start; key < stop; key += 2) {
        Floats even = power_of_two(5, _mm512_fmsub_ps(scores[key], by, top)), odd = all(0);
        if (key + 1 < stop) odd = power_of_two(5, _mm512_fmsub_ps(scores[key + 1], by, top));
        sum += even + odd;
        weights[key / 2] = _mm512_permutexvar_epi16(alternate, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
    return 1.0f / sum;
}

/* Store 16 numbers of each query, (number, query). */
INLINE void store_numbers(Floats *numbers, Floats inverse, Queries queries, bf16 *out, int64_t out_stride) {
    UNROLL for (int i = 0; i < LANES; i++) numbers[i] *= inverse;
    transpose(numbers);
    for (int r = 0; r < queries.n; r++) store_number(out + r * out_stride, numbers[r]);
}

/* Multiply some rows with a Linear layer's weights, which lie as (panel, pair of inputs, output of the panel, input
   of the pair), and then: `stored` or `added` to. */
static void multiply(Then then, const bf16 *states, int64_t n_rows, const Linear *by, bf16 *stored, float *added);

#ifdef TILES
#include "kernels_tiles.h"
#else

enum {
    KEYS = 8,    /* at once */
    ROWS = 6,    /* of a product at once, */
    VECTORS = 4, /* each this wide: 24 sums, 4 vectors of weights and a state are 29 of 32 registers */
    PANEL = VECTORS * LANES,
    INPUTS = LANES,
    TAIL = 0
};

INLINE int is_allowed(void) { return 1; }
INLINE void begin(void) {}
INLINE void end(void) {}

/* Between calls lie scores, (key, query), and a text's values, (pair of keys, number, key of the pair). */
INLINE int64_t attention_bytes(int64_t dim, int64_t longest) { return (2 * dim + 64) * (longest + 1); }
INLINE uint32_t *laid_values(Text text, void *space) { return (uint32_t *)((Floats *)space + text.n); }

/* Lay values out; zeros after the last. */
INLINE void lay_text(int dim, Text text, void *space) {
    uint32_t *out = laid_values(text, space);
    for (int64_t key = 0; key < text.n; key += 2)
        for (int d = 0; d < dim; d += LANES, out += LANES) {
            const bf16 *even = text.values + key * text.value_stride + d;
            const int is_pair = key + 1 < text.n;
            const __m512i odd = is_pair ? _mm512_slli_epi32(widen(even + text.value_stride), 16)
                                        : _mm512_setzero_si512();
            _mm512_storeu_si512(out, _mm512_or_si512(widen(even), odd));
        }
}

/* Compute the scores of keys; returns the largest of each query. */
INLINE Floats score_keys(
    int dim, const __m512i *laid, Queries queries, Text text, Mask mask, int64_t start, int64_t stop,
    Floats *scores
) {
    Floats most = all(UNSEEN);
    for (int64_t key = start; key < stop; key += KEYS) {
        const bf16 *states[KEYS];
        Floats sum[KEYS];
        UNROLL for (int k = 0; k < KEYS; k++) {
            states[k] = text.keys + least_of(key + k, text.n - 1) * text.key_stride;
            sum[k] = all(0);
        }
        for (int i = 0; i < dim / 2; i++)
            UNROLL for (int k = 0; k < KEYS; k++) sum[k] = dot(sum[k], laid[i], pair(states[k], i));
        for (int k = 0; k < KEYS && key + k < stop; k++) {
            if (mask.is_causal || mask.window) sum[k] = seen_only(sum[k], queries.first, key + k, text.n, mask);
            most = most_of(most, sum[k]);
            scores[key + k] = sum[k];
        }
    }
    return most;
}

/* Attention of neighbouring queries of one head to a text's keys and values. */
INLINE void attend_queries(
    int dim, Queries queries, Text text, Mask mask, void *space, bf16 *out, int64_t out_stride
) {
    const int64_t start = first_seen(queries, mask, 2), stop = last_seen(queries, text, mask);
    const uint32_t *values = laid_values(text, space);
    const __m512i *weights = space;
    __m512i laid[MOST_NUMBERS / 2];
    lay_queries(dim, queries, laid);
    const Floats most = score_keys(dim, laid, queries, text, mask, start, stop, space);
    const Floats inverse = weigh_keys(mask, start, stop, most, space);
    for (int d = 0; d < dim; d += LANES) {
        Floats sum[LANES];
        UNROLL for (int i = 0; i < LANES; i++) sum[i] = all(0);
        for (int64_t two = start / 2; two < (stop + 1) / 2; two++) {
            const uint32_t *value = values + two * dim + d;
            const __m512i weight = weights[two];
            UNROLL for (int i = 0; i < LANES; i++) sum[i] = dot(sum[i], weight, _mm512_set1_epi32((int)value[i]));
        }
        store_numbers(sum, inverse, queries, out + d, out_stride);
    }
}

/* Some rows' outputs of one panel. */
INLINE void multiply_panel(
    const int n_rows, const Then then, const bf16 *states, const Linear *by, int64_t column, bf16 *stored, float *added
) {
    const bf16 *weight = by->weight + column * by->n_in;
    Floats sum[ROWS][VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) {
        sum[0][v] = load(by->bias + column + v * LANES);
        UNROLL for (int r = 1; r < n_rows; r++) sum[r][v] = sum[0][v];
    }
    for (int64_t i = 0; i < by->n_in / 2; i++) {
        __m512i weights[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++)
            weights[v] = _mm512_loadu_si512(weight + 2 * (i * PANEL + v * LANES));
        UNROLL for (int r = 0; r < n_rows; r++) {
            const __m512i state = pair(states + r * by->n_in, i);
            UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = dot(sum[r][v], state, weights[v]);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const int64_t at = column + v * LANES;
        if (at < by->n_out)
            UNROLL for (int r = 0; r < n_rows; r++) {
                if (then == ADD)
                    store(added + r * by->n_out + at, load(added + r * by->n_out + at) + sum[r][v]);
                else
                    store_number(stored + r * by->n_out + at, then == GELU ? gelu(sum[r][v]) : sum[r][v]);
            }
    }
}

INLINE void multiply_rows(
    const Then then, const bf16 *states, int64_t n_rows, const Linear *by, bf16 *stored, float *added
) {
    for (int64_t column = 0; column < by->n_out; column += PANEL)
        for (int64_t row = 0; row < n_rows; row += ROWS) {
            const bf16 *from = states + row * by->n_in;
            bf16 *to = then == ADD ? 0 : stored + row * by->n_out;
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

static void multiply(Then then, const bf16 *states, int64_t n_rows, const Linear *by, bf16 *stored, float *added) {
    switch (then) {
        case STORE: multiply_rows(STORE, states, n_rows, by, stored, 0); break;
        case GELU: multiply_rows(GELU, states, n_rows, by, stored, 0); break;
        case ADD: multiply_rows(ADD, states, n_rows, by, 0, added); break;
    }
}

#endif

#include "kernels_encoder.h"
