/* The encoder in float32, for CPUs without bfloat16: compiled once for AVX2 with FMA and once for AVX-512F.

   Products are computed in blocks that suit registers and caches: some rows by the outputs of one panel stay in
   registers, the panel's weights for some inputs in the first cache, the rows in the second one.
   Source: Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", sections 4 and 6. */

#include "kernels.h"

enum {
#ifdef __AVX512F__
    ROWS = 6,    /* of a product at once, */
    VECTORS = 4, /* each this wide: 24 sums, 4 vectors of weights and a state are 29 of 32 registers */
    KEYS = 8,    /* at once */
    NUMBERS = 16, /* of a value at once */
#else
    ROWS = 6,    /* 12 sums, 2 vectors of weights and a state are 15 of 16 registers */
    VECTORS = 2,
    KEYS = 4,
    NUMBERS = 4,
#endif
    PANEL = VECTORS * LANES,
    DEPTH = 768, /* inputs at once */
    BLOCK = 96,  /* rows from one layer's attention to the next one's */
    INPUTS = 16,
    TAIL = 0,
    QUERIES = 16,
    PARTS = QUERIES / LANES, /* vectors that have one number of each query */
    MOST_NUMBERS = 128       /* of the largest head */
};

INLINE int is_allowed(void) { return 1; }
INLINE void begin(void) {}
INLINE void end(void) {}

/* The residual stream itself is float32. */
INLINE float *products_read(float *hidden, float *rounded) {
    (void)rounded;
    return hidden;
}
INLINE void store_number(float *to, Floats x) { store(to, x); }

/* GELU, x Phi(x): Phi(x) - 1/2 as x times a polynomial of 2 (x / 5.2)^2 - 1 on [-5.2, 5.2], fitted so that the
   largest error of GELU is least, 1.4e-6 as computed, and that nothing jumps at the ends. */
INLINE Floats gelu(Floats x) {
    static const float of[] = {8.58780753e-4f,  -2.50372407e-3f, 2.85357540e-3f,  -3.50570050e-3f, 7.55786384e-3f,
                               -1.31033538e-2f, 1.83871500e-2f,  -2.45934036e-2f, 3.19072641e-2f,  -3.99412997e-2f,
                               5.00301681e-2f,  -6.77434057e-2f, 1.35949939e-1f};
    const Floats near = clamped(x, 5.2f), at = near * near * (float)(2 / (5.2 * 5.2)) - 1.0f;
    Floats sum = all(of[0]);
    UNROLL for (int i = 1; i < 13; i++) sum = plus_product(all(of[i]), sum, at);
    return x * plus_product(all(0.5f), sum, near);
}

/* Attention: a vector has one number of each query, so that largest scores and sums need no steps across it. */

INLINE int64_t attention_bytes(int64_t dim, int64_t longest) {
    (void)dim;
    return QUERIES * (int64_t)sizeof(float) * (longest + KEYS);
}

INLINE void lay_text(int dim, Text text, void *space) {
    (void)dim, (void)text, (void)space; /* keys and values are read where they are */
}

/* Lay queries out as (number, query); after the last comes the last again. */
INLINE void lay_queries(int dim, Queries queries, Floats *out) {
    for (int d = 0; d < dim; d += LANES)
        UNROLL for (int part = 0; part < PARTS; part++) {
            Floats rows[LANES];
            UNROLL for (int i = 0; i < LANES; i++) {
                const int64_t query = least_of(part * LANES + i, queries.n - 1);
                rows[i] = load(queries.states + query * queries.stride + d);
            }
            transpose(rows);
            UNROLL for (int i = 0; i < LANES; i++) out[(d + i) * PARTS + part] = rows[i];
        }
}

/* Compute the scores of keys, (key, query), and the largest of each query. */
INLINE void score_keys(
    int dim, const Floats *laid, Queries queries, Text text, Mask mask, int64_t start, int64_t stop,
    Floats *scores, Floats *most
) {
    UNROLL for (int part = 0; part < PARTS; part++) most[part] = all(UNSEEN);
    for (int64_t key = start; key < stop; key += KEYS) {
        const float *states[KEYS];
        Floats sum[KEYS][PARTS];
        UNROLL for (int k = 0; k < KEYS; k++) {
            states[k] = text.keys + least_of(key + k, text.n - 1) * text.key_stride;
            UNROLL for (int part = 0; part < PARTS; part++) sum[k][part] = all(0);
        }
        for (int d = 0; d < dim; d++)
            UNROLL for (int k = 0; k < KEYS; k++) {
                const Floats state = all(states[k][d]);
                UNROLL for (int part = 0; part < PARTS; part++)
                    sum[k][part] = plus_product(sum[k][part], laid[d * PARTS + part], state);
            }
        UNROLL for (int k = 0; k < KEYS; k++) UNROLL for (int part = 0; part < PARTS; part++) {
            Floats score = sum[k][part];
            if (mask.is_causal || mask.window)
                score = seen_only(score, queries.first + part * LANES, key + k, text.n, mask);
            scores[(key + k) * PARTS + part] = score;
            if (key + k < stop) most[part] = most_of(most[part], score);
        }
    }
}

