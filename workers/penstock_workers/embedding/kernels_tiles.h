/* Products and attention in tiles (AMX), for `kernels_bfloat16.c`.

   In this form it has never run on a CPU that has tiles. Tests run it with `TILES_IN_C`, where a tile is an array and
   its product a loop, against torch: that covers how weights, keys and values lie, blocks and tails, and leaves out
   the instructions, their configuration and the system's permission. The probe compares its vectors at each load. A
   sketch of the same products and attention ran on a Sapphire Rapids: docs/benchmarks/details.md.

   A tile holds 16 rows of 64 bytes. A product adds to a tile of 16 x 16 float32 that of one of 16 rows of 32 bfloat16
   and one of 16 pairs of rows of 16 bfloat16.
   Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and TDPBF16PS. */

enum {
    TILE = 16,
    INPUTS = 2 * TILE,  /* of a product of tiles */
    TAIL = 2 * TILE,    /* rows that may be read after the last one */
    PANEL = 2 * TILE,   /* outputs at once: four tiles of sums, two of states and two of weights are all eight */
    DEPTH = 512         /* inputs at once: their weights for a panel are 32 KiB of the 48 of the first cache */
};

#ifdef TILES_IN_C

typedef union {
    float sums[TILE][TILE];
    bf16 factors[TILE][INPUTS];
    unsigned char bytes[TILE][64];
} Tile;

static _Thread_local Tile tiles[8];

INLINE float widened(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float found;
    __builtin_memcpy(&found, &bits, sizeof found);
    return found;
}

static void tile_zero(int tile) { __builtin_memset(&tiles[tile], 0, sizeof tiles[tile]); }

static void tile_load(int tile, const void *from, int64_t stride) {
    for (int row = 0; row < TILE; row++)
        __builtin_memcpy(tiles[tile].bytes[row], (const char *)from + row * stride, 64);
}

static void tile_store(int tile, void *to, int64_t stride) {
    for (int row = 0; row < TILE; row++) __builtin_memcpy((char *)to + row * stride, tiles[tile].bytes[row], 64);
}

static void tile_product(int sums, int rows, int pairs) {
    for (int row = 0; row < TILE; row++)
        for (int i = 0; i < INPUTS; i++)
            for (int column = 0; column < TILE; column++)
                tiles[sums].sums[row][column] += widened(tiles[rows].factors[row][i]) *
                                                 widened(tiles[pairs].factors[i / 2][2 * column + i % 2]);
}

INLINE int is_allowed(void) { return 1; }
INLINE void begin(void) {}
INLINE void end(void) {}

#else

#include <sys/syscall.h>
#include <unistd.h>

/* The compiler does not know that the instructions read memory, so it is told to have written it. */
#define WRITTEN(address) __asm__ volatile("" : : "r"(address) : "memory")
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) \
    do { \
        WRITTEN(from); \
        _tile_loadd(tile, from, stride); \
    } while (0)
#define tile_store(tile, to, stride) \
    do { \
        _tile_stored(tile, to, stride); \
        WRITTEN(to); \
    } while (0)
#define tile_product(sums, rows, pairs) _tile_dpbf16ps(sums, rows, pairs)

/* Ask the system for the registers, 8 KiB a thread, which a process has only when it asked.
   Source: docs.kernel.org/arch/x86/xstate.html, ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA. */
INLINE int is_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

/* A thread's tiles have a shape between `begin` and `end` only: a call must not rely on what another one set.
   Source: the manual as above, LDTILECFG. */
