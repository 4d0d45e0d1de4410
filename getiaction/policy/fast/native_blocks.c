// A residual block of a U-Net that learns, as one call each way. Samples are shared by the threads, a few at a time, which
// stay in a cache from the first convolution to the last norm; the weights' gradients are shared by their columns. Every
// number is the same sum in the same order for any number of threads.
#include "native.h"
#define DEEP 64 // rows whose products are summed up in the first cache
#define SOME 192 // moments of samples that go through a block together

typedef struct {
    const float *weight, *bias;                  // (C', C, k)
    int64_t in, out, kernel;                     // C, C', k
    int64_t out_stride, in_stride, tap_stride;   // of the weight
    float *panels, *turned;                      // of the weight, and of it transposed with its taps turned round
    float *by_weight;
    int64_t by_out_stride, by_in_stride, by_tap_stride; // of that
} convolution;

typedef struct {
    int64_t batch, steps;
    convolution first, second, around;           // around has no weight where x is added as it is
    between norms[2];                            // whose x are `hidden`
    const float *x, *gradient;
    int64_t x_batch, x_step, gradient_batch, gradient_step;
    float *padded[2];                            // what is convolved, (B, T + k - 1, C), with zeros around
    float *hidden[2];                            // what comes of it, (B, T, C')
    float *by_hidden[2];                         // padded, too
    float *by_x, *by_bias;                       // (B, T, C), or NULL; of `around`
    float *scratch;                              // block_scratch() numbers for each thread
} block;

int64_t block_size(void) { return sizeof(block); }
int64_t panel_numbers(int64_t columns, int64_t rows) { return blocks_of(columns, PANEL) * PANEL * rows; }
int64_t block_scratch(int64_t steps, int64_t out) { return (steps > SOME ? steps : SOME) * out + OWN_ROWS * out; }

// Lay a weight (C', C, k) in panels of C' columns, rows (k, C); or turned, in panels of C, rows (k, C'), the last tap first.
static void lay(const convolution *one, int is_turned, int64_t part, int64_t parts) {
    int64_t columns = is_turned ? one->in : one->out, depth = is_turned ? one->out : one->in;
    int64_t column_stride = is_turned ? one->in_stride : one->out_stride;
    int64_t row_stride = is_turned ? one->out_stride : one->in_stride, panels = blocks_of(columns, PANEL);
    float *to = is_turned ? one->turned : one->panels;
    for (int64_t number = panels * part / parts; number < panels * (part + 1) / parts; number++) {
        float *panel = to + number * PANEL * one->kernel * depth;
        int64_t first = number * PANEL, count = columns - first < PANEL ? columns - first : PANEL;
        for (int64_t tap = 0; tap < one->kernel; tap++) {
            const float *from = one->weight + (is_turned ? one->kernel - 1 - tap : tap) * one->tap_stride;
            for (int64_t row = 0; row < depth; row++, panel += PANEL) {
                for (int64_t c = 0; c < count; c++) panel[c] = from[row * row_stride + (first + c) * column_stride];
                for (int64_t c = count; c < PANEL; c++) panel[c] = 0;
            }
        }
    }
}

// Multiply windows of some samples, `kernel` places of `width` numbers each, with panels: the rows of one moment together,
// since they see the same taps, and nothing is multiplied by padding. `x` is where the first moment's window starts.
static void multiply(const float *x, int64_t x_batch, int64_t x_step, float *out, int64_t out_batch, int64_t out_step,
                     int64_t samples, int64_t steps, const float *panels, int64_t kernel, int64_t width, int64_t channels,
                     const float *bias, int64_t adds) {
    const float *from[MANY];
    float *to[MANY];
    int64_t edge = kernel / 2, all = blocks_of(channels, PANEL);
    for (int64_t t = 0; t < steps; t++) {
        int64_t tap = t < edge ? edge - t : 0, end = steps + edge - t < kernel ? steps + edge - t : kernel;
        for (int64_t first = 0; first < samples; first += MANY) {
            int64_t rows = samples - first < MANY ? samples - first : MANY;
            for (int64_t row = 0; row < rows; row++) {
                from[row] = x + (first + row) * x_batch + t * x_step + tap * width;
                to[row] = out + (first + row) * out_batch + t * out_step;
            }
            multiply_rows(from, to, rows, panels + tap * width * PANEL, 0, (end - tap) * width, kernel * width, channels, 0,
                          all, bias, adds);
        }
    }
}

