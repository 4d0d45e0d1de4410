// The operations of a U-Net that denoises a few rows, on memory that was laid out beforehand: native.py says what they
// are. Each number is the same sum in the same order wherever its row lies, and however many rows and threads there are.
#include "native.h"
#define MOST 9 // rows, each with an address of its own, that are multiplied at once, at most
#define DEEP 512 // rows of a panel, which stay in a cache while all rows of x pass
#define AHEAD 1024 // words of a panel that are fetched before they are needed: the CPU's own look ends with each page

enum { PRODUCT, NORM, COPY };

typedef struct {
    int64_t kind, phase; // what is of one phase waits for what is of the phases before
    const float *x, *weight, *bias, *scale, *shift, *residual;
    float *out;
    int64_t batch, steps, channels; // of out
    int64_t width;                  // of a product's rows
    int64_t x_batch, x_step, out_batch, out_step, residual_batch, residual_step, film_batch, film_number; // strides
    int64_t groups, adds, halves; // adds: to what is there, instead of to the bias; halves: the weight is in bf16
    float eps;
} operation;

int64_t panel_width(void) { return PANEL; }
int64_t operation_size(void) { return sizeof(operation); }

typedef uint32_t words __attribute__((vector_size(4 * WIDE), aligned(4)));

INLINE void read_panel(const float *panel, int halves, vector *left, vector *right) {
    for (int i = 0; i < panel_row(halves); i += 16) __builtin_prefetch(panel + AHEAD + i, 0, 2);
    if (!halves) {
        *left = *(const vector *)panel, *right = *(const vector *)(panel + WIDE);
        return;
    }
    words both = *(const words *)panel;
    *left = (vector)(both << 16), *right = (vector)(both & 0xffff0000u);
}

// Two vectors of sums to up to PANEL columns: with the bias, or to what is there.
static inline void put(float *to, int64_t columns, vector left, vector right, const float *bias, int64_t adds) {
    const float *added = adds ? to : bias;
    if (columns == PANEL) {
        if (added) left += *(const vector *)added, right += *(const vector *)(added + WIDE);
        *(vector *)to = left, *(vector *)(to + WIDE) = right;
        return;
    }
    for (int64_t i = 0; i < columns; i++) to[i] = (i < WIDE ? left[i] : right[i - WIDE]) + (added ? added[i] : 0);
}

// The products of `count` rows of x with `depth` rows of a panel.
INLINE void multiply(int count, int halves, const float *const *x, int64_t k, const float *panel, int64_t depth,
                     float *const *out, int64_t column, int64_t columns, const float *bias, int64_t adds) {
    vector own[2 * MOST] = {0}, left, right;
    const float *from[MOST];
    for (int row = 0; row < count; row++) from[row] = x[row] + k;
    for (k = 0; k < depth; k++, panel += panel_row(halves)) {
        read_panel(panel, halves, &left, &right);
        for (int row = 0; row < count; row++) {
            own[2 * row] += left * from[row][k];
            own[2 * row + 1] += right * from[row][k];
        }
    }
    for (int row = 0; row < count; row++) put(out[row] + column, columns, own[2 * row], own[2 * row + 1], bias, adds);
}

// The same for twelve rows of x that are `apart`: with 32 vectors, and addresses made of five numbers instead of twelve.
INLINE void multiply_12(int halves, const float *x, int64_t apart, const float *panel, int64_t depth, float *const *out,
                        int64_t column, int64_t columns, const float *bias, int64_t adds) {
    const float *from[4] = {x, x + 3 * apart, x + 6 * apart, x + 9 * apart};
    vector own[24] = {0}, left, right;
    for (int64_t k = 0; k < depth; k++, panel += panel_row(halves)) {
        read_panel(panel, halves, &left, &right);
        for (int i = 0; i < 4; i++) {
            for (int row = 0; row < 3; row++) {
                own[6 * i + 2 * row] += left * from[i][row * apart];
                own[6 * i + 2 * row + 1] += right * from[i][row * apart];
            }
            from[i]++;
        }
    }
    for (int row = 0; row < 12; row++) put(out[row] + column, columns, own[2 * row], own[2 * row + 1], bias, adds);
}

