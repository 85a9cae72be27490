/* What a variant shows: attention over a row of texts, and the encoder of the BERT family.

   The variant has defined before:
     BLOCK, PANEL, QUERIES                      rows of products, outputs and queries that it takes at once
     INPUTS, TAIL                               what its products take inputs in, and rows that they read after the last
     attention_bytes, lay_text, attend_queries  attention of one head of one text
     multiply                                   a Linear layer
     products_read, store_number                what products read of the residual stream, and a vector of it
     is_allowed, begin, end                     whether it may run here; around each call from outside */

typedef struct {
    const Number *states; /* (n_tokens, n_heads, dim) */
    int64_t token, head;  /* strides, in numbers */
} Heads;

typedef struct {
    const int32_t *ends; /* where each text begins, and where the last one ends */
    int64_t n_texts;
} Texts;

static void attend_texts(
    int dim, Heads query, Heads key, Heads value, Texts texts, int64_t n_heads, int64_t n_sharing, Mask mask,
    Number *out, void *space
) {
    for (int64_t number = 0; number < texts.n_texts; number++) {
        const int64_t start = texts.ends[number], n = texts.ends[number + 1] - start;
        for (int64_t head = 0; head < n_heads; head++) {
            const int64_t shared = head / n_sharing;
            const Text text = {
                key.states + start * key.token + shared * key.head,
                value.states + start * value.token + shared * value.head, key.token, value.token, n,
            };
            if (head % n_sharing == 0) lay_text(dim, text, space);
            for (int64_t row = 0; row < n; row += QUERIES) {
                const Number *states = query.states + (start + row) * query.token + head * query.head;
                const Queries queries = {states, query.token, row, least_of(n - row, QUERIES)};
                Number *to = out + ((start + row) * n_heads + head) * dim;
                attend_queries(dim, queries, text, mask, space, to, n_heads * dim);
            }
        }
    }
}

/* Outputs whose weights lie together, and what numbers of inputs have to be multiples of. */
const int64_t SHOWN(panel) = PANEL, SHOWN(inputs) = INPUTS;

/* Whether the system lets this process use the variant. */
int SHOWN(is_allowed)(void) { return is_allowed(); }

/* The memory that `attend` wants for what it computes in between, from a multiple of 64 on. */
int64_t SHOWN(attention_bytes)(int64_t dim, int64_t longest) { return attention_bytes(dim, longest); }

/* Attention in which each text sees itself; out is (n_tokens, n_heads, dim), `dim` a multiple of 16, at most 128. */
void SHOWN(attend)(
    int64_t dim, const Number *query, int64_t query_token, int64_t query_head, const Number *key,
    int64_t key_token, int64_t key_head, const Number *value, int64_t value_token, int64_t value_head,
    const int32_t *ends, int64_t n_texts, int64_t n_heads, int64_t n_sharing, float scale, int64_t window,
    int is_causal, Number *out, void *space
) {
    const Heads q = {query, query_token, query_head}, k = {key, key_token, key_head};
    const Heads v = {value, value_token, value_head};
    begin();
    attend_texts((int)dim, q, k, v, (Texts){ends, n_texts}, n_heads, n_sharing, (Mask){scale, window, is_causal}, out,
                 space);
    end();
}

/* The memory that `encode` wants for what it computes in between, from a multiple of 64 on. */
int64_t SHOWN(encoder_bytes)(const Encoder *encoder, int64_t n_tokens, int64_t longest) {
    const int64_t inner = BLOCK * encoder->layers->up.n_out;
    const int64_t numbers = (4 * n_tokens + TAIL) * encoder->dim + inner;
    return numbers * (int64_t)sizeof(Number) + 64 + attention_bytes(encoder->dim / encoder->n_heads, longest);
}