/* Make weights of scores, not yet divided by their sums, whose inverses are returned. */
INLINE void weigh_keys(Mask mask, int64_t start, int64_t stop, Floats *scores, Floats *most, Floats *inverse) {
    const Floats by = all(mask.scale);
    Floats sum[PARTS];
    UNROLL for (int part = 0; part < PARTS; part++) sum[part] = all(0);
    for (int64_t key = start; key < stop; key++)
        UNROLL for (int part = 0; part < PARTS; part++) {
            Floats *score = scores + key * PARTS + part;
            *score = power_of_two(6, *score * by - most[part] * by);
            sum[part] += *score;
        }
    UNROLL for (int part = 0; part < PARTS; part++) inverse[part] = 1.0f / sum[part];
}

/* Attention of neighbouring queries of one head to a text's keys and values. */
INLINE void attend_queries(
    int dim, Queries queries, Text text, Mask mask, void *space, float *out, int64_t out_stride
) {
    const int64_t start = first_seen(queries, mask, 1), stop = last_seen(queries, text, mask);
    Floats numbers[MOST_NUMBERS * PARTS], most[PARTS], inverse[PARTS], *weights = space;
    lay_queries(dim, queries, numbers);
    score_keys(dim, numbers, queries, text, mask, start, stop, weights, most);
    weigh_keys(mask, start, stop, weights, most, inverse);

    for (int d = 0; d < dim; d += NUMBERS) {
        Floats sum[NUMBERS][PARTS];
        UNROLL for (int i = 0; i < NUMBERS; i++)
            UNROLL for (int part = 0; part < PARTS; part++) sum[i][part] = all(0);
        for (int64_t key = start; key < stop; key++) {
            const float *value = text.values + key * text.value_stride + d;
            UNROLL for (int i = 0; i < NUMBERS; i++) {
                const Floats number = all(value[i]);
                UNROLL for (int part = 0; part < PARTS; part++)
                    sum[i][part] = plus_product(sum[i][part], weights[key * PARTS + part], number);
            }
        }
        UNROLL for (int i = 0; i < NUMBERS; i++) UNROLL for (int part = 0; part < PARTS; part++)
            numbers[(d + i) * PARTS + part] = sum[i][part] * inverse[part];
    }

    for (int d = 0; d < dim; d += LANES)
        UNROLL for (int part = 0; part < PARTS; part++) {
            Floats rows[LANES];
            UNROLL for (int i = 0; i < LANES; i++) rows[i] = numbers[(d + i) * PARTS + part];
            transpose(rows);
            for (int i = 0; i < LANES && part * LANES + i < queries.n; i++)
                store(out + (part * LANES + i) * out_stride + d, rows[i]);
        }
}

/* Products: weights lie as (panel, input, output of the panel). */

/* Some rows' outputs of one panel, from some of the inputs. */
INLINE void multiply_panel(
    const int n_rows, const Then then, const float *states, const Linear *by, int64_t column, int64_t input,
    float *out
) {
    const int64_t stop = least_of(input + DEPTH, by->n_in);
    const int is_first = input == 0, is_last = stop == by->n_in;
    const float *weight = by->weight + column * by->n_in;
    Floats sum[ROWS][VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const Floats bias = is_first ? load(by->bias + column + v * LANES) : all(0);
        UNROLL for (int r = 0; r < n_rows; r++) sum[r][v] = bias;
    }
    for (int64_t i = input; i < stop; i++) {
        Floats weights[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; v++) weights[v] = load(weight + i * PANEL + v * LANES);
        UNROLL for (int r = 0; r < n_rows; r++) {
            const Floats state = all(states[r * by->n_in + i]);
            UNROLL for (int v = 0; v < VECTORS; v++) sum[r][v] = plus_product(sum[r][v], state, weights[v]);
        }
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const int64_t at = column + v * LANES;
        if (at < by->n_out)
            UNROLL for (int r = 0; r < n_rows; r++) {
                float *to = out + r * by->n_out + at;
                Floats found = sum[r][v];
                if (then == ADD || !is_first) found += load(to);
                store(to, then == GELU && is_last ? gelu(found) : found);
            }
    }
}

/* What a Linear layer does, and then. */
INLINE void multiply_rows(const Then then, const float *states, int64_t n_rows, const Linear *by, float *out) {
    for (int64_t input = 0; input < by->n_in; input += DEPTH)
        for (int64_t column = 0; column < by->n_out; column += PANEL)
            for (int64_t row = 0; row < n_rows; row += ROWS) {
                const float *from = states + row * by->n_in;
                float *to = out + row * by->n_out;
                switch (n_rows - row) {
#define OF_ROWS(number) multiply_panel(number, then, from, by, column, input, to); break;
                    case 1: OF_ROWS(1)
                    case 2: OF_ROWS(2)
                    case 3: OF_ROWS(3)
                    case 4: OF_ROWS(4)
                    case 5: OF_ROWS(5)
                    default: OF_ROWS(ROWS)
                }
            }
}

static void multiply(Then then, const float *states, int64_t n_rows, const Linear *by, float *stored, float *added) {
    switch (then) {
        case STORE: multiply_rows(STORE, states, n_rows, by, stored); break;
        case GELU: multiply_rows(GELU, states, n_rows, by, stored); break;
        case ADD: multiply_rows(ADD, states, n_rows, by, added); break;
    }
}

#include "kernels_encoder.h"