static void pad(float *padded, int64_t steps, int64_t edge, int64_t channels) {
    memset(padded, 0, sizeof(float) * edge * channels);
    memset(padded + (steps + edge) * channels, 0, sizeof(float) * edge * channels);
}

// The gradient of a weight: of what came out (B, T, C') times the windows of what went in, (B, T, k C).
static void weigh(const convolution *one, const float *by_out, int64_t out_batch, int64_t out_step, const float *x,
                  int64_t x_batch, int64_t x_step, int64_t samples, int64_t steps, int64_t part, int64_t parts) {
    int64_t width = one->kernel * one->in, panels = blocks_of(width, PANEL);
    int64_t blocks = (one->out + HIGH * TALL - 1) / (HIGH * TALL), tasks = panels * blocks, edge = one->kernel / 2;
    float a[DEEP * HIGH * TALL] = {0}, b[DEEP * PANEL] = {0};
    vector sums[HIGH][2 * TALL];
    for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; task++) {
        int64_t column = task / blocks * PANEL, columns = width - column < PANEL ? width - column : PANEL;
        int64_t first = task % blocks * HIGH * TALL, count = one->out - first < HIGH * TALL ? one->out - first : HIGH * TALL;
        int64_t tap = column / one->in, last_tap = (column + columns - 1) / one->in; // moments that see padding only are left
        int64_t start = last_tap < edge ? edge - last_tap : 0, end = tap > edge ? steps + edge - tap : steps;
        int64_t seen = end - start > 0 ? end - start : 0, rows = samples * seen;
        const float *from_x = x + column + start * x_step, *from_out = by_out + first + start * out_step;
        memset(sums, 0, sizeof(sums));
        for (int64_t begin = 0, t = 0; begin < rows; begin += DEEP) {
            int64_t depth = rows - begin < DEEP ? rows - begin : DEEP;
            for (int64_t row = 0; row < depth; row++) {
                memcpy(a + row * HIGH * TALL, from_out, sizeof(float) * count);
                if (columns == PANEL) memcpy(b + row * PANEL, from_x, sizeof(float) * PANEL);
                else memcpy(b + row * PANEL, from_x, sizeof(float) * columns);
                from_x += x_step, from_out += out_step;
                if (++t == seen) t = 0, from_x += x_batch - seen * x_step, from_out += out_batch - seen * out_step;
            }
            for (int64_t group = 0; group * TALL < count; group++)
                add_products(a + group * TALL, HIGH * TALL, b, depth, sums[group]);
        }
        for (int64_t c = 0; c < count; c++) {
            const float *sum = (const float *)sums[c / TALL] + c % TALL * PANEL;
            float *to = one->by_weight + (first + c) * one->by_out_stride;
            for (int64_t i = 0, at = tap, channel = column % one->in; i < columns; i++) {
                to[at * one->by_tap_stride + channel * one->by_in_stride] = sum[i];
                if (++channel == one->in) channel = 0, at++;
            }
        }
    }
}

static void block_forwards(const block *one, int64_t first, int64_t last, float *scratch) {
    const convolution *start = &one->first, *end = &one->second, *around = &one->around;
    int64_t steps = one->steps, edge = start->kernel / 2, long_steps = steps + 2 * edge, in = start->in, out = start->out;
    between norms[2] = {one->norms[0], one->norms[1]};
    float *own = scratch + block_scratch(steps, out) - OWN_ROWS * out;
    for (int64_t batch = first; batch < last; batch++) {
        float *padded = one->padded[0] + batch * long_steps * in;
        pad(padded, steps, edge, in);
        pad(one->padded[1] + batch * long_steps * out, steps, edge, out);
        for (int64_t t = 0; t < steps; t++)
            memcpy(padded + (edge + t) * in, one->x + batch * one->x_batch + t * one->x_step, sizeof(float) * in);
    }
    multiply(one->padded[0] + first * long_steps * in, long_steps * in, in, one->hidden[0] + first * steps * out, steps * out,
             out, last - first, steps, start->panels, start->kernel, in, out, NULL, 0);
    for (int64_t batch = first; batch < last; batch++) forwards(&norms[0], batch, own);
    multiply(one->padded[1] + first * long_steps * out, long_steps * out, out, one->hidden[1] + first * steps * out,
             steps * out, out, last - first, steps, end->panels, end->kernel, out, out, NULL, 0);
    if (around->weight) {
        multiply(one->padded[0] + first * long_steps * in + edge * in, long_steps * in, in, scratch, steps * out, out,
                 last - first, steps, around->panels, 1, in, out, around->bias, 0);
        norms[1].added = scratch - first * steps * out;
    }
    for (int64_t batch = first; batch < last; batch++) forwards(&norms[1], batch, own);
}