/* LayerNorm of rows, in place, and as products read it. */
static void normalize(float *rows, const Norm *norm, int64_t n_rows, int64_t dim, Number *states) {
    for (float *row = rows; row < rows + n_rows * dim; row += dim, states += dim) {
        Floats sum = all(0), squares = all(0);
        for (int64_t d = 0; d < dim; d += LANES) sum += load(row + d);
        const Floats mean = all(total(sum) / (float)dim);
        for (int64_t d = 0; d < dim; d += LANES) {
            const Floats off = load(row + d) - mean;
            squares = plus_product(squares, off, off);
        }
        const Floats factor = 1.0f / root(all(total(squares) / (float)dim + norm->eps));
        for (int64_t d = 0; d < dim; d += LANES) {
            const Floats unit = (load(row + d) - mean) * factor;
            const Floats found = plus_product(load(norm->bias + d), unit, load(norm->weight + d));
            store(row + d, found);
            store_number(states + d, found);
        }
    }
}

static void look_up(const Encoder *encoder, const int64_t *indices[3], int64_t n, float *hidden) {
    const int64_t dim = encoder->dim;
    for (int64_t row = 0; row < n; row++) {
        const float *word = encoder->tables[0] + indices[0][row] * dim;
        const float *position = encoder->tables[1] + indices[1][row] * dim;
        const float *type = encoder->tables[2] + indices[2][row] * dim;
        for (int64_t d = 0; d < dim; d++) hidden[row * dim + d] = word[d] + type[d] + position[d];
    }
}

/* A layer from its attention on, for some rows. What lies between stays in the cache. */
static void finish_rows(
    const Layer *layer, const Number *attended, int64_t n_rows, int64_t dim, float *hidden, Number *states,
    Number *inner
) {
    multiply(ADD, attended, n_rows, &layer->output, 0, hidden);
    normalize(hidden, &layer->output_norm, n_rows, dim, states);
    multiply(GELU, states, n_rows, &layer->up, inner, 0);
    multiply(ADD, inner, n_rows, &layer->down, 0, hidden);
    normalize(hidden, &layer->down_norm, n_rows, dim, states);
}

/* The last hidden states of a row of texts, (n_tokens, dim); all widths are multiples of 16.

   Words, positions and types are entries of the tables, one of each for a token. Returns whether all entries are
   in their tables; nothing is computed else. */
int SHOWN(encode)(
    const Encoder *encoder, const int64_t *words, const int64_t *positions, const int64_t *types,
    const int32_t *ends, int64_t n_texts, float scale, float *hidden, void *space
) {
    const int64_t n = ends[n_texts], dim = encoder->dim, size = dim / encoder->n_heads;
    const int64_t *indices[] = {words, positions, types};
    for (int table = 0; table < 3; table++)
        for (int64_t i = 0; i < n; i++)
            if (indices[table][i] < 0 || indices[table][i] >= encoder->n_entries[table]) return 0;

    Number *heads = space, *attended = heads + 3 * n * dim, *inner = attended + (n + TAIL) * dim;
    Number *states = products_read(hidden, attended);
    void *rest = inner + BLOCK * encoder->layers->up.n_out;
    rest = (void *)(((uintptr_t)rest + 63) / 64 * 64);
    const Heads query = {heads, 3 * dim, size}, key = {heads + dim, 3 * dim, size};
    const Heads value = {heads + 2 * dim, 3 * dim, size};

    begin();
    look_up(encoder, indices, n, hidden);
    normalize(hidden, &encoder->norm, n, dim, states);
    for (const Layer *layer = encoder->layers; layer < encoder->layers + encoder->n_layers; layer++) {
        for (int64_t row = 0; row < n; row += BLOCK)
            multiply(STORE, states + row * dim, least_of(n - row, BLOCK), &layer->heads, heads + 3 * row * dim, 0);
        attend_texts((int)size, query, key, value, (Texts){ends, n_texts}, encoder->n_heads, 1, (Mask){scale, 0, 0},
                     attended, rest);
        for (int64_t row = 0; row < n; row += BLOCK)
            finish_rows(layer, attended + row * dim, least_of(n - row, BLOCK), dim, hidden + row * dim,
                        states + row * dim, inner);
    }
    end();
    return 1;
}