// How many rows are multiplied at once. Eight are once eight or twice four, not six and two; nine may be a picture's.
static int64_t rows_of(int64_t left) {
    if (WIDE > 8 && (left == 8 || left == 16)) return 8;
    if (WIDE > 8 && left == 9) return 9;
    return left >= 6 && left != 8 ? 6 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

static int are_apart(const float *const *x, int64_t rows) {
    for (int64_t i = 2; i < rows; i++) if (x[i] - x[i - 1] != x[1] - x[0]) return 0;
    return 1;
}

static int64_t place(int64_t row, int64_t steps, int64_t batch_stride, int64_t step_stride) {
    return row / steps * batch_stride + row % steps * step_stride;
}

INLINE void multiply_by(int halves, const float *const *x, float *const *out, int64_t rows, const float *weight,
                        int64_t width, int64_t depth, int64_t channels, int64_t first_panel, int64_t last_panel,
                        const float *bias, int64_t adds) {
    for (int64_t number = first_panel; number < last_panel; number++) {
        int64_t column = number * PANEL, columns = channels - column < PANEL ? channels - column : PANEL;
        const float *added = bias ? bias + column : NULL;
        for (int64_t k = 0; k < width; k += DEEP) {
            int64_t some = width - k < DEEP ? width - k : DEEP, more = adds || k;
            const float *panel = weight + (number * depth + k) * panel_row(halves);
            for (int64_t row = 0, taken; row < rows; row += taken) {
                int64_t left = rows - row;
                const float *const *from = x + row;
                float *const *to = out + row;
                taken = rows_of(left);
                if (WIDE > 8 && left >= 12 && left != 16 && are_apart(from, 12)) {
                    multiply_12(halves, from[0] + k, from[1] - from[0], panel, some, to, column, columns, added, more);
                    taken = 12;
                } else if (taken == 9) multiply(9, halves, from, k, panel, some, to, column, columns, added, more);
                else if (taken == 8) multiply(8, halves, from, k, panel, some, to, column, columns, added, more);
                else if (taken == 6) multiply(6, halves, from, k, panel, some, to, column, columns, added, more);
                else if (taken == 4) multiply(4, halves, from, k, panel, some, to, column, columns, added, more);
                else if (taken == 2) multiply(2, halves, from, k, panel, some, to, column, columns, added, more);
                else multiply(1, halves, from, k, panel, some, to, column, columns, added, more);
            }
        }
    }
}

void multiply_rows(const float *const *x, float *const *out, int64_t rows, const float *weight, int64_t halves, int64_t width,
                   int64_t depth, int64_t channels, int64_t first_panel, int64_t last_panel, const float *bias, int64_t adds) {
    if (halves) multiply_by(1, x, out, rows, weight, width, depth, channels, first_panel, last_panel, bias, adds);
    else multiply_by(0, x, out, rows, weight, width, depth, channels, first_panel, last_panel, bias, adds);
}

// out (B, T, C) = x (B, T, K) times the transpose of (C, K), whose panels lie as (C / PANEL, K, PANEL), plus the bias.
static void product(const operation *one, int64_t part, int64_t parts) {
    int64_t panels = blocks_of(one->channels, PANEL), rows = one->batch * one->steps;
    for (int64_t first = 0; first < rows; first += MANY) {
        int64_t count = rows - first < MANY ? rows - first : MANY;
        const float *x[MANY];
        float *out[MANY];
        for (int64_t i = 0; i < count; i++) {
            x[i] = one->x + place(first + i, one->steps, one->x_batch, one->x_step);
            out[i] = one->out + place(first + i, one->steps, one->out_batch, one->out_step);
        }
        multiply_rows(x, out, count, one->weight, one->halves, one->width, one->width, one->channels, panels * part / parts,
                      panels * (part + 1) / parts, one->bias, one->adds);
    }
}

// Group norm over (T, C / groups), Mish, and times the scale, plus the shift or the residual.
static void norm(const operation *one, int64_t part, int64_t parts) {
    int64_t all = one->batch * one->groups, size = one->channels / one->groups;
    for (int64_t number = all * part / parts; number < all * (part + 1) / parts; number++) {
        int64_t batch = number / one->groups, channel = number % one->groups * size, film = batch * one->film_batch;
        const float *x = one->x + batch * one->x_batch + channel;
        const float *weight = one->weight + channel, *bias = one->bias + channel;
        float sum = 0, squares = 0, count = (float)(one->steps * size);
        for (int64_t t = 0; t < one->steps; t++)
            for (int64_t c = 0; c < size; c++) sum += x[t * one->x_step + c];
        float mean = sum / count;
        for (int64_t t = 0; t < one->steps; t++)
            for (int64_t c = 0; c < size; c++)
                squares += (x[t * one->x_step + c] - mean) * (x[t * one->x_step + c] - mean);
        float rate = 1 / sqrtf(squares / count + one->eps);
        const float *scale = one->scale ? one->scale + film + channel : NULL;
        const float *shift = one->shift ? one->shift + film + channel : NULL;
        for (int64_t t = 0; t < one->steps; t++, x += one->x_step) {
            float *out = one->out + batch * one->out_batch + t * one->out_step + channel;
            const float *added = shift;
            if (one->residual) added = one->residual + batch * one->residual_batch + t * one->residual_step + channel;
            for (int64_t c = 0; c < size; c++) out[c] = mish((x[c] - mean) * rate * weight[c] + bias[c]);
            if (scale) for (int64_t c = 0; c < size; c++) out[c] *= scale[c];
            if (added) for (int64_t c = 0; c < size; c++) out[c] += added[c];
        }
    }
}

static void copy(const operation *one, int64_t part, int64_t parts) {
    int64_t rows = one->batch * one->steps;
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++)
        memcpy(one->out + place(row, one->steps, one->out_batch, one->out_step),
               one->x + place(row, one->steps, one->x_batch, one->x_step), sizeof(float) * one->channels);
}

// Do one denoising step: all operations, in the order of their phases, with FiLM's values of this step.
void run(const operation *operations, int64_t count, int64_t number, int64_t threads) {
    IN_PARALLEL {
        PART
        for (int64_t i = 0; i < count; i++) {
            operation one = operations[i];
            if (i && one.phase != operations[i - 1].phase) {
                WAIT
            }
            if (one.scale) one.scale += number * one.film_number;
            if (one.shift) one.shift += number * one.film_number;
            if (one.kind == PRODUCT) product(&one, part, parts);
            else if (one.kind == NORM) norm(&one, part, parts);
            else copy(&one, part, parts);
        }
    }
}