static void begin(void) {
    struct {
        uint8_t palette, first_row, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = TILE;
    WRITTEN(&shape);
    _tile_loadconfig(&shape);
}

INLINE void end(void) { _tile_release(); }

#endif

/* Attention. Between calls lie scores, (key, query), and a text's keys, (key, number), and values, (number, key), so
   that neither a tile of them ends inside of the text's neighbours nor outside of the memory. */

INLINE int64_t attention_bytes(int64_t dim, int64_t longest) {
    const int64_t n_keys = rounded_up(longest, INPUTS);
    return n_keys * (int64_t)(sizeof(Floats) + sizeof(bf16) * (rounded_up(dim, INPUTS) + dim));
}

INLINE bf16 *laid_keys(Text text, void *space) { return (bf16 *)((Floats *)space + rounded_up(text.n, INPUTS)); }

INLINE bf16 *laid_values(int dim, Text text, void *space) {
    return laid_keys(text, space) + rounded_up(text.n, INPUTS) * rounded_up(dim, INPUTS);
}

/* 16 numbers each of two neighbouring keys' values as pairs; zeros after the last key. */
INLINE __m512i value_pairs(Text text, int64_t key, int d) {
    const bf16 *even = text.values + key * text.value_stride + d;
    const __m512i first = key < text.n ? widen(even) : _mm512_setzero_si512();
    const __m512i second = key + 1 < text.n ? widen(even + text.value_stride) : _mm512_setzero_si512();
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

/* Lay keys and values out; zeros after the last key, and after a key's last number. */
INLINE void lay_text(int dim, Text text, void *space) {
    const int64_t n_keys = rounded_up(text.n, INPUTS);
    bf16 *keys = laid_keys(text, space), *values = laid_values(dim, text, space);
    for (int64_t key = 0; key < n_keys; key++)
        for (int d = 0; d < dim; d += INPUTS, keys += INPUTS) {
            const int n_pairs = key >= text.n ? 0 : dim - d < INPUTS ? (dim - d) / 2 : TILE;
            const __mmask16 real = (__mmask16)((1u << n_pairs) - 1);
            const bf16 *from = n_pairs ? text.keys + key * text.key_stride + d : text.keys;
            _mm512_storeu_si512(keys, _mm512_maskz_loadu_epi32(real, from));
        }
    for (int64_t key = 0; key < n_keys; key += INPUTS)
        for (int d = 0; d < dim; d += TILE) {
            Floats rows[LANES];
            UNROLL for (int i = 0; i < LANES; i++) rows[i] = (Floats)value_pairs(text, key + 2 * i, d);
            transpose(rows);
            UNROLL for (int i = 0; i < LANES; i++) _mm512_storeu_ps(values + (d + i) * n_keys + key, rows[i]);
        }
}

/* Compute the scores of keys; returns the largest of each query. */
INLINE Floats score_keys(
    int dim, const __m512i *laid, Queries queries, Text text, Mask mask, int64_t start, int64_t stop,
    void *space
) {
    const int64_t deep = rounded_up(dim, INPUTS);
    const bf16 *keys = laid_keys(text, space);
    Floats *scores = space, most = all(UNSEEN);
    for (int64_t key = start; key < stop; key += 2 * TILE) {
        tile_zero(0);
        tile_zero(1);
        for (int d = 0; d < dim; d += INPUTS) {
            tile_load(4, laid + d / 2, 64);
            tile_load(5, keys + key * deep + d, deep * 2);
            tile_product(0, 5, 4);
            tile_load(6, keys + (key + TILE) * deep + d, deep * 2);
            tile_product(1, 6, 4);
        }
        tile_store(0, scores + key, 64);
        tile_store(1, scores + key + TILE, 64);
    }
    for (int64_t key = start; key < stop; key++) {
        if (mask.is_causal || mask.window) scores[key] = seen_only(scores[key], queries.first, key, text.n, mask);
        most = most_of(most, scores[key]);
    }
    return most;
}

/* Attention of neighbouring queries of one head to a text's keys and values. */
INLINE void attend_queries(
    int dim, Queries queries, Text text, Mask mask, void *space, bf16 *out, int64_t out_stride
) {
    const int64_t start = first_seen(queries, mask, INPUTS), stop = last_seen(queries, text, mask);
    const int64_t n_keys = rounded_up(text.n, INPUTS);
    const bf16 *values = laid_values(dim, text, space);
    __m512i laid[MOST_NUMBERS / 2], *weights = space;
    lay_queries(dim, queries, laid);
    const Floats most = score_keys(dim, laid, queries, text, mask, start, stop, space);
    const Floats inverse = weigh_keys(mask, start, stop, most, space);
    for (int64_t two = (stop + 1) / 2; two % TILE; two++) weights[two] = _mm512_setzero_si512();
    for (int d = 0; d < dim; d += 2 * TILE) {
        const int has_two = d + TILE < dim;
        Floats sums[2][LANES];
        tile_zero(0);
        tile_zero(1);
        for (int64_t key = start; key < stop; key += INPUTS) {
            tile_load(4, weights + key / 2, 64);
            tile_load(5, values + d * n_keys + key, n_keys * 2);
            tile_product(0, 5, 4);
            if (has_two) {
                tile_load(6, values + (d + TILE) * n_keys + key, n_keys * 2);
                tile_product(1, 6, 4);
            }
        }
        tile_store(0, sums[0], 64);
        store_numbers(sums[0], inverse, queries, out + d, out_stride);
        if (has_two) {
            tile_store(1, sums[1], 64);
            store_numbers(sums[1], inverse, queries, out + d + TILE, out_stride);
        }
    }
}

/* Products. Rows up to a multiple of 32 are read, and only real ones stored. */

/* Add to the sums of up to 32 rows, (row, output), what some inputs give. */
INLINE void multiply_block(
    const int has_two, const bf16 *states, int64_t n_in, const bf16 *weight, int64_t depth, int is_first, float *sums
) {
    float *more = sums + TILE * PANEL;
    if (is_first) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, sums, PANEL * 4);
        tile_load(1, sums + TILE, PANEL * 4);
        if (has_two) {
            tile_load(2, more, PANEL * 4);
            tile_load(3, more + TILE, PANEL * 4);
        }
    }
    for (int64_t i = 0; i < depth; i += INPUTS) {
        tile_load(6, weight + i * PANEL, PANEL * 4);
        tile_load(4, states + i, n_in * 2);
        tile_product(0, 4, 6);
        tile_load(7, weight + i * PANEL + 2 * TILE, PANEL * 4);
        tile_product(1, 4, 7);
        if (has_two) {
            tile_load(5, states + TILE * n_in + i, n_in * 2);
            tile_product(2, 5, 6);
            tile_product(3, 5, 7);
        }
    }
    tile_store(0, sums, PANEL * 4);
    tile_store(1, sums + TILE, PANEL * 4);
    if (has_two) {
        tile_store(2, more, PANEL * 4);
        tile_store(3, more + TILE, PANEL * 4);
    }
}