static void block_backwards(const block *one, int64_t first, int64_t last, float *scratch) {
    const convolution *start = &one->first, *end = &one->second, *around = &one->around;
    int64_t steps = one->steps, edge = start->kernel / 2, long_steps = steps + 2 * edge, in = start->in, out = start->out;
    between norm = one->norms[0];
    float *own = scratch + block_scratch(steps, out) - OWN_ROWS * out;
    for (int64_t batch = first; batch < last; batch++) {
        for (int i = 0; i < 2; i++) pad(one->by_hidden[i] + batch * long_steps * out, steps, edge, out);
        backwards(&one->norms[1], batch, own);
    }
    multiply(one->by_hidden[1] + first * long_steps * out, long_steps * out, out, scratch, steps * out, out, last - first,
             steps, end->turned, end->kernel, out, out, NULL, 0);
    norm.gradient = scratch - first * steps * out;
    for (int64_t batch = first; batch < last; batch++) backwards(&norm, batch, own);
    if (!one->by_x) return;
    float *by_x = one->by_x + first * steps * in;
    multiply(one->by_hidden[0] + first * long_steps * out, long_steps * out, out, by_x, steps * in, in, last - first, steps,
             start->turned, start->kernel, out, in, NULL, 0);
    if (around->weight) {
        multiply(one->gradient + first * one->gradient_batch, one->gradient_batch, one->gradient_step, by_x, steps * in, in,
                 last - first, steps, around->turned, 1, out, in, NULL, 1);
        return;
    }
    for (int64_t batch = first; batch < last; batch++)
        for (int64_t t = 0; t < steps; t++) {
            const float *came = one->gradient + batch * one->gradient_batch + t * one->gradient_step;
            float *to = one->by_x + (batch * steps + t) * in;
            for (int64_t c = 0; c < in; c++) to[c] += came[c];
        }
}

// Do a block forwards or backwards.
void run_block(const block *one, int64_t is_backwards, int64_t threads) {
    const convolution *all[] = {&one->first, &one->second, &one->around};
    int64_t steps = one->steps, edge = one->first.kernel / 2, long_steps = steps + 2 * edge;
    int64_t in = one->first.in, out = one->first.out, some = SOME / steps > 0 ? SOME / steps : 1;
    IN_PARALLEL {
        PART
        float *scratch = one->scratch + part * block_scratch(steps, out);
        for (int i = 0; i < 3; i++)
            if (all[i]->weight && (!is_backwards || i == 1 || one->by_x)) lay(all[i], (int)is_backwards, part, parts);
        WAIT
        int64_t last = one->batch * (part + 1) / parts;
        for (int64_t first = one->batch * part / parts; first < last; first += some) {
            int64_t end = last - first < some ? last : first + some;
            if (is_backwards) block_backwards(one, first, end, scratch);
            else block_forwards(one, first, end, scratch);
        }
        if (is_backwards) {
            WAIT
            int64_t from = out * part / parts, to = out * (part + 1) / parts;
            for (int i = 0; i < 2; i++) {
                int64_t wide = i ? out : in;
                add_samples(&one->norms[i], 0, from, to);
                weigh(all[i], one->by_hidden[i] + edge * out, long_steps * out, out, one->padded[i], long_steps * wide, wide,
                      one->batch, steps, part, parts);
            }
            if (one->around.weight) {
                weigh(&one->around, one->gradient, one->gradient_batch, one->gradient_step, one->padded[0] + edge * in,
                      long_steps * in, in, one->batch, steps, part, parts);
                for (int64_t c = from; c < to; c++) one->by_bias[c] = 0;
                for (int64_t row = 0; row < one->batch * steps; row++) {
                    const float *came = one->gradient + row / steps * one->gradient_batch + row % steps * one->gradient_step;
                    for (int64_t c = from; c < to; c++) one->by_bias[c] += came[c];
                }
            }
        }
    }
}