/* Finish some rows' sums: 32 outputs from `column` on. */
INLINE void finish_sums(
    const Then then, const float *sums, int64_t n_rows, const Linear *by, int64_t column, bf16 *stored, float *added
) {
    for (int64_t at = column; at < column + PANEL && at < by->n_out; at += LANES) {
        const Floats bias = load(by->bias + at);
        for (int64_t row = 0; row < n_rows; row++) {
            const Floats found = load(sums + row * PANEL + at - column) + bias;
            float *to = added + row * by->n_out + at;
            if (then == ADD)
                store(to, load(to) + found);
            else
                store_number(stored + row * by->n_out + at, then == GELU ? gelu(found) : found);
        }
    }
}

static void multiply(Then then, const bf16 *states, int64_t n_rows, const Linear *by, bf16 *stored, float *added) {
    _Alignas(64) float sums[BLOCK * PANEL];
    const int64_t n_in = by->n_in;
    for (int64_t column = 0; column < by->n_out; column += PANEL) {
        const bf16 *weight = by->weight + column * n_in;
        for (int64_t input = 0; input < n_in; input += DEPTH)
            for (int64_t row = 0; row < n_rows; row += 2 * TILE) {
                const bf16 *from = states + row * n_in + input, *by_weight = weight + input * PANEL;
                const int64_t depth = least_of(n_in - input, DEPTH);
                if (n_rows - row > TILE)
                    multiply_block(1, from, n_in, by_weight, depth, input == 0, sums + row * PANEL);
                else
                    multiply_block(0, from, n_in, by_weight, depth, input == 0, sums + row * PANEL);
            }
        switch (then) {
            case STORE: finish_sums(STORE, sums, n_rows, by, column, stored, 0); break;
            case GELU: finish_sums(GELU, sums, n_rows, by, column, stored, 0); break;
            case ADD: finish_sums(ADD, sums, n_rows, by, column, 0, added); break;
        }
    }
}
